"""What is kept on the device and what goes: collecting old content, removing all of ours."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agent.chunks import LOCK_WAIT_S
from agent.errors import BusyError, RefusedError
from agent.identity import agent_digest, agent_version, device_identity
from agent.locks import hold, read_label
from agent.process import running_pid
from agent.settings import restore_settings
from agent.spool import OWNED, Spool, checked_digest, fsync_folder, remove_whole
from sti_runtime.journal_format import PROTOCOL_VERSION
from sti_runtime.manifest import MANIFEST_NAME
from sti_runtime.messages import JOB_CAP_BYTES, JOB_FILE, Job

_NAMED = re.compile(r"([0-9a-f]{64})(?:\.(?:done|arrived|manifest|safetensors|partial))?")


def has(spool: Spool, digests: Iterable[str]) -> dict[str, Any]:
    """Which of these digests are here: finished bundles, whose manifests are what they are named after;
    bundles that were announced; task data; ``partial``: how many bytes of task data on its way. With it what
    ``version`` says and who the device is: one answer settles a deploy.

    Raises: InputError if one is no digest.
    """
    asked = sorted({checked_digest(digest) for digest in digests})
    return {
        "agent": agent_version(),
        "agent_digest": agent_digest(),
        "protocol": PROTOCOL_VERSION,
        "identity": device_identity(spool)[0],
        "bundles": [digest for digest in asked if _holds_manifest(spool.bundle(digest), digest)],
        "incoming": [digest for digest in asked if _holds_manifest(spool.incoming_bundle(digest), digest)],
        "partial": {digest: held for digest in asked if (held := _partial_bytes(spool.task_partial(digest)))},
        "tasks": [digest for digest in asked if spool.task(digest).is_file()],
    }


def _holds_manifest(folder: Path, digest: str) -> bool:
    try:
        with (folder / MANIFEST_NAME).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == digest
    except OSError:
        return False


def _partial_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() and not path.is_symlink() else 0


def _named_by_running_job(spool: Spool) -> set[str]:
    """Digests that the job under the run lock's label needs."""
    job_id, _, attempt = read_label(spool.run_lock).partition("/")
    if not attempt:
        raise BusyError("Another agent process is starting.", "Try again in a moment.")
    job = Job.read(spool.job(job_id, attempt) / JOB_FILE, cap_bytes=JOB_CAP_BYTES)
    return {digest for digest in (job.bundle, job.task_data) if digest is not None}


def collect(spool: Spool, keep: Iterable[str]) -> dict[str, Any]:
    """Remove bundles, half-sent bundles and task data not in ``keep``; a running job's are always kept.

    Raises: InputError if ``keep`` holds something that is no digest (nothing was removed).
    """
    kept = {checked_digest(digest) for digest in keep}
    removed: dict[str, list[str]] = {"bundles": [], "incoming": [], "tasks": []}
    with hold(spool.deploy_lock, wait_s=LOCK_WAIT_S, what="Deploying to this device"):
        try:
            # While this is held no job starts; while it is held by a job, that job is named in it.
            with hold(spool.run_lock, wait_s=0, what="The device"):
                _remove_others(spool, kept, removed)
        except BusyError:
            _remove_others(spool, kept | _named_by_running_job(spool), removed)
    return {"removed": removed}


def _remove_others(spool: Spool, kept: set[str], removed: dict[str, list[str]]) -> None:
    for kind, folder in (("bundles", spool.bundles), ("incoming", spool.incoming), ("tasks", spool.tasks)):
        for path in sorted(folder.iterdir()):
            named = _NAMED.fullmatch(path.name)
            if named is None or named[1] not in kept:
                remove_whole(path)
                if named is not None and named[1] not in removed[kind]:
                    removed[kind].append(named[1])
        fsync_folder(folder)


def forget(spool: Spool, job_id: str, attempt: str) -> dict[str, Any]:
    """Remove one job's folder, journal included. Raises: BusyError while it runs."""
    folder = spool.job(job_id, attempt)
    if running_pid(folder) is not None:
        raise BusyError(f"Job {job_id}/{attempt} is running.", "Stop it first.")
    present = folder.is_dir()
    if present:
        remove_whole(folder)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
    return {"removed": present}


def clean(spool: Spool) -> dict[str, Any]:
    """Remove everything of ours from the spool; the folder itself stays, and what others put there.

    Raises: BusyError while a job runs; RefusedError while a setting of the device cannot be put back.
    """
    removed = []
    with (
        hold(spool.run_lock, wait_s=0, what="The device"),
        hold(spool.deploy_lock, wait_s=LOCK_WAIT_S, what="Deploying to this device"),
    ):
        _check_restored(spool)
        leftovers = [p.name for p in spool.root.iterdir() if _is_leftover(p)]
        for name in (*OWNED, *leftovers):
            path = spool.root / name
            if path.exists() or path.is_symlink():
                remove_whole(path)
                removed.append(name)
        fsync_folder(spool.root)
    return {"removed": removed}


def _check_restored(spool: Spool) -> None:
    left = [report for report in restore_settings(spool) if report.state == "not-restored"]
    if left:
        raise RefusedError(
            f"{left[0].target} cannot be put back to {left[0].before!r}: {left[0].why}.",
            "Put it back by hand, or restart the device where it is a file of /sys; then clean again.",
        )


def _is_leftover(path: Path) -> bool:
    """Temporary files that a killed agent of ours left in the spool's root."""
    stem = path.name.removeprefix(".").split(".")[0]
    ours = {Path(name).stem for name in OWNED} | {"direct-io", "probe"}
    return path.name.startswith(".") and stem in ours
