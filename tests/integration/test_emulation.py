"""Emulated devices: the choice of mechanism, and each mechanism for real against its stated rate."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.cgroups import Hierarchies, apply_limits, cpu_limits, launch_prefix, system_hierarchies
from orchestrator.emulation import (
    TOLERANCE,
    GroupSite,
    Probe,
    ResolvedEmulation,
    deviations,
    resolve_emulation,
)
from orchestrator.errors import StableError
from orchestrator.inventory import Device, parse_inventory
from orchestrator.settings import load_settings
from orchestrator.worker import HostWorker
from sti_runtime.messages import Emulation, Lease, VerifiedEmulation

LEASE = Lease(store="test", counter=1, takeover=False)
NO_GROUPS = Hierarchies(None, None, None)


def _writable(root: Path | None) -> bool:
    return root is not None and os.geteuid() == 0 and os.access(root, os.W_OK)


HERE = system_hierarchies()
needs_cpu_groups = pytest.mark.skipif(
    not (_writable(HERE.cpu_v1) or _writable(HERE.unified)), reason="needs root and a writable CPU cgroup"
)
needs_io_groups = pytest.mark.skipif(
    not (_writable(HERE.blkio_v1) or _writable(HERE.unified)), reason="needs root and a writable IO cgroup"
)


def emulated(emulate: str, workdir: Path | None = None) -> Device:
    place = "" if workdir is None else f", workdir: {workdir}"
    text = f"version: 1\ndevices: [{{name: board, transport: local, threads: 1{place}, emulate: {emulate}}}]"
    return parse_inventory(text.encode(), Path("inventory.yaml")).devices[0]


def measured(
    emulation: Emulation, *, rate: float = 1, read: float = 1, share: float = 1, section: float = 1
) -> VerifiedEmulation:
    """What a probe would report of a device that is off its nominal rates by these factors."""
    io, cpu = emulation.io_bytes_per_s, emulation.cpu_share_milli
    return VerifiedEmulation(
        emulation=emulation,
        io_bytes_per_s=None if io is None else round(io * rate),
        read_bytes=None if io is None else 262_144,
        read_p50_ns=None if io is None else round(65_536_000 * read),
        read_nominal_ns=None if io is None else 65_536_000,
        cpu_share_milli=None if cpu is None else round(cpu * share),
        section_cpu_ns=None if cpu is None else 1_000_000,
        section_p50_ns=None if cpu is None else round(1_000_000_000 / cpu * section),
        section_nominal_ns=None if cpu is None else 1_000_000_000 // cpu,
    )


class Bursty:
    """A probe under which the kernel's limits are off by the given factors and the agent's are exact."""

    def __init__(self, **factors: float) -> None:
        self.factors = factors
        self.probed: list[Emulation] = []

    def __call__(self, emulation: Emulation) -> VerifiedEmulation:
        self.probed.append(emulation)
        io_kernel = emulation.io_mechanism not in (None, "agent")
        cpu_kernel = emulation.cpu_mechanism not in (None, "agent")
        keep = {"rate": io_kernel, "read": io_kernel, "share": cpu_kernel, "section": cpu_kernel}
        return measured(emulation, **{name: f for name, f in self.factors.items() if keep[name]})


@pytest.fixture
def groups(tmp_path: Path) -> Hierarchies:
    """A folder that takes writes like a version 1 hierarchy for the group of ``site``."""
    group = GroupSite.of(emulated("{cpu_share: 1}"), tmp_path, NO_GROUPS).name
    for name, files in {
        "cpu": ("cpu.cfs_period_us", "cpu.cfs_quota_us"),
        "blkio": ("blkio.throttle.read_bps_device",),
    }.items():
        folder = tmp_path / "groups" / name / "stifarm" / group
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).write_text("")
    return Hierarchies(tmp_path / "groups/cpu", tmp_path / "groups/blkio", None)


BOTH = "{read_bandwidth: 4MB/s, cpu_share: 0.25}"


def test_the_kernels_limits_are_taken_when_they_hold(groups: Hierarchies, tmp_path: Path) -> None:
    device, probe = emulated(BOTH), Bursty(rate=1.1, read=0.9, share=0.9)
    site = GroupSite.of(device, tmp_path, groups)
    resolved = resolve_emulation(device, site, probe, tmp_path / "cache/d.json")
    assert (resolved.emulation.io_mechanism, resolved.emulation.cpu_mechanism) == ("cgroup-v1", "cgroup-v1")
    assert (resolved.verified_within_bounds, resolved.reasons) == (True, ())
    assert len(site.enter(resolved.emulation)) > 0
    assert groups.cpu_v1 is not None
    assert (groups.cpu_v1 / "stifarm" / site.name / "cpu.cfs_period_us").read_text() == "4000"


def test_a_bursty_limit_gives_way_to_the_agent_for_its_resource_only(
    groups: Hierarchies, tmp_path: Path
) -> None:
    device, probe = emulated(BOTH), Bursty(read=0.002)
    resolved = resolve_emulation(device, GroupSite.of(device, tmp_path, groups), probe, tmp_path / "d.json")
    assert (resolved.emulation.io_mechanism, resolved.emulation.cpu_mechanism) == ("agent", "cgroup-v1")
    assert resolved.verified_within_bounds
    assert len(probe.probed) == 2
    assert "reads of 262 kB take 131 µs, nominal 65.5 ms" in resolved.reasons[0]


def test_a_virtual_devices_bursty_limit_is_kept_and_the_agent_throttles_too(tmp_path: Path) -> None:
    device = emulated("{read_bandwidth: 4MB/s, cpu_share: 0.25, mechanism: lab-cgroup-v1}")
    site, probe = GroupSite.of(device, tmp_path, NO_GROUPS), Bursty(section=0.26)
    resolved = resolve_emulation(device, site, probe, tmp_path / "d.json")
    found = resolved.emulation
    assert (found.io_mechanism, found.cpu_mechanism) == ("lab-cgroup-v1", "agent")
    assert resolved.verified_within_bounds
    assert resolved.reasons[0].endswith("the agent throttles too")
    assert site.enter(found) == ()  # none of it is this host's to set


def test_without_groups_the_agent_does_it_and_says_why(tmp_path: Path) -> None:
    device, probe = emulated(BOTH), Bursty()
    resolved = resolve_emulation(
        device, GroupSite.of(device, tmp_path, NO_GROUPS), probe, tmp_path / "d.json"
    )
    assert (resolved.emulation.io_mechanism, resolved.emulation.cpu_mechanism) == ("agent", "agent")
    assert len(probe.probed) == 1
    assert any("cpu: no control group hierarchy" in reason for reason in resolved.reasons)


def test_a_device_that_is_off_its_rate_whatever_is_done_is_marked(tmp_path: Path) -> None:
    device = emulated("{cpu_share: 0.5, mechanism: agent}")
    probe: Probe = lambda emulation: measured(emulation, share=0.7)  # noqa: E731
    resolved = resolve_emulation(
        device, GroupSite.of(device, tmp_path, NO_GROUPS), probe, tmp_path / "d.json"
    )
    assert not resolved.verified_within_bounds
    assert "a CPU share of 0.35, nominal 0.5" in resolved.reasons[0]


@pytest.mark.parametrize("factors", [{"read": 0.002}, {"rate": 2.0}, {"share": 1.3}])
def test_an_inventory_that_insists_on_groups_is_not_given_the_agent(
    groups: Hierarchies, tmp_path: Path, factors: dict[str, float]
) -> None:
    device = emulated("{read_bandwidth: 4MB/s, cpu_share: 0.25, mechanism: cgroup}")
    with pytest.raises(StableError, match=r"board: it cannot be slowed by control groups: .*mechanism: auto"):
        resolve_emulation(
            device, GroupSite.of(device, tmp_path, groups), Bursty(**factors), tmp_path / "d.json"
        )
    with pytest.raises(StableError, match="no control group hierarchy"):
        resolve_emulation(device, GroupSite.of(device, tmp_path, NO_GROUPS), Bursty(), tmp_path / "d.json")


def test_the_decision_is_remembered_for_the_same_rates_and_bundle_only(tmp_path: Path) -> None:
    device, probe, cache = emulated(BOTH), Bursty(), tmp_path / "d.json"
    site = GroupSite.of(device, tmp_path, NO_GROUPS)
    first = resolve_emulation(device, site, probe, cache)
    assert resolve_emulation(device, site, probe, cache) == first
    assert len(probe.probed) == 1
    resolve_emulation(device, site, probe, cache, bundle="0" * 64)
    assert len(probe.probed) == 2
    resolve_emulation(emulated("{cpu_share: 0.3}"), site, probe, cache)
    assert len(probe.probed) == 3
    cache.write_text("{damaged")
    resolve_emulation(device, site, probe, cache)
    assert len(probe.probed) == 4


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, set()),
        ({"io_bytes_per_s": None}, {"io"}),
        ({"read_p50_ns": None}, {"io"}),
        ({"read_nominal_ns": 0}, {"io"}),
        ({"cpu_share_milli": None}, {"cpu"}),
        ({"cpu_share_milli": 0, "io_bytes_per_s": 0}, {"io", "cpu"}),
    ],
)
def test_what_a_probe_could_not_measure_is_not_verified(
    change: dict[str, int | None], wrong: set[str]
) -> None:
    nominal = Emulation(
        io_bytes_per_s=10**6, io_mechanism="agent", cpu_share_milli=500, cpu_mechanism="agent"
    )
    assert set(deviations(measured(nominal).model_copy(update=change))) == wrong


# ------------------------------------------------------------------ for real


def worker_for(device: Device, farm: Path) -> HostWorker:
    return HostWorker(load_settings(environ={}, cwd=farm), [device])


TRIES = 8
"""Other programs make a slowed device slower still: it is measured anew until one leaves it alone."""


def settled(
    device: Device, tmp_path: Path, holds: Callable[[ResolvedEmulation], bool]
) -> tuple[HostWorker, ResolvedEmulation, Path]:
    """The device's emulation, verified until ``holds``, or the last try's; its worker and farm.

    No try may find the device faster than it says.
    """
    for attempt in range(TRIES):
        farm = tmp_path / f"farm-{attempt}"
        worker = worker_for(device, farm)
        verified = worker.emulation("board", LEASE)
        assert verified is not None
        resolved = verified
        for found, nominal in (
            (resolved.verified.io_bytes_per_s, resolved.emulation.io_bytes_per_s),
            (resolved.verified.cpu_share_milli, resolved.emulation.cpu_share_milli),
        ):
            assert nominal is None or (found is not None and found <= (1 + TOLERANCE) * nominal), resolved
        if holds(resolved):
            break
        worker.close()
    return worker, resolved, farm


def within_bounds(resolved: ResolvedEmulation) -> bool:
    return resolved.verified_within_bounds


def close(measured_: int | None, nominal: int, tolerance: float = TOLERANCE) -> bool:
    return measured_ is not None and abs(measured_ - nominal) <= tolerance * nominal


def test_the_agent_slows_reading_and_computing_without_root(tmp_path: Path) -> None:
    device = emulated("{read_bandwidth: 8MB/s, cpu_share: 0.3, mechanism: agent}")
    worker, resolved, farm = settled(device, tmp_path, within_bounds)
    assert (resolved.emulation.io_mechanism, resolved.emulation.cpu_mechanism) == ("agent", "agent")
    assert close(resolved.verified.io_bytes_per_s, 8_000_000), resolved
    assert close(resolved.verified.cpu_share_milli, 300), resolved
    assert worker.emulation("board", LEASE) == resolved
    assert list((farm / ".stifarm/devices/board/jobs").iterdir()) == []  # the probe's job is forgotten


def test_a_real_device_is_not_slowed(tmp_path: Path) -> None:
    text = b"version: 1\ndevices: [{name: desk, transport: local}]"
    device = parse_inventory(text, Path("inventory.yaml")).devices[0]
    assert worker_for(device, tmp_path).emulation("desk", LEASE) is None


@pytest.mark.root
@needs_cpu_groups
def test_a_cpu_group_gives_its_share_and_is_gone_after(tmp_path: Path) -> None:
    name = f"test-{os.getpid()}"
    limits = cpu_limits(HERE, name, 250)
    apply_limits([limits])
    site = GroupSite(HERE, name, tmp_path)
    code = (
        "import time\n"
        "wall, cpu = time.monotonic(), time.process_time()\n"
        "while time.monotonic() - wall < 1.5: pass\n"
        "print((time.process_time() - cpu) / (time.monotonic() - wall))"
    )
    for _ in range(TRIES):
        done = subprocess.run(
            [*launch_prefix([limits]), sys.executable, "-c", code], capture_output=True, check=True
        )
        share = float(done.stdout)
        assert share <= 0.25 * (1 + TOLERANCE)
        if share >= 0.25 * (1 - TOLERANCE):
            break
    assert share >= 0.25 * (1 - TOLERANCE)
    assert site.remove()
    assert not limits.folder.exists()


@pytest.mark.root
@needs_cpu_groups
def test_an_agent_in_a_cpu_group_is_verified_and_leaves_no_group(tmp_path: Path) -> None:
    device = emulated("{cpu_share: 0.25}")
    worker, resolved, _ = settled(
        device,
        tmp_path,
        lambda found: found.verified_within_bounds and found.emulation.cpu_mechanism != "agent",
    )
    assert resolved.emulation.cpu_mechanism in ("cgroup-v1", "cgroup-v2"), resolved.reasons
    assert close(resolved.verified.cpu_share_milli, 250), resolved
    site = GroupSite.of(device, Path(worker.spool("board")), HERE)
    worker.close()
    for root in (HERE.cpu_v1, HERE.unified):
        assert root is None or not (root / "stifarm" / site.name).exists()


@pytest.mark.root
@needs_io_groups
def test_an_io_limit_is_verified_at_the_executors_read_size(tmp_path: Path) -> None:
    device = emulated("{read_bandwidth: 3MB/s}")
    _, resolved, _ = settled(device, tmp_path, within_bounds)
    assert resolved.verified_within_bounds, resolved
    if resolved.emulation.io_mechanism == "agent":
        assert resolved.reasons, "the fallback has a reason"
    assert close(resolved.verified.io_bytes_per_s, 3_000_000)
    assert resolved.verified.read_nominal_ns is not None
    assert close(resolved.verified.read_p50_ns, resolved.verified.read_nominal_ns)
