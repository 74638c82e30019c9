"""Doctor's findings about the state folder: that it can be used, and what in it cannot be read any more."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from orchestrator.doctor import Finding
from orchestrator.settings import Settings
from sti_runtime.bundle import Bundle
from sti_runtime.errors import StifarmError
from sti_runtime.model_store import INFO_FILE, ModelInfo
from sti_runtime.task_data import load_task_data

SUBJECT = "state folder"


def home_findings(settings: Settings) -> list[Finding]:
    """What is wrong with the folder and the files in it; nothing when all is well. Nothing is changed; of
    models and bundles only what describes them is read, task data whole."""
    home = settings.home
    if not home.exists():
        return []
    if os.access(home, os.R_OK | os.W_OK | os.X_OK):
        return [*_folders(settings), *_locks(home), *_contents(settings)]
    unwritable = Finding(
        SUBJECT,
        "problem",
        f"{home} cannot be written by this user, or its file system is mounted read-only",
        "Make it writable, or set STIFARM_HOME to a folder that is.",
    )
    return [unwritable, *_contents(settings)]


def wrong(error: StifarmError, subject: str = SUBJECT) -> Finding:
    """An error about a file of the home, or another subject of this host, as a finding."""
    return Finding(subject, "problem", error.what.rstrip("."), error.remedy)


def _folders(settings: Settings) -> list[Finding]:
    """The folders that the farm makes: something else stands there, or it is another user's."""
    found = []
    for path in (settings.models, settings.bundles, settings.tasks, settings.emulation, settings.shipped):
        if path.exists() and not (path.is_dir() and os.access(path, os.R_OK | os.W_OK | os.X_OK)):
            what = "cannot be written by this user" if path.is_dir() else "is no folder"
            found.append(
                Finding(SUBJECT, "problem", f"{path} {what}", "Let this user write there, or move it away.")
            )
    return found


def _locks(home: Path) -> list[Finding]:
    """The files that processes lock."""
    return [
        Finding(
            SUBJECT,
            "problem",
            f"{path} is to be locked and cannot be opened by this user",
            f"Use stifarm as the user who made it; or, while no stifarm runs: rm -r {path}",
        )
        for path in sorted(home.glob("*.lock"))
        if not path.is_file() or not os.access(path, os.R_OK | os.W_OK)
    ]


def _contents(settings: Settings) -> list[Finding]:
    """Models, bundles and task data that cannot be read or are not what they should be; of models and bundles
    as far as what describes them tells."""
    kinds: tuple[tuple[Path, Callable[[Path], object]], ...] = (
        (settings.models, lambda path: ModelInfo.read(path / INFO_FILE)),
        (settings.bundles, Bundle.open),
        (settings.tasks, load_task_data),
    )
    found = []
    for folder, read in kinds:
        for path in sorted(folder.glob("[!.]*")) if os.access(folder, os.R_OK | os.X_OK) else ():
            try:
                read(path)
            except StifarmError as error:
                found.append(wrong(error))
    return found
