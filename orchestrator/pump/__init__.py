"""The jobs of a fleet: its hosts watch their devices, one loop of the controller drives all of them."""
