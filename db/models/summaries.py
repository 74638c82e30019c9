"""What compaction leaves in the place of raw sample rows: their figures, one row for each group of them."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from db.models.base import Base, DeviceId, Id, JournalId, Sha, Word, one_of

SAMPLE_KINDS = ("io", "compute", "fixed", "request")
"""Which table the samples stood in: ``io_samples``, ``compute_samples``, ``fixed_samples``, ``requests``."""

QUANTITIES = (
    "duration", "decompress", "compute", "embed_io", "embed_compute", "head", "latency", "stall",
)  # fmt: skip
"""What was measured; the samples' columns without ``_ns``."""


class SampleSummaryRow(Base):
    """Samples of one journal record that are alike in all that is named here, by one quantity.

    Figures are those of ``db.statistics``. The samples themselves stay in the record (``record_json``).
    """

    __tablename__ = "sample_summaries"
    __table_args__ = (
        one_of("kind", SAMPLE_KINDS),
        one_of("quantity", QUANTITIES),
        Index("ix_sample_summaries_journal_id", "journal_id"),
    )

    id: Mapped[Id]
    journal_id: Mapped[JournalId]
    kind: Mapped[Word]
    quantity: Mapped[Word]
    device_id: Mapped[DeviceId]
    bundle_digest: Mapped[Sha] = mapped_column(ForeignKey("bundles.digest"))
    engine: Mapped[Word]
    emulated: Mapped[bool]
    warmup: Mapped[bool]
    valid: Mapped[bool]
    reasons_json: Mapped[str]
    beside_compute: Mapped[bool | None]
    versions: Mapped[int | None]
    width: Mapped[int | None]
    fidelity: Mapped[int | None]
    count: Mapped[int]
    min_ns: Mapped[int]
    mean_ns: Mapped[int]
    median_ns: Mapped[int]
    median_low_ns: Mapped[int | None]
    median_high_ns: Mapped[int | None]
    p95_ns: Mapped[int]
    max_ns: Mapped[int]
    compacted_wall_ns: Mapped[int]
