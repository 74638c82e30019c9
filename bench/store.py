"""The store under load: raw samples taken in, and plans asked for among millions of them.

    python -m bench.store [--rounds 9] [--samples 1000000] [--only sqlite] [--queries 1000] [--seed 1]

Ingestion: batches of journal records of one IO profile unit, one compute unit and one execution (BERT-base's
shape: 144 shards, 12 layers traced) through ``db.ingest``, one transaction a batch, as a controller does.
Queries: ``db.plans.latest_plans`` for one device, task, T and |S| at random, in a store filled by SQL with so
many samples of 100 devices, each with 20 plans of 30 runs. PostgreSQL is a private server with fsync off,
SQLite a file with synchronous=FULL. ``--samples 10000000`` takes some minutes and 6 GB of disk.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import Connection, text

from bench.figures import figure
from bench.planner import Setting, make_setting
from db.artifacts import save_bundle, save_model, save_task, save_task_data
from db.devices import record_facts, register_device
from db.ingest import ingest
from db.jobs import begin_attempt, create_job
from db.plans import latest_plans, save_plan
from db.profiles import save_device_profile
from db.session import Store, open_store, sqlite_url, upgrade
from db.statistics import percentile
from sti_runtime.messages import (
    ComputeProfileResult,
    ComputeProfileUnit,
    ExecuteUnit,
    IoProfileResult,
    IoProfileUnit,
    Job,
    JournalRecord,
    ResultRecord,
    StartRecord,
    UnitResult,
)
from sti_runtime.plan import Plan
from sti_runtime.planner import plan_paper
from tests.contract import store_world as world
from tests.contract.postgres_server import private_server, server_binaries, unprivileged_user

MS = 1_000_000
READS, LAYERS, REQUESTS = 400, 200, 32
DEVICES, RUNS = 100, 30
TARGETS_NS = tuple(t * MS for t in (200, 300, 400, 600, 1000))
PRELOADS_BYTES = (0, 1_000_000, 2_000_000, 5_000_000)
REACH_PER_S, REACH_NS = 20_000, 10 * MS


@dataclass(frozen=True)
class Filled:
    """What is in the store: the devices' names, and the plan of every question."""

    devices: tuple[str, ...]
    plans: tuple[Plan, ...]
    bundle: str


@contextmanager
def store_of(kind: str) -> Iterator[Store]:
    """An empty store."""
    with tempfile.TemporaryDirectory(prefix="bench-store-") as folder:
        if kind == "sqlite":
            with open_store(sqlite_url(Path(folder) / "store.sqlite")) as store:
                yield store
            return
        binaries, user = server_binaries(), unprivileged_user()
        if binaries is None or user is None:
            raise SystemExit("needs PostgreSQL's binaries and an account to run them as")
        with private_server(binaries, user) as template:
            url = template.format(database="postgres")
            upgrade(url)
            with open_store(url) as store:
                yield store


def prepare(store: Store, setting: Setting) -> Filled:
    """Devices with a profile and plans; nothing measured yet."""
    with store.session() as session:
        spec, digest = world.Spec(name="x"), setting.manifest.digest
        save_model(
            session,
            digest=setting.manifest.model_digest,
            name="base",
            source="bench",
            config=setting.manifest.model,
            untrained=False,
            info=spec,
        )
        save_task(session, spec, name=world.TASK)
        save_task_data(
            session, digest=world.DATA, task=world.TASK, split="dev", rows=1000, sequence_length=128
        )
        save_bundle(session, setting.manifest, name="base")
        plans = tuple(
            plan_paper(
                setting.manifest,
                setting.importance,
                setting.profile,
                target_ns=target_ns,
                preload_bytes=preload_bytes,
                working_bytes=4_000_000,
            )
            for target_ns in TARGETS_NS
            for preload_bytes in PRELOADS_BYTES
        )
        names = tuple(f"phone-{number:03d}" for number in range(DEVICES))
        for number, name in enumerate(names):
            device = register_device(
                session,
                identity=f"{number:016x}",
                name=name,
                transport="adb",
                engine="native",
                emulated=False,
                labels={"kind": "phone"},
            )
            record_facts(session, device.id, {"cpu": "x"}, boot_id="b", os_build="os", kernel="6.1")
            save_device_profile(session, setting.profile, device_id=device.id)
            for plan in plans:
                save_plan(session, plan, device_id=device.id, task=world.TASK)
    return Filled(names, plans, digest)


# ------------------------------------------------------------------ taking in


def job_of(filled: Filled, device: int, number: int) -> Job:
    """A job of three units on a device."""
    plan = filled.plans[number % len(filled.plans)]
    small = world.job(filled.bundle, plan, job_id=f"job-{device}-{number}", identity=f"{device:016x}")
    widths = tuple(range(1, 13))
    units = (
        IoProfileUnit(number=0, kind="profile-io", widths=widths, fidelities=(2, 32), repeats=3, seed=0),
        ComputeProfileUnit(
            number=1, kind="profile-compute", width=12, fidelities=(2,), warmups=0, repeats=LAYERS
        ),
        ExecuteUnit(
            number=2,
            kind="execute",
            plan=plan,
            request_kind="warm",
            io_mode="direct",
            warmups=2,
            rows=tuple(range(REQUESTS)),
        ),
    )
    return small.model_copy(update={"units": units, "engine": "native"})


def records_of(job: Job, plan: Plan) -> list[JournalRecord]:
    """The journal of such a job but for its end: READS + LAYERS · 2 + REQUESTS samples."""
    _, io, compute, _, _, _ = world.results(plan)
    assert isinstance(io, IoProfileResult)
    assert isinstance(compute, ComputeProfileResult)
    read, layer = io.samples[0], compute.samples[1].model_copy(update={"width": 12})
    request = world.request(0)
    trace = request.trace * plan.submodel.depth
    requests = tuple(
        request.model_copy(update={"row": row, "warmup": row < 2, "trace": trace}) for row in range(REQUESTS)
    )
    results: tuple[UnitResult, ...] = (
        io.model_copy(update={"samples": (read,) * READS}),
        compute.model_copy(update={"samples": (layer,) * LAYERS, "reads": (read,) * LAYERS}),
        world.execute_result(plan, requests),
    )
    start: StartRecord = world.start_record(job)
    return world.numbered(
        [start, *(ResultRecord(type="result", unit=unit, result=found) for unit, found in enumerate(results))]
    )


def taken_in_per_s(store: Store, filled: Filled, rounds: int, jobs: int = 8) -> tuple[list[int], list[int]]:
    """Samples a second, and a second of this process's CPU, in each round of so many jobs, of different
    devices in turn."""
    rates, by_cpu = [], []
    for turn in range(rounds):
        work = []
        with store.session() as session:
            for device in range(1, jobs + 1):
                job = job_of(filled, device, turn)
                create_job(session, job, key=job.id, kind="bench", device_id=device)
                begin_attempt(session, job.id, lease_counter=turn + 1)
                work.append((device, job, records_of(job, filled.plans[turn % len(filled.plans)])))
        samples = jobs * (READS + 2 * LAYERS + REQUESTS)
        began, cpu_began = time.perf_counter(), time.process_time()
        for device, job, records in work:
            with store.session() as session:
                report = ingest(session, device_id=device, job_id=job.id, attempt=1, records=records)
            if report.rejected or report.inserted != len(records):
                raise SystemExit(f"not all was taken in: {report}")
        rates.append(round(samples / (time.perf_counter() - began)))
        by_cpu.append(round(samples / (time.process_time() - cpu_began)))
    return rates, by_cpu


# ------------------------------------------------------------------ filling


_SERIES = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {last}) ",
    "postgresql": "WITH n(i) AS (SELECT generate_series(0, {last})) ",
}


def fill(store: Store, filled: Filled, samples: int) -> int:
    """Runs of every plan on every device and IO samples for the rest, copied in SQL from one job's; how many
    samples there are then."""
    job = job_of(filled, 1, 10**6)
    with store.session() as session:
        create_job(session, job, key=job.id, kind="bench", device_id=1)
        begin_attempt(session, job.id, lease_counter=10**6)
        plan = filled.plans[10**6 % len(filled.plans)]
        ingest(session, device_id=1, job_id=job.id, attempt=1, records=records_of(job, plan))
    runs = DEVICES * len(filled.plans) * RUNS
    runs = min(runs, samples // 2 // REQUESTS)
    with store.reader() as session:
        of_job = text("SELECT unit, id FROM journal_records WHERE job_id = :job AND unit IS NOT NULL")
        records = {row.unit: row.id for row in session.execute(of_job, {"job": job.id})}
    with store.engine.begin() as connection:
        _copy_runs(connection, records[2], runs, len(filled.plans))
        reads = max(0, samples - runs * REQUESTS)
        _copy_reads(connection, records[0], -(-reads // READS))
        connection.execute(text("ANALYZE"))
    with store.reader() as session:
        tables = ("io_samples", "compute_samples", "requests")
        return sum(session.execute(text(f"SELECT count(*) FROM {name}")).scalar_one() for name in tables)


def _series(connection: Connection, count: int) -> str:
    return _SERIES[connection.dialect.name].format(last=count - 1)


def _copy(connection: Connection, count: int, table: str, source: str, **values: str) -> None:
    """Insert ``source`` (a FROM clause of ``table`` s and series n) with some columns replaced."""
    columns = [
        row[0]
        for row in connection.execute(
            text(
                "SELECT name FROM pragma_table_info(:table)"
                if connection.dialect.name == "sqlite"
                else "SELECT column_name FROM information_schema.columns WHERE table_name = :table"
            ),
            {"table": table},
        )
        if row[0] != "id" or "id" in values
    ]
    chosen = ", ".join(values.get(column, f"s.{column}") for column in columns)
    with_n = _series(connection, count)
    into = f"INSERT INTO {table} ({', '.join(columns)}) "
    query = f"SELECT {chosen} FROM {source}"
    statement = f"{with_n}{into}{query}" if connection.dialect.name == "sqlite" else f"{into}{with_n}{query}"
    connection.execute(text(statement))


BASE = 1_000_000_000
"""Ids of copied rows begin here."""


def _copy_runs(connection: Connection, source: int, runs: int, plans: int) -> None:
    device = f"1 + (n.i / {plans}) % {DEVICES}"
    _copy(
        connection, runs, "journal_records", f"journal_records s, n WHERE s.id = {source}",
        id=f"{BASE} + n.i", seq=f"{BASE} + n.i", device_id=device, record_json="'{}'",
    )  # fmt: skip
    _copy(
        connection, runs, "runs", f"runs s, n WHERE s.journal_id = {source}",
        id=f"{BASE} + n.i", journal_id=f"{BASE} + n.i", device_id=device, unit="100 + n.i",
        plan_id=f"1 + n.i % {plans * DEVICES}",
    )  # fmt: skip
    _copy(
        connection, runs, "requests",
        f"requests s, n WHERE s.run_id = (SELECT u.id FROM runs u WHERE u.journal_id = {source})",
        run_id=f"{BASE} + n.i", latency_ns="s.latency_ns + (n.i * 7919) % 500000",
    )  # fmt: skip


def _copy_reads(connection: Connection, source: int, records: int) -> None:
    first = 2 * BASE
    _copy(
        connection, records, "journal_records", f"journal_records s, n WHERE s.id = {source}",
        id=f"{first} + n.i", seq=f"{first} + n.i", device_id=f"1 + n.i % {DEVICES}", record_json="'{}'",
    )  # fmt: skip
    _copy(
        connection, records, "io_samples", f"io_samples s, n WHERE s.journal_id = {source}",
        journal_id=f"{first} + n.i", device_id=f"1 + n.i % {DEVICES}",
        duration_ns="s.duration_ns + (n.i * 7919) % 50000",
    )  # fmt: skip


# ------------------------------------------------------------------ asking


def ask(store: Store, filled: Filled, queries: int, seed: int) -> tuple[list[int], list[int]]:
    """How long each of so many random plan queries takes, and its CPU time in this process, in ns."""
    chance = random.Random(seed)
    took, cpu = [], []
    for turn in range(queries + 20):
        device, plan = chance.choice(filled.devices), chance.choice(filled.plans)
        began, cpu_began = time.perf_counter_ns(), time.process_time_ns()
        with store.reader() as session:
            answers = latest_plans(
                session,
                device=device,
                task=world.TASK,
                target_ns=plan.target_ns,
                preload_bytes=plan.preload_bytes,
            )
        if turn >= 20:  # the first open connections and fill caches
            took.append(time.perf_counter_ns() - began)
            cpu.append(time.process_time_ns() - cpu_began)
        if len(answers) != 1:
            raise SystemExit(f"{len(answers)} answers for {device}")
    return took, cpu


def main() -> None:
    """Print the figures of both kinds of store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--only", choices=("sqlite", "postgresql"))
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    made = make_setting(trained=True)
    setting = replace(made, profile=made.profile.model_copy(update={"engine": "native"}))
    for kind in ("sqlite", "postgresql"):
        if asked.only not in (None, kind):
            continue
        with store_of(kind) as store:
            filled = prepare(store, setting)
            rates, by_cpu = map(figure, taken_in_per_s(store, filled, asked.rounds))
            print(
                f"{kind}: {rates.text(digits=0)} samples/s taken in (reach {REACH_PER_S}),"
                f" {by_cpu.text(digits=0)} per s of CPU in this process",
                flush=True,
            )
            began = time.perf_counter()
            count = fill(store, filled, asked.samples)
            print(f"{kind}: {count} samples in the store, filled in {time.perf_counter() - began:.0f} s")
            took, cpu = ask(store, filled, asked.queries, asked.seed)
            p99, reached = percentile(took, 99), percentile(took, 99) <= REACH_NS
            print(
                f"{kind}: plan query median {figure(took).text(MS, 2)} ms, p99 {p99 / MS:.2f} ms"
                f" (reach {REACH_NS / MS:.0f} ms: {'yes' if reached else 'no'}; seed {asked.seed});"
                f" CPU in this process {figure(cpu).text(MS, 2)} ms, p99 {percentile(cpu, 99) / MS:.2f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
