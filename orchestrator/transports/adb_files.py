"""Files of a device behind an adb server: through its file service, and where that may not, by commands."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from orchestrator.errors import DeviceError, DeviceFullError, MissingFileError, StableError, TransientError
from orchestrator.transports.adb_link import ANSWER_S, AdbLink
from orchestrator.transports.adb_shell import AdbShell
from orchestrator.transports.adb_socket import ProtocolError
from orchestrator.transports.adb_sync import SyncError, SyncSession, code_of
from orchestrator.transports.base import OUTPUT_CAP_BYTES, Completed, Progress
from orchestrator.transports.room import check_room

_COPY_BYTES = 1 << 20
_SMALL_BYTES = 1 << 16
"""A file up to here is received whole, even for a part of it: that starts no process on the device."""

_GROWTH_BYTES = 64 << 20
"""How much longer than announced a file may get while it is pulled."""

_SHORT_S = 60.0
_BLOCK_BYTES = 4096
_IDLE_SESSIONS = 4
_GONE, _FOLDER, _UNREADABLE = 90, 91, 92
"""Exit codes of the scripts below."""

_PROCESS_FILE = re.compile(r"/proc/[0-9]+/")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_PASSING = frozenset(
    {errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO}
)

_TEMPORARY = (
    'for d in "$TMPDIR" /data/local/tmp /tmp;do if [ "$d" ]&&[ -w "$d" ];then break;fi;done;echo "$d"'
)

_READ = f"""[ -e "$1" ]||exit {_GONE}
[ -d "$1" ]&&exit {_FOLDER}
[ -r "$1" ]||exit {_UNREADABLE}
exec dd if="$1" bs={_BLOCK_BYTES} skip="$2" count="$3" """

_MOVE = f'[ -d "$2" ]&&exit {_FOLDER};exec mv -f "$1" "$2"'


class AdbFiles:
    """Reads and writes files. Connections to the file service are kept for the next use.

    Methods raise DeviceError and its kinds.
    """

    def __init__(self, link: AdbLink, shell: AdbShell) -> None:
        self._link, self._shell, self._device = link, shell, link.device
        self._proc_is_closed = False
        """Whether the file service may not read what a command may, of a process: it is not asked again."""

        self._idle: list[SyncSession] = []
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the connections that are kept."""
        with self._lock:
            idle, self._idle = self._idle, []
        for session in idle:
            session.close()

    def send(self, path: str, blocks: Iterable[bytes]) -> None:
        """Write a file of ours, block by block."""
        with self._session(path) as session:
            session.send(path, blocks, mode=0o600, mtime_s=int(time.time()))

    def temporary_file(self, mark: str) -> str:
        """The path of a file named by a mark, in a folder that can be written."""
        folder = self._sh(_TEMPORARY).stdout.decode(errors="surrogateescape").strip()
        return f"{folder}/.{mark}"

    def remove(self, path: str) -> None:
        """Remove a file of ours where the device can be reached; the next push would overwrite it anyway."""
        with contextlib.suppress(DeviceError):
            self._sh('exec rm -f "$1"', path)

    def push(self, source: Path, destination: str, progress: Progress | None) -> None:
        """Copy a file; see ``Transport.push``."""
        try:
            stream = source.open("rb")
        except FileNotFoundError as error:
            raise StableError(
                f"{source} on the host does not exist.", "Make it again.", device=self._device
            ) from error
        except OSError as error:
            raise StableError(
                f"{source} on the host cannot be read: {error.strerror}.",
                "Check it.",
                device=self._device,
            ) from error
        partial = _partial(destination)
        with stream:
            facts = os.fstat(stream.fileno())
            try:
                with self._session(destination) as session:
                    blocks = _blocks(stream, facts.st_size, progress, self._device)
                    session.send(partial, blocks, mode=0o644, mtime_s=int(facts.st_mtime))
                moved = self._sh(_MOVE, partial, destination)
            except BaseException:
                self.remove(partial)
                raise
        if not moved.ok:
            self.remove(partial)
            cause = "Is a directory" if moved.exit_code == _FOLDER else moved.error_text()
            raise self.error(SyncError(cause, 0), f"{destination} cannot be written")

    def pull(self, source: str, destination: Path, progress: Progress | None) -> None:
        """Copy a file; see ``Transport.pull``."""
        with self._session(source, reading=True) as session:
            total = session.stat(source).size_bytes
            check_room(source, total, destination, self._device)
            partial = destination.with_name(f".{destination.name}.partial")
            try:
                destination.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("wb") as output:
                    done = 0
                    for block in session.receive(source, limit_bytes=total + _GROWTH_BYTES):
                        done += len(block)
                        if done > total + _GROWTH_BYTES:
                            raise ProtocolError(f"{source} is said to have {total} bytes and does not end.")
                        output.write(block)
                        if progress is not None:
                            progress(done, max(done, total))
                    output.flush()
                    os.fsync(output.fileno())
                partial.replace(destination)
            except (ConnectionError, TimeoutError):
                raise
            except OSError as error:
                raise self._host_error(error, destination) from error
            finally:
                partial.unlink(missing_ok=True)

    def read_from(self, path: str, offset: int, limit: int) -> bytes:
        """Read a part of a file; see ``Transport.read_from``.

        What is small, or has not grown, is asked of the file service, on a connection that is kept: polling a
        journal starts no process beside what is being timed.
        """
        of_a_process = _PROCESS_FILE.match(path) is not None
        if of_a_process and self._proc_is_closed:
            return self._read_by_command(path, offset, limit)
        try:
            part = self._read_by_service(path, offset, limit)
        except StableError as error:
            # The file service may have other rights than a command, and not see another user's processes.
            refusal = error.__cause__
            known = isinstance(refusal, SyncError) and refusal.code == errno.ENOENT
            if not isinstance(refusal, SyncError) or (known and not path.startswith("/proc/")):
                raise
            data = self._read_by_command(path, offset, limit)
            self._proc_is_closed |= of_a_process  # a process that had ended would not have been read
            return data
        return self._read_by_command(path, offset, limit) if part is None else part

    def _read_by_service(self, path: str, offset: int, limit: int) -> bytes | None:
        """By the file service; None where that would be more than is asked for."""
        with self._session(path, reading=True) as session:
            facts = session.stat(path)
            if facts.regular and 0 < facts.size_bytes <= offset:
                return b""
            if facts.regular and facts.size_bytes <= _SMALL_BYTES and offset <= _SMALL_BYTES:
                most = max(_SMALL_BYTES, offset + limit) + _GROWTH_BYTES
                blocks = session.receive(path, compressed=False, limit_bytes=most)
                return _part(blocks, offset, limit)
            return None

    def _read_by_command(self, path: str, offset: int, limit: int) -> bytes:
        first = offset // _BLOCK_BYTES
        count = (offset + limit + _BLOCK_BYTES - 1) // _BLOCK_BYTES - first
        read = self._sh(_READ, path, str(first), str(count), cap_bytes=count * _BLOCK_BYTES)
        if read.exit_code == _GONE:
            raise MissingFileError(f"{path} does not exist.", device=self._device)
        if not read.ok:
            causes = {_FOLDER: "Is a directory", _UNREADABLE: "Permission denied"}
            cause = causes.get(read.exit_code, read.error_text())
            raise self.error(SyncError(cause, 0), f"{path} cannot be read")
        return read.stdout[offset - first * _BLOCK_BYTES :][:limit]

    @contextmanager
    def _session(self, path: str, *, reading: bool = False) -> Iterator[SyncSession]:
        """A connection to the file service, kept for the next user when all went well."""
        session = self._idle_session() or self._new_session()
        kept = False
        try:
            yield session
            kept = True
        except SyncError as error:
            if reading and error.code in (errno.ENOENT, errno.ESRCH):  # of a process that has ended: /proc
                raise MissingFileError(f"{path} does not exist.", device=self._device) from error
            what = f"{path} cannot be {'read' if reading else 'written'}"
            raise self.error(error, what) from error
        except (ProtocolError, OSError, EOFError) as error:
            raise self._link.lost(error) from error
        finally:
            with self._lock:
                kept = kept and session.usable and len(self._idle) < _IDLE_SESSIONS
                if kept:
                    self._idle.append(session)
            if not kept:
                session.close()

    def _idle_session(self) -> SyncSession | None:
        while True:
            with self._lock:
                session = self._idle.pop() if self._idle else None
            if session is None or session.usable:
                return session
            session.close()

    def _new_session(self) -> SyncSession:
        features = self._link.features()
        return SyncSession(self._link.open(b"sync:", ANSWER_S), features)

    def _sh(self, script: str, *arguments: str, cap_bytes: int = OUTPUT_CAP_BYTES) -> Completed:
        argv = ("sh", "-c", script, "sh", *arguments)
        return self._shell.run(argv, timeout_s=_SHORT_S, env={}, cap_bytes=cap_bytes, stdin=None)

    def error(self, error: SyncError, what: str) -> DeviceError:
        """Our error for a device's."""
        text = f"{what}: {error.text.rstrip('.')}."
        code = error.code or code_of(error.text)
        if code in _FULL:
            return DeviceFullError(text, "Free space there and run the command again.", device=self._device)
        if code in _PASSING:
            return TransientError(text, "Try again.", device=self._device)
        return StableError(text, "Check the path, its permissions and the installation.", device=self._device)

    def _host_error(self, error: OSError, path: Path) -> StableError:
        return StableError(
            f"{path} on the host cannot be written: {error.strerror}.", "Check it.", device=self._device
        )


def _partial(destination: str) -> str:
    """Where a file is written first. One fixed name: what a killed push leaves, the next overwrites."""
    folder, _, name = destination.rpartition("/")
    return f"{folder}/.{name}.partial"


def _blocks(stream: BinaryIO, total: int, progress: Progress | None, device: str) -> Iterator[bytes]:
    done = 0
    while True:
        try:
            block = stream.read(_COPY_BYTES)
        except OSError as error:
            raise StableError(
                f"{stream.name} on the host cannot be read: {error.strerror}.", "Check it.", device=device
            ) from error
        if not block:
            return
        yield block
        done += len(block)
        if progress is not None:
            progress(done, max(done, total))


def _part(blocks: Iterable[bytes], offset: int, limit: int) -> bytes:
    """A part of a file that comes from its beginning; the rest is not waited for."""
    held = bytearray()
    for block in blocks:
        held += block
        if len(held) >= offset + limit:
            break
    return bytes(held[offset : offset + limit])
