"""Importance: every score as measured, and the profiles made of them. Device-independent."""

from __future__ import annotations

from sqlalchemy import ForeignKey, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from db.models.base import Base, Id, Sha, Word


class ImportanceScoreRow(Base):
    """One configuration scored on one split: shard (layer, slice) raised to 32 bits, others at the base.

    The base itself (nothing raised) is layer −1, slice −1; layer −2 is submodel number ``slice`` of its model
    with all shards at ``base_fidelity``. ``quantizer``: what made the versions below
    32 bits. The half losses are over the even and the odd rows of the split, ``half_a_correct`` counts the
    correct even rows, for the split-half reliability of the rankings by loss and by accuracy. A row of an
    earlier schema lacks it and is scored again. ``device``: the one that measured it; NULL: the host.
    """

    __tablename__ = "importance_scores"
    __table_args__ = (
        UniqueConstraint(
            "model_digest",
            "task",
            "split_digest",
            "base_fidelity",
            "quantizer",
            "layer",
            "slice",
            name="uq_importance_scores_configuration",
        ),
    )

    id: Mapped[Id]
    model_digest: Mapped[Sha] = mapped_column(ForeignKey("models.digest"))
    task: Mapped[str] = mapped_column(ForeignKey("tasks.name"))
    split_digest: Mapped[Sha]
    base_fidelity: Mapped[int]
    quantizer: Mapped[Word]
    layer: Mapped[int]
    slice: Mapped[int]
    rows: Mapped[int]
    loss_nano: Mapped[int]
    correct: Mapped[int]
    half_a_loss_nano: Mapped[int | None]
    half_b_loss_nano: Mapped[int | None]
    half_a_correct: Mapped[int | None]
    device: Mapped[str | None]
    created_wall_ns: Mapped[int]


class ImportanceProfileRow(Base):
    """A complete importance profile. ``method``: "exhaustive" (every shard scored, ranked by loss),
    "exhaustive-accuracy" (the same scores, ranked by correct rows) or "gradient" (estimated)."""

    __tablename__ = "importance_profiles"

    digest: Mapped[Sha] = mapped_column(primary_key=True)
    model_digest: Mapped[Sha] = mapped_column(ForeignKey("models.digest"), index=True)
    task: Mapped[str] = mapped_column(ForeignKey("tasks.name"))
    split_digest: Mapped[Sha]
    method: Mapped[Word]
    base_fidelity: Mapped[int]
    rows: Mapped[int]
    reliability_ppm: Mapped[int]
    profile_json: Mapped[str]
    created_wall_ns: Mapped[int]
