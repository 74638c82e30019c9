"""Asking the C parsers about documents: see formats_probe.c."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.toolchain import SOURCE_FOLDERS
from tests.native.sanitized import ENVIRONMENT, build_sanitized

RUNTIME, AGENT = SOURCE_FOLDERS
PARSERS = tuple(
    RUNTIME / f"{name}.c"
    for name in (
        "base", "digest", "json", "json_fields", "json_write",
        "records", "layout", "manifest", "bundle", "plan_format", "profile_format",
    )
)  # fmt: skip
"""All that reads what others wrote, but for the agent's own files."""

PROBE_LIMIT_S = 300.0


@dataclass(frozen=True)
class Answer:
    """``error``: class name, empty where it was taken; ``lines``: what was asked for, or the words."""

    error: str
    lines: list[str]


Ask = Callable[[str, Sequence[bytes]], list[Answer]]


def formats_probe() -> Ask:
    """Ask the program, built with sanitizers, about documents of one kind."""
    source = Path(__file__).with_name("formats_probe.c")
    program = build_sanitized(
        "address,undefined", source, *(AGENT / name for name in ("job.c", "job_settings.c")), runtime=PARSERS
    )

    def ask(kind: str, documents: Sequence[bytes]) -> list[Answer]:
        request = b"".join(b"%s %d\n%s" % (kind.encode(), len(data), data) for data in documents)
        done = subprocess.run(
            [program], input=request, capture_output=True, timeout=PROBE_LIMIT_S, env=ENVIRONMENT, check=False
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
        answers, at = [], 0
        for _ in documents:
            newline = done.stdout.index(b"\n", at)
            end = newline + 1 + int(done.stdout[at:newline])
            first, *rest = done.stdout[newline + 1 : end].decode().split("\n")
            answers.append(Answer("" if first == "ok" else first, rest))
            at = end
        assert at == len(done.stdout)
        return answers

    return ask
