"""A controller's look at the store, which it takes once a second: what the queries cost in a large farm.

    python -m bench.looks [--devices 1000] [--batches 10] [--rounds 9] [--hosts 10] [--only sqlite]

One run is open that has so many batches of one cell on each device; half of the devices work on their first.
Printed for each kind of store: a whole look, as ``campaigns.controller`` takes it while nothing begins, the
run's creation, and a batch claimed, noted and ended, each with the CPU of this process (PostgreSQL is a
private server with fsync off). Beside the looks at the store there is one at the lab hosts' announcements:
``--hosts`` of them with a share of the devices each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from bench.figures import figure
from bench.store_world import store_of
from db import campaign_work as work
from db.campaigns import NewBatch, NewCell, create_run, open_runs, save_campaign
from db.leases import database_wall_ns
from db.session import Store
from orchestrator.campaigns.spec import CampaignSpec
from orchestrator.campaigns.spec_file import parse_campaign
from orchestrator.hosts import HostOffer, Versions, read_offer
from sti_runtime.records import sha256_hex

MS = 1_000_000
OWNER = "bench"


def fill(store: Store, devices: int, batches: int) -> None:
    """One open run; every second device works on its first batch."""
    spec: CampaignSpec = parse_campaign(b"version: 1\nname: large\nkinds: [health]\n", Path("large.yaml"))
    wanted = (
        NewBatch(
            number=device * batches + number,
            device=f"device-{device}",
            kind="execute",
            bundle_digest=sha256_hex(b"bundle"),
            task="task",
            engine="native",
            repeat=number,
            fresh=True,
            cells=(NewCell(0, target="100ms", preload="1MB", preload_bytes=1_000_000, policy="sti"),),
        )
        for device in range(devices)
        for number in range(batches)
    )
    with store.session() as session:
        row = save_campaign(session, spec, name=spec.name, priority=10, deadline_ns=None, seed=1)
        create_run(session, row, wanted, trigger="manual")
    with store.reader() as session:
        ready = work.waiting(session, database_wall_ns(session))
    with store.session() as session:
        for each in ready[::2]:
            work.claim(session, each.batch_id, OWNER)


def look(store: Store) -> int:
    """The queries of one look; how many batches it finds waiting."""
    with store.reader() as session:
        work.under_way(session)
    with store.reader() as session:
        now = database_wall_ns(session)
        waiting = work.waiting(session, now)
        work.under_way(session)
        work.left(session)
        work.had(session, now)
        work.durations(session)
        work.last_moves(session)
    with store.session() as session:
        for run in open_runs(session):
            work.left_in(session, run.id)
    return len(waiting)


def one_batch(store: Store) -> Callable[[], int]:
    """Takes a waiting batch from its claim to its end each time it is called."""
    with store.reader() as session:
        ready = iter(work.waiting(session, database_wall_ns(session)))

    def act() -> int:
        batch_id = next(ready).batch_id
        with store.session() as session:
            if not work.claim(session, batch_id, OWNER):
                return 0
            cells = work.cells_of(session, batch_id)
        for state in ("running", "done"):
            ends = {cell.id: work.CellEnd(state) for cell in cells}
            with store.session() as session:
                (work.note_cells if state == "running" else work.end_batch)(session, batch_id, OWNER, ends)
        return 1

    return act


def announcements(hosts: int, devices: int) -> list[bytes]:
    """What so many hosts say of themselves, which have the devices between them."""
    found = []
    for host in range(hosts):
        names = range(host * devices // hosts, (host + 1) * devices // hosts)
        text = ", ".join(f"{{name: d{number}, transport: local, threads: 1}}" for number in names)
        offer = HostOffer(
            format="stifarm-host",
            version=1,
            versions=Versions.own(),
            name=f"host{host}",
            machine="machine",
            address="192.0.2.1",
            pid=1,
            node=f"{host:056x}",
            joined_wall_ns=1,
            home="/home",
            inventory="/inventory.yaml",
            inventory_text=f"version: 1\ndevices: [{text}]",
            cache_bytes=1,
            left_wall_ns=0,
        )
        found.append(offer.to_json())
    return found


def read_all(said: list[bytes]) -> int:
    """Read what the hosts say, as every look at them does; how many were believed."""
    return sum(
        read_offer(f"host{number}", data, frozenset()).offer is not None for number, data in enumerate(said)
    )


def timed(act: Callable[[], int], rounds: int) -> tuple[list[int], list[int]]:
    """ns on the clock and of CPU of each call, one call ahead not counted."""
    act()
    took, cpu = [], []
    for _ in range(rounds):
        began, cpu_began = time.perf_counter_ns(), time.process_time_ns()
        act()
        took.append(time.perf_counter_ns() - began)
        cpu.append(time.process_time_ns() - cpu_began)
    return took, cpu


def main() -> None:
    """Print the figures of both kinds of store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=("sqlite", "postgresql"))
    parser.add_argument("--hosts", type=int, default=10)
    asked = parser.parse_args()
    said = announcements(asked.hosts, asked.devices)
    took, _ = map(figure, timed(lambda: read_all(said), asked.rounds))
    print(f"{asked.hosts} hosts with {asked.devices} devices: read in {took.text(MS)} ms", flush=True)
    for kind in ("sqlite", "postgresql"):
        if asked.only not in (None, kind):
            continue
        with store_of(kind) as store:
            began = time.perf_counter()
            fill(store, asked.devices, asked.batches)
            made_s = time.perf_counter() - began
            print(f"{kind}: {asked.devices} devices × {asked.batches} batches, made in {made_s:.1f} s")
            for what, act in (("a look", lambda: look(store)), ("a batch begun and ended", one_batch(store))):
                took, cpu = map(figure, timed(act, asked.rounds))
                print(f"{kind}: {what} {took.text(MS)} ms, CPU in this process {cpu.text(MS)} ms", flush=True)


if __name__ == "__main__":
    main()
