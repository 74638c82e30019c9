"""What an agent does for each kind of unit: ``run_unit(unit, context)`` gives the unit's result.

Nothing is written, logged or flushed inside a timed region; journalling is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence

from agent.context import Context
from agent.probe import probe
from agent.profiling import evict_if_buffered, profile_compute, profile_fixed, profile_io, proven_mode
from agent.sensors import read_sensors
from agent.spawning import run_spawned
from agent.watch import Watch
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
    ProvenMode,
    RequestSample,
    Unit,
    UnitResult,
    Verdict,
)
from sti_runtime.metrics import UNKNOWN_LABEL, count_correct, mean_cross_entropy
from sti_runtime.pipeline import RequestOutcome, require_bundle

__all__ = ["Context", "run_unit"]


def run_unit(unit: Unit, context: Context) -> UnitResult:
    """Run one unit to its result; for an execute unit the gate verdicts are the caller's to add.

    Raises: StifarmError naming what cannot be done.
    """
    if isinstance(unit, ProbeUnit):
        return probe(unit, context)
    from sti_runtime.torch_engine import gpu_memory_errors

    with gpu_memory_errors():
        return _run(unit, context)


def _run(
    unit: IoProfileUnit | ComputeProfileUnit | FixedProfileUnit | ExecuteUnit | EvaluateUnit, context: Context
) -> UnitResult:
    match unit:
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
    watch = Watch.of_job(context.job)
    spawned = unit.request_kind == "spawn-cold"
    samples, io_mode, memory = (_spawned if spawned else _in_process)(unit, context, watch)
    after = read_sensors(context.spool)
    return ExecuteResult(
        kind="execute",
        plan_digest=unit.plan.digest,
        request_kind=unit.request_kind,
        io_mode=io_mode,
        io_mode_proven=proof(samples),
        readings=watch.readings,
        requests=tuple(samples),
        memory=memory,
        before=before,
        after=after,
        gates=(),
    )


def _in_process(
    unit: ExecuteUnit, context: Context, watch: Watch
) -> tuple[list[RequestSample], IoMode, MemoryParts]:
    executor = context.executor
    executor.reset()
    samples: list[RequestSample] = []
    for i, row in enumerate(unit.rows):
        request = context.request(row)
        if unit.request_kind != "cached":
            evict_if_buffered(executor, unit.io_mode)
        outcome = executor.run(unit.plan, request, unit.request_kind, unit.io_mode)
        sample = request_sample(row, i < unit.warmups, unit.io_mode, outcome)
        samples.append(_judged(sample, watch.sampled(i + 1)))
    return samples, executor.storage(unit.io_mode).io_mode, executor.memory()


def _spawned(
    unit: ExecuteUnit, context: Context, watch: Watch
) -> tuple[list[RequestSample], IoMode, MemoryParts]:
    samples: list[RequestSample] = []
    replies = []
    for i in range(len(unit.rows)):
        reply = run_spawned(unit, i, context)
        samples.append(_judged(reply.sample, watch.sampled(i + 1)))
        replies.append(reply)
    peak = {
        part: max(getattr(reply.memory, part) for reply in replies)
        for part in ("resident", "preload", "working", "activations")
    }
    return samples, replies[0].io_mode, MemoryParts(**peak, process_peak_bytes=None)


def request_sample(row: int, warmup: bool, mode_asked: IoMode, outcome: RequestOutcome) -> RequestSample:
    """An outcome as the journal keeps it."""
    counted = "io-not-accounted" not in outcome.verdict.reasons
    return RequestSample(
        row=row,
        warmup=warmup,
        latency_ns=outcome.latency_ns,
        stall_ns=outcome.stall_ns,
        planned_bytes=outcome.planned_bytes,
        storage_bytes=outcome.storage_bytes,
        mode_asked=mode_asked,
        mode_proven=proven_mode(
            outcome.planned_bytes, outcome.storage_bytes if counted else None, outcome.io_mode
        ),
        logits=outcome.logits,
        trace=outcome.trace,
        verdict=outcome.verdict,
    )


def proof(samples: Sequence[RequestSample]) -> ProvenMode:
    """What is proven of all requests together: what is proven of each, or "mixed"."""
    proven = {sample.mode_proven for sample in samples}
    return proven.pop() if len(proven) == 1 else "mixed"


def _judged(sample: RequestSample, throttled: bool) -> RequestSample:
    """The sample, invalid if the readings around it show the device throttled."""
    if not throttled:
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
