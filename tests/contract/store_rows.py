"""What tests over every kind of store share: a world in it, its rows counted, processes beside."""

from __future__ import annotations

import multiprocessing

from sqlalchemy import func, select

from db.ingest import IngestReport, ingest
from db.models import (
    Base,
    ComputeSampleRow,
    EvaluationRow,
    FixedSampleRow,
    IoSampleRow,
    ProbeRow,
    RequestRow,
    RunRow,
)
from db.session import Store
from sti_runtime.messages import (
    JournalRecord,
)
from tests.contract import store_world as world

SAMPLES: tuple[type[Base], ...] = (
    IoSampleRow,
    ComputeSampleRow,
    FixedSampleRow,
    ProbeRow,
    RunRow,
    RequestRow,
    EvaluationRow,
)
EXPECTED_ROWS = (5, 3, 2, 1, 1, 12, 1)

PROCESSES = multiprocessing.get_context("forkserver")
"""Processes fork off one that has imported this module: importing takes longer than what they do."""

PROCESSES.set_forkserver_preload([__name__])


def counts(store: Store) -> tuple[int, ...]:
    with store.reader() as session:
        return tuple(session.scalar(select(func.count()).select_from(table)) or 0 for table in SAMPLES)


def put(store: Store, made: world.World, records: list[JournalRecord], attempt: int = 1) -> IngestReport:
    with store.session() as session:
        return ingest(session, device_id=made.device_id, job_id=made.job.id, attempt=attempt, records=records)


def make(store: Store, **options: object) -> world.World:
    with store.session() as session:
        return world.populate(session, **options)  # type: ignore[arg-type]
