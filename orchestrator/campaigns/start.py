"""Beginning a run: what the campaign's names stand for now, how much that is, and its rows."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from db.campaign_work import durations
from db.campaigns import (
    Taken,
    Trigger,
    create_run,
    find_campaign,
    go_on,
    has_content,
    lock_campaign,
    runs_of,
    save_campaign,
)
from db.importance import latest_importance
from db.models import CampaignRow, CampaignRunRow
from orchestrator.campaigns.estimate import Amount, Typical, left_ns
from orchestrator.campaigns.expand import (
    MOST_IN_ALL,
    Content,
    count_batches,
    count_cells,
    count_planned,
    expand,
)
from orchestrator.campaigns.lanes import lanes_of
from orchestrator.campaigns.spec import CampaignSpec, parse_bundle
from orchestrator.errors import CampaignError
from orchestrator.farm import Farm
from orchestrator.inventory import Device
from orchestrator.library import find_bundle, only_task
from orchestrator.matching import select
from orchestrator.measure import IMPORTANCE_ROWS
from sti_runtime.errors import InputError
from sti_runtime.records import sha256_hex
from sti_runtime.shard import shard_bytes


@dataclass(frozen=True)
class Resolved:
    """What a campaign's selectors and names stand for."""

    spec: CampaignSpec
    devices: tuple[Device, ...]
    contents: tuple[Content, ...]

    @property
    def cells(self) -> int:
        """How many cells a run of it has."""
        return count_cells(self.spec, self.devices, self.contents)


def resolve(farm: Farm, spec: CampaignSpec) -> Resolved:
    """Look everything up. Raises: SelectorError, InputError, InventoryError, FormatError; CampaignError for a
    matrix larger than any run can be."""
    resolved = _looked_up(farm, spec)
    if resolved.cells > MOST_IN_ALL:
        raise CampaignError(
            f"The matrix of {spec.name} has {resolved.cells:,} cells; a run has {MOST_IN_ALL:,} at most.",
            "Take values out of it, or make several campaigns.",
        )
    return resolved


def _looked_up(farm: Farm, spec: CampaignSpec) -> Resolved:
    devices = select(farm.inventory.devices, ",".join(spec.devices))
    if spec.kinds == ("health",):
        return Resolved(spec, devices, ())
    named: list[tuple[str | None, str | None]] = [parse_bundle(text) for text in spec.bundles]
    named = named or [(None, None)]
    if spec.tasks and all(task for _, task in named):
        raise InputError(
            f"The bundles of {spec.name} name their tasks, and it names tasks besides.", "Name them once."
        )
    contents = []
    for name, pinned in named:
        bundle = find_bundle(farm, name)
        for task in (pinned,) if pinned else spec.tasks or (None,):
            own = only_task(farm, task, bundle)
            contents.append(Content(bundle.digest, own, shard_bytes(bundle.manifest.model)))
    return Resolved(spec, devices, tuple(dict.fromkeys(contents)))


def estimated_ns(farm: Farm, resolved: Resolved) -> int:
    """How long a run will take, from what such batches took before."""
    lanes = lanes_of(farm.inventory.devices, farm.settings.machine_lock)
    with farm.store.reader() as session:
        typical = Typical.of(durations(session))
        amounts = amounts_of(resolved)
        if resolved.spec.importance_rows is None and (None, "importance") in amounts:
            missing = sum(_unscored(farm, session, content) for content in resolved.contents)
            amounts[None, "importance"] = Amount(missing, missing)
    return left_ns(amounts, typical, lambda device: lanes[device])


def _unscored(farm: Farm, session: Session, content: Content) -> bool:
    """Whether the store has no importance that a campaign could take."""
    model = find_bundle(farm, content.bundle).model_digest
    return latest_importance(session, model, content.task, "exhaustive") is None


def amounts_of(resolved: Resolved) -> dict[tuple[str | None, str], Amount]:
    """What a run has to do by (device, kind), without making its batches."""
    spec, found = resolved.spec, dict[tuple[str | None, str], Amount]()
    chunks, cells = count_batches(spec), count_planned(spec)
    if spec.planned_kinds or "importance" in spec.kinds:
        found[None, "importance"] = Amount(len(resolved.contents), len(resolved.contents))
    for device in resolved.devices:
        pairs = len(resolved.contents) * max(1, len(spec.engines))
        timed = pairs * spec.repeats
        for kind, amount in (
            ("health", Amount(1, 1)),
            ("profile", Amount(timed, timed)),
            ("execute", Amount(timed * chunks, timed * cells * spec.requests)),
            ("evaluate", Amount(pairs * chunks, pairs * cells)),
        ):
            if kind in spec.kinds:
                found[device.name, kind] = amount
    return found


def keep_campaign(session: Session, spec: CampaignSpec, *, replace: bool = False) -> CampaignRow:
    """The campaign's row. Raises: InputError when its name has other content."""
    return save_campaign(
        session,
        spec,
        name=spec.name,
        priority=spec.priority,
        deadline_ns=spec.deadline_ns,
        seed=spec.seed,
        replace=replace,
    )


def as_kept(farm: Farm, spec: CampaignSpec) -> CampaignSpec:
    """The campaign as the store keeps it, where it is the same but for the importance rows, which earlier
    versions kept of a file without them: it goes on with what it began with."""
    if spec.importance_rows is not None:
        return spec
    with farm.store.reader() as session:
        row = find_campaign(session, spec.name)
    earlier = spec.model_copy(update={"importance_rows": IMPORTANCE_ROWS})
    return earlier if row is not None and has_content(row, earlier) else spec


def begin_run(
    session: Session,
    campaign: CampaignRow,
    resolved: Resolved,
    *,
    trigger: Trigger,
    number: int,
    state: str = "running",
    schedule_id: int | None = None,
    due_wall_ns: int | None = None,
) -> CampaignRunRow | None:
    """A new run with all its batches; None when the schedule has one of that due time. ``number``: for its
    orders, which differ from run to run. Raises: ReplacedError when the campaign asks something else by now.
    """
    campaign = lock_campaign(session, campaign.id, resolved.spec)
    seed = int(sha256_hex(f"{resolved.spec.seed}/{campaign.name}/{number}".encode())[:8], 16)
    return create_run(
        session,
        campaign,
        expand(resolved.spec, resolved.devices, resolved.contents, seed=seed),
        trigger=trigger,
        state=state,
        schedule_id=schedule_id,
        due_wall_ns=due_wall_ns,
    )


def take_run(farm: Farm, campaign: CampaignRow, spec: CampaignSpec, *, again: bool) -> Taken:
    """The run to work on: the open one, the last one's missing cells, a new one.

    Raises: ReplacedError; as ``resolve`` where a new one begins.
    """
    with farm.store.session() as session:
        taken = go_on(session, campaign.id, spec, again=again)
    if taken is not None:
        return taken
    resolved = resolve(farm, spec)
    with farm.store.session() as session:
        taken = go_on(session, campaign.id, spec, again=again)  # another command may have been faster
        if taken is not None:
            return taken
        number = len(runs_of(session, campaign.id)) + 1
        return Taken(begin_run(session, campaign, resolved, trigger="manual", number=number), "begun")


def spec_of(campaign: CampaignRow) -> CampaignSpec:
    """The campaign as it was read from its file."""
    return CampaignSpec.from_json(campaign.spec_json.encode(), source=f"campaign {campaign.name}")
