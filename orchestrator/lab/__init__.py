"""The virtual lab: boards and phones that are processes of this machine, and the faults they can have."""
