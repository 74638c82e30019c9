"""From one accepted unit result to rows; runs and evaluations are in ``fan_out_runs``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy.orm import Session

from db.bulk import Columns, Values, insert_rows
from db.documents import document
from db.fan_out_runs import NOT_FROM_STORAGE, THROTTLED, mode_proven, write_evaluation, write_run
from db.models import ComputeSampleRow, FixedSampleRow, IoSampleRow, ProbeRow
from db.source import Pending, Source, missing_bundle
from sti_runtime.messages import (
    ComputeProfileResult,
    FixedProfileResult,
    IoProfileResult,
    IoSample,
    ProbeResult,
    ResultRecord,
)

DEVICE_VERDICT = "device-verdict"
"""The device itself calls the sample invalid."""

_SHARED = (
    "journal_id",
    "device_id",
    "bundle_digest",
    "engine",
    "threads",
    "queue_depth",
    "sequence_length",
    "emulated",
    "ordinal",
    "warmup",
    "valid",
    "reasons_json",
)
_READ = ("mode_asked", "mode_proven", "read_bytes", "storage_bytes")
_IO = Columns(IoSampleRow, (*_SHARED, *_READ, "io_mode", "beside_compute", "versions", "duration_ns"))
_COMPUTE = Columns(
    ComputeSampleRow, (*_SHARED, "width", "fidelity", "read_bytes", "decompress_ns", "compute_ns")
)
_PROBE = Columns(
    ProbeRow,
    (
        "journal_id",
        "device_id",
        "emulated",
        "wall_ns",
        "temperature_milli_c",
        "load_milli",
        "battery_percent",
        "free_bytes",
        "available_memory_bytes",
        "throttled",
        "sensors_json",
        "verified_json",
    ),
)
_FIXED = Columns(FixedSampleRow, (*_SHARED, *_READ, "embed_io_ns", "embed_compute_ns", "head_ns"))


def fan_out(session: Session, source: Source, payload: ResultRecord, pending: Pending) -> str | None:
    """Make the rows of a result, which are in the store once ``pending`` is written; why none could be made,
    else None."""
    return _WRITERS[payload.result.kind](session, source, payload.unit, payload.result, pending)


def _shared(source: Source) -> Values:
    """What all samples of a record have in common."""
    job = source.job
    return (
        source.journal_id,
        source.device_id,
        job.bundle,
        job.engine,
        job.threads,
        job.queue_depth,
        source.sequence_length,
        source.emulated,
    )


@lru_cache(maxsize=64)
def _sample_verdict(*, told_valid: bool, throttled: bool, stored: bool) -> Values:
    """Columns ``valid`` and ``reasons_json``: a sample does not count when the device says so, when it was
    throttled, or when its bytes did not all come from storage."""
    found = ((DEVICE_VERDICT, not told_valid), (THROTTLED, throttled), (NOT_FROM_STORAGE, not stored))
    reasons = [reason for reason, holds in found if holds]
    return not reasons, document(reasons)


def _io(_: Session, source: Source, __: int, result: IoProfileResult, pending: Pending) -> str | None:
    missing = missing_bundle(source)
    if missing is None:
        _add_reads(source, result.io_mode, result.samples, pending, beside=False)
    return missing


def _add_reads(
    source: Source, io_mode: str, samples: Sequence[IoSample], pending: Pending, *, beside: bool
) -> None:
    shared = _shared(source)
    rows = [
        (
            *shared,
            i,
            False,
            *_sample_verdict(told_valid=s.valid, throttled=s.throttled, stored=s.storage_bytes >= s.bytes),
            s.mode_asked,
            mode_proven(s.mode_proven, s.bytes, s.storage_bytes),
            s.bytes,
            s.storage_bytes,
            io_mode,
            beside,
            s.versions,
            s.duration_ns,
        )
        for i, s in enumerate(samples)
    ]
    pending.add(_IO, rows)


def _compute(
    _: Session, source: Source, __: int, result: ComputeProfileResult, pending: Pending
) -> str | None:
    missing = missing_bundle(source)
    if missing is None:
        shared = _shared(source)
        rows = [
            (
                *shared,
                i,
                s.warmup,
                *_sample_verdict(told_valid=True, throttled=s.throttled, stored=True),
                s.width,
                s.fidelity,
                s.read_bytes,
                s.decompress_ns,
                s.compute_ns,
            )
            for i, s in enumerate(result.samples)
        ]
        pending.add(_COMPUTE, rows)
        _add_reads(source, result.io_mode, result.reads, pending, beside=True)
    return missing


def _fixed(_: Session, source: Source, __: int, result: FixedProfileResult, pending: Pending) -> str | None:
    missing = missing_bundle(source)
    if missing is None:
        shared = _shared(source)
        rows = [
            (
                *shared,
                i,
                s.warmup,
                *_sample_verdict(told_valid=True, throttled=s.throttled, stored=s.storage_bytes >= s.bytes),
                s.mode_asked,
                mode_proven(s.mode_proven, s.bytes, s.storage_bytes),
                s.bytes,
                s.storage_bytes,
                s.embed_io_ns,
                s.embed_compute_ns,
                s.head_ns,
            )
            for i, s in enumerate(result.samples)
        ]
        pending.add(_FIXED, rows)
    return missing


def _probe(session: Session, source: Source, _: int, result: ProbeResult, pending: Pending) -> str | None:
    sensors = result.sensors
    row = (
        source.journal_id,
        source.device_id,
        source.emulated,
        source.record.wall_ns,
        sensors.temperature_milli_c,
        sensors.load_milli,
        sensors.battery_percent,
        sensors.free_bytes,
        sensors.available_memory_bytes,
        sensors.throttled,
        document(sensors),
        None if result.verified is None else document(result.verified),
    )
    if result.verified is None:
        pending.add(_PROBE, [row])
    else:  # at once: the runs that follow look for it
        insert_rows(session, _PROBE, [row])
    return None


_WRITERS: Mapping[str, Callable[[Session, Source, int, Any, Pending], str | None]] = {
    "probe": _probe,
    "profile-io": _io,
    "profile-compute": _compute,
    "profile-fixed": _fixed,
    "execute": write_run,
    "evaluate": write_evaluation,
}
