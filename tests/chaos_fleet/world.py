"""A fleet on one machine: a controller that serves, lab hosts that join it, a store, and its campaigns."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from db.session import open_store
from orchestrator.errors import LabError
from orchestrator.farm import open_farm
from orchestrator.host_book import known_offers
from orchestrator.lab import fault as lab_fault
from orchestrator.lab import up as lab_up
from orchestrator.lab.inventory_file import inventory_text
from orchestrator.lab.state import Lab
from orchestrator.settings import load_settings
from tests.chaos_fleet.databases import Database
from tests.chaos_fleet.faults import BOARD, CONTROLLER, DATABASE, KINDS, SECOND, Fault, Kind
from tests.chaos_fleet.keeper import Keeper, environment
from tests.farm_world import fill, score, wait_for

VERB_LIMIT_S = 300
UP_LIMIT_S = 300
CHILD_LIMIT_S = 30
"""So long is waited for a process that is to be killed."""

CAMPAIGNS = {
    "alive": "kinds: [health]\npriority: 50\n",
    "speeds": "kinds: [health, profile]\nrepeats: 2\npriority: 10\n",
    "plans": (
        "kinds: [execute, evaluate]\ntargets: [1000s, 5 of whole-model compute]\npreload: [10kB]\n"
        "working: 1MB\npolicies: [sti, preload-6]\nrequests: 4\npriority: 25\n"
    ),
}
"""What is asked of every device, again and again."""


@dataclass
class Fleet:
    """One farm below ``root``: the controller's home ``first``, that of another one beside it ``second``, and
    a folder for each host."""

    root: Path
    database: Database
    keeper: Keeper
    hosts: tuple[str, ...]
    lab: Lab | None = None
    address: str = "127.0.0.1:0"
    refused: list[str] = field(default_factory=list)
    """Faults that could not be had, and why."""
    turns: defaultdict[str, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))
    """One fault of a target at a time, also where a busy machine is late with the one before."""

    @property
    def kinds(self) -> dict[str, Kind]:
        """The faults that this fleet can have."""
        own = {
            name: kind
            for name, kind in KINDS.items()
            if (kind.target != BOARD or self.lab is not None) and (kind.target != "host" or self.hosts)
        }
        return {**own, **self.database.kinds}

    def argv(self, home: str, *words: str) -> list[str]:
        """A verb of the command line with one of the homes."""
        program = "from orchestrator.cli import main; main()"
        options = ["--home", str(self.root / home), "--inventory", str(self.inventory(home))]
        return [sys.executable, "-c", program, *options, "--db-url", self.database.url, *words]

    def inventory(self, home: str) -> Path:
        """That of a host, or that of both controllers."""
        return (self.root / home if home in self.hosts else self.root) / "inventory.yaml"

    def verb(self, *words: str, limit_s: float = VERB_LIMIT_S) -> subprocess.CompletedProcess[str]:
        """Run one verb of the first controller to its end."""
        return subprocess.run(
            self.argv("first", *words),
            cwd=self.root,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )

    # -------------------------------------------------------------- up and down

    def up(self) -> None:
        """Start the controller and the hosts; returns when all have joined."""
        self.keeper.keep(CONTROLLER, self._listening("serve"), self.root)
        wait_for(lambda: bool(self._addresses()), "the controller to listen", UP_LIMIT_S)
        self.address = self._addresses()[0]
        self.keeper.change(CONTROLLER, self._listening("serve"))
        token = (self.root / "first/ray_token").read_bytes()
        for host in self.hosts:
            (self.root / host / "ray_token").write_bytes(token)
            self.keeper.keep(host, self.argv(host, "host", "join", self.address, "--name", host), self.root)
        wait_for(lambda: all(map(self._joined, self.hosts)), "the hosts to join", UP_LIMIT_S)
        with open_store(self.database.url) as store:  # from there other commands know them
            wait_for(
                lambda: {offer.name for offer in known_offers(store)} >= set(self.hosts),
                "the store to know the hosts",
                UP_LIMIT_S,
            )

    def _listening(self, *words: str) -> list[str]:
        return self.argv("first", *words, "--listen", self.address)

    def _addresses(self) -> list[str]:
        return re.findall(r"hosts can join at (\S+)", self.keeper.said(CONTROLLER))

    def only_head(self) -> None:
        """Let the controller rest: only its head node runs from now on, at the same address."""
        joined = {host: self._joined(host) for host in self.hosts}
        self.keeper.keep(CONTROLLER, self._listening("host", "up"), self.root)
        wait_for(
            lambda: all(self._joined(host) > joined[host] for host in self.hosts),
            "the hosts to join again",
            UP_LIMIT_S,
        )

    def _joined(self, host: str) -> int:
        """How often a host has joined."""
        return self.keeper.said(host).count(f"{host} joined")

    # -------------------------------------------------------------- faults

    def strike(self, fault: Fault) -> None:
        """One fault, from its beginning to its end; one that cannot be had now is noted."""
        try:
            with self.turns[fault.target]:
                self._strike(fault)
        except (LabError, psutil.NoSuchProcess) as error:
            self.refused.append(f"{fault.number}: {error}")

    def _strike(self, fault: Fault) -> None:
        if fault.target == DATABASE:
            self.database.strike(fault)
        elif fault.target == BOARD:
            assert self.lab is not None
            kind = lab_fault.parse_kind(fault.kind)
            lab_fault.hold(self.lab, BOARD, kind, fault.duration_s, seed=fault.seed)
        elif fault.target == SECOND:
            self._second(fault)
        elif fault.kind in ("controller-kill", "host-kill"):
            with self.keeper.killed(fault.target, signal.SIGKILL):
                time.sleep(fault.duration_s)
        elif fault.kind == "controller-stop":
            with self.keeper.killed(fault.target, signal.SIGTERM):
                time.sleep(fault.duration_s)
        else:
            wanted = {"head-kill": "gcs_server", "node-kill": "raylet", "worker-kill": "ray::HostActor"}
            self._child(fault.target, wanted[fault.kind]).kill()

    def _second(self, fault: Fault) -> None:
        """Another controller on the same store, beside the first; it ends as it was asked to, or killed."""
        self.keeper.keep(SECOND, self.argv("second", "serve"), self.root)
        time.sleep(fault.duration_s)
        number = random.Random(fault.seed).choice((signal.SIGTERM, signal.SIGKILL))
        with self.keeper.killed(SECOND, number):
            self.keeper.end(SECOND)

    def _child(self, name: str, wanted: str) -> psutil.Process:
        """A process of Ray below a kept one, which may be about to start it. Raises: LabError."""
        deadline = time.monotonic() + CHILD_LIMIT_S
        while time.monotonic() < deadline:
            above = self.keeper.process(name)
            for child in [] if above is None else above.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if child.name() == wanted or "".join(child.cmdline()[:1]).startswith(wanted):
                        return child
            time.sleep(0.2)
        raise LabError(f"{name} has no {wanted}")

    # -------------------------------------------------------------- the person's side

    def ask(self, name: str) -> bool:
        """Ask for a campaign: go on with it, do what is missing, or measure anew. Whether it was heard."""
        return self.verb("campaign", "run", str(self.root / f"{name}.yaml"), "--detach").returncode == 0

    def ask_again(self, name: str) -> bool:
        """Ask for a campaign to be measured anew. Whether it was heard."""
        words = ("campaign", "run", str(self.root / f"{name}.yaml"), "--again", "--detach")
        return self.verb(*words).returncode == 0

    def audit(self, url: str) -> tuple[int, list[dict[str, Any]]]:
        """(exit code, answer per device) of ``db audit`` of a store."""
        done = self.verb("--db-url", url, "db", "audit", "--devices", "all", "--json")
        assert done.returncode in (0, 1), done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return done.returncode, found


@contextmanager
def fleet(
    root: Path, database: Database, *, hosts: int, devices: int, boards: int, scored: bool
) -> Iterator[Fleet]:
    """A fleet that is up: so many hosts with so many devices each, and beside them a device and boards of the
    controller itself, which the second controller can reach too. ``scored``: with what plans need."""
    with ExitStack() as stack:
        lab = None
        if boards:
            lab = lab_up.up(root / "lab", boards=boards, phones=0).lab
            stack.callback(lab_up.down, lab.folder)
        keeper = stack.enter_context(Keeper())
        names = tuple(f"bench{number + 1}" for number in range(hosts))
        made = Fleet(root, database, keeper, names, lab)
        own = [_local(root, "desk"), *([] if lab is None else _boards(lab))]
        _write(root / "inventory.yaml", own)
        for place, host in enumerate(names):
            (root / host).mkdir()
            there = [_local(root, f"dut{place * devices + number + 1}") for number in range(devices)]
            _write(root / host / "inventory.yaml", there)
        for name, text in CAMPAIGNS.items():
            (root / f"{name}.yaml").write_text(f"version: 1\nname: {name}\ndevices: all\n{text}")
        _content(made, scored=scored)
        made.up()
        yield made


def _content(made: Fleet, *, scored: bool) -> None:
    """Model, task, bundle and importance in the store, their files in both controllers' homes."""
    settings = load_settings(
        environ={},
        home=made.root / "first",
        inventory=made.root / "inventory.yaml",
        db_url=made.database.url,
        cwd=made.root,
    )
    with open_farm(settings) as farm:
        bundle = fill(farm).bundle
        if scored:
            score(farm, bundle)
    shutil.copytree(made.root / "first", made.root / "second")


def _local(root: Path, name: str) -> dict[str, Any]:
    """This machine as one of several devices, each timed apart."""
    return {
        "name": name,
        "transport": "local",
        "threads": 1,
        "workdir": str(root / "devices" / name),
        "machine_lock": str(root / f"{name}.lock"),
        "emulate": {"mechanism": "lab"},
    }


def _boards(lab: Lab) -> list[dict[str, Any]]:
    entries = yaml.safe_load(inventory_text(lab, lab.state(), lab.devices()))["devices"]
    return [entry for entry in entries if entry["transport"] == "ssh"]


def _write(path: Path, devices: Sequence[dict[str, Any]]) -> None:
    path.write_text(yaml.safe_dump({"version": 1, "devices": list(devices)}))
