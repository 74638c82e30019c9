"""The word for health checks among the kinds of jobs."""

from __future__ import annotations

HEALTH = "health"
