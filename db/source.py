"""Where an accepted unit result comes from: what all its rows share, and where they wait to be written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from db.bulk import Columns, Values, insert_rows
from db.models import AttemptRow, DeviceRow, RequestRow, RunRow, TaskDataRow
from sti_runtime.messages import Job, JournalRecord


@dataclass(frozen=True)
class Source:
    """Where a result comes from. ``emulated`` if the device, the job or the agent says so.

    ``data``: the job's task data; None when the job names none that the store knows. ``bundle_known``: the
    store knows the job's bundle.
    """

    journal_id: int
    device: DeviceRow
    job: Job
    attempt: AttemptRow
    record: JournalRecord
    data: TaskDataRow | None
    bundle_known: bool

    @property
    def device_id(self) -> int:
        """The device."""
        return self.device.id

    @property
    def emulated(self) -> bool:
        """Whether what was measured is of no real device."""
        slowed = self.device.emulated or self.job.emulation is not None
        return slowed or bool(self.attempt.agent_emulated)

    @property
    def sequence_length(self) -> int | None:
        """Tokens of each row of the task data."""
        return None if self.data is None else self.data.sequence_length


def missing_bundle(source: Source) -> str | None:
    """Why rows that name the job's bundle cannot be made; None when they can."""
    return None if source.bundle_known else "the job names no bundle that the store knows"


REQUESTS = Columns(
    RequestRow,
    (
        "run_id",
        "ordinal",
        "task_row",
        "warmup",
        "valid",
        "reasons_json",
        "emulated",
        "latency_ns",
        "stall_ns",
        "planned_bytes",
        "storage_bytes",
        "mode_asked",
        "mode_proven",
        "logits_json",
        "trace_json",
    ),
)


@dataclass
class Pending:
    """Rows of many results that are written together, a table at a time."""

    _samples: dict[Columns, list[Values]] = field(default_factory=dict)
    _runs: list[dict[str, Any]] = field(default_factory=list)
    _requests: list[Sequence[Values]] = field(default_factory=list)

    def add(self, columns: Columns, rows: Sequence[Values]) -> None:
        """Rows of samples."""
        self._samples.setdefault(columns, []).extend(rows)

    def add_run(self, run: dict[str, Any], requests: Sequence[Values]) -> None:
        """A run and its requests, as ``REQUESTS`` has them but for the run's id in front."""
        self._runs.append(run)
        self._requests.append(requests)

    def write(self, session: Session) -> None:
        """Insert all of them."""
        for columns, rows in self._samples.items():
            insert_rows(session, columns, rows)
        if self._runs:
            made = insert(RunRow.__table__).returning(RunRow.journal_id, RunRow.id)  # type: ignore[arg-type]
            ids = {row.journal_id: row.id for row in session.execute(made, self._runs)}
            rows = [
                (ids[run["journal_id"]], *request)
                for run, requests in zip(self._runs, self._requests, strict=True)
                for request in requests
            ]
            insert_rows(session, REQUESTS, rows)
