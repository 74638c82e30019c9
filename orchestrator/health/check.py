"""A health check: look at a device, ask its agent, have it run a probe unit, and keep what was found.

The probe is a job of the kind ``health`` like any other: leased, journalled, resumed. It is the one kind
that a device in quarantine gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from db.devices import device_by_name, list_devices
from db.events import record_event
from db.quarantine import Item, count_checks, quarantine_of, record_check
from orchestrator import fleet
from orchestrator.dispatch import Outcome, Request, Worker, next_repetition, run_job
from orchestrator.errors import DeviceError, HostAwayError
from orchestrator.farm import Farm
from orchestrator.following import Advance
from orchestrator.health.judge import Gathered, judge, passed
from orchestrator.health.kinds import HEALTH
from orchestrator.inventory import Device
from orchestrator.jobs import DeviceTarget
from sti_runtime.device_facts import DeviceFacts
from sti_runtime.messages import Gates, ProbeResult, ProbeUnit

OPEN_GATES = Gates(
    max_temperature_milli_c=None,
    min_battery_percent=None,
    max_load_milli=None,
    min_free_bytes=None,
    wait_limit_s=0,
)
"""The check judges by itself: its probe does not wait for a device to cool."""


@dataclass(frozen=True)
class Checked:
    """What a health check found. ``released``: it ended a quarantine; ``quarantined``: the cause of the one
    that goes on, None for none; ``passes``: how many checks in a row were passed in it. ``job_id`` None: it
    came to no job; ``known`` False: the store knows no such device yet, so that nothing could be kept."""

    device: str
    items: Sequence[Item]
    job_id: str | None
    released: bool = False
    quarantined: str | None = None
    passes: int = 0
    known: bool = True

    @property
    def reached(self) -> bool:
        """Whether the device answered at all."""
        return not any(item.item == "reach" and item.verdict == "fail" for item in self.items)

    @property
    def passed(self) -> bool:
        """Whether the device is well."""
        return passed(self.items)


def check_device(
    farm: Farm,
    worker: Worker,
    device: Device,
    *,
    advance: Advance | None = None,
    run: Callable[[Request], Outcome] | None = None,
) -> Checked:
    """Check a device's health and keep the result; what the device fails at is a finding, not an error.

    ``run``: runs the probe's job, instead of a new one for each check.
    Raises: LeaseHeldError (somebody else uses or has reserved it), HostAwayError, StoreError.
    """
    with farm.store.reader() as session:
        row = next((row for row in list_devices(session) if row.name == device.name), None)
        identity = None if row is None else row.identity
    gathered = Gathered(device, identity=identity)
    job_id: str | None = None
    try:
        seen = worker.look(device.name)
        gathered = Gathered(device, seen, identity=identity)
        facts = worker.facts(device.name)
        gathered = Gathered(device, seen, facts, identity=identity)
        if identity in (None, facts.identity):
            fleet.register_facts(farm, worker, device, facts, seen=seen)
            request = _request(farm, device, facts)
            outcome = run(request) if run is not None else _run(farm, worker, request, advance)
            job_id, probe = outcome.job_id, _probe_of(outcome)
            gathered = Gathered(device, seen, facts, probe.sensors, identity=identity)
    except HostAwayError:
        raise  # nothing was found out of the device
    except DeviceError as error:
        what = error.what.removeprefix(f"{device.name}: ")
        gathered = Gathered(device, gathered.seen, gathered.facts, None, what, identity)
    return _kept(farm, device, judge(gathered), job_id)


def _request(farm: Farm, device: Device, facts: DeviceFacts) -> Request:
    with farm.store.reader() as session:
        row = device_by_name(session, device.name)
        again = count_checks(session, row.id)
    target = DeviceTarget(
        identity=facts.identity,
        engine=device.engine,
        threads=1,
        queue_depth=1,
        cpus=(),
        machine_lock=device.shared_machine(farm.settings.machine_lock),
        emulation=None,
        gates=OPEN_GATES,
    )
    units = (ProbeUnit(number=0, kind="probe"),)
    return Request(device.name, row.id, facts.agent_digest, target, HEALTH, None, None, units, again=again)


def _run(farm: Farm, worker: Worker, request: Request, advance: Advance | None) -> Outcome:
    new = next_repetition(farm.store, request)
    return run_job(farm.store, worker, farm.owner, new, advance=advance, stop=farm.stop)


def _probe_of(outcome: Outcome) -> ProbeResult:
    """Raises: DeviceError."""
    outcome.require_complete()
    result = outcome.results[0]
    assert isinstance(result, ProbeResult)  # the store rejects results of another kind than the unit's
    return result


def _kept(farm: Farm, device: Device, items: Sequence[Item], job_id: str | None) -> Checked:
    with farm.store.session() as session:
        row = next((row for row in list_devices(session) if row.name == device.name), None)
        if row is None:
            failed = "; ".join(f"{item.item}: {item.detail}" for item in items if item.verdict == "fail")
            record_event(session, "warning", "health-check-failed", f"{device.name}: {failed}")
            return Checked(device.name, items, job_id, known=False)
        released = record_check(session, row.id, items, passed=passed(items), job_id=job_id)
        held = quarantine_of(session, row.id)
    cause, passes = (None, 0) if held is None else (held.cause, held.passes)
    return Checked(device.name, items, job_id, released, cause, passes)
