"""Campaigns: what was asked, each time it is run, the work of a run, and when it runs by itself."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from db.models.base import Base, Id, Int64, Sha, Word, one_of

CELL_KINDS = ("health", "importance", "profile", "execute", "evaluate")
"""In the order in which a device has them: each may need those before it."""

RUN_STATES = ("queued", "running", "done", "failed", "cancelled", "skipped")
"""queued: waits for an earlier run of its campaign. running: has work left. done: every cell is done or
infeasible. failed: it ended with cells that are not. cancelled: by a person. skipped: a due time that passed
while an earlier run went on."""

BATCH_STATES = ("queued", "running", "ended")
"""queued: waits for its turn. running: claimed by a controller. ended: its cells say how."""

CELL_STATES = ("queued", "running", "done", "failed", "skipped", "infeasible", "cancelled")
"""done: measured. failed: see the cause. skipped: what it needs failed. infeasible: no plan meets its T.
cancelled: by a person."""

TRIGGERS = ("manual", "schedule", "catch-up")
"""manual: a person. schedule: a due time. catch-up: a due time that passed while no controller ran."""

SCHEDULE_STATES = ("active", "paused", "removed")
CATCH_UPS = ("once", "skip")
OVERLAPS = ("skip", "queue")


class CampaignRow(Base):
    """A campaign by its name. ``spec_json``: the matrix as read.

    ``priority``: its weight where campaigns share a device. ``deadline_ns``: how long after its due time a
    run should be over; NULL: whenever.
    """

    __tablename__ = "campaigns"

    id: Mapped[Id]
    name: Mapped[str] = mapped_column(String(200), unique=True)
    spec_json: Mapped[str]
    spec_digest: Mapped[Sha]
    priority: Mapped[int]
    deadline_ns: Mapped[int | None]
    seed: Mapped[int]
    created_wall_ns: Mapped[int]
    updated_wall_ns: Mapped[int]


class ScheduleRow(Base):
    """When a campaign runs by itself. ``settled_wall_ns``: due times up to it have been dealt with."""

    __tablename__ = "schedules"
    __table_args__ = (
        one_of("state", SCHEDULE_STATES),
        one_of("catch_up", CATCH_UPS),
        one_of("overlap", OVERLAPS),
    )

    id: Mapped[Id]
    campaign_id: Mapped[int] = mapped_column(Int64, ForeignKey("campaigns.id"), unique=True)
    cron: Mapped[str]
    timezone: Mapped[Word]
    catch_up: Mapped[Word]
    overlap: Mapped[Word]
    state: Mapped[Word]
    settled_wall_ns: Mapped[int]
    created_wall_ns: Mapped[int]


class CampaignRunRow(Base):
    """One run of a campaign. ``due_wall_ns``: when it was to begin; of one schedule each due time is one run.

    Times are the database's clock. ``cause``: why it was skipped or cancelled.
    """

    __tablename__ = "campaign_runs"
    __table_args__ = (
        UniqueConstraint("campaign_id", "number"),
        UniqueConstraint("schedule_id", "due_wall_ns"),
        one_of("state", RUN_STATES),
        one_of("trigger", TRIGGERS),
    )

    id: Mapped[Id]
    campaign_id: Mapped[int] = mapped_column(Int64, ForeignKey("campaigns.id"))
    schedule_id: Mapped[int | None] = mapped_column(Int64, ForeignKey("schedules.id"))
    number: Mapped[int]
    trigger: Mapped[Word]
    state: Mapped[Word] = mapped_column(index=True)
    cause: Mapped[str | None]
    due_wall_ns: Mapped[int]
    deadline_wall_ns: Mapped[int | None]
    started_wall_ns: Mapped[int | None]
    ended_wall_ns: Mapped[int | None]


class CampaignBatchRow(Base):
    """What one job does: the cells of one device that are measured together, and who works on them.

    ``device`` NULL: on the host. ``fresh`` false: what the store has will do. ``owner`` holds the claim until
    ``claimed_until_wall_ns``, of the database's clock. ``tries``: failed attempts so far, ``cause`` the last
    one's; the next not before ``not_before_wall_ns``.
    """

    __tablename__ = "campaign_batches"
    __table_args__ = (
        UniqueConstraint("run_id", "number"),
        one_of("state", BATCH_STATES),
        one_of("kind", CELL_KINDS),
        Index("ix_campaign_batches_run_id_state_device", "run_id", "state", "device"),
    )

    id: Mapped[Id]
    run_id: Mapped[int] = mapped_column(Int64, ForeignKey("campaign_runs.id"))
    number: Mapped[int]
    device: Mapped[str | None] = mapped_column(String(200))
    kind: Mapped[Word]
    bundle_digest: Mapped[Sha | None]
    task: Mapped[str | None]
    engine: Mapped[Word | None]
    repeat: Mapped[int]
    fresh: Mapped[bool]
    state: Mapped[Word]
    owner: Mapped[str | None]
    claimed_until_wall_ns: Mapped[int | None]
    tries: Mapped[int]
    not_before_wall_ns: Mapped[int]
    cause: Mapped[str | None]
    started_wall_ns: Mapped[int | None]
    ended_wall_ns: Mapped[int | None]


class CampaignCellRow(Base):
    """One cell of the matrix. ``target``: T as the campaign says it; ``target_ns``: what that came to.

    ``preload``: |S| as the campaign says it, NULL where the policy has no use for it; ``preload_bytes``: what
    that came to. ``job_id`` and ``plan_digest`` lead to its samples; an importance cell's ``plan_digest``
    is its profile's, which the run plans by. What does not apply to a kind is NULL. ``cause`` of a done cell:
    what of it the store had already.
    """

    __tablename__ = "campaign_cells"
    __table_args__ = (UniqueConstraint("batch_id", "number"), one_of("state", CELL_STATES))

    id: Mapped[Id]
    run_id: Mapped[int] = mapped_column(Int64, ForeignKey("campaign_runs.id"), index=True)
    batch_id: Mapped[int] = mapped_column(Int64, ForeignKey("campaign_batches.id"))
    number: Mapped[int]
    target: Mapped[Word | None]
    target_ns: Mapped[int | None]
    preload: Mapped[Word | None]
    preload_bytes: Mapped[int | None]
    policy: Mapped[Word | None]
    state: Mapped[Word]
    cause: Mapped[str | None]
    plan_digest: Mapped[Sha | None]
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), index=True)
