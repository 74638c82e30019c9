"""Jobs, their attempts, the journal as devices sent it, and events worth a person's attention."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, String, UniqueConstraint, false, text
from sqlalchemy.orm import Mapped, mapped_column

from db.models.base import Base, DeviceId, Id, Int64, Sha, Word, one_of

JOB_STATES = ("queued", "running", "done", "failed", "cancelled")
"""queued: no attempt runs. running: an attempt is open. done: every unit has an accepted result.
failed: the last attempt ended without. cancelled: by a person."""

ATTEMPT_STATES = ("running", "done", "failed", "refused", "lost")
"""running: open. done / failed: ended, with or without an accepted result for every unit.
refused: the agent would not run it. lost: given up by the host (device gone, lease taken over)."""

RECORD_TYPES = ("start", "result", "failure", "end")
"""As in the journal (docs/job-and-journal.md)."""

EVENT_LEVELS = ("info", "warning", "error")


class JobRow(Base):
    """One job for one device. ``key`` makes it idempotent: the same work asked twice is one row.

    ``job_json`` is the job as first asked; attempt number and lease are replaced in each attempt.
    """

    __tablename__ = "jobs"
    __table_args__ = (one_of("state", JOB_STATES),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(200), unique=True)
    kind: Mapped[Word]
    device_id: Mapped[DeviceId]
    state: Mapped[Word]
    units: Mapped[int]
    job_json: Mapped[str]
    created_wall_ns: Mapped[int]
    updated_wall_ns: Mapped[int]


class AttemptRow(Base):
    """One attempt of a job under one lease. Resuming keeps the attempt; a new lease makes a new one.

    Agent columns come from the attempt's start record. ``refused``: the agent's reason. What the store holds
    of its journal, kept by ``db.ingest``: how many ``records``, of them accepted ``results`` and ``failures``
    and ``rejected`` ones; ``next_seq``, the first number not stored; ``ended``: the end record is stored.
    """

    __tablename__ = "attempts"
    __table_args__ = (UniqueConstraint("job_id", "number"), one_of("state", ATTEMPT_STATES))

    id: Mapped[Id]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    number: Mapped[int]
    device_id: Mapped[DeviceId]
    lease_counter: Mapped[int]
    state: Mapped[Word]
    agent: Mapped[str | None]
    agent_digest: Mapped[Sha | None]
    protocol: Mapped[int | None]
    agent_emulated: Mapped[bool | None]
    refused: Mapped[str | None]
    started_wall_ns: Mapped[int]
    ended_wall_ns: Mapped[int | None]
    records: Mapped[int] = mapped_column(server_default=text("0"))
    next_seq: Mapped[int] = mapped_column(server_default=text("0"))
    results: Mapped[int] = mapped_column(server_default=text("0"))
    failures: Mapped[int] = mapped_column(server_default=text("0"))
    rejected: Mapped[int] = mapped_column(server_default=text("0"))
    ended: Mapped[bool] = mapped_column(server_default=false())


class JournalRecordRow(Base):
    """One journal record as received; its unique key is what makes ingestion exactly-once.

    ``wall_ns`` is the device's clock, ``ingested_wall_ns`` the host's. ``rejected``: why no samples were
    made of it (the device sent something impossible); NULL when accepted. ``compacted_wall_ns``: since when
    its samples are summaries and ``record_json`` is packed (``db.compact``); NULL: they are rows.
    """

    __tablename__ = "journal_records"
    __table_args__ = (
        UniqueConstraint("device_id", "job_id", "attempt", "seq"),
        Index("ix_journal_records_job_id_attempt_unit", "job_id", "attempt", "unit"),
        one_of("type", RECORD_TYPES),
    )

    id: Mapped[Id]
    device_id: Mapped[int] = mapped_column(Int64, ForeignKey("devices.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int]
    seq: Mapped[int]
    type: Mapped[Word]
    unit: Mapped[int | None]
    digest: Mapped[Sha]
    record_json: Mapped[str]
    boot_id: Mapped[Word]
    wall_ns: Mapped[int]
    ingested_wall_ns: Mapped[int]
    rejected: Mapped[str | None]
    compacted_wall_ns: Mapped[int | None]


class EventRow(Base):
    """Something a person may want to know: a rejected record, a replaced device, a disagreement."""

    __tablename__ = "events"
    __table_args__ = (one_of("level", EVENT_LEVELS),)

    id: Mapped[Id]
    wall_ns: Mapped[int] = mapped_column(index=True)
    level: Mapped[Word]
    kind: Mapped[Word]
    device_id: Mapped[int | None] = mapped_column(ForeignKey("devices.id"))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    what: Mapped[str]
