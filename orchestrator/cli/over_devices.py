"""Working on the chosen devices: deploy, make ready, act, report; one failure stops no other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import typer

from orchestrator import fleet
from orchestrator.cli.context import (
    FAILED,
    OK,
    SOME_FAILED,
    Session,
)
from orchestrator.cli.output import (
    Bar,
    Steps,
    fail,
    note,
    steps,
)
from orchestrator.errors import DeviceError
from orchestrator.fleet import ReadyDevice
from orchestrator.inventory import Device
from orchestrator.measure import Work
from orchestrator.side_by_side import by_machine, side_by_side
from sti_runtime.errors import StifarmError

T = TypeVar("T")

_WATCH_S = 0.25
_WATCH_TIMED_S = 2.0
"""While something is timed, perhaps on this machine, it is looked at seldom."""


def deploy_all(
    session: Session, work: Work, *, verify: bool = False, quiet: bool = False
) -> list[fleet.Deployed]:
    """Deploy to every chosen device, each with a bar over what it lacks (in kB)."""
    with steps(quiet=quiet) as bars:
        results = side_by_side(
            [[device] for device in session.devices],
            lambda device: _deploy_one(session, work, bars, device, verify=verify),
            session.farm.stop,
        )
        done = {device.name: result for device, result in results}
    return [done[device.name] for device in session.devices]


def _deploy_one(session: Session, work: Work, bars: Steps, device: Device, *, verify: bool) -> fleet.Deployed:
    path = session.farm.settings.tasks / f"{work.task_data}.safetensors"
    with bars.step(f"{device.name}: deploy") as bar, _watched(session, device.name, bar, sent=True):
        result = fleet.deploy(
            session.farm, session.worker, [device], work.bundle.bundle.path, [path], verify=verify
        )[0]
    if result.error is not None:
        bar.fail()
        return result
    sent = max(1, sum(report.bytes_sent for report in result.reports) // 1000)
    bar(sent, sent)
    return result


@contextmanager
def _watched(
    session: Session, name: str, bar: Bar, *, sent: bool = False, every_s: float = _WATCH_S
) -> Iterator[None]:
    """Within the block the bar says what reaching the device waits for; ``sent``: and kB sent and to send.

    Transfers and waits end early when the farm's ``stop`` is set.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every_s):
            now = session.worker.progress(name)
            if sent and now.total_bytes:
                bar(now.sent_bytes // 1000, now.total_bytes // 1000)
            bar.reach(now.waits)
            if session.farm.stop.is_set():
                session.worker.halt(name)

    with ThreadPoolExecutor(1) as watcher:
        watching = watcher.submit(watch)
        try:
            yield
        finally:
            ended.set()
        watching.result()


def on_each(
    session: Session, label: str, action: Callable[[Device], T], *, quiet: bool
) -> list[tuple[Device, T | StifarmError]]:
    """What ``action`` gives for every chosen device, or its error; all side by side, each with a bar.

    The bar names a device's address, for that is what is waited for. Nothing may be timed in it. Answers
    are in the order of the devices, however long one takes.
    """

    def one(device: Device) -> T | StifarmError:
        where = f" at {device.address}" if device.address else ""
        try:
            with bars.step(f"{device.name}{where}: {label}") as bar, _watched(session, device.name, bar):
                return action(device)
        except StifarmError as error:
            return error

    with steps(quiet=quiet) as bars:
        answers = side_by_side([[device] for device in session.devices], one, session.farm.stop)
        done = {device.name: answer for device, answer in answers}
    return [(device, done[device.name]) for device in session.devices]


def ready_with_content(session: Session, work: Work, name: str) -> ReadyDevice:
    """A device of the inventory, ready, with bundle and rows on it. Raises: DeviceError, LeaseHeldError."""
    device = next(item for item in session.farm.inventory.devices if item.name == name)
    path = session.farm.settings.tasks / f"{work.task_data}.safetensors"
    deployed = fleet.deploy(session.farm, session.worker, [device], work.bundle.bundle.path, [path])[0]
    if deployed.error is not None:
        raise deployed.error
    return fleet.ready_device(session.farm, session.worker, device, work.bundle.digest)


def each_device(
    session: Session,
    work: Work,
    label: str,
    action: Callable[[ReadyDevice, Bar], T],
    *,
    quiet: bool,
) -> tuple[list[T], dict[str, StifarmError]]:
    """Run ``action`` for every device, each with a bar: (results, errors by device). Failures are told, and
    stop no other device.

    Devices that share a machine are worked on one after the other, for they must not be timed at the same
    time; different machines side by side. Results are in the order of the devices, and so are errors.
    """
    done: dict[str, T] = {}
    errors: dict[str, StifarmError] = {}

    def act(device: Device) -> None:
        try:
            done[device.name] = _one(session, work, bars, device.name, label, action)
        except StifarmError as error:
            fail(error if isinstance(error, DeviceError) else _named(error, device.name))
            errors[device.name] = error

    machines = by_machine(session.devices, session.farm.settings.machine_lock)
    with steps(quiet=quiet) as bars:
        for _ in side_by_side(machines, act, session.farm.stop):
            pass
    names = [device.name for device in session.devices]
    return (
        [done[name] for name in names if name in done],
        {name: errors[name] for name in names if name in errors},
    )


def _one(
    session: Session,
    work: Work,
    bars: Steps,
    name: str,
    label: str,
    action: Callable[[ReadyDevice, Bar], T],
) -> T:
    with bars.step(f"{name}: ready") as bar, _watched(session, name, bar):
        ready = ready_with_content(session, work, name)
        bar(1, 1)
    for reason in ready.reasons:
        note(f"  {name}: {reason}")
    with (
        bars.step(f"{name}: {label}") as bar,
        _watched(session, name, bar, every_s=_WATCH_TIMED_S),
    ):
        return action(ready, bar)


def failed_json(device: str, error: StifarmError) -> dict[str, str]:
    """A device that failed, among the others' documents."""
    what = error.what.removeprefix(f"{device}: ")
    return {"device": device, "error": what, "remedy": error.remedy.strip()}


def failures_json(errors: Iterable[StifarmError | None]) -> list[dict[str, str | None]]:
    """Every failure among these, for machines; no device where it is not of one."""
    return [
        {**failed_json(device or "", error), "device": device}
        for error in errors
        if error is not None
        for device in [error.device if isinstance(error, DeviceError) else None]
    ]


def _named(error: StifarmError, device: str) -> StifarmError:
    return error if device in error.what else StifarmError(f"{device}: {error.what}", error.remedy)


def finish(errors: Sequence[StifarmError | DeviceError | None]) -> None:
    """Exit 0, 1 (every device failed) or 3 (some did); failures have been shown before."""
    failed = [error for error in errors if error is not None]
    if not failed:
        raise typer.Exit(OK)
    if len(failed) < len(errors):
        raise typer.Exit(SOME_FAILED)
    raise typer.Exit(FAILED if failed[0].exit_code != 2 else 2)
