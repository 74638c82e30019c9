"""Doctor's findings about this host: what the farm itself needs to run here."""

from __future__ import annotations

import ipaddress
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib import util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.discovery import Found, ask_server, how_to_end, servers_of
from orchestrator.doctor import LITTLE_SPACE_BYTES, NO_SPACE_BYTES, Finding
from orchestrator.errors import DeviceError
from orchestrator.inventory import Device
from orchestrator.transports.adb_own import find_adb, listens
from orchestrator.transports.adb_server import server_address
from orchestrator.transports.adb_socket import ServerAddress
from sti_runtime.units import format_bytes


def host_findings(home: Path, devices: Sequence[Device], environment: Mapping[str, str]) -> list[Finding]:
    """Everything looked at; nothing is started or changed."""
    transports = {device.transport for device in devices}
    found = [_compiler(), _ray(), _disk(home)]
    found += _adb(devices, environment)
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


def exposed_at(host: str) -> list[Finding]:
    """That a node which was told to be at an IPv4 address can be reached at others, too."""
    if ipaddress.ip_address(host).is_loopback:
        return []
    return [
        Finding(
            "Ray",
            "note",
            "its servers listen on all addresses of this machine, whichever was given: it has no other way",
            "Keep others out with a firewall (docs/hosts.md, Ports and firewall). To join takes the token.",
        )
    ]


def _disk(home: Path) -> Finding:
    free = shutil.disk_usage(next(part for part in (home, *home.parents) if part.exists())).free
    state = "problem" if free < NO_SPACE_BYTES else "note" if free < LITTLE_SPACE_BYTES else "ok"
    remedy = "" if state == "ok" else "Free some space."
    return Finding("disk", state, f"{format_bytes(free)} free below {home}", remedy)


def _adb(devices: Sequence[Device], environment: Mapping[str, str]) -> list[Finding]:
    """Every adb server that the inventory names, and the usual one where it runs, with what they list."""
    usual, *others = servers_of(devices, environment)
    named = {server_address(d.adb_server, environment) for d in devices if d.transport == "adb"}
    found = []
    if usual in named or listens(usual):
        found = _usual_server(usual, devices, environment)
    return found + [finding for address in others for finding in _adb_server(address, devices, environment)]


def _usual_server(
    address: ServerAddress, devices: Sequence[Device], environment: Mapping[str, str]
) -> list[Finding]:
    """The server at adb's default address: the only one that the farm would start."""
    if not address.local or listens(address):
        return _adb_server(address, devices, environment)
    if find_adb() is None:
        return [Finding("adb", "problem", f"no server at {address}, and no adb to start one with",
                        "Install adb, or stifarm again: its package adbutils brings one.")]  # fmt: skip
    return [no_server(address)]


def no_server(address: ServerAddress) -> Finding:
    """Nothing listens at adb's default address."""
    return Finding("adb", "ok", f"no server at {address}; one is started when a device needs it")


def server_started(address: ServerAddress) -> Finding:
    """One was started there, by this command."""
    return Finding("adb", "ok", f"a server was started at {address}, and stays", how_to_end(address))


def _adb_server(
    address: ServerAddress, devices: Sequence[Device], environment: Mapping[str, str]
) -> list[Finding]:
    """One server and what it lists; it is not started."""
    try:
        listed = ask_server(address, devices, environment)
    except DeviceError as error:
        return [Finding("adb", "problem", error.what.removeprefix(f"{error.device}: "), error.remedy)]
    usual = address == server_address(None, environment)
    whose = (
        "the usual one" if usual else f"named in the inventory, for {_users(address, devices, environment)}"
    )
    listing = f"{len(listed)} device{'' if len(listed) == 1 else 's'} listed"
    answers = Finding("adb", "ok", f"server {address} ({whose}) answers, {listing}; it is used as it is")
    return [answers, *(finding for one in listed for finding in _phone(one))]


def _users(address: ServerAddress, devices: Sequence[Device], environment: Mapping[str, str]) -> str:
    """The devices that are reached through a server."""
    return ", ".join(
        device.name
        for device in devices
        if device.transport == "adb" and server_address(device.adb_server, environment) == address
    )


def _phone(one: Found) -> list[Finding]:
    """A device that is listed and cannot be used, or that the inventory lacks."""
    called = " ".join(part for part in (one.model, one.serial) if part)
    if one.name is not None:
        return [Finding(one.name, "problem", one.what, one.remedy)] if one.what else []
    if one.what:
        return [Finding(called, "note", f"plugged in, not in the inventory: {one.what}", one.remedy)]
    remedy = "To use it, add the lines that stifarm devices discover prints."
    return [Finding(called, "note", "plugged in, not in the inventory", remedy)]


def _ssh_agent(environment: Mapping[str, str]) -> Finding:
    path = environment.get("SSH_AUTH_SOCK", "")
    if not path:
        return Finding("ssh agent", "ok", "none; keys are read from files")
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding("ssh agent", "note", f"SSH_AUTH_SOCK names {path}, which is not there",
                       "Start ssh-agent again, or unset SSH_AUTH_SOCK.")  # fmt: skip
    return Finding("ssh agent", "ok", f"at {path}")
