"""What holds for every test."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

# A suite started in the background of a script inherits an ignored SIGINT and would hand it on to the
# processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes is the machine's affair: it may be loaded, or slow to flush what it writes.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """The command line logs to the standard error of its test, which is closed when the next one runs."""
    yield
    structlog.reset_defaults()
