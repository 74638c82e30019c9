"""Where an accepted unit result comes from: what all its rows share."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from db.models import AttemptRow, BundleRow, DeviceRow, JobRow, TaskDataRow
from sti_runtime.messages import Job, JournalRecord


@dataclass(frozen=True)
class Source:
    """Where a result comes from. ``emulated`` if the device, the job or the agent says so."""

    journal_id: int
    device_id: int
    job: Job
    attempt: AttemptRow
    record: JournalRecord
    emulated: bool
    sequence_length: int | None

    @classmethod
    def of(
        cls,
        session: Session,
        row: JobRow,
        job: Job,
        attempt: AttemptRow,
        record: JournalRecord,
        journal_id: int,
    ) -> Source:
        """Collect what the rows of one record share."""
        device = session.get_one(DeviceRow, row.device_id)
        data = session.get(TaskDataRow, job.task_data) if job.task_data else None
        return cls(
            journal_id=journal_id,
            device_id=row.device_id,
            job=job,
            attempt=attempt,
            record=record,
            emulated=device.emulated or job.emulation is not None or bool(attempt.agent_emulated),
            sequence_length=None if data is None else data.sequence_length,
        )


def missing_bundle(session: Session, source: Source) -> str | None:
    """Why rows that name the job's bundle cannot be made; None when they can."""
    if source.job.bundle is None or session.get(BundleRow, source.job.bundle) is None:
        return "the job names no bundle that the store knows"
    return None
