"""A virtual board: a real sshd in a machine of its own, one user, a key, host keys that are known."""

from __future__ import annotations

import os
import pwd
import socket
import time
from pathlib import Path

from orchestrator.errors import LabError
from orchestrator.lab import machine, net
from orchestrator.lab.launch import START_LIMIT_S, log_end
from orchestrator.lab.machine import MARK, Service
from orchestrator.lab.means import command, tool
from orchestrator.lab.state import DeviceState, Lab, LabState
from orchestrator.processes import alive

USER = "lab"
RATES: tuple[tuple[int | None, int | None], ...] = (
    (20_000_000, None),
    (None, 250),
    (5_000_000, 500),
    (80_000_000, 750),
)
"""(bytes/s read from storage, thousandths of a CPU) of the first board, the second, …; then again."""

_SSH_PORT = 22
_TRIES = 3


def new_board(lab: Lab, state: LabState, number: int, index: int) -> DeviceState:
    """The state of a board that is to be: ``number`` counts boards from 1, ``index`` devices from 0."""
    name = f"board-{number}"
    read, share = RATES[(number - 1) % len(RATES)]
    own = state.network is not None
    return DeviceState(
        name=name,
        kind="board",
        index=index,
        address=net.device_address(state.network, index) if state.network is not None else "127.0.0.1",
        port=_SSH_PORT if own else 0,
        user=USER if state.means.isolation != "none" else pwd.getpwuid(os.geteuid()).pw_name,
        workdir=f"{machine.site(lab, state, name)}/stifarm",
        read_bytes_per_s=read,
        cpu_share_milli=share,
    )


def start(lab: Lab, state: LabState, device: DeviceState) -> DeviceState:
    """Boot a board that is off and wait until its sshd answers. Raises: LabError."""
    _write_keys(lab, device)
    for attempt in range(1, _TRIES + 1):
        port = device.port if state.network is not None else _free_port()
        device = lab.update(device.name, backend_port=port)
        sshd = _write_config(lab, state, device, port)
        device = machine.start(
            lab,
            state,
            device,
            [Service(sshd)],
            owner=machine.owner(state, device),
            steps=_steps(lab, state, device),
        )
        try:
            _await_ssh(lab, state, device, port)
            break
        except LabError:
            machine.stop(lab, state, device)
            if attempt == _TRIES or state.network is not None:
                raise  # else another program may have taken the port before sshd did
    if state.network is None:
        device = machine.start_link(lab, device)
        machine.write_link(lab, device)
    return device


def host_key_lines(lab: Lab, device: DeviceState) -> str:
    """The board's line of known_hosts."""
    key = (lab.device_folder(device.name) / "host_key.pub").read_text().split()
    where = device.address if device.port == _SSH_PORT else f"[{device.address}]:{device.port}"
    return f"{where} {key[0]} {key[1]}\n"


def make_key(path: Path) -> None:
    """An ed25519 key pair without a passphrase, unless it is there. Raises: LabError."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        words = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "stifarm-lab", "-f", str(path))
        command(words, f"no key can be made in {path}")


def authorized_keys(lab: Lab, name: str) -> Path:
    """The keys that a board accepts, as this process reaches them."""
    return lab.device_folder(name) / "keys" / "authorized_keys"


# ------------------------------------------------------------------ inner


def _write_keys(lab: Lab, device: DeviceState) -> None:
    make_key(lab.key)
    make_key(lab.device_folder(device.name) / "host_key")
    accepted = authorized_keys(lab, device.name)
    accepted.parent.mkdir(exist_ok=True)
    if not accepted.exists():
        accepted.write_text(lab.key.with_suffix(".pub").read_text())


def _write_config(lab: Lab, state: LabState, device: DeviceState, port: int) -> tuple[str, ...]:
    """Write sshd's configuration and return its argv."""
    folder, isolation = lab.device_folder(device.name), state.means.isolation
    keys = "/run/lab/authorized_keys" if isolation == "root" else str(authorized_keys(lab, device.name))
    options = {
        "Port": port,
        "ListenAddress": device.address,
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": keys,
        "PidFile": "none",
        "StrictModes": "no",  # the folders above belong to root, or to nobody in a user's namespace
        "UsePAM": "no",
        "AuthenticationMethods": "publickey",
        "AllowUsers": device.user,
        "PermitUserRC": "no",
        "AllowTcpForwarding": "no",
        "X11Forwarding": "no",
        "PrintMotd": "no",
        "UseDNS": "no",
        "MaxStartups": 100,
        "MaxSessions": 100,
        "SetEnv": f"{MARK}={lab.id}/{device.name}",
        "Subsystem": "sftp internal-sftp",
    }
    path = folder / "sshd_config"
    path.write_text("".join(f"{key} {value}\n" for key, value in options.items()))
    argv: tuple[str, ...] = (tool("sshd"), "-D", "-e", "-f", str(path))
    if isolation == "user":
        # Not as the namespace's root: sshd would give privileges up to users that do not exist there.
        argv = ("unshare", "--user", f"--map-user={os.geteuid()}", f"--map-group={os.getegid()}", "--", *argv)
    return argv


def _steps(lab: Lab, state: LabState, device: DeviceState) -> list[list[str]]:
    """Steps of the start: the board's user, and what sshd needs to find."""
    if state.means.isolation == "none":
        return []
    folder, uid = lab.device_folder(device.name), machine.owner(state, device)
    gid = uid if state.means.isolation == "root" else os.getegid()
    home = machine.site(lab, state, device.name)
    lines = [f"{USER}:x:{uid}:{gid}::{home}:/bin/sh"]
    if state.means.isolation == "root":
        lines = [":".join(map(str, pwd.getpwuid(0))), f"sshd:x:{65534}:{65534}::/run/sshd:/bin/false", *lines]
    (folder / "passwd").write_text("\n".join(lines) + "\n")
    steps = [["mount", "--bind", str(folder / "passwd"), "/etc/passwd"]]
    if state.means.isolation == "root":
        steps += [
            ["mount", "-t", "tmpfs", "-o", "mode=755,size=1m", "lab", "/run"],
            ["mkdir", "-m", "755", "/run/sshd", "/run/lab"],
            ["mount", "--bind", str(folder / "keys"), "/run/lab"],
        ]
    return steps


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_ssh(lab: Lab, state: LabState, device: DeviceState, port: int) -> None:
    """Wait for sshd's first line. Raises: LabError when the board ends or it never comes."""
    deadline = time.monotonic() + START_LIMIT_S
    log = machine.log_file(lab, device.name)
    while not _answers(device.address, port):
        if not alive(device.process):
            raise LabError(f"{device.name}: its sshd ended.{log_end(log)}", f"See {log}.")
        if time.monotonic() > deadline:
            raise LabError(
                f"{device.name} does not answer on {device.address}:{port}.{log_end(log)}",
                "A firewall of this machine may forbid it; else see its log.",
            )
        time.sleep(0.05)


def _answers(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=10) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False
