"""adb for real: servers and daemons that end, hang, refuse or are none, and what the transport does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from orchestrator.errors import DeviceError, LinkError, StableError
from orchestrator.inventory import parse_inventory
from orchestrator.transports import connect
from orchestrator.transports.adb_link import AdbLink
from orchestrator.transports.adb_own import listens
from orchestrator.transports.adb_server import AdbServer, server_address
from orchestrator.transports.adb_socket import RefusalError, ServerAddress
from orchestrator.transports.base import Transport
from tests.adb_side import Daemon, Server, free_port, require_adb
from tests.hostile_adb import hostile_adb


def opened(fields: str) -> Transport:
    text = f"version: 1\ndevices: [{{name: under-test, transport: adb, {fields}}}]"
    return connect(parse_inventory(text.encode(), Path("inventory.yaml")).devices[0])


def reached(daemon: Daemon, server: Server) -> Transport:
    return opened(f'address: "{daemon.address}", adb_server: "{server.address}"')


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as held:
        yield held


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that every test leaves running."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


def a_daemon(stack: ExitStack, folder: Path, *, secure: bool = False) -> Daemon:
    daemon = Daemon(folder, secure=secure)
    stack.callback(daemon.kill)
    return daemon


def wait_for(condition: Callable[[], bool], limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def comes_back(transport: Transport) -> bool:
    try:
        return transport.run(["true"], timeout_s=60).ok
    except LinkError:
        return False


# ------------------------------------------------------------------ what ends and comes back


def test_a_server_that_is_killed_and_started_again(stack: ExitStack, tmp_path: Path) -> None:
    daemon, server = a_daemon(stack, tmp_path / "daemon"), Server(tmp_path / "server")
    stack.callback(server.kill)
    transport = reached(daemon, server)
    detached = transport.start_detached(["sleep", "600"], log=str(tmp_path / "log"))
    stack.callback(os.kill, detached, signal.SIGKILL)
    pids = tmp_path / "pids"
    with ThreadPoolExecutor(1) as pool:
        script = 'sleep 600 & echo $$ $! > "$1.new"; mv "$1.new" "$1"; wait'
        during = pool.submit(transport.run, ["sh", "-c", script, "sh", str(pids)], timeout_s=600)
        wait_for(pids.exists)
        server.kill()
        with pytest.raises(LinkError, match="under-test: the link to the device was lost"):
            during.result()
    server.start()
    wait_for(lambda: comes_back(transport))
    for pid in map(int, pids.read_text().split()):  # what the lost command left has been ended
        wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]
    assert Path(f"/proc/{detached}").exists()


def test_a_daemon_that_is_killed_and_comes_back(
    stack: ExitStack, shared_server: Server, tmp_path: Path
) -> None:
    daemon = a_daemon(stack, tmp_path / "daemon")
    transport = reached(daemon, shared_server)
    (tmp_path / "file").write_bytes(b"content")
    assert transport.read_from(str(tmp_path / "file"), 0, 99) == b"content"
    daemon.kill()
    with pytest.raises(LinkError, match="under-test"):
        transport.run(["true"], timeout_s=60)
    daemon.start()
    wait_for(lambda: comes_back(transport))
    assert transport.read_from(str(tmp_path / "file"), 0, 99) == b"content"


def test_a_device_that_hangs_holds_up_no_other(
    stack: ExitStack, shared_server: Server, tmp_path: Path
) -> None:
    frozen, lively = (a_daemon(stack, tmp_path / name) for name in ("frozen", "lively"))
    slow, quick = reached(frozen, shared_server), reached(lively, shared_server)
    assert slow.run(["true"], timeout_s=60).ok
    frozen.freeze()
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(slow.run, ["echo", "late"], timeout_s=300)
            for _ in range(20):
                assert quick.run(["true"], timeout_s=60).ok
            assert not waiting.done()
            frozen.thaw()
            assert waiting.result().stdout == b"late\n"
    finally:
        frozen.thaw()


# ------------------------------------------------------------------ what cannot be used


def test_a_device_that_has_not_authorized_this_computer(
    stack: ExitStack, shared_server: Server, tmp_path: Path
) -> None:
    transport = reached(a_daemon(stack, tmp_path / "daemon", secure=True), shared_server)
    with pytest.raises(StableError, match=r"under-test: the device has not authorized this computer.*accept"):
        transport.run(["true"], timeout_s=60)


def test_a_serial_that_is_not_there(shared_server: Server) -> None:
    transport = opened(f'serial: NOSUCH, adb_server: "{shared_server.address}"')
    with pytest.raises(StableError, match="under-test: the adb server sees no device NOSUCH"):
        transport.run(["true"], timeout_s=60)


def test_a_device_that_was_there_and_is_not_listed_any_more_may_come_back(
    stack: ExitStack, tmp_path: Path
) -> None:
    daemon, server = a_daemon(stack, tmp_path / "daemon"), Server(tmp_path / "server")
    stack.callback(server.kill)
    transport = opened(f'serial: "{daemon.address}", adb_server: "{server.address}"')
    assert server.asked().ask(f"host:connect:{daemon.address}").startswith("connected")
    assert transport.run(["true"], timeout_s=60).ok
    server.kill()
    server.start()
    with pytest.raises(LinkError, match=f"under-test: the device {daemon.address} is gone"):
        transport.run(["true"], timeout_s=60)


@pytest.mark.parametrize(
    ("listed", "error", "said"),
    [
        (b"A offline usb:1-1\n", LinkError, r"the device is offline\. Wait"),
        (b"A connecting\n", LinkError, "the device is connecting"),
        (b"A unauthorized usb:1-1\n", StableError, "has not authorized this computer.*Allow USB debugging"),
        (b"A no permissions (user in plugdev?); see [x] usb:1-1\n", StableError, "USB port.*udev"),
        (b"???????????? no permissions; see [x]\n", StableError, "USB port.*udev"),
        (b"A recovery usb:1-1\n", StableError, "in state 'recovery'.*Boot it into Android"),
        (b"B device usb:1-1\n", StableError, "sees no device A.*USB debugging"),
    ],
)
def test_what_a_server_lists_a_device_as_is_told_apart(
    listed: bytes, error: type[DeviceError], said: str
) -> None:
    with hostile_adb({}, devices=listed) as address:
        server = AdbServer(server_address(address), "under-test")
        link = AdbLink("under-test", server, serial="A", address=None)
        with pytest.raises(error, match=f"under-test: .*{said}"):
            link.open(b"shell:true", 0.3)


def test_an_address_where_no_daemon_is(shared_server: Server) -> None:
    transport = opened(f'address: "127.0.0.1:{free_port()}", adb_server: "{shared_server.address}"')
    with pytest.raises(LinkError, match="under-test: no adb daemon can be reached"):
        transport.run(["true"], timeout_s=60)


def test_an_address_where_nobody_answers_is_given_up_and_forgotten(shared_server: Server) -> None:
    server = shared_server.asked()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel takes connections, nobody speaks
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        link = AdbLink("under-test", server, serial=None, address=address, connect_s=1.0)
        with pytest.raises(LinkError, match=f"no adb daemon can be reached at {address}"):
            link.features()
        assert address not in {each.serial for each in server.devices()}


def test_an_address_that_others_have_connected_stays(shared_server: Server) -> None:
    server = shared_server.asked()
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as pool:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        theirs = pool.submit(server.ask, f"host:connect:{address}", 60)
        wait_for(lambda: address in {each.serial for each in server.devices()})
        link = AdbLink("under-test", server, serial=None, address=address, connect_s=1.0)
        with pytest.raises(LinkError, match="under-test"):
            link.features()
        assert address in {each.serial for each in server.devices()}
        server.ask(f"host:disconnect:{address}")
        theirs.result()


@contextmanager
def answering(answer: Callable[[bytes], bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers every request as it is told, and the requests that it got."""
    asked: list[bytes] = []

    def serve(client: socket.socket) -> None:
        with client:
            while data := client.recv(1 << 16):
                asked.append(data)
                client.sendall(answer(data))

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", asked
        listener.shutdown(socket.SHUT_RDWR)


def test_a_port_that_something_else_has() -> None:
    with answering(lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n") as (address, _):
        transport = opened(f'serial: A, adb_server: "{address}"')
        with pytest.raises(StableError, match="under-test: something that is no adb server has port"):
            transport.run(["true"], timeout_s=60)


def test_a_server_of_another_version_is_asked_and_left_alone() -> None:
    with answering(lambda _: b"FAIL0014unknown host service") as (address, asked):
        transport = opened(f'serial: A, adb_server: "{address}"')
        with pytest.raises(DeviceError, match="under-test"):
            transport.run(["true"], timeout_s=60)
        assert asked
        assert not any(b"host:kill" in request or b"host:version" in request for request in asked)


# ------------------------------------------------------------------ a server of our own


@pytest.fixture
def own_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """adb's default port here, without a server; one that the test makes our code start is ended."""
    require_adb()
    port = free_port()
    for name, value in (("HOME", tmp_path / "home"), ("XDG_STATE_HOME", tmp_path / "state")):
        Path(value).mkdir()
        monkeypatch.setenv(name, str(value))
    for name in ("ADB_USB", "ADB_EMU", "ADB_MDNS", "ADB_MDNS_OPENSCREEN"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("ADB_LOCAL_TRANSPORT_MAX_PORT", "5554")
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
    monkeypatch.delenv("ANDROID_ADB_SERVER_ADDRESS", raising=False)
    yield port
    record = tmp_path / f"state/stifarm/adb-server-{port}.json"
    if record.exists():
        os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)


def test_a_server_is_started_where_none_runs_and_again_when_it_died(
    stack: ExitStack, own_port: int, tmp_path: Path
) -> None:
    daemon = a_daemon(stack, tmp_path / "daemon")
    transport = opened(f'address: "{daemon.address}"')
    record = tmp_path / f"state/stifarm/adb-server-{own_port}.json"
    assert transport.run(["echo", "one"], timeout_s=120).stdout == b"one\n"
    first = json.loads(record.read_text())["pid"]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: comes_back(transport))
    assert json.loads(record.read_text())["pid"] != first


@pytest.fixture
def own_server(own_port: int) -> Callable[[], AdbServer]:
    """Our own server, which has been started; for a device each, as it is in use."""
    address = server_address(None)

    def made() -> AdbServer:
        return AdbServer(address, "under-test", ours=True, hangs_s=2)

    assert address.port == own_port
    made().ask("host:version", 60)
    return made


def test_our_own_server_is_replaced_when_asked_and_nobody_elses(
    shared_server: Server, own_server: Callable[[], AdbServer], own_port: int, tmp_path: Path
) -> None:
    record = tmp_path / f"state/stifarm/adb-server-{own_port}.json"
    first = json.loads(record.read_text())["pid"]
    assert own_server().replace_own()
    assert json.loads(record.read_text())["pid"] != first
    own_server().ask("host:version", 60)
    assert not shared_server.asked().replace_own()
    shared_server.asked().ask("host:version")


LATE = """
import socket, sys, threading
def serve(client):
    with client:
        asked = client.recv(1 << 16)
        if asked == b"000chost:version":
            client.sendall(b"OKAY00040029")
        while asked and client.recv(1 << 16):
            pass
with socket.create_server(("127.0.0.1", int(sys.argv[2]))) as listener:
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
"""An adb server that says its version at once, and takes its time for everything else."""


def test_a_deadline_that_is_too_short_ends_no_server_of_ours(
    own_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late.py").write_text(LATE)
    program = tmp_path / "adb"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/late.py "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("ADBUTILS_ADB_PATH", str(program))
    server = AdbServer(server_address(None), "under-test", ours=True, hangs_s=60)
    server.open("host:version", 60).close()
    record = tmp_path / f"state/stifarm/adb-server-{own_port}.json"
    before = record.read_text()
    for limit_s in (0.2, 0.0):
        with pytest.raises(
            LinkError, match=r"under-test: the adb server at .* does not answer in time.*load"
        ):
            server.open("host:transport:A", limit_s)
    assert record.read_text() == before
    assert server.ask("host:version", 60)


def test_a_server_of_ours_that_hangs_is_replaced_once_for_all(
    own_server: Callable[[], AdbServer], own_port: int
) -> None:
    (hung,) = servers_at(own_port)
    os.kill(hung, signal.SIGSTOP)
    with ThreadPoolExecutor(5) as pool:  # some see it hang, some see it end
        asked = [pool.submit(own_server().open, "host:version", limit_s) for limit_s in (3, 3, 4, 5, 9)]
        links = [each.result() for each in asked]
    (new,) = servers_at(own_port)
    assert new != hung
    for link in links:
        assert link.block()
        link.close()


def servers_at(port: int) -> list[int]:
    """The processes that are adb servers at a port."""
    argv = os.fsencode(f"\0-P\0{port}\0nodaemon\0server\0")
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if (entry / "cmdline").read_bytes().endswith(argv):
                found.append(int(entry.name))
    return found


def test_a_server_that_takes_no_more_connections_is_there() -> None:
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        assert listens(ServerAddress(*full.getsockname()))


def test_a_request_that_is_too_long_is_not_sent(shared_server: Server) -> None:
    with pytest.raises(StableError, match="under-test: a request to an adb server has 65535 bytes at most"):
        shared_server.asked().ask("host:" + "x" * 65531)
    with pytest.raises(RefusalError, match="unknown host service"):
        shared_server.asked().ask("host:" + "x" * 65530)


def test_no_server_can_be_started(own_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADBUTILS_ADB_PATH", "/bin/false")
    with pytest.raises(StableError, match=r"under-test: no adb server runs at .* /bin/false starts none"):
        opened("serial: A").run(["true"], timeout_s=60)


def test_no_server_is_started_that_could_not_be_noted(
    own_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(StableError, match=r"under-test: no adb server can be started: .*XDG_STATE_HOME"):
        opened("serial: A").run(["true"], timeout_s=60)
    assert servers_at(own_port) == []


def test_none_is_started_where_the_inventory_names_one(own_port: int, tmp_path: Path) -> None:
    named = f"127.0.0.1:{own_port}"
    with pytest.raises(LinkError, match=rf"the adb server at {named} cannot be reached.* -P {own_port} "):
        opened(f'serial: A, adb_server: "{named}"').run(["true"], timeout_s=60)
    assert list((tmp_path / "state").iterdir()) == []


def test_a_stock_client_works_beside_us(stack: ExitStack, shared_server: Server, tmp_path: Path) -> None:
    daemon = a_daemon(stack, tmp_path / "daemon")
    transport = reached(daemon, shared_server)
    go = tmp_path / "go"
    with ThreadPoolExecutor(1) as pool:
        script = 'while [ ! -e "$1" ]; do sleep 0.05; done; echo went'
        waiting = pool.submit(transport.run, ["sh", "-c", script, "sh", str(go)], timeout_s=300)
        wait_for(lambda: any(each.state == "device" for each in shared_server.asked().devices()))
        argv = [shared_server.program, "-s", daemon.address, "shell", "touch", str(go)]
        subprocess.run(argv, env=shared_server.environment, check=True, timeout=300)
        assert waiting.result().stdout == b"went\n"
    assert shared_server.running()
