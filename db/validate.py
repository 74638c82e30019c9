"""Checks of what a device claims, beyond its type: a record that fails is kept and makes no samples.

Every check returns why the record cannot be true, or None. Pure: all it needs is in the ``Context``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sti_runtime.messages import (
    ComputeProfileResult,
    ComputeProfileUnit,
    EvaluateResult,
    EvaluateUnit,
    ExecuteResult,
    ExecuteUnit,
    FixedProfileResult,
    FixedProfileUnit,
    IoProfileResult,
    IoSample,
    Job,
    JournalRecord,
    ProbeResult,
    Reading,
    RequestSample,
    ResultRecord,
    Sensors,
    StartRecord,
)
from sti_runtime.units import NS_PER_S, format_bytes, format_ns

DAY_NS = 86_400 * NS_PER_S
SIZE_CAP_BYTES = 1 << 40
"""No memory part and no read of a single unit is larger than a TiB."""

CLOCK_SLACK_NS = 2 * NS_PER_S
"""By how much a sum of durations may exceed the wall clock's span, besides 5 % (clocks are slewed)."""

_PAGES_PER_TOKEN = 6
"""Three embedding tables, and a row may straddle two pages."""

_TEMPERATURES_MILLI_C = range(-100_000, 300_001)
_PERCENT = range(101)
_LOADS_MILLI = range(10_000_001)


@dataclass(frozen=True)
class Context:
    """What a record is checked against. ``None``: not known here, so not checked.

    ``previous_wall_ns``: wall time of the record before it in the journal, same boot.
    """

    job: Job
    attempt: int
    bundle_bytes: int | None
    heads: int | None
    labels: int | None
    data_rows: int | None
    sequence_length: int | None
    previous_wall_ns: int | None = None


def why_rejected(record: JournalRecord, context: Context) -> str | None:
    """Why ``record`` cannot be true; None when it may be."""
    payload = record.payload
    if isinstance(payload, StartRecord):
        if payload.job != context.job.id or payload.attempt != context.attempt:
            return f"start record of job {payload.job}, attempt {payload.attempt}"
        if payload.first_unit > len(context.job.units):
            return f"starts at unit {payload.first_unit} of {len(context.job.units)}"
        return _sensors(payload.sensors)
    if isinstance(payload, ResultRecord):
        return _result(record, payload, context)
    unit = getattr(payload, "unit", 0)
    return f"unit {unit} is not in the job" if unit >= len(context.job.units) else None


def _result(record: JournalRecord, payload: ResultRecord, context: Context) -> str | None:
    if payload.unit >= len(context.job.units):
        return f"unit {payload.unit} is not in the job"
    unit = context.job.units[payload.unit]
    if unit.kind != payload.result.kind:
        return f"unit {payload.unit} is of kind {unit.kind}, its result of kind {payload.result.kind}"
    return _CHECKS[unit.kind](unit, payload.result, context) or _span(record, payload.result, context)


def _span(record: JournalRecord, result: Any, context: Context) -> str | None:
    """Measured durations cannot add up to more than the time since the record before."""
    measured = sum(_durations(result))
    if context.previous_wall_ns is None or record.wall_ns < context.previous_wall_ns:
        return None
    span = record.wall_ns - context.previous_wall_ns
    if measured > span + span // 20 + CLOCK_SLACK_NS:
        return f"measured {format_ns(measured)} within {format_ns(span)} of wall time"
    return None


def _durations(result: Any) -> list[int]:
    if isinstance(result, IoProfileResult):
        return [s.duration_ns for s in result.samples]
    if isinstance(result, ComputeProfileResult):
        return [s.decompress_ns + s.compute_ns for s in result.samples] + [
            s.duration_ns for s in result.reads
        ]
    if isinstance(result, FixedProfileResult):
        return [s.embed_io_ns + s.embed_compute_ns + s.head_ns for s in result.samples]
    if isinstance(result, ExecuteResult):
        return [s.latency_ns for s in result.requests]
    return []


def _too_long(result: Any) -> str | None:
    worst = max(_durations(result), default=0)
    return f"a duration of {format_ns(worst)}" if worst > DAY_NS else None


def _too_large(name: str, sizes: Iterable[int], cap: int) -> str | None:
    worst = max(sizes, default=0)
    return f"{name} of {format_bytes(worst)}, more than {format_bytes(cap)}" if worst > cap else None


def _read_cap(context: Context) -> int:
    if context.bundle_bytes is None:
        return SIZE_CAP_BYTES
    return context.bundle_bytes + _PAGES_PER_TOKEN * 4096 * (context.sequence_length or 0)


def _sensors(sensors: Sensors) -> str | None:
    table: Mapping[str, tuple[int | None, range]] = {
        "temperature_milli_c": (sensors.temperature_milli_c, _TEMPERATURES_MILLI_C),
        "battery_percent": (sensors.battery_percent, _PERCENT),
        "load_milli": (sensors.load_milli, _LOADS_MILLI),
        "free_bytes": (sensors.free_bytes, range(2**63)),
        "available_memory_bytes": (sensors.available_memory_bytes, range(2**63)),
    }
    return _out_of_range(table)


def _readings(readings: Sequence[Reading], samples: int) -> str | None:
    """Why readings between ``samples`` samples cannot be true."""
    places = [reading.after for reading in readings]
    if places != sorted(places) or any(place > samples for place in places):
        return f"sensor readings out of order, or beyond the {samples} samples"
    for reading in readings:
        table: Mapping[str, tuple[int | None, range]] = {
            "temperature_milli_c": (reading.temperature_milli_c, _TEMPERATURES_MILLI_C),
            "load_milli": (reading.load_milli, _LOADS_MILLI),
            "available_memory_bytes": (reading.available_memory_bytes, range(2**63)),
        }
        found = _out_of_range(table)
        if found is not None:
            return found
    return None


def _out_of_range(table: Mapping[str, tuple[int | None, range]]) -> str | None:
    for name, (value, allowed) in table.items():
        if value is not None and value not in allowed:
            return f"{name} of {value}"
    return None


def _probe(_: Any, result: ProbeResult, __: Context) -> str | None:
    return _sensors(result.sensors)


def _io(_: Any, result: IoProfileResult, context: Context) -> str | None:
    if not result.samples:
        return "no samples"
    return _reads(result, result.samples, context)


def _reads(result: Any, reads: Sequence[IoSample], context: Context) -> str | None:
    if context.heads is not None and any(s.versions > context.heads for s in reads):
        return f"a layer read of more than {context.heads} versions"
    return (
        _too_long(result)
        or _readings(result.readings, len(result.samples))
        or _too_large("a read", (s.bytes for s in reads), _read_cap(context))
        or _too_large("bytes from storage", (s.storage_bytes for s in reads), SIZE_CAP_BYTES)
    )


def _compute(unit: ComputeProfileUnit, result: ComputeProfileResult, context: Context) -> str | None:
    if not result.samples:
        return "no samples"
    for sample in result.samples:
        if sample.width != unit.width or sample.fidelity not in unit.fidelities:
            return f"a sample of width {sample.width} at {sample.fidelity} bits, which was not asked"
    if not result.reads:
        return "no reads beside"
    return _reads(result, result.reads, context) or _too_large(
        "bytes from storage", (s.read_bytes for s in result.samples), SIZE_CAP_BYTES
    )


def _fixed(_: FixedProfileUnit, result: FixedProfileResult, context: Context) -> str | None:
    if not result.samples:
        return "no samples"
    return (
        _too_long(result)
        or _readings(result.readings, len(result.samples))
        or _too_large("a read", (s.bytes for s in result.samples), _read_cap(context))
        or _too_large("bytes from storage", (s.storage_bytes for s in result.samples), SIZE_CAP_BYTES)
    )


def _execute(unit: ExecuteUnit, result: ExecuteResult, context: Context) -> str | None:
    asked = unit.plan.digest
    if result.plan_digest != asked:
        return f"executed plan {result.plan_digest[:12]}, asked was {asked[:12]}"
    if result.request_kind != unit.request_kind:
        return f"{result.request_kind} requests where {unit.request_kind} ones were asked"
    closed = any(gate.verdict == "fail" for gate in result.gates)
    if not (closed and not result.requests) and tuple(r.row for r in result.requests) != unit.rows:
        return "requests are not of the rows asked"
    if any(r.warmup != (i < unit.warmups) for i, r in enumerate(result.requests)):
        return f"warm-ups are not the first {unit.warmups} requests"
    if any(r.mode_asked != unit.io_mode for r in result.requests):
        return f"requests that were asked other than {unit.io_mode} reads"
    memory = result.memory
    parts = (memory.resident, memory.preload, memory.working, memory.activations)
    return (
        _too_long(result)
        or _too_large("planned bytes", (r.planned_bytes for r in result.requests), _read_cap(context))
        or _too_large("bytes from storage", (r.storage_bytes for r in result.requests), SIZE_CAP_BYTES)
        or _too_large("a memory part", (*parts, memory.process_peak_bytes or 0), SIZE_CAP_BYTES)
        or _sensors(result.before)
        or _sensors(result.after)
        or _readings(result.readings, len(result.requests))
        or next(filter(None, (_request(r, unit.plan.submodel.depth, context) for r in result.requests)), None)
    )


def _request(request: RequestSample, depth: int, context: Context) -> str | None:
    if not all(math.isfinite(value) for value in request.logits):
        return "logits that are not finite numbers"
    if context.labels is not None and len(request.logits) != context.labels:
        return f"{len(request.logits)} logits for {context.labels} labels"
    if request.stall_ns > request.latency_ns:
        return "a stall longer than its request"
    if len(request.trace) not in (0, depth):
        return f"a trace of {len(request.trace)} layers for a plan of {depth}"
    for layer in request.trace:
        if layer.io_start_ns > layer.io_end_ns or layer.compute_start_ns > layer.compute_end_ns:
            return "a trace in which something ends before it starts"
        if max(layer.io_end_ns, layer.compute_end_ns) > request.latency_ns:
            return "a trace that goes on after its request has ended"
    return None


def _evaluate(unit: EvaluateUnit, result: EvaluateResult, context: Context) -> str | None:
    if result.content_digest != unit.plan.content_digest:
        return "an evaluation of other content than asked"
    if result.correct > result.rows:
        return f"{result.correct} correct of {result.rows} rows"
    if not 0 <= result.loss < 1e6:
        return f"a loss of {result.loss}"
    if context.data_rows is not None:
        if result.rows > context.data_rows:
            return f"{result.rows} labelled rows of {context.data_rows}"
        if len(result.predictions) not in (result.rows, context.data_rows):
            return f"{len(result.predictions)} predictions for {result.rows} labelled rows"
    if context.labels is not None and any(p >= context.labels for p in result.predictions):
        return f"a prediction beyond the {context.labels} labels"
    return None


_CHECKS: Mapping[str, Callable[[Any, Any, Context], str | None]] = {
    "probe": _probe,
    "profile-io": _io,
    "profile-compute": _compute,
    "profile-fixed": _fixed,
    "execute": _execute,
    "evaluate": _evaluate,
}
