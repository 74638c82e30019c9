"""Telling people of events: by webhook or by command, at least once, from rows (docs/health.md)."""
