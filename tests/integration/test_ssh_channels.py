"""Channels over a real sshd: what comes too late for one harms neither the connection nor the next."""

from __future__ import annotations

import time
from pathlib import Path

import paramiko
import pytest
from paramiko.channel import Channel
from paramiko.common import cMSG_CHANNEL_EOF
from paramiko.message import Message

from orchestrator.inventory import parse_inventory
from orchestrator.transports.ssh_address import endpoint_of
from orchestrator.transports.ssh_connect import Connection, open_connection
from tests.ssh_server import SshServer


def said(connection: Connection) -> bytes:
    """What a command says on a channel of its own."""
    with connection.transport.open_session() as channel:
        channel.exec_command("echo heard")
        return channel.recv(100)


def closed_by_the_server(connection: Connection) -> tuple[Channel, Message]:
    """A channel after the server's CLOSE, and the end of input that a slow thread had ready for it."""
    channel = connection.transport.open_session()
    late = Message()
    late.add_byte(cMSG_CHANNEL_EOF)
    late.add_int(channel.remote_chanid)
    channel.exec_command("exit 3")
    assert channel.recv_exit_status() == 3
    until = time.monotonic() + 60
    while not channel.closed:
        assert time.monotonic() < until
        time.sleep(0.01)
    return channel, late


def send_until_it_ends(connection: Connection, late: Message) -> None:
    """At first a loaded server may not have forgotten the last channel of that number."""
    for _ in range(100):
        connection.transport._send_user_message(late)  # type: ignore[attr-defined]
        said(connection)


def test_a_late_end_of_input_is_not_sent(tmp_path: Path) -> None:
    server = SshServer(tmp_path / "sshd")
    server.start()
    try:
        text = f"version: 1\ndevices: [{{name: board, {server.fields()}}}]"
        endpoint = endpoint_of(parse_inventory(text.encode(), Path("inventory.yaml")).devices[0])
        connection = open_connection(endpoint, "board")
        channel, late = closed_by_the_server(connection)
        channel.transport._send_user_message(late)  # type: ignore[union-attr]
        assert said(connection) == b"heard\n"
        # As the library alone would send it, the server ends the connection.
        with pytest.raises((paramiko.SSHException, OSError, EOFError)):
            send_until_it_ends(connection, late)
        connection.close()
    finally:
        server.stop()
