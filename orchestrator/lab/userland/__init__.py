"""What makes a virtual phone look like one from inside: its folders, its programs, its namespaces.

``tree`` lays the folders out, ``programs/`` holds the phone's own commands, ``supervisor`` keeps the phone
switched on and boots it again, ``boot`` is one boot: it makes the phone's view of the machine and starts
the adb daemon in it. ``namespaces`` are the system calls for that. Standard library only.
"""
