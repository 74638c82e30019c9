"""Doctor's findings about this host: what the farm itself needs to run here."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from importlib import util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.doctor import LITTLE_SPACE_BYTES, Finding
from orchestrator.inventory import Device
from sti_runtime.units import format_bytes

ADB_PORT = 5037
_CONNECT_LIMIT_S = 2.0


def host_findings(home: Path, devices: Sequence[Device], environment: Mapping[str, str]) -> list[Finding]:
    """Everything looked at; nothing is started or changed."""
    transports = {device.transport for device in devices}
    found = [_compiler(), _ray(), _disk(home)]
    if "adb" in transports:
        found.append(_adb_server(environment))
    if "ssh" in transports:
        found.append(_ssh_agent(environment))
    return found


def _compiler() -> Finding:
    if util.find_spec("ziglang") is None:
        return Finding("compiler", "problem", "the Python package ziglang is not installed",
                       "Install stifarm again, or: pip install ziglang")  # fmt: skip
    return Finding("compiler", "ok", f"ziglang {version('ziglang')}: builds the agent for every architecture")


def _ray() -> Finding:
    try:
        return Finding("Ray", "ok", f"ray {version('ray')}")
    except PackageNotFoundError:
        return Finding("Ray", "problem", "the Python package ray is not installed", "Install stifarm again.")


def _disk(home: Path) -> Finding:
    free = shutil.disk_usage(home).free
    if free < LITTLE_SPACE_BYTES:
        return Finding("disk", "note", f"{format_bytes(free)} free below {home}", "Free some space.")
    return Finding("disk", "ok", f"{format_bytes(free)} free below {home}")


def _adb_server(environment: Mapping[str, str]) -> Finding:
    """Source: adb's manual, environment: ANDROID_ADB_SERVER_PORT."""
    given = environment.get("ANDROID_ADB_SERVER_PORT", "")
    port = int(given) if given.isascii() and given.isdecimal() and 0 < int(given) < 1 << 16 else ADB_PORT
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_CONNECT_LIMIT_S):
            return Finding("adb", "ok", f"a server answers on port {port}; it is used as it is")
    except OSError:
        if shutil.which("adb") is None and util.find_spec("adbutils") is None:
            return Finding("adb", "problem", f"no server on port {port}, and no adb to start one with",
                           "Install adb, or stifarm again: its package adbutils brings one.")  # fmt: skip
        return Finding("adb", "ok", f"no server on port {port}; one is started when a device needs it")


def _ssh_agent(environment: Mapping[str, str]) -> Finding:
    path = environment.get("SSH_AUTH_SOCK", "")
    if not path:
        return Finding("ssh agent", "ok", "none; keys are read from files")
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding("ssh agent", "note", f"SSH_AUTH_SOCK names {path}, which is not there",
                       "Start ssh-agent again, or unset SSH_AUTH_SOCK.")  # fmt: skip
    return Finding("ssh agent", "ok", f"at {path}")
