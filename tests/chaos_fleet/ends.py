"""What must hold of a store once the faults are over: every campaign ended, nothing lost, nothing twice."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from db.campaigns import OPEN, list_campaigns, open_runs, runs_of
from db.models import (
    AttemptRow,
    CampaignBatchRow,
    CampaignCellRow,
    CampaignRow,
    CampaignRunRow,
    JobRow,
    JournalRecordRow,
    ProbeRow,
)

EXPLAINED: Sequence[tuple[str, frozenset[str]]] = (
    (
        r"out of reach|could not be reached|cannot be reached|link|refused|timed out|did not end in time",
        frozenset({"host-kill", "node-kill", "worker-kill", "head-kill", "controller-kill", "cut", "reboot"}),
    ),
    (
        r"Ray worker died|worker is gone|node is gone|cluster|controller",
        frozenset({"host-kill", "node-kill", "worker-kill", "head-kill", "controller-kill"}),
    ),
    (
        r"The store .*(reached|failed|locked|grow|written)|disk is full",
        frozenset(
            {
                "database-kill",
                "database-stop",
                "database-freeze",
                "backend-kill",
                "disk-full",
                "database-lock",
            }
        ),
    ),
    (r"in use by|was lost to another|another controller", frozenset({"second-controller"})),
)
"""Causes of cells that failed, and the faults of which one must have been there."""

Check = list[str]
"""What is wrong, in words; nothing when all is as it must be."""


def unended(session: Session) -> Check:
    """Runs, batches and cells that have not ended."""
    names = {row.id: row.name for row in session.scalars(select(CampaignRow))}
    found = [f"run {run.number} of {names[run.campaign_id]} is {run.state}" for run in open_runs(session)]
    batches = select(CampaignBatchRow).where(CampaignBatchRow.state != "ended")
    found += [f"batch {b.id}: {b.kind} on {b.device} is {b.state}" for b in session.scalars(batches)]
    cells = select(CampaignCellRow).where(CampaignCellRow.state.in_(OPEN))
    return found + [
        f"cell {cell.id} of batch {cell.batch_id} is {cell.state}" for cell in session.scalars(cells)
    ]


def doubled_or_missing_cells(session: Session) -> Check:
    """Each run of a campaign has the same cells, and each of them once."""
    query = select(CampaignRunRow, CampaignBatchRow, CampaignCellRow).where(
        CampaignBatchRow.run_id == CampaignRunRow.id, CampaignCellRow.batch_id == CampaignBatchRow.id
    )
    of_run: dict[tuple[int, int], list[tuple[object, ...]]] = defaultdict(list)
    for run, batch, cell in session.execute(query):
        what = (batch.device, batch.kind, batch.bundle_digest, batch.task, batch.engine, batch.repeat)
        of_run[run.campaign_id, run.number].append((*what, cell.target, cell.preload_bytes, cell.policy))
    found: Check = []
    wanted: dict[int, frozenset[tuple[object, ...]]] = {}
    for (campaign, number), cells in sorted(of_run.items()):
        found += [f"run {number}: {cell} is there {n} times" for cell, n in Counter(cells).items() if n > 1]
        differ = frozenset(cells) ^ wanted.setdefault(campaign, frozenset(cells))
        found += [f"run {number} of campaign {campaign} differs from the first in {cell}" for cell in differ]
    return found


def unexplained(session: Session, injected: Collection[str]) -> Check:
    """Cells that were not measured for a cause that none of the injected faults explains."""
    query = select(CampaignCellRow).where(CampaignCellRow.state.not_in(("done", "infeasible")))
    found = []
    for cell in session.scalars(query):
        kinds = [kinds for pattern, kinds in EXPLAINED if re.search(pattern, cell.cause or "")]
        if not any(kinds_of & set(injected) for kinds_of in kinds):
            found.append(f"cell {cell.id} is {cell.state}: {cell.cause}")
    return found


def doubled_measurements(session: Session) -> Check:
    """A cell that is done has a job that is done; that is of one batch, has one attempt that ended so, and of
    each attempt one result for each unit."""
    query = select(CampaignBatchRow, CampaignCellRow).where(CampaignCellRow.batch_id == CampaignBatchRow.id)
    batches: dict[str, set[int]] = defaultdict(set)
    found: Check = []
    states = {job.id: job.state for job in session.scalars(select(JobRow))}
    for batch, cell in session.execute(query):
        if cell.state != "done" or batch.kind == "importance":
            continue
        if cell.job_id is None:
            if cell.cause is None:
                found.append(f"cell {cell.id} ({batch.kind}) is done without a job or a reason")
            continue
        if states[cell.job_id] != "done":
            found.append(f"cell {cell.id} is done, its job {cell.job_id} is {states[cell.job_id]}")
        if batch.kind != "evaluate":  # of equal plans once, whichever cell asked first
            batches[cell.job_id].add(batch.id)
    found += [f"job {job} is of batches {sorted(ids)}" for job, ids in batches.items() if len(ids) > 1]
    attempts = session.scalars(select(AttemptRow).where(AttemptRow.state == "done")).all()
    ended = Counter(attempt.job_id for attempt in attempts)
    found += [f"job {job} was done {times} times" for job, times in ended.items() if times > 1]
    table = JournalRecordRow
    results = select(table.job_id, table.attempt, table.unit).where(
        table.type == "result", table.rejected.is_(None)
    )
    units = Counter((job, attempt, unit) for job, attempt, unit in session.execute(results))
    return found + [f"{unit} was measured {times} times" for unit, times in units.items() if times > 1]


def stale_writers(session: Session) -> Check:
    """Under one lease of a device there was one attempt: a stale controller has begun none."""
    attempts = session.scalars(select(AttemptRow)).all()
    leases = Counter((attempt.device_id, attempt.lease_counter) for attempt in attempts)
    return [
        f"lease {lease} of device {device} has {n} attempts" for (device, lease), n in leases.items() if n > 1
    ]


def open_campaigns(session: Session) -> set[str]:
    """Names of the campaigns of which a run is open."""
    query = select(CampaignRow.name).join(CampaignRunRow, CampaignRunRow.campaign_id == CampaignRow.id)
    return set(session.scalars(query.where(CampaignRunRow.state.in_(OPEN))))


def last_runs_missing(session: Session) -> list[str]:
    """Names of the campaigns whose last run is not done."""
    missing = []
    for campaign in list_campaigns(session):
        runs = runs_of(session, campaign.id, limit=1)
        if runs and runs[0].state != "done":
            missing.append(campaign.name)
    return missing


def by_state(session: Session) -> Mapping[str, int]:
    """How many cells are in each state."""
    return dict(sorted(Counter(session.scalars(select(CampaignCellRow.state))).items()))


def causes(session: Session, limit: int = 12) -> Iterable[str]:
    """Why cells were not measured, the most frequent first."""
    query = select(CampaignCellRow.cause).where(CampaignCellRow.state.in_(("failed", "skipped")))
    return [f"{n} × {cause}" for cause, n in Counter(session.scalars(query)).most_common(limit)]


# ------------------------------------------------------------------ damage on purpose


def drop_a_record(session: Session, chance: random.Random) -> tuple[str, int]:
    """Drop one record, with the row that was made of it; its job and number."""
    query = select(ProbeRow.journal_id).join(JournalRecordRow, JournalRecordRow.id == ProbeRow.journal_id)
    chosen = chance.choice(sorted(session.scalars(query)))
    row = session.get_one(JournalRecordRow, chosen)
    where = (row.job_id, row.seq)
    session.execute(delete(ProbeRow).where(ProbeRow.journal_id == chosen))
    session.execute(delete(JournalRecordRow).where(JournalRecordRow.id == chosen))
    return where


def double_a_record(session: Session, chance: random.Random) -> tuple[str, int]:
    """Store one record a second time, behind the last of its attempt; its job and new number."""
    table = JournalRecordRow
    ids = session.scalars(select(table.id).where(table.type == "end").order_by(table.id)).all()
    row = session.get_one(table, chance.choice(ids))
    values: dict[str, Any] = {column.key: getattr(row, column.key) for column in table.__table__.columns}
    del values["id"]
    values["seq"] += 1
    session.execute(insert(table).values(values))
    return values["job_id"], values["seq"]
