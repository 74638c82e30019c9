"""The main job on a virtual lab under random faults from a seed, then the store against the journals.

    python -m tests.chaos --faults 200 --seed 1
    python -m tests.chaos --minutes 30 --seed 1     a fleet instead, on either store: tests/chaos_fleet

Verbs of the command line (deploy, profile, eval; again and again) drive the lab's boards and phones, while
faults hit devices, links, the adb server and the controller itself. A verb that fails is given again, as a
person would. When the faults are used up every verb must succeed, and ``db audit`` compares every record of
every journal with the store; bystanders (tests/bystanders.py) must have been left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from db.backup import backup
from db.models import ComputeSampleRow, JournalRecordRow, ProbeRow
from db.session import open_store, sqlite_url
from orchestrator.errors import LabError
from orchestrator.farm import open_farm
from orchestrator.lab import adb_server, fault
from orchestrator.lab import up as lab_up
from orchestrator.lab.inventory_file import inventory_text
from orchestrator.lab.state import DeviceState, Lab
from orchestrator.processes import ProcessId, alive, kill
from orchestrator.settings import load_settings
from orchestrator.toolchain import cache_folder
from tests.agent_data import REPO
from tests.bystanders import Bystanders, other_user, rival
from tests.chaos_fleet import run as fleet_run
from tests.chaos_fleet.databases import STORES
from tests.farm_world import fill, score, wait_for

CONTROLLER, SERVER = "controller-kill", "adb-server-kill"
WEIGHTS: dict[str, int] = {
    CONTROLLER: 3,
    SERVER: 2,
    "cut": 5,
    "reboot": 4,
    "slow": 2,
    "throttle": 1,
    "unauthorized": 2,
    "full-disk": 2,
    "corrupt": 1,
}
"""How often each fault comes, relative to the others. No lies: what a liar sends is not compared."""

LONGEST_S = 3.0
PAUSE_S = 2.0
VERB_LIMIT_S = 900
TRIES = 12
"""So often may a verb fail once nothing is done to it any more: devices come back, attempts begin anew."""

VERBS = (
    ("deploy", "--devices", "all"),
    ("profile", "--devices", "all", "--again"),
    (
        "eval",
        "--devices",
        "all",
        "--again",
        "--target",
        "1000s",
        "--preload",
        "0",
        "--working",
        "1MB",
        "-n",
        "8",
    ),
)

RELEASE = ("devices", "release", "all")
"""A device that was let down often enough is in quarantine, and nothing would be asked of it any more."""


@dataclass
class Chaos:
    """One run. ``injected`` counts the faults by kind; ``refused`` those that could not be had."""

    root: Path
    lab: Lab
    chance: random.Random
    injected: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    exits: Counter[int] = field(default_factory=Counter)
    controller: subprocess.Popen[bytes] | None = None
    bystanders: Bystanders | None = None
    rival: str = ""
    """The board of another farm; nothing is injected there."""

    @property
    def inventory(self) -> Path:
        """Of the farm under test: the lab without the other farm's board."""
        return self.root / "inventory.yaml"

    def devices(self) -> list[DeviceState]:
        """Those of the farm under test."""
        return [device for device in self.lab.devices() if device.name != self.rival]

    def write_inventory(self) -> None:
        """As the lab's devices are now."""
        self.inventory.write_text(inventory_text(self.lab, self.lab.state(), self.devices()))

    @property
    def home(self) -> Path:
        """State of the farm under test."""
        return self.root / "home"

    @property
    def log(self) -> Path:
        """What the verbs said."""
        return self.root / "verbs.log"

    # -------------------------------------------------------------- the person's side

    def verb(self, *words: str) -> int:
        """Run one verb to its end, whatever that is."""
        with self.log.open("ab") as log:
            log.write(f"\n$ stifarm {' '.join(words)}\n".encode())
            log.flush()
            with subprocess.Popen(
                self.argv(*words), cwd=self.root, env=self.environment(), stdout=log, stderr=log
            ) as controller:
                self.controller = controller
                try:
                    code = controller.wait(VERB_LIMIT_S)
                finally:
                    self.controller = None
                    controller.kill()
        self.exits[code] += 1
        return code

    def argv(self, *words: str) -> list[str]:
        """A verb as a command."""
        program = "from orchestrator.cli import main; main()"
        options = ("--home", str(self.home), "--inventory", str(self.inventory))
        return [sys.executable, "-c", program, *options, *words]

    def environment(self) -> dict[str, str]:
        """Nothing of the caller's but what is needed."""
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPO),
            "HOME": str(self.root),
            "XDG_CACHE_HOME": str(cache_folder().parents[1]),
        }

    def main_job(self, ended: threading.Event) -> None:
        """Every verb in turn, round after round, until the faults are used up."""
        while not ended.is_set():
            self.verb(*RELEASE)
            for words in VERBS:
                if not ended.is_set():
                    self.verb(*words)

    def finish(self) -> None:
        """Every verb must come to its end now, and bring in what interrupted ones had measured."""
        lab_up.up(self.lab.folder)
        self.write_inventory()
        for words in VERBS:
            codes: list[int] = []
            while not codes or codes[-1] != 0:
                assert len(codes) < TRIES, f"{words[0]} ended with {codes}:\n{self.said()}"
                self.verb(*RELEASE)
                codes.append(self.verb(*words))

    def said(self) -> str:
        """The end of what the verbs said."""
        return self.log.read_text(errors="replace")[-4000:]

    def audit(self, *, store: Path | None = None) -> tuple[int, list[dict[str, Any]]]:
        """(exit code, answer per device) of ``db audit``."""
        words = ["db", "audit", "--devices", "all", "--json"]
        if store is not None:
            words = ["--db-url", sqlite_url(store), *words]
        done = subprocess.run(
            self.argv(*words),
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            timeout=VERB_LIMIT_S,
        )
        assert done.returncode in (0, 1), done.stderr.decode()
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return done.returncode, found

    # -------------------------------------------------------------- the other side

    def strike(self, count: int, person: Future[None]) -> None:
        """Inject ``count`` faults, each with its end, pauses between, all from the seed, while verbs run."""
        names = list(WEIGHTS)
        while sum(self.injected.values()) < count:
            assert not person.done(), f"nobody gives verbs any more: {person.exception()}"
            kind = self.chance.choices(names, [WEIGHTS[name] for name in names])[0]
            name = self.chance.choice([device.name for device in self.devices()])
            duration_s, pause_s = self.chance.uniform(0, LONGEST_S), self.chance.uniform(0, PAUSE_S)
            seed = self.chance.randrange(1 << 30)
            try:
                self.one(kind, name, duration_s, seed)
                self.injected[kind] += 1
            except LabError as error:
                self.refused[f"{kind}: {error.what}"] += 1
                assert sum(self.refused.values()) < 20 * count + 100, self.refused
            time.sleep(pause_s)

    def one(self, kind: str, name: str, duration_s: float, seed: int) -> None:
        """One fault, from its beginning to its end. Raises: LabError when it cannot be had."""
        if kind == CONTROLLER:
            self.kill_controller()
        elif kind == SERVER:
            self.kill_server(duration_s)
        else:
            fault.hold(self.lab, name, fault.parse_kind(kind), duration_s, seed=seed)

    def kill_controller(self) -> None:
        """kill -9 of the verb under way. Raises: LabError when none is."""
        controller = self.controller
        if controller is None or controller.poll() is not None:
            raise LabError("no controller runs")
        controller.send_signal(signal.SIGKILL)

    def kill_server(self, duration_s: float) -> None:
        """kill -9 of the lab's adb server; after a while it is started again, as its owner would."""
        state = self.lab.state()
        if state.adb is None or not isinstance(state.adb.process, ProcessId) or not alive(state.adb.process):
            raise LabError("no adb server of the lab runs")
        with ExitStack() as stack:
            if self.bystanders is not None:
                stack.enter_context(self.bystanders.no_server)
            kill(state.adb.process, signal.SIGKILL)
            time.sleep(duration_s)
            with self.lab.changing():
                adb_server.start(self.lab, self.lab.state())


@contextmanager
def world(root: Path, *, boards: int, phones: int, seed: int) -> Iterator[Chaos]:
    """A lab that is up with a board too many, a farm with a small model, task, bundle and importance on all
    but that board, and the bystanders."""
    with ExitStack() as stack:
        lab = lab_up.up(root / "lab", boards=boards + 1, phones=phones).lab
        stack.callback(lab_up.down, lab.folder)
        chaos = Chaos(root, lab, random.Random(seed), rival=f"board-{boards + 1}")
        chaos.write_inventory()
        settings = load_settings(environ={}, home=chaos.home, inventory=chaos.inventory, cwd=root)
        with open_farm(settings) as farm:
            work = fill(farm)
            score(farm, work.bundle)
        user = stack.enter_context(other_user(root / "user"))
        begun = stack.enter_context(rival(lab, rival_root(chaos), chaos.rival))
        theirs = {device.name: device.kind for device in chaos.devices()}
        chaos.bystanders = Bystanders(
            lab, {name: theirs[name] for name in ("board-1", "phone-1")}, user, begun
        )
        with chaos.bystanders.watching():
            yield chaos


def rival_root(chaos: Chaos) -> Path:
    """Where the other farm is, with an inventory of its board only."""
    root = chaos.root / "rival"
    root.mkdir(exist_ok=True)
    entries = yaml.safe_load(chaos.lab.inventory.read_text())
    (board,) = [entry for entry in entries["devices"] if entry["name"] == chaos.rival]
    del board["emulate"]  # it has no bundle to verify the board's speed with
    (root / "inventory.yaml").write_text(yaml.safe_dump({**entries, "devices": [board]}))
    return root


def run(root: Path, *, faults: int, seed: int, boards: int = 2, phones: int = 2) -> dict[str, Any]:
    """A whole run; what it came to. Raises: AssertionError when something was lost, doubled or changed."""
    with world(root, boards=boards, phones=phones, seed=seed) as chaos:
        ended = threading.Event()
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            person = pool.submit(chaos.main_job, ended)
            try:
                chaos.strike(faults, person)
            finally:
                ended.set()
            person.result()
        seconds = time.monotonic() - began
        assert chaos.exits.total() > 0, "no verb came to its end under the faults"
        chaos.finish()
        code, audits = chaos.audit()
        wrong = [(audit["device"], audit["discrepancies"]) for audit in audits if audit["discrepancies"]]
        assert (code, wrong) == (0, []), wrong
        gone = {audit["device"]: audit["forgotten"] for audit in audits if audit["forgotten"]}
        assert gone == {}, f"journals are gone from devices: {gone}"
        foreign = {audit["device"]: audit["foreign"] for audit in audits if audit["foreign"]}
        assert foreign == {}, f"journals of another farm are on devices: {foreign}"
        require_checker_sees_a_loss(chaos)
        require_checker_sees_a_lost_job(chaos)
        assert chaos.bystanders is not None
        touched = chaos.bystanders.touched()
        assert touched == [], touched
        restarts = {each.device: each.restarts for each in chaos.bystanders.foreign}
        require_checker_sees_a_kill(chaos.bystanders)
        return {
            "seed": seed,
            "faults": dict(chaos.injected),
            "refused": sum(chaos.refused.values()),
            "seconds under faults": round(seconds),
            "exit codes of verbs": {str(code): count for code, count in sorted(chaos.exits.items())},
            "journals": sum(audit["journals"] for audit in audits),
            "records": sum(audit["records"] for audit in audits),
            "samples": sum(audit["samples"] for audit in audits),
            "bystanders untouched": True,
            "their processes started again after reboots": restarts,
        }


def require_checker_sees_a_loss(chaos: Chaos) -> None:
    """A copy of the store without one record, and one without one sample, must not pass."""
    for number, lose in enumerate((_lose_record, _lose_sample)):
        copy = chaos.root / f"lossy-{number}.sqlite"
        backup(sqlite_url(chaos.home / "store.sqlite"), copy)
        with open_store(sqlite_url(copy)) as store, store.session() as session:
            lose(session, chaos.chance)
        code, audits = chaos.audit(store=copy)
        found = [wrong for audit in audits for wrong in audit["discrepancies"]]
        assert code == 1, "what is lost was not seen"
        assert len({(wrong["job_id"], wrong["attempt"]) for wrong in found}) == 1, found


def require_checker_sees_a_lost_job(chaos: Chaos) -> None:
    """A copy of the store without one whole job must not pass: every journal of it is missed."""
    copy = chaos.root / "lossy-job.sqlite"
    backup(sqlite_url(chaos.home / "store.sqlite"), copy)
    job = lose_job(copy, chaos.chance)
    code, audits = chaos.audit(store=copy)
    found = [wrong["job_id"] for audit in audits for wrong in audit["discrepancies"]]
    assert (code, set(found)) == (1, {job}), found
    assert [audit["foreign"] for audit in audits if audit["foreign"]] == []


def require_checker_sees_a_kill(bystanders: Bystanders) -> None:
    """A bystander's process that is killed on purpose must not pass."""
    for victim in bystanders.foreign:
        assert victim.process is not None
        kill(victim.process, signal.SIGKILL)
    wait_for(lambda: all(each.touched for each in bystanders.foreign), "somebody to miss those killed")


_DROPS = (
    "DELETE FROM journal_records WHERE job_id = ?",
    "DELETE FROM attempts WHERE job_id = ?",
    "DELETE FROM jobs WHERE id = ?",
)


def lose_job(store: Path, chance: random.Random) -> str:
    """Drop a job that was begun, with its attempts and records, from a SQLite store; its id."""
    with contextlib.closing(sqlite3.connect(store)) as connection, connection:
        begun = connection.execute("SELECT DISTINCT job_id FROM journal_records ORDER BY job_id").fetchall()
        (job,) = chance.choice(begun)
        for drop in _DROPS:
            connection.execute(drop, (job,))
    return str(job)


def _lose_record(session: Session, chance: random.Random) -> None:
    """Drop one record, with the row that was made of it."""
    query = select(ProbeRow.journal_id).join(JournalRecordRow, JournalRecordRow.id == ProbeRow.journal_id)
    chosen = chance.choice(sorted(session.scalars(query)))
    session.execute(delete(ProbeRow).where(ProbeRow.journal_id == chosen))
    session.execute(delete(JournalRecordRow).where(JournalRecordRow.id == chosen))


def _lose_sample(session: Session, chance: random.Random) -> None:
    """Drop one sample of one record."""
    chosen = chance.choice(sorted(session.scalars(select(ComputeSampleRow.id))))
    session.execute(delete(ComputeSampleRow).where(ComputeSampleRow.id == chosen))


def run_fleets(root: Path, store: str | None, *, minutes: float, seed: int) -> list[dict[str, Any]]:
    """Fleets under faults, one for each kind of store, which share the time."""
    found = []
    stores = tuple(STORES) if store is None else (store,)
    for name in stores:
        (root / name).mkdir()
        found.append(
            fleet_run.run(root / name, store=name, seed=seed, minutes=minutes / len(stores), say=_say)
        )
    return found


def _say(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


def main() -> None:
    """The whole run from the command line; keeps its folder when it fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--boards", type=int, default=2)
    parser.add_argument("--phones", type=int, default=2)
    parser.add_argument("--minutes", type=float, help="a fleet instead, for so long")
    parser.add_argument("--store", choices=tuple(STORES), help="the fleet's; each in turn by default")
    parser.add_argument("--dir", type=Path, help="where to work; a new temporary folder by default")
    options = parser.parse_args()
    root = options.dir or Path(tempfile.mkdtemp(prefix="stifarm-chaos-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        if options.minutes is None:
            found = [
                run(
                    root,
                    faults=options.faults,
                    seed=options.seed,
                    boards=options.boards,
                    phones=options.phones,
                )
            ]
        else:
            found = run_fleets(root, options.store, minutes=options.minutes, seed=options.seed)
    except AssertionError:
        sys.stderr.write(f"failed with --seed {options.seed}; what was said is in {root}\n")
        raise
    for each in found:
        _say(json.dumps(each, indent=2) + "\n")
    if options.dir is None:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
