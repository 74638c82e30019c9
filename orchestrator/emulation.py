"""Emulated devices: which mechanism slows each resource, verified before it is believed.

The kernel's limits (control groups) are preferred. They are bursty, so each is measured with the agent's
own probe first: the sustained rate and, for reads, the median time of single reads at the executor's
size must both be within ``TOLERANCE`` of the nominal. A limit that cannot be set or does not hold is
replaced by the agent's throttle; a virtual device's stays around it, for whoever made the device set it. The
decision is logged and kept with its reason.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from orchestrator.cgroups import (
    CgroupUnavailableError,
    GroupLimits,
    Hierarchies,
    apply_limits,
    block_device,
    cpu_limits,
    io_limits,
    launch_prefix,
    remove_groups,
)
from orchestrator.errors import StableError
from orchestrator.home_files import write_whole
from orchestrator.inventory import Device, EmulateSpec
from sti_runtime.errors import FormatError
from sti_runtime.messages import Emulation, VerifiedEmulation
from sti_runtime.records import Digest, Record, canonical_json, sha256_hex
from sti_runtime.units import format_bytes, format_ns, format_rate

TOLERANCE = 0.15
"""Largest relative deviation of a verified rate from its nominal."""

HOST_MECHANISMS = ("cgroup-v1", "cgroup-v2")
"""What this host sets around an agent; other mechanisms are the agent's own or were there before."""

Resource = Literal["io", "cpu"]
Probe = Callable[[Emulation], VerifiedEmulation]
"""Runs the agent's probe unit under an emulation (inside its groups, where it has any)."""

_log = structlog.get_logger(__name__)


class ResolvedEmulation(Record):
    """What was decided for a device. ``reasons``: why a resource is not limited by the kernel, and what
    misses its nominal rate. ``verified_within_bounds``: every limited resource is within TOLERANCE."""

    format: Literal["stifarm-emulation"]
    version: Literal[1]
    key: Digest
    emulation: Emulation
    verified: VerifiedEmulation
    verified_within_bounds: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class GroupSite:
    """Where a device's groups are made: the hierarchies, the group's name, the disk of its spool."""

    hierarchies: Hierarchies
    name: str
    spool: Path

    @classmethod
    def of(cls, device: Device, spool: Path, hierarchies: Hierarchies) -> GroupSite:
        """The group name holds the spool's digest: two farms on one machine do not meet."""
        return cls(hierarchies, f"{device.name}-{sha256_hex(str(spool).encode())[:8]}", spool)

    def limits(self, emulation: Emulation) -> tuple[GroupLimits, ...]:
        """The groups an emulation needs. Raises: CgroupUnavailableError."""
        groups: list[GroupLimits] = []
        if emulation.io_mechanism in HOST_MECHANISMS and emulation.io_bytes_per_s is not None:
            groups.append(self.io_limits(emulation.io_bytes_per_s))
        if emulation.cpu_mechanism in HOST_MECHANISMS and emulation.cpu_share_milli is not None:
            groups.append(self.cpu_limits(emulation.cpu_share_milli))
        return tuple(groups)

    def io_limits(self, bytes_per_s: int) -> GroupLimits:
        """The group that limits reads of the spool's disk. Raises: CgroupUnavailableError."""
        return io_limits(self.hierarchies, self.name, bytes_per_s, block_device(self.spool))

    def cpu_limits(self, share_milli: int) -> GroupLimits:
        """The group that limits CPU time. Raises: CgroupUnavailableError."""
        return cpu_limits(self.hierarchies, self.name, share_milli)

    def enter(self, emulation: Emulation | None) -> tuple[str, ...]:
        """Set the limits and return the launch prefix. Raises: CgroupUnavailableError."""
        groups = () if emulation is None else self.limits(emulation)
        apply_limits(groups)
        return launch_prefix(groups)

    def remove(self) -> bool:
        """Remove the groups; whether they are gone."""
        return remove_groups(self.hierarchies, self.name)


def resolve_emulation(
    device: Device, site: GroupSite, probe: Probe, cache: Path, *, bundle: str | None = None
) -> ResolvedEmulation:
    """Decide, verify and remember how ``device`` (which must have an ``emulate`` entry) is slowed.

    The decision is read from ``cache`` when it was made for the same rates, engine, kernel, user, place
    and ``bundle`` (whose read size the probe takes).
    Raises: StableError when the inventory insists on "cgroup" and the kernel's limits do not do; and
    whatever ``probe`` raises.
    """
    spec = device.emulate
    assert spec is not None
    key = _key(device, spec, site, bundle)
    cached = _read_cache(cache, key)
    if cached is not None:
        return cached
    reasons: list[str] = []
    emulation = _kernel_first(device, spec, site, reasons)
    verified = probe(emulation)
    wrong = deviations(verified)
    by_kernel = {r: what for r, what in wrong.items() if _mechanism(emulation, r) != "agent"}
    if by_kernel:
        manner = "too" if spec.mechanism.startswith("lab-") else "instead"
        reasons += [
            f"the kernel's limit does not hold: {what}; the agent throttles {manner}"
            for what in by_kernel.values()
        ]
        _refuse_fallback(device, spec, reasons)
        emulation = _with_agent(emulation, by_kernel)
        verified = probe(emulation)
        wrong = deviations(verified)
    reasons += [f"off its nominal rate: {what}" for what in wrong.values()]
    resolved = ResolvedEmulation(
        format="stifarm-emulation",
        version=1,
        key=key,
        emulation=emulation,
        verified=verified,
        verified_within_bounds=not wrong,
        reasons=tuple(reasons),
    )
    log = _log.warning if reasons else _log.info
    log(
        "emulation resolved",
        device=device.name,
        io=emulation.io_mechanism,
        cpu=emulation.cpu_mechanism,
        reasons=reasons,
    )
    write_whole(cache, resolved.to_json())
    return resolved


def deviations(verified: VerifiedEmulation) -> dict[Resource, str]:
    """For each limited resource that is not verified to be within TOLERANCE: what was found."""
    nominal = verified.emulation
    found: dict[Resource, str] = {}
    if nominal.io_bytes_per_s is not None:
        rate, p50, per_read = verified.io_bytes_per_s, verified.read_p50_ns, verified.read_nominal_ns
        if rate is None or p50 is None or not per_read:
            found["io"] = "the probe could not measure reading"
        elif _off(rate, nominal.io_bytes_per_s):
            found["io"] = f"{format_rate(rate)} sustained, nominal {format_rate(nominal.io_bytes_per_s)}"
        elif _off(p50, per_read):
            found["io"] = (
                f"reads of {format_bytes(verified.read_bytes or 0)} take {format_ns(p50)},"
                f" nominal {format_ns(per_read)}"
            )
    if nominal.cpu_share_milli is not None:
        share = verified.cpu_share_milli
        if share is None:
            found["cpu"] = "the probe could not measure the CPU share"
        elif _off(share, nominal.cpu_share_milli):
            found["cpu"] = f"a CPU share of {share / 1000:g}, nominal {nominal.cpu_share_milli / 1000:g}"
        elif (
            verified.section_p50_ns is not None
            and verified.section_nominal_ns is not None
            and _off(verified.section_p50_ns, verified.section_nominal_ns)
        ):
            found["cpu"] = (
                f"{format_ns(verified.section_cpu_ns or 0)} of CPU time take"
                f" {format_ns(verified.section_p50_ns)}, nominal {format_ns(verified.section_nominal_ns)}"
            )
    return found


def _off(measured: int, nominal: int) -> bool:
    return abs(measured - nominal) > TOLERANCE * nominal


def _kernel_first(device: Device, spec: EmulateSpec, site: GroupSite, reasons: list[str]) -> Emulation:
    """The emulation with the kernel's limits wherever they can be set."""
    wanted: dict[Resource, str] = {}
    if spec.mechanism.startswith("lab-"):
        wanted = {"io": spec.mechanism, "cpu": spec.mechanism}
    elif spec.mechanism != "agent":
        tries: tuple[tuple[Resource, Callable[[], GroupLimits]], ...] = (
            ("io", lambda: site.io_limits(spec.read_bytes_per_s or 0)),
            ("cpu", lambda: site.cpu_limits(spec.cpu_share_milli or 0)),
        )
        limited = {"io": spec.read_bytes_per_s, "cpu": spec.cpu_share_milli}
        for resource, limits in tries:
            if limited[resource] is None:
                continue
            if device.transport != "local":
                reasons.append(f"{resource}: the host's control groups reach local devices only")
                continue
            try:
                group = limits()
                apply_limits([group])
                wanted[resource] = group.mechanism
            except CgroupUnavailableError as error:
                reasons.append(f"{resource}: {error}")
        if reasons:
            _refuse_fallback(device, spec, reasons)
    return Emulation.model_validate(
        {
            "io_bytes_per_s": spec.read_bytes_per_s,
            "io_mechanism": None if spec.read_bytes_per_s is None else wanted.get("io", "agent"),
            "cpu_share_milli": spec.cpu_share_milli,
            "cpu_mechanism": None if spec.cpu_share_milli is None else wanted.get("cpu", "agent"),
        }
    )


def _refuse_fallback(device: Device, spec: EmulateSpec, reasons: list[str]) -> None:
    if spec.mechanism == "cgroup":
        raise StableError(
            f"it cannot be slowed by control groups: {'; '.join(reasons)}.",
            "Run as a user who may, or write mechanism: auto (or agent) in the inventory.",
            device=device.name,
        )


def _mechanism(emulation: Emulation, resource: Resource) -> str | None:
    return emulation.io_mechanism if resource == "io" else emulation.cpu_mechanism


def _with_agent(emulation: Emulation, resources: dict[Resource, str]) -> Emulation:
    return emulation.model_copy(update={f"{resource}_mechanism": "agent" for resource in resources})


def _key(device: Device, spec: EmulateSpec, site: GroupSite, bundle: str | None) -> str:
    # Each engine's agent has a throttle and a probe of its own.
    rates = [spec.read_bytes_per_s, spec.cpu_share_milli, spec.mechanism, TOLERANCE, device.engine]
    return sha256_hex(canonical_json([*rates, platform.release(), site.name, os.geteuid(), bundle]))


def _read_cache(cache: Path, key: str) -> ResolvedEmulation | None:
    if not cache.exists():
        return None
    try:
        cached = ResolvedEmulation.read(cache)
    except FormatError as error:
        _log.warning("the remembered emulation is unusable and is made again", cause=str(error))
        return None
    return cached if cached.key == key else None
