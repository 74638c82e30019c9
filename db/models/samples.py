"""Raw profile samples and probes. Each row belongs to one journal record, at one ordinal in it."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from db.models.base import Base, Id, JournalId, Sha, Word, one_of

IO_MODES = ("direct", "buffered")
"""direct: O_DIRECT. buffered: through the page cache, dropped before a cold read."""

PROVEN_MODES = ("direct", "buffered-cold", "cached", "mixed", "unknown")
"""What the bytes the kernel read from storage prove: all came from there, past the page cache or through it;
none did; some did; the kernel does not count."""


class _Sample:
    """Columns of every profile sample. ``valid`` with ``reasons_json``: why not, as a list of words.

    ``device_id`` and ``bundle_digest`` are copies of what the record's job says: references of each sample to
    them, besides the one to its record, would cost PostgreSQL as much as all else of the row.
    """

    id: Mapped[Id]
    journal_id: Mapped[JournalId]
    ordinal: Mapped[int]
    device_id: Mapped[int] = mapped_column(index=True)
    bundle_digest: Mapped[Sha]
    engine: Mapped[Word]
    threads: Mapped[int]
    queue_depth: Mapped[int]
    sequence_length: Mapped[int | None]
    emulated: Mapped[bool]
    warmup: Mapped[bool]
    valid: Mapped[bool]
    reasons_json: Mapped[str]


class IoSampleRow(_Sample, Base):
    """One merged layer read of ``versions`` versions: bytes asked, bytes the storage delivered, time.
    ``beside_compute``: a layer was being computed meanwhile."""

    __tablename__ = "io_samples"
    __table_args__ = (
        UniqueConstraint("journal_id", "ordinal"),
        one_of("io_mode", IO_MODES),
        one_of("mode_asked", IO_MODES),
        one_of("mode_proven", PROVEN_MODES),
    )

    io_mode: Mapped[Word]
    mode_asked: Mapped[Word]
    mode_proven: Mapped[Word]
    beside_compute: Mapped[bool]
    versions: Mapped[int]
    read_bytes: Mapped[int]
    storage_bytes: Mapped[int]
    duration_ns: Mapped[int]


class ComputeSampleRow(_Sample, Base):
    """One layer of ``width`` slices: decompression of its shards at ``fidelity``, then compute;
    ``read_bytes``: its share of what was read from storage beside such layers, 0 for one computed alone."""

    __tablename__ = "compute_samples"
    __table_args__ = (UniqueConstraint("journal_id", "ordinal"),)

    width: Mapped[int]
    fidelity: Mapped[int]
    read_bytes: Mapped[int]
    decompress_ns: Mapped[int]
    compute_ns: Mapped[int]


class FixedSampleRow(_Sample, Base):
    """One request's fixed parts: embedding reads and arithmetic, the head."""

    __tablename__ = "fixed_samples"
    __table_args__ = (
        UniqueConstraint("journal_id", "ordinal"),
        one_of("mode_asked", IO_MODES),
        one_of("mode_proven", PROVEN_MODES),
    )

    mode_asked: Mapped[Word]
    mode_proven: Mapped[Word]
    embed_io_ns: Mapped[int]
    embed_compute_ns: Mapped[int]
    head_ns: Mapped[int]
    read_bytes: Mapped[int]
    storage_bytes: Mapped[int]


class ProbeRow(Base):
    """Sensors at one moment and, on an emulated device, its stated rates beside the verified ones."""

    __tablename__ = "probes"
    __table_args__ = (Index("ix_probes_device_id_wall_ns", "device_id", "wall_ns"),)

    id: Mapped[Id]
    journal_id: Mapped[JournalId] = mapped_column(unique=True)
    device_id: Mapped[int] = mapped_column(ForeignKey("devices.id"))
    emulated: Mapped[bool]
    wall_ns: Mapped[int]
    temperature_milli_c: Mapped[int | None]
    load_milli: Mapped[int | None]
    battery_percent: Mapped[int | None]
    free_bytes: Mapped[int | None]
    available_memory_bytes: Mapped[int | None]
    throttled: Mapped[bool | None]
    sensors_json: Mapped[str]
    verified_json: Mapped[str | None]
