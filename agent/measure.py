"""What an agent does for each kind of unit: ``run_unit(unit, context)`` gives the unit's result.

Nothing is written, logged or flushed inside a timed region; journalling is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from agent.context import Context
from agent.probe import probe
from agent.profiling import evict_if_buffered, profile_compute, profile_fixed, profile_io
from agent.sensors import read_sensors
from agent.spawning import run_spawned
from sti_runtime.messages import (
    ComputeProfileUnit,
    EvaluateResult,
    EvaluateUnit,
    ExecuteResult,
    ExecuteUnit,
    FixedProfileUnit,
    IoMode,
    IoProfileUnit,
    MemoryParts,
    ProbeUnit,
    RequestSample,
    Sensors,
    Unit,
    UnitResult,
    Verdict,
)
from sti_runtime.metrics import UNKNOWN_LABEL, count_correct, mean_cross_entropy
from sti_runtime.pipeline import RequestOutcome, require_bundle

__all__ = ["Context", "run_unit"]

Proof = Literal["direct", "buffered-cold", "cached", "mixed"]


def run_unit(unit: Unit, context: Context) -> UnitResult:
    """Run one unit to its result; for an execute unit the gate verdicts are the caller's to add.

    Raises: StifarmError naming what cannot be done.
    """
    match unit:
        case ProbeUnit():
            return probe(unit, context)
        case IoProfileUnit():
            return profile_io(unit, context)
        case ComputeProfileUnit():
            return profile_compute(unit, context)
        case FixedProfileUnit():
            return profile_fixed(unit, context)
        case ExecuteUnit():
            return execute(unit, context)
        case EvaluateUnit():
            return evaluate(unit, context)


def execute(unit: ExecuteUnit, context: Context) -> ExecuteResult:
    """Timed requests of one plan, one after the other."""
    before = read_sensors(context.spool)
    spawned = unit.request_kind == "spawn-cold"
    samples, io_mode, memory = (_spawned if spawned else _in_process)(unit, context)
    after = read_sensors(context.spool)
    return ExecuteResult(
        kind="execute",
        plan_digest=unit.plan.digest,
        request_kind=unit.request_kind,
        io_mode=io_mode,
        io_mode_proven=proof(samples, io_mode),
        requests=tuple(_judged(sample, before, after) for sample in samples),
        memory=memory,
        before=before,
        after=after,
        gates=(),
    )


def _in_process(unit: ExecuteUnit, context: Context) -> tuple[list[RequestSample], IoMode, MemoryParts]:
    executor = context.executor
    executor.reset()
    samples = []
    for i, row in enumerate(unit.rows):
        request = context.request(row)
        if unit.request_kind != "cached":
            evict_if_buffered(executor, unit.io_mode)
        outcome = executor.run(unit.plan, request, unit.request_kind, unit.io_mode)
        samples.append(request_sample(row, i < unit.warmups, outcome))
    return samples, executor.storage(unit.io_mode).io_mode, executor.memory()


def _spawned(unit: ExecuteUnit, context: Context) -> tuple[list[RequestSample], IoMode, MemoryParts]:
    replies = [run_spawned(unit, i, context) for i in range(len(unit.rows))]
    peak = {
        part: max(getattr(reply.memory, part) for reply in replies)
        for part in ("resident", "preload", "working", "activations")
    }
    return (
        [reply.sample for reply in replies],
        replies[0].io_mode,
        MemoryParts(**peak, process_peak_bytes=None),
    )


def request_sample(row: int, warmup: bool, outcome: RequestOutcome) -> RequestSample:
    """An outcome as the journal keeps it."""
    return RequestSample(
        row=row,
        warmup=warmup,
        latency_ns=outcome.latency_ns,
        stall_ns=outcome.stall_ns,
        planned_bytes=outcome.planned_bytes,
        storage_bytes=outcome.storage_bytes,
        logits=outcome.logits,
        trace=outcome.trace,
        verdict=outcome.verdict,
    )


def proof(samples: Sequence[RequestSample], io_mode: IoMode) -> Proof:
    """Where the bytes of all requests came from, by the kernel's count."""
    if all(s.storage_bytes >= s.planned_bytes for s in samples):
        return "direct" if io_mode == "direct" else "buffered-cold"
    return "cached" if all(s.storage_bytes == 0 for s in samples) else "mixed"


def _judged(sample: RequestSample, before: Sensors, after: Sensors) -> RequestSample:
    """The sample, invalid if the device was held below its full clock before or after."""
    if not (before.throttled or after.throttled):
        return sample
    verdict = Verdict(valid=False, reasons=(*sample.verdict.reasons, "throttled"))
    return sample.model_copy(update={"verdict": verdict})


def evaluate(unit: EvaluateUnit, context: Context) -> EvaluateResult:
    """Score the plan's weights on all labelled rows. Raises: DatasetError if no row has a label."""
    require_bundle(unit.plan, context.bundle)
    data = context.task_data
    known = data.labels != UNKNOWN_LABEL
    labels = data.labels[known]
    logits = context.engine.evaluate(
        context.bundle,
        unit.plan,
        data.input_ids[known],
        data.token_types[known],
        data.lengths[known],
        unit.batch,
    )
    loss = mean_cross_entropy(logits, labels)
    predictions = logits.argmax(axis=1)
    correct, rows = count_correct(predictions, labels)
    return EvaluateResult(
        kind="evaluate",
        content_digest=unit.plan.content_digest,
        rows=rows,
        correct=correct,
        loss=loss,
        predictions=tuple(predictions.tolist()),
    )
