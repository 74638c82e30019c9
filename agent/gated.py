"""Runs a job's units, each behind the machine's lock and the job's gates."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from agent import android, clocks, waiting
from agent.gates import POLL_S, Settling, check_gates, gate_error, recent, settle, shut
from agent.locks import hold_machine
from agent.open_unit import UnitNote
from agent.sensors import read_sensors
from agent.signals import StopRequest
from agent.spool import Spool
from agent.watch import used_cpus
from sti_runtime.messages import TIMED_KINDS, ExecuteResult, GateVerdict, Job, Unit, UnitResult

if TYPE_CHECKING:
    from agent.measure import Context

log = logging.getLogger(__name__)


class GatedUnits:
    """The units of one job. What was read before one of them still counts for the next."""

    def __init__(self, job: Job, spool: Spool, context: Context, note: UnitNote, stop: StopRequest) -> None:
        self._gates, self._cpus = job.gates, used_cpus(job)
        self._machine = None if job.machine_lock is None else Path(job.machine_lock)
        self._spool, self._folder = spool.root, spool.job(job.id, str(job.attempt))
        self._context, self._note, self._stop = context, note, stop
        self._settling: Settling | None = None

    def run(self, unit: Unit) -> UnitResult | None:
        """Hold the machine, check the gates, run. The machine is not held while waiting for a gate.

        None when a signal came first. Raises: GateError when a gate stayed shut for the wait limit;
        NoteError; EngineImportError; whatever the unit raises.
        """
        self._context.prepare(unit)
        timed = unit.kind in TIMED_KINDS
        limit_s, waited_s = self._gates.wait_limit_s, 0.0
        self._settling = recent(self._settling, time.monotonic_ns())
        while True:
            with hold_machine(self._machine, timed=timed, stopping=self._stop) as held:
                if not held:
                    return None
                verdicts = self._look() if timed else ()
                if not shut(verdicts):
                    return self._run_open(unit, verdicts)
            if waited_s >= limit_s:
                waiting.over(self._folder)
                raise gate_error(verdicts, waited_s, self._gates)
            if waited_s == 0:
                log.info("Unit %d waits for its gates: %s", unit.number, waiting.line(shut(verdicts)))
            waiting.note(self._folder, shut(verdicts))
            waited_s += _sleep(min(POLL_S, limit_s - waited_s), self._stop)
            if self._stop():
                return None

    def _look(self) -> tuple[GateVerdict, ...]:
        """The verdicts of the gates now."""
        gates, at_ns = self._gates, time.monotonic_ns()
        now = read_sensors(self._spool)
        if (gates.max_temperature_milli_c, gates.min_battery_percent) != (None, None):
            now = android.complete(now)
        self._settling = settle(self._settling, now, at_ns)
        domains = clocks.read_domains(self._cpus) if clocks.asked(gates) else ()
        return check_gates(gates, now, self._settling, domains)

    def _run_open(self, unit: Unit, verdicts: tuple[GateVerdict, ...]) -> UnitResult:
        from agent.measure import run_unit

        log.info("Unit %d (%s) begins", unit.number, unit.kind)
        for verdict in verdicts:
            if verdict.verdict != "pass":
                log.warning(
                    "Unit %d: gate %s is %s: %s", unit.number, verdict.gate, verdict.verdict, verdict.detail
                )
        waiting.over(self._folder)
        self._note.begin(unit.number)
        with self._stop.unit():
            result = run_unit(unit, self._context)
        return result.model_copy(update={"gates": verdicts}) if isinstance(result, ExecuteResult) else result


def _sleep(duration_s: float, stop: StopRequest) -> float:
    """Sleep in slices until ``duration_s`` or a signal; returns the seconds slept."""
    start_ns = time.monotonic_ns()
    end_ns = start_ns + round(duration_s * 1e9)
    while (left_ns := end_ns - time.monotonic_ns()) > 0 and not stop():
        time.sleep(min(0.1, left_ns / 1e9))
    return (time.monotonic_ns() - start_ns) / 1e9
