"""The verb agent build."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.context import JsonOption
from orchestrator.cli.output import emit_json, steps, success, table
from orchestrator.errors import near
from orchestrator.toolchain import ARCHITECTURES, build_agent
from sti_runtime.errors import InputError
from sti_runtime.units import format_bytes, many

agent_app = typer.Typer(no_args_is_help=True, help="The native agent that devices run.")


@dataclass(frozen=True)
class Built:
    """One executable."""

    architecture: str
    path: Path
    digest: str
    bytes: int


@agent_app.command("build")
def build(
    arch: Annotated[
        list[str] | None,
        typer.Option("--arch", help=f"{', '.join(ARCHITECTURES)}; or several. All by default."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Cross-compile the native agent: one static executable for each architecture.

    Deploying does this by itself. What is built is kept, so only changed sources are compiled again.
    Example: stifarm agent build --arch aarch64,armv7
    """
    built = [_build(name, quiet=json) for name in _architectures(arch or [])]
    if json:
        emit_json(
            [
                {"architecture": b.architecture, "path": str(b.path), "sha256": b.digest, "bytes": b.bytes}
                for b in built
            ]
        )
        return
    success(f"{many(len(built), 'executable')}")
    table(
        "Native agent",
        ("architecture", ">size", "sha256", "path"),
        [(b.architecture, format_bytes(b.bytes), b.digest[:16], str(b.path)) for b in built],
    )


def _build(architecture: str, *, quiet: bool) -> Built:
    with steps(quiet=quiet) as bars, bars.step(f"build the agent for {architecture}") as bar:
        path = build_agent(architecture, progress=bar)
    data = path.read_bytes()
    return Built(architecture, path, hashlib.sha256(data).hexdigest(), len(data))


def _architectures(texts: Sequence[str]) -> tuple[str, ...]:
    asked = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    for name in asked:
        if name not in ARCHITECTURES:
            raise InputError(f"--arch {name!r} is unknown.", near(name, ARCHITECTURES))
    return tuple(dict.fromkeys(asked)) or ARCHITECTURES
