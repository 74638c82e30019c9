"""The agent's command line: ``python -m agent VERB … --spool DIR``. Verbs: docs/job-and-journal.md.

Every verb prints one JSON object on standard output; a failed one prints
``{"error": {"type", "what", "remedy"}}``. Exit codes: 0 done; 1 failed; 2 the request is wrong;
3 refused; 4 storage full; 5 busy; 128 + n stopped by signal n. Only ``run`` imports an engine.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sti_runtime.errors import InputError, StifarmError
from sti_runtime.records import canonical_json

if TYPE_CHECKING:
    from agent.spool import Spool


def _version(arguments: argparse.Namespace) -> dict[str, Any]:
    from agent.identity import agent_digest, agent_version
    from sti_runtime.journal_format import PROTOCOL_VERSION

    return {"agent": agent_version(), "agent_digest": agent_digest(), "protocol": PROTOCOL_VERSION}


def _open_spool(arguments: argparse.Namespace) -> Spool:
    """The spool, after what a killed agent has left changed on the device was put back."""
    from agent.spool import Spool

    spool = Spool.open(arguments.spool)
    if spool.settings.is_file():
        from agent.settings import restore_left

        restore_left(spool)
    return spool


def _restore(arguments: argparse.Namespace) -> dict[str, Any]:
    from agent.settings import restore
    from agent.spool import Spool

    return restore(Spool.open(arguments.spool))


def _facts(arguments: argparse.Namespace) -> dict[str, Any]:
    from agent.facts import read_facts
    from agent.identity import mark_emulated

    spool = _open_spool(arguments)
    if arguments.emulated:
        mark_emulated(spool)
    return read_facts(spool).model_dump(mode="json")


def _in_spool(module: str, function: str, *names: str) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """A verb that calls ``module.function(spool, *arguments)``; the module is imported when it runs."""

    def verb(arguments: argparse.Namespace) -> dict[str, Any]:
        import importlib

        from agent.fence import admit, parse_lease

        spool = _open_spool(arguments)
        if getattr(arguments, "lease", None) is not None:
            admit(spool, parse_lease(arguments.lease))
        values = [getattr(arguments, name) for name in names]
        result: dict[str, Any] = getattr(importlib.import_module(module), function)(spool, *values)
        return result

    return verb


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from agent.job_runner import run_job

    outcome = run_job(arguments.job, _open_spool(arguments))
    report = {"state": outcome.state, "done": outcome.done, "failed": outcome.failed}
    if outcome.exit_code:
        # Leave without joining threads: after a second signal a unit's own may still be reading.
        _print(report)
        logging.shutdown()
        os._exit(outcome.exit_code)
    return report


def _accepting(
    module: str, function: str, *names: str, options: tuple[str, ...] = ()
) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """A verb that calls ``module.function(spool, *arguments, stdin, stopped=…, **options)``: it takes in what
    comes on standard input, until SIGTERM."""

    def verb(arguments: argparse.Namespace) -> dict[str, Any]:
        import importlib

        from agent.fence import admit, parse_lease
        from agent.signals import StopRequest

        spool = _open_spool(arguments)
        given = getattr(arguments, "lease", None)
        lease = None if given is None else parse_lease(given)
        if lease is not None:
            admit(spool, lease)
        stopped = StopRequest()
        stopped.install()
        values = [getattr(arguments, name) for name in names]
        named = {name: lease if name == "lease" else getattr(arguments, name) for name in options}
        call = getattr(importlib.import_module(module), function)
        result: dict[str, Any] = call(spool, *values, sys.stdin.fileno(), stopped=stopped, **named)
        return result

    return verb


class _Parser(argparse.ArgumentParser):
    """Says usage errors as JSON too."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}.", self.format_usage().strip())


def _parser() -> _Parser:
    parser = _Parser(prog="agent", description="Device side of stifarm.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)

    def add(
        name: str, call: Callable[[argparse.Namespace], dict[str, Any]], text: str, *, writes: bool = False
    ) -> _Parser:
        verb: _Parser = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        verb.set_defaults(call=call)
        if name != "version":
            verb.add_argument("--spool", type=Path, required=True, help="the device's work folder")
        if writes:
            verb.add_argument("--lease", help="STORE:COUNTER[:takeover], checked against the fence first")
        return verb

    add("version", _version, "Print version and digest of this agent.")
    facts = add("facts", _facts, "Print what this device is.")
    facts.add_argument("--emulated", action="store_true", help="mark the spool as an emulated device's")
    add("run", _run, "Run or resume a job.").add_argument("job", type=Path, help="…/jobs/ID/ATTEMPT/job.json")

    chunks, house = "agent.chunks", "agent.housekeeping"
    verb = add("missing", _in_spool(chunks, "missing", "manifest"), "Announce a bundle.", writes=True)
    verb.add_argument("manifest", type=Path)
    accept = _accepting("agent.accepting", "accept", "digest", options=("commit", "lease"))
    verb = add("accept", accept, "Take in chunks from standard input.", writes=True)
    verb.add_argument("digest")
    verb.add_argument("--commit", action="store_true", help="make the bundle visible if then nothing lacks")
    for name in ("commit", "verify"):
        text = {"commit": "Verify a bundle and make it visible.", "verify": "Verify a finished bundle."}[name]
        add(name, _in_spool(chunks, name, "digest"), text, writes=True).add_argument("digest")
    verb = add("has", _in_spool(house, "has", "digests"), "Which content is here.")
    verb.add_argument("digests", nargs="*", metavar="DIGEST")
    accept = _accepting("agent.accepting_task", "accept_task", "digest")
    verb = add("accept-task", accept, "Take in task data from standard input.", writes=True)
    verb.add_argument("digest")
    accept = _accepting("agent.accepting_job", "accept_job", "job_id", "attempt", "digest")
    verb = add("accept-job", accept, "Take in a job file from standard input.", writes=True)
    for name in ("job_id", "attempt", "digest"):
        verb.add_argument(name)
    verb = add("collect", _in_spool(house, "collect", "keep"), "Remove content not kept.", writes=True)
    verb.add_argument("--keep", nargs="*", default=[], action="extend", metavar="DIGEST")
    add("restore", _restore, "Put back what a killed agent left changed on the device.")
    add("clean", _in_spool(house, "clean"), "Remove everything of ours.", writes=True)

    process = "agent.process"
    jobs = {
        "status": (process, "job_status", "Where a job stands."),
        "stop": (process, "stop_job", "Ask a job to stop after its unit."),
        "forget": (house, "forget", "Remove a job's folder."),
    }
    for name, (module, function, text) in jobs.items():
        call = _in_spool(module, function, "job_id", "attempt")
        verb = add(name, call, text, writes=name == "forget")
        verb.add_argument("job_id")
        verb.add_argument("attempt")
    return parser


def _print(report: dict[str, Any]) -> None:
    sys.stdout.write(canonical_json(report).decode() + "\n")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns its exit code."""
    try:
        arguments = _parser().parse_args(argv)
        _print(arguments.call(arguments))
    except StifarmError as error:
        _print({"error": {"type": type(error).__name__, "what": error.what, "remedy": error.remedy}})
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the outermost boundary: the host reads JSON, people the trace
        traceback.print_exc(file=sys.stderr)
        what = f"{type(error).__name__}: {error}"
        _print({"error": {"type": "internal", "what": what, "remedy": "Report it with the agent's log."}})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
