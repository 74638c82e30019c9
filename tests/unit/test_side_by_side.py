"""Devices of one machine take turns, machines go side by side, Ctrl-C reaches them all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from orchestrator.inventory import parse_inventory
from orchestrator.side_by_side import by_machine, side_by_side

LOCK = Path("/this/machine.lock")


def test_devices_are_grouped_by_the_machine_that_they_share() -> None:
    text = """\
version: 1
devices:
  - {name: desk, transport: local}
  - {name: phone, transport: adb, serial: A1}
  - {name: slow, transport: local, emulate: {cpu_share: 0.5}}
  - {name: board, transport: ssh, address: "b:22"}
  - {name: virtual, transport: ssh, address: "127.0.0.1:2222", machine_lock: /this/machine.lock}
"""
    devices = parse_inventory(text.encode(), Path("inventory.yaml")).devices
    groups = [[device.name for device in group] for group in by_machine(devices, LOCK)]
    assert groups == [["desk", "slow", "virtual"], ["phone"], ["board"]]


def test_groups_go_side_by_side_and_their_items_in_turn() -> None:
    meet = threading.Barrier(2, timeout=300)
    order: list[str] = []

    def act(item: str) -> str:
        if item in ("a1", "b1"):
            meet.wait()  # ends only if both are under way at once
        order.append(item)
        return item.upper()

    found = dict(side_by_side([["a1", "a2"], ["b1"]], act, threading.Event()))
    assert found == {"a1": "A1", "a2": "A2", "b1": "B1"}
    assert order.index("a1") < order.index("a2")


def test_more_groups_than_threads_are_all_worked_on() -> None:
    groups = [[number] for number in range(200)]
    assert sorted(side_by_side(groups, lambda n: n + 1, threading.Event())) == [
        (n, n + 1) for n in range(200)
    ]


def test_an_error_stops_the_others_before_their_next_item_and_is_raised() -> None:
    stop, begun = threading.Event(), list[str]()

    def act(item: str) -> None:
        begun.append(item)
        if item == "bad":
            raise ValueError(item)
        assert stop.wait(300)

    with pytest.raises(ValueError, match="bad"):
        list(side_by_side([["bad"], ["long", "never"]], act, stop))
    assert "never" not in begun


def test_an_interrupt_of_the_caller_stops_every_thread() -> None:
    stop, left = threading.Event(), list[str]()

    def act(item: str) -> None:
        if item == "quick":
            return
        assert stop.wait(300)
        left.append(item)

    running = side_by_side([["quick"], ["x"], ["y"]], act, stop)
    assert next(running) == ("quick", None)
    with pytest.raises(KeyboardInterrupt):
        running.throw(KeyboardInterrupt())
    assert sorted(left) == ["x", "y"]


def test_one_group_is_worked_on_in_the_calling_thread() -> None:
    seen = [
        thread
        for _, thread in side_by_side([[1, 2]], lambda _: threading.current_thread(), threading.Event())
    ]
    assert seen == [threading.current_thread()] * 2
