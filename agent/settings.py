"""What a job changes on the device, and that it is put back.

Each change is a line of ``settings.journal``, on storage before anything is changed. At the end of the run
each value is put back, last change first, and the file removed. What an agent leaves behind that was killed
is put back by the next verb that finds nobody running. Format: docs/job-and-journal.md, 8.
"""

from __future__ import annotations

import contextlib
import logging
import os
import zlib
from collections.abc import Iterable, Sequence

from pydantic import Field

from agent.errors import BusyError
from agent.identity import boot_id
from agent.locks import hold
from agent.setting_targets import TARGET_FORM, SettingError, expand, read_target, stated, write_target
from agent.spool import Spool, checked_job, fsync_folder, storage_error, write_atomic
from sti_runtime.errors import FormatError, InputError, StifarmError
from sti_runtime.journal_format import checked_body
from sti_runtime.messages import (
    AGENT_LOG_FILE,
    SETTING_REPORTS_MOST,
    Setting,
    SettingReport,
    SettingValue,
)
from sti_runtime.records import Record

log = logging.getLogger(__name__)

JOURNAL_CAP_BYTES = 4 << 20


class Change(Record):
    """One line of the journal: ``target`` was ``before`` (None: not set), ``job`` sets it to ``value``."""

    before: str | None = Field(max_length=256)
    boot_id: str = Field(min_length=1, max_length=64)
    job: str = Field(max_length=90)
    target: str = Field(max_length=300, pattern=f"^(?:{TARGET_FORM.pattern})$")
    value: SettingValue

    def report(self, state: str, why: str = "") -> SettingReport:
        """What became of it."""
        return _report(self.target, self.value, self.before, state, why)


def _report(target: str, value: str, before: str | None, state: str, why: str = "") -> SettingReport:
    if state in ("applied", "restored"):
        log.info("Setting %s: %s", target, f"{state}{why and f' ({why})'}")
    else:
        log.warning("Setting %s is %s: %s", target, state, why)
    fields = {"target": target, "value": value, "before": before, "state": state, "why": why[:500]}
    return SettingReport.model_validate(fields)


# ------------------------------------------------------------------ applying


def apply_settings(settings: Sequence[Setting], spool: Spool, job: str) -> tuple[SettingReport, ...]:
    """Change what the job asks for; a setting that cannot be changed is reported, and the run goes on."""
    reports: list[SettingReport] = []
    for setting in settings:
        try:
            for target, value in expand(setting):
                if len(reports) == SETTING_REPORTS_MOST:
                    log.warning("More than %d settings; the rest is left alone", SETTING_REPORTS_MOST)
                    return tuple(reports)
                reports.append(_apply(target, value, spool, job))
        except SettingError as error:
            reports.append(_report(*stated(setting), None, "not-applied", str(error)))
    return tuple(reports)


def _apply(target: str, value: str, spool: Spool, job: str) -> SettingReport:
    before: str | None = None
    try:
        before = read_target(target)
        if before == value:
            return _report(target, value, before, "applied", "it was so before")
        change = Change(before=before, boot_id=boot_id(), job=job, target=target, value=value)
        _append(spool, change)
        write_target(target, value)
        now = read_target(target)
        if now == value:
            return change.report("applied")
        if now != before:
            write_target(target, before)
    except (SettingError, StifarmError) as error:
        return _report(target, value, before, "not-applied", str(error))
    return change.report("not-applied", f"it reads back {now!r}")


def _append(spool: Spool, change: Change) -> None:
    """One line, on storage. Raises: StorageFullError, InputError; then the file is as before."""
    path = spool.settings
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise storage_error(error, path) from error
    try:
        size = os.fstat(descriptor).st_size
        line = _line(change)
        try:
            while line:
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
            fsync_folder(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):  # a torn line counts for nothing
                os.ftruncate(descriptor, size)
            raise storage_error(error, path) from error
    finally:
        os.close(descriptor)


def _line(change: Change, number: int = 0) -> bytes:
    body = change.to_json()
    return b"%d %08x %s\n" % (number, zlib.crc32(body), body)


# ------------------------------------------------------------------ restoring


def restore_settings(spool: Spool) -> tuple[SettingReport, ...]:
    """Put back what the journal tells of, last change first, under the run lock.

    The journal is removed, or holds what could not be put back. Raises: StorageFullError, InputError.
    """
    changes = _changes(spool)
    if changes is None:
        return ()
    boot = boot_id()
    reports = [_restore(change, boot) for change in reversed(changes)]
    states = [report.state for report in reversed(reports)]
    left = [change for change, state in zip(changes, states, strict=True) if state == "not-restored"]
    if left:
        write_atomic(spool.settings, b"".join(map(_line, left)))
        return tuple(reports)
    try:
        spool.settings.unlink(missing_ok=True)
        fsync_folder(spool.root)
    except OSError as error:
        raise storage_error(error, spool.settings) from error
    return tuple(reports)


def _changes(spool: Spool) -> list[Change] | None:
    """Good lines of the journal, at most as many as a job can make; None if there is no journal."""
    if not spool.settings.is_file():
        return None
    try:
        with spool.settings.open("rb") as stream:
            data = stream.read(JOURNAL_CAP_BYTES)
    except OSError as error:
        raise InputError(f"{spool.settings}: cannot be read: {error.strerror}.") from error
    changes: list[Change] = []
    for line in data.split(b"\n"):
        try:
            if line:
                changes.append(Change.from_json(checked_body(line, source="a line"), source="a line"))
        except FormatError as error:
            log.warning("%s: %s", spool.settings, error)
    return changes[:SETTING_REPORTS_MOST]


def _restore(change: Change, boot: str) -> SettingReport:
    if change.target.startswith("/") and change.boot_id != boot:
        return change.report("restored", "by the reboot since")
    try:
        found = read_target(change.target)
        if found not in (change.value, change.before):
            return change.report("kept", f"somebody set it to {found!r} meanwhile")
        if found != change.before:
            write_target(change.target, change.before)
            found = read_target(change.target)
    except SettingError as error:
        return change.report("not-restored", str(error))
    if found != change.before:
        return change.report("not-restored", f"it reads back {found!r}")
    return change.report("restored")


def restore_at_end(spool: Spool) -> tuple[SettingReport, ...]:
    """``restore_settings`` however the run ended; what fails is tried again at the next contact."""
    try:
        return restore_settings(spool)
    except StifarmError as error:
        log.log(logging.ERROR, "Settings are not restored: %s", error)
        return ()


def restore_left(spool: Spool) -> None:
    """At every contact: put back what a killed agent left, unless one runs now; told in its job's log.

    What fails is told there and tried again at the next contact: it is no failure of what was asked.
    """
    try:
        with hold(spool.run_lock, wait_s=0, what="The device"):
            for handler in _job_logs(spool):
                log.addHandler(handler)
            log.setLevel(logging.INFO)
            try:
                restore_settings(spool)
            finally:
                for handler in tuple(log.handlers):
                    log.removeHandler(handler)
                    handler.close()
    except BusyError:
        return
    except (OSError, StifarmError) as error:
        log.warning("Settings left behind are not restored: %s", error)


def _job_logs(spool: Spool) -> Iterable[logging.Handler]:
    """The agent.log of the job that made the changes, where it is still there."""
    for job in {change.job for change in _changes(spool) or ()}:
        try:
            name, attempt = checked_job(*job.split("/", 1))
        except (InputError, TypeError):
            continue
        folder = spool.job(name, attempt)
        if folder.is_dir():
            handler = logging.FileHandler(folder / AGENT_LOG_FILE)
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            yield handler


def restore(spool: Spool) -> dict[str, object]:
    """The verb. Raises: BusyError while a job runs."""
    with hold(spool.run_lock, wait_s=0, what="The device"):
        return {"settings": [report.model_dump(mode="json") for report in restore_settings(spool)]}
