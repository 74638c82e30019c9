"""Reading a task's files: the profile split comes out of train only, leaks of dev rows are said."""

from __future__ import annotations

from pathlib import Path

from structlog.testing import capture_logs

from orchestrator.library import TaskFiles, read_task
from sti_runtime.tasks import TaskSpec

SPEC = TaskSpec(
    name="moods", text_columns=("text",), label_column="mood", labels=("bad", "good"), max_tokens=16,
    metric="accuracy",
)  # fmt: skip


def write(path: Path, texts: list[str]) -> Path:
    rows = [f"{text}\t{('bad', 'good')[i % 2]}" for i, text in enumerate(texts)]
    path.write_text("\n".join(["text\tmood", *rows]) + "\n", encoding="utf-8")
    return path


def test_profile_rows_come_out_of_train_and_dev_is_left_alone(tmp_path: Path) -> None:
    train = write(tmp_path / "train.tsv", [f"row {i}" for i in range(20)])
    dev = write(tmp_path / "dev.tsv", [f"other {i}" for i in range(5)])
    with capture_logs() as logs:
        kept, profile, held = read_task(TaskFiles(SPEC, train, dev, 6, 0))
    assert (len(kept), len(profile), len(held)) == (14, 6, 5)
    assert {e.text for e in kept} | {e.text for e in profile} == {f"row {i}" for i in range(20)}
    assert logs == []


def test_dev_rows_that_stand_in_train_are_counted(tmp_path: Path) -> None:
    train = write(tmp_path / "train.tsv", [f"row {i}" for i in range(20)])
    dev = write(tmp_path / "dev.tsv", ["row 3", "row 4", "new"])
    with capture_logs() as logs:
        read_task(TaskFiles(SPEC, train, dev, 6, 0))
    assert [(log["log_level"], log["rows"], log["of"]) for log in logs] == [("warning", 2, 3)]
