"""Facts the host reads of a device without an agent: each a command and a pure parser of what it printed."""
