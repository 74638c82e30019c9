"""The verbs plan and eval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from db.plan_answers import PlanAnswer
from orchestrator import measure, report
from orchestrator.cli.context import (
    LARGEST_SEED,
    AgainOption,
    BundleOption,
    DevicesOption,
    JsonOption,
    Session,
    TaskOption,
    driving,
    farm_of,
    method_of,
    parse_size,
    parse_targets,
)
from orchestrator.cli.fitting import TableText
from orchestrator.cli.output import (
    Bar,
    emit_json,
    fail,
    heading,
    note,
    steps,
    tables,
    warn,
)
from orchestrator.cli.over_devices import each_device, failures_json, finish, ready_with_content
from orchestrator.dispatch import Outcome
from orchestrator.farm import Farm
from orchestrator.fleet import ReadyDevice
from orchestrator.inventory import Device
from orchestrator.library import find_bundle, only_task
from orchestrator.listed import listed_devices, select_listed
from orchestrator.measure import Answer, Question, RunSettings, Work
from sti_runtime.errors import InfeasiblePlanError, InputError, ResourceError, StifarmError
from sti_runtime.importance_profile import METHODS, Method
from sti_runtime.messages import RequestKind, computes_alike
from sti_runtime.plan import Plan
from sti_runtime.plan_build import UNFIT
from sti_runtime.policies import POLICIES
from sti_runtime.units import format_ns_up

KINDS: tuple[RequestKind, ...] = ("spawn-cold", "cold", "warm", "cached")

TargetOption = Annotated[
    list[str], typer.Option("--target", "-T", help="Target latency: 100ms, or several: 50ms,100ms.")
]
PreloadOption = Annotated[str, typer.Option("--preload", "-S", help="Preload buffer |S|.")]
WorkingOption = Annotated[str, typer.Option("--working", "-W", help="Working buffer W.")]
PolicyOption = Annotated[str, typer.Option("--policy", "-p", help=f"{', '.join(POLICIES)}; or several.")]
RequestsOption = Annotated[
    int,
    typer.Option(
        "--requests", "-n", min=1, max=1000, help="Counted requests of each plan; thirty or more are useful."
    ),
]
ImportanceOption = Annotated[
    str | None,
    typer.Option(
        "--importance", help=f"Rank shards by {', '.join(METHODS)}; exhaustive by default, else gradient."
    ),
]
SeedOption = Annotated[
    int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of rows, order and the random policy.")
]

# ------------------------------------------------------------------ plan


def plan(
    context: typer.Context,
    target: TargetOption,
    devices: DevicesOption = "all",
    preload: PreloadOption = "1MB",
    working: WorkingOption = "4MB",
    policy: PolicyOption = "sti",
    slack: Annotated[bool, typer.Option("--slack/--no-slack", help="The paper's form has no slack.")] = True,
    seed: SeedOption = 0,
    importance: ImportanceOption = None,
    bundle: BundleOption = None,
    task: TaskOption = None,
    json: JsonOption = False,
) -> None:
    """Plan for devices from the profiles in the store; nothing is measured, and no device or lab host asked.

    Example: stifarm plan --devices all --target 100ms,200ms --preload 1MB
    """
    asked = questions(
        target, preload, working, policy, slack=slack, seed=seed, importance=method_of(importance)
    )
    with farm_of(context, for_devices=True) as farm:
        known = find_bundle(farm, bundle)
        work = Work.of(farm, known, only_task(farm, task, known))
        listed, chosen = listed_devices(farm), select_listed(farm, devices)
        answers: list[Answer] = []
        errors: list[StifarmError | None] = []
        for device in chosen:
            try:
                listed.require_one(device)
                answers += measure.make_plans(farm, device, work, asked)
                errors.append(None)
            except StifarmError as error:
                fail(error)
                errors.append(error)
        shown = stored_answers(farm, answers, work.task)
    infeasible = [answer for answer in answers if answer.plan is None]
    if json:
        emit_json(
            {
                "plans": [report.plan_json(answer) for answer in shown],
                "infeasible": [_infeasible_json(answer) for answer in infeasible],
                "failed": failures_json(errors),
            }
        )
    elif answers:
        show_plans("Plans", shown, answers)
    context.obj.owes_json = False
    refuse_infeasible(answers)
    finish(errors)


def refuse_infeasible(answers: Sequence[Answer]) -> None:
    """Raises: InfeasiblePlanError, with each device's smallest T that works, when no question has a plan;
    ResourceError when none would at any T.
    """
    reasons = [(answer.device, answer.infeasible) for answer in answers if answer.infeasible is not None]
    if not reasons or len(reasons) < len(answers):
        return
    smallest: dict[str, int] = {}
    for device, reason in reasons:
        if isinstance(reason, ResourceError):
            continue
        smallest[device] = min(reason.smallest_target_ns, smallest.get(device, reason.smallest_target_ns))
    if not smallest:
        raise reasons[0][1]
    device, reason = next(each for each in reasons if isinstance(each[1], InfeasiblePlanError))
    raise InfeasiblePlanError(
        f"{device}: {reason.what}",
        "The smallest target latency that works: "
        + ", ".join(f"{format_ns_up(target_ns)} on {name}" for name, target_ns in smallest.items())
        + ".",
        smallest_target_ns=min(smallest.values()),
    )


def questions(
    target: Sequence[str],
    preload: str,
    working: str,
    policy: str,
    *,
    slack: bool = True,
    seed: int = 0,
    importance: Method | None = None,
) -> list[Question]:
    """Every (policy, T) asked for. Raises: InputError."""
    names = [part.strip() for part in policy.split(",") if part.strip()]
    unknown = [name for name in names if name not in POLICIES]
    if unknown or not names:
        raise InputError(
            f"Unknown policy {', '.join(map(repr, unknown)) or repr(policy)}.",
            f"There is: {', '.join(POLICIES)}.",
        )
    preload_bytes, working_bytes = parse_size(preload, "--preload"), parse_size(working, "--working")
    return [
        Question(target_ns, preload_bytes, working_bytes, name, slack, seed, importance)
        for target_ns in parse_targets(target)
        for name in POLICIES
        if name in names
    ]


def stored_answers(
    farm: Farm, answers: Sequence[Answer], task: str, *, request_kind: str = "warm"
) -> list[PlanAnswer]:
    """What the store knows of the plans just made, by device and T."""
    digests = {answer.plan.digest for answer in answers if answer.plan is not None}
    return measure.answers_for(
        farm,
        list(dict.fromkeys(answer.device for answer in answers)),
        task=task,
        request_kind=request_kind,
        keep=lambda found: found.plan_digest in digests,
    )


def show_plans(
    title: str,
    found: Sequence[PlanAnswer],
    answers: Sequence[Answer] = (),
    others: Sequence[TableText] = (),
    *,
    advise: bool = True,
) -> None:
    """A table of plans for each device, with notes below it; then the ``others`` of the same result.
    ``advise``: say what to do about unfit profiles, which nothing has said before."""
    made = report.plan_tables(found, answers)
    heading(title)
    unfit = {answer.device: UNFIT in answer.plan.flags for answer in found}
    tables(
        [
            *(
                TableText(
                    each.title,
                    each.columns,
                    each.rows,
                    "\n".join([*each.footnotes, *([report.plan_caption(made)] if each is made[-1] else [])]),
                    report.PLAN_LESS,
                )
                for each in made
            ),
            *others,
        ]
    )
    for device in (name for name, flagged in unfit.items() if advise and flagged):
        warn(report.unfit_advice(device))


def _infeasible_json(answer: Answer) -> dict[str, Any]:
    assert answer.infeasible is not None
    return {
        "device": answer.device,
        "target_ns": answer.question.target_ns,
        "policy": answer.question.policy,
        "smallest_target_ns": getattr(answer.infeasible, "smallest_target_ns", None),
        "reason": str(answer.infeasible),
    }


# ------------------------------------------------------------------ eval


def evaluate(
    context: typer.Context,
    target: TargetOption,
    devices: DevicesOption = "all",
    preload: PreloadOption = "1MB",
    working: WorkingOption = "4MB",
    policy: PolicyOption = "sti",
    requests: RequestsOption = 30,
    request_kind: Annotated[
        str, typer.Option("--kind", help=f"{', '.join(KINDS)}: how a request starts.")
    ] = "warm",
    slack: Annotated[bool, typer.Option("--slack/--no-slack")] = True,
    seed: SeedOption = 0,
    importance: ImportanceOption = None,
    bundle: BundleOption = None,
    task: TaskOption = None,
    again: AgainOption = False,
    json: JsonOption = False,
) -> None:
    """Plan, run the plans on the devices, and measure latency, memory and accuracy.

    Shown is what the requests asked for came to; where the store has more of a plan, that is named beside it,
    and stifarm plans query answers with all of them.
    Example: stifarm eval --devices all --target 100ms --policy sti,preload-32
    """
    kind = next((name for name in KINDS if name == request_kind), None)
    if kind is None:
        raise InputError(f"--kind {request_kind!r} is unknown.", f"Choose {' or '.join(KINDS)}.")
    asked = questions(
        target, preload, working, policy, slack=slack, seed=seed, importance=method_of(importance)
    )
    with farm_of(context, for_devices=True) as farm:
        known = find_bundle(farm, bundle)
        work = Work.of(farm, known, only_task(farm, task, known))
        settings = RunSettings(
            requests=requests,
            request_kind=kind,
            io_mode="buffered" if kind == "cached" else "direct",
            seed=seed,
        )
        with driving(farm, devices, measures=True) as session:
            evaluated = evaluate_all(session, work, asked, settings, again=again, quiet=json)
            answers, errors = evaluated.answers, [*evaluated.errors, *session.left_out]
        found = stored_answers(farm, answers, work.task, request_kind=kind)
        shown = measure.of_jobs(farm, found, evaluated.jobs, request_kind=kind)
    if json:
        emit_json(
            {
                "plans": [report.plan_json(answer) for answer in shown],
                "infeasible": [_infeasible_json(answer) for answer in answers if answer.plan is None],
                "failed": failures_json(errors),
            }
        )
    elif answers:
        show_plans(f"Measured ({kind} requests)", shown, answers)
    context.obj.owes_json = False
    refuse_infeasible(answers)
    finish(errors)


@dataclass(frozen=True)
class Evaluated:
    """What came of an evaluation. ``errors``: None for each device that did not fail; ``jobs``: those that
    timed the plans."""

    answers: list[Answer]
    errors: list[StifarmError | None]
    jobs: frozenset[str]


def evaluate_all(
    session: Session,
    work: Work,
    asked: Sequence[Question],
    settings: RunSettings,
    *,
    again: bool = False,
    quiet: bool = False,
) -> Evaluated:
    """Plan for, run on and score every chosen device; accuracy once per distinct content and arithmetic."""
    farm, answers, outcomes = session.farm, list[Answer](), list[Outcome]()

    def one(ready: ReadyDevice, bar: Bar) -> list[Answer]:
        found = measure.make_plans(farm, ready.device, work, asked)
        plans = [answer.plan for answer in found if answer.plan is not None]
        if plans:
            outcomes.append(
                measure.run_plans(
                    farm, session.worker, ready, work, plans, settings, again=again, advance=bar
                )
            )
        return found

    done, failed = each_device(session, work, "run plans", one, quiet=quiet)
    for found in done:
        answers += found
    plans: list[Plan] = [answer.plan for answer in answers if answer.plan is not None]
    outcome: list[StifarmError | None] = [*failed.values(), *[None for _ in done]]
    if plans:
        try:
            _score(session, work, answers, quiet=quiet)
            compared, different = measure.spot_check(farm, work, outcomes)
            report_check = warn if different else note
            report_check(
                f"spot check: {different} of {compared} timed requests gave another class than the evaluation"
            )
        except StifarmError as error:
            fail(error)
            outcome.append(error)
    return Evaluated(answers, outcome, frozenset(done.job_id for done in outcomes))


def _score(session: Session, work: Work, answers: Sequence[Answer], *, quiet: bool) -> None:
    """Accuracy of the answers' plans, each on a device whose engine computes as the plan's own does."""
    engines = {device.name: device.engine for device in session.devices}
    for like in ("native", "native-int8"):
        plans = [
            answer.plan
            for answer in answers
            if answer.plan is not None and computes_alike(engines[answer.device], like)
        ]
        if plans:
            _score_alike(session, work, plans, like, quiet=quiet)


def _score_alike(session: Session, work: Work, plans: Sequence[Plan], like: str, *, quiet: bool) -> None:
    def fitting(devices: Sequence[Device]) -> list[Device]:
        return [device for device in devices if computes_alike(device.engine, like)]

    mine = fitting(session.devices)
    others = fitting(session.farm.inventory.devices)
    chosen = next((d for d in mine if not d.emulated), None) or next(
        (d for d in others if not d.emulated and d.transport == "local"), mine[0]
    )
    if all(chosen.name != device.name for device in session.devices):
        note(f"accuracy does not depend on the device: it is measured on {chosen.name}")
    ready = ready_with_content(session, work, chosen.name)
    with steps(quiet=quiet) as bars, bars.step(f"accuracy of plans, on {ready.name}") as bar:
        measure.score_plans(session.farm, session.worker, ready, work, plans, advance=bar)
