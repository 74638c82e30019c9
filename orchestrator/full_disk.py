"""Removing what is ours from a device that has no room for an agent to do it: by plain commands.

An agent needs some blocks for its executable, its locks and the fence. Content goes first, for it can be
deployed again and is what takes space; jobs, settings and the rest only when even that is not enough.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from orchestrator.agent_verbs import FENCE
from orchestrator.errors import DeviceFullError, StableError, TransientError
from orchestrator.listing import listed
from orchestrator.ownership import require_ours
from orchestrator.tailing import agent_runs
from orchestrator.transports.base import Transport
from sti_runtime.messages import Lease

CONTENT = ("bundles", "tasks", "incoming")
"""What can be deployed again."""

SETTINGS = "settings.journal"
OWNED = (*CONTENT, "jobs", "locks", "bin", FENCE, SETTINGS, "device_id")
"""Everything of ours in a work folder (docs/job-and-journal.md, 1)."""

_AGENT = re.compile(r"stifarm-agent-[0-9a-f]{16}")
_REMOVE_TIMEOUT_S = 600.0


def remove_content(transport: Transport, spool: str, lease: Lease | None) -> None:
    """Remove bundles and task rows. Raises: AgentError when the device is another's; TransientError while a
    job runs there; DeviceError."""
    require_ours(transport, spool, lease)
    _require_idle(transport, spool)
    _remove(transport, spool, CONTENT)


def remove_everything(transport: Transport, spool: str, lease: Lease | None) -> tuple[str, ...]:
    """Remove all that is ours; its names. Raises: as ``remove_content``; DeviceFullError when settings of the
    device are to be put back, which only an agent can."""
    require_ours(transport, spool, lease)
    _require_idle(transport, spool)
    script = 'cd -- "$1" || exit 0; shift; for each; do test ! -e "$each" || echo "$each"; done'
    found = _lines(transport, script, spool, *OWNED)
    there = tuple(name for name in OWNED if name in found)
    if SETTINGS in there:
        raise DeviceFullError(
            f"settings of it are to be put back ({spool}/{SETTINGS}), and there is no room for an agent to.",
            "Free some space on it, then clean again.",
            device=transport.device,
        )
    _remove(transport, spool, OWNED)
    return there


def agents_there(transport: Transport, spool: str) -> list[str]:
    """Paths of the agents that were pushed before, of whatever version."""
    script = 'for each in "$1"/stifarm-agent-*; do test ! -x "$each" || echo "$each"; done'
    paths = _lines(transport, script, f"{spool}/bin")
    return [path for path in paths if _AGENT.fullmatch(path.removeprefix(f"{spool}/bin/"))]


def _require_idle(transport: Transport, spool: str) -> None:
    """Raises: TransientError while an agent runs a job."""
    script = 'for each in "$1"/jobs/*/*/pid; do test ! -e "$each" || echo "${each%/pid}"; done'
    for folder in _lines(transport, script, spool):
        if agent_runs(transport, folder):
            job = folder.removeprefix(f"{spool}/jobs/")[:80]
            raise TransientError(f"job {job} runs there.", "Stop it first.", device=transport.device)


def _lines(transport: Transport, script: str, *arguments: str) -> list[str]:
    return listed(transport, script, *arguments).decode(errors="replace").splitlines()


def _remove(transport: Transport, spool: str, names: Sequence[str]) -> None:
    paths = [f"{spool}/{name}" for name in names]
    done = transport.run(["rm", "-rf", "--", *paths], timeout_s=_REMOVE_TIMEOUT_S)
    if not done.ok:
        raise StableError(
            f"{spool} cannot be emptied: {done.error_text() or done.exit_code}.",
            "Check that its user may write there.",
            device=transport.device,
        )
