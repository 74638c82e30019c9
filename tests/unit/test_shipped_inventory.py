"""The inventory of the repository and the one that ``stifarm init`` writes are one and the same."""

from __future__ import annotations

from pathlib import Path

from orchestrator.cli.demo import TEMPLATE
from orchestrator.inventory import load_inventory

ROOT = Path(__file__).parents[2]


def test_init_writes_the_inventory_of_the_repository() -> None:
    assert TEMPLATE.read_bytes() == (ROOT / "inventory.yaml").read_bytes()


def test_it_holds_this_machine_and_two_boards_starved_in_different_ways() -> None:
    devices = {device.name: device for device in load_inventory(ROOT / "inventory.yaml").devices}
    assert not devices["this-machine"].emulated
    slow_io, slow_cpu = devices["board-slow-io"].emulate, devices["board-slow-cpu"].emulate
    assert slow_io is not None
    assert slow_cpu is not None
    assert (slow_io.read_bytes_per_s is None, slow_io.cpu_share_milli) == (False, None)
    assert (slow_cpu.read_bytes_per_s, slow_cpu.cpu_share_milli is None) == (None, False)
