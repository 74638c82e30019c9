"""The adb server that we started: where it is noted, starting it, and replacing it when it hangs.

It is at adb's default address, so others use it as well, like Android Studio. It is ended only when it hangs,
which means that the simplest question stays without an answer for long: a caller's deadline may be short, and
a service of the server may take its time.
"""

from __future__ import annotations

import fcntl
import importlib.resources
import json
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from orchestrator.errors import StableError
from orchestrator.transports.adb_socket import AdbSocket, ProtocolError, RefusalError, ServerAddress
from orchestrator.transports.local import LocalTransport

HANGS_S = 10.0
_START_S = 30.0
_PASSED_ON = re.compile(r"(ANDROID|ADB|XDG)_.*")

_log = structlog.get_logger()


class OwnServer:
    """The server at an address where we may start one, on behalf of a device, whose name errors carry.
    ``hangs_s``: for how long it answers nothing when it hangs."""

    def __init__(self, address: ServerAddress, device: str, hangs_s: float = HANGS_S) -> None:
        self._address, self._device, self._hangs_s = address, device, hangs_s

    def pid(self) -> int | None:
        """The process of the server that we started, where it still runs; None also where another has the
        address."""
        return _live_pid(_record(self._address))

    def mend(self, error: Exception, before: int | None) -> bool:
        """Whether another try may succeed: a missing server was started, a hung one of ours replaced, by us
        or by another thread or process. ``before``: the process of our server when the try began."""
        try:
            return self._mended(error, before)
        except OSError as problem:
            raise self._cannot_start(problem) from problem

    def _cannot_start(self, problem: OSError) -> StableError:
        return StableError(
            f"no adb server can be started: {problem.filename or problem}: {problem.strerror}.",
            "Make the folder writable (XDG_STATE_HOME names another), or start one:"
            f" {adb_word()} -P {self._address.port} start-server.",
            device=self._device,
        )

    def _mended(self, error: Exception, before: int | None) -> bool:
        trouble: Exception = error
        if isinstance(error, TimeoutError):
            if before is None:
                return False  # not ours
            found = _trouble(self._address, self._hangs_s)
            if found is None:
                return self.pid() != before  # the one that was asked has been replaced meanwhile
            trouble = found
        if not isinstance(trouble, TimeoutError | EOFError | ConnectionError):
            return False
        with _locked(self._address) as record:
            # Whoever had the lock before may have replaced it: the new one has done nothing wrong.
            if isinstance(trouble, TimeoutError) and before is not None and _live_pid(record) == before:
                _log.warning(
                    "the adb server that we started hangs and is replaced; other programs that use it"
                    " lose their connections, too",
                    address=str(self._address),
                    pid=before,
                    silent_s=self._hangs_s,
                )
                os.kill(before, signal.SIGKILL)
                self._await(lambda: not listens(self._address))
            if not listens(self._address):
                self._start(record)
        return True

    def replace(self) -> bool:
        """End the server that we started and start it anew; False when it is none of ours.

        Raises: StableError when none can be started.
        """
        pid = self.pid()
        if pid is None:
            return False
        try:
            with _locked(self._address) as record:
                if _live_pid(record) == pid:  # else another has just replaced it
                    _log.warning(
                        "the adb server that we started is replaced", address=str(self._address), pid=pid
                    )
                    os.kill(pid, signal.SIGKILL)
                    self._await(lambda: not listens(self._address))
                    self._start(record)
        except OSError as problem:
            raise self._cannot_start(problem) from problem
        return True

    def _start(self, record: Path) -> None:
        """Start a server of our own, in the foreground mode of adb: that mode ends no other."""
        program = find_adb()
        if program is None:
            raise StableError(
                f"no adb server runs at {self._address}, and there is no adb to start one with.",
                "Install adb (on Debian: apt install adb), or set ADBUTILS_ADB_PATH to it.",
                device=self._device,
            )
        log = record.with_suffix(".log")
        log.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)}
        port = str(self._address.port)
        local = LocalTransport(self._device)
        pid = local.start_detached([program, "-P", port, "nodaemon", "server"], log=str(log), env=environment)
        record.write_text(json.dumps({"pid": pid, "start_ticks": _start_ticks(pid)}))
        self._await(lambda: listens(self._address) or _start_ticks(pid) is None)
        if not listens(self._address):
            record.unlink()
            said = log.read_text(errors="replace").strip()[-300:] if log.exists() else ""
            raise StableError(
                f"no adb server runs at {self._address}, and {program} starts none:"
                f" {said or 'it is silent'}.",
                f"Start one by hand to see why: {shlex.quote(program)} -P {port} nodaemon server.",
                device=self._device,
            )
        _log.info("an adb server was started", address=str(self._address), program=program, pid=pid)

    def _await(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_S
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)


def find_adb() -> str | None:
    """The adb to start a server with: the one a variable names, adbutils' own, the system's."""
    bundled = str(importlib.resources.files("adbutils.binaries") / "adb")
    for path in (os.environ.get("ADBUTILS_ADB_PATH"), bundled, shutil.which("adb")):
        if path and os.access(path, os.X_OK):
            return path
    return None


def adb_word() -> str:
    """What a command for people begins with: adb where the PATH has it, else the one that is started here."""
    return "adb" if shutil.which("adb") else shlex.quote(find_adb() or "adb")


def listens(address: ServerAddress) -> bool:
    """Whether something listens there."""
    try:
        AdbSocket(address, 1).close()
    except TimeoutError:
        return True  # the kernel refuses at once where nothing does; this one takes no more connections
    except OSError:
        return False
    return True


def _trouble(address: ServerAddress, limit_s: float) -> Exception | None:
    """Why a server has not answered the simplest question within that time; None: it has."""
    deadline = time.monotonic() + limit_s
    trouble: Exception = TimeoutError("timed out")
    while isinstance(trouble, TimeoutError) and (left := deadline - time.monotonic()) > 0:
        try:
            with AdbSocket(address, left) as link:
                link.request(b"host:version")
        except (RefusalError, ProtocolError):
            return None
        except (OSError, EOFError) as error:
            trouble = error  # a connection alone has less time than that
        else:
            return None
    return trouble


def _record(address: ServerAddress) -> Path:
    """Where the server that we started is noted; the file need not be there."""
    home = os.environ.get("XDG_STATE_HOME")
    folder = (Path(home) if home else Path.home() / ".local/state") / "stifarm"
    return folder / f"adb-server-{address.port}.json"


@contextmanager
def _locked(address: ServerAddress) -> Iterator[Path]:
    """That record, locked: several threads and processes may find no server at once, or one that hangs."""
    record = _record(address)
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield record


def _live_pid(record: Path) -> int | None:
    """The process of the server that we started, where it still runs."""
    try:
        said = json.loads(record.read_text())
        pid, ticks = int(said["pid"]), int(said["start_ticks"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid if _start_ticks(pid) == ticks else None  # another process may have its number by now


def _start_ticks(pid: int) -> int | None:
    """When a live process started. Source: proc_pid_stat(5), fields 3 and 22."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[19]) if fields[0] not in "ZX" else None
