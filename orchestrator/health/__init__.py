"""Whether devices can be relied on: health checks, the recovery ladder, quarantine (docs/health.md)."""
