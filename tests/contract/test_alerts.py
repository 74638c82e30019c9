"""Alerts against an HTTP server that fails and hangs, and against programs; on both databases."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from db import alerts
from db.events import record_event
from db.models import AlertDeliveryRow, AlertRow, EventRow
from db.session import Store
from orchestrator.alerts.delivery import Patience, deliver, deliver_until
from orchestrator.alerts.sending import NotTakenError, check_url, execute, post
from sti_runtime.errors import InputError
from tests.agent_data import REPO

QUICK = Patience(limit_s=10, pause_s=0.0)
SECRET = "hunter2"
LIMIT_S = 60


class Receiver(ThreadingHTTPServer):
    """Takes events at ``/SECRET``; the first answers are ``answers``, in order: a status, or None to hang."""

    daemon_threads = True

    def __init__(self, *answers: int | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = list(answers)
        self.events: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.hangs, self.go_on = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{SECRET}"

    def ids(self) -> list[str]:
        return [str(event["id"]).rpartition("/")[2] for event in self.events]


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        assert self.path == f"/{SECRET}"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = self.server.answers.pop(0) if self.server.answers else 204
        self.server.events.append(json.loads(body))
        self.server.keys.append(self.headers["Idempotency-Key"])
        if answer is None:
            self.server.hangs.set()
            self.server.go_on.wait(LIMIT_S)
            return
        self.send_response(answer)
        self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def receivers() -> Iterator[list[Receiver]]:
    made: list[Receiver] = []
    yield made
    for receiver in made:
        receiver.go_on.set()
        receiver.shutdown()
        receiver.server_close()


def started(receivers: list[Receiver], *answers: int | None) -> Receiver:
    receiver = Receiver(*answers)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    receivers.append(receiver)
    return receiver


def add(store: Store, url: str, level: str = "warning", name: str = "oncall") -> None:
    with store.session() as session:
        alerts.add_alert(session, name, "webhook", {"url": url}, level)


def tell(store: Store, level: Any, what: str) -> int:
    with store.session() as session:
        record_event(session, level, "device-failed", what)
        return session.scalars(select(EventRow.id).order_by(EventRow.id.desc()).limit(1)).one()


def state(store: Store, name: str = "oncall") -> tuple[AlertRow, int]:
    """(the alert, how many events it still has to tell of)."""
    with store.reader() as session:
        row = alerts.get_alert(session, name)
        return row, alerts.count_pending(session, row)


def test_events_of_the_level_and_worse_are_told_once_and_in_order(
    store: Store, receivers: list[Receiver]
) -> None:
    receiver = started(receivers)
    tell(store, "error", "before the alert")
    add(store, receiver.url)
    wanted = [tell(store, "warning", "hot"), tell(store, "error", "gone")]
    tell(store, "info", "nothing special")
    assert deliver(store, "oncall", QUICK) == 2
    assert deliver(store, "oncall", QUICK) == 0
    assert receiver.ids() == [str(number) for number in wanted]
    assert receiver.keys == [f"{store.store_id}/{number}" for number in wanted]
    assert receiver.events[0].items() >= {"level": "warning", "kind": "device-failed", "what": "hot"}.items()
    assert state(store)[1] == 0


def test_an_event_that_appears_late_with_a_lower_number_is_told_too(
    store: Store, receivers: list[Receiver]
) -> None:
    receiver = started(receivers)
    add(store, receiver.url)
    for number in (1000, 500):
        with store.session() as session:
            row = EventRow(id=number, wall_ns=time.time_ns(), level="error", kind="test", what="late")
            session.add(row)
        assert deliver(store, "oncall", QUICK) == 1
    assert receiver.ids() == ["1000", "500"]
    with store.session() as session:
        session.execute(update(EventRow).values(wall_ns=1))  # as if long ago
        alerts.give_back(session, "oncall")
        assert alerts.get_alert(session, "oncall").cursor_event_id == 1000


@pytest.mark.parametrize("answer", [404, 302])
def test_what_is_refused_is_told_again_after_a_pause_and_no_secret_is_kept(
    store: Store, receivers: list[Receiver], answer: int
) -> None:
    receiver = started(receivers, 500, answer)
    add(store, receiver.url)
    tell(store, "error", "gone")
    for tries in (1, 2):
        assert deliver(store, "oncall", QUICK) == 0
        row, pending = state(store)
        assert (row.tries, pending) == (tries, 1)
        assert "it answered" in (row.last_problem or "")
        assert SECRET not in (row.last_problem or "")
    assert deliver(store, "oncall", QUICK) == 1
    assert state(store)[0].tries == 0
    assert len(set(receiver.ids())) == 1


def test_it_waits_before_it_tries_again_and_longer_each_time(store: Store, receivers: list[Receiver]) -> None:
    receiver = started(receivers, 500)
    add(store, receiver.url)
    tell(store, "error", "gone")
    slow = Patience(pause_s=3600, pause_most_s=36_000)
    assert deliver(store, "oncall", slow) == deliver(store, "oncall", slow) == 0
    assert len(receiver.events) == 1
    pauses = [Patience().pause_ns(tries) for tries in (0, 1, 2, 50)]
    assert pauses == [2 * 10**9, 4 * 10**9, 8 * 10**9, 300 * 10**9]


def test_an_event_that_is_refused_for_too_long_is_given_up_and_others_are_told(
    store: Store, receivers: list[Receiver]
) -> None:
    dead, alive = started(receivers, 500, 500), started(receivers)
    add(store, dead.url)
    add(store, alive.url, name="mail")
    lost = tell(store, "error", "gone")
    assert deliver(store, "oncall", Patience(pause_s=0, budget_s=-1)) == 0
    assert state(store)[1] == 0  # it is not told of its own failure
    assert deliver(store, "mail", QUICK) == 2
    assert alive.events[1]["kind"] == "alert-given-up"
    assert f"alert oncall: event {lost} was not taken" in alive.events[1]["what"]
    with store.reader() as session:
        outcomes = session.scalars(
            select(AlertDeliveryRow.outcome).where(AlertDeliveryRow.alert == "oncall")
        ).all()
    assert outcomes == ["given-up"]


def test_who_hangs_is_given_a_limit_and_holds_up_nobody_else(store: Store, receivers: list[Receiver]) -> None:
    hanging, alive = started(receivers, None), started(receivers)
    add(store, hanging.url, name="a-hanging")
    add(store, alive.url, name="b-alive")
    tell(store, "error", "gone")
    stop = threading.Event()
    limits = Patience(limit_s=LIMIT_S, look_s=0.05)
    runner = threading.Thread(target=deliver_until, args=(store, stop, limits))
    runner.start()
    deadline = time.monotonic() + LIMIT_S
    while not (alive.events and hanging.hangs.is_set()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(alive.events) == 1
    assert state(store, "a-hanging")[1] == 1
    hanging.go_on.set()
    stop.set()
    runner.join()
    with pytest.raises(NotTakenError, match="did not answer within"):
        post(started(receivers, None).url, {"id": "1"}, limit_s=0.1)


def test_an_event_whose_teller_is_killed_is_told_again(
    url: str, store: Store, receivers: list[Receiver]
) -> None:
    receiver = started(receivers, None)
    add(store, receiver.url)
    tell(store, "error", "gone")
    code = (
        "import sys; from db.session import open_store; from orchestrator.alerts.delivery import deliver\n"
        "with open_store(sys.argv[1]) as store: deliver(store, 'oncall')"
    )
    teller = subprocess.Popen([sys.executable, "-c", code, url], cwd=REPO)
    assert receiver.hangs.wait(LIMIT_S)
    teller.kill()
    teller.wait()
    assert deliver(store, "oncall", QUICK) == 0  # it is still the killed one's
    with store.session() as session:
        session.execute(update(AlertRow).values(busy_until_wall_ns=1))  # as if its time were up
    assert deliver(store, "oncall", QUICK) == 1
    assert len(receiver.ids()) == 2
    assert len(set(receiver.ids())) == 1


def test_a_program_gets_the_event_as_its_input_and_no_shell(store: Store, tmp_path: Path) -> None:
    said = tmp_path / "said; touch x"
    with store.session() as session:
        argv = [sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())", str(said)]
        alerts.add_alert(session, "pager", "command", argv, "error")
    tell(store, "error", "gone; rm -rf $HOME")
    assert deliver(store, "pager", QUICK) == 1
    assert json.loads(said.read_text())["what"] == "gone; rm -rf $HOME"


def test_a_program_that_fails_or_hangs_has_not_taken_the_event(tmp_path: Path) -> None:
    event = {"id": "1", "what": "x" * 1_000_000}
    with pytest.raises(NotTakenError, match="ended with 3"):
        execute(["sh", "-c", "exit 3", SECRET], event)
    with pytest.raises(NotTakenError, match="cannot be started: No such file"):
        execute([str(tmp_path / "none")], event)
    here = tmp_path / "pid"
    with pytest.raises(NotTakenError, match="did not end within") as caught:
        execute(["sh", "-c", f"sleep 600 & echo $! > '{here}'; wait", SECRET], event, limit_s=1)
    assert SECRET not in str(caught.value)
    its_child, end = Path(f"/proc/{here.read_text().strip()}/exe"), time.monotonic() + LIMIT_S
    while its_child.exists():
        assert time.monotonic() < end, "what the program started runs on"


@pytest.mark.parametrize(
    "address", ["", "ftp://h/x", "http://", "http://user:pw@h/", "no url", "http://h:99999/"]
)
def test_what_is_no_webhook_is_refused_without_showing_it(address: str) -> None:
    with pytest.raises(InputError) as caught:
        check_url(address)
    assert not address or address not in str(caught.value)


def test_nobody_there_is_said_without_the_secret() -> None:
    with pytest.raises(NotTakenError, match="cannot be reached") as caught:
        post(f"http://127.0.0.1:1/{SECRET}", {"id": "1"})
    assert SECRET not in str(caught.value)
