"""Bringing the native agent to a device: the right architecture, whole, and not twice.

The executable lies at ``<spool>/bin/stifarm-agent-<digest>``. It is pushed under another name, started there
once, and takes its name only if it then states the digest of what was sent: a truncated file, a file system
that forbids execution and a wrong architecture all show at this point, before any job is started.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from orchestrator.errors import StableError, ToolchainError
from orchestrator.toolchain import ARCHITECTURES, build_agent
from orchestrator.transports.base import Progress, Transport
from sti_runtime.journal_format import PROTOCOL_VERSION

MACHINES = {
    "x86_64": "x86_64",
    "amd64": "x86_64",
    "aarch64": "aarch64",
    "arm64": "aarch64",
    "armv7l": "armv7",
    "armv8l": "armv7",
}
"""What ``uname -m`` says, and the architecture whose executable runs there. Source: uname(2), Linux."""

_ANSWER_LIMIT_S = 30.0
_TRIES = 2

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class AgentFile:
    """The native agent of one architecture, as built on the host; ``digest``: SHA-256 of ``path``."""

    architecture: str
    path: Path
    digest: str
    bytes: int

    def place(self, spool: str) -> str:
        """Where it lies on a device."""
        return f"{spool}/bin/stifarm-agent-{self.digest[:16]}"


@dataclass(frozen=True)
class PushedAgent:
    """The agent's executable on a device. ``already``: it was there and nothing was sent; ``answer``: what it
    said when it was asked."""

    path: str
    architecture: str
    digest: str
    bytes: int
    already: bool
    answer: dict[str, Any]


class _WrongFileError(Exception):
    """What is on the device is not the executable that was to be there; the text says how it shows."""


def device_architecture(transport: Transport) -> str:
    """The device's architecture, asked without an agent. Raises: StableError when ours has none for it."""
    said = transport.run(["uname", "-m"], timeout_s=_ANSWER_LIMIT_S)
    machine = said.stdout[:80].decode(errors="replace").strip()
    if not said.ok or machine not in MACHINES:
        raise StableError(
            f"there is no native agent for its architecture ({machine or said.error_text() or 'unknown'}).",
            f"The native agent runs on Linux on {', '.join(ARCHITECTURES)}; where the device has Python and "
            "PyTorch, write engine: torch in the inventory.",
            device=transport.device,
        )
    return MACHINES[machine]


def agent_file(architecture: str, device: str) -> AgentFile:
    """The agent for an architecture, built where it is missing. Raises: StableError naming ``device``."""
    try:
        path = build_agent(architecture)
    except ToolchainError as error:
        raise StableError(f"its agent cannot be built. {error.what}", error.remedy, device=device) from error
    data = path.read_bytes()
    return AgentFile(architecture, path, hashlib.sha256(data).hexdigest(), len(data))


def bring_agent(
    transport: Transport,
    spool: str,
    progress: Progress | None = None,
    *,
    file: AgentFile | None = None,
    asking: Sequence[str] = ("version",),
) -> PushedAgent:
    """Have the native agent on the device, pushed where it is missing; ``progress``: bytes sent. ``file``:
    the agent for this device; None: its architecture is asked. ``asking``: the words of a verb whose answer
    holds all that ``version`` says; asking it is how the executable is checked.

    An executable that arrives damaged is sent once more. Others that are there stay: the device may be
    another farm's (see ``remove_others``). Raises: DeviceError.
    """
    source = file or agent_file(device_architecture(transport), transport.device)
    path = source.place(spool)
    try:
        answer = _check(transport, path, source.digest, asking)
    except _WrongFileError as missing:
        _log.info("the agent is pushed", device=transport.device, cause=str(missing))
    else:
        return PushedAgent(path, source.architecture, source.digest, source.bytes, True, answer)
    cause = ""
    for _ in range(_TRIES):
        try:
            answer = _push(transport, source, path, asking, progress)
        except _WrongFileError as error:
            cause = str(error)
            _log.warning("the agent did not arrive whole", device=transport.device, cause=cause)
        else:
            return PushedAgent(path, source.architecture, source.digest, source.bytes, False, answer)
    raise StableError(
        f"the agent for {source.architecture} was sent twice and does not run there: {cause}",
        f"Check that {spool} is not mounted noexec and that its storage and the link keep data intact; "
        "set another workdir in the inventory if it is not.",
        device=transport.device,
    )


def _push(
    transport: Transport, source: AgentFile, path: str, asking: Sequence[str], progress: Progress | None
) -> dict[str, Any]:
    """Raises: _WrongFileError when what arrived is not what was sent, DeviceError."""
    partial = f"{path}.partial"
    transport.push(source.path, partial, progress=progress)
    _must(transport, "chmod", "755", partial)
    answer = _check(transport, partial, source.digest, asking)
    _must(transport, "mv", "-f", partial, path)
    return answer


def _check(transport: Transport, path: str, digest: str, asking: Sequence[str]) -> dict[str, Any]:
    """Start the executable and compare what it says of itself; all that it says.

    Raises: _WrongFileError; StableError when it is ours but speaks another protocol; TransientError.
    """
    try:
        said = transport.run([path, *asking], timeout_s=_ANSWER_LIMIT_S)
    except StableError as error:
        raise _WrongFileError(error.what) from error
    try:
        answer: dict[str, Any] = json.loads(said.stdout)
        stated, protocol = answer["agent_digest"], answer["protocol"]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        how = f"signal {-said.exit_code}" if said.exit_code < 0 else f"exit code {said.exit_code}"
        raise _WrongFileError(f"{path} gave no answer ({how}). {said.error_text()}".strip()) from error
    if stated != digest:
        raise _WrongFileError(f"{path} states the digest {str(stated)[:16]}, not {digest[:16]}.")
    if protocol != PROTOCOL_VERSION:
        raise StableError(
            f"its agent speaks protocol {str(protocol)[:40]}, this stifarm {PROTOCOL_VERSION}.",
            "Install stifarm again: its agent's sources and its Python code are of two versions.",
            device=transport.device,
        )
    return answer


def _must(transport: Transport, *argv: str) -> None:
    done = transport.run(argv, timeout_s=_ANSWER_LIMIT_S)
    if not done.ok:
        raise _WrongFileError(f"{' '.join(argv)} failed: {done.error_text() or done.exit_code}.")


def remove_others(transport: Transport, path: str) -> None:
    """Remove agents but the one at ``path``; one that still runs goes on (its file lives until it ends). The
    device must be ours: its agent has let a lease in. Raises: TransientError."""
    folder, _, name = path.rpartition("/")
    argv = ("find", folder, "-name", "stifarm-agent-*", "!", "-name", name, "-exec", "rm", "-f", "{}", "+")
    try:
        _must(transport, *argv)
    except _WrongFileError as error:
        _log.warning("older agents stay", device=transport.device, cause=str(error))
