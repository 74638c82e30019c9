"""Deploys over links that are cut: what is sent again, counted on the link, and what is left there."""

from __future__ import annotations

import contextlib
import getpass
import os
import posixpath
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.locks import hold
from agent.spool import Spool
from orchestrator.agent_push import bring_agent
from orchestrator.agent_verbs import call_agent
from orchestrator.deploy import deploy_bundle
from orchestrator.errors import LinkError, StableError, TransientError
from orchestrator.inventory import parse_inventory
from orchestrator.job_push import push_job
from orchestrator.lab import phone
from orchestrator.lab.phone import PhoneSpec
from orchestrator.task_push import PIECE_BYTES, deploy_task_data
from orchestrator.transports import connect
from orchestrator.transports.adb_script import new_mark
from orchestrator.transports.base import Transport
from sti_runtime.bundle import Bundle
from tests.adb_side import Daemon, Server
from tests.agent_data import CONFIG, make_job, manifest_of, probes, tiny_bundle
from tests.cut_link import CutLink
from tests.ssh_server import SshServer

OVERHEAD_BYTES = 100_000
"""At most this much goes to the device beside content: commands, adb's headers, the manifest."""


@dataclass(frozen=True)
class Far:
    """A device behind a link that can be cut, with an agent. ``seen``: its work folder for this host;
    ``temporary``: the folder above for what is short-lived, where the device has one of its own."""

    link: CutLink
    transport: Transport
    spool: str
    seen: Path
    inventory: str
    temporary: Path | None

    def leftovers(self) -> list[str]:
        """What lies beside the work folder, and in it, and for a short time elsewhere."""
        around = [path.name for path in self.seen.parent.iterdir() if path != self.seen]
        return around + [path.name for path in self.seen.iterdir()] + self.short_lived()

    def short_lived(self) -> list[str]:
        """What lies in the folder for temporary files, beside the farm's."""
        if self.temporary is None:
            return []
        return [path.name for path in self.temporary.iterdir() if path != self.seen.parent]


def opened(text: str) -> Transport:
    return connect(parse_inventory(text.encode(), Path("inventory.yaml")).devices[0])


@contextmanager
def far(link: CutLink, fields: str, spool: str, seen: Path, temporary: Path | None = None) -> Iterator[Far]:
    text = f"version: 1\ndevices: [{{name: under-test, {fields}}}]"
    transport = opened(text)
    try:
        transport.agent_argv = (bring_agent(transport, spool).path,)
        yield Far(link, transport, spool, seen, text, temporary)
    finally:
        transport.close()


@contextmanager
def phone_behind(folder: Path, spec: PhoneSpec) -> Iterator[Far]:
    """A virtual phone; the link is between the adb server and the phone's daemon."""
    running = phone.start(spec, folder / "phone")
    with ExitStack() as stack:
        stack.callback(phone.stop, running.folder)
        server = Server(folder / "server")
        stack.callback(server.kill)
        link = stack.enter_context(CutLink((running.address, running.port)))
        spool = posixpath.join(running.workdir, "farm", "spool")
        seen = (Path("/") if running.plain else running.folder) / spool.lstrip("/")
        fields = f'transport: adb, address: "127.0.0.1:{link.port}", adb_server: "{server.address}"'
        yield stack.enter_context(far(link, fields, spool, seen, temporary=seen.parents[1]))


def old_phone(folder: Path) -> AbstractContextManager[Far]:
    """A phone before Android 7: its commands get no streamed input."""
    return phone_behind(folder, PhoneSpec("old", "CUT-1", api=23, features="old"))


def new_phone(folder: Path) -> AbstractContextManager[Far]:
    """A phone of today."""
    return phone_behind(folder, PhoneSpec("new", "CUT-2"))


@contextmanager
def aosp(folder: Path) -> Iterator[Far]:
    """AOSP's daemon on this machine's files; the link is between the adb server and the daemon."""
    with ExitStack() as stack:
        daemon, server = Daemon(folder / "daemon"), Server(folder / "server")
        stack.callback(daemon.kill)
        stack.callback(server.kill)
        link = stack.enter_context(CutLink(("127.0.0.1", daemon.port)))
        fields = f'transport: adb, address: "127.0.0.1:{link.port}", adb_server: "{server.address}"'
        spool = folder / "farm/spool"
        yield stack.enter_context(far(link, fields, str(spool), spool))


@contextmanager
def board(folder: Path) -> Iterator[Far]:
    """A real sshd on this machine's files."""
    server = SshServer(folder / "sshd")
    server.start()
    with ExitStack() as stack:
        stack.callback(server.stop)
        link = stack.enter_context(CutLink(("127.0.0.1", server.port)))
        server.know(link.port)
        fields = server.fields(address=f'"{getpass.getuser()}@127.0.0.1:{link.port}"')
        spool = folder / "farm/spool"
        yield stack.enter_context(far(link, fields, str(spool), spool))


WORLDS: dict[str, Callable[[Path], AbstractContextManager[Far]]] = {
    "old phone": old_phone,
    "new phone": new_phone,
    "aosp": aosp,
    "board": board,
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chunks that are large beside what commands weigh."""
    config = CONFIG.model_copy(update={"hidden": 128, "ffn": 512})
    return tiny_bundle(tmp_path_factory.mktemp("bundles"), config=config)


@pytest.fixture
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Far]:
    with WORLDS[request.param](tmp_path / "world") as made:
        yield made


def sizes(bundle: Path) -> tuple[int, int]:
    """Bytes of all its distinct chunks, and of the longest."""
    lengths = {chunk.sha256: chunk.length for _, chunk in manifest_of(bundle).all_chunks()}.values()
    return sum(lengths), max(lengths)


# ------------------------------------------------------------------ bundles where input cannot be streamed


@pytest.mark.parametrize("device", ["old phone"], indirect=True)
def test_a_cut_deploy_sends_one_chunk_again(device: Far, bundle: Path) -> None:
    total, longest = sizes(bundle)
    assert not device.transport.streams_input()
    before = device.link.sent_bytes
    device.link.cut_at_bytes = before + total // 2
    with pytest.raises(TransientError):
        deploy_bundle(device.transport, device.spool, bundle)
    assert device.link.cut_at_bytes is None
    report = deploy_bundle(device.transport, device.spool, bundle)
    assert report.bytes_sent < total // 2 + longest + OVERHEAD_BYTES
    assert device.link.sent_bytes - before < total + longest + OVERHEAD_BYTES
    Bundle.open(device.seen / "bundles" / bundle.name, verify=True)
    assert list((device.seen / "incoming").iterdir()) == []
    call_agent(device.transport, device.spool, "clean")
    assert device.leftovers() == []


KILLED = """
import os, signal, sys
from pathlib import Path
from orchestrator.deploy import deploy_bundle
from tests.integration.test_cut_deploys import opened
def half(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
transport = opened(sys.argv[1])
transport.agent_argv = (sys.argv[2],)
deploy_bundle(transport, sys.argv[3], Path(sys.argv[4]), half)
"""


@pytest.mark.parametrize("device", ["old phone"], indirect=True)
def test_a_killed_host_leaves_nothing_that_clean_does_not_remove(device: Far, bundle: Path) -> None:
    total, longest = sizes(bundle)
    argv = (device.inventory, device.transport.agent_argv[0], device.spool, str(bundle))
    killed = subprocess.run([sys.executable, "-c", KILLED, *argv], check=False, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert {path.name for path in device.seen.parent.iterdir()} == {device.seen.name}
    report = deploy_bundle(device.transport, device.spool, bundle)
    assert report.bytes_sent < total // 2 + longest + OVERHEAD_BYTES
    assert list((device.seen / "incoming").iterdir()) == []
    call_agent(device.transport, device.spool, "clean")
    assert device.leftovers() == []


# ------------------------------------------------------------------ commands

CUT_OFF = ': >"$1/began"; while [ ! -e "$1/go" ]; do sleep 0.05; done; echo late; echo late >&2 # $2'


def named_by(token: str) -> list[str]:
    """The processes of this machine whose command lines have a word."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.fsencode(token) in (entry / "cmdline").read_bytes():
                found.append(entry.name)
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


@pytest.mark.parametrize("device", ["old phone"], indirect=True)
def test_a_command_that_is_cut_off_leaves_no_file(device: Far) -> None:
    token = new_mark()
    (device.seen / "commands").mkdir()
    argv = ["sh", "-c", CUT_OFF, "sh", f"{device.spool}/commands", token]
    with ThreadPoolExecutor(1) as pool:
        during = pool.submit(device.transport.run, argv, timeout_s=600)
        wait_for((device.seen / "commands/began").exists)
        assert named_by(token)
        device.link.cut()
        with pytest.raises(LinkError):
            during.result()
    (device.seen / "commands/go").touch()
    wait_for(lambda: not named_by(token))
    assert device.short_lived() == []


@pytest.mark.parametrize("device", ["old phone"], indirect=True)
def test_input_that_is_cut_off_is_removed_by_the_next_command(device: Far) -> None:
    device.link.cut_before, device.link.stays_cut = b"set -- wc", True
    with pytest.raises(LinkError):
        device.transport.run(["wc", "-c"], timeout_s=600, stdin=[b"input"])
    assert device.short_lived() != []
    device.link.stays_cut = False
    assert device.transport.run(["true"], timeout_s=600).ok
    assert device.short_lived() == []


# ------------------------------------------------------------------ task data

ROWS_BYTES = 16 << 20
IN_FLIGHT_BYTES = 5 << 20
"""What can be on its way where input is streamed: the windows of the protocols, and buffers of sockets."""


@pytest.mark.parametrize("device", WORLDS, indirect=True)
def test_cut_task_data_goes_on_where_it_broke_off(device: Far, tmp_path: Path) -> None:
    rows, before = tmp_path / "rows", device.link.sent_bytes
    rows.write_bytes(os.urandom(ROWS_BYTES))
    device.link.cut_at_bytes = before + ROWS_BYTES * 3 // 4
    with pytest.raises(TransientError):
        deploy_task_data(device.transport, device.spool, rows)
    assert device.link.cut_at_bytes is None
    with hold(Spool(device.seen).deploy_lock, wait_s=120, what="the agent that was cut off"):
        assert (device.seen / "tasks").exists()
    seen: list[tuple[int, int]] = []
    report = deploy_task_data(device.transport, device.spool, rows, lambda *done: seen.append(done))
    lost = IN_FLIGHT_BYTES if device.transport.streams_input() else PIECE_BYTES
    assert device.link.sent_bytes - before < ROWS_BYTES + lost + OVERHEAD_BYTES
    assert report.bytes_sent < ROWS_BYTES // 4 + lost + OVERHEAD_BYTES
    assert seen[-1] == (ROWS_BYTES, ROWS_BYTES)
    assert (device.seen / "tasks" / f"{report.digest}.safetensors").read_bytes() == rows.read_bytes()
    call_agent(device.transport, device.spool, "clean")
    assert device.leftovers() == []


# ------------------------------------------------------------------ compression

ZEROS_BYTES = 4 << 20


@pytest.mark.parametrize(
    ("device", "compressed"),
    [("new phone", True), ("old phone", False), ("aosp", False)],
    indirect=["device"],
)
def test_files_are_compressed_on_the_link_where_the_phone_can(
    device: Far, tmp_path: Path, compressed: bool
) -> None:
    (tmp_path / "zeros").write_bytes(bytes(ZEROS_BYTES))
    sent, received = device.link.sent_bytes, device.link.received_bytes
    device.transport.push(tmp_path / "zeros", f"{device.spool}/zeros")
    device.transport.pull(f"{device.spool}/zeros", tmp_path / "back")
    assert (device.seen / "zeros").read_bytes() == (tmp_path / "back").read_bytes() == bytes(ZEROS_BYTES)
    passed = (device.link.sent_bytes - sent, device.link.received_bytes - received)
    assert [each < ZEROS_BYTES // 8 for each in passed] == [compressed] * 2
    assert [each >= ZEROS_BYTES for each in passed] == [not compressed] * 2


# ------------------------------------------------------------------ job files


@pytest.mark.parametrize("device", ["old phone", "aosp"], indirect=True)
def test_a_cut_job_file_is_sent_again_and_never_half_there(device: Far, tmp_path: Path) -> None:
    job = make_job(Spool.open(tmp_path / "spool"), units=probes(20_000))
    path = device.seen / "jobs" / job.id / "1/job.json"
    device.link.cut_at_bytes = device.link.sent_bytes + len(job.to_json()) // 2
    with pytest.raises(TransientError):
        push_job(device.transport, device.spool, job)
    assert not path.exists()
    assert push_job(device.transport, device.spool, job)
    assert path.read_bytes() == job.to_json()
    assert not push_job(device.transport, device.spool, job)
    with pytest.raises(StableError, match="another content"):
        push_job(device.transport, device.spool, job.model_copy(update={"threads": 2}))
    call_agent(device.transport, device.spool, "clean")
    assert device.leftovers() == []
