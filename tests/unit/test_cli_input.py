"""Wrong input to every verb: two lines that name the thing and the remedy, an exit code, no traceback."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from sqlalchemy import update

from db.devices import device_by_name, latest_facts, record_facts, register_device
from db.documents import parse
from db.hosts import forget_host
from db.models import ControllerRow, DeviceRow
from db.plan_answers import latest_plans
from db.profiles import save_device_profile
from orchestrator import measure
from orchestrator.cli import main
from orchestrator.host_book import note_hosts
from orchestrator.library import find_bundle
from orchestrator.measure import Work
from orchestrator.worker import HostWorker
from sti_runtime.errors import InputError
from tests.agent_data import REPO
from tests.checkpoints import random_model, write_checkpoint
from tests.farm_world import (
    BOARD,
    DESK,
    as_controller,
    fill,
    make_ready,
    open_world,
    require_storage,
    score,
    write_inventory,
    write_task_files,
)
from tests.unit.test_host_routes import offer, seen

FAILED, USAGE = 1, 2


@dataclass(frozen=True)
class Answer:
    """What a command did."""

    code: int
    out: str
    err: str


Run = Callable[..., Answer]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs the command line in this process, whose logging is afterwards as it was."""
    handlers = list(logging.getLogger().handlers)

    def command(root: Path, *words: str) -> Answer:
        before = ["--home", str(root / ".stifarm"), "--inventory", str(root / "inventory.yaml")]
        with pytest.raises(SystemExit) as done:
            main([*before, *words])
        captured = capsys.readouterr()
        code = done.value.code
        return Answer(code if isinstance(code, int) else 0, captured.out, captured.err)

    yield command
    structlog.reset_defaults()
    logging.getLogger().handlers[:] = handlers


def refusal(answer: Answer, code: int) -> tuple[str, str]:
    """The two parts of an error: what happened and what to do. Nothing went to stdout."""
    assert answer.code == code, answer
    assert answer.out == ""
    assert "Traceback" not in answer.err
    match = re.search(r"^error (.+?)\n {6}(\S.*)\Z", answer.err, re.DOTALL | re.MULTILINE)
    assert match is not None, answer.err
    return match[1], match[2].strip()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A farm with a model, a task, a bundle, importance, and the profile of ``desk`` but not of ``board``."""
    root = tmp_path_factory.mktemp("farm")
    require_storage(root)
    write_inventory(root, DESK, BOARD)
    write_task_files(root)
    with open_world(root) as farm:
        work = fill(farm)
        score(farm, work.bundle)
        worker = HostWorker(farm.settings, farm.inventory.devices)
        ready = make_ready(farm, worker, work, "desk")
        measure.profile_device(farm, worker, ready, work, again=False, advance=None)
        worker.close()
    return root


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A farm with an inventory and nothing else."""
    write_inventory(tmp_path, DESK, BOARD)
    return tmp_path


PLAN = ("plan", "--target", "1s")
BUILD = ("bundle", "build", "tiny")
EVAL = ("eval", "--target", "1s")
QUERY = ("plans", "query")


@pytest.mark.parametrize(
    ("words", "named", "remedy"),
    [
        # devices
        ((*PLAN, "--devices", "desc"), "No device is called 'desc'", "Did you mean desk?"),
        ((*PLAN, "--devices", "desk,,board"), "empty term", "all, this-machine"),
        ((*PLAN, "--devices", "all,!all"), "selects no device", "desk, board"),
        (("deploy", "--devices", "phone"), "No device is called 'phone'", "desk"),
        (("profile", "--devices", "kin=board"), "No device has the label 'kin'", "kind"),
        ((*EVAL, "--devices", "transport:usb"), "transport 'usb'", "local"),
        (("devices", "probe", "--devices", "x"), "No device is called 'x'", "board"),
        (("devices", "clean", "--devices", "x"), "No device is called 'x'", "board"),
        ((*QUERY, "--device", "desc"), "no device named 'desc'", "Did you mean desk?"),
        ((*QUERY, "--device", "board"), "no device named 'board'", "stifarm devices probe"),
        ((*QUERY, "--label", "kind"), "--label 'kind' is not name=value", "--label kind=board"),
        # models, bundles, tasks
        ((*PLAN, "--bundle", "big"), "There is no bundle 'big'", "Known: tiny"),
        (("deploy", "--bundle", "big"), "There is no bundle 'big'", "stifarm bundle build"),
        (("bundle", "show", "--bundle", "big"), "There is no bundle 'big'", "Known: tiny"),
        (("bundle", "build", "big"), "There is no model 'big'", "Known: tiny"),
        ((*PLAN, "--task", "sst-3"), "There is no task 'sst-3'", "Known tasks: demo"),
        (("importance", "--task", "sst-3"), "There is no task 'sst-3'", "Known tasks: demo"),
        ((*QUERY, "--task", "sst-3"), "There is no task 'sst-3'", "Known tasks: demo"),
        # quantities
        (("plan", "--target", "100"), "--target: '100' has no unit", "Write it like 100ms or 100s."),
        (("plan", "--target", "100 parsecs"), "'100 parsecs'", "150ms"),
        (("plan", "--target", "0ms"), "--target: no latency can be 0", "100ms"),
        (("plan", "--target", ","), "No target latency", "--target 100ms"),
        (("plan", "--target", "99999999999999s"), "larger than anything", "150ms"),
        (("plan", "--target", "-5ms"), "'-5ms' is not a duration", "150ms"),
        (("eval", "--target", "fast"), "--target: 'fast'", "150ms"),
        ((*QUERY, "--target", "fast"), "--target: 'fast'", "150ms"),
        ((*PLAN, "--preload", "1QB"), "--preload: '1QB' is not a size", "4MB"),
        ((*PLAN, "--preload", "99999999999999GB"), "larger than anything", "4MB"),
        ((*PLAN, "--working", "lots"), "--working: 'lots' is not a size", "4MB"),
        ((*QUERY, "--preload", "1 ms"), "--preload: '1 ms' is not a size", "4MB"),
        # words
        ((*PLAN, "--policy", "magic"), "Unknown policy 'magic'", "sti"),
        ((*EVAL, "--policy", "sti,magic"), "Unknown policy 'magic'", "sti"),
        ((*QUERY, "--policy", "magic"), "'magic' is unknown", "sti"),
        ((*EVAL, "--kind", "tepid"), "--kind 'tepid' is unknown", "cold or warm"),
        ((*QUERY, "--kind", "tepid"), "--kind 'tepid' is unknown", "warm"),
        (("bundle", "build", "tiny", "--fidelities", "2,9"), "--fidelities '2,9'", "2,4,6,32"),
        (("bundle", "build", "tiny", "--head-bits", "7"), "--head-bits 7", "32 or 6"),
        (("bundle", "build", "tiny", "--outlier-density", "nan"), "--outlier-density nan", "GOBO's is -4"),
        ((*BUILD, "--codec", "fisher"), "no task is named", "--task TASK"),
        ((*BUILD, "--codec", "fisher", "--task", "sst-3"), "There is no task 'sst-3'", "Known tasks: demo"),
        ((*BUILD, "--codec", "fisher", "--task", "demo", "--refine", "l1"), "--refine l1", "--refine out"),
        ((*BUILD, "--task", "demo"), "--task is given, and codec gobo", "--codec fisher"),
        ((*BUILD, "--rows", "9"), "--rows is given, and codec gobo", "--codec fisher"),
        (("db", "export", "nothing", "x.csv"), "no table 'nothing'", "requests"),
        (("db", "export", "devices", "x.csv", "--format", "xls"), "'xls'", "csv"),
        (("init", "."), "is there already", "another folder"),
    ],
)
def test_wrong_input_is_named_with_its_remedy(
    world: Path, run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], named: str, remedy: str
) -> None:
    monkeypatch.chdir(world)
    what, to_do = refusal(run(world, *words), USAGE)
    assert named in what
    assert remedy in to_do


@pytest.mark.parametrize(
    "words",
    [
        ("plan",),
        ("plans", "query", "--targets", "1s"),
        ("fly",),
        (*EVAL, "--requests", "0"),
        (*EVAL, "--requests", "many"),
        (*EVAL, "--seed", "-1"),
        ("importance", "--rows", "0"),
        ("model", "train", "tiny", "--task", "x", "--train", "a", "--dev", "b", "--epochs", "0"),
        ("model", "train", "tiny", "--task", "x", "--train", "a", "--dev", "b", "--learning-rate", "-1"),
        ("model", "train", "tiny", "--task", "x", "--train", "a", "--dev", "b", "--learning-rate", "nan"),
        ("model", "train", "tiny", "--task", "x", "--train", "a", "--dev", "b", "--seed", "-1"),
    ],
)
def test_wrong_usage_is_exit_code_2(world: Path, run: Run, words: tuple[str, ...]) -> None:
    answer = run(world, *words)
    assert answer.code == USAGE
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert "Error" in answer.err
    assert "Usage" in answer.err


def test_wrong_usage_is_a_document_too_where_one_is_asked_for(empty: Path, run: Run) -> None:
    for words, named in ((("plan", "--json"), "--target"), (("devices", "clean", "--json"), "--devices")):
        answer = run(empty, *words)
        assert answer.code == USAGE
        assert named in json.loads(answer.out)["error"]


# ------------------------------------------------------------------ nothing there yet


@pytest.mark.parametrize(
    ("words", "code", "named", "remedy"),
    [
        (QUERY, FAILED, "holds no plan", "stifarm plan"),
        ((*PLAN,), USAGE, "There is no bundle yet", "stifarm bundle build"),
        (("deploy",), USAGE, "There is no bundle yet", "stifarm bundle build"),
        (("profile",), USAGE, "There is no bundle yet", "stifarm bundle build"),
        (("importance",), USAGE, "There is no bundle yet", "stifarm bundle build"),
        ((*EVAL,), USAGE, "There is no bundle yet", "stifarm bundle build"),
        (("bundle", "build", "tiny"), USAGE, "There is no model 'tiny'", "stifarm model import"),
        (("model", "show", "tiny"), USAGE, "There is no model 'tiny'", "stifarm model import"),
        (("model", "import", "./nowhere"), USAGE, "./nowhere: there is no such folder", "config.json"),
        (("db", "backup", "copy.sqlite"), USAGE, "there is no store to back up", "URL"),
    ],
)
def test_without_anything_made_yet(
    empty: Path, run: Run, words: tuple[str, ...], code: int, named: str, remedy: str
) -> None:
    what, to_do = refusal(run(empty, *words), code)
    assert named in what
    assert remedy in to_do


@pytest.mark.parametrize("verb", [("deploy",), ("profile",), ("importance",), PLAN, EVAL])
def test_a_missing_inventory_is_said_first(empty: Path, run: Run, verb: tuple[str, ...]) -> None:
    what, _ = refusal(run(empty, "--inventory", "nope.yaml", *verb), USAGE)
    assert "nope.yaml" in what
    what, _ = refusal(run(empty, *verb), USAGE)
    assert str(empty / ".stifarm") in what


def test_a_query_without_plans_is_an_error_in_the_document_too(empty: Path, run: Run) -> None:
    answer = run(empty, *QUERY, "--json")
    assert answer.code == FAILED
    document = json.loads(answer.out)
    assert "holds no plan" in document["error"]
    assert document["remedy"] == "Make one: stifarm plan --devices all --target T"


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("--device", "desk", "--target", "1ns", "--emulated"), "It holds some for T = 1,?000 s. Make one"),
        (("--device", "desk", "--preload", "7B"), r"Without --preload it has some \(--preload: 1 MB\)"),
        (("--policy", "exact"), r"Without --policy it has some \(--policy: sti\)"),
        (("--label", "kind=none"), r"Without --label it has some \(devices: desk\)"),
    ],
)
def test_a_query_that_nothing_answers_says_what_would(
    world: Path, run: Run, words: tuple[str, ...], remedy: str
) -> None:
    assert run(world, "plan", "--devices", "desk", "--target", "1000s", "--working", "1MB").code == 0
    what, to_do = refusal(run(world, *QUERY, *words), FAILED)
    assert "holds no plan" in what
    assert re.match(remedy, to_do), to_do
    assert "--emulated" not in to_do


def test_without_importance_and_without_a_profile(empty: Path, run: Run) -> None:
    with open_world(empty) as farm:
        fill(farm)
    what, remedy = refusal(run(empty, *PLAN, "--devices", "desk"), USAGE)
    assert what == "desk: the store has no profile of it, for it was never asked."
    assert remedy == "Measure it: stifarm profile --devices desk."


def refusal_in_table(answer: Answer) -> tuple[str, str]:
    """The error of one device, which is shown before the table of all."""
    assert answer.code in (FAILED, USAGE)
    return refusal(Answer(answer.code, "", answer.err), answer.code)


def test_a_device_without_profile_fails_alone(world: Path, run: Run) -> None:
    answer = run(world, "plan", "--target", "1000s", "--working", "1MB", "--json")
    assert answer.code == 3
    document = json.loads(answer.out)
    assert [plan["device"] for plan in document["plans"]] == ["desk"]
    assert "board" in document["failed"][0]["error"]
    assert re.search(r"^error .*'?board", answer.err, re.MULTILINE)


def test_devices_of_lab_hosts_are_planned_for_from_the_store(world: Path, run: Run, tmp_path: Path) -> None:
    asked = ("--target", "1000s", "--working", "1MB", "--json")
    inventory = ("--inventory", str(write_inventory(tmp_path, BOARD)))
    with open_world(world) as farm:
        hosts = [seen(offer("bench1", "desk", "unseen", "both"), "away"), seen(offer("bench2", "both"))]
        note_hosts(farm.store, hosts)
    try:
        found = run(world, *inventory, "plan", "--devices", "desk", *asked)
        assert found.code == 0, found.err
        assert [plan["device"] for plan in json.loads(found.out)["plans"]] == ["desk"]
        everything = json.loads(run(world, *inventory, "plan", *asked).out)
        assert [plan["device"] for plan in everything["plans"]] == ["desk"]
        assert len(everything["failed"]) == 3
        what, remedy = refusal_in_table(run(world, *inventory, "plan", "--devices", "unseen", *asked))
        assert what == "unseen: the store has no profile of it, for it was never asked."
        assert remedy == "Measure it: stifarm profile --devices unseen."
        what, _ = refusal_in_table(run(world, *inventory, "plan", "--devices", "both", *asked))
        assert what == "both: two hosts name it: bench1 and bench2."
    finally:
        with open_world(world) as farm, farm.store.session() as session:
            for host in ("bench1", "bench2"):
                forget_host(session, host)


# ------------------------------------------------------------------ inventory and state


def test_every_problem_of_the_inventory_has_its_line(empty: Path, run: Run) -> None:
    (empty / "inventory.yaml").write_text(
        "version: 1\n"
        "devices:\n"
        "  - {name: a, transport: local, colour: red}\n"
        "  - {name: a, transport: locl}\n"
        "  - {name: b, transport: local, emulate: {read_bandwidth: 3 parsecs}}\n"
    )
    for words in (("devices", "list"), ("deploy",), ("doctor",)):
        answer = run(empty, *words)
        what, remedy = refusal(answer, USAGE)
        path = empty / "inventory.yaml"
        for line, text in ((3, "colour"), (4, "'a'"), (4, "locl"), (5, "3 parsecs")):
            assert re.search(rf"^  {re.escape(str(path))}:{line}: .*{text}", what, re.MULTILINE), what
        assert what.startswith("The inventory has 4 problems:\n")
        assert ": b: read_bandwidth" in what
        assert remedy.startswith("Correct it")


@pytest.mark.parametrize("words", [("devices", "list"), ("devices", "probe"), ("doctor",)])
def test_a_missing_inventory_is_named(tmp_path: Path, run: Run, words: tuple[str, ...]) -> None:
    what, remedy = refusal(run(tmp_path, *words), USAGE)
    assert what == f"There is no inventory {tmp_path / 'inventory.yaml'}."
    assert "stifarm init" in remedy


def test_the_demo_without_inventory_tells_of_init(tmp_path: Path, run: Run) -> None:
    what, remedy = refusal(run(tmp_path, "demo"), USAGE)
    assert "inventory.yaml" in what
    assert "stifarm init" in remedy


def test_a_home_that_is_a_file_is_refused(empty: Path, run: Run) -> None:
    (empty / ".stifarm").write_text("")
    what, remedy = refusal(run(empty, *QUERY), USAGE)
    assert ".stifarm is not a folder" in what
    assert "STIFARM_HOME" in remedy


@pytest.mark.parametrize(
    ("url", "named"),
    [("nonsense", "URL"), ("oracle://x/y", "oracle"), ("sqlite:////proc/x.sqlite", "/proc")],
)
def test_a_store_that_cannot_be_opened_is_named(empty: Path, run: Run, url: str, named: str) -> None:
    answer = run(empty, "--db-url", url, *QUERY)
    what, _ = refusal(answer, answer.code)
    assert answer.code in (FAILED, USAGE)
    assert named in what


READS = (
    ("campaign", "status"),
    ("campaign", "list"),
    ("schedules", "list"),
    ("alerts", "list"),
    ("host", "list"),
    ("host", "controllers"),
    ("devices", "list"),
    ("model", "list"),
    ("model", "show", "tiny"),
    ("bundle", "list"),
    ("db", "export", "devices", "x.csv"),
    ("db", "backup", "x.sqlite"),
    QUERY,
)


@pytest.mark.parametrize("verb", READS, ids=" ".join)
def test_a_verb_that_reads_makes_no_store_where_a_given_url_names_none(
    empty: Path, run: Run, verb: tuple[str, ...]
) -> None:
    path = empty / "mistyped.sqlite"
    what, remedy = refusal(run(empty, "--db-url", f"sqlite:///{path}", *verb), USAGE)
    assert f"There is no store at {path}" in what
    assert f"sqlite:///{path} db upgrade" in remedy
    assert not path.exists()


@pytest.mark.parametrize("verb", [READS[0], ("db", "upgrade"), ("db", "restore", "x"), ("serve", "--once")])
def test_a_given_store_in_a_folder_that_does_not_exist_is_refused(
    empty: Path, run: Run, verb: tuple[str, ...]
) -> None:
    path = empty / "nonexist/x.sqlite"
    what, remedy = refusal(run(empty, "--db-url", f"sqlite:///{path}", *verb), USAGE)
    assert str(path) in what
    assert f"mkdir -p {path.parent}" in remedy
    assert not path.parent.exists()


def test_a_new_store_is_made_where_that_is_asked_for_and_said_once(empty: Path, run: Run) -> None:
    path = empty / "new.sqlite"
    given = ("--db-url", f"sqlite:///{path}")
    first, second = (run(empty, *given, "db", "upgrade") for _ in range(2))
    assert (first.code, second.code) == (0, 0)
    assert (f"{path} is to be a new store" in first.err, "new store" in second.err) == (True, False)
    assert run(empty, *given, "campaign", "status").code == 0


def test_doctor_makes_no_store_and_says_where_there_is_none(empty: Path, run: Run) -> None:
    path = empty / "mistyped.sqlite"
    answer = run(empty, "--db-url", f"sqlite:///{path}", "doctor", "--json")
    assert any(f"There is no store at {path}" in one["text"] for one in json.loads(answer.out))
    assert not path.exists()


def test_a_file_that_is_no_store_is_refused_and_left_alone(empty: Path, run: Run) -> None:
    (empty / ".stifarm").mkdir()
    store = empty / ".stifarm/store.sqlite"
    store.write_bytes(b"my thesis\n" * 100)
    answer = run(empty, *QUERY)
    what, _ = refusal(answer, FAILED)
    assert str(store) in what
    assert store.read_bytes() == b"my thesis\n" * 100


@pytest.mark.parametrize("target", ["nowhere/x.csv", "file/x.csv"])
def test_an_export_that_cannot_be_written_is_named(
    world: Path, run: Run, tmp_path: Path, target: str
) -> None:
    (tmp_path / "file").write_text("")
    what, remedy = refusal(run(world, "db", "export", "devices", str(tmp_path / target)), FAILED)
    assert target in what
    assert "another folder" in remedy


def test_a_store_is_copied_exported_and_compacted(world: Path, run: Run, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.sqlite", tmp_path / "other"
    other.mkdir()
    write_inventory(other, DESK)
    assert run(world, "db", "backup", str(copy)).code == 0
    assert run(other, "db", "restore", str(copy)).code == 0
    what, remedy = refusal(run(other, "db", "restore", str(copy)), USAGE)
    assert "holds data already" in what
    assert remedy
    for kind in ("csv", "json"):
        files = [tmp_path / f"{root.name}.{kind}" for root in (world, other)]
        for root, file in zip((world, other), files, strict=True):
            assert run(root, "db", "export", "io_samples", str(file), "--format", kind).code == 0
        assert files[0].read_bytes() == files[1].read_bytes()
        assert files[0].stat().st_size > 1000
    compact = ("db", "compact", "--days", "0", "--profiles", "0", "--runs", "0", "--json")
    would = json.loads(run(other, *compact, "--dry-run").out)
    done = json.loads(run(other, *compact, "--vacuum").out)
    assert would == done | {"dry_run": True}
    assert json.loads(run(other, *compact).out)["samples"] == 0


# ------------------------------------------------------------------ datasets


TRAIN = ("model", "train", "tiny", "--task", "mine", "--text", "sentence", "--label", "label")
ADD = ("task", "add", "mine", "--model", "tiny", "--text", "sentence", "--label", "label")


@pytest.mark.parametrize("verb", [TRAIN, ADD], ids=["train", "add"])
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"\xff\xfe\n"), "not UTF-8"),
        (lambda path: path.write_bytes(b"sentence\tlabel\n"), "no rows"),
        (lambda path: path.write_bytes(b"text\tlabel\na\tb\nc\td\n"), "no column 'sentence'"),
        (lambda path: path.write_bytes(b"sentence\tlabel\na\tpositive\nb\tpositive\textra\n"), "line 3"),
        (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_named(
    world: Path,
    run: Run,
    tmp_path: Path,
    verb: tuple[str, ...],
    spoil: Callable[[Path], object],
    named: str,
) -> None:
    train, dev = write_task_files(tmp_path)
    spoil(train)
    answer = run(world, *verb, "--train", str(train), "--dev", str(dev), "--profile-rows", "8")
    what, remedy = refusal(answer, USAGE)
    assert str(train) in what
    assert named in what
    assert remedy


@pytest.mark.parametrize("verb", [TRAIN, ADD], ids=["train", "add"])
def test_an_unknown_label_is_named_with_its_line(
    world: Path, run: Run, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    train, dev = write_task_files(tmp_path)
    with dev.open("a") as stream:
        stream.write("the soup was fine\tmeh\n")
    answer = run(world, *verb, "--train", str(train), "--dev", str(dev), "--profile-rows", "8")
    what, remedy = refusal(answer, USAGE)
    assert f"{dev}, line 26: unknown label 'meh'" in what
    assert "Correct the row" in remedy


def test_other_mistakes_with_tasks(world: Path, run: Run, tmp_path: Path) -> None:
    train, dev = write_task_files(tmp_path)
    files = ("--train", str(train), "--dev", str(dev))
    what, remedy = refusal(run(world, "task", "add", "mine", "--model", "tiny", *files), USAGE)
    assert "'mine' is not a preset" in what
    assert "--text COLUMN" in remedy
    what, remedy = refusal(run(world, *ADD, *files, "--profile-rows", "500"), USAGE)
    assert "500 rows" in what
    assert remedy
    what, remedy = refusal(run(world, *ADD, *files, "--profile-rows", "8", "--max-tokens", "4000"), USAGE)
    assert "4000 tokens" in what
    assert "40" in remedy
    what, remedy = refusal(run(world, *ADD, *files, "--model", "big"), USAGE)
    assert "There is no model 'big'" in what
    what, _ = refusal(run(world, *TRAIN, *files, "--pooling", "max"), USAGE)
    assert "--pooling 'max'" in what
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict)  # as of a CPU without bfloat16 products
        what, remedy = refusal(run(world, *TRAIN, *files, "--on", "cpu", "--precision", "mixed"), USAGE)
    assert "Mixed precision gains nothing on this CPU" in what
    assert "fp32" in remedy
    what, _ = refusal(run(world, *TRAIN, *files, "--patience", "2", "--stop-by", "luck"), USAGE)
    assert "--stop-by 'luck'" in what
    what, _ = refusal(run(world, "importance", "--devices", "all", "--method", "gradient"), USAGE)
    assert "backward pass" in what


def test_a_model_without_head_or_tokenizer_is_refused(world: Path, run: Run, tmp_path: Path) -> None:
    train, dev = write_task_files(tmp_path)
    folder = write_checkpoint(tmp_path / "bare", random_model("bert", "encoder"))
    assert run(world, "model", "import", str(folder), "--name", "bare").code == 0
    files = ("--train", str(train), "--dev", str(dev), "--profile-rows", "8")
    words = ("--task", "mine", "--text", "sentence", "--label", "label")
    (folder / "vocab.txt").unlink()
    what, remedy = refusal(run(world, "model", "import", str(folder)), USAGE)
    assert "no tokenizer.json" in what
    assert "tokenizer files beside config.json" in remedy
    what, remedy = refusal(run(world, "model", "train", "bare", *words, *files), USAGE)
    assert "tokens" in what
    assert remedy
    what, remedy = refusal(run(world, *ADD, *files, "--model", "bare"), USAGE)
    assert "bare has no head" in what
    assert "stifarm model train" in remedy


# ------------------------------------------------------------------ T


def test_an_infeasible_target_names_the_smallest_that_works(world: Path, run: Run) -> None:
    words = ("plan", "--devices", "desk", "--preload", "0", "--working", "1MB", "--json")
    answer = run(world, *words, "--target", "1us")
    assert answer.code == FAILED
    (infeasible,) = json.loads(answer.out)["infeasible"]
    smallest = int(infeasible["smallest_target_ns"])
    what, remedy = refusal(Answer(answer.code, "", answer.err), FAILED)
    assert "desk" in what
    named = re.search(r"(\d+(?:\.\d+)?) ?(ns|us|µs|ms|s)\b", remedy)
    assert named is not None, remedy
    for target in (f"{smallest}ns", named[0].replace(" ", "")):
        planned = run(world, *words, "--target", target)
        assert planned.code == 0, planned.err
        assert len(json.loads(planned.out)["plans"]) == 1, target
    assert run(world, *words, "--target", f"{smallest - 1}ns").code == FAILED


def test_a_mixture_of_targets_gives_those_that_work(world: Path, run: Run) -> None:
    answer = run(
        world, "plan", "--devices", "desk", "--target", "1us,1000s", "--working", "1MB", "--json"
    )  # fmt: skip
    assert answer.code == 0
    document = json.loads(answer.out)
    assert (len(document["plans"]), len(document["infeasible"])) == (1, 1)
    shown = run(world, "plan", "--devices", "desk", "--target", "1us,1000s", "--working", "1MB")
    assert "infeasible" in shown.out
    query = run(world, *QUERY, "--target", "1000s", "--json", "--task", "DEMO")
    assert [found["device"] for found in json.loads(query.out)] == ["desk"]


def test_plans_are_found_by_device_label_task_target_and_preload(world: Path, run: Run) -> None:
    for preload in ("0", "10kB"):
        words = ("--devices", "desk", "--target", "700s,800s", "--working", "1MB", "--preload", preload)
        assert run(world, "plan", *words).code == 0

    def asked(*words: str) -> list[tuple[str, int, int]]:
        answer = run(world, *QUERY, *words, "--json")
        if answer.code:
            assert "holds no plan" in answer.err, answer
            return []
        found = [(each["device"], each["plan"]["target_ns"]) for each in json.loads(answer.out)]
        sizes = [each["plan"]["preload_bytes"] for each in json.loads(answer.out)]
        return [(*one, size) for one, size in zip(found, sizes, strict=True)]

    first, second = 700 * 10**9, 800 * 10**9
    both = [("desk", first, 0), ("desk", first, 10_000)]
    assert asked("--device", "desk", "--target", "700s") == both
    assert asked("--label", "kind=computer", "--target", "700s") == both
    assert asked("--label", "kind=board", "--target", "700s") == []
    assert asked("--task", "demo", "--target", "700s") == both
    assert asked("--target", "800s,700s", "--preload", "10kB") == [both[1], ("desk", second, 10_000)]
    assert asked("--target", "700s", "--preload", "7kB") == []
    assert asked("--target", "700s", "--policy", "uniform") == []


def test_a_plan_is_explained(world: Path, run: Run) -> None:
    plan = ("--devices", "desk", "--target", "600s", "--working", "1MB", "--preload", "10kB")
    assert run(world, "plan", *plan).code == 0
    query = (*QUERY, "--device", "desk", "--target", "600s", "--explain")
    shown = run(world, *query)
    assert "highest fidelity" in " ".join(shown.out.split())
    assert "IO budget left" in shown.out
    (found,) = json.loads(run(world, *query, "--json").out)
    assert [layer["layer"] for layer in found["explanation"]["layers"]] == list(
        range(len(found["explanation"]["layers"]))
    )


def test_plans_that_differ_in_their_working_buffer_only_are_told_apart(world: Path, run: Run) -> None:
    asked = ("--device", "desk", "--target", "620s", "--preload", "10kB")
    plan = ("--devices", "desk", "--target", "620s", "--preload", "10kB")
    assert run(world, "plan", *plan, "--working", "1MB").code == 0
    assert not re.search(r"\bW\b", run(world, *QUERY, *asked, "--explain").out)
    assert run(world, "plan", *plan, "--working", "2MB").code == 0
    shown = run(world, *QUERY, *asked, "--explain").out
    assert len(re.findall(r"^ +T +W +n×m", shown, re.MULTILINE)) == 1
    assert len(re.findall(r"^device +T +policy +W ", shown, re.MULTILINE)) == 1
    assert [f"T = 620 s, W = {size} MB" in shown for size in (1, 2)] == [True, True]
    documents = json.loads(run(world, *QUERY, *asked, "--json").out)
    assert [each["question"]["working_bytes"] for each in documents] == [10**6, 2 * 10**6]
    assert {each["importance"]["method"] for each in documents} == {"exhaustive"}
    assert {each["importance"]["digest"] for each in documents} == {
        each["plan"]["importance"] for each in documents
    }


def test_a_device_of_the_same_chip_borrows_a_profile_to_plan_from(world: Path) -> None:
    with open_world(world) as farm:
        work = Work.of(farm, find_bundle(farm, None), "demo")
        desk = next(device for device in farm.inventory.devices if device.name == "desk")
        twin = replace(desk, name="twin")
        question = measure.Question(650 * 10**9, 10_000, 10**6)
        desk_id, profile, _ = measure.stored_profile(farm, desk, work)
        with farm.store.session() as session:  # what so small a model's samples give may be unfit to lend
            save_device_profile(session, profile.model_copy(update={"unfit": ()}), device_id=desk_id)
        (own,) = measure.make_plans(farm, desk, work, [question])
        with farm.store.session() as session:
            row = register_device(
                session, identity="twin", name="twin", transport="local", engine=desk.engine, emulated=False
            )
        with pytest.raises(InputError, match="twin: there is no profile") as caught:
            measure.make_plans(farm, twin, work, [question])
        assert "stifarm profile --devices twin" in caught.value.remedy
        with farm.store.session() as session:
            kept = latest_facts(session, device_by_name(session, "desk").id)
            assert kept is not None
            facts = parse(kept.facts_json) | {"host_seen": {"chip": "SM8550"}}
            for device_id in (row.id, kept.device_id):
                record_facts(
                    session,
                    device_id,
                    facts,
                    boot_id=kept.boot_id,
                    os_build=kept.os_build,
                    kernel=kept.kernel,
                )
        (lent,) = measure.make_plans(farm, twin, work, [question])
        with farm.store.session() as session:
            (of_desk,) = latest_plans(session, device="desk", target_ns=question.target_ns)
            (of_twin,) = latest_plans(session, device="twin", target_ns=question.target_ns)
            session.get_one(DeviceRow, row.id).retired_wall_ns = 1  # so that no other test finds it
    assert own.plan is not None
    assert lent.plan is not None
    assert (own.plan.flags, lent.plan.flags) == ((), ("borrowed-profile",))
    assert (of_desk.borrowed, of_twin.borrowed) == (False, True)
    assert of_twin.profiles[0].device == "desk"
    narrow, wide = of_desk.predicted_interval, of_twin.predicted_interval
    assert narrow is not None
    assert wide is not None
    assert (wide.low, wide.high) == (narrow.low // 2, 2 * narrow.high)


def test_controllers_are_listed(world: Path, run: Run) -> None:
    with open_world(world) as farm, as_controller(farm):
        answer = run(world, "host", "controllers")
    assert (answer.code, str(os.getpid()) in answer.out) == (0, True), answer
    assert "alive" in answer.out


def test_a_controller_whose_process_is_gone_is_silent(world: Path, run: Run) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with open_world(world) as farm, as_controller(farm):
        with farm.store.session() as session:
            session.execute(update(ControllerRow).values(pid=ended.pid))
        shown = run(world, "host", "controllers").out
        (one,) = json.loads(run(world, "host", "controllers", "--json").out)
        assert one["state"] == "silent"
    assert re.search(r"silent for \d+ s", shown), shown


def test_a_working_buffer_too_small_for_any_shard_is_named(world: Path, run: Run) -> None:
    words = ("--devices", "desk", "--preload", "0", "--working", "1B")
    what, remedy = refusal_in_table(run(world, *PLAN, *words))
    assert "desk" in what or "working" in what.lower()
    assert remedy


# ------------------------------------------------------------------ output


JSON_VERBS: tuple[tuple[str, ...], ...] = (
    ("devices", "list"),
    ("model", "list"),
    ("bundle", "list"),
    ("bundle", "show"),
    ("bundle", "build", "tiny"),
    ("plan", "--devices", "desk", "--target", "1000s", "--working", "1MB"),
)


@pytest.mark.parametrize("verb", JSON_VERBS)
def test_json_is_one_document_on_stdout(world: Path, run: Run, verb: tuple[str, ...]) -> None:
    answer = run(world, "--verbose", *verb, "--json")
    assert answer.code == 0, answer.err
    document: Any = json.loads(answer.out)
    assert document
    assert run(world, *verb).code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--target", "1s", "--devices", "nobody"),
        ("plan", "--target", "1ns", "--devices", "desk"),
        ("plans", "query", "--task", "nothing"),
        ("plans", "query", "--target", "1ns"),
        ("bundle", "show", "--bundle", "nothing"),
        ("lab", "status", "--dir", "nowhere"),
        ("lab", "fault", "--dir", "nowhere", "board-1", "cut"),
    ],
)
def test_an_error_is_a_document_too_where_one_was_asked_for(
    world: Path, run: Run, words: tuple[str, ...]
) -> None:
    answer = run(world, *words, "--json")
    assert answer.code in (FAILED, USAGE)
    document = json.loads(answer.out)
    if isinstance(document, dict) and "error" in document:
        assert document["error"] in answer.err
        assert document["remedy"]


@pytest.mark.parametrize("verb", ["status", "down", "fault"])
def test_a_lab_that_is_not_there_is_wrong_input_and_named_in_the_hint(
    run: Run, tmp_path: Path, verb: str
) -> None:
    folder = tmp_path / "my lab"
    words = ("board-1", "cut") if verb == "fault" else ()
    what, remedy = refusal(run(tmp_path, "lab", verb, *words, "--dir", str(folder)), USAGE)
    assert what == f"There is no lab in {folder}."
    assert remedy.endswith(f"stifarm lab up --dir '{folder}'.")


def test_what_init_says_next_works_from_here(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "next: stifarm demo" in run(tmp_path, "init").err
    assert "next: cd 'my farm' && stifarm demo" in run(tmp_path, "init", "my farm").err


def run_process(root: Path, *words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own; ``code`` runs after it."""
    call = f"  main({list(words)!r})"
    lines = ("import sys", "from orchestrator.cli import main", "try:", call, "finally:", f"  {code}")
    script = "\n".join(lines)
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO), "HOME": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("plans", "query"),
        ("devices", "list"),
        ("plan", "--devices", "desk", "--target", "1000s", "--working", "1MB"),
    ],
)
def test_what_needs_no_tensor_does_not_wait_for_the_libraries_that_do(
    world: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    root = tmp_path / "farm"
    shutil.copytree(world, root)
    heavy = ("torch", "ray", "transformers", "huggingface_hub")
    done = run_process(root, *words, code=f"print([m for m in {heavy} if m in sys.modules], file=sys.stderr)")
    assert done.returncode in (0, FAILED)
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_bundle_says_which_rows_its_codec_weighed_weights_by(run: Run, tmp_path: Path) -> None:
    write_inventory(tmp_path, DESK)
    with open_world(tmp_path) as farm:
        fill(farm)
    options = ("--codec", "fisher", "--task", "demo", "--rows", "8", "--name", "by-fisher")
    built = run(tmp_path, *BUILD, *options, "--fidelities", "2,32")
    assert built.code == 0, built
    shown = run(tmp_path, "bundle", "show", "--bundle", "by-fisher")
    assert "fisher, sensitivities of 8 rows of demo" in " ".join(shown.out.split())
