"""Files of an ssh board by sftp: one session that is kept, guarded against what a board may answer."""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import paramiko
from paramiko.file import BufferedFile
from paramiko.sftp import CMD_EXTENDED

from orchestrator.errors import LinkError, StableError
from orchestrator.transports.base import Progress
from orchestrator.transports.room import check_room
from orchestrator.transports.ssh_channels import UnansweredError, request
from orchestrator.transports.ssh_files import (
    Command,
    Keep,
    failure,
    keep_pulled,
    missing,
    open_source,
    partial_of,
    resumable,
    why_not_written,
)
from orchestrator.transports.ssh_sessions import Sessions
from orchestrator.transports.ssh_sftp_wire import AHEAD, Pipe, Requests, SessionEndedError, blocks_of

_ENDED_S = 2.0
_REQUEST_BYTES = 32_000
"""Data of one request: with its headers it fits one packet of the link, which 32 KiB would not."""

_PROGRESS_BLOCKS = 32
_FLUSHED_BYTES = 64 << 10
"""Files up to this size are on the board's storage when they are pushed: a job must survive a power cut. What
is longer is verified by its digest before it is used."""

_UNSIZED_CAP_BYTES = 64 << 20
"""Most of a file that states no size, as those of the kernel."""

_RENAME = '[ ! -d "$2" ] && mv -f -- "$1" "$2"'


class NoSftpError(LinkError):
    """The board opens no sftp session: it has no server for it, or has no more of them just now."""


class _RefusedError(Exception):
    """The server refused something, and sftp does not say why."""


class SftpFiles:
    """One sftp session, used by one thread at a time; opened at its first use, and anew after a failure."""

    def __init__(self, sessions: Sessions, run: Command, device: str) -> None:
        self._sessions, self._run, self._device = sessions, run, device
        self._lock = threading.Lock()
        self._session: tuple[paramiko.SFTPClient, Pipe] | None = None

    def check(self) -> bool:
        """Open the session; whether the board has an sftp server. Raises: DeviceError."""
        try:
            with self._use():
                return True
        except NoSftpError:
            return False

    def read_from(self, path: str, offset: int, limit: int) -> bytes:
        """See ``Transport.read_from``."""
        with self._use() as (client, pipe), self._reading(path):
            pipe.allow(limit)
            try:
                with client.open(path, "rb", bufsize=0) as file:
                    return b"".join(blocks_of(Requests(client, pipe, file), file, offset, limit))
            except OSError:
                client.stat(path)  # a file of /proc goes with its process, between open and read
                raise

    def pull(self, source: str, destination: Path, progress: Progress | None) -> None:
        """See ``Transport.pull``."""
        with self._use() as (client, pipe):
            with self._reading(source):
                file = client.open(source, "rb", bufsize=0)
                size = file.stat().st_size or 0
            check_room(source, size, destination, self._device)

            def fetch(keep: Keep) -> None:
                blocks = blocks_of(Requests(client, pipe, file), file, 0, size or _UNSIZED_CAP_BYTES)
                done = count = 0
                while True:
                    with self._reading(source):
                        block = next(blocks, b"")
                    keep(block)
                    done, count = done + len(block), count + 1
                    if progress is not None and (count % _PROGRESS_BLOCKS == 0 or not block):
                        progress(done, max(size, done))
                    if not block:
                        return

            try:
                keep_pulled(destination, fetch, self._device)
            finally:
                with self._reading(source):
                    file.close()

    def push(self, source: Path, destination: str, progress: Progress | None) -> None:
        """See ``Transport.push``."""
        with open_source(source, self._device) as stream:
            try:
                with self._use() as (client, pipe):
                    self._push(client, pipe, stream, destination, progress)
            except _RefusedError as error:
                size = os.fstat(stream.fileno()).st_size
                cause = why_not_written(self._run, destination, size, self._device)
                raise cause or failure(
                    str(error), f"{destination} cannot be written", self._device
                ) from error

    def close(self) -> None:
        """End the session."""
        if self._session is not None:
            self._session[1].close()

    def _push(
        self,
        client: paramiko.SFTPClient,
        pipe: Pipe,
        stream: BinaryIO,
        destination: str,
        progress: Progress | None,
    ) -> None:
        partial, total = partial_of(destination), os.fstat(stream.fileno()).st_size
        with _writing():
            there = _size(client, partial)
        held = resumable(self._run, partial, there, stream) if 0 < there <= total else 0
        pipe.allow()
        with _writing():
            file = _create(client, partial, "r+b" if held else "wb")
        try:
            requests, done, count = Requests(client, pipe, file), held, 0
            while block := stream.read(_REQUEST_BYTES):
                with _writing():
                    requests.write(done, block)
                    if requests.waiting >= AHEAD:
                        requests.answer()
                done, count = done + len(block), count + 1
                if progress is not None and (count % _PROGRESS_BLOCKS == 0 or done == total):
                    progress(done, total)
            with _writing():
                while requests.waiting:
                    requests.answer()
                pipe.allow()
                if total <= _FLUSHED_BYTES:
                    _flush(client, file)
                file.close()
                self._rename(client, partial, destination)
        except SessionEndedError:
            BufferedFile.close(file)  # here only: its finaliser would ask a session that is gone
            raise  # the next push goes on from here
        except BaseException:
            pipe.allow()
            with contextlib.suppress(OSError, EOFError, SessionEndedError):  # as much as is still possible
                file.close()
                client.remove(partial)
            raise

    def _rename(self, client: paramiko.SFTPClient, partial: str, destination: str) -> None:
        try:
            client.posix_rename(partial, destination)
        except OSError as error:
            if "unsupported" not in str(error).lower():
                raise
            done = self._run(["sh", "-c", _RENAME, "sh", partial, destination], timeout_s=60)
            if not done.ok:
                raise _RefusedError(done.error_text() or "it cannot be replaced") from error

    @contextlib.contextmanager
    def _use(self) -> Iterator[tuple[paramiko.SFTPClient, Pipe]]:
        """The session, with its failures as ours. Raises: LinkError, StableError, NoSftpError."""
        with self._lock:
            try:
                if self._session is None:
                    self._session = self._open()
                self._session[1].allow()
                yield self._session
            except SessionEndedError as error:
                self._drop()
                if not self._sessions.alive:
                    raise self._sessions.lost() from error
                raise LinkError(
                    f"the sftp session ended: {error}.", "Try again.", device=self._device
                ) from error
            except (paramiko.SFTPError, paramiko.SSHException, struct.error, UnicodeDecodeError) as error:
                self._drop()
                raise StableError(
                    f"the board's sftp server answers nonsense: {str(error)[:200]}.",
                    "Update the ssh server of the board.",
                    device=self._device,
                ) from error

    def _open(self) -> tuple[paramiko.SFTPClient, Pipe]:
        channel = self._sessions.open_kept()
        pipe = Pipe(channel)
        try:
            request(channel, "subsystem", "sftp", self._sessions.answer_s)
            return paramiko.SFTPClient(pipe), pipe  # type: ignore[arg-type]
        except UnansweredError as error:
            channel.close()
            raise SessionEndedError(str(error)) from error
        except (SessionEndedError, EOFError, paramiko.SSHException, paramiko.SFTPError) as error:
            # It has none, or a login script talks where it should be heard.
            refused = channel.closed or channel.eof_received or isinstance(error, paramiko.SFTPError)
            if refused:  # what was started there has ended before the next session is opened
                channel.status_event.wait(_ENDED_S)
            channel.close()
            if self._sessions.alive and refused:
                raise NoSftpError(
                    f"it opens no sftp session: {error}", "Try again.", device=self._device
                ) from error
            raise SessionEndedError(str(error)) from error

    def _drop(self) -> None:
        self.close()
        self._session = None

    @contextlib.contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise missing(path, self._device) from error
            raise failure(_said(error), f"{path} cannot be read", self._device) from error
        except EOFError as error:
            raise failure("unexpected end", f"{path} cannot be read", self._device) from error


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError) as error:
        raise _RefusedError(_said(error)) from error


def _said(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _size(client: paramiko.SFTPClient, path: str) -> int:
    try:
        return client.stat(path).st_size or 0
    except OSError as error:
        if error.errno == errno.ENOENT:
            return 0
        raise


def _create(client: paramiko.SFTPClient, path: str, mode: str) -> paramiko.SFTPFile:
    """Open a file for writing; its missing folders are made."""
    try:
        return client.open(path, mode, bufsize=0)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
    _make_folder(client, posixpath.dirname(path))
    return client.open(path, mode, bufsize=0)


def _make_folder(client: paramiko.SFTPClient, path: str) -> None:
    try:
        client.mkdir(path)
    except OSError as error:
        if error.errno != errno.ENOENT:
            return  # it is there; else opening the file fails, with the cause
        above = posixpath.dirname(path)
        if above in ("", path):
            raise
        _make_folder(client, above)
        client.mkdir(path)


def _flush(client: paramiko.SFTPClient, file: paramiko.SFTPFile) -> None:
    """Have the file written to the storage, where the server knows how. Source: OpenSSH, PROTOCOL 4.6."""
    try:
        client._request(CMD_EXTENDED, "fsync@openssh.com", file.handle)  # type: ignore[attr-defined]
    except OSError as error:
        if "unsupported" not in str(error).lower():
            raise
