"""Where an ssh device is and who logs in: the inventory's word first, then the user's ssh configuration."""

from __future__ import annotations

import getpass
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import StableError
from orchestrator.transports.ssh_config import read_configuration, said_of

if TYPE_CHECKING:
    import paramiko

    from orchestrator.inventory import Device

DEFAULT_PORT = 22
SYSTEM_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")
DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")

_ADDRESS = re.compile(r"((?P<user>[^@]+)@)?(\[(?P<six>[^\]]+)\]|(?P<host>[^:]+))(:(?P<port>[0-9]+))?")


@dataclass(frozen=True)
class Endpoint:
    """A server and how to log in there.

    ``alias``: the name it has in known hosts files; ``key_files``: tried in this order; ``own_keys``: whether
    somebody named them, so that a missing one is an error; ``agent``: whether the ssh-agent's keys are tried
    too; ``jump``: the server to go through.
    """

    host: str
    port: int
    user: str
    alias: str
    key_files: tuple[Path, ...]
    own_keys: bool
    agent: bool
    known_hosts: tuple[Path, ...]
    jump: Endpoint | None

    def __str__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}"


def endpoint_of(device: Device, home: Path | None = None) -> Endpoint:
    """The endpoint of a validated device. Raises: StableError (the ssh configuration cannot be used)."""
    assert device.address is not None
    folder = (home or Path.home()) / ".ssh"
    config = read_configuration(folder / "config", device.name)
    return _endpoint(device, device.address, config, folder, jumps=8)


def _endpoint(
    device: Device,
    address: str,
    config: paramiko.SSHConfig,
    folder: Path,
    jumps: int,
    through: str | None = None,
) -> Endpoint:
    """``through``: the servers on the way, instead of those that the configuration names for this one."""
    match = _ADDRESS.fullmatch(address.strip().removeprefix("ssh://"))
    if match is None or jumps == 0:
        raise StableError(f"{address!r} is no address.", "Give [user@]host[:port].", device=device.name)
    host = match["six"] or match["host"]
    said = said_of(config, host, folder / "config", device.name)
    if through is None and (said.get("proxycommand") or "none").lower() != "none":
        raise StableError(
            f"the ssh configuration reaches {host} by a ProxyCommand, which is not supported.",
            f"Use ProxyJump for it in {folder / 'config'}.",
            device=device.name,
        )
    files = tuple(Path(name) for name in said.get("identityfile", ()))
    if device.key_file is not None:
        files = (device.key_file,)
    hosts = tuple(Path(name).expanduser() for name in said.get("userknownhostsfile", "").split())
    hosts = hosts or (folder / "known_hosts", SYSTEM_KNOWN_HOSTS)
    # Each of a list is reached through those before it. Source: ssh_config(5), ProxyJump.
    before, _, jump = (through or said.get("proxyjump", "none")).rpartition(",")
    return Endpoint(
        host=said.get("hostname", host),
        port=int(match["port"] or said.get("port", DEFAULT_PORT)),
        user=match["user"] or said.get("user") or getpass.getuser(),
        alias=said.get("hostkeyalias", ""),
        key_files=files or tuple(folder / name for name in DEFAULT_KEYS),
        own_keys=bool(files),
        agent=said.get("identitiesonly", "no").lower() != "yes",
        known_hosts=hosts if device.known_hosts is None else (device.known_hosts,),
        jump=None
        if jump.lower() == "none"
        else _endpoint(device, jump, config, folder, jumps - 1, before or None),
    )
