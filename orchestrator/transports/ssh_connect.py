"""Making an ssh connection: the socket, the check of the host key, logging in, and noticing a dead link."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import re
import shlex
import socket
import threading
import time

import paramiko
from paramiko.channel import Channel
from paramiko.ssh_exception import IncompatiblePeer

from orchestrator.errors import LinkError, StableError
from orchestrator.transports.ssh_address import DEFAULT_PORT, SYSTEM_KNOWN_HOSTS, Endpoint
from orchestrator.transports.ssh_channels import ChannelTransport
from orchestrator.transports.ssh_keys import log_in
from orchestrator.transports.ssh_known_hosts import KnownKey, fingerprint, read_known_hosts, recorded_name

CONNECT_S = 15.0
SILENCE_S = 15.0
"""A link is asked for a sign of life when it was quiet for half of this, and dead when it does not answer for
all of it."""

_HANDSHAKE_S = 60.0
_WINDOW_BYTES = 8 << 20
_ALGORITHMS = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256")}
_KEY_FILES = {"ssh-ed25519": "ed25519", "ssh-rsa": "rsa"}

# All that it has to say is in the errors raised here.
logging.getLogger("paramiko").addHandler(logging.NullHandler())


class Link:
    """A socket that counts its bytes and fails when a question had no answer for ``silence_s``."""

    def __init__(self, inner: socket.socket | Channel, silence_s: float) -> None:
        self._inner, self.silence_s = inner, silence_s
        self._heard, self._asked = time.monotonic(), math.inf
        self.sent_bytes = self.received_bytes = 0
        self._closed = False  # paramiko looks at it, as a socket has it

    @property
    def silent_s(self) -> float:
        """Seconds since anything was received."""
        return time.monotonic() - self._heard

    def asking(self) -> None:
        """Something is about to be asked that every living server answers."""
        self._asked = min(self._asked, time.monotonic())

    def send(self, data: bytes) -> int:
        """As of a socket."""
        try:
            sent = self._inner.send(data)
        except TimeoutError:
            self._check()
            raise
        self.sent_bytes += sent
        return sent

    def recv(self, size: int) -> bytes:
        """As of a socket."""
        try:
            data = self._inner.recv(size)
        except TimeoutError:
            self._check()
            raise
        self._heard, self._asked = time.monotonic(), math.inf
        self.received_bytes += len(data)
        return data

    def close(self) -> None:
        """As of a socket."""
        self._closed = True
        self._inner.close()

    def settimeout(self, timeout_s: float | None) -> None:
        """As of a socket."""
        self._inner.settimeout(timeout_s)

    def _check(self) -> None:
        if time.monotonic() - self._asked > self.silence_s:
            raise ConnectionResetError(errno.ECONNRESET, f"nothing was heard for {self.silence_s:g} s")


class Connection:
    """An authenticated connection to one board. It ends by ``close`` or when the link dies."""

    def __init__(self, transport: paramiko.Transport, link: Link, below: Connection | None) -> None:
        self.transport, self.link = transport, link
        self._below = below
        self._ended = threading.Event()
        threading.Thread(target=self._ask, name="ssh-keepalive", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it can be used."""
        return not self._ended.is_set() and self.transport.is_active()

    def close(self) -> None:
        """End it; every channel of it ends too."""
        self._ended.set()
        self.transport.close()
        if self._below is not None:
            self._below.close()

    def cause(self) -> str:
        """Why it ended, for messages."""
        error = self.transport.get_exception()
        return str(error) if error is not None and str(error) else "it was closed"

    def _ask(self) -> None:
        quiet_s = self.link.silence_s / 2
        while not self._ended.wait(quiet_s) and self.transport.is_active():
            if self.link.silent_s >= quiet_s:
                self.link.asking()
                try:
                    self.transport.global_request(
                        "keepalive@openssh.com"
                    )  # every server answers, if only "no"
                except (OSError, EOFError, paramiko.SSHException):
                    break  # the link has ended: whoever uses it learns why
        self._ended.set()


def open_connection(endpoint: Endpoint, device: str, silence_s: float = SILENCE_S) -> Connection:
    """Connect, check the host key, log in.

    Raises: StableError (no such host, an unknown or changed host key, no key that is taken), LinkError.
    """
    below = None if endpoint.jump is None else open_connection(endpoint.jump, device, silence_s)
    with contextlib.ExitStack() as made:
        if below is not None:
            made.callback(below.close)
        link = Link(_socket(endpoint, device, below), silence_s)
        made.callback(link.close)
        transport = ChannelTransport(link, default_window_size=_WINDOW_BYTES)  # type: ignore[arg-type]
        made.callback(transport.close)
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = _HANDSHAKE_S
        _greet(transport, endpoint, device)
        log_in(transport, endpoint, device)
        made.pop_all()
    return Connection(transport, link, below)


def _socket(endpoint: Endpoint, device: str, below: Connection | None) -> socket.socket | Channel:
    where = (endpoint.host, endpoint.port)
    try:
        if below is not None:
            return below.transport.open_channel("direct-tcpip", where, ("", 0), timeout=CONNECT_S)
        opened = socket.create_connection(where, timeout=CONNECT_S)
    except socket.gaierror as error:
        kind = LinkError if error.errno == socket.EAI_AGAIN else StableError
        raise kind(
            f"the name {endpoint.host} is not known: {error.strerror}.",
            "Check the address in the inventory and the name service of this host.",
            device=device,
        ) from error
    except (OSError, paramiko.SSHException) as error:
        cause = getattr(error, "strerror", None) or str(error) or "no answer"
        raise LinkError(
            f"no connection to {endpoint.host} port {endpoint.port}: {cause}.",
            "Check that the board is on, on the network, and runs an ssh server on that port.",
            device=device,
        ) from error
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return opened


def _greet(transport: paramiko.Transport, endpoint: Endpoint, device: str) -> None:
    """The handshake, and the check of the server's key. Raises: StableError, LinkError."""
    name = recorded_name(endpoint.alias or endpoint.host, DEFAULT_PORT if endpoint.alias else endpoint.port)
    try:
        known = read_known_hosts(endpoint.known_hosts, name)
        bare = read_known_hosts(endpoint.known_hosts, recorded_name(endpoint.host, DEFAULT_PORT))
    except OSError as error:
        raise StableError(
            f"{error.filename} cannot be read: {error.strerror}.", "Correct its permissions.", device=device
        ) from error
    options = transport.get_security_options()
    # First the kinds that are recorded: a server has a key of several kinds.
    first = [kind for key in (*known, *bare) for kind in _ALGORITHMS.get(key.kind, (key.kind,))]
    options.key_types = tuple(sorted(options.key_types, key=lambda kind: kind not in first))
    # One pass over the data instead of two, where both sides have it.
    options.ciphers = tuple(sorted(options.ciphers, key=lambda name: "gcm" not in name))
    try:
        transport.start_client(timeout=_HANDSHAKE_S)
    except IncompatiblePeer as error:
        raise StableError(
            f"{endpoint.host} port {endpoint.port} and this host have no method in common: {error}.",
            "Update the ssh server of the board.",
            device=device,
        ) from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise LinkError(
            f"{endpoint.host} port {endpoint.port} does not greet as an ssh server:"
            f" {str(error) or 'it closed the connection'}.",
            "Check that this is its ssh port, and the server's log on the board.",
            device=device,
        ) from error
    key = transport.get_remote_server_key()
    _check_host_key(key.get_name(), key.asbytes(), known, bare, endpoint, name, device)


def scan_command(endpoint: Endpoint, kind: str) -> str:
    """The command that records a server's key; the key is asked for where the server can be reached from."""
    words = ["ssh-keyscan", "-t", kind, "-p", str(endpoint.port), endpoint.host]
    if endpoint.jump is not None:
        words = [*_ssh(endpoint.jump), str(endpoint.jump).rpartition(":")[0], *words]
    renamed = ""
    if endpoint.alias:
        replacement = re.sub(r"[\\/&]", r"\\\g<0>", endpoint.alias)
        renamed = " | sed " + shlex.quote(f"s/^[^ ]*/{replacement}/")
    return f"{shlex.join(words)}{renamed} >> {shlex.quote(str(endpoint.known_hosts[0]))}"


def _ssh(endpoint: Endpoint) -> list[str]:
    """An ssh client's arguments, up to the destination, that reach a server as we do."""
    words = ["ssh", "-p", str(endpoint.port)]
    for path in endpoint.key_files if endpoint.own_keys else ():
        words += ["-i", str(path)]
    if SYSTEM_KNOWN_HOSTS not in endpoint.known_hosts:  # somebody named others
        words += ["-o", f"UserKnownHostsFile={' '.join(map(str, endpoint.known_hosts))}"]
    if endpoint.alias:
        words += ["-o", f"HostKeyAlias={endpoint.alias}"]
    if endpoint.jump is not None:
        through = shlex.join([*_ssh(endpoint.jump), str(endpoint.jump).rpartition(":")[0]])
        words += ["-o", f"ProxyCommand={through} -W %h:%p"]
    return words


def _check_host_key(
    kind: str,
    blob: bytes,
    known: tuple[KnownKey, ...],
    bare: tuple[KnownKey, ...],
    endpoint: Endpoint,
    name: str,
    device: str,
) -> None:
    """``bare``: recorded for the host without its port; a match there counts, a mismatch says nothing."""
    matching = [each for each in (*known, *bare) if each.blob == blob]
    if any(each.revoked for each in matching):
        raise StableError(
            f"the host key of {name} was revoked: {matching[0]}.",
            "Do not trust this board until it has a new key.",
            device=device,
        )
    if matching:
        return
    shown = f"{kind} {fingerprint(blob)}"
    scan = scan_command(endpoint, _KEY_FILES.get(kind, "ecdsa"))
    compare = (
        f"compare the fingerprint with what the board says"
        f" (there: ssh-keygen -lf /etc/ssh/ssh_host_{_KEY_FILES.get(kind, 'ecdsa')}_key.pub)"
    )
    others = [each for each in known if not each.revoked]
    if others:
        forget = shlex.join(["ssh-keygen", "-R", name, "-f", str(others[0].file)])
        raise StableError(
            f"the host key of {name} has changed: it shows {shown}, recorded is {others[0]}."
            " Either the board was installed anew, or somebody is in between.",
            f"If you know why, forget the old key: {forget}; then {compare} and accept it: {scan}",
            device=device,
        )
    unrecorded = "does not record" if len(endpoint.known_hosts) == 1 else "do not record"
    raise StableError(
        f"the host key of {name} is unknown: it shows {shown},"
        f" which {' and '.join(map(str, endpoint.known_hosts))} {unrecorded}.",
        f"To accept it, {compare}, then: {scan}",
        device=device,
    )
