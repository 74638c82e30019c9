"""A bundle of random weights and task data for it, in a spool's folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agent.spool import Spool
from sti_runtime.bundle import Bundle
from sti_runtime.task_data import TaskData, TaskDataInfo, save_task_data
from tests.bundles import make_bundle, make_request, small_config

TOKENS, ROWS = 24, 12
LABELS = (0, 1, 1, 0, 1, -1, 0, 0, 1, 0, -1, 1)


@dataclass(frozen=True)
class Content:
    """``folder`` is the spool; ``task`` the file of task data in it."""

    folder: Path
    bundle: Bundle
    data: TaskData
    task_digest: str

    @property
    def task(self) -> Path:
        """The file of task data."""
        return self.folder / "tasks" / f"{self.task_digest}.safetensors"


def make_content(folder: Path, *, hidden: int = 64) -> Content:
    """Three layers of four slices, twelve rows of 24 tokens."""
    config = small_config(hidden=hidden, ffn=2 * hidden)
    Spool.open(folder)
    bundle, _ = make_bundle(config, folder / "bundles")
    rows = [make_request(config, TOKENS, 6 + row, row) for row in range(ROWS)]
    info = TaskDataInfo(
        format="stifarm-task-data",
        version=1,
        task="test",
        split="dev",
        labels=("negative", "positive"),
        tokenizer=None,
    )
    data = TaskData(
        info=info,
        input_ids=np.stack([row.input_ids for row in rows]),
        token_types=np.stack([row.token_types for row in rows]),
        lengths=np.array([row.length for row in rows], np.int32),
        labels=np.array(LABELS, np.int32),
    )
    digest = save_task_data(data, folder / "tasks" / "new")
    (folder / "tasks" / "new").rename(folder / "tasks" / f"{digest}.safetensors")
    return Content(folder, bundle, data, digest)
