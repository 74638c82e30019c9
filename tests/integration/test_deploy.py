"""Deploy to a real agent over the local transport: sparing, resumable, and clear when it cannot."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.chunks import missing
from agent.spool import Spool
from orchestrator.agent_push import MACHINES
from orchestrator.agent_verbs import call_agent
from orchestrator.chunk_stream import pack_blocks, read_ahead
from orchestrator.deploy import deploy_bundle
from orchestrator.errors import AgentError, DeviceFullError, StableError, TransientError
from orchestrator.task_push import deploy_task_data
from orchestrator.transports.base import Completed, Progress
from orchestrator.transports.fake import FakeTransport
from orchestrator.transports.local import LocalTransport
from sti_runtime.bundle import Bundle
from sti_runtime.errors import DigestError, FormatError
from sti_runtime.manifest import MANIFEST_NAME
from sti_runtime.messages import Lease
from sti_runtime.records import sha256_hex
from tests.agent_data import accept_pack, make_pack, manifest_of, tiny_bundle
from tests.agents import agent_called


class Counting(LocalTransport):
    """Local, to the native agent; counts what passes, and can damage what is sent (a bad link)."""

    def __init__(self, damage: int = 0) -> None:
        super().__init__("under-test")
        self.agent_argv = agent_called(MACHINES.get(platform.machine(), "x86_64")).argv
        self.commands: list[str] = []
        self.sent_bytes = 0
        self.damage = damage

    def run(self, argv: Sequence[str], *, stdin: Iterable[bytes] | None = None, **options: Any) -> Completed:
        self.commands.append(argv[len(self.agent_argv)] if argv[0] == self.agent_argv[0] else argv[0])
        blocks = None if stdin is None else self._counted(stdin)
        return super().run(argv, stdin=blocks, **options)

    def _counted(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        damaged = self.damage > 0
        self.damage -= damaged
        for number, block in enumerate(blocks):
            self.sent_bytes += len(block)
            yield block[:-1] + bytes([block[-1] ^ 1]) if damaged and number == 1 else block

    def push(self, source: Path, destination: str, *, progress: Progress | None = None) -> None:
        self.sent_bytes += source.stat().st_size
        super().push(source, destination, progress=progress)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles"))


def test_a_deploy_arrives_whole_and_the_second_is_one_question(bundle: Path, tmp_path: Path) -> None:
    transport, spool = Counting(), str(tmp_path / "spool")
    seen: list[tuple[int, int]] = []
    report = deploy_bundle(transport, spool, bundle, lambda done, total: seen.append((done, total)))
    there = tmp_path / "spool/bundles" / bundle.name
    Bundle.open(there, verify=True)
    manifest = manifest_of(bundle)
    assert report.digest == bundle.name == manifest.digest
    assert not report.already
    distinct = {chunk.sha256: chunk.length for _, chunk in manifest.all_chunks()}
    assert report.chunks_sent == len(distinct)
    assert report.bytes_sent == sum(distinct.values())
    assert seen == sorted(seen)
    assert seen[-1] == (report.bytes_sent, report.bytes_sent)
    assert not list((tmp_path / "spool/incoming").iterdir())
    assert transport.commands == ["has", "missing", "accept"]

    again = Counting()
    report = deploy_bundle(again, spool, bundle)
    assert (report.already, report.chunks_sent, report.bytes_sent) == (True, 0, 0)
    assert (again.commands, again.sent_bytes) == (["has"], 0)


def test_what_the_device_has_of_another_bundle_is_not_sent(bundle: Path, tmp_path: Path) -> None:
    spool = str(tmp_path / "spool")
    full = deploy_bundle(Counting(), spool, bundle)
    more = tiny_bundle(tmp_path / "bundles", fidelities=(2, 4, 32))
    report = deploy_bundle(Counting(), spool, more)
    distinct = {chunk.sha256 for _, chunk in manifest_of(more).all_chunks()}
    assert report.chunks_sent == len(distinct) - full.chunks_sent
    Bundle.open(tmp_path / "spool/bundles" / more.name, verify=True)


def test_a_chunk_damaged_on_the_way_is_sent_once_more(bundle: Path, tmp_path: Path) -> None:
    clean = deploy_bundle(Counting(), str(tmp_path / "clean"), bundle)
    report = deploy_bundle(Counting(damage=1), str(tmp_path / "spool"), bundle)
    assert report.chunks_sent == clean.chunks_sent + 1
    Bundle.open(tmp_path / "spool/bundles" / bundle.name, verify=True)


def test_a_chunk_damaged_twice_is_an_error_that_names_the_device(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(StableError, match=r"under-test: 1 chunks arrived damaged twice.*check cable"):
        deploy_bundle(Counting(damage=2), str(tmp_path / "spool"), bundle)
    assert not (tmp_path / "spool/bundles" / bundle.name).exists()
    report = deploy_bundle(Counting(), str(tmp_path / "spool"), bundle)
    assert report.chunks_sent == 1  # the rest was kept


def test_a_chunk_that_rots_on_the_device_before_commit_is_sent_again(bundle: Path, tmp_path: Path) -> None:
    """It arrived with an earlier deploy, which was interrupted before its end."""
    spool = Spool.open(tmp_path / "spool")
    wanted = missing(spool, bundle / MANIFEST_NAME)["missing"]
    accept_pack(spool, bundle.name, make_pack(spool, bundle, wanted))
    with (spool.incoming_bundle(bundle.name) / "k32.bin").open("r+b") as stream:
        stream.seek(100)
        stream.write(b"\x99")
    transport = Counting()
    report = deploy_bundle(transport, str(spool.root), bundle)
    assert transport.commands == ["has", "missing", "accept", "missing", "accept"]
    assert report.chunks_sent == 1
    Bundle.open(spool.bundle(bundle.name), verify=True)


class Cut(Counting):
    """The link breaks after so many bytes of a command's input; the agent goes on and sees its end."""

    def __init__(self, after_bytes: int) -> None:
        super().__init__()
        self.left_bytes = after_bytes

    def run(self, argv: Sequence[str], *, stdin: Iterable[bytes] | None = None, **options: Any) -> Completed:
        done = super().run(argv, stdin=None if stdin is None else self._up_to_the_cut(stdin), **options)
        if self.left_bytes == 0:
            raise TransientError("the link is gone.", "Try again.", device=self.device)
        return done

    def _up_to_the_cut(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        for block in blocks:
            part = block[: self.left_bytes]
            self.left_bytes -= len(part)
            yield part
            if self.left_bytes == 0:
                return


@pytest.mark.parametrize("share", [0.0001, 0.3, 0.7, 0.99])
def test_after_a_cut_link_at_most_one_chunk_is_sent_again(bundle: Path, tmp_path: Path, share: float) -> None:
    chunks = manifest_of(bundle).all_chunks()
    total = sum({chunk.sha256: chunk.length for _, chunk in chunks}.values())
    cut = Cut(int(total * share))
    with pytest.raises(TransientError, match="the link is gone"):
        deploy_bundle(cut, str(tmp_path / "spool"), bundle)
    again = Counting()
    report = deploy_bundle(again, str(tmp_path / "spool"), bundle)
    assert again.commands == ["has", "missing", "accept"]
    assert int(total * share) + report.bytes_sent <= total + max(chunk.length for _, chunk in chunks) + 4096
    assert again.sent_bytes - report.bytes_sent < 4096  # the manifest is there already
    Bundle.open(tmp_path / "spool/bundles" / bundle.name, verify=True)


def test_a_flipped_byte_on_the_host_is_found_before_it_is_sent(bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / bundle.name
    shutil.copytree(bundle, broken)
    data = bytearray((broken / "k2.bin").read_bytes())
    data[5000] ^= 1
    (broken / "k2.bin").write_bytes(data)
    with pytest.raises(DigestError, match=r"k2.bin on the host is damaged .*build the bundle again"):
        deploy_bundle(Counting(), str(tmp_path / "spool"), broken)
    assert not (tmp_path / "spool/bundles" / bundle.name).exists()
    report = deploy_bundle(Counting(), str(tmp_path / "spool"), bundle)
    assert 0 < report.chunks_sent < report.chunks_total  # what went before the damage was kept


@pytest.mark.parametrize(
    ("data", "cause"),
    [(b"", "not a valid Manifest"), (b"{}", "not a valid Manifest"), (b" " * (9 << 20), "more than the")],
)
def test_a_broken_manifest_on_the_host(tmp_path: Path, data: bytes, cause: str) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(FormatError, match=cause):
        deploy_bundle(Counting(), str(tmp_path / "spool"), tmp_path)


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"cannot be read.*Build the bundle again"):
        deploy_bundle(Counting(), str(tmp_path / "spool"), tmp_path / "nothing")


def test_a_stale_controller_is_refused(bundle: Path, tmp_path: Path) -> None:
    spool = str(tmp_path / "spool")
    deploy_bundle(Counting(), spool, bundle, lease=Lease(store="s", counter=7, takeover=False))
    other = tiny_bundle(tmp_path / "bundles", seed=5)
    stale = Lease(store="s", counter=6, takeover=False)
    with pytest.raises(AgentError, match="under-test: the lease has counter 6, 7 was seen already"):
        deploy_bundle(Counting(), spool, other, lease=stale)
    assert list((tmp_path / "spool/incoming").iterdir()) == []  # not even the manifest
    call_agent(Counting(), spool, "missing", str(other / MANIFEST_NAME))
    with pytest.raises(AgentError, match=r"under-test: the agent's missing failed .exit code 3"):
        deploy_bundle(Counting(), spool, other, lease=stale)


def test_a_device_that_is_full_says_so_before_the_first_chunk(bundle: Path, tmp_path: Path) -> None:
    def handler(argv: tuple[str, ...], env: object) -> Completed:
        said = {
            "error": {"type": "ResourceError", "what": "needs 10 more bytes, 5 are free.", "remedy": "Free."}
        }
        return Completed(argv, 1, json.dumps(said).encode(), b"", False)

    transport = FakeTransport(tmp_path / "device", handler, device="phone")
    with pytest.raises(DeviceFullError, match=r"phone: .*needs 10 more bytes, 5 are free. Free."):
        deploy_bundle(transport, "/spool", bundle)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"not json",
        b"[]",
        b"{}",
        b'{"missing": [0, 0]}',
        b'{"missing": [-1]}',
        b'{"missing": [100000]}',
        b'{"missing": [true]}',
        b'{"missing": "all"}',
        b'{"missing": null}',
    ],
)
def test_a_lying_device_is_a_stable_error(bundle: Path, tmp_path: Path, answer: bytes) -> None:
    transport = FakeTransport(
        tmp_path, lambda argv, env: Completed(argv, 0, answer, b"", False), device="liar"
    )
    with pytest.raises(StableError, match="liar: "):
        deploy_bundle(transport, "/spool", bundle)


def test_an_agent_that_is_not_installed(bundle: Path, tmp_path: Path) -> None:
    transport = FakeTransport(
        tmp_path, lambda argv, env: Completed(argv, 1, b"", b"No module named agent\n", False), device="bare"
    )
    with pytest.raises(AgentError, match=r"bare: the agent's has failed .*No module named agent"):
        deploy_bundle(transport, "/spool", bundle)


SCRIPT = """
import sys, time
from pathlib import Path
from orchestrator.deploy import deploy_bundle
from orchestrator.transports.local import LocalTransport
def slow(done, total):
    print(done, total, flush=True)
    time.sleep(0.05)
deploy_bundle(LocalTransport("under-test"), sys.argv[1], Path(sys.argv[2]), slow)
"""


@pytest.mark.parametrize("cut_s", [0.15, 0.6, 1.2, 1.8])
def test_a_deploy_goes_on_after_kill_9_at_any_point(bundle: Path, tmp_path: Path, cut_s: float) -> None:
    spool = tmp_path / "spool"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(spool), str(bundle)],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(cut_s)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    committed = (spool / "bundles" / bundle.name).exists()
    report = deploy_bundle(Counting(), str(spool), bundle)
    # The agent of the killed controller goes on: it may commit the bundle meanwhile.
    assert report.already or not committed
    assert not report.already or report.bytes_sent == 0
    Bundle.open(spool / "bundles" / bundle.name, verify=True)


def test_task_data_arrives_once_and_whole(tmp_path: Path) -> None:
    path, spool = tmp_path / "rows.safetensors", tmp_path / "spool"
    path.write_bytes(os.urandom(100_000))
    digest = sha256_hex(path.read_bytes())
    first = deploy_task_data(Counting(), str(spool), path)
    assert (first.digest, first.already, first.bytes_sent) == (digest, False, 100_000)
    assert (spool / "tasks" / f"{digest}.safetensors").read_bytes() == path.read_bytes()
    again = Counting()
    assert deploy_task_data(again, str(spool), path).already
    assert (again.commands, again.sent_bytes) == (["has"], 0)
    with pytest.raises(FormatError, match="cannot be read"):
        deploy_task_data(again, str(spool), tmp_path / "nothing")


# ------------------------------------------------------------------ the input


def test_a_pack_holds_its_chunks_in_the_order_they_are_wanted(bundle: Path) -> None:
    chunks = manifest_of(bundle).all_chunks()
    wanted = list(range(len(chunks)))[::-2]
    taken: list[int] = []
    header, *blocks = pack_blocks(bundle, chunks, wanted, taken.append)
    assert json.loads(header) == wanted
    assert header.endswith(b"\n")
    assert [sha256_hex(block) for block in blocks] == [chunks[index][1].sha256 for index in wanted]
    assert taken == [chunks[index][1].length for index in wanted]


def test_blocks_are_read_ahead_and_no_further() -> None:
    read: list[int] = []

    def source() -> Iterator[bytes]:
        for number in range(100):
            read.append(number)
            yield b"%d" % number

    blocks = read_ahead(source(), depth=2)
    assert [next(blocks) for _ in range(3)] == [b"0", b"1", b"2"]
    blocks.close()
    assert len(read) <= 3 + 2 + 1
    assert list(read_ahead(iter([b"a", b"b"]))) == [b"a", b"b"]
    assert list(read_ahead(iter([]))) == []


def test_what_the_source_raises_comes_behind_its_blocks() -> None:
    def source() -> Iterator[bytes]:
        yield b"a"
        raise DigestError("damaged", "")

    blocks = read_ahead(source())
    assert next(blocks) == b"a"
    with pytest.raises(DigestError, match="damaged"):
        next(blocks)
