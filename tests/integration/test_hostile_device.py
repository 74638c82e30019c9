"""Devices that lie, talk without end and name what is not theirs: refused with a reason, alone."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import zstandard
from paramiko.channel import Channel

from orchestrator.errors import (
    CommandTimeoutError,
    DeviceError,
    LinkError,
    MissingFileError,
    StableError,
    TransientError,
)
from orchestrator.inventory import parse_inventory
from orchestrator.transports import connect
from orchestrator.transports.base import Transport
from orchestrator.transports.ssh import SshTransport
from orchestrator.transports.ssh_address import endpoint_of
from tests.hostile_adb import FEATURES, SHELL, Serve, endless, exactly, hostile_adb, says, sync
from tests.hostile_ssh import SIZE, announce, hostile_ssh


@contextmanager
def reached(fields: str) -> Iterator[Transport]:
    text = f"version: 1\ndevices: [{{name: hostile, {fields}}}]"
    transport = connect(parse_inventory(text.encode(), Path("inventory.yaml")).devices[0])
    with closing(transport):
        yield transport


def packet(kind: int, data: bytes) -> bytes:
    return struct.pack("<BI", kind, len(data)) + data


# ------------------------------------------------------------------ adb

ADB_COMMANDS: dict[str, tuple[Serve, type[DeviceError], str]] = {
    "no end": (endless(packet(1, b"x" * 4096)), CommandTimeoutError, "did not end within 2 s"),
    "a packet of 4 GB": (
        says(b"\x01\xff\xff\xff\xff" + b"x" * 99),
        StableError,
        "a packet of 4294967295 bytes",
    ),
    "packets of no kind": (says(packet(77, b"x") * 9), TransientError, "lost"),
    "nothing": (says(b""), TransientError, "lost"),
    "half a packet": (says(b"\x01\x20"), TransientError, "lost"),
    "an exit without a status": (says(packet(3, b"\0")), StableError, "shell did not run true"),
}


@pytest.mark.parametrize("what", ADB_COMMANDS)
def test_a_command_over_adb(what: str) -> None:
    serve, error, text = ADB_COMMANDS[what]
    calls: list[bytes] = []

    def first_only(
        client: socket.socket,
    ) -> None:  # the rest of a command is ended in silence
        calls.append(b"")
        if len(calls) == 1:
            serve(client)

    with (
        hostile_adb({SHELL: first_only}) as address,
        reached(f'transport: adb, serial: A, adb_server: "{address}"') as transport,
        pytest.raises(error, match=text),
    ):
        transport.run(["true"], timeout_s=2, output_cap_bytes=1000)


def stat_2(size: int) -> bytes:
    return struct.pack("<4sIQQIIIIQqqq", b"STA2", 0, 0, 0, stat.S_IFREG | 0o644, 1, 0, 0, size, 0, 0, 0)


def data(block: bytes) -> bytes:
    return b"DATA" + struct.pack("<I", len(block)) + block


ADB_FILES: dict[str, tuple[int, Serve, str]] = {
    "a size of 2^63": (SIZE, endless(data(b"x")), "states a size of 9223372036854775808 bytes"),
    "no end": (10, endless(data(b"x" * 60_000)), "not end"),
    "no end of nothing": (10, endless(data(b"")), "does not end"),
    "a block of 4 GB": (10, says(b"DATA\xff\xff\xff\xff"), "a block of 4294967295 bytes"),
    "a refusal of 4 GB": (10, says(b"FAIL\xff\xff\xff\xff"), "an error text of 4294967295 bytes"),
    "garbage": (10, endless(b"garbage!"), "b'garb' instead of DATA"),
}


@pytest.mark.parametrize("what", ADB_FILES)
def test_a_file_over_adb(what: str, tmp_path: Path) -> None:
    size, file, text = ADB_FILES[what]
    with (
        hostile_adb({b"sync:": sync(stat_2(size), file)}) as address,
        reached(f'transport: adb, serial: A, adb_server: "{address}"') as transport,
    ):
        with pytest.raises(StableError, match=text):
            transport.pull("/there", tmp_path / "here")
        assert list(tmp_path.iterdir()) == []


def test_little_that_stands_for_much_over_adb(tmp_path: Path) -> None:
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(256 << 20))[:60_000]
    serve = sync(stat_2(100), endless(data(bomb)))
    with (
        hostile_adb({b"sync:": serve}, features=FEATURES + b",sendrecv_v2_zstd") as address,
        reached(f'transport: adb, serial: A, adb_server: "{address}"') as transport,
        pytest.raises(StableError, match="said to have 100 bytes and does not end"),
    ):
        transport.pull("/there", tmp_path / "here")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOENT])
def test_a_file_service_that_may_not_see_processes_is_asked_once(code: int) -> None:
    asked: list[bytes] = []

    def refusing(client: socket.socket) -> None:
        while True:
            exactly(client, 4)
            asked.append(exactly(client, int.from_bytes(exactly(client, 4), "little")))
            client.sendall(struct.pack("<4sIQQIIIIQqqq", b"STA2", code, *[0] * 10))

    own = f"/proc/{os.getpid()}/stat"
    with (
        hostile_adb({b"sync:": refusing}, executes=True) as address,
        reached(f'transport: adb, serial: A, adb_server: "{address}"') as transport,
    ):
        for _ in range(3):
            assert transport.read_from(own, 0, 20).startswith(b"%d (" % os.getpid())
        with pytest.raises(MissingFileError):
            transport.read_from("/proc/999999999/stat", 0, 20)
        assert asked == [own.encode()]
        transport.read_from("/proc/sys/kernel/random/boot_id", 0, 40)
        assert len(asked) == 2  # what is no process's may be open to it


def test_a_read_over_adb_takes_no_more_than_was_asked_for() -> None:
    serve = sync(stat_2(10), endless(data(b"x" * 60_000)))
    with (
        hostile_adb({b"sync:": serve}) as address,
        reached(f'transport: adb, serial: A, adb_server: "{address}"') as transport,
    ):
        assert transport.read_from("/there", 2, 100) == b"x" * 100


def test_a_list_of_devices_that_are_none() -> None:
    listed = b"\x1b[2J\x07evil device product:\x1b]0;x\x07\n\0\0\n" + b"x" * 5000 + b"\tdevice\n"
    with (
        hostile_adb({}, devices=listed) as address,
        reached(f'transport: adb, serial: A, adb_server: "{address}"') as transport,
        pytest.raises(StableError, match="the adb server sees no device A"),
    ):
        transport.run(["true"], timeout_s=60)


# ------------------------------------------------------------------ ssh


def test_commands_over_ssh(tmp_path: Path) -> None:
    block = b"x" * (1 << 15)
    scene = ""

    def command(channel: Channel, token: bytes) -> None:
        if scene == "noise":
            while True:
                channel.sendall(block)
        announce(channel, token)
        if scene == "on and on":
            channel.send_exit_status(0)
        while scene in ("endless", "on and on"):
            channel.sendall(block)
            channel.sendall_stderr(block)

    with hostile_ssh(tmp_path / "ssh", command) as fields, reached(fields) as transport:
        for scene in ("noise", "endless"):  # noqa: B007 - the server reads it
            with pytest.raises(CommandTimeoutError, match="hostile: true did not end within 2 s"):
                transport.run(["true"], timeout_s=2, output_cap_bytes=1000)
        scene = "on and on"
        said = transport.run(["true"], timeout_s=2, output_cap_bytes=1000)
        assert said.truncated
        assert len(said.stdout) == len(said.stderr) == 1000
        scene = "no status"
        with pytest.raises(TransientError, match="did not say how true ended"):
            transport.run(["true"], timeout_s=60)


def test_files_over_ssh(tmp_path: Path) -> None:
    with (
        hostile_ssh(tmp_path / "ssh", lambda channel, token: None) as fields,
        reached(fields) as transport,
    ):
        assert transport.read_from("/file-10", 0, 100) == b"x" * 100
        with pytest.raises(StableError, match=f"states a size of {SIZE} bytes"):
            transport.pull(f"/file-{SIZE}", tmp_path / "here")
        transport.pull("/file-100", tmp_path / "here")
        assert (tmp_path / "here").read_bytes() == b"x" * 100
    assert not list(tmp_path.glob(".*"))


@contextmanager
def reached_soon(fields: str) -> Iterator[SshTransport]:
    """As ``reached``, by a transport that soon gives a board up."""
    text = f"version: 1\ndevices: [{{name: hostile, {fields}}}]"
    device = parse_inventory(text.encode(), Path("inventory.yaml")).devices[0]
    with closing(SshTransport("hostile", lambda: endpoint_of(device), silence_s=3)) as transport:
        yield transport


def test_a_board_that_answers_keepalives_only(tmp_path: Path) -> None:
    """Every wait ends: for the warden and files with the link, for a command with its time."""

    def command(channel: Channel, token: bytes) -> None:
        announce(channel, token)
        channel.send_exit_status(0)

    unanswered = {"exec"}
    with hostile_ssh(tmp_path / "ssh", command, unanswered) as fields, reached_soon(fields) as transport:
        with pytest.raises(LinkError, match="answered no exec request within 6 s"):
            transport.run(["true"], timeout_s=1)
        unanswered.clear()
        assert transport.run(["true"], timeout_s=60).ok
        for what in ("exec", "input"):
            unanswered.add(what)
            with pytest.raises(CommandTimeoutError, match="hostile: true did not end within 1 s"):
                transport.run(["true"], timeout_s=1)
            unanswered.clear()
            assert transport.run(["true"], timeout_s=60).ok
        unanswered.add("subsystem")
        with pytest.raises(LinkError, match="answered no subsystem request within 6 s"):
            transport.read_from("/file-10", 0, 10)
        unanswered.clear()
        assert transport.read_from("/file-10", 0, 10) == b"x" * 10


def test_a_home_over_ssh_that_is_no_path(tmp_path: Path) -> None:
    homes = [b"/a\n/b", b"relative", b"/\x1b[2J", b"/" + b"x" * 5000]

    def command(channel: Channel, token: bytes) -> None:
        announce(channel, token)
        channel.sendall(homes[-1])
        channel.send_exit_status(0)

    with hostile_ssh(tmp_path / "ssh", command) as fields, reached(fields) as transport:
        while homes:
            with pytest.raises(StableError, match="cannot hold a work folder"):
                transport.default_workdir()
            homes.pop()
