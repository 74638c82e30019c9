"""Executed plans: runs with their provenance, every request, and accuracy per distinct content."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from db.models.base import Base, DeviceId, Id, JournalId, Sha, Word, one_of
from db.models.samples import IO_MODES, PROVEN_MODES

REQUEST_KINDS = ("spawn-cold", "cold", "warm", "cached")
"""spawn-cold: new process. cold: process ready, buffers empty. warm: preload buffer filled.
cached: page cache warm, never compared with the others."""

GATE_VERDICTS = ("pass", "fail", "ungated")
"""Worst of a run's gates: fail before ungated (a sensor was unreadable) before pass."""


class RunRow(Base):
    """One executed unit with all its provenance; its requests are in ``requests``.

    ``io_mode`` is the one in use, which is not the one asked for where storage refused that.
    ``readings_json``: the sensors between the requests. ``emulation_json`` is the nominal slowing,
    ``verified_json`` what the last probe before it measured. ``measured_json``: its requests in brief
    (``db.measured``); empty of a run whose requests were compacted before the store kept it.
    """

    __tablename__ = "runs"
    __table_args__ = (
        UniqueConstraint("job_id", "attempt", "unit"),
        one_of("request_kind", REQUEST_KINDS),
        one_of("io_mode", IO_MODES),
        one_of("io_mode_proven", PROVEN_MODES),
        one_of("gate_verdict", GATE_VERDICTS),
    )

    id: Mapped[Id]
    journal_id: Mapped[JournalId] = mapped_column(unique=True)
    device_id: Mapped[DeviceId]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int]
    unit: Mapped[int]
    plan_id: Mapped[int] = mapped_column(ForeignKey("plans.id"), index=True)
    plan_digest: Mapped[Sha]
    bundle_digest: Mapped[Sha] = mapped_column(ForeignKey("bundles.digest"))
    task_data_digest: Mapped[Sha] = mapped_column(ForeignKey("task_data.digest"))
    request_kind: Mapped[Word]
    io_mode: Mapped[Word]
    io_mode_proven: Mapped[Word]
    engine: Mapped[Word]
    threads: Mapped[int]
    queue_depth: Mapped[int]
    agent: Mapped[str | None]
    agent_digest: Mapped[Sha | None]
    facts_id: Mapped[int | None] = mapped_column(ForeignKey("device_facts.id"))
    os_build: Mapped[str | None]
    kernel: Mapped[str | None]
    boot_id: Mapped[Word]
    wall_ns: Mapped[int]
    cpu_khz_before_json: Mapped[str]
    cpu_khz_after_json: Mapped[str]
    temperature_before_milli_c: Mapped[int | None]
    temperature_after_milli_c: Mapped[int | None]
    battery_before_percent: Mapped[int | None]
    battery_after_percent: Mapped[int | None]
    load_before_milli: Mapped[int | None]
    load_after_milli: Mapped[int | None]
    gate_verdict: Mapped[Word]
    gates_json: Mapped[str]
    readings_json: Mapped[str]
    emulated: Mapped[bool]
    io_mechanism: Mapped[str | None] = mapped_column(String(32))
    cpu_mechanism: Mapped[str | None] = mapped_column(String(32))
    emulation_json: Mapped[str | None]
    verified_json: Mapped[str | None]
    resident_bytes: Mapped[int]
    preload_bytes: Mapped[int]
    working_bytes: Mapped[int]
    activations_bytes: Mapped[int]
    process_peak_bytes: Mapped[int | None]
    measured_json: Mapped[str] = mapped_column(server_default="{}")


MEASURED = (
    "run_id",
    "warmup",
    "valid",
    "latency_ns",
    "stall_ns",
    "storage_bytes",
    "planned_bytes",
    "mode_asked",
    "mode_proven",
)
"""Columns of a request that reports are made of: an index holds them, apart from its long documents."""


class RequestRow(Base):
    """One request. ``valid`` false: kept, and left out of statistics; ``reasons_json`` says why."""

    __tablename__ = "requests"
    __table_args__ = (
        UniqueConstraint("run_id", "ordinal"),
        Index("ix_requests_measured", *MEASURED),
        one_of("mode_asked", IO_MODES),
        one_of("mode_proven", PROVEN_MODES),
    )

    id: Mapped[Id]
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    ordinal: Mapped[int]
    task_row: Mapped[int]
    warmup: Mapped[bool]
    valid: Mapped[bool]
    reasons_json: Mapped[str]
    emulated: Mapped[bool]
    latency_ns: Mapped[int]
    stall_ns: Mapped[int]
    planned_bytes: Mapped[int]
    storage_bytes: Mapped[int]
    mode_asked: Mapped[Word]
    mode_proven: Mapped[Word]
    logits_json: Mapped[str]
    trace_json: Mapped[str]


class EvaluationRow(Base):
    """Accuracy of one content on one task data with one engine: measured once, by the first to report.

    ``loss_nano``: mean cross-entropy in nano-nats over the ``rows`` labelled rows.
    """

    __tablename__ = "evaluations"
    __table_args__ = (UniqueConstraint("content_digest", "task_data_digest", "engine"),)

    id: Mapped[Id]
    journal_id: Mapped[JournalId]
    device_id: Mapped[DeviceId]
    content_digest: Mapped[Sha]
    task_data_digest: Mapped[Sha] = mapped_column(ForeignKey("task_data.digest"))
    bundle_digest: Mapped[Sha] = mapped_column(ForeignKey("bundles.digest"))
    engine: Mapped[Word]
    agent_digest: Mapped[Sha | None]
    emulated: Mapped[bool]
    rows: Mapped[int]
    correct: Mapped[int]
    loss_nano: Mapped[int]
    predictions_json: Mapped[str]
    wall_ns: Mapped[int]
