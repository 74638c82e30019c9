"""How far a run is, while a command works on it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from db.errors import StoreUnreachableError
from orchestrator.campaigns.status import RunStatus
from orchestrator.cli.campaign_progress import RunProgress, in_words
from orchestrator.cli.output import Steps

S = 10**9


def standing(done: int, left_ns: int | None, doing: Mapping[str, str]) -> RunStatus:
    counts = {"done": done, "running": 5 - done}
    return RunStatus("mine", 2, "running", "manual", None, counts, 60 * S, left_ns, doing, ())


def test_lines_tell_cells_time_left_and_what_devices_do_but_nothing_twice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    going = standing(1, 240 * S, {"desk": "run for 12 s", "": "importance for 3 s"})
    found = iter([going, going, standing(5, None, {})])
    progress = RunProgress(Steps(None), lambda: next(found), bar=False, every_s=0)
    for _ in range(3):
        progress()
    assert capsys.readouterr().err.splitlines() == [
        "  run 2 of mine: 1 of 5 cells; about 4 min left; host: importance for 3 s; desk: run for 12 s",
        "  run 2 of mine: 5 of 5 cells",
    ]


def test_the_store_is_not_asked_more_often_than_is_of_use() -> None:
    asked = 0

    def look() -> RunStatus:
        nonlocal asked
        asked += 1
        return standing(1, None, {})

    progress = RunProgress(Steps(None), look, bar=False, every_s=3600)
    for _ in range(5):
        progress()
    assert asked == 1
    progress.show()
    assert asked == 2


def test_a_store_that_is_away_is_no_error_of_the_progress() -> None:
    def away() -> RunStatus:
        raise StoreUnreachableError("it is away")

    RunProgress(Steps(None), away, bar=False, every_s=0)()


def test_many_devices_are_named_by_a_few() -> None:
    words = in_words(standing(0, None, {f"d{number}": "run for 1 s" for number in range(9)}))
    assert words.endswith("d5: run for 1 s; and 3 more devices")
