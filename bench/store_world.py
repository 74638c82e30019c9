"""The stores that ``bench.store`` measures: devices with plans, their journals, millions of samples."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, text

from bench.planner import Setting
from db.artifacts import save_bundle, save_model, save_task, save_task_data
from db.devices import record_facts, register_device
from db.ingest import ingest
from db.jobs import begin_attempt, create_job
from db.plans import save_plan
from db.profiles import save_device_profile
from db.session import Store, open_store, sqlite_url, upgrade
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
DEVICES, RUNS, JOBS = 100, 30, 8
KINDS = ("sqlite", "postgresql")
TARGETS_NS = tuple(t * MS for t in (200, 300, 400, 600, 1000))
PRELOADS_BYTES = (0, 1_000_000, 2_000_000, 5_000_000)


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


# ------------------------------------------------------------------ journals


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
    with _unreferenced(store) as connection:
        _copy_runs(connection, records[2], runs, len(filled.plans))
        reads = max(0, samples - runs * REQUESTS)
        _copy_reads(connection, records[0], -(-reads // READS))
    if store.engine.dialect.name == "postgresql":  # does this by itself after a while
        with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM (ANALYZE)"))
    with store.reader() as session:
        tables = ("io_samples", "compute_samples", "requests")
        return sum(session.execute(text(f"SELECT count(*) FROM {name}")).scalar_one() for name in tables)


@contextmanager
def _unreferenced(store: Store) -> Iterator[Connection]:
    """A transaction in which references are not checked: rows are copied by the million."""
    if store.engine.dialect.name == "postgresql":
        with store.engine.begin() as connection:
            connection.execute(text("SET LOCAL session_replication_role = replica"))
            yield connection
        return
    with store.engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        connection.rollback()  # the pragma does nothing within a transaction
        driver.execute("PRAGMA foreign_keys = OFF")
        with connection.begin():
            yield connection
        driver.execute("PRAGMA foreign_keys = ON")


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
    _brief_runs(connection, source)


_LISTED = {"sqlite": "group_concat(latency_ns)", "postgresql": "string_agg(CAST(latency_ns AS text), ',')"}


def _brief_runs(connection: Connection, source: int) -> None:
    """Each copied run's requests in brief: as the source's, but for their latencies."""
    of_source = text("SELECT measured_json FROM runs WHERE journal_id = :source")
    brief = connection.execute(of_source, {"source": source}).scalar_one()
    before, _, rest = brief.partition('"latency_ns":[')
    listed = (
        f"SELECT {_LISTED[connection.dialect.name]} FROM requests r"
        " WHERE r.run_id = runs.id AND r.valid AND NOT r.warmup"
    )
    made = text(f"UPDATE runs SET measured_json = :before || ({listed}) || :after WHERE id >= {BASE}")
    given = {"before": before + '"latency_ns":[', "after": rest[rest.index("]") :]}
    connection.execute(made, given)


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
