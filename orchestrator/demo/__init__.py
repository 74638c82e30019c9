"""The demo: a task made by its own generator and a small elastic model trained on it."""
