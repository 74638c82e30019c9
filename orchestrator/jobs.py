"""Job files for each purpose: pure functions from what is wanted to a ``messages.Job``.

A job's id is derived from everything that decides its results, so that the same request finds the
same job again: an interrupted verb resumes, a finished one is not repeated unless asked.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sti_runtime.errors import InputError
from sti_runtime.manifest import Manifest
from sti_runtime.messages import (
    TIMED_KINDS,
    ComputeProfileUnit,
    Emulation,
    EvaluateUnit,
    ExecuteUnit,
    FixedProfileUnit,
    Gates,
    IoMode,
    IoProfileUnit,
    Job,
    Lease,
    ProbeUnit,
    RequestKind,
    Setting,
    Unit,
)
from sti_runtime.plan import Plan
from sti_runtime.records import canonical_json, sha256_hex

PROFILE_ROUNDS = 4
COMPUTE_WARMUPS = 1
COMPUTE_REPEATS = 2
FIXED_WARMUPS = 3
FIXED_REQUESTS = 30
EVALUATE_BATCH = 32


@dataclass(frozen=True)
class DeviceTarget:
    """What a job needs to know of the device it is for; ``identity`` is the hardware's.

    ``settings``: changed on the device while something is timed there.
    """

    identity: str
    engine: str
    threads: int
    queue_depth: int
    cpus: tuple[int, ...]
    machine_lock: str | None
    emulation: Emulation | None
    gates: Gates
    settings: tuple[Setting, ...] = ()

    def settings_for(self, units: Sequence[Unit]) -> tuple[Setting, ...]:
        """The settings of a job of these units: none where nothing is timed."""
        return self.settings if any(unit.kind in TIMED_KINDS for unit in units) else ()


def profile_units(manifest: Manifest, rows: int, *, seed: int = 0) -> tuple[Unit, ...]:
    """Units of one device profile: rounds of IO and of compute per trained width, so that a passing
    disturbance hits a part of every kind's samples only, then fixed cost, between two probes (clocks,
    temperature, load; the verified rates of an emulated device)."""
    widths = tuple(sorted({submodel.width for submodel in manifest.submodels}))
    units: list[Unit] = [ProbeUnit(number=0, kind="probe")]
    for round_ in range(PROFILE_ROUNDS):
        units.append(
            IoProfileUnit(
                number=len(units),
                kind="profile-io",
                widths=widths,
                fidelities=manifest.fidelities,
                repeats=1,
                seed=seed + round_,
            )
        )
        units += (
            ComputeProfileUnit(
                number=number,
                kind="profile-compute",
                width=width,
                fidelities=manifest.fidelities,
                warmups=COMPUTE_WARMUPS,
                repeats=COMPUTE_REPEATS,
            )
            for number, width in enumerate(widths, len(units))
        )
    units.append(
        FixedProfileUnit(
            number=len(units),
            kind="profile-fixed",
            warmups=FIXED_WARMUPS,
            rows=sample_rows(rows, FIXED_WARMUPS + FIXED_REQUESTS, seed),
        )
    )
    units.append(ProbeUnit(number=len(units), kind="probe"))
    return tuple(units)


def execute_units(
    plans: Sequence[Plan],
    rows: int,
    *,
    requests: int,
    warmups: int,
    request_kind: RequestKind,
    io_mode: IoMode,
    rounds: int = 1,
    seed: int = 0,
) -> tuple[Unit, ...]:
    """Timed units for several plans: ``rounds`` rounds, the plans in random order in each (seeded), so
    that drift of the device falls on all of them alike. ``requests`` is per plan, shared out over the rounds.
    """
    order = random.Random(seed)
    units: list[Unit] = [ProbeUnit(number=0, kind="probe")]
    for round_ in range(min(rounds, requests)):
        counted = requests // rounds + (round_ < requests % rounds)
        shuffled = list(plans)
        order.shuffle(shuffled)
        for plan in shuffled:
            units.append(
                ExecuteUnit(
                    number=len(units),
                    kind="execute",
                    plan=plan,
                    request_kind=request_kind,
                    io_mode=io_mode,
                    warmups=warmups,
                    rows=sample_rows(rows, warmups + counted, seed + round_),
                )
            )
    return tuple(units)


def evaluate_units(plans: Sequence[Plan]) -> tuple[Unit, ...]:
    """One untimed unit for each distinct plan content."""
    distinct = {plan.content_digest: plan for plan in plans}
    return tuple(
        EvaluateUnit(number=number, kind="evaluate", plan=plan, batch=EVALUATE_BATCH)
        for number, plan in enumerate(distinct.values())
    )


def sample_rows(rows: int, count: int, seed: int) -> tuple[int, ...]:
    """``count`` row numbers below ``rows``: a seeded sample, repeated when there are too few.

    Raises: InputError when there are no rows at all.
    """
    if rows < 1:
        raise InputError("There are no rows to sample requests from.", "Give task data that has rows.")
    chosen: list[int] = []
    generator = random.Random(seed)
    while len(chosen) < count:
        chosen += generator.sample(range(rows), min(rows, count - len(chosen)))
    return tuple(chosen)


def job_key(
    kind: str,
    target: DeviceTarget,
    *,
    bundle: str | None,
    task_data: str | None,
    agent_digest: str,
    units: Sequence[Unit],
    again: int = 0,
) -> str:
    """The idempotency key: equal for equal work on the same device with the same agent.

    ``again`` > 0 asks for a repetition on purpose.
    """
    facts: dict[str, object] = {
        "kind": kind,
        "device": target.identity,
        "engine": target.engine,
        "threads": target.threads,
        "queue_depth": target.queue_depth,
        "cpus": target.cpus,
        "gates": target.gates.model_dump(mode="json"),
        "emulation": None if target.emulation is None else target.emulation.model_dump(mode="json"),
        "bundle": bundle,
        "task_data": task_data,
        "agent": agent_digest,
        "units": [unit.model_dump(mode="json") for unit in units],
        "again": again,
    }
    if settings := target.settings_for(units):
        facts["settings"] = [setting.model_dump(mode="json") for setting in settings]
    return sha256_hex(canonical_json(facts))


def make_job(
    kind: str,
    key: str,
    target: DeviceTarget,
    *,
    attempt: int,
    lease: Lease,
    bundle: str | None,
    task_data: str | None,
    units: tuple[Unit, ...],
) -> Job:
    """The job file of one attempt."""
    return Job.model_validate(
        {
            "format": "stifarm-job",
            "version": 1,
            "id": f"{kind}-{key[:20]}",
            "attempt": attempt,
            "lease": lease,
            "device": target.identity,
            "bundle": bundle,
            "task_data": task_data,
            "engine": target.engine,
            "threads": target.threads,
            "queue_depth": target.queue_depth,
            "cpus": target.cpus,
            "machine_lock": target.machine_lock,
            "emulation": target.emulation,
            "gates": target.gates,
            "settings": target.settings_for(units),
            "units": units,
        }
    )
