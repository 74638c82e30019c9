"""A batch's way through one controller: claimed, noted, settled; what an error makes of it."""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from db import campaign_work as work
from db import jobs as job_queries
from db.campaign_work import CellEnd
from db.errors import LeaseHeldError, QuarantinedError, StoreError, StoreUnreachableError
from db.events import record_event
from db.models import CampaignBatchRow, CampaignRow, CampaignRunRow
from orchestrator.campaigns.spec import CampaignSpec
from orchestrator.campaigns.steps import Batch, Ends, Means
from orchestrator.errors import HostAwayError, LinkError, PoolError, TransientError
from orchestrator.farm import Farm
from sti_runtime.errors import StifarmError

TRIES = 3
_RETRY_NS = 30 * 10**9
_RETRY_FACTOR = 4
_HELD_WAIT_NS = 15 * 10**9
"""A device that another owner uses is asked for again after so long, as is one when its host or the store was
away."""
_PATIENT = (LeaseHeldError, StoreUnreachableError, HostAwayError)
"""What is no failure of the batch that met it."""

_log = structlog.get_logger(__name__)


class ClaimLostError(StoreError):
    """A batch went to another controller; nothing more is kept of it here."""


def claimed(farm: Farm, batch_id: int) -> Batch | None:
    """The batch, claimed for this farm's owner; None when another controller was first."""
    with farm.store.session() as session:
        if not work.claim(session, batch_id, farm.owner):
            return None
        row = session.get_one(CampaignBatchRow, batch_id, populate_existing=True)
        run = session.get_one(CampaignRunRow, row.run_id)
        campaign = session.get_one(CampaignRow, run.campaign_id)
        spec = CampaignSpec.from_json(campaign.spec_json.encode(), source=f"campaign {campaign.name}")
        return Batch(spec, f"{campaign.name}/{run.number}", row, work.cells_of(session, batch_id))


def note(farm: Farm, batch: Batch, known: Mapping[int, CellEnd]) -> None:
    """Keep what is known of a batch's cells by now. Raises: ClaimLostError."""
    with farm.store.session() as session:
        if not work.note_cells(session, batch.row.id, farm.owner, known):
            raise ClaimLostError(
                f"Batch {batch.row.id} of {batch.of} went to another controller.", "It goes on there."
            )


def settle(means: Means, batch: Batch, ends: Ends, error: BaseException | None) -> None:
    """Keep how a batch ended: its cells, or by its error another try, a failure, an interruption."""
    farm, row = means.farm, batch.row
    if error is None:
        with farm.store.session() as session:
            work.end_batch(session, row.id, farm.owner, ends)
    elif isinstance(error, KeyboardInterrupt):
        with farm.store.session() as session:
            cancelled = work.cancelled_under_way(session, [row.id])
            if not cancelled:
                work.put_back(session, row.id, farm.owner, cause="it was interrupted")
        if cancelled:
            end_abandoned(means, row.id)
    elif isinstance(error, ClaimLostError):
        _log.warning("a claim was lost", batch=row.id, campaign=batch.of)
    elif isinstance(error, _PATIENT) and not _failed_here(means, error):
        with farm.store.session() as session:
            work.put_back(session, row.id, farm.owner, cause=error.what, wait_ns=_HELD_WAIT_NS)
    elif isinstance(error, QuarantinedError):
        _fail(farm, batch, error)
    elif isinstance(error, (TransientError, PoolError, StoreError)) and row.tries + 1 < TRIES:
        _log.warning("will be tried again", device=row.device, campaign=batch.of, cause=error.what)
        wait_ns = _RETRY_NS * _RETRY_FACTOR**row.tries
        with farm.store.session() as session:
            work.put_back(session, row.id, farm.owner, cause=str(error), wait_ns=wait_ns, failed=True)
    else:
        _fail(farm, batch, error)


def _failed_here(means: Means, error: BaseException) -> bool:
    """Whether it was a host's worker that failed, on a host that is there: that is tried only so often."""
    return isinstance(error, HostAwayError) and means.in_reach(error.device)


def _fail(farm: Farm, batch: Batch, error: BaseException) -> None:
    """The batch failed for good, and with it what needs it."""
    row = batch.row
    if isinstance(error, StifarmError):
        cause = str(error)
        _log.warning("failed", device=row.device, campaign=batch.of, kind=row.kind, cause=cause)
    else:
        cause = f"unexpected {type(error).__name__}: {error}"
        _log.error("failed unexpectedly", device=row.device, campaign=batch.of, exc_info=error)
    with farm.store.session() as session:
        ends = {
            cell.id: CellEnd("failed", cause, cell.target_ns, cell.plan_digest, cell.job_id)
            for cell in work.cells_of(session, row.id)
            if cell.state in ("running", "queued")
        }
        if not work.end_batch(session, row.id, farm.owner, ends):
            return
        record_event(session, "error", "campaign-failed", f"{batch.of}, {row.kind} on {row.device}: {cause}")
        if row.kind in ("importance", "profile"):
            work.skip_dependents(session, row, f"its {row.kind} failed: {cause}")
        if isinstance(error, LinkError):
            work.fail_device(session, row, cause)


def give_up_device(farm: Farm, batch_id: int, cause: str) -> None:
    """Fail everything of a run on the device of a batch."""
    batch = claimed(farm, batch_id)
    if batch is None:
        return
    with farm.store.session() as session:
        work.end_batch(session, batch_id, farm.owner, batch.all(CellEnd("failed", cause)))
        work.fail_device(session, batch.row, cause)
        record_event(session, "error", "campaign-failed", f"{batch.of}: {cause}")


def end_abandoned(means: Means, batch_id: int) -> None:
    """End a batch of a cancelled run that nobody else holds: its agent is asked to stop."""
    farm = means.farm
    with farm.store.session() as session:
        if not work.claim(session, batch_id, farm.owner, cancelled=True):
            return
        row = session.get_one(CampaignBatchRow, batch_id, populate_existing=True)
        cells = work.cells_of(session, batch_id)
        jobs = sorted({cell.job_id for cell in cells if cell.job_id and cell.state == "running"})
        attempts = {job_id: job_queries.latest_attempt(session, job_id) for job_id in jobs}
    for job_id, attempt in attempts.items():
        if attempt is not None and attempt.state == "running" and row.device is not None:
            try:
                means.worker.stop_job(row.device, job_id, attempt.number)
            except StifarmError as error:
                _log.warning("its agent could not be asked to stop", device=row.device, cause=error.what)
    with farm.store.session() as session:
        for job_id, attempt in attempts.items():
            if attempt is not None and attempt.state == "running":
                job_queries.end_attempt(session, job_id, attempt.number, "lost", job_state="cancelled")
            elif job_queries.get_job(session, job_id).state == "queued":
                job_queries.set_job_state(session, job_id, "cancelled")
        ends = {
            cell.id: CellEnd("cancelled", None, cell.target_ns, cell.plan_digest, cell.job_id)
            for cell in cells
            if cell.state == "running"
        }
        work.end_batch(session, batch_id, farm.owner, ends)
