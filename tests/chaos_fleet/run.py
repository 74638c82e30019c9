"""A fleet under load and random faults, then its store against the journals of its devices.

Campaigns are asked for again and again, as by people who want them every few minutes. When the faults are
over every run must end, all that is missing must be measured on request, each cell must be there once, and
``db audit`` compares every record of every journal with the store. The audit is shown a copy of the store
with one record dropped and one doubled, and must tell of both.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from db.session import Store, open_store
from orchestrator.patience import patiently
from sti_runtime.errors import StifarmError
from tests.chaos_fleet import ends
from tests.chaos_fleet.databases import STORES
from tests.chaos_fleet.faults import CONTROLLER, Fault, sequence
from tests.chaos_fleet.world import CAMPAIGNS, Fleet, fleet
from tests.farm_world import wait_for

END_LIMIT_S = 1200.0
"""So long after the last fault may it take until every run has ended: claims and leases of controllers that
are gone run out (120 s), what failed is tried again (30 s, 120 s later), hosts are waited for (600 s)."""

TRIES = 4
"""So often is asked for what is missing once no fault is injected any more."""

_PERSON_S = 2.0

Say = Callable[[str], None]


class Clock:
    """Says lines with the seconds since the beginning."""

    def __init__(self, say: Say) -> None:
        self._say, self._began = say, time.monotonic()

    def __call__(self, line: str) -> None:
        self._say(f"{self.now():7.1f} s  {line}\n")

    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began


def run(
    root: Path,
    *,
    store: str,
    seed: int,
    minutes: float | None = None,
    faults: int | None = None,
    hosts: int = 3,
    devices: int = 2,
    boards: int = 1,
    longest_pause_s: float = 20,
    campaigns: Sequence[str] = tuple(CAMPAIGNS),
    damaged: bool = True,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """A whole run, as long as ``minutes`` or for so many faults; what it came to. ``damaged``: the audit is
    shown a damaged copy of the store, too.

    Raises: AssertionError when something was lost or doubled, or a run did not end.
    """
    with (
        STORES[store](root) as database,
        fleet(
            root, database, hosts=hosts, devices=devices, boards=boards, scored="plans" in campaigns
        ) as made,
    ):
        drawn = sequence(seed, made.kinds, made.hosts, longest_pause_s=longest_pause_s)
        if minutes is not None:
            drawn = takewhile(lambda fault: fault.at_s < 60 * minutes, drawn)
        planned = list(islice(drawn, faults))
        for name in campaigns:
            assert made.ask(name), f"{name} cannot be asked for"
        clock = Clock(say)
        clock(f"{store}: {len(planned)} faults of seed {seed}")
        asked = _under_faults(made, campaigns, planned, clock)
        last_s = clock.now()
        clock("the last fault is over")
        with open_store(database.url) as opened:
            _until_ended(opened)
            ended_s = clock.now() - last_s
            clock(f"every run has ended, {ended_s:.0f} s after the last fault")
            injected = Counter(fault.kind for fault in planned)
            with opened.reader() as session:
                under, why = ends.by_state(session), list(ends.causes(session))
                require_none(ends.unexplained(session, injected))
            for line in why:
                clock(line)
            repeated = _all_measured(made, opened, clock)
            with opened.reader() as session:
                require_none(ends.doubled_or_missing_cells(session))
                require_none(ends.doubled_measurements(session))
                require_none(ends.stale_writers(session))
        restarts = {name: len(codes) for name, codes in made.keeper.exits.items()}
        audits = _audited(made, random.Random(seed) if damaged else None, clock)
        return {
            "store": store,
            "seed": seed,
            "faults": dict(sorted(injected.items())),
            "refused": made.refused,
            "runs asked for": len(campaigns) + asked,
            "cells when all had ended": under,
            "asked again for what was missing": repeated,
            "seconds to the end": round(ended_s),
            "restarts": restarts,
            "journals": sum(audit["journals"] for audit in audits),
            "records": sum(audit["records"] for audit in audits),
            "samples": sum(audit["samples"] for audit in audits),
        }


def require_none(wrong: list[str]) -> None:
    """Raises: AssertionError with what is wrong."""
    assert wrong == [], "\n".join(wrong)


# ------------------------------------------------------------------ under faults


def _under_faults(made: Fleet, campaigns: Sequence[str], planned: list[Fault], clock: Clock) -> int:
    """Inject every fault at its time while campaigns are asked for; how often one was begun anew."""
    over = threading.Event()
    with ThreadPoolExecutor(len(made.hosts) + 5) as pool:
        person = pool.submit(_person, made, campaigns, over)
        try:
            struck: list[Future[None]] = []
            for fault in planned:
                assert not person.done(), f"nobody asks for campaigns any more: {person.exception()}"
                for each in struck:
                    if each.done():
                        each.result()
                time.sleep(max(0.0, fault.at_s - clock.now()))
                clock(str(fault))
                struck.append(pool.submit(made.strike, fault))
            for each in struck:
                each.result()
        finally:
            over.set()
        return person.result()


def _person(made: Fleet, campaigns: Sequence[str], over: threading.Event) -> int:
    """Ask for each campaign again whenever its last run has ended; how often a run was begun."""
    begun = 0
    with patiently(lambda: open_store(made.database.url)) as store:
        while not over.is_set():
            for name in campaigns:
                if not over.is_set() and not _is_open(store, name):
                    begun += made.ask_again(name)
            over.wait(_PERSON_S)
    return begun


def _is_open(store: Store, name: str) -> bool:
    """Whether a run of a campaign has not ended; taken for so when the store does not say."""
    try:
        with store.reader() as session:
            return name in ends.open_campaigns(session)
    except StifarmError:
        return True


# ------------------------------------------------------------------ afterwards


def _until_ended(store: Store) -> None:
    def ended() -> bool:
        with store.reader() as session:
            return not ends.unended(session)

    try:
        wait_for(lambda: patiently(ended), "every run to end", END_LIMIT_S)
    except AssertionError as error:
        with store.reader() as session:
            raise AssertionError("\n".join(ends.unended(session))) from error


def _all_measured(made: Fleet, store: Store, clock: Clock) -> int:
    """Ask for what is missing of every campaign's last run until nothing is; how often that took."""
    for tries in range(TRIES):
        with store.reader() as session:
            missing = ends.last_runs_missing(session)
        if not missing:
            return tries
        clock(f"asked again: {', '.join(missing)}")
        for name in missing:
            assert made.ask(name), f"{name} cannot be asked for"
        _until_ended(store)
    with store.reader() as session:
        require_none([*ends.last_runs_missing(session), *ends.causes(session)])
    return TRIES


def _audited(made: Fleet, chance: random.Random | None, clock: Clock) -> list[dict[str, Any]]:
    """The audits of all devices, which must find nothing; with ``chance`` also those of a copy of the store
    that is damaged on purpose, which must tell both damages and nothing else."""
    made.keeper.end(CONTROLLER)
    damage = None if chance is None else _damage(made, chance)
    made.only_head()
    code, audits = made.audit(made.database.url)
    wrong = [(audit["device"], audit["discrepancies"]) for audit in audits if audit["discrepancies"]]
    assert (code, wrong) == (0, []), wrong
    assert all(not audit["forgotten"] and not audit["foreign"] for audit in audits), audits
    clock("the store agrees with every journal")
    if damage is not None:
        url, wanted = damage
        code, copies = made.audit(url)
        found = {(wrong["job_id"], wrong["seq"]) for audit in copies for wrong in audit["discrepancies"]}
        assert code == 1
        assert wanted <= found, (found, wanted)
        assert {job for job, _ in found} == {job for job, _ in wanted}, (found, wanted)
        clock("of a copy with one record dropped and one doubled the audit tells of both")
    return audits


def _damage(made: Fleet, chance: random.Random) -> tuple[str, set[tuple[str, int]]]:
    """URL of a copy of the store with one record dropped and one doubled, and where."""
    url = made.database.copy()
    with open_store(url) as store, store.session() as session:
        return url, {ends.drop_a_record(session, chance), ends.double_a_record(session, chance)}
