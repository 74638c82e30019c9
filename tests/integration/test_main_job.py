"""The main job through the command line and Ray: a checkpoint becomes per-device plans, and any verb may be
killed and given again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from db.models import AttemptRow, EvaluationRow, ImportanceScoreRow, JournalRecordRow, RequestRow
from orchestrator.cli.context import SOME_FAILED, driving
from orchestrator.cli.importance import importance_step
from orchestrator.cli.over_devices import deploy_all
from orchestrator.cli.plan import evaluate_all, questions
from orchestrator.cli.profile import profile_all
from orchestrator.library import find_bundle
from orchestrator.measure import RunSettings, Work
from orchestrator.toolchain import cache_folder
from tests.agent_data import REPO
from tests.checkpoints import TOKENIZER_WORDS, random_model, write_checkpoint
from tests.farm_world import (
    BOARD,
    DESK,
    attempts_of,
    job_states,
    journal_lines,
    open_world,
    require_storage,
    write_inventory,
)

TARGETS = "1000s"
BUFFERS = ("--preload", "0", "--working", "1MB")
LIMIT_S = 900
MOMENTS_S = (0, 0.3, 0.6, 0.9)
"""When Ctrl-C comes, while Ray starts and forks."""


@dataclass(frozen=True)
class Cli:
    """The command line, run as a program in a folder of its own."""

    root: Path

    def start(self, *words: str) -> subprocess.Popen[str]:
        """The command, started, leader of its own process group."""
        return subprocess.Popen(
            [sys.executable, "-c", "from orchestrator.cli import main; main()", *words],
            cwd=self.root,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(REPO),
                "HOME": str(self.root),
                "XDG_CACHE_HOME": str(cache_folder().parents[1]),  # the agent is not built for every test
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str, code: int = 0) -> tuple[str, str]:
        """(stdout, stderr) of a command that ends so."""
        process = self.start(*words)
        out, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == code, err
        assert "Traceback" not in err
        return out, err

    def json(self, *words: str, code: int = 0) -> Any:
        """What a command answers machines: one document and nothing else on stdout."""
        return json.loads(self.run(*words, "--json", code=code)[0])

    def killed(self, ready: Callable[[], bool], *words: str) -> None:
        """Start a command and kill -9 its process as soon as ``ready``, which stays true from then on."""
        process = self.start(*words)
        deadline = time.monotonic() + LIMIT_S
        while True:
            ended = process.poll() is not None  # looked at first: it may be ready and end between two looks
            if ready():
                break
            assert not ended, f"ended too early: {process.communicate()}"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=120)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    write_inventory(tmp_path, DESK, BOARD)
    write_checkpoint(
        tmp_path / "checkpoint",
        random_model(
            "bert",
            "encoder",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=24,
        ),
    )
    words = [word for word in TOKENIZER_WORDS if word.isascii() and word[0] not in "[#"]
    for name, rows in (("train", 60), ("dev", 20)):
        lines = [
            f"{' '.join(words[(i * k) % len(words)] for k in range(1, 6))} {i}\t{('no', 'yes')[i % 2]}"
            for i in range(rows)
        ]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["text\tanswer", *lines]) + "\n")
    return Cli(tmp_path)


def measured_rows(root: Path) -> dict[str, int]:
    """How much the store holds of what devices and workers measured."""
    tables = (JournalRecordRow, RequestRow, EvaluationRow, ImportanceScoreRow, AttemptRow)
    with open_world(root) as farm, farm.store.reader() as session:
        return {
            table.__tablename__: session.execute(select(func.count()).select_from(table)).scalar_one()
            for table in tables
        }


def scores(root: Path) -> int:
    return measured_rows(root)["importance_scores"]


@pytest.mark.slow
@pytest.mark.timeout(3600)  # two dozen commands, each of which starts Python, and most of them Ray
def test_the_main_job_end_to_end_killed_on_the_way_and_repeated(cli: Cli) -> None:
    root = cli.root
    require_storage(root)
    cli.run("model", "import", "checkpoint", "--name", "small")
    train = (
        *("model", "train", "small", "--task", "answers", "--train", "train.tsv", "--dev", "dev.tsv"),
        *("--text", "text", "--label", "answer", "--max-tokens", "16", "--profile-rows", "20"),
        *("--steps", "2", "--batch", "8", "--threads", "1"),
    )
    # Killed with the first state of the training on disk.
    cli.killed(lambda: any((root / ".stifarm/training").glob("*/*.safetensors")), *train)
    trained = cli.json(*train)
    assert trained["info"]["untrained"] is False
    bundle = cli.json("bundle", "build", "small-answers")

    # Killed with the first bytes on a device, then with the first scores in the store.
    spools = root / ".stifarm/devices"
    cli.killed(lambda: has_received(spools), "deploy", "--devices", "all")
    deployed = cli.json("deploy", "--devices", "all")
    assert [item["error"] for item in deployed] == [None, None]
    for device in ("desk", "board"):
        assert (spools / device / "bundles" / bundle["digest"] / "manifest.json").is_file()
    cli.run("devices", "quarantine", "board", "--cause", "it swells")
    without = {item["device"]: item["error"] for item in cli.json("deploy", code=SOME_FAILED)}
    assert without["desk"] is None
    assert "in quarantine: it swells" in without["board"]
    cli.run("devices", "release", "board")
    cli.killed(lambda: scores(root) > 0, "importance", "--rows", "20")
    importance = cli.json("importance", "--rows", "20")
    assert len(importance["scores"]) == 4

    # Killed with the first results in a device's journal; the agents go on meanwhile.
    cli.killed(lambda: journalled(spools, "profile") > 1, "profile", "--devices", "all")
    profiles = cli.json("profile", "--devices", "all")
    assert [(p["device"], p["ran"], p["emulated"]) for p in profiles] == [
        ("desk", True, False),
        ("board", True, True),
    ]
    planned = cli.json("plan", "--target", TARGETS, *BUFFERS)
    assert [found["device"] for found in planned["plans"]] == ["desk", "board"]
    evaluate = ("eval", "--target", TARGETS, *BUFFERS, "--requests", "3")
    cli.killed(lambda: journalled(spools, "execute") > 1, *evaluate)
    evaluated = cli.json(*evaluate)
    assert {found["plan_digest"] for found in evaluated["plans"]} == {
        found["plan_digest"] for found in planned["plans"]
    }

    (desk,) = cli.json("plans", "query", "--target", TARGETS)
    (board,) = cli.json("plans", "query", "--device", "board")
    for found, emulated in ((desk, False), (board, True)):
        assert found["emulated"] is emulated
        assert found["stale"] == []
        assert found["measured"]["requests"] + found["measured"]["invalid"] == 3
        assert found["accuracy"]["rows"] == 20
        assert found["plan"]["bundle"] == bundle["digest"]
    assert board["mechanisms"] == ["io: agent"]

    before = measured_rows(root)
    assert set(job_states_of(root).values()) == {"done"}
    with open_world(root) as farm:  # in the attempts that the killed controllers had begun
        assert all(attempts_of(farm, job) == [(1, "done")] for job in job_states_of(root))
    with open_world(root) as farm:
        work = Work.of(farm, find_bundle(farm, None), "answers")
        asked = questions([TARGETS], "0", "1MB", "sti")
        with driving(farm, "all") as session:  # every verb once more, over one pool
            redeployed = deploy_all(session, work, quiet=True)
            scored = importance_step(farm, session.pool, work.bundle, work.task, rows=20, quiet=True)
            reprofiled, failed = profile_all(session, work, quiet=True)
            errors = evaluate_all(session, work, asked, RunSettings(requests=3), quiet=True).errors
    assert [report.bytes_sent for item in redeployed for report in item.reports] == [0] * 4
    assert scored.model_dump(mode="json") == importance
    assert [(p.ran, p.profile.digest) for p in reprofiled] == [(False, p["digest"]) for p in profiles]
    assert failed == {}
    assert errors == [None, None]
    assert measured_rows(root) == before


def has_received(spools: Path) -> bool:
    """Whether a device has something of a bundle: on its way, or whole already."""
    return any(spools.glob("*/incoming/*")) or any(spools.glob("*/bundles/*"))


def journalled(spools: Path, kind: str) -> int:
    """Lines of the longest journal of a kind of job on any device."""
    return max(
        (journal_lines(path.parent) for path in spools.glob(f"*/jobs/{kind}-*/1/journal.log")), default=0
    )


def job_states_of(root: Path) -> dict[str, str]:
    with open_world(root) as farm:
        return job_states(farm)


@contextmanager
def unanswered(spool: Path) -> Iterator[None]:
    """In the block a device does not answer, so that a verb that asks it does not end on any machine.

    Its agent reads a FIFO that nobody writes.
    """
    spool.mkdir(parents=True)
    mark = spool / "device_id"
    os.mkfifo(mark)
    try:
        yield
    finally:
        both_ends = os.open(mark, os.O_RDWR)  # from now on nobody waits for a writer
        mark.unlink()
        os.close(both_ends)


@pytest.mark.slow
@pytest.mark.parametrize("moment_s", MOMENTS_S)
def test_ctrl_c_in_the_middle_of_a_verb_says_how_to_go_on(cli: Cli, moment_s: float) -> None:
    with unanswered(cli.root / ".stifarm/devices/board"):
        process = cli.start("devices", "probe", "--devices", "all")
        deadline = time.monotonic() + LIMIT_S
        while not (cli.root / ".stifarm/controller.lock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(moment_s)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert "run the same command again" in err
    if moment_s == MOMENTS_S[-1]:
        assert len(cli.json("devices", "probe", "--devices", "all")) == 2
