"""Chunks from a stream that breaks, lies or does not end: what came whole is kept, and only that."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agent.spool import Spool
from sti_runtime.manifest import MANIFEST_NAME, Chunk
from tests.agent_data import make_pack, manifest_of
from tests.agents import Agent
from tests.contract.agent_world import Content, wait_for


class Arrival:
    """A bundle announced to an empty spool."""

    def __init__(self, agent: Agent, content: Content, folder: Path) -> None:
        self.agent, self.bundle = agent, content.bundle.path
        self.digest = content.bundle.digest
        self.spool = Spool.open(folder)
        self.wanted = self.missing()

    def call(self, *words: object, **options: Any) -> tuple[int, dict[str, Any]]:
        return self.agent.call(*words, "--spool", self.spool.root, **options)

    def missing(self) -> list[int]:
        self.spool.pack.write_bytes(b"left by a killed host")
        code, report = self.call("missing", self.bundle / MANIFEST_NAME)
        assert code == 0, report
        assert not self.spool.pack.exists()
        wanted: list[int] = report["missing"]
        return wanted

    def pack(self, wanted: list[int]) -> Path:
        return make_pack(self.spool, self.bundle, wanted)

    def accept(self, pack: Path) -> tuple[int, dict[str, Any]]:
        return self.call("accept", self.digest, "--commit", stdin=pack)

    def chunk(self, index: int) -> Chunk:
        return manifest_of(self.bundle).all_chunks()[index][1]

    def start(self) -> subprocess.Popen[bytes]:
        words = ("accept", self.digest, "--commit", "--spool", self.spool.root)
        return self.agent.start(*words, stdin=subprocess.PIPE)

    def feed(self, started: subprocess.Popen[bytes], chunks: int) -> None:
        """All the wanted ones announced, ``chunks`` of them sent and half of the next one."""
        data = self.pack(self.wanted).read_bytes()
        size = data.index(b"\n") + 1 + sum(self.chunk(i).length for i in self.wanted[:chunks])
        assert started.stdin is not None
        started.stdin.write(data[: size + self.chunk(self.wanted[chunks]).length // 2])
        started.stdin.flush()
        wait_for(lambda: set(self.wanted[:chunks]) <= self.arrived(), "the chunks")

    def arrived(self) -> set[int]:
        path = self.spool.arrived_list(self.digest)
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return {int(line) for line in lines[1:] if line.isdigit()}

    def arrives(self) -> None:
        """The rest is sent, and the bundle is whole."""
        code, report = self.accept(self.pack(self.missing()))
        assert (code, report["state"], report["remaining"]) == (0, "committed", 0)
        for path in self.bundle.iterdir():
            assert (self.spool.bundle(self.digest) / path.name).read_bytes() == path.read_bytes()
        assert list(self.spool.incoming.iterdir()) == []


@pytest.fixture
def arrival(agent: Agent, content: Content, tmp_path: Path) -> Arrival:
    return Arrival(agent, content, tmp_path / "empty")


def test_input_that_ends_within_a_chunk_leaves_those_before(arrival: Arrival) -> None:
    pack = arrival.pack(arrival.wanted)
    data = pack.read_bytes()
    pack.write_bytes(data[: len(data) - arrival.chunk(arrival.wanted[-1]).length // 2])
    code, report = arrival.accept(pack)
    assert (code, report["error"]["type"]) == (1, "FormatError")
    count = len(arrival.wanted)
    assert f"The input ended after {count - 1} of {count} chunks" in report["error"]["what"]
    assert arrival.missing() == arrival.wanted[-1:]
    arrival.arrives()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_link_that_breaks_leaves_what_came_whole(arrival: Arrival, number: signal.Signals) -> None:
    """What a device's daemon does then: it signals, and closes the input."""
    started = arrival.start()
    arrival.feed(started, 3)
    started.send_signal(number)
    output, errors = started.communicate(timeout=300)
    assert started.returncode == 1, errors
    assert b"The input ended after 3 of" in output
    assert arrival.missing() == arrival.wanted[3:]
    arrival.arrives()


def test_killed_within_a_chunk_only_the_rest_comes_again(arrival: Arrival) -> None:
    started = arrival.start()
    arrival.feed(started, 4)
    started.kill()
    started.communicate()
    assert arrival.missing() == arrival.wanted[4:]
    arrival.arrives()


def test_what_was_not_flushed_does_not_count_in_another_boot(arrival: Arrival) -> None:
    """Power fails: what was flushed is what there is, the other list is of a boot that has ended."""
    started = arrival.start()
    arrival.feed(started, 2)
    started.kill()
    started.communicate()
    arrived = arrival.spool.arrived_list(arrival.digest)
    lines = arrived.read_bytes().split(b"\n")
    arrived.write_bytes(b"\n".join([b"0" * len(lines[0]), *lines[1:]]))
    arrival.spool.done_list(arrival.digest).unlink(missing_ok=True)
    assert arrival.missing() == arrival.wanted
    arrival.arrives()


def test_bytes_in_another_order_than_announced_are_rejected(arrival: Arrival) -> None:
    same = [i for i in arrival.wanted if arrival.chunk(i).length == arrival.chunk(arrival.wanted[0]).length]
    first, second = same[:2]
    data = arrival.pack([first, second]).read_bytes()
    pack = arrival.pack([second, first])
    pack.write_bytes(pack.read_bytes().partition(b"\n")[0] + b"\n" + data.partition(b"\n")[2])
    code, report = arrival.accept(pack)
    assert (code, report["accepted"], report["rejected"]) == (0, 0, [second, first])
    assert arrival.missing() == arrival.wanted
    pack = arrival.pack(arrival.wanted[::-1])
    assert arrival.accept(pack)[1]["state"] == "committed"


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b"[100000]\n", "distinct numbers below"),
        (b"[0, 0]\n", "distinct numbers below"),
        (b"[" * 300_000 + b"\n", "not a JSON list"),
        (b"[" + b" " * (3 << 20), "has no end within"),
        (b"", "has no end within"),
    ],
)
def test_what_is_no_pack_changes_nothing(arrival: Arrival, line: bytes, cause: str) -> None:
    pack = arrival.spool.root.with_name("bad.pack")
    pack.write_bytes(line)
    code, report = arrival.accept(pack)
    assert (code, report["error"]["type"]) == (1, "FormatError")
    assert cause in report["error"]["what"]
    assert arrival.missing() == arrival.wanted


def test_input_without_an_end_is_read_to_its_last_chunk(arrival: Arrival) -> None:
    started = arrival.start()
    assert started.stdin is not None
    data = arrival.pack(arrival.wanted).read_bytes()
    try:
        started.stdin.write(data)
        for _ in range(1000):
            started.stdin.write(bytes(1 << 16))
    except BrokenPipeError:
        pass
    assert b'"state":"committed"' in started.communicate(timeout=300)[0]
