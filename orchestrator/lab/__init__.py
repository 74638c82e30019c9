"""The virtual lab: boards with a real sshd and phones with an adb daemon, on this machine. See docs/lab.md.

Each device is a handful of processes in namespaces of their own, started by ``up`` and found again from
``state``: any later process can take the lab down, whatever became of the one that brought it up.
"""
