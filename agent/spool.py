"""The spool: the one folder an agent writes to, and the paths in it.

::

    bundles/<digest>/               finished bundles
    tasks/<digest>.safetensors      finished task data; <digest>.partial while it is pushed
    incoming/<digest>/              a bundle on its way, <digest>.done its list of verified chunks
    jobs/<job id>/<attempt>/        job.json, journal.log, agent.log, pid, open-unit
    locks/                          lock files of the agent's processes
    fence.json                      highest lease counter seen of each store
    settings.journal                what was changed on the device and is to be put back
    device_id                       only in the spool of an emulated device
    bin/                            the agent executable, where one is pushed

Paths are formed from validated digests and job ids only, so none can lead outside.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from agent.errors import StorageFullError
from sti_runtime.errors import InputError, StifarmError

OWNED = (
    "bundles",
    "tasks",
    "incoming",
    "jobs",
    "locks",
    "bin",
    "fence.json",
    "settings.journal",
    "device_id",
)
"""Everything ``clean`` removes."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_JOB_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def checked_digest(text: str) -> str:
    """``text`` if it is a digest. Raises: InputError."""
    if _DIGEST.fullmatch(text) is None:
        raise InputError(f"{text[:80]!r} is not a digest.", "Give 64 lower-case hexadecimal digits.")
    return text


def checked_job(job_id: str, attempt: str | int) -> tuple[str, int]:
    """A job id and attempt that can form a path. Raises: InputError."""
    if _JOB_ID.fullmatch(job_id) is None:
        raise InputError(
            f"{job_id[:80]!r} is not a job id.", "Job ids hold a-z, 0-9 and '-', at most 64 characters."
        )
    if re.fullmatch(r"[1-9][0-9]{0,17}", str(attempt)) is None:
        raise InputError(f"{str(attempt)[:40]!r} is not an attempt.", "Attempts count from 1.")
    return job_id, int(attempt)


@dataclass(frozen=True)
class Spool:
    """Paths below one spool folder."""

    root: Path

    @classmethod
    def open(cls, root: Path) -> Spool:
        """The spool at ``root``, made with its folders if it is not there. Raises: StifarmError."""
        spool = cls(root.absolute())
        try:
            for folder in (spool.bundles, spool.tasks, spool.incoming, spool.jobs, spool.locks):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{root}: the spool cannot be made: {error.strerror}.",
                "Give a folder this user may write to as the device's workdir.",
            ) from error
        return spool

    @property
    def bundles(self) -> Path:
        """Finished bundles."""
        return self.root / "bundles"

    @property
    def tasks(self) -> Path:
        """Task data."""
        return self.root / "tasks"

    @property
    def incoming(self) -> Path:
        """What is on its way: half-sent bundles and packs."""
        return self.root / "incoming"

    @property
    def jobs(self) -> Path:
        """Job folders."""
        return self.root / "jobs"

    @property
    def locks(self) -> Path:
        """Lock files."""
        return self.root / "locks"

    @property
    def fence(self) -> Path:
        """The fence file."""
        return self.root / "fence.json"

    @property
    def settings(self) -> Path:
        """The journal of changed settings; there only while some are changed."""
        return self.root / "settings.journal"

    @property
    def device_id(self) -> Path:
        """The mark of an emulated device."""
        return self.root / "device_id"

    @property
    def run_lock(self) -> Path:
        """Held by the agent process that runs a job; its label is ``<job id>/<attempt>``."""
        return self.locks / "run"

    @property
    def deploy_lock(self) -> Path:
        """Held by every verb that changes bundles, tasks or incoming."""
        return self.locks / "deploy"

    @property
    def fence_lock(self) -> Path:
        """Held while the fence is read and written."""
        return self.locks / "fence"

    def bundle(self, digest: str) -> Path:
        """Folder of a finished bundle."""
        return self.bundles / checked_digest(digest)

    def task(self, digest: str) -> Path:
        """File of finished task data."""
        return self.tasks / f"{checked_digest(digest)}.safetensors"

    def task_partial(self, digest: str) -> Path:
        """File of task data that is being pushed."""
        return self.tasks / f"{checked_digest(digest)}.partial"

    def incoming_bundle(self, digest: str) -> Path:
        """Folder of a bundle on its way."""
        return self.incoming / checked_digest(digest)

    @property
    def pack(self) -> Path:
        """Input of a verb, where the device's link cannot stream it; a killed host can have left it."""
        return self.incoming / "pack"

    def pushed_manifest(self, digest: str) -> Path:
        """Where the host pushes the manifest that it announces."""
        return self.incoming / f"{checked_digest(digest)}.manifest"

    def done_list(self, digest: str) -> Path:
        """Verified chunks of a bundle on its way, one index per line."""
        return self.incoming / f"{checked_digest(digest)}.done"

    def arrived_list(self, digest: str) -> Path:
        """Chunks of a bundle on its way that were written in the boot its first line names."""
        return self.incoming / f"{checked_digest(digest)}.arrived"

    def job(self, job_id: str, attempt: str | int) -> Path:
        """Folder of one attempt of a job."""
        name, number = checked_job(job_id, attempt)
        return self.jobs / name / str(number)


def fsync_folder(path: Path) -> None:
    """Make the folder's entries (creations, renames, removals) durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: durable and whole, or not at all.

    Raises: StifarmError (StorageFullError when there is no space).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise storage_error(error, path) from error


def storage_error(error: OSError, path: Path) -> StifarmError:
    """The error of ours for a failed write to ``path``."""
    if error.errno in _FULL:
        return StorageFullError(
            f"{path}: no space left to write ({error.strerror}).",
            "Free space on the device (devices clean, or other users' files), then run it again.",
        )
    return InputError(
        f"{path}: cannot be written: {error.strerror}.", "Check the folder's owner and permissions."
    )


def remove_whole(path: Path) -> None:
    """Remove a file or folder so that it is never seen half-removed under its name."""
    if path.is_dir() and not path.is_symlink():
        doomed = path.with_name(f".{path.name}.{os.getpid()}.removed")
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)
