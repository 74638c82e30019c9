"""Which runs have ended since the last look, whoever ended them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy.orm import Session

from db.campaigns import OPEN, cell_counts, newest_run_id, runs_among
from db.models import CampaignRow
from db.session import Store
from orchestrator.campaigns.status import format_span
from sti_runtime.units import many


@dataclass(frozen=True)
class RunEnd:
    """How a run ended. ``elapsed_ns``: since it began, None when it never did; ``cause``: why it was
    cancelled, was skipped or could not begin."""

    campaign: str
    number: int
    state: str
    cause: str | None
    counts: Mapping[str, int]
    elapsed_ns: int | None

    def __str__(self) -> str:
        said = f"run {self.number} of {self.campaign}: {self.state}"
        if self.cause:
            said += f" ({self.cause.rstrip('.')})"
        total = sum(self.counts.values())
        if total:
            states = ", ".join(f"{count:,} {state}" for state, count in sorted(self.counts.items()))
            said += f"; {many(total, 'cell')}: {states}"
        return said if self.elapsed_ns is None else f"{said}; took {format_span(self.elapsed_ns)}"


class RunEnds:
    """Tells of each run once when it has ended; of those that had when it was made, never."""

    def __init__(self, store: Store) -> None:
        self._store = store
        with store.reader() as session:
            self._seen = newest_run_id(session)
            self._open = {run.id for run in runs_among(session, (), after=self._seen)}

    def look(self) -> list[RunEnd]:
        """Those that have ended since the last look, in the order in which they were made."""
        with self._store.reader() as session:
            runs = runs_among(session, self._open, after=self._seen)
            ended = [run for run in runs if run.state not in OPEN]
            counts = cell_counts(session, [run.id for run in ended]) if ended else {}
            found = [
                RunEnd(
                    campaign=_name(session, run.campaign_id),
                    number=run.number,
                    state=run.state,
                    cause=run.cause,
                    counts=counts[run.id],
                    elapsed_ns=None
                    if run.started_wall_ns is None or run.ended_wall_ns is None
                    else max(0, run.ended_wall_ns - run.started_wall_ns),
                )
                for run in ended
            ]
        self._open = {run.id for run in runs if run.state in OPEN}
        self._seen = max([self._seen, *(run.id for run in runs)])
        return found


def _name(session: Session, campaign_id: int) -> str:
    return session.get_one(CampaignRow, campaign_id).name
