"""Reaching devices: what a person stops ends, a transfer as well as a wait."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from orchestrator.errors import HaltedError, LinkError
from orchestrator.inventory import load_inventory
from orchestrator.reach import Reach
from orchestrator.settings import load_settings
from tests.farm_world import write_inventory


@pytest.fixture
def reach(tmp_path: Path) -> Reach:
    write_inventory(tmp_path, "{name: desk, transport: local, threads: 1, workdir: work}")
    settings = load_settings(environ={}, cwd=tmp_path)
    return Reach(settings, load_inventory(tmp_path / "inventory.yaml").devices)


def test_a_halted_transfer_ends_at_its_next_step(reach: Reach) -> None:
    forward = reach.forward("desk")
    forward(1, 10)
    reach.halt("desk")
    with pytest.raises(HaltedError, match="desk: it was stopped"):
        forward(2, 10)
    assert reach.underway("desk").sent_bytes == 2


def test_a_halted_wait_for_a_device_ends(reach: Reach) -> None:
    reach.retried("desk", lambda: None)  # it was reached: from now on it is waited for
    asked = threading.Event()

    def away() -> None:
        asked.set()
        raise LinkError("no route to it.", "Look at the cable.", device="desk")

    def halt() -> None:
        asked.wait()
        reach.halt("desk")

    halting = threading.Thread(target=halt)
    halting.start()
    with pytest.raises(HaltedError):
        reach.retried("desk", away)
    halting.join()
