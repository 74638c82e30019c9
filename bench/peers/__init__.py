"""Other engines: an environment of their own, models in their formats, one driver for each."""
