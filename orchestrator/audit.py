"""Reading every journal that is on a device and comparing it with the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from db.audit import Audit, Discrepancy, attempts_of, audit_attempt
from db.errors import StoreError
from db.jobs import get_job
from orchestrator.dispatch import Worker
from orchestrator.farm import Farm
from sti_runtime.messages import JournalRecord, StartRecord

_NONE = Audit(0, 0, ())


@dataclass(frozen=True)
class DeviceAudit:
    """What auditing one device found.

    ``journals``: compared. ``forgotten``: attempts of the store whose journal is no longer on the device, as
    after a clean; nothing can be said of them. ``foreign``: journals of jobs that the store does not know
    and that no lease of its own began; one that it began was lost from it, which is a discrepancy.
    """

    device: str
    journals: int
    audit: Audit
    forgotten: int
    foreign: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether store and device agree."""
        return not self.audit.discrepancies


def audit_device(farm: Farm, worker: Worker, name: str, device_id: int) -> DeviceAudit:
    """Compare everything that one device has journalled with the store. Raises: DeviceError, StoreError."""
    with farm.store.reader() as session:
        stored = attempts_of(session, device_id)
    there = worker.journals(name)
    audit, foreign = _NONE, []
    for job_id, attempt in there:
        records, damage = _whole_journal(worker, name, job_id, attempt)
        if not _known(farm, job_id):
            if _begun_by(records, farm.store.store_id):
                lost = Discrepancy(job_id, attempt, 0, "the job is not in the store, which began it")
                audit += Audit(len(records), 0, (lost,))
            else:
                foreign.append(f"{job_id}/{attempt}")
            continue
        with farm.store.reader() as session:
            found = audit_attempt(
                session, device_id=device_id, job_id=job_id, attempt=attempt, records=records
            )
        if damage:
            damaged = Discrepancy(job_id, attempt, len(records), f"the journal is damaged: {damage}")
            found = replace(found, discrepancies=(*found.discrepancies, damaged))
        audit += found
    return DeviceAudit(name, len(there) - len(foreign), audit, len(stored - set(there)), tuple(foreign))


def _begun_by(records: Sequence[JournalRecord], store_id: str) -> bool:
    """Whether a start in this journal was under a lease of the store."""
    starts = (record.payload for record in records if isinstance(record.payload, StartRecord))
    return any(start.lease.store == store_id for start in starts)


def _known(farm: Farm, job_id: str) -> bool:
    with farm.store.reader() as session:
        try:
            get_job(session, job_id)
        except StoreError:
            return False
        return True


def _whole_journal(worker: Worker, name: str, job_id: str, attempt: int) -> tuple[list[JournalRecord], str]:
    """Every good record of a journal from its start, and how it is damaged if it is."""
    records: list[JournalRecord] = []
    offset = 0
    while True:
        polled = worker.poll(name, job_id, attempt, offset, 0)
        records += polled.records
        if polled.state == "damaged":
            return records, polled.detail
        if not polled.records:
            return records, ""
        offset = polled.next_offset
