"""Queries about raw profile samples and the device profiles fitted from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ScalarSelect, Select, func, select
from sqlalchemy.orm import Session, aliased

from db.devices import latest_facts
from db.documents import document, now_wall_ns
from db.grounds import profile_record
from db.jobs import get_job, job_record
from db.models import (
    AttemptRow,
    ComputeSampleRow,
    DeviceProfileRow,
    DeviceRow,
    FixedSampleRow,
    IoSampleRow,
    JournalRecordRow,
)
from db.upsert import save_new
from sti_runtime.errors import InputError
from sti_runtime.messages import ComputeSample, Emulation, FixedSample, IoSample
from sti_runtime.profile import DeviceProfile


@dataclass(frozen=True)
class ProfileSamples:
    """The samples of one profile job, ready for a fit: valid ones only, none throttled; warm-ups marked."""

    job_id: str
    io: tuple[IoSample, ...]
    beside: tuple[IoSample, ...]
    compute: tuple[ComputeSample, ...]
    fixed: tuple[FixedSample, ...]
    emulated: bool
    newest_wall_ns: int


def profile_samples(
    session: Session,
    *,
    device_id: int,
    bundle_digest: str,
    engine: str,
    job_id: str | None = None,
) -> ProfileSamples | None:
    """Samples of one job, by default the newest that measured this device, bundle and engine.

    Samples of different jobs are not mixed: conditions differ between them. A unit that several attempts
    of the job ran counts once: as the newest of them ran it. None when there are none.
    """
    if job_id is None:
        newest = _newest_job(session, device_id, bundle_digest, engine)
        if newest is None:
            return None
        job_id = newest

    newest_attempt = _newest_attempt()

    def rows(table: type[Any]) -> Sequence[Any]:
        query: Select[Any] = (
            select(table, JournalRecordRow.ingested_wall_ns)
            .join(JournalRecordRow, JournalRecordRow.id == table.journal_id)
            .where(
                table.device_id == device_id,
                table.bundle_digest == bundle_digest,
                table.engine == engine,
                table.valid,
                JournalRecordRow.job_id == job_id,
                JournalRecordRow.attempt == newest_attempt,
            )
            .order_by(table.journal_id, table.ordinal)
        )
        return session.execute(query).all()

    io, compute, fixed = rows(IoSampleRow), rows(ComputeSampleRow), rows(FixedSampleRow)
    found = [*io, *compute, *fixed]
    if not found:
        return None
    return ProfileSamples(
        job_id=job_id,
        io=tuple(_read(s) for s, _ in io if not s.beside_compute),
        beside=tuple(_read(s) for s, _ in io if s.beside_compute),
        compute=tuple(
            ComputeSample(
                width=s.width,
                fidelity=s.fidelity,
                read_bytes=s.read_bytes,
                decompress_ns=s.decompress_ns,
                compute_ns=s.compute_ns,
                throttled=False,
                warmup=s.warmup,
            )
            for s, _ in compute
        ),
        fixed=tuple(
            FixedSample(
                embed_io_ns=s.embed_io_ns,
                embed_compute_ns=s.embed_compute_ns,
                head_ns=s.head_ns,
                bytes=s.read_bytes,
                storage_bytes=s.storage_bytes,
                mode_asked=s.mode_asked,
                mode_proven=s.mode_proven,
                throttled=False,
                warmup=s.warmup,
            )
            for s, _ in fixed
        ),
        emulated=any(s.emulated for s, _ in found),
        newest_wall_ns=max(wall_ns for _, wall_ns in found),
    )


def _read(row: Any) -> IoSample:
    return IoSample(
        versions=row.versions,
        bytes=row.read_bytes,
        storage_bytes=row.storage_bytes,
        duration_ns=row.duration_ns,
        mode_asked=row.mode_asked,
        mode_proven=row.mode_proven,
        throttled=False,
        valid=row.valid,
    )


def save_device_profile(
    session: Session,
    profile: DeviceProfile,
    *,
    device_id: int,
    job_id: str | None = None,
    measured_wall_ns: int | None = None,
) -> DeviceProfileRow:
    """Keep a fit of a device, with the facts and agent it rests on; saving it again changes nothing.

    ``job_id``: the job that took its samples; its agent is recorded, else the device's latest one, and
    how it was slowed. Raises: StoreError when there is no such job.
    """
    now, digest = now_wall_ns(), profile.digest
    facts = latest_facts(session, device_id)
    agent: str | None = None
    emulation: Emulation | None = None
    if job_id is not None:
        emulation = job_record(get_job(session, job_id)).emulation
        attempts = select(AttemptRow.agent_digest).where(AttemptRow.job_id == job_id)
        agent = session.scalars(attempts.order_by(AttemptRow.number.desc()).limit(1)).one_or_none()
    if agent is None:
        agent = session.scalars(select(DeviceRow.agent_digest).where(DeviceRow.id == device_id)).one()
    save_new(
        session,
        DeviceProfileRow,
        {
            "digest": digest,
            "device_id": device_id,
            "job_id": job_id,
            "bundle_digest": profile.bundle,
            "engine": profile.engine,
            "sequence_length": profile.sequence_length,
            "threads": profile.threads,
            "queue_depth": profile.queue_depth,
            "emulated": profile.emulated,
            "unfit": bool(profile.unfit),
            "facts_id": None if facts is None else facts.id,
            "agent_digest": agent,
            "emulation_json": None if emulation is None else document(emulation),
            "profile_json": document(profile),
            "measured_wall_ns": now if measured_wall_ns is None else measured_wall_ns,
            "created_wall_ns": now,
        },
    )
    table = DeviceProfileRow
    query = select(table).where(table.device_id == device_id, table.digest == digest)
    return session.scalars(query).one()


def latest_profile(
    session: Session,
    *,
    device_id: int,
    bundle_digest: str,
    engine: str,
    sequence_length: int | None = None,
    threads: int | None = None,
    queue_depth: int | None = None,
    rates: tuple[int | None, int | None] | None = None,
) -> DeviceProfileRow | None:
    """The newest profile of a device for a bundle and engine; None when there is none.

    ``rates``: only one measured under these nominal (io_bytes_per_s, cpu_share_milli); a None in it is a
    resource not limited, (None, None) a device that is not slowed. Other filters are off when None.
    """
    table = DeviceProfileRow
    query = select(table).where(
        table.device_id == device_id, table.bundle_digest == bundle_digest, table.engine == engine
    )
    conditions = (
        (sequence_length, table.sequence_length),
        (threads, table.threads),
        (queue_depth, table.queue_depth),
    )
    for wanted, column in conditions:
        if wanted is not None:
            query = query.where(column == wanted)
    newest = session.scalars(query.order_by(table.created_wall_ns.desc(), table.id.desc()))
    return next((row for row in newest if rates is None or _has_rates(row, rates)), None)


def profile_of_job(session: Session, device_id: int, job_id: str) -> DeviceProfile | None:
    """The newest fit of a job's samples, which may have been compacted since; None when there is none."""
    table = DeviceProfileRow
    query = select(table).where(table.device_id == device_id, table.job_id == job_id)
    row = session.scalars(query.order_by(table.id.desc()).limit(1)).one_or_none()
    return None if row is None else profile_record(row)


def profile_by_digest(session: Session, digest: str) -> DeviceProfile:
    """A device profile by its digest. Raises: InputError when the store does not hold it."""
    table = DeviceProfileRow
    row = session.scalars(select(table).where(table.digest == digest).limit(1)).one_or_none()
    if row is None:
        raise InputError(f"There is no device profile {digest[:12]}.", "Make one with `stifarm profile`.")
    return profile_record(row)


def _has_rates(row: DeviceProfileRow, rates: tuple[int | None, int | None]) -> bool:
    if row.emulation_json is None or rates == (None, None):
        return row.emulation_json is None and rates == (None, None)
    slowed = Emulation.from_json(row.emulation_json.encode(), source=f"device profile {row.digest[:12]}")
    return (slowed.io_bytes_per_s, slowed.cpu_share_milli) == rates


def _newest_attempt() -> ScalarSelect[int]:
    """In a query of journal records: the newest attempt with an accepted result of the record's unit."""
    record, other = JournalRecordRow, aliased(JournalRecordRow)
    newest = select(func.max(other.attempt)).where(
        other.job_id == record.job_id,
        other.unit == record.unit,
        other.type == "result",
        other.rejected.is_(None),
    )
    return newest.correlate(record).scalar_subquery()


def _newest_job(session: Session, device_id: int, bundle_digest: str, engine: str) -> str | None:
    newest: list[tuple[int, str]] = []
    tables: tuple[type[Any], ...] = (IoSampleRow, ComputeSampleRow, FixedSampleRow)
    for table in tables:
        query = (
            select(JournalRecordRow.id, JournalRecordRow.job_id)
            .join(table, table.journal_id == JournalRecordRow.id)
            .where(
                table.device_id == device_id,
                table.bundle_digest == bundle_digest,
                table.engine == engine,
            )
            .order_by(JournalRecordRow.id.desc())
            .limit(1)
        )
        row = session.execute(query).first()
        if row is not None:
            newest.append((row[0], row[1]))
    return max(newest)[1] if newest else None
