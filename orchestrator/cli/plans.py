"""plans query: what the store answers for a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, get_args

import typer

from db.devices import list_devices
from db.plan_answers import PlanAnswer
from db.reasons import Reasons, in_words, reasons_of
from orchestrator import measure, report
from orchestrator.cli.context import JsonOption, TaskOption, farm_of, parse_size, parse_targets
from orchestrator.cli.fitting import TableText
from orchestrator.cli.output import emit_json, heading, lines, note, table
from orchestrator.cli.plan import show_plans
from orchestrator.distinctions import Asked, distinctions
from orchestrator.errors import near
from orchestrator.farm import Farm
from orchestrator.library import only_task
from sti_runtime.errors import InputError, StifarmError
from sti_runtime.messages import RequestKind
from sti_runtime.policies import POLICIES
from sti_runtime.units import format_bytes, format_ns

KINDS: tuple[str, ...] = get_args(RequestKind)

plans_app = typer.Typer(no_args_is_help=True, help="Per-device plans from the store.")


class NoPlanError(StifarmError):
    """The store holds no plan that answers the query."""


@plans_app.command("query")
def query(
    context: typer.Context,
    device: Annotated[list[str] | None, typer.Option("--device", "-d", help="By name; repeatable.")] = None,
    label: Annotated[str | None, typer.Option("--label", help="name=value.")] = None,
    task: TaskOption = None,
    target: Annotated[
        str | None, typer.Option("--target", "-T", help="Target latency: 100ms, or several.")
    ] = None,
    preload: Annotated[str | None, typer.Option("--preload", "-S", help="Preload buffer |S|.")] = None,
    policy: Annotated[
        str, typer.Option("--policy", "-p", help=f"all, or one of {', '.join(POLICIES)}.")
    ] = "sti",
    kind: Annotated[str, typer.Option("--kind", help=f"Measured requests: {', '.join(KINDS)}.")] = "warm",
    emulated: Annotated[
        bool, typer.Option("--emulated/--no-emulated", help="Emulated devices too, when none is named.")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Why these submodels and fidelities.")] = False,
    json: JsonOption = False,
) -> None:
    """Per-device plans with what was predicted, what was measured, and what they rest on.

    Example: stifarm plans query --device this-machine --target 100ms --json
    """
    wanted = _label(label)
    targets = [None] if target is None else parse_targets([target])
    preload_bytes = None if preload is None else parse_size(preload, "--preload")
    if policy not in (*POLICIES, "all"):
        raise InputError(f"--policy {policy!r} is unknown.", f"There is: {', '.join(POLICIES)}, all.")
    if kind not in KINDS:
        raise InputError(f"--kind {kind!r} is unknown.", f"There is: {', '.join(KINDS)}.")
    with farm_of(context, existing=True) as farm:
        chosen = None if task is None else only_task(farm, task)
        names = _known_devices(farm, device or ())
        filters: dict[str, Any] = {
            "label": wanted,
            "task": chosen,
            "preload_bytes": preload_bytes,
            "policy": None if policy == "all" else policy,
            "include_emulated": emulated,
        }
        answers = [
            answer
            for target_ns in targets
            for answer in measure.answers_for(farm, names, target_ns=target_ns, request_kind=kind, **filters)
        ]
        if not answers:
            asked = "all" if not names else ",".join(names)
            raise _no_plan(farm, names, filters, f"stifarm plan --devices {asked} --target {target or 'T'}")
        with farm.store.reader() as session:
            whys = [reasons_of(session, a.plan_id, a.plan) if explain else None for a in answers]
    if json:
        context.obj.owes_json = False
        documents = [report.plan_json(answer) for answer in answers]
        for shown, why in zip(documents, whys, strict=True):
            if explain:
                shown["explanation"] = None if why is None else asdict(why)
        emit_json(documents)
    else:
        columns, rows = report.grounds_table(answers)
        grounds = TableText("What they rest on", columns, rows, report.GROUNDS_CAPTION, report.GROUNDS_LESS)
        show_plans(f"Plans ({kind} requests)", answers, others=[grounds])
        if explain:
            _show_reasons(answers, whys)


def _no_plan(farm: Farm, names: Sequence[str], filters: Mapping[str, Any], make: str) -> NoPlanError:
    """That nothing answers, and what does: by the first of the filters without which something would."""

    def found(**other: Any) -> Sequence[PlanAnswer]:
        return measure.answers_for(farm, names, **{**filters, **other})

    what = "The store holds no plan that answers this."
    if there := found():  # of another T
        known = ", ".join(format_ns(ns) for ns in sorted({each.plan.target_ns for each in there}))
        return NoPlanError(
            what, f"It holds some for T = {known}. Make one (an impossible T is told the smallest): {make}"
        )
    if not names and not filters["include_emulated"] and found(include_emulated=True):
        return NoPlanError(what, "Emulated devices have some: ask for them by name or with --emulated.")
    for option, name, value in (
        ("--preload", "preload_bytes", lambda each: format_bytes(each.plan.preload_bytes)),
        ("--policy", "policy", lambda each: each.plan.policy),
        ("--task", "task", lambda each: each.task),
        ("--label", "label", lambda each: each.device),
    ):
        if filters[name] is not None and (there := found(**{name: None})):
            others = ", ".join(dict.fromkeys(map(value, there)))
            of = "devices" if name == "label" else option
            return NoPlanError(what, f"Without {option} it has some ({of}: {others}); or make one: {make}")
    return NoPlanError(what, f"Make one: {make}")


def _show_reasons(answers: Sequence[PlanAnswer], whys: Sequence[Reasons | None]) -> None:
    apart = [
        each
        for each in distinctions([Asked.by(answer) for answer in answers])
        if each.name not in ("task", "policy")
    ]
    for number, (answer, why) in enumerate(zip(answers, whys, strict=True)):
        plan = answer.plan
        told = "".join(f", {each.name} = {each.cells[number]}" for each in apart if each.cells[number])
        heading(f"{answer.device}, {answer.task}, {plan.policy}, T = {format_ns(plan.target_ns)}{told}")
        if why is None:
            note(f"Its device profile {plan.device_profile[:12]} is not in this store.")
            continue
        lines(in_words(why, plan))
        table(
            "Layers",
            ("layer", "of bundle", "bits (* preloaded)", ">streamed", ">IO budget left"),
            [
                (
                    str(layer.layer),
                    str(layer.source_layer),
                    " ".join(
                        f"{bits}{'*' if there else ''}"
                        for bits, there in zip(layer.fidelities, layer.preloaded, strict=True)
                    ),
                    format_bytes(layer.streamed_bytes),
                    f"{'−' if layer.budget_ns < 0 else ''}{format_ns(abs(layer.budget_ns))}",
                )
                for layer in why.layers
            ],
        )


def _label(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    name, sign, value = text.partition("=")
    if not sign:
        raise InputError(f"--label {text!r} is not name=value.", "Write it like --label kind=board.")
    return name, value


def _known_devices(farm: Farm, names: Sequence[str]) -> Sequence[str]:
    """The names, each of which the store knows. Raises: InputError."""
    with farm.store.reader() as session:
        known = [row.name for row in list_devices(session)]
    for name in names:
        if name not in known:
            raise InputError(
                f"The store knows no device named {name!r}.",
                f"{near(name, known)} A device is known once it was probed: stifarm devices probe.",
            )
    return names
