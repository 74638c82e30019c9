"""Reaching devices: what a person stops ends, a transfer as well as a wait; who is waited for how long."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from orchestrator import reach as reaching
from orchestrator.errors import HaltedError, LinkError
from orchestrator.inventory import load_inventory
from orchestrator.reach import Reach
from orchestrator.settings import load_settings
from tests.farm_world import write_inventory


@pytest.fixture
def reach(tmp_path: Path) -> Reach:
    write_inventory(tmp_path, "{name: desk, transport: local, threads: 1, workdir: work}")
    settings = load_settings(environ={}, cwd=tmp_path)
    return Reach(settings, load_inventory(tmp_path / "inventory.yaml").devices)


def test_a_halted_transfer_ends_at_its_next_step(reach: Reach) -> None:
    forward = reach.forward("desk")
    forward(1, 10)
    reach.halt("desk")
    with pytest.raises(HaltedError, match="desk: it was stopped"):
        forward(2, 10)
    assert reach.underway("desk").sent_bytes == 2


def test_a_halted_wait_for_a_device_ends(reach: Reach) -> None:
    reach.retried("desk", lambda: None)  # it was reached: from now on it is waited for
    asked = threading.Event()

    def away() -> None:
        asked.set()
        raise LinkError("no route to it.", "Look at the cable.", device="desk")

    def halt() -> None:
        asked.wait()
        reach.halt("desk")

    halting = threading.Thread(target=halt)
    halting.start()
    with pytest.raises(HaltedError):
        reach.retried("desk", away)
    halting.join()


def lost() -> LinkError:
    return LinkError("its cable was pulled.", "Look at the cable.", device="desk")


@pytest.mark.parametrize("before", [True, False])
def test_a_link_lost_in_a_long_transfer_is_waited_for(
    reach: Reach, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    monkeypatch.setattr(reaching, "REACH_LIMIT_S", 0.0)  # every transfer is a long one
    monkeypatch.setattr(reaching, "_FIRST_REACH_S", 0.0)
    if before:
        reach.retried("desk", lambda: None)
    forward, steps = reach.forward("desk"), iter(range(1, 5))

    def transfer() -> str:
        done = next(steps)
        forward(done, 5)
        if done < 4:
            raise lost()
        return "sent"

    assert reach.retried("desk", transfer) == "sent"


def test_a_transfer_that_gets_no_further_is_given_up(reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaching, "REACH_LIMIT_S", 0.0)
    forward, tries = reach.forward("desk"), []

    def transfer() -> None:
        tries.append(1)
        forward(3, 5)
        raise lost()

    with pytest.raises(LinkError):
        reach.retried("desk", transfer)
    assert len(tries) == 2


def test_a_device_that_is_gone_in_the_middle_of_its_first_action_is_waited_for(
    reach: Reach, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("_FIRST_REACH_S", "_RETRY_PAUSE_S"):
        monkeypatch.setattr(reaching, limit, 0.0)
    monkeypatch.setattr(reaching, "_TRIES", 1)
    ends = iter((lost(), lost(), None))

    def act() -> str:
        assert reach.transport("desk").run(["true"], timeout_s=60).ok
        if (error := next(ends)) is not None:
            raise error
        return "done"

    assert reach.retried("desk", act) == "done"


def test_a_device_whose_work_folder_is_known_unasked_was_not_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaching, "REACH_LIMIT_S", 2.0)
    monkeypatch.setattr(reaching, "_FIRST_REACH_S", 0.0)
    write_inventory(tmp_path, "{name: phone, transport: adb, serial: A1, adb_server: '127.0.0.1:1'}")
    settings = load_settings(environ={}, cwd=tmp_path)
    reach = Reach(settings, load_inventory(tmp_path / "inventory.yaml").devices)
    assert reach.spool("phone").startswith("/data/")
    tries = []

    def away() -> None:
        tries.append(1)
        raise lost()

    with pytest.raises(LinkError):
        reach.retried("phone", away)
    assert len(tries) == 1
