"""Verdicts of health checks fail closed; the recovery ladder climbs within its budgets and ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from db.models import DeviceFailureRow
from orchestrator.device_facts.seen import Seen
from orchestrator.health.failing import FailureBudget, cause_of
from orchestrator.health.judge import Gathered, judge, passed
from orchestrator.health.ladder import LADDER, Budgets, Past, Reachable, next_step
from orchestrator.inventory import parse_inventory
from sti_runtime.journal_format import PROTOCOL_VERSION
from sti_runtime.messages import Sensors
from tests.unit.test_doctor import FACTS

HOUR_NS = 3600 * 10**9
GATES = "gates: {max_temperature_c: 40, min_battery_percent: 50, min_free: 1GB}"
WELL = Sensors(
    wall_ns=1,
    temperature_milli_c=30_000,
    cpu_khz=(),
    load_milli=100,
    available_memory_bytes=1,
    free_bytes=8 << 30,
    battery_percent=90,
    throttled=False,
)


def gathered(fields: str = "", *, clock_offset_s: int | None = 0, **changes: Any) -> Gathered:
    """A board without a battery that is well, but for the changes of its sensors."""
    extra = f", {fields}" if fields else ""
    text = f"version: 1\ndevices: [{{name: dut, transport: local{extra}}}]"
    device = parse_inventory(text.encode(), Path("inventory.yaml")).devices[0]
    seen = Seen("linux", "/w", {"machine": "aarch64"}, clock_offset_s)
    facts = FACTS.model_copy(update={"protocol": PROTOCOL_VERSION, "battery": False})
    return Gathered(device, seen, facts, WELL.model_copy(update=changes))


def verdicts(of: Gathered) -> dict[str, str]:
    return {item.item: item.verdict for item in judge(of)}


def test_a_well_device_passes_everything() -> None:
    found = judge(gathered(GATES))
    assert {item.verdict for item in found} == {"pass"}
    assert passed(found)
    assert [item.item for item in found] == [
        "reach", "clock", "agent", "identity", "probe", "space", "battery", "temperature",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sensor", "item", "bad"),
    [
        ("temperature_milli_c", "temperature", 40_001),
        ("battery_percent", "battery", 49),
        ("free_bytes", "space", 999_999_999),
    ],
)
def test_a_gate_that_is_asked_passes_by_its_sensor_alone(sensor: str, item: str, bad: int) -> None:
    for value, verdict in ((None, "ungated"), (bad, "fail")):
        of = gathered(GATES, **{sensor: value})
        assert verdicts(of)[item] == verdict
        assert not passed(judge(of))


def test_what_nobody_asks_for_and_nobody_can_read_is_told_and_does_not_count() -> None:
    of = gathered(temperature_milli_c=None, battery_percent=None, clock_offset_s=None)
    found = verdicts(of)
    assert (found["temperature"], found["clock"], found.get("battery")) == ("ungated", "ungated", None)
    assert passed(judge(of))
    assert verdicts(gathered(free_bytes=None))["space"] == "ungated"
    assert not passed(judge(gathered(free_bytes=None)))
    assert verdicts(gathered(throttled=True))["temperature"] == "fail"
    assert verdicts(gathered(clock_offset_s=90_000))["clock"] == "fail"


def test_after_the_first_that_lacks_nothing_is_said() -> None:
    whole = gathered(GATES)
    assert verdicts(replace(whole, seen=None, problem="no route")) == {"reach": "fail"}
    assert judge(replace(whole, seen=None, problem="no route"))[0].detail == "no route"
    assert list(verdicts(replace(whole, facts=None))) == ["reach", "clock", "agent"]
    assert verdicts(replace(whole, sensors=None))["probe"] == "fail"
    assert verdicts(replace(whole, identity="0" * 16))["identity"] == "fail"


# ------------------------------------------------------------------ ladder


ADB = Reachable("adb", may_reboot=True)


def climb(device: Reachable, budgets: Budgets, outcomes: dict[str, str], every_ns: int = 0) -> list[str]:
    """The steps of one climb that nothing ends but quarantine."""
    past: list[Past] = []
    steps: list[str] = []
    while len(steps) < 50:
        step = next_step(past, len(past) * every_ns, device, budgets)
        steps.append(step.step)
        if step.step == "quarantine":
            return steps
        past.append(Past(step.step, outcomes.get(step.step, "failed"), len(past) * every_ns))
    return steps


def test_every_way_to_reach_a_device_has_its_rungs() -> None:
    budgets = Budgets()
    assert climb(ADB, budgets, {}) == ["reconnect", "reconnect", "fresh-server", "reboot", "quarantine"]
    assert climb(Reachable("adb", may_reboot=False), budgets, {}) == [
        "reconnect", "reconnect", "fresh-server", "quarantine",
    ]  # fmt: skip
    assert climb(Reachable("ssh", may_reboot=True), budgets, {}) == [
        "reconnect", "reconnect", "reboot", "quarantine",
    ]  # fmt: skip
    assert climb(Reachable("local", may_reboot=True), budgets, {}) == [
        "reconnect", "reconnect", "quarantine",
    ]  # fmt: skip


def test_a_step_that_cannot_be_done_is_not_tried_again_and_said_so() -> None:
    budgets = Budgets({"reconnect": 0, "fresh-server": 3, "reboot": 1})
    assert climb(ADB, budgets, {"fresh-server": "skipped"}) == ["fresh-server", "reboot", "quarantine"]
    end = next_step([Past("fresh-server", "skipped", 0), Past("reboot", "failed", 1)], 2, ADB, budgets)
    assert dict(end.passed_over) == {
        "reconnect": "tried 0 times within 6 h",
        "fresh-server": "it cannot be done here",
        "reboot": "tried 1 times within 6 h",
    }


def test_a_device_that_was_well_for_a_window_starts_over() -> None:
    past = [Past("reconnect", "recovered", 0), Past("reconnect", "recovered", 1)]
    assert next_step(past, 2, ADB, Budgets()).step == "fresh-server"
    assert next_step(past, 7 * HOUR_NS, ADB, Budgets()).step == "reconnect"


@given(
    st.lists(
        st.builds(
            Past,
            st.sampled_from([*LADDER, "quarantine"]),
            st.sampled_from(["recovered", "failed", "skipped"]),
            st.integers(0, 10 * HOUR_NS),
        ),
        max_size=12,
    ),
    st.integers(0, 10 * HOUR_NS),
    st.sampled_from(["adb", "ssh", "local"]),
    st.booleans(),
)
def test_no_budget_is_exceeded_and_nothing_is_rebooted_unasked(
    past: list[Past], now_ns: int, transport: str, may_reboot: bool
) -> None:
    budgets = Budgets()
    step = next_step(past, now_ns, Reachable(transport, may_reboot), budgets).step
    if step != "quarantine":
        taken = [e for e in past if e.step == step and now_ns - e.wall_ns < budgets.window_ns]
        assert len(taken) < budgets.tries[step]
    assert step != "reboot" or (may_reboot and transport != "local")
    assert step != "fresh-server" or transport == "adb"


def test_failures_beyond_the_budget_are_a_cause() -> None:
    failures = [DeviceFailureRow(what=f"lost {number}", wall_ns=number) for number in range(3)]
    assert cause_of(failures[:2], FailureBudget(2, HOUR_NS)) is None
    assert cause_of(failures, FailureBudget(2, HOUR_NS)) == (
        "it failed 3 times within 1 h; the last time: lost 2"
    )
