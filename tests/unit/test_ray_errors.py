"""What Ray raises becomes an error of the tree, in short, with what to do."""

from __future__ import annotations

import errno
import os

import pytest
import ray

from orchestrator.errors import PoolError
from orchestrator.ray.calls import asking, guarded, in_short, not_started
from sti_runtime.errors import ResourceError


@pytest.mark.parametrize(
    ("said", "short"),
    [
        ("The current node timed out.", "The current node timed out."),
        ("Failed to start GCS.  Last 0 lines:\n\n. Last error: Traceback (most recent call last):\n  File x",
         "Failed to start GCS. Last 0 lines: . Last error."),
        ("", "Exception."),
        ("x" * 301, "x" * 300 + "…"),
    ],
    ids=["line", "trace", "nothing", "long"],
)  # fmt: skip
def test_a_start_that_failed_says_why_without_a_trace(said: str, short: str) -> None:
    assert in_short(Exception(said)) == short
    error = not_started("Ray", Exception(said))
    assert error.what == f"Ray could not be started: {short}"
    assert "too busy" in error.remedy


@pytest.mark.parametrize(
    "error", [ray.exceptions.GetTimeoutError("late"), RuntimeError("late"), TimeoutError("late")]
)
def test_what_is_asked_of_ray_and_fails_is_a_pool_error(error: Exception) -> None:
    with pytest.raises(PoolError, match=r"Ray did not take a task: \w+: late\."), asking("take a task"):
        raise error


def test_a_full_disk_where_a_task_runs_is_told_as_one() -> None:
    def full(_: None) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/there/x")

    with pytest.raises(ResourceError, match="/there/x cannot be used: No space left"):
        guarded(full, None).get()

    def refused(_: None) -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    with pytest.raises(ConnectionRefusedError):
        guarded(refused, None)
