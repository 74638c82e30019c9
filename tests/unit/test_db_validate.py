"""What a device may claim, and what it may not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from db.validate import DAY_NS, Context, why_rejected
from sti_runtime.messages import (
    FailureRecord,
    GateVerdict,
    JournalRecord,
    MemoryParts,
    Payload,
    Reading,
    RequestSample,
    ResultRecord,
)
from tests.contract import store_world as world

PLAN = world.plan(world.manifest().digest, "c" * 64)
JOB = world.job(world.manifest().digest, PLAN)
CONTEXT = Context(
    job=JOB,
    attempt=1,
    bundle_bytes=4 * 4096,
    heads=2,
    labels=2,
    data_rows=world.DATA_ROWS,
    sequence_length=world.LENGTH,
)


def record(payload: Payload) -> JournalRecord:
    return JournalRecord(seq=1, boot_id="b", wall_ns=world.WALL_NS, payload=payload)


def result(unit: int, **changes: Any) -> JournalRecord:
    made = world.results(PLAN)[unit].model_copy(update=changes)
    return record(ResultRecord(type="result", unit=unit, result=made))


def executed(**changes: Any) -> JournalRecord:
    """The execution with request 5 changed."""
    requests = [world.request(i, warmup=i < 2) for i in range(12)]
    requests[5] = requests[5].model_copy(update=changes)
    return result(4, requests=tuple(requests))


def samples_of(unit: int, **changes: Any) -> JournalRecord:
    """A profile whose last sample is changed."""
    samples = getattr(world.results(PLAN)[unit], "samples")  # noqa: B009
    return result(unit, samples=(*samples[:-1], samples[-1].model_copy(update=changes)))


def reading(**changes: Any) -> Reading:
    return world.READING.model_copy(update=changes)


def trace_of(**changes: Any) -> tuple[Any, ...]:
    return (world.request(5).trace[0].model_copy(update=changes),)


def test_a_believable_journal_is_believed() -> None:
    for line in world.journal(JOB, PLAN):
        assert why_rejected(line, replace(CONTEXT, previous_wall_ns=line.wall_ns - world.STEP_NS)) is None


def test_what_is_not_known_is_not_checked() -> None:
    blind = Context(JOB, 1, None, None, None, None, None)
    assert all(why_rejected(line, blind) is None for line in world.journal(JOB, PLAN))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (executed(logits=(float("inf"), 0.0)), "not finite"),
        (executed(logits=(1.0, 2.0, 3.0)), "3 logits for 2 labels"),
        (executed(latency_ns=DAY_NS + 1), "a duration of"),
        (executed(stall_ns=10**9), "a stall longer"),
        (executed(planned_bytes=10**9), "planned bytes of 1 GB"),
        (executed(storage_bytes=2**41), "bytes from storage"),
        (executed(row=7), "not of the rows asked"),
        (executed(warmup=True), "warm-ups are not the first 2"),
        (executed(trace=trace_of() * 2), "a trace of 2 layers"),
        (executed(trace=trace_of(io_start_ns=2000)), "ends before it starts"),
        (executed(trace=trace_of(compute_end_ns=10**9)), "after its request has ended"),
        (executed(mode_asked="buffered"), "asked other than direct reads"),
        (result(4, readings=(reading(after=13),)), "beyond the 12 samples"),
        (result(1, readings=(reading(after=2), reading(after=1))), "out of order"),
        (result(2, readings=(reading(after=4),)), "beyond the 3 samples"),
        (result(3, readings=(reading(temperature_milli_c=10**7),)), "temperature_milli_c of 10000000"),
        (result(4, readings=(reading(load_milli=-1),)), "load_milli of -1"),
        (result(4, readings=(reading(available_memory_bytes=-1),)), "available_memory_bytes of -1"),
        (result(4, requests=()), "not of the rows asked"),
        (result(4, plan_digest="0" * 64), "executed plan 000000000000"),
        (result(4, request_kind="cold"), "cold requests where warm"),
        (
            result(
                4,
                memory=MemoryParts(
                    resident=2**41, preload=0, working=0, activations=0, process_peak_bytes=None
                ),
            ),
            "a memory part",
        ),
        (
            result(4, after=world.SENSORS.model_copy(update={"temperature_milli_c": 10**7})),
            "temperature_milli_c of 10000000",
        ),
        (result(5, correct=41), "41 correct of 40"),
        (result(5, loss=float("nan")), "a loss of nan"),
        (result(5, loss=-1.0), "a loss of -1.0"),
        (result(5, rows=41, correct=1), "41 labelled rows of 40"),
        (result(5, predictions=(1,)), "1 predictions for 40"),
        (result(5, predictions=(2,) * 40), "beyond the 2 labels"),
        (result(5, content_digest="0" * 64), "other content"),
        (result(1, samples=()), "no samples"),
        (result(2, samples=()), "no samples"),
        (result(3, samples=()), "no samples"),
        (samples_of(1, versions=3), "more than 2 versions"),
        (samples_of(1, bytes=10**9), "a read of 1 GB"),
        (samples_of(1, duration_ns=2 * DAY_NS), "a duration of"),
        (samples_of(2, width=1), "not asked"),
        (samples_of(2, fidelity=6), "not asked"),
        (samples_of(3, bytes=10**9), "a read of 1 GB"),
        (samples_of(3, head_ns=2 * DAY_NS), "a duration of"),
        (
            result(0, sensors=world.SENSORS.model_copy(update={"battery_percent": 101})),
            "battery_percent of 101",
        ),
        (
            record(ResultRecord(type="result", unit=6, result=world.results(PLAN)[0])),
            "unit 6 is not in the job",
        ),
        (
            record(ResultRecord(type="result", unit=1, result=world.results(PLAN)[0])),
            "unit 1 is of kind profile-io",
        ),
        (
            record(FailureRecord(type="failure", unit=9, error="E", what="", remedy="")),
            "unit 9 is not in the job",
        ),
        (
            record(world.start_record(JOB.model_copy(update={"id": "other"}))),
            "start record of job other",
        ),
        (record(world.start_record(JOB).model_copy(update={"first_unit": 7})), "starts at unit 7"),
    ],
)
def test_what_cannot_be_true_is_rejected(line: JournalRecord, reason: str) -> None:
    why = why_rejected(line, CONTEXT)
    assert why is not None
    assert reason in why


def test_durations_must_fit_the_wall_clock() -> None:
    slow: tuple[RequestSample, ...] = tuple(
        world.request(i, warmup=i < 2, latency_ns=10**9) for i in range(12)
    )
    line = result(4, requests=slow)

    def within(span_ns: int) -> str | None:
        return why_rejected(line, replace(CONTEXT, previous_wall_ns=line.wall_ns - span_ns))

    assert within(13 * 10**9) is None
    assert within(10**9) == "measured 12 s within 1 s of wall time"
    assert within(-(10**9)) is None, "the clock was set back: nothing can be concluded"


def test_a_failed_gate_explains_missing_requests() -> None:
    gates = (GateVerdict(gate="load", verdict="fail", detail=""),)
    assert why_rejected(result(4, requests=(), readings=(), gates=gates), CONTEXT) is None
