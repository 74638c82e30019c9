"""Many jobs' steps in few statements: what a controller of a thousand devices asks of the store.

Each function does for many at once what ``db.jobs`` and ``db.leases`` do for one, in the plain case: a first
attempt that nothing stands in the way of. What is not plain is left to those, so that their rules are the
only ones. Records are taken in by ``db.arrivals``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from sqlalchemy import BindParameter, Row, bindparam, insert, or_, select, update
from sqlalchemy.orm import Session

from db.clock import database_wall_ns
from db.documents import document, now_wall_ns, unpack
from db.errors import StoreError
from db.leases import LeaseGrant, lease_lost, renew_lease
from db.models import (
    AttemptRow,
    JobRow,
    JournalRecordRow,
    LeaseRow,
    QuarantineRow,
    ReservationRow,
)
from db.upsert import save_new
from sti_runtime.messages import (
    ExecuteUnit,
    FailureRecord,
    Job,
    JournalRecord,
    ResultRecord,
    UnitResult,
)

_MANY: BindParameter[Any] = bindparam("many", expanding=True)
"""Given when a statement is executed: a list within it would be looked at element by element to make it."""


@dataclass(frozen=True)
class Opening:
    """A job that is to begin. ``job``: as first asked; the lease in it is not looked at."""

    device_id: int
    key: str
    kind: str
    job: Job


@dataclass(frozen=True)
class Found:
    """What a job has come to; see ``db.jobs.results_of`` and its neighbours."""

    results: Mapping[int, UnitResult]
    failures: Mapping[int, FailureRecord]
    rejected: tuple[str, ...]
    refused: str | None


# ------------------------------------------------------------------ opening


def open_plain(
    session: Session, owner: str, openings: Sequence[Opening], ttl_ns: int, *, even_quarantined: str
) -> dict[str, LeaseGrant]:
    """Open the first attempts of jobs under new leases; grants by job id. Left out are those that are not
    plain: begun or ended before, of a device that somebody holds, that is in quarantine (but for jobs of the
    kind ``even_quarantined``) or has an attempt open, or that execute plans and are not registered."""
    by_device = {each.device_id: each for each in openings}
    devices = list(by_device)
    leases = _leases(session, devices)  # first: what is read below then stays so
    if len(leases) < len(devices):  # some are leased for the first time
        for device in devices:
            if device not in leases:
                save_new(session, LeaseRow, {"device_id": device, "counter": 0})
        leases = _leases(session, devices)
    known = {
        row.id: row
        for row in session.execute(
            select(JobRow.id, JobRow.key, JobRow.state).where(JobRow.id.in_(_MANY)),
            {"many": [each.job.id for each in openings]},
        )
    }
    now = database_wall_ns(session)
    held = set(_held_up(session, devices, [o.job.id for o in openings], now))
    quarantined = set(
        session.scalars(
            select(QuarantineRow.device_id).where(
                QuarantineRow.device_id.in_(_MANY), QuarantineRow.released_wall_ns.is_(None)
            ),
            {"many": devices},
        )
    )

    def plain(each: Opening) -> bool:
        row, lease = known.get(each.job.id), leases[each.device_id]
        if row is None:
            fresh = not any(isinstance(unit, ExecuteUnit) for unit in each.job.units)
        else:
            fresh = row.state == "queued" and row.key == each.key
        free = lease.owner in (None, owner) or (lease.expires_wall_ns or 0) <= now
        allowed = each.device_id not in quarantined or each.kind == even_quarantined
        return fresh and free and allowed and each.device_id not in held

    chosen = [each for each in by_device.values() if plain(each)]
    if not chosen:
        return {}
    wall_ns = now_wall_ns()
    _register(session, [each for each in chosen if each.job.id not in known], wall_ns)
    queued = [each.job.id for each in chosen if each.job.id in known]
    if queued:
        session.execute(
            update(JobRow).where(JobRow.id.in_(queued)).values(state="running", updated_wall_ns=wall_ns)
        )
    expires = now + ttl_ns
    grants = {
        each.job.id: LeaseGrant(each.device_id, owner, leases[each.device_id].counter + 1, expires)
        for each in chosen
    }
    session.connection().execute(
        update(LeaseRow.__table__)  # type: ignore[arg-type]
        .where(LeaseRow.device_id == bindparam("of_device"))
        .values(owner=owner, counter=bindparam("to"), acquired_wall_ns=now, expires_wall_ns=expires),
        [{"of_device": grant.device_id, "to": grant.counter} for grant in grants.values()],
    )
    session.execute(
        insert(AttemptRow.__table__),  # type: ignore[arg-type]
        [
            {
                "job_id": job_id,
                "number": 1,
                "device_id": grant.device_id,
                "lease_counter": grant.counter,
                "state": "running",
                "started_wall_ns": wall_ns,
            }
            for job_id, grant in grants.items()
        ],
    )
    return grants


_Lease: TypeAlias = "Row[int, str | None, int, int | None]"


def _leases(session: Session, devices: Sequence[int]) -> dict[int, _Lease]:
    """The leases of devices, which nobody else changes until the transaction ends."""
    query = select(LeaseRow.device_id, LeaseRow.owner, LeaseRow.counter, LeaseRow.expires_wall_ns)
    query = query.where(LeaseRow.device_id.in_(_MANY)).order_by(LeaseRow.device_id)
    return {row.device_id: row for row in session.execute(query.with_for_update(), {"many": devices})}


def _held_up(
    session: Session, devices: Sequence[int], jobs: Sequence[str], now_wall_ns: int
) -> Iterable[int]:
    """Of devices, those that a person holds, that have an attempt open, or a job that was begun before."""
    reserved = select(ReservationRow.device_id).where(
        ReservationRow.device_id.in_(_MANY), ReservationRow.until_wall_ns > now_wall_ns
    )
    table = AttemptRow
    running = select(table.device_id).where(table.device_id.in_(_MANY), table.state == "running")
    begun = select(table.device_id).where(table.job_id.in_(bindparam("jobs", expanding=True)))
    return session.scalars(reserved.union(running, begun), {"many": devices, "jobs": jobs})


def _register(session: Session, new: Sequence[Opening], wall_ns: int) -> None:
    if new:
        session.execute(
            insert(JobRow.__table__),  # type: ignore[arg-type]
            [
                {
                    "id": each.job.id,
                    "key": each.key,
                    "kind": each.kind,
                    "device_id": each.device_id,
                    "state": "running",
                    "units": len(each.job.units),
                    "job_json": document(each.job),
                    "created_wall_ns": wall_ns,
                    "updated_wall_ns": wall_ns,
                }
                for each in new
            ],
        )


# ------------------------------------------------------------------ holding


def lost_leases(session: Session, grants: Sequence[LeaseGrant]) -> dict[int, StoreError]:
    """By device: the error of a grant that is no longer the device's lease; the others stay as they are until
    the transaction ends."""
    query = select(LeaseRow.device_id, LeaseRow.owner, LeaseRow.counter)
    query = query.where(LeaseRow.device_id.in_(_MANY)).order_by(LeaseRow.device_id).with_for_update()
    rows = session.execute(query, {"many": [grant.device_id for grant in grants]})
    holds = {device: (owner, counter) for device, owner, counter in rows}
    return {
        grant.device_id: lease_lost(grant)
        for grant in grants
        if holds.get(grant.device_id) != (grant.owner, grant.counter)
    }


def renew(session: Session, grants: Sequence[LeaseGrant], ttl_ns: int) -> list[LeaseGrant | StoreError]:
    """Extend leases; of each the new grant, or why it is not extended. See ``db.leases.renew_lease``."""
    now = database_wall_ns(session)
    devices = [grant.device_id for grant in grants]
    lost = lost_leases(session, grants)
    reserved = set(
        session.scalars(
            select(ReservationRow.device_id).where(
                ReservationRow.device_id.in_(devices), ReservationRow.until_wall_ns > now
            )
        )
    )
    session.execute(
        update(LeaseRow)
        .where(LeaseRow.device_id.in_([d for d in devices if d not in lost and d not in reserved]))
        .values(expires_wall_ns=now + ttl_ns)
        .execution_options(synchronize_session=False)
    )
    answers: list[LeaseGrant | StoreError] = []
    for grant in grants:
        refused = lost.get(grant.device_id)
        if refused is None and grant.device_id in reserved:
            try:
                renew_lease(session, grant, ttl_ns)
            except StoreError as error:
                refused = error
        answers.append(refused or replace(grant, expires_wall_ns=now + ttl_ns))
    return answers


# ------------------------------------------------------------------ ending


def give_back(session: Session, grants: Sequence[LeaseGrant]) -> None:
    """Release leases; those that are no longer ours stay."""
    if grants:
        session.connection().execute(
            update(LeaseRow.__table__)  # type: ignore[arg-type]
            .where(
                LeaseRow.device_id == bindparam("of_device"),
                LeaseRow.owner == bindparam("by"),
                LeaseRow.counter == bindparam("under"),
            )
            .values(owner=None, expires_wall_ns=None),
            [{"of_device": g.device_id, "by": g.owner, "under": g.counter} for g in grants],
        )


def found_of(session: Session, job_ids: Collection[str]) -> dict[str, Found]:
    """What jobs have come to; of several attempts the newest one's word on a unit counts."""
    table = JournalRecordRow
    query = (
        select(table.job_id, table.type, table.rejected, table.record_json)
        .where(
            table.job_id.in_(_MANY),
            or_(table.type.in_(("result", "failure")), table.rejected.is_not(None)),
        )
        .order_by(table.attempt, table.seq)
    )
    results: dict[str, dict[int, UnitResult]] = defaultdict(dict)
    failures: dict[str, dict[int, FailureRecord]] = defaultdict(dict)
    rejected: dict[str, list[str]] = defaultdict(list)
    asked = {"many": list(job_ids)}
    for job_id, _, why, text in session.execute(query, asked):
        if why is not None:
            rejected[job_id].append(why)
            continue
        record = JournalRecord.from_json(unpack(text).encode(), source=f"journal of job {job_id}")
        if isinstance(record.payload, ResultRecord):
            results[job_id][record.payload.unit] = record.payload.result
        elif isinstance(record.payload, FailureRecord):
            failures[job_id][record.payload.unit] = record.payload
    attempts = select(AttemptRow.job_id, AttemptRow.refused).where(AttemptRow.job_id.in_(_MANY))
    ordered = session.execute(attempts.order_by(AttemptRow.number), asked)
    refused = {row.job_id: row.refused for row in ordered}
    return {
        job_id: Found(results[job_id], failures[job_id], tuple(rejected[job_id]), refused.get(job_id))
        for job_id in job_ids
    }
