"""The verbs about alerts: what they refuse, and that they show no secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.cli.context import FAILED, OK, USAGE
from tests.farm_world import DESK, write_inventory
from tests.unit.test_cli_input import Run, refusal, run  # noqa: F401 - a fixture


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_inventory(tmp_path, DESK)
    return tmp_path


def test_alerts_are_added_listed_without_secrets_tried_and_removed(root: Path, run: Run) -> None:  # noqa: F811
    assert run(root, "alerts", "add", "hook", "--webhook", "http://127.0.0.1:1/hunter2").code == OK
    assert (
        run(root, "alerts", "add", "var", "--webhook-variable", "NO_SUCH_URL", "--level", "error").code == OK
    )
    assert run(root, "alerts", "add", "prog", "--command", "true 'hunter 2'").code == OK
    answer = run(root, "alerts", "list", "--json")
    targets = {row["name"]: row["target"] for row in json.loads(answer.out)}
    assert targets == {"hook": "http://127.0.0.1:1/…", "prog": "true …", "var": "$NO_SUCH_URL"}
    assert "hunter" not in run(root, "alerts", "list").out
    assert run(root, "alerts", "test", "prog").code == OK
    assert "cannot be reached" in refusal(run(root, "alerts", "test", "hook"), FAILED)[0]
    assert "NO_SUCH_URL holds no URL" in refusal(run(root, "alerts", "test", "var"), FAILED)[0]
    assert "0 events were taken" in run(root, "alerts", "deliver").err
    assert run(root, "alerts", "remove", "hook").code == OK
    for verb in ("remove", "test"):
        assert "no alert 'hook'" in refusal(run(root, "alerts", verb, "hook"), USAGE)[0]


def test_a_command_that_does_not_start_here_is_added_and_said(
    root: Path,
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(root)
    (root / "plain.sh").write_text("exit 0\n")
    (root / "tell.sh").write_text("exit 0\n")
    (root / "tell.sh").chmod(0o755)
    for command, said in (
        ("no-such-program --hunter2", "no-such-program cannot be started here: no folder of PATH has it;"),
        (f"{root}/none.sh", "none.sh cannot be started here: there is no such file;"),
        (f"{root}/plain.sh", "plain.sh may not be executed;"),
        ("./tell.sh", "./tell.sh is looked for in the folder that stifarm is started in"),
        (f"{root}/tell.sh", None),
        ("true 'hunter 2'", None),
    ):
        answer = run(root, "alerts", "add", "prog", "--command", command)
        assert answer.code == OK
        warned = [line for line in answer.err.splitlines() if line.startswith("! ")]
        assert bool(warned) == (said is not None), answer.err
        assert said is None or said in " ".join(answer.err.split())
        assert "hunter" not in answer.err
        assert run(root, "alerts", "remove", "prog").code == OK


def test_a_host_that_nobody_knows_is_wrong_input(root: Path, run: Run) -> None:  # noqa: F811
    assert "no host named 'nosuchhost'" in refusal(run(root, "host", "leave", "nosuchhost"), USAGE)[0]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("Oncall", "--command", "true"), "'Oncall' is not"),
        (("oncall",), "An alert has one target"),
        (("oncall", "--command", "true", "--webhook", "http://h/"), "An alert has one target"),
        (("oncall", "--webhook", "nowhere"), "no http or https URL"),
        (("oncall", "--webhook-variable", "A B"), "no name of a variable"),
        (("oncall", "--command", "'"), "--command: No closing quotation"),
        (("oncall", "--command", " "), "--command: it is empty"),
        (("oncall", "--command", "true", "--level", "loud"), "--level 'loud' is unknown"),
    ],
)
def test_wrong_input_is_named(root: Path, run: Run, words: tuple[str, ...], what: str) -> None:  # noqa: F811
    assert what in refusal(run(root, "alerts", "add", *words), USAGE)[0]
