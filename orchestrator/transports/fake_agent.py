"""An agent that measures nothing: what its journal holds at a moment follows from seeds and the wall clock.

It answers the verbs that jobs need and keeps leases as an agent does (docs/job-and-journal.md). Jobs of probe
units take ``FakeSpec.job_ns`` on average, and it may die in one. No thread and no file: what it is, is
computed when it is asked; it ends with the process that asks.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sti_runtime.device_facts import DeviceFacts, StorageFacts
from sti_runtime.errors import DigestError, StifarmError
from sti_runtime.journal_format import PROTOCOL_VERSION
from sti_runtime.messages import ENGINES, Job
from sti_runtime.records import canonical_json, sha256_hex

AGENT = "fake-agent 1"
AGENT_DIGEST = sha256_hex(AGENT.encode())

_KEPT = 32
"""So many attempts' journals stay on a fake device."""


@dataclass(frozen=True)
class FakeSpec:
    """How a fake device behaves. ``job_ns``: a job's duration on average, half and one and a half times it at
    the extremes; ``delay_ns``: of each call over its link. In millionths: ``link_faults_ppm`` of its calls
    fail, in ``deaths_ppm`` of its starts the agent dies before the job's end. ``seed``: of all of these."""

    job_ns: int = 20 * 10**9
    delay_ns: int = 0
    link_faults_ppm: int = 0
    deaths_ppm: int = 0
    seed: int = 0


class RefusedError(StifarmError):
    """As agents call the refusal of a lease."""


@dataclass
class _Run:
    """One start of the agent in an attempt. ``dies_ns``: when it is gone without having ended the job;
    ``due``: the records still to come, each with its moment. Wall clock."""

    pid: int
    dies_ns: int | None
    due: list[tuple[int, dict[str, Any]]]


@dataclass
class _Attempt:
    """One attempt of a job on the device; ``journal``: what is due of it by now."""

    job: Job
    digest: str
    journal: bytearray = field(default_factory=bytearray)
    records: int = 0
    results: int = 0
    starts: int = 0
    ended: bool = False
    run: _Run | None = None


class FakeAgent:
    """The agent of one fake device. ``now_ns``: the wall clock."""

    def __init__(self, name: str, spec: FakeSpec, now_ns: Callable[[], int]) -> None:
        self._name, self._spec, self._now_ns = name, spec, now_ns
        hardware = sha256_hex(f"fake device {spec.seed}/{name}".encode())
        self.identity = f"{hardware[:16]}/{hardware[16:28]}"
        self._boot_id = hardware[:36]
        self._owner: str | None = None
        self._counters: dict[str, int] = {}
        self._attempts: dict[tuple[str, int], _Attempt] = {}
        self._pids = 0

    def verb(self, verb: str, arguments: Sequence[str], stdin: bytes) -> bytes | Mapping[str, Any]:
        """What the agent prints. Raises: StifarmError, as the agent would say it."""
        if verb == "facts":
            return self._facts().to_json()
        if verb == "has":
            return {"identity": self.identity, "held": []}
        if verb == "clean":
            self._attempts.clear()
            return {"removed": []}
        if verb == "collect":
            return {"removed": []}
        key = (arguments[0], int(arguments[1]))
        if verb == "accept-job":
            return self._accept(key, arguments[2], _option(arguments, "--lease"), stdin)
        attempt = self._attempts.get(key)
        if verb == "status":
            return {"state": self._state(attempt)}
        if verb == "stop":
            return {"signalled": self._stop(attempt)}
        if verb == "forget":
            self._attempts.pop(key, None)
            return {"state": "absent"}
        raise StifarmError(f"A fake device knows no verb {verb}.", "It holds no content: give it probe jobs.")

    def start(self, job_id: str, number: int) -> int:
        """Start or resume an attempt that was accepted; the process id. Raises: StifarmError."""
        attempt = self._attempts.get((job_id, number))
        if attempt is None:
            raise StifarmError(f"There is no job {job_id} to run.")
        if self._running(attempt):
            assert attempt.run is not None
            return attempt.run.pid
        self._pids += 1
        if not attempt.ended:
            attempt.run = self._new_run(attempt)
        return self._pids

    def journal(self, job_id: str, number: int) -> bytes | None:
        """The bytes of an attempt's journal by now; None where there is none."""
        attempt = self._attempts.get((job_id, number))
        if attempt is None or not attempt.starts:
            return None
        self._advance(attempt)
        return bytes(attempt.journal)

    def process(self, job_id: str, number: int) -> int | None:
        """The process that runs an attempt; None when none does."""
        attempt = self._attempts.get((job_id, number))
        if attempt is None or not self._running(attempt):
            return None
        assert attempt.run is not None
        return attempt.run.pid

    def alive(self, pid: int) -> bool:
        """Whether a process is there."""
        return any(
            attempt.run is not None and attempt.run.pid == pid and self._running(attempt)
            for attempt in self._attempts.values()
        )

    # -------------------------------------------------------------- inner

    def _accept(self, key: tuple[str, int], digest: str, lease: str | None, data: bytes) -> dict[str, Any]:
        if lease is not None:
            self._admit(lease)
        held = self._attempts.get(key)
        if held is not None:
            return {"digest": digest, "state": "already" if held.digest == digest else "other"}
        if sha256_hex(data) != digest:
            raise DigestError(f"What came is not the job file, nor all of it ({len(data)} bytes).")
        self._attempts[key] = _Attempt(Job.from_json(data, source="job.json"), digest)
        while len(self._attempts) > _KEPT:
            del self._attempts[next(iter(self._attempts))]
        return {"digest": digest, "state": "accepted"}

    def _admit(self, lease: str) -> None:
        """Keep the fence, as an agent does. Raises: RefusedError."""
        store, counter, *takeover = lease.split(":")
        if self._owner not in (None, store) and not takeover:
            raise RefusedError(
                f"Refused: the device belongs to store {self._owner!r}, this lease is of store {store!r}.",
                "Take a new lease; to move the device to another store, take it over explicitly.",
            )
        highest = self._counters.get(store, 0)
        if int(counter) < highest:
            raise RefusedError(
                f"Refused: the lease has counter {counter}, {highest} was seen already: its controller is "
                "stale.",
                "Take a new lease.",
            )
        self._owner, self._counters[store] = store, int(counter)

    def _state(self, attempt: _Attempt | None) -> str:
        if attempt is None:
            return "absent"
        if self._running(attempt):
            return "running"
        return "ended" if attempt.ended else "stopped"

    def _stop(self, attempt: _Attempt | None) -> int | None:
        """Let the present unit be the last one of this run."""
        if attempt is None or not self._running(attempt):
            return None
        run = attempt.run
        assert run is not None
        run.due = run.due[:1]
        run.dies_ns = run.due[0][0]
        return run.pid

    def _running(self, attempt: _Attempt) -> bool:
        self._advance(attempt)
        return attempt.run is not None

    def _new_run(self, attempt: _Attempt) -> _Run:
        """The agent's next start: all that it will journal, and when."""
        job, now = attempt.job, self._now_ns()
        chance = random.Random(f"{self._spec.seed}/{self._name}/{job.id}/{job.attempt}")
        unit_ns = round(self._spec.job_ns * chance.uniform(0.5, 1.5) / len(job.units))
        attempt.starts += 1
        start = {
            "type": "start",
            "job": job.id,
            "attempt": job.attempt,
            "lease": job.lease.model_dump(mode="json"),
            "first_unit": attempt.results,
            "agent": AGENT,
            "agent_digest": AGENT_DIGEST,
            "protocol": PROTOCOL_VERSION,
            "emulated": True,
            "sensors": _sensors(now),
            "settings": [],
        }
        due: list[tuple[int, dict[str, Any]]] = [(now, start)]
        for at, unit in enumerate(job.units[attempt.results :], 1):
            due.append((now + at * unit_ns, self._result(unit.kind, unit.number, now + at * unit_ns)))
        count = len(job.units)
        end = {"type": "end", "done": count, "failed": 0, "refused": None, "settings": []}
        due.append((due[-1][0], end))
        mortal = random.Random(f"{self._spec.seed}/{self._name}/{job.id}/{job.attempt}/{attempt.starts}")
        dies = None
        if mortal.random() * 1e6 < self._spec.deaths_ppm:
            dies = now + round((due[-1][0] - now) * mortal.random())
        return _Run(self._pids, dies, due)

    def _result(self, kind: str, unit: int, wall_ns: int) -> dict[str, Any]:
        if kind == "probe":
            result = {"kind": "probe", "sensors": _sensors(wall_ns), "verified": None}
            return {"type": "result", "unit": unit, "result": result}
        what = f"A fake device has no figures for {kind}."
        return {"type": "failure", "unit": unit, "error": "InputError", "what": what, "remedy": ""}

    def _advance(self, attempt: _Attempt) -> None:
        """Bring the journal to this moment."""
        run = attempt.run
        if run is None:
            return
        now = self._now_ns()
        until = now if run.dies_ns is None else min(now, run.dies_ns)
        while run.due and run.due[0][0] <= until:
            wall_ns, payload = run.due.pop(0)
            record = {
                "seq": attempt.records,
                "boot_id": self._boot_id,
                "wall_ns": wall_ns,
                "payload": payload,
            }
            body = canonical_json(record)
            attempt.journal += b"%d %08x %s\n" % (attempt.records, zlib.crc32(body), body)
            attempt.records += 1
            attempt.results += payload["type"] in ("result", "failure")
            attempt.ended = payload["type"] == "end"
        if attempt.ended or (run.dies_ns is not None and run.dies_ns <= now):
            attempt.run = None

    def _facts(self) -> DeviceFacts:
        return DeviceFacts(
            format="stifarm-facts",
            version=1,
            identity=self.identity,
            identity_source="machine-id",
            emulated_spool=True,
            boot_id=self._boot_id,
            wall_ns=self._now_ns(),
            agent=AGENT,
            agent_digest=AGENT_DIGEST,
            protocol=PROTOCOL_VERSION,
            engines=ENGINES,
            cpu_model="none (a fake device)",
            architecture="fake",
            cpus=(0,),
            cpu_features=(),
            current_khz=(),
            min_khz=(),
            max_khz=(),
            governors=(),
            memory_bytes=None,
            storage=StorageFacts(
                path="/fake",
                filesystem=None,
                block_device=None,
                rotational=None,
                total_bytes=1 << 30,
                free_bytes=1 << 30,
                direct_io="unproven",
            ),
            os_build="fake",
            kernel="fake",
            libc=None,
            python=None,
            torch=None,
            gpus=(),
            thermal_zones=(),
            battery=False,
            virtual_machine=None,
            notes=("a fake device: nothing is measured",),
        )


def said(error: StifarmError) -> bytes:
    """An error as an agent prints it."""
    problem = {"type": type(error).__name__, "what": error.what, "remedy": error.remedy}
    return json.dumps({"error": problem}).encode()


def _option(arguments: Sequence[str], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


def _sensors(wall_ns: int) -> dict[str, Any]:
    return {
        "wall_ns": wall_ns,
        "temperature_milli_c": None,
        "cpu_khz": [],
        "load_milli": None,
        "available_memory_bytes": None,
        "free_bytes": 1 << 30,
        "battery_percent": None,
        "throttled": None,
        "time_in_state": [],
    }
