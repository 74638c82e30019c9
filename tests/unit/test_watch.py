"""What the readings between a unit's samples show, from captured kernel files that change in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.clocks import MAX_DOMAINS
from agent.watch import MAX_ZONES, Watch
from tests.unit.test_sensors import write

CPU = "sys/devices/system/cpu/cpu{}/cpufreq/{}"
BOARD = {
    CPU.format(0, "scaling_cur_freq"): "1800000\n",
    CPU.format(0, "scaling_max_freq"): "1800000\n",
    CPU.format(0, "scaling_governor"): "performance\n",
    CPU.format(4, "scaling_cur_freq"): "600000\n",
    CPU.format(4, "scaling_max_freq"): "2400000\n",
    CPU.format(4, "scaling_governor"): "schedutil\n",
    "sys/class/thermal/thermal_zone0/temp": "51000\n",
    "sys/class/thermal/thermal_zone1/temp": "0\n",
    "sys/class/thermal/cooling_device0/type": "thermal-cpufreq-0\n",
    "sys/class/thermal/cooling_device0/cur_state": "0\n",
    "sys/class/thermal/cooling_device1/type": "fan\n",
    "sys/class/thermal/cooling_device1/cur_state": "3\n",
    "proc/loadavg": "0.50 0.58 0.59 1/389 4\n",
    "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
}
"""Two clock domains, the first with a fixed clock; CPUs 0 and 4 are used."""

HELD = [
    ({"sys/class/thermal/cooling_device0/cur_state": "1"}, True),
    ({"sys/class/thermal/cooling_device1/cur_state": "4"}, False),
    ({CPU.format(0, "scaling_max_freq"): "1530000"}, False),
    ({CPU.format(0, "scaling_max_freq"): "1529999"}, True),
    ({CPU.format(4, "scaling_max_freq"): "2000000"}, True),
    ({CPU.format(0, "scaling_cur_freq"): "1530000"}, False),
    ({CPU.format(0, "scaling_cur_freq"): "1529999"}, True),
    ({CPU.format(4, "scaling_cur_freq"): "300000"}, False),  # its governor follows the load
    ({CPU.format(0, "scaling_governor"): "powersave"}, False),  # the clock is still what it was
    ({"sys/class/thermal/thermal_zone0/temp": "60000"}, False),
    ({"sys/class/thermal/thermal_zone0/temp": "60001"}, True),
    ({"proc/loadavg": "9.0 1 1 1/1 1", "proc/meminfo": "MemAvailable: 1 kB"}, False),
]
"""Changes in the middle of a unit whose temperature limit is 60 °C, and whether they show throttling."""


def board(root: Path, **options: int | None) -> Watch:
    limit = options.get("limit_milli_c", 60_000)
    return Watch((0, 4), limit, sys=root / "sys", proc=root / "proc")


@pytest.mark.parametrize(("changes", "throttled"), HELD)
def test_throttling_counts_against_the_samples_beside_it_alone(
    tmp_path: Path, changes: dict[str, str], throttled: bool
) -> None:
    write(tmp_path, BOARD)
    watch = board(tmp_path)
    found = [watch.sampled(1)]
    write(tmp_path, changes)
    found += [watch.sampled(2), watch.sampled(3)]
    write(tmp_path, BOARD)
    found += [watch.sampled(4), watch.sampled(5)]
    assert found == [False, throttled, throttled, throttled, False]
    kept = {reading.after: reading.throttled for reading in watch.readings}
    assert list(kept) == sorted(kept)
    assert {after: kept[after] for after in (0, 5)} == {0: False, 5: False}
    if throttled:
        assert kept == {0: False, 2: True, 4: False, 5: False}


def test_a_unit_that_begins_throttled_is_so_until_it_is_not(tmp_path: Path) -> None:
    write(tmp_path, BOARD | {"sys/class/thermal/cooling_device0/cur_state": "2"})
    watch = board(tmp_path)
    write(tmp_path, BOARD)
    assert [watch.sampled(1), watch.sampled(2)] == [True, False]


def test_a_clock_above_the_sure_one_may_fall_to_it(tmp_path: Path) -> None:
    write(tmp_path, BOARD | {CPU.format(0, "base_frequency"): "1000000"})
    watch = board(tmp_path)
    found: list[bool] = []
    for khz in ("1000000", "850000", "849999"):
        write(tmp_path, {CPU.format(0, "scaling_cur_freq"): khz})
        found.append(watch.sampled(len(found) + 1))
    assert found == [False, False, True]


def test_readings_are_kept_only_where_something_moved(tmp_path: Path) -> None:
    write(tmp_path, BOARD)
    watch = board(tmp_path)
    moves = [
        {"sys/class/thermal/thermal_zone0/temp": "51999"},
        {"sys/class/thermal/thermal_zone0/temp": "52000"},
        {"proc/loadavg": "0.74"},
        {"proc/loadavg": "0.75"},
        {"proc/meminfo": "MemAvailable: 7501 kB"},
        {"proc/meminfo": "MemAvailable: 7500 kB"},
        {CPU.format(4, "scaling_cur_freq"): "689999"},
        {CPU.format(4, "scaling_cur_freq"): "690000"},
        {CPU.format(0, "scaling_max_freq"): "1799999"},
        {"proc/loadavg": ""},
        {},
    ]
    for after, move in enumerate(moves, 1):
        write(tmp_path, move)
        assert not watch.sampled(after)
    assert [reading.after for reading in watch.readings] == [0, 2, 4, 6, 8, 9, 10, 11]
    last = watch.readings[-1]
    assert (last.clocks_khz, last.ceilings_khz) == ((1_800_000, 690_000), (1_799_999, 2_400_000))
    assert (last.temperature_milli_c, last.load_milli, last.available_memory_bytes) == (
        52_000,
        None,
        7_680_000,
    )


def test_nothing_readable_judges_nothing(tmp_path: Path) -> None:
    watch = Watch((0,), 60_000, sys=tmp_path, proc=tmp_path)
    assert not watch.sampled(1)
    assert len(watch.readings) == 2
    for reading in watch.readings:
        assert (reading.clocks_khz, reading.ceilings_khz, reading.throttled) == ((), (), None)
        assert (reading.temperature_milli_c, reading.load_milli) == (None, None)


def test_a_clock_that_can_no_longer_be_read_is_none_and_not_judged(tmp_path: Path) -> None:
    write(tmp_path, BOARD)
    watch = board(tmp_path)
    (tmp_path / CPU.format(0, "scaling_cur_freq")).unlink()
    assert not watch.sampled(1)
    assert watch.readings[-1].clocks_khz == (None, 600_000)


def test_the_number_of_files_is_bounded(tmp_path: Path) -> None:
    """The hottest zones are watched, the first CPU of each domain, and of those not more than the caps."""
    zones = {f"sys/class/thermal/thermal_zone{n}/temp": str(40_000 + 10 * n) for n in range(12)}
    clocks = {CPU.format(cpu, "scaling_max_freq"): "1000" for cpu in range(MAX_DOMAINS + 4)}
    write(tmp_path, zones | clocks)
    shared = tmp_path / "sys/devices/system/cpu/cpu99"
    shared.mkdir()
    (shared / "cpufreq").symlink_to(tmp_path / "sys/devices/system/cpu/cpu0/cpufreq")
    cpus = (0, 99, *range(1, MAX_DOMAINS + 4))
    watch = Watch(cpus, None, sys=tmp_path / "sys", proc=tmp_path)
    assert len(watch.readings[0].ceilings_khz) == MAX_DOMAINS
    write(tmp_path, {f"sys/class/thermal/thermal_zone{12 - MAX_ZONES - 1}/temp": "90000"})
    watch.sampled(1)
    assert watch.readings[-1].temperature_milli_c == 40_110
    write(tmp_path, {f"sys/class/thermal/thermal_zone{12 - MAX_ZONES}/temp": "90000"})
    watch.sampled(2)
    assert watch.readings[-1].temperature_milli_c == 90_000
