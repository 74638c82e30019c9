"""What integration tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator.farm import Farm
from orchestrator.worker import HostWorker


@pytest.fixture
def worker(farm: Farm) -> Iterator[HostWorker]:
    """The worker of a test file's farm, in this process."""
    started = HostWorker(farm.settings, farm.inventory.devices)
    yield started
    started.close()
