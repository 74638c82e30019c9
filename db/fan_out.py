"""From one accepted unit result to rows; runs and evaluations are in ``fan_out_runs``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from db.documents import document
from db.fan_out_runs import NOT_FROM_STORAGE, THROTTLED, mode_proven, write_evaluation, write_run
from db.models import Base, ComputeSampleRow, FixedSampleRow, IoSampleRow, ProbeRow
from db.source import Source, missing_bundle
from sti_runtime.messages import (
    ComputeProfileResult,
    ComputeSample,
    FixedProfileResult,
    FixedSample,
    IoProfileResult,
    IoSample,
    ProbeResult,
    ResultRecord,
)

DEVICE_VERDICT = "device-verdict"
"""The device itself calls the sample invalid."""


def fan_out(session: Session, source: Source, payload: ResultRecord) -> str | None:
    """Make the rows of a result; why none could be made, else None."""
    return _WRITERS[payload.result.kind](session, source, payload.unit, payload.result)


def _shared(source: Source) -> dict[str, Any]:
    """What all samples of a record have in common."""
    return {
        "journal_id": source.journal_id,
        "device_id": source.device_id,
        "bundle_digest": source.job.bundle,
        "engine": source.job.engine,
        "threads": source.job.threads,
        "queue_depth": source.job.queue_depth,
        "sequence_length": source.sequence_length,
        "emulated": source.emulated,
    }


def _verdict(reasons: Sequence[str]) -> dict[str, Any]:
    return {"valid": not reasons, "reasons_json": _reasons_json(tuple(reasons))}


@lru_cache(maxsize=64)
def _reasons_json(reasons: tuple[str, ...]) -> str:
    return document(list(reasons))


def _insert(session: Session, table: type[Base], rows: list[dict[str, Any]]) -> None:
    """Many rows of one table, without the ORM's share of the cost."""
    session.execute(insert(table.__table__), rows)  # type: ignore[arg-type]


def _io_reasons(sample: IoSample) -> list[str]:
    """Why a read does not count: the device says so, it was throttled, or its bytes did not all come from
    storage."""
    reasons = [] if sample.valid else [DEVICE_VERDICT]
    return reasons + _throttled(sample) + _not_stored(sample)


def _throttled(sample: IoSample | ComputeSample | FixedSample) -> list[str]:
    return [THROTTLED] if sample.throttled else []


def _not_stored(sample: IoSample | FixedSample) -> list[str]:
    return [NOT_FROM_STORAGE] if sample.storage_bytes < sample.bytes else []


def _io(session: Session, source: Source, _: int, result: IoProfileResult) -> str | None:
    missing = missing_bundle(session, source)
    if missing is None:
        _insert_reads(session, source, result.io_mode, result.samples, beside=False)
    return missing


def _insert_reads(
    session: Session, source: Source, io_mode: str, samples: Sequence[IoSample], *, beside: bool
) -> None:
    shared = _shared(source)
    rows = [
        {
            **shared,
            "ordinal": i,
            "warmup": False,
            **_verdict(_io_reasons(s)),
            "io_mode": io_mode,
            "mode_asked": s.mode_asked,
            "mode_proven": mode_proven(s.mode_proven, s.bytes, s.storage_bytes),
            "beside_compute": beside,
            "versions": s.versions,
            "read_bytes": s.bytes,
            "storage_bytes": s.storage_bytes,
            "duration_ns": s.duration_ns,
        }
        for i, s in enumerate(samples)
    ]
    _insert(session, IoSampleRow, rows)


def _compute(session: Session, source: Source, _: int, result: ComputeProfileResult) -> str | None:
    missing = missing_bundle(session, source)
    if missing is None:
        shared = _shared(source)
        rows = [
            {
                **shared,
                "ordinal": i,
                "warmup": s.warmup,
                **_verdict(_throttled(s)),
                "width": s.width,
                "fidelity": s.fidelity,
                "read_bytes": s.read_bytes,
                "decompress_ns": s.decompress_ns,
                "compute_ns": s.compute_ns,
            }
            for i, s in enumerate(result.samples)
        ]
        _insert(session, ComputeSampleRow, rows)
        _insert_reads(session, source, result.io_mode, result.reads, beside=True)
    return missing


def _fixed(session: Session, source: Source, _: int, result: FixedProfileResult) -> str | None:
    missing = missing_bundle(session, source)
    if missing is None:
        shared = _shared(source)
        rows = [
            {
                **shared,
                "ordinal": i,
                "warmup": s.warmup,
                **_verdict(_throttled(s) + _not_stored(s)),
                "mode_asked": s.mode_asked,
                "mode_proven": mode_proven(s.mode_proven, s.bytes, s.storage_bytes),
                "embed_io_ns": s.embed_io_ns,
                "embed_compute_ns": s.embed_compute_ns,
                "head_ns": s.head_ns,
                "read_bytes": s.bytes,
                "storage_bytes": s.storage_bytes,
            }
            for i, s in enumerate(result.samples)
        ]
        _insert(session, FixedSampleRow, rows)
    return missing


def _probe(session: Session, source: Source, _: int, result: ProbeResult) -> str | None:
    sensors = result.sensors
    session.add(
        ProbeRow(
            journal_id=source.journal_id,
            device_id=source.device_id,
            emulated=source.emulated,
            wall_ns=source.record.wall_ns,
            temperature_milli_c=sensors.temperature_milli_c,
            load_milli=sensors.load_milli,
            battery_percent=sensors.battery_percent,
            free_bytes=sensors.free_bytes,
            available_memory_bytes=sensors.available_memory_bytes,
            throttled=sensors.throttled,
            sensors_json=document(sensors),
            verified_json=None if result.verified is None else document(result.verified),
        )
    )
    session.flush()
    return None


_WRITERS: Mapping[str, Callable[[Session, Source, int, Any], str | None]] = {
    "probe": _probe,
    "profile-io": _io,
    "profile-compute": _compute,
    "profile-fixed": _fixed,
    "execute": write_run,
    "evaluate": write_evaluation,
}
