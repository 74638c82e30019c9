"""An ssh server whose board is hostile: its key is known, it lets us in, and then it does as it likes."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import paramiko
from paramiko.channel import Channel
from paramiko.common import AUTH_SUCCESSFUL, MSG_CHANNEL_REQUEST, OPEN_SUCCEEDED
from paramiko.message import Message

from tests.ssh_server import make_key, public_part

Command = Callable[[Channel, bytes], None]
"""What a command does; it gets its token, which the announcement of a command holds."""

_TOKEN = re.compile(rb"echo ([0-9a-f]{24}) \$group")
SIZE = 1 << 63


def announce(channel: Channel, token: bytes) -> None:
    """Begin as a command of ours does, up to being told to go on."""
    channel.sendall(b"\n" + token + b" 123\n")
    channel.sendall_stderr(token + b"\n")
    channel.recv(1)


class _Handle(paramiko.SFTPHandle):
    """An open file: its size is what ``stated`` says, and every read gives more than was asked for."""

    def __init__(self, stated: int) -> None:
        super().__init__()
        self._stated = stated

    def stat(self) -> paramiko.SFTPAttributes:
        attributes = paramiko.SFTPAttributes()
        attributes.st_size, attributes.st_mode = self._stated, 0o100644
        return attributes

    def read(self, offset: int, length: int) -> bytes:
        return b"x" * (4 * length)


class _Files(paramiko.SFTPServerInterface):
    """Paths end in the size that they state."""

    def open(self, path: str, flags: int, attr: paramiko.SFTPAttributes) -> paramiko.SFTPHandle:
        return _Handle(int(path.rpartition("-")[2]))

    def stat(self, path: str) -> paramiko.SFTPAttributes:
        return _Handle(int(path.rpartition("-")[2])).stat()


class _Transport(paramiko.Transport):
    """Answers keepalives, whatever else it does not answer."""

    _channel_handler_table = {  # noqa: RUF012 - the library's own way to hang in a handler
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
        MSG_CHANNEL_REQUEST: lambda channel, message: _request(channel, message),
    }

    def __init__(self, client: socket.socket, unanswered: Collection[str]) -> None:
        super().__init__(client)
        self.unanswered = unanswered


def _request(channel: Channel, message: Message) -> None:
    start = message.packet.tell()
    assert isinstance(channel.transport, _Transport)
    if message.get_text() not in channel.transport.unanswered:
        message.packet.seek(start)
        channel._handle_request(message)  # type: ignore[attr-defined]


class _Board(paramiko.ServerInterface):
    def __init__(self, command: Command, transport: _Transport) -> None:
        self._command, self._transport = command, transport

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return AUTH_SUCCESSFUL

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        self._transport.default_window_size = 0 if "input" in self._transport.unanswered else 1 << 21
        return OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: Channel, command: bytes) -> bool:
        threading.Thread(target=self._serve, args=(channel,), daemon=True).start()
        return True

    def _serve(self, channel: Channel) -> None:
        try:
            line = b""
            while not line.endswith(b"\n"):
                block = channel.recv(1 << 16)
                if not block:
                    return
                line += block
            found = _TOKEN.search(line)
            if found is not None:
                self._command(channel, found[1])
            else:
                _warden(channel)
        except (OSError, EOFError, paramiko.SSHException):
            return  # we were hung up on
        finally:
            channel.close()


def _warden(channel: Channel) -> None:
    """The one part that behaves: it answers what it is asked."""
    channel.sendall(b"\nWARDEN-READY\n")
    held = b""
    while block := channel.recv(1 << 16):
        *lines, held = (held + block).split(b"\n")
        for line in lines:
            if line.startswith(b"end "):
                channel.sendall(b"\n" + line.split()[2] + b"\n")


@contextmanager
def hostile_ssh(folder: Path, command: Command, unanswered: Collection[str] = ()) -> Iterator[str]:
    """What an inventory says of such a board, in YAML's flow style. ``unanswered``: "exec" or "subsystem" for
    requests that get no answer, "input" for channels that take none; may change meanwhile."""
    folder.mkdir(parents=True)
    host, user = make_key(folder / "host", "rsa"), make_key(folder / "user")
    key = paramiko.RSAKey.from_private_key_file(str(host))
    transports: list[paramiko.Transport] = []

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            transport = _Transport(client, unanswered)
            transport.add_server_key(key)
            transport.set_subsystem_handler("sftp", paramiko.SFTPServer, _Files)
            transports.append(transport)
            try:
                transport.start_server(server=_Board(command, transport))
            except (paramiko.SSHException, EOFError):
                transport.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        known = folder / "known_hosts"
        known.write_text(f"[127.0.0.1]:{port} {public_part(host)}\n")
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f'transport: ssh, address: "u@127.0.0.1:{port}", key_file: {user}, known_hosts: {known}'
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for transport in transports:
                transport.close()
