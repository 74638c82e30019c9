"""The store under load: raw samples taken in, and plans asked for among millions of them.

    python -m bench.store [--rounds 9] [--samples 1000000] [--only sqlite] [--queries 1000] [--seed 1]

Ingestion: journals of one IO profile unit, one compute unit and one execution (BERT-base's shape: 144
shards, 12 layers traced) through ``db.ingest``, of one device in each transaction and of eight together.
Queries: ``db.plan_answers.latest_plans`` for one device, task, T and |S| at random, then the answer's JSON as
``stifarm plans query --json`` prints it, in a store filled by SQL (references are not checked, or it would
take an hour) with so many samples of 100 devices, each with 20 plans of 30 runs. PostgreSQL is a private
server with fsync off, SQLite a file with synchronous=FULL; rounds and queries of both take turns.
``--samples 10000000`` takes some minutes and 12 GB of disk.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import time
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field, replace
from itertools import count

from bench.figures import figure
from bench.planner import make_setting
from bench.store_world import (
    JOBS,
    KINDS,
    LAYERS,
    MS,
    READS,
    REQUESTS,
    Filled,
    fill,
    job_of,
    prepare,
    records_of,
    store_of,
)
from db.errors import StoreError
from db.ingest import Batch, ingest_all
from db.jobs import begin_attempt, create_job
from db.plan_answers import latest_plans
from db.session import Store
from db.statistics import percentile
from orchestrator.cli.output import emit_json
from orchestrator.report import plan_json
from tests.contract import store_world as world

REACH_PER_S, REACH_NS = 20_000, 10 * MS
WARMUPS = 50


@dataclass
class Rates:
    """Samples a second, and a second of this process's CPU, in each round."""

    wall: list[int] = field(default_factory=list)
    cpu: list[int] = field(default_factory=list)


def take_in(store: Store, filled: Filled, turn: int, together: int, rates: Rates) -> None:
    """One round: a journal of each of ``JOBS`` devices, so many of them in each transaction."""
    work = []
    with store.session() as session:
        for device in range(1, JOBS + 1):
            job = job_of(filled, device, turn)
            create_job(session, job, key=job.id, kind="bench", device_id=device)
            begin_attempt(session, job.id, lease_counter=turn + 1)
            work.append(Batch(device, job.id, 1, records_of(job, filled.plans[turn % len(filled.plans)])))
    samples = JOBS * (READS + 2 * LAYERS + REQUESTS)
    began, cpu_began = time.perf_counter(), time.process_time()
    for first in range(0, JOBS, together):
        batches = work[first : first + together]
        with store.session() as session:
            reports = ingest_all(session, batches)
        for batch, report in zip(batches, reports, strict=True):
            if isinstance(report, StoreError):
                raise report
            if report.rejected or report.inserted != len(batch.records):
                raise SystemExit(f"not all was taken in: {report}")
    rates.wall.append(round(samples / (time.perf_counter() - began)))
    rates.cpu.append(round(samples / (time.process_time() - cpu_began)))


# ------------------------------------------------------------------ asking


@dataclass
class Times:
    """Of each query, in ns: how long it took, this process's CPU in it, and how long its JSON took."""

    wall: list[int] = field(default_factory=list)
    cpu: list[int] = field(default_factory=list)
    json: list[int] = field(default_factory=list)


def ask(store: Store, filled: Filled, chance: random.Random, times: Times) -> None:
    """One query at random."""
    device, plan = chance.choice(filled.devices), chance.choice(filled.plans)
    began, cpu_began = time.perf_counter_ns(), time.process_time_ns()
    with store.reader(quick=True) as session:
        answers = latest_plans(
            session,
            device=device,
            task=world.TASK,
            target_ns=plan.target_ns,
            preload_bytes=plan.preload_bytes,
        )
    times.wall.append(time.perf_counter_ns() - began)
    times.cpu.append(time.process_time_ns() - cpu_began)
    if len(answers) != 1:
        raise SystemExit(f"{len(answers)} answers for {device}")
    began = time.perf_counter_ns()
    with redirect_stdout(io.StringIO()):
        emit_json([plan_json(answer) for answer in answers])
    times.json.append(time.perf_counter_ns() - began)


def measure_ingestion(stores: Mapping[str, Store], filled: Mapping[str, Filled], rounds: int) -> None:
    """Print rates; the first round of each way warms up."""
    ways = [(kind, together) for kind in stores for together in (1, JOBS)]
    rates = {way: Rates() for way in ways}
    turns = count()
    for number in range(rounds + 1):
        for kind, together in ways:
            into = rates[kind, together] if number else Rates()
            take_in(stores[kind], filled[kind], next(turns), together, into)
    for (kind, together), found in rates.items():
        print(
            f"{kind}, {together} in a transaction: {figure(found.wall).text(digits=0)} samples/s taken in"
            f" (reach {REACH_PER_S}), {figure(found.cpu).text(digits=0)} per s of CPU in this process",
            flush=True,
        )


def measure_queries(
    stores: Mapping[str, Store], filled: Mapping[str, Filled], queries: int, seed: int
) -> None:
    """Print how long queries take; the first ones open connections and fill caches."""
    times = {kind: Times() for kind in stores}
    chances = {kind: random.Random(seed) for kind in stores}
    for number in range(queries + WARMUPS):
        for kind, store in stores.items():
            into = times[kind] if number >= WARMUPS else Times()
            ask(store, filled[kind], chances[kind], into)
    for kind, found in times.items():
        p99 = percentile(found.wall, 99)
        print(
            f"{kind}: plan query median {figure(found.wall).text(MS, 2)} ms, p99 {p99 / MS:.2f} ms"
            f" (reach {REACH_NS / MS:.0f} ms: {'yes' if p99 <= REACH_NS else 'no'}; seed {seed});"
            f" CPU in this process {figure(found.cpu).text(MS, 2)} ms,"
            f" p99 {percentile(found.cpu, 99) / MS:.2f} ms;"
            f" its JSON {figure(found.json).text(MS, 2)} ms, p99 {percentile(found.json, 99) / MS:.2f} ms",
            flush=True,
        )


def main() -> None:
    """Print the figures of both kinds of store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    made = make_setting(trained=True)
    setting = replace(made, profile=made.profile.model_copy(update={"engine": "native"}))
    with ExitStack() as stack:
        kinds = [kind for kind in KINDS if asked.only in (None, kind)]
        stores = {kind: stack.enter_context(store_of(kind)) for kind in kinds}
        filled = {kind: prepare(store, setting) for kind, store in stores.items()}
        measure_ingestion(stores, filled, asked.rounds)
        for kind, store in stores.items():
            began = time.perf_counter()
            samples = fill(store, filled[kind], asked.samples)
            took_s = time.perf_counter() - began
            print(f"{kind}: {samples} samples in the store, filled in {took_s:.0f} s", flush=True)
        os.sync()  # else what was filled is still being written beside the queries
        measure_queries(stores, filled, asked.queries, asked.seed)


if __name__ == "__main__":
    main()
