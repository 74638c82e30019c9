"""Virtual phones: start, stop, reboot and authorise one. Its folder is all that has to be remembered.

A phone is a folder (its system and data, its spec, its log) and, while it is switched on, a supervisor
with the processes below it. Any process of the same user can change a phone that another one started:
what runs is noted in the folder. Where user namespaces are not allowed a phone is *plain*: an adb daemon
on a folder, with the machine's files and boot id; it cannot be rebooted.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import LabError
from orchestrator.lab.adbd.auth import add_line, offered_line
from orchestrator.lab.adbd.features import offer_of
from orchestrator.lab.adbd.server import listen
from orchestrator.lab.processes import END_LIMIT_S, end
from orchestrator.lab.userland import boot
from orchestrator.lab.userland.spec import (
    DELAY_FILE,
    KEYS,
    LOG_FILE,
    OFFERED_KEYS,
    STATE_FILE,
    SUPERVISOR_FILE,
    WORKDIR,
    PhoneSpec,
    load_spec,
    save_spec,
)
from orchestrator.lab.userland.supervisor import READY_LIMIT_S
from orchestrator.lab.userland.tree import make_tree
from orchestrator.processes import ProcessId, alive, identify
from orchestrator.transports import detach

__all__ = [
    "PhoneSpec",
    "RunningPhone",
    "authorize",
    "plain_because",
    "reboot",
    "running",
    "start",
    "stop",
    "unauthorize",
]

ARCHITECTURES = ("x86_64", "aarch64")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PAUSE_S = 0.05
_TRY_LIMIT_S = 60
_PACKAGES = Path(__file__).parents[2]


@dataclass(frozen=True)
class RunningPhone:
    """A phone that is switched on and answers. ``first``: its first process: all others die with it.

    ``workdir``: the folder for ours on it. ``plain``: it shares the machine's boot id and processes.
    """

    folder: Path
    address: str
    port: int
    supervisor: ProcessId
    first: ProcessId
    boot_id: str
    boots: int
    plain: bool
    workdir: str

    @property
    def endpoint(self) -> str:
        """What ``adb connect`` takes."""
        return f"{self.address}:{self.port}"


# ------------------------------------------------------------------ on, off


def start(spec: PhoneSpec, folder: Path, port: int = 0) -> RunningPhone:
    """Switch a phone on; its data of before stays. ``port`` 0: one that is free, kept across reboots.

    Raises: LabError when it cannot be, or is on already.
    """
    _check(spec)
    plain = plain_because()
    if spec.architecture != "x86_64" and (plain or not aarch64_emulator()):
        raise LabError(
            f"{spec.name}: a phone of {spec.architecture} needs "
            + (
                f"namespaces, and there are none: {plain}."
                if plain
                else "qemu-aarch64, which is not installed."
            ),
            "Install qemu-user, allow user namespaces, or take an x86_64 phone.",
        )
    if alive(_supervisor(folder)):
        raise LabError(f"{spec.name} is switched on already.", f"Stop the phone in {folder} first.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        make_tree(spec, folder)
        save_spec(spec, port or _free_port(spec.address), folder)
        (folder / DELAY_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise LabError(f"{spec.name}: its folder {folder} cannot be made: {error}.") from error
    supervisor = _launch(folder, plain=plain is not None)
    try:
        return _await(folder, spec, lambda: alive(supervisor))
    except LabError:
        stop(folder)
        raise


def stop(folder: Path) -> None:
    """Switch a phone off: no process and no mount of it is left; harmless when it is off.

    Raises: LabError when a process does not end.
    """
    supervisor, state = _supervisor(folder), _state(folder)
    if supervisor is not None and alive(supervisor):
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor.pid, signal.SIGTERM)
        _until(lambda: not alive(supervisor), END_LIMIT_S)
    end(supervisor)
    end(None if state is None else state.first)
    (folder / STATE_FILE).unlink(missing_ok=True)
    (folder / SUPERVISOR_FILE).unlink(missing_ok=True)


def reboot(folder: Path, delay_s: float = 0.0) -> None:
    """Cut a phone's power; it comes back after ``delay_s`` at the same address. Returns when it is off.

    Raises: LabError for a phone that is off, or plain.
    """
    state = running(folder)
    if state is None:
        raise LabError(f"The phone in {folder} is not switched on.", "Start it first.")
    if state.plain:
        raise LabError(
            f"The phone in {folder} cannot be rebooted: it has no processes of its own.",
            f"This machine allows no namespaces: {plain_because() or 'they came later; start it again'}.",
        )
    (folder / DELAY_FILE).write_text(f"{delay_s:g}")
    with contextlib.suppress(ProcessLookupError):
        os.kill(state.first.pid, signal.SIGKILL)
    if not _until(lambda: not alive(state.first), END_LIMIT_S):
        raise LabError(
            f"The processes of the phone in {folder} do not end.", "They wait for storage; try again."
        )


def running(folder: Path) -> RunningPhone | None:
    """The phone in a folder if it is switched on and answers; None when off or rebooting."""
    state = _state(folder)
    return state if state is not None and alive(state.supervisor) and alive(state.first) else None


# ------------------------------------------------------------ authorisation


def authorize(folder: Path, key: str | None = None) -> int:
    """Trust a host's key (a line of its adbkey.pub), or all that were offered; returns how many.

    Raises: LabError when ``key`` is none.
    """
    if key is None:
        offered = folder / OFFERED_KEYS
        lines = offered.read_text(errors="replace").splitlines() if offered.exists() else []
    else:
        line = offered_line(key.encode())
        if line is None:
            raise LabError("That is no public key of adb.", "Give the line in ~/.android/adbkey.pub.")
        lines = [line]
    for line in lines:
        add_line(folder / KEYS, line)
    return len(lines)


def unauthorize(folder: Path) -> None:
    """Trust nobody any more; hosts that are connected are cut off. Only for phones that ask (``secure``)."""
    (folder / KEYS).unlink(missing_ok=True)
    (folder / OFFERED_KEYS).unlink(missing_ok=True)


# -------------------------------------------------------------------- means


def plain_because() -> str | None:
    """Why phones are plain on this machine; None when they have namespaces. Really tries."""
    hidden = boot.hidden_by_phone()
    if hidden is not None:
        return f"{hidden} lies in a folder that phones have of their own"
    code = (
        "import os; from orchestrator.lab.userland import namespaces as n; n.become(0, 0);"
        " n.unshare(n.CLONE_NEWNS | n.CLONE_NEWPID); pid = os.fork();"
        " pid or n.mount('none', '/', flags=n.MS_REC | n.MS_PRIVATE);"
        " pid or n.mount('proc', '/proc', 'proc', n.MS_NOSUID | n.MS_NODEV | n.MS_NOEXEC);"
        " raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if pid else 0)"
    )
    tried = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=_environment(),
        capture_output=True,
        timeout=_TRY_LIMIT_S,
        check=False,
    )
    if tried.returncode == 0:
        return None
    said = tried.stderr.decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"a namespace could not be made (exit {tried.returncode})"


def aarch64_emulator() -> str | None:
    """The emulator that runs the agent of a 64-bit Arm phone; None where it is not installed."""
    return shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


# ------------------------------------------------------------------ private


def _check(spec: PhoneSpec) -> None:
    if _NAME.fullmatch(spec.name) is None or _NAME.fullmatch(spec.serial) is None:
        raise LabError(f"{spec.name!r}, serial {spec.serial!r}: letters, digits, '.', '_' and '-' only.")
    if spec.architecture not in ARCHITECTURES:
        raise LabError(
            f"{spec.name}: there are phones of {' and '.join(ARCHITECTURES)}, not {spec.architecture}."
        )
    if any("\n" in text for pair in spec.props.items() for text in (*pair, spec.model)):
        raise LabError(f"{spec.name}: a property is one line.")
    try:
        offer_of(spec.features)
    except ValueError as error:
        raise LabError(f"{spec.name}: {error}.") from error


def _environment() -> dict[str, str]:
    """Of the phone's processes: of ours only what Python needs to find the packages."""
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR", "LANG") if name in os.environ}
    return {**kept, "PYTHONPATH": str(_PACKAGES)}


def _launch(folder: Path, *, plain: bool) -> ProcessId:
    log = folder / LOG_FILE
    log.unlink(missing_ok=True)
    argv = [sys.executable, "-P", "-m", "orchestrator.lab.userland.supervisor", str(folder.absolute())]
    started = subprocess.run(
        [sys.executable, "-I", "-S", str(detach.__file__), str(log), *argv, *(["--plain"] if plain else [])],
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_TRY_LIMIT_S,
        check=False,
    )
    pid = int(started.stdout) if started.returncode == 0 else 0
    supervisor = identify(pid) if pid else None
    if supervisor is None:
        raise LabError(f"The phone in {folder} cannot be started.{_log_end(folder)}")
    (folder / SUPERVISOR_FILE).write_text(supervisor.model_dump_json())
    return supervisor


def _await(folder: Path, spec: PhoneSpec, coming: Callable[[], bool]) -> RunningPhone:
    deadline = time.monotonic() + READY_LIMIT_S
    while (state := running(folder)) is None:
        if not coming() or time.monotonic() > deadline:
            raise LabError(f"{spec.name} does not come up.{_log_end(folder)}", f"See {folder / LOG_FILE}.")
        time.sleep(_PAUSE_S)
    return state


def _until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE_S)
    return True


def _supervisor(folder: Path) -> ProcessId | None:
    """Who keeps the phone on, also while it reboots; it may have ended."""
    try:
        return ProcessId.model_validate_json((folder / SUPERVISOR_FILE).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LabError(f"The state of the phone in {folder} cannot be read: {error}.") from error


def _state(folder: Path) -> RunningPhone | None:
    try:
        values = json.loads((folder / STATE_FILE).read_text())
        spec, _ = load_spec(folder)
        return RunningPhone(
            folder=folder,
            address=spec.address,
            port=values["port"],
            supervisor=ProcessId.model_validate(values["supervisor"]),
            first=ProcessId.model_validate(values["first"]),
            boot_id=values["boot_id"],
            boots=values["boots"],
            plain=values["plain"],
            workdir=str(folder.absolute() / WORKDIR if values["plain"] else Path("/") / WORKDIR),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LabError(f"The state of the phone in {folder} cannot be read: {error}.") from error


def _free_port(address: str) -> int:
    with listen(address, 0) as listener:
        return int(listener.getsockname()[1])


def _log_end(folder: Path) -> str:
    with contextlib.suppress(OSError):
        text = (folder / LOG_FILE).read_text(errors="replace").strip()
        return f" Its log ends: {text[-500:]}" if text else ""
    return ""
