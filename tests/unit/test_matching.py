"""Selectors."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import SelectorError
from orchestrator.inventory import parse_inventory
from orchestrator.matching import select

DEVICES = parse_inventory(
    b"""
version: 1
devices:
  - {name: desk, transport: local, labels: {kind: computer}}
  - {name: board-1, transport: local, labels: {kind: board, room: "2"}}
  - {name: board-2, transport: local, labels: {kind: board, room: "3"}}
""",
    Path("inventory.yaml"),
).devices
NAMES = [device.name for device in DEVICES]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("all", NAMES),
        ("board-2", ["board-2"]),
        ("board-2,desk", ["desk", "board-2"]),
        (" desk , desk ", ["desk"]),
        ("kind=board", ["board-1", "board-2"]),
        ("kind=board,!board-1", ["board-2"]),
        ("!board-1", ["desk", "board-2"]),
        ("!kind=board", ["desk"]),
        ("!board-1,board-1,desk", ["desk"]),
        ("transport:local", NAMES),
        ("all,!room=2", ["desk", "board-2"]),
        ("room=2,room=9", ["board-1"]),
    ],
)
def test_a_selector_names_its_devices(selector: str, expected: list[str]) -> None:
    assert [device.name for device in select(DEVICES, selector)] == expected


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("bord-1", "No device is called 'bord-1'. Did you mean board-1 or board-2?"),
        ("!bord-1", "No device is called 'bord-1'"),
        ("xyzzy", "There is: board-1, board-2, desk."),
        ("knd=board", "No device has the label 'knd'. Did you mean kind?"),
        ("transport:adb", "No device has the transport 'adb'. There is: local."),
        ("kind=phone", "selects no device. The inventory has: desk,"),
        ("desk,!desk", "selects no device"),
        ("!all", "selects no device"),
        ("", "has an empty term"),
        ("desk,,board-1", "has an empty term"),
        ("!", "has an empty term"),
    ],
)
def test_a_selector_that_names_nothing_is_an_error(selector: str, message: str) -> None:
    with pytest.raises(SelectorError) as caught:
        select(DEVICES, selector)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_inventory_without_devices_selects_none() -> None:
    with pytest.raises(SelectorError, match="The inventory has: none"):
        select((), "all")


@given(st.sets(st.sampled_from(NAMES)), st.sets(st.sampled_from(NAMES)))
def test_a_selection_is_the_union_less_the_exclusions(wanted: set[str], excluded: set[str]) -> None:
    terms = [*sorted(wanted), *(f"!{name}" for name in sorted(excluded))]
    expected = (wanted if wanted else set(NAMES)) - excluded
    if terms and expected:
        assert {device.name for device in select(DEVICES, ",".join(terms))} == expected
    else:
        with pytest.raises(SelectorError):
            select(DEVICES, ",".join(terms))
