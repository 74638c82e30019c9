"""Gates fail closed; the fence lets no stale controller in."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import RefusedError
from agent.fence import admit, parse_lease, read_fence, still_admitted
from agent.gates import Settling, check_gates, gate_error, recent, settle, shut
from agent.spool import Spool
from sti_runtime.errors import FormatError, InputError
from sti_runtime.messages import Gates, GateVerdict, Lease, Sensors

COLD = Sensors(
    wall_ns=0, temperature_milli_c=30_000, cpu_khz=(), load_milli=100, available_memory_bytes=None,
    free_bytes=10**9, battery_percent=80, throttled=None,
)  # fmt: skip
BLIND = Sensors(
    wall_ns=0, temperature_milli_c=None, cpu_khz=(), load_milli=None, available_memory_bytes=None,
    free_bytes=None, battery_percent=None, throttled=None,
)  # fmt: skip
ALL = Gates(
    max_temperature_milli_c=40_000, min_battery_percent=50, max_load_milli=500, min_free_bytes=10**6,
    wait_limit_s=5
)  # fmt: skip
NONE = Gates(
    max_temperature_milli_c=None, min_battery_percent=None, max_load_milli=None, min_free_bytes=None,
    wait_limit_s=5
)  # fmt: skip


S = 1_000_000_000


def steady(now: Sensors) -> Settling | None:
    """What is known of a device whose temperature has been this one for a while."""
    return settle(settle(None, now, 0), now, 2 * S)


def check(gates: Gates, now: Sensors) -> tuple[GateVerdict, ...]:
    """The verdicts of a device whose readings have been these for a while."""
    return check_gates(gates, now, steady(now))


def verdicts(gates: Gates, now: Sensors) -> dict[str, str]:
    return {v.gate: v.verdict for v in check(gates, now)}


def at(milli_c: int) -> Sensors:
    return COLD.model_copy(update={"temperature_milli_c": milli_c})


def test_all_gates_pass_on_an_idle_charged_cool_device() -> None:
    assert verdicts(ALL, COLD) == dict.fromkeys(("temperature", "battery", "load", "free-space"), "pass")


def test_an_unreadable_sensor_is_ungated_never_pass() -> None:
    assert verdicts(ALL, BLIND) == dict.fromkeys(("temperature", "battery", "load", "free-space"), "ungated")
    assert shut(check(ALL, BLIND)) == ()


def test_what_is_not_asked_has_no_verdict() -> None:
    assert check_gates(NONE, COLD, None) == ()


@pytest.mark.parametrize(
    ("gate", "field", "value"),
    [
        ("temperature", "temperature_milli_c", 40_001),
        ("battery", "battery_percent", 49),
        ("load", "load_milli", 501),
        ("free-space", "free_bytes", 10**6 - 1),
    ],
)
def test_each_gate_shuts_just_beyond_its_limit(gate: str, field: str, value: int) -> None:
    beyond = COLD.model_copy(update={field: value})
    assert [v.gate for v in shut(check(ALL, beyond))] == [gate]
    toward = value - 1 if gate in ("temperature", "load") else value + 1
    assert shut(check(ALL, COLD.model_copy(update={field: toward}))) == ()


def temperature(readings: list[tuple[float, int]]) -> GateVerdict:
    """The temperature's verdict behind readings: (seconds, milli °C)."""
    settling = None
    for second, milli_c in readings:
        settling = settle(settling, at(milli_c), round(second * S))
    return check_gates(ALL, at(readings[-1][1]), settling)[0]


@pytest.mark.parametrize(
    ("readings", "verdict", "reason"),
    [
        ([(0, 30_000)], "fail", "stable or not shows in 2 s"),
        ([(0, 30_000), (1.9, 30_000)], "fail", "stable or not shows in 2 s"),
        ([(0, 30_000), (2, 30_499)], "pass", ""),
        ([(0, 30_000), (2, 30_500)], "fail", "warming: was 30000m°C a moment ago"),
        ([(0, 45_000), (2, 39_900)], "fail", "cooling: was 45000m°C a moment ago"),
        ([(0, 45_000), (2, 39_900), (4, 39_600)], "pass", ""),
        ([(0, 45_000), (2, 39_900), (3, 39_600)], "fail", "cooling: was 45000m°C a moment ago"),
        # Units that follow each other closely.
        ([(0, 30_000), (2, 30_000), (2.1, 30_400), (2.2, 30_000)], "pass", ""),
        ([(0, 30_000), (2, 30_000), (2.1, 30_600)], "fail", "warming"),
        ([(0, 30_000), (2, 30_000), (2.1, 30_600), (4.1, 30_600)], "pass", ""),
        # A long unit that left the device as it was, and one that did not.
        ([(0, 30_000), (2, 30_000), (50, 30_100)], "pass", ""),
        ([(0, 30_000), (2, 30_000), (50, 36_000)], "fail", "warming"),
    ],
)
def test_a_device_must_be_stable_not_only_cool(
    readings: list[tuple[float, int]], verdict: str, reason: str
) -> None:
    found = temperature(readings)
    assert found.verdict == verdict
    assert reason in found.detail


def test_an_old_reading_says_nothing_of_now() -> None:
    settling = steady(COLD)
    assert recent(settling, 61 * S) is settling
    assert recent(settling, 63 * S) is None
    assert recent(None, 0) is None


def test_a_sensor_that_cannot_be_read_for_once_changes_nothing() -> None:
    settling = steady(COLD)
    assert settle(settling, BLIND, 3 * S) is settling
    assert check_gates(ALL, BLIND, settling)[0].verdict == "ungated"


def test_the_error_names_gate_reading_limit_and_wait() -> None:
    error = gate_error(check(ALL, at(45_000)), 5.2, ALL)
    for part in ("temperature", "45000", "40000", "5 s"):
        assert part in str(error)


# ------------------------------------------------------------------ fence


def lease(counter: int, store: str = "a", *, takeover: bool = False) -> Lease:
    return Lease(store=store, counter=counter, takeover=takeover)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool.open(tmp_path / "spool")


def test_a_lower_counter_is_stale_and_an_equal_one_is_not(spool: Spool) -> None:
    admit(spool, lease(5))
    admit(spool, lease(5))
    with pytest.raises(RefusedError, match="counter 4, 5 was seen"):
        admit(spool, lease(4))
    with pytest.raises(RefusedError):
        admit(spool, lease(4, takeover=True))
    assert still_admitted(spool, lease(5)) is None
    admit(spool, lease(6))
    assert "stale" in (still_admitted(spool, lease(5)) or "")


def test_another_store_needs_a_take_over_which_ends_the_first(spool: Spool) -> None:
    admit(spool, lease(5))
    with pytest.raises(RefusedError, match="belongs to store 'a'"):
        admit(spool, lease(9, "b"))
    admit(spool, lease(1, "b", takeover=True))
    assert still_admitted(spool, lease(5)) is not None
    assert still_admitted(spool, lease(1, "b", takeover=True)) is None
    with pytest.raises(RefusedError):
        admit(spool, lease(5))
    with pytest.raises(RefusedError):
        admit(spool, lease(4, takeover=True))
    admit(spool, lease(5, takeover=True))
    assert "belongs to store 'a'" in (still_admitted(spool, lease(1, "b", takeover=True)) or "")


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("ab"), st.booleans()), max_size=12))
def test_no_counter_ever_falls(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[int, str, bool]]
) -> None:
    spool = Spool.open(tmp_path_factory.mktemp("fence"))
    highest: dict[str, int] = {}
    for counter, store, takeover in moves:
        try:
            admit(spool, lease(counter, store, takeover=takeover))
        except RefusedError:
            continue
        assert counter >= highest.get(store, 0)
        highest[store] = counter
    fence = read_fence(spool)
    assert (fence.counters if fence else {}) == highest


def test_a_damaged_fence_lets_nobody_in(spool: Spool) -> None:
    admit(spool, lease(5))
    spool.fence.write_bytes(spool.fence.read_bytes()[:-3])
    with pytest.raises(FormatError):
        admit(spool, lease(6))


def test_leases_on_the_command_line() -> None:
    assert parse_lease("lab:7") == lease(7, "lab")
    assert parse_lease("lab:7:takeover") == lease(7, "lab", takeover=True)
    for text in ("lab", "lab:x", "lab:7:force", ":7", "lab:-1", f"lab:{2**63}", "a:1:takeover:x"):
        with pytest.raises(InputError):
            parse_lease(text)
