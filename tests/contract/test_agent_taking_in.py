"""Task data and job files from a stream: kept as far as they came, shown whole and right, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.spool import Spool
from sti_runtime.records import sha256_hex
from tests.agent_data import make_job, push_job, task_piece
from tests.agents import Agent

ROWS = bytes(range(256)) * 12_000
TASK = sha256_hex(ROWS)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool.open(tmp_path / "spool")


def call(agent: Agent, spool: Spool, *words: object, **options: Any) -> tuple[int, dict[str, Any]]:
    return agent.call(*words, "--spool", spool.root, **options)


def kind(answer: dict[str, Any]) -> str:
    said: str = answer["error"]["type"]
    return said


# ------------------------------------------------------------------ task data


def test_task_data_that_ends_early_goes_on_where_it_ended(agent: Agent, spool: Spool) -> None:
    piece = task_piece(spool, 0, ROWS, len(ROWS))
    piece.write_bytes(piece.read_bytes()[:2_000_000])
    code, answer = call(agent, spool, "accept-task", TASK, stdin=piece)
    assert (code, kind(answer)) == (1, "FormatError")
    held = call(agent, spool, "has", TASK)[1]["partial"][TASK]
    assert 1_999_900 < held < 2_000_000
    rest = task_piece(spool, held, ROWS[held:], len(ROWS))
    assert call(agent, spool, "accept-task", TASK, stdin=rest)[1]["state"] == "accepted"
    assert spool.task(TASK).read_bytes() == ROWS
    assert call(agent, spool, "has", TASK)[1]["partial"] == {}


def test_a_piece_replaces_what_lies_behind_its_beginning(agent: Agent, spool: Spool) -> None:
    spool.task_partial(TASK).write_bytes(ROWS[:1000] + b"what a power cut left")
    rest = task_piece(spool, 1000, ROWS[1000:], len(ROWS))
    rest.write_bytes(rest.read_bytes() + b"not read")
    answer = {"bytes": len(ROWS), "digest": TASK, "state": "accepted"}
    assert call(agent, spool, "accept-task", TASK, stdin=rest) == (0, answer)


def test_task_data_that_is_not_what_it_should_be_goes(agent: Agent, spool: Spool) -> None:
    spool.task_partial(TASK).write_bytes(bytes(1000))
    rest = task_piece(spool, 1000, ROWS[1000:], len(ROWS))
    code, answer = call(agent, spool, "accept-task", TASK, stdin=rest)
    assert (code, kind(answer)) == (1, "DigestError")
    assert list(spool.tasks.iterdir()) == []


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[0,1,1]",
        b"[0,1]\n",
        b"[0,1,1,1]\n",
        b"[-1,1,1]\n",
        b"[0,1.0,1]\n",
        b"[true,1,1]\n",
        b'{"0":1}\n',
        b"[0,2,1]\n",
        b"[1,9223372036854775807,9223372036854775807]\n",
        b"[0,1,9223372036854775808]\n",
        b"0" * 200,
    ],
)
def test_what_is_no_piece_changes_nothing(agent: Agent, spool: Spool, header: bytes) -> None:
    spool.task_partial(TASK).write_bytes(b"rows")
    piece = spool.root.with_name("piece")
    piece.write_bytes(header)
    code, answer = call(agent, spool, "accept-task", TASK, stdin=piece)
    assert (code, kind(answer)) == (1, "FormatError")
    assert spool.task_partial(TASK).read_bytes() == b"rows"


def test_a_piece_behind_what_is_here_is_refused(agent: Agent, spool: Spool) -> None:
    spool.task_partial(TASK).write_bytes(b"rows")
    code, answer = call(agent, spool, "accept-task", TASK, stdin=task_piece(spool, 5, b"x", len(ROWS)))
    assert (code, kind(answer)) == (2, "InputError")
    assert spool.task_partial(TASK).read_bytes() == b"rows"


# ------------------------------------------------------------------ job files


def test_a_job_file_is_taken_in_once(agent: Agent, spool: Spool) -> None:
    source = spool.root.with_name("job")
    job, other = make_job(spool), make_job(spool, threads=2)
    source.write_bytes(job.to_json())
    words = ("accept-job", job.id, job.attempt, sha256_hex(job.to_json()))
    path = spool.job(job.id, job.attempt) / "job.json"
    assert call(agent, spool, *words, stdin=source)[1]["state"] == "accepted"
    assert path.read_bytes() == job.to_json()
    assert call(agent, spool, *words)[1]["state"] == "already"
    source.write_bytes(other.to_json())
    words = ("accept-job", job.id, job.attempt, sha256_hex(other.to_json()))
    assert call(agent, spool, *words, stdin=source)[1]["state"] == "other"
    assert path.read_bytes() == job.to_json()
    assert [each.name for each in path.parent.iterdir()] == ["job.json"]


def test_a_job_file_is_taken_in_under_a_lease_that_the_fence_admits(agent: Agent, spool: Spool) -> None:
    assert call(agent, spool, "collect", "--lease", "store-a:7")[0] == 0
    source, job = spool.root.with_name("job"), make_job(spool)
    source.write_bytes(job.to_json())
    words = ("accept-job", job.id, job.attempt, sha256_hex(job.to_json()))
    for lease in ("store-a:6", "store-b:9"):
        code, answer = call(agent, spool, *words, "--lease", lease, stdin=source)
        assert (code, kind(answer)) == (3, "RefusedError")
        assert list(spool.jobs.iterdir()) == []
    assert call(agent, spool, *words, "--lease", "store-a:8", stdin=source)[1]["state"] == "accepted"
    assert call(agent, spool, *words, "--lease", "store-a:7")[0] == 3, "even where it is there already"


@pytest.mark.parametrize("left", ["cut", "zeros", "empty"])
def test_a_job_file_that_a_power_cut_tore_is_replaced(agent: Agent, spool: Spool, left: str) -> None:
    job = make_job(spool)
    data, path = job.to_json(), push_job(spool, job)
    path.write_bytes({"cut": data[:-20], "zeros": bytes(len(data)), "empty": b""}[left])
    source = spool.root.with_name("job")
    source.write_bytes(data)
    words = ("accept-job", job.id, job.attempt, sha256_hex(data))
    assert call(agent, spool, *words, stdin=source)[1]["state"] == "accepted"
    assert path.read_bytes() == data


def test_a_job_file_of_a_newer_version_stays(agent: Agent, spool: Spool) -> None:
    job = make_job(spool)
    path = push_job(spool, job)
    newer = path.read_bytes().replace(b'"version":1', b'"version":2')
    path.write_bytes(newer)
    words = ("accept-job", job.id, job.attempt, sha256_hex(job.to_json()))
    assert call(agent, spool, *words)[1]["state"] == "other"
    assert path.read_bytes() == newer


def test_half_a_job_file_changes_nothing(agent: Agent, spool: Spool) -> None:
    job = make_job(spool)
    source = spool.root.with_name("job")
    source.write_bytes(job.to_json()[:-1])
    code, answer = call(agent, spool, "accept-job", job.id, 1, sha256_hex(job.to_json()), stdin=source)
    assert (code, kind(answer)) == (1, "DigestError")
    assert list(spool.jobs.iterdir()) == []
    for words in (("../../etc", 1, TASK), (job.id, 0, TASK), (job.id, 1, "xyz")):
        code, answer = call(agent, spool, "accept-job", *words, stdin=source)
        assert (code, kind(answer)) == (2, "InputError")
