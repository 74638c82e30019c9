"""The command line: ``stifarm VERB``. Exit codes: 0 done, 1 failed, 2 usage, 3 some devices failed,
130 interrupted, 143 terminated."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import structlog
import typer

from orchestrator.cli.agent import agent_app
from orchestrator.cli.alerts import alerts_app
from orchestrator.cli.bundle import bundle_app
from orchestrator.cli.campaign import campaign_app
from orchestrator.cli.context import Options
from orchestrator.cli.demo import demo, init
from orchestrator.cli.deploy import deploy
from orchestrator.cli.devices import devices_app
from orchestrator.cli.doctor import doctor
from orchestrator.cli.host import host_app
from orchestrator.cli.importance import importance_app
from orchestrator.cli.lab import lab_app
from orchestrator.cli.model import model_app, task_app
from orchestrator.cli.output import emit_json, fail, note, show_logs
from orchestrator.cli.plan import evaluate, plan
from orchestrator.cli.plans import plans_app
from orchestrator.cli.profile import profile
from orchestrator.cli.schedules import schedules_app, serve
from orchestrator.cli.store import db_app
from orchestrator.home_files import of_storage
from orchestrator.interrupts import lost_interrupts_return, terminations_interrupt
from sti_runtime.errors import StifarmError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure how fast each device runs a transformer in almost no memory, and hand it its plan.",
    epilog="First steps: stifarm init, stifarm demo. Then: model import, model train, bundle build, "
    "deploy, importance, profile, plan, eval, plans query.",
)
app.add_typer(model_app, name="model")
app.add_typer(task_app, name="task")
app.add_typer(bundle_app, name="bundle")
app.add_typer(importance_app, name="importance")
app.add_typer(devices_app, name="devices")
app.add_typer(agent_app, name="agent")
app.add_typer(plans_app, name="plans")
app.add_typer(campaign_app, name="campaign")
app.add_typer(schedules_app, name="schedules")
app.add_typer(db_app, name="db")
app.add_typer(host_app, name="host")
app.add_typer(lab_app, name="lab")
app.add_typer(alerts_app, name="alerts")
for verb, function in (
    ("init", init),
    ("demo", demo),
    ("doctor", doctor),
    ("deploy", deploy),
    ("profile", profile),
    ("plan", plan),
    ("eval", evaluate),
    ("serve", serve),
):
    app.command(verb)(function)

_log = structlog.get_logger(__name__)

TERMINATED = 128 + signal.SIGTERM
_INTERRUPTED = 130
"""What Typer makes of Ctrl-C."""
_SEE_HELP = "The verb's --help has its arguments and options."


@app.callback()
def options(
    context: typer.Context,
    home: Annotated[Path | None, typer.Option("--home", help="State folder (STIFARM_HOME).")] = None,
    inventory: Annotated[
        Path | None, typer.Option("--inventory", "-i", help="Inventory file (STIFARM_INVENTORY).")
    ] = None,
    db_url: Annotated[str | None, typer.Option("--db-url", help="Store (STIFARM_DB_URL).")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False,
) -> None:
    """Options of every verb."""
    level = logging.INFO if verbose else logging.WARNING
    show_logs(level)
    options = context.ensure_object(Options)
    options.home, options.inventory, options.db_url = home, inventory, db_url


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: errors of the tree become two lines and an exit code, never a traceback.

    ``argv``: arguments without the program's name; None: the process's.
    """
    asked = Options()
    with terminations_interrupt() as terminated:
        try:
            with lost_interrupts_return():
                app(None if argv is None else list(argv), obj=asked)
        except StifarmError as error:
            _end(error, asked)
        except OSError as error:
            refusal = of_storage(error)
            if refusal is None:
                raise
            _log.info("the system refused", exc_info=error)  # with --verbose: where
            _end(refusal, asked)
        except SystemExit as done:
            # Of a usage error, which Typer has shown.
            wrong = getattr(done.__context__, "format_message", None)
            if wrong is not None and "--json" in (sys.argv if argv is None else argv):
                emit_json({"error": wrong(), "remedy": _SEE_HELP})
            if done.code == _INTERRUPTED:
                note(f"{'terminated' if terminated() else 'interrupted'}; {asked.interrupted}")
                if terminated():
                    sys.exit(TERMINATED)
            raise


def _end(error: StifarmError, asked: Options) -> NoReturn:
    fail(error)
    if asked.owes_json:
        emit_json({"error": error.what, "remedy": error.remedy.strip()})
    sys.exit(error.exit_code)
