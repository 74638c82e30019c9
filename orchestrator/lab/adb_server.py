"""The lab's own adb server: on a free loopback port, with a home and a key of the lab's. Others stay."""

from __future__ import annotations

import importlib.resources
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from orchestrator.errors import LabError
from orchestrator.lab import gate
from orchestrator.lab.launch import START_LIMIT_S, Launch, log_end
from orchestrator.lab.processes import end
from orchestrator.lab.state import AdbServerState, Lab, LabState
from orchestrator.processes import alive

_TRIES = 3
_LIMIT_S = 60


def program() -> str:
    """The adb that adbutils brings where it runs here, else the system's. Raises: LabError."""
    bundled = importlib.resources.files("adbutils.binaries") / "adb"
    for path in (str(bundled), shutil.which("adb") or ""):
        if path and os.access(path, os.X_OK):
            return path
    raise LabError("The lab's phones need adb, which is not installed.", "Install the system's package adb.")


def public_key(lab: Lab) -> Path:
    """The key that the lab's phones accept; made on first use. Raises: LabError."""
    key = lab.adb_home / ".android" / "adbkey"
    if not key.with_suffix(".pub").exists():
        key.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [program(), "keygen", str(key)], env=_environment(lab), capture_output=True, timeout=_LIMIT_S
        )
        if done.returncode != 0 or not key.with_suffix(".pub").exists():
            raise LabError(f"No adb key can be made: {done.stderr.decode(errors='replace').strip()}.")
    return key.with_suffix(".pub")


def start(lab: Lab, state: LabState) -> LabState:
    """Run the server, on its port of before if that is free. Raises: LabError."""
    if state.adb is not None and alive(state.adb.process):
        return state
    public_key(lab)
    ports = [state.adb.port] if state.adb is not None else []
    for port in (*ports, *(0,) * _TRIES):
        state = _try(lab, state, port or free_port())
        if state.adb is not None and _answers(state.adb):
            return state
        _end(lab, state)
    log = lab.adb_home / "log"
    raise LabError(f"The lab's adb server does not start.{log_end(log)}", f"See {log}.")


def stop(lab: Lab, state: LabState) -> LabState:
    """End the server, if it is ours that runs."""
    return _end(lab, state)


def free_port() -> int:
    """A loopback port that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _try(lab: Lab, state: LabState, port: int) -> LabState:
    argv = (program(), "-L", f"tcp:{port}", "server", "nodaemon")
    wrapped = (sys.executable, "-I", "-S", str(gate.__file__), "--", *argv)
    with Launch(wrapped, lab.adb_home / "log", _environment(lab)) as launch:
        state = state.model_copy(update={"adb": AdbServerState(process=launch.process, port=port)})
        lab.save(state)
        launch.expect("here")
        launch.tell()
    return state


def _end(lab: Lab, state: LabState) -> LabState:
    if state.adb is None:
        return state
    end(state.adb.process)
    state = state.model_copy(update={"adb": state.adb.model_copy(update={"process": None})})
    lab.save(state)
    return state


def _answers(adb: AdbServerState) -> bool:
    """Wait until the server answers; False when it ends instead, or never does."""
    deadline = time.monotonic() + START_LIMIT_S
    while alive(adb.process) and time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", adb.port), timeout=10) as link:
                link.sendall(b"000chost:version")
                if link.recv(4) == b"OKAY" and alive(adb.process):
                    return True
        except OSError:
            pass  # not yet
        time.sleep(0.05)
    return False


def _environment(lab: Lab) -> dict[str, str]:
    """No USB device and no emulator of the user's is taken, and no key of theirs is offered."""
    return {
        "HOME": str(lab.adb_home),
        "ANDROID_USER_HOME": str(lab.adb_home / ".android"),
        "TMPDIR": str(lab.adb_home),
        "ADB_VENDOR_KEYS": str(lab.adb_home / ".android" / "adbkey"),
        "ADB_USB": "0",
        "ADB_EMU": "0",
        "ADB_MDNS": "0",
        "ADB_MDNS_OPENSCREEN": "0",
    }
