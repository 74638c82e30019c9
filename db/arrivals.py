"""What arrives of many devices at once, into the store: under each one's lease, in one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from db.errors import StoreError
from db.fleet_work import lost_leases
from db.ingest import Batch, IngestReport, ingest_all
from db.leases import LeaseGrant
from sti_runtime.messages import Job, JournalRecord


@dataclass(frozen=True)
class Arrived:
    """Records of one attempt, under the lease that its controller holds."""

    device_id: int
    job: Job
    attempt: int
    grant: LeaseGrant
    records: Sequence[JournalRecord]


@dataclass(frozen=True)
class TakenIn:
    """What became of an ``Arrived``; ``finished``: units of the attempt that have ended by now."""

    finished: int
    complete: bool
    conflicts: tuple[int, ...] = ()


def take_in(session: Session, arrived: Sequence[Arrived]) -> list[TakenIn | StoreError]:
    """Store records of many attempts, each exactly once; what became of each, or why nothing was written: its
    lease went on to another controller (LeaseHeldError), or the store knows no such attempt."""
    lost = lost_leases(session, [each.grant for each in arrived])
    kept = [each for each in arrived if each.device_id not in lost]
    batches = [Batch(each.device_id, each.job.id, each.attempt, each.records, each.job) for each in kept]
    reports = ingest_all(session, batches)
    answers: dict[int, TakenIn | StoreError] = {}
    for each, report in zip(kept, reports, strict=True):
        answers[each.device_id] = _taken(report)
    return [lost.get(each.device_id) or answers[each.device_id] for each in arrived]


def _taken(report: IngestReport | StoreError) -> TakenIn | StoreError:
    if isinstance(report, StoreError):
        return report
    return TakenIn(report.finished, report.complete, report.conflicts)
