"""Device profiles (fits) and plans."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, String, UniqueConstraint, false
from sqlalchemy.orm import Mapped, mapped_column

from db.models.base import Base, DeviceId, Id, Sha, Word


class DeviceProfileRow(Base):
    """A fit for one device × bundle × engine. ``facts_id``: the device as it was when measured.

    ``job_id``: the job whose samples it is fitted from; NULL where that is not known.
    ``unfit``: the fit misses its stated bounds (reasons inside ``profile_json``).
    ``emulation_json``: how its job was slowed, nominally; NULL when it was not.
    ``measured_wall_ns``: when its newest sample was taken, as far as the caller knew.
    """

    __tablename__ = "device_profiles"
    __table_args__ = (UniqueConstraint("device_id", "digest"),)

    id: Mapped[Id]
    digest: Mapped[Sha] = mapped_column(index=True)
    device_id: Mapped[DeviceId]
    job_id: Mapped[str | None] = mapped_column(String(64), ForeignKey("jobs.id"), index=True)
    bundle_digest: Mapped[Sha] = mapped_column(ForeignKey("bundles.digest"), index=True)
    engine: Mapped[Word]
    sequence_length: Mapped[int]
    threads: Mapped[int]
    queue_depth: Mapped[int]
    emulated: Mapped[bool]
    unfit: Mapped[bool]
    facts_id: Mapped[int | None] = mapped_column(ForeignKey("device_facts.id"))
    agent_digest: Mapped[Sha | None]
    emulation_json: Mapped[str | None]
    profile_json: Mapped[str]
    measured_wall_ns: Mapped[int]
    created_wall_ns: Mapped[int]


QUESTION = ("device_id", "task", "policy", "target_ns", "preload_bytes", "working_bytes")
"""Columns of a plan that name what it answers; its newest plan is the answer."""


class PlanRow(Base):
    """A plan for one device and task. ``planned_wall_ns``: when it was last the planner's answer.

    ``content_digest`` names what determines the logits; accuracy is keyed by it.
    ``device_profile_id`` is NULL when the profile the plan names is not in this store.
    ``borrowed``: that profile was measured on another device of the same chip.
    """

    __tablename__ = "plans"
    __table_args__ = (
        UniqueConstraint("device_id", "task", "digest"),
        Index(
            "ix_plans_question",
            *QUESTION,
            "planned_wall_ns",
        ),
    )

    id: Mapped[Id]
    digest: Mapped[Sha] = mapped_column(index=True)
    content_digest: Mapped[Sha] = mapped_column(index=True)
    device_id: Mapped[DeviceId]
    task: Mapped[str] = mapped_column(ForeignKey("tasks.name"))
    bundle_digest: Mapped[Sha] = mapped_column(ForeignKey("bundles.digest"))
    importance_digest: Mapped[Sha | None]
    device_profile_digest: Mapped[Sha]
    device_profile_id: Mapped[int | None] = mapped_column(ForeignKey("device_profiles.id"))
    planner: Mapped[Word]
    policy: Mapped[Word]
    target_ns: Mapped[int]
    preload_bytes: Mapped[int]
    working_bytes: Mapped[int]
    sequence_length: Mapped[int]
    depth: Mapped[int]
    width: Mapped[int]
    mean_fidelity_milli: Mapped[int]
    preloaded_bytes: Mapped[int]
    streamed_bytes: Mapped[int]
    predicted_latency_ns: Mapped[int]
    predicted_median_latency_ns: Mapped[int]
    predicted_stall_ns: Mapped[int]
    within_target: Mapped[bool]
    borrowed: Mapped[bool] = mapped_column(server_default=false())
    emulated: Mapped[bool]
    plan_json: Mapped[str]
    created_wall_ns: Mapped[int]
    planned_wall_ns: Mapped[int]
