"""From an accepted execution or evaluation to its rows, with the store's own verdict on every request."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

from sqlalchemy import Row, Select, bindparam, case, select
from sqlalchemy.orm import Session

from db.bulk import Values
from db.documents import document, numbers, storable
from db.events import record_event
from db.measured import RequestFigures, in_brief
from db.models import (
    DeviceFactsRow,
    EvaluationRow,
    JournalRecordRow,
    PlanRow,
    ProbeRow,
)
from db.source import Pending, Source, missing_bundle
from db.upsert import insert_new
from sti_runtime.messages import (
    EvaluateResult,
    ExecuteResult,
    GateVerdict,
    ProvenMode,
    RequestSample,
    Verdict,
)

NOT_FROM_STORAGE = "not-from-storage"
THROTTLED = "throttled"
GATE_FAILED = "gate-failed"


def request_verdict(result: ExecuteResult, request: RequestSample) -> Verdict:
    """A request's verdict as the store sees it: the device's own, and two rules it cannot waive.

    Bytes the kernel read from storage must cover the planned ones (except for ``cached`` requests), and
    no gate may have failed.
    """
    reasons = [storable(reason) for reason in request.verdict.reasons]
    if result.request_kind != "cached" and request.storage_bytes < request.planned_bytes:
        reasons.append(NOT_FROM_STORAGE)
    if any(gate.verdict == "fail" for gate in result.gates):
        reasons.append(GATE_FAILED)
    found = tuple(dict.fromkeys(reasons))
    forced = {NOT_FROM_STORAGE, GATE_FAILED} & set(found)
    return Verdict(valid=request.verdict.valid and not forced, reasons=found)


def mode_proven(claimed: ProvenMode, planned_bytes: int, storage_bytes: int) -> ProvenMode:
    """What is proven of a sample as the store sees it: what the device claims, unless its own count of bytes
    belies it."""
    if claimed not in ("direct", "buffered-cold") or storage_bytes >= planned_bytes:
        return claimed
    return "mixed" if storage_bytes else "cached"


def worst_gate(gates: Sequence[GateVerdict]) -> str:
    """The worst verdict: fail, then ungated, then pass (also when no gate was asked)."""
    given = {gate.verdict for gate in gates}
    return next((verdict for verdict in ("fail", "ungated") if verdict in given), "pass")


def write_run(
    session: Session, source: Source, unit: int, result: ExecuteResult, pending: Pending
) -> str | None:
    """Keep a run with its provenance and requests; why it could not be kept, else None."""
    job = source.job
    data, plan = source.data, None
    if data is not None:
        asked = {"device": source.device_id, "digest": result.plan_digest, "task": data.task}
        plan = session.execute(_plan_of(), asked).one_or_none()
    if data is None or plan is None:
        return "the store knows neither its plan nor its task data"
    facts = _facts(session, source)
    emulation = job.emulation
    run: dict[str, object] = {
        "journal_id": source.journal_id,
        "device_id": source.device_id,
        "job_id": job.id,
        "attempt": source.attempt.number,
        "unit": unit,
        "plan_id": plan.id,
        "plan_digest": plan.digest,
        "bundle_digest": plan.bundle_digest,
        "task_data_digest": data.digest,
        "request_kind": result.request_kind,
        "io_mode": result.io_mode,
        "io_mode_proven": result.io_mode_proven,
        "engine": job.engine,
        "threads": job.threads,
        "queue_depth": job.queue_depth,
        "agent": source.attempt.agent,
        "agent_digest": source.attempt.agent_digest,
        "facts_id": None if facts is None else facts.id,
        "os_build": None if facts is None else facts.os_build,
        "kernel": None if facts is None else facts.kernel,
        "boot_id": storable(source.record.boot_id),
        "wall_ns": source.record.wall_ns,
        "cpu_khz_before_json": document(list(result.before.cpu_khz)),
        "cpu_khz_after_json": document(list(result.after.cpu_khz)),
        "temperature_before_milli_c": result.before.temperature_milli_c,
        "temperature_after_milli_c": result.after.temperature_milli_c,
        "battery_before_percent": result.before.battery_percent,
        "battery_after_percent": result.after.battery_percent,
        "load_before_milli": result.before.load_milli,
        "load_after_milli": result.after.load_milli,
        "gate_verdict": worst_gate(result.gates),
        "gates_json": document([gate.model_dump(mode="json") for gate in result.gates]),
        "readings_json": document([reading.model_dump(mode="json") for reading in result.readings]),
        "emulated": source.emulated,
        "io_mechanism": None if emulation is None else emulation.io_mechanism,
        "cpu_mechanism": None if emulation is None else emulation.cpu_mechanism,
        "emulation_json": None if emulation is None else document(emulation),
        "verified_json": _verified(session, source),
        "resident_bytes": result.memory.resident,
        "preload_bytes": result.memory.preload,
        "working_bytes": result.memory.working,
        "activations_bytes": result.memory.activations,
        "process_peak_bytes": result.memory.process_peak_bytes,
    }
    figures = request_figures(result)
    run["measured_json"] = in_brief(figures)
    requests = zip(result.requests, figures, strict=True)
    pending.add_run(run, [_request_row(source, i, *each) for i, each in enumerate(requests)])
    return None


def request_figures(result: ExecuteResult) -> list[RequestFigures]:
    """Each request as the store sees it."""
    return [
        RequestFigures(
            warmup=each.warmup,
            valid=verdict.valid,
            latency_ns=each.latency_ns,
            stall_ns=each.stall_ns,
            storage_bytes=each.storage_bytes,
            planned_bytes=each.planned_bytes,
            mode_asked=each.mode_asked,
            mode_proven=mode_proven(each.mode_proven, each.planned_bytes, each.storage_bytes),
            reasons=verdict.reasons,
        )
        for each in result.requests
        for verdict in [request_verdict(result, each)]
    ]


@lru_cache(maxsize=64)
def _reasons(*reasons: str) -> str:
    return document(list(reasons))


def _request_row(source: Source, ordinal: int, request: RequestSample, figures: RequestFigures) -> Values:
    """A request as ``db.source.REQUESTS`` has it but for the run's id."""
    return (
        ordinal,
        request.row,
        figures.warmup,
        figures.valid,
        _reasons(*figures.reasons),
        source.emulated,
        figures.latency_ns,
        figures.stall_ns,
        figures.planned_bytes,
        figures.storage_bytes,
        figures.mode_asked,
        figures.mode_proven,
        numbers(request.logits),
        numbers([vars(layer) for layer in request.trace]),
    )


def write_evaluation(
    session: Session, source: Source, _: int, result: EvaluateResult, __: Pending
) -> str | None:
    """Keep an evaluation unless its content has one; a disagreement becomes an event."""
    job = source.job
    data = source.data
    if data is None:
        return "the store does not know its task data"
    missing = missing_bundle(source)
    if missing is not None:
        return missing
    values = {
        "journal_id": source.journal_id,
        "device_id": source.device_id,
        "content_digest": result.content_digest,
        "task_data_digest": data.digest,
        "bundle_digest": job.bundle,
        "engine": job.engine,
        "agent_digest": source.attempt.agent_digest,
        "emulated": source.emulated,
        "rows": result.rows,
        "correct": result.correct,
        "loss_nano": round(result.loss * 1e9),
        "predictions_json": document(list(result.predictions)),
        "wall_ns": source.record.wall_ns,
    }
    table = EvaluationRow
    if insert_new(session, table, values, table.id) is not None:
        return None
    first = session.scalars(
        select(table).where(
            table.content_digest == result.content_digest,
            table.task_data_digest == data.digest,
            table.engine == job.engine,
        )
    ).one()
    if first.correct != result.correct:
        record_event(
            session,
            "warning",
            "evaluation-disagrees",
            f"Content {result.content_digest[:12]} has {result.correct} of {result.rows} rows correct in job "
            f"{job.id}, but {first.correct} on device {first.device_id} before; the first figure was kept.",
            device_id=source.device_id,
            job_id=job.id,
        )
    return None


def _facts(session: Session, source: Source) -> Row[Any] | None:
    """What provenance takes of the device's facts in the boot that the record is from, else of the newest."""
    asked = {"device": source.device_id, "boot": storable(source.record.boot_id)}
    return session.execute(_facts_of(), asked).one_or_none()


@cache
def _facts_of() -> Select[*tuple[Any, ...]]:
    table = DeviceFactsRow
    of_device = select(table.id, table.os_build, table.kernel).where(table.device_id == bindparam("device"))
    same_boot = case((table.boot_id == bindparam("boot"), 1), else_=0)
    return of_device.order_by(same_boot.desc(), table.id.desc()).limit(1)


@cache
def _plan_of() -> Select[*tuple[Any, ...]]:
    table = PlanRow
    return select(table.id, table.digest, table.bundle_digest).where(
        table.device_id == bindparam("device"),
        table.digest == bindparam("digest"),
        table.task == bindparam("task"),
    )


def _verified(session: Session, source: Source) -> str | None:
    """What the last probe of an emulated device measured: in this attempt, else in any job."""
    if not source.emulated:
        return None
    query = (
        select(ProbeRow.verified_json)
        .join(JournalRecordRow, JournalRecordRow.id == ProbeRow.journal_id)
        .where(ProbeRow.device_id == source.device_id, ProbeRow.verified_json.is_not(None))
    )
    here = query.where(
        JournalRecordRow.job_id == source.job.id,
        JournalRecordRow.attempt == source.attempt.number,
        JournalRecordRow.seq < source.record.seq,
    )
    for candidates in (here, query):
        found = session.scalars(candidates.order_by(ProbeRow.id.desc()).limit(1)).one_or_none()
        if found is not None:
            return found
    return None
