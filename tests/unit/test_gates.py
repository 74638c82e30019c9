"""Gates fail closed; the fence lets no stale controller in."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import RefusedError
from agent.fence import admit, parse_lease, read_fence, still_admitted
from agent.gates import check_gates, gate_error, shut
from agent.spool import Spool
from sti_runtime.errors import FormatError, InputError
from sti_runtime.messages import Gates, Lease, Sensors

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


def verdicts(gates: Gates, now: Sensors, previous: Sensors | None = None) -> dict[str, str]:
    return {v.gate: v.verdict for v in check_gates(gates, now, previous)}


def test_all_gates_pass_on_an_idle_charged_cool_device() -> None:
    assert verdicts(ALL, COLD) == dict.fromkeys(("temperature", "battery", "load", "free-space"), "pass")


def test_an_unreadable_sensor_is_ungated_never_pass() -> None:
    assert verdicts(ALL, BLIND) == dict.fromkeys(("temperature", "battery", "load", "free-space"), "ungated")
    assert shut(check_gates(ALL, BLIND)) == ()


def test_what_is_not_asked_has_no_verdict() -> None:
    assert check_gates(NONE, COLD) == ()


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
    assert [v.gate for v in shut(check_gates(ALL, beyond))] == [gate]
    toward = value - 1 if gate in ("temperature", "load") else value + 1
    assert shut(check_gates(ALL, COLD.model_copy(update={field: toward}))) == ()


def test_a_device_that_is_still_cooling_is_not_stable() -> None:
    hot = COLD.model_copy(update={"temperature_milli_c": 45_000})
    cooling = COLD.model_copy(update={"temperature_milli_c": 39_900})
    settled = COLD.model_copy(update={"temperature_milli_c": 39_600})
    assert verdicts(ALL, hot)["temperature"] == "fail"
    assert verdicts(ALL, cooling, hot)["temperature"] == "fail"
    assert verdicts(ALL, settled, cooling)["temperature"] == "pass"


def test_the_error_names_gate_reading_limit_and_wait() -> None:
    hot = COLD.model_copy(update={"temperature_milli_c": 45_000})
    error = gate_error(check_gates(ALL, hot), 5.2, ALL)
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
