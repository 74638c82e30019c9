"""The local transport: the machine itself is the device."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from orchestrator.errors import (
    CommandTimeoutError,
    DeviceError,
    DeviceFullError,
    MissingFileError,
    StableError,
    TransientError,
)
from orchestrator.transports import detach
from orchestrator.transports.base import OUTPUT_CAP_BYTES, Completed, Plain, Progress

if TYPE_CHECKING:
    from orchestrator.inventory import Device

_COPY_BYTES = 1 << 20
_DRAIN_S = 1.0
_START_TIMEOUT_S = 30.0
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_TRANSIENT = frozenset(
    {errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO}
)
_PASSED_ON = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH")
"""Variables a command inherits. No others: the host's process may carry a token, a thread count or a
choice of GPUs (Ray sets all three) that are nothing to do with the device."""


def connect(device: Device) -> LocalTransport:
    """The transport of a device of the inventory."""
    return LocalTransport(device.name)


class LocalTransport(Plain):
    """Commands and files of this machine, through the standard library."""

    poll_pause_s = 0.1

    def __init__(self, device: str) -> None:
        self._device = device
        # The installed agent package; -P keeps the working folder out of the import path.
        self.agent_argv: tuple[str, ...] = (sys.executable, "-P", "-m", "agent")

    @property
    def device(self) -> str:
        """The device's name, for messages."""
        return self._device

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        output_cap_bytes: int = OUTPUT_CAP_BYTES,
        stdin: Iterable[bytes] | None = None,
        stdin_file: str | None = None,
    ) -> Completed:
        """Run a command in a session of its own; see ``Transport.run``."""
        try:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(env),
                start_new_session=True,
            )
        except OSError as error:
            raise self._os_error(error, f"{argv[0]} cannot be run") from error
        assert process.stdout is not None
        assert process.stderr is not None
        with process:
            outputs = [_Drain(process.stdout, output_cap_bytes), _Drain(process.stderr, output_cap_bytes)]
            feed = None if stdin is None else _Feed(process, stdin)
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired as error:
                raise CommandTimeoutError(
                    f"{' '.join(argv)[:200]} did not end within {timeout_s:g} s and was killed.",
                    "Try again; if it happens again, look at the load of the device.",
                    device=self._device,
                ) from error
            finally:
                # Whatever the command left in its process group goes with it, on success too.
                _kill_group(process.pid)
                process.wait()
                for output in outputs:
                    output.join(_DRAIN_S)
                if feed is not None:
                    feed.join(_DRAIN_S)
        if feed is not None and feed.error is not None:
            raise feed.error
        self.answered = True
        stdout, stderr = (output.data() for output in outputs)
        return Completed(tuple(argv), process.returncode, stdout, stderr, any(o.truncated for o in outputs))

    def streams_input(self) -> bool:
        """Always."""
        return True

    def push(self, source: Path, destination: str, *, progress: Progress | None = None) -> None:
        """Copy a file; see ``Transport.push``."""
        self._copy(source, Path(destination), progress, missing=self._missing_source(source))

    def pull(self, source: str, destination: Path, *, progress: Progress | None = None) -> None:
        """Copy a file; see ``Transport.pull``."""
        missing = MissingFileError(f"{source} does not exist.", device=self._device)
        self._copy(Path(source), destination, progress, missing=missing)

    def read_from(self, path: str, offset: int, limit: int) -> bytes:
        """Read a part of a file; see ``Transport.read_from``."""
        try:
            with Path(path).open("rb") as stream:
                stream.seek(offset)
                return stream.read(limit)
        except (FileNotFoundError, ProcessLookupError) as error:  # of a process that has ended: /proc
            raise MissingFileError(f"{path} does not exist.", device=self._device) from error
        except OSError as error:
            raise self._os_error(error, f"{path} cannot be read") from error

    def start_detached(self, argv: Sequence[str], *, log: str, env: Mapping[str, str] | None = None) -> int:
        """Start a process that is no child of ours; see ``Transport.start_detached``."""
        try:
            Path(log).parent.mkdir(parents=True, exist_ok=True)
            started = subprocess.run(
                [sys.executable, "-I", "-S", str(detach.__file__), log, *argv],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=_environment(env),
                timeout=_START_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise CommandTimeoutError(
                f"{argv[0]} did not start.", "Try again.", device=self._device
            ) from error
        except OSError as error:
            raise self._os_error(error, f"{argv[0]} cannot be started") from error
        if started.returncode != 0:
            cause = started.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise StableError(
                f"{argv[0]} cannot be started: {''.join(cause)}.",
                f"Check that it is installed and that {log} can be written.",
                device=self._device,
            )
        return int(started.stdout)

    def default_workdir(self) -> str:
        """A folder of the user's home."""
        return str(Path.home() / ".stifarm-device")

    def _copy(self, source: Path, destination: Path, progress: Progress | None, missing: DeviceError) -> None:
        try:
            stream = source.open("rb")
        except FileNotFoundError as error:
            raise missing from error
        except OSError as error:
            raise self._os_error(error, f"{source} cannot be read") from error
        partial: Path | None = None
        try:
            with stream:
                total = os.fstat(stream.fileno()).st_size
                destination.parent.mkdir(parents=True, exist_ok=True)
                # One fixed name per destination: what a killed copy leaves behind, the next one overwrites.
                partial = destination.with_name(f".{destination.name}.partial")
                with partial.open("wb") as output:
                    done = 0
                    while block := stream.read(_COPY_BYTES):
                        output.write(block)
                        done += len(block)
                        if progress is not None:
                            progress(done, total)
                    output.flush()
                    os.fsync(output.fileno())
                partial.replace(destination)
                partial = None
        except OSError as error:
            raise self._os_error(error, f"{destination} cannot be written") from error
        finally:
            if partial is not None:
                partial.unlink(missing_ok=True)

    def _missing_source(self, source: Path) -> StableError:
        return StableError(f"{source} on the host does not exist.", "Make it again.", device=self._device)

    def _os_error(self, error: OSError, what: str) -> DeviceError:
        """Our error for one of the operating system's."""
        text = f"{what}: {error.strerror}."
        if error.errno in _FULL:
            return DeviceFullError(text, "Free space there and run the command again.", device=self._device)
        if error.errno in _TRANSIENT:
            return TransientError(text, "Try again.", device=self._device)
        return StableError(text, "Check the path, its permissions and the installation.", device=self._device)


class _Feed:
    """Writes a command's input from a thread; ``error`` is what the source of the input raised.

    The command is ended then: half of an input must not pass for all of it.
    """

    def __init__(self, process: subprocess.Popen[bytes], source: Iterable[bytes]) -> None:
        self._process, self._source = process, source
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self._thread.start()

    def _feed(self) -> None:
        stream = self._process.stdin
        assert stream is not None
        try:
            for block in self._source:
                view = memoryview(block)
                while view:
                    view = view[os.write(stream.fileno(), view) :]
        except BrokenPipeError:
            return  # the command ended, or closed its input
        except Exception as error:  # noqa: BLE001 - of the caller's own making; raised again in run()
            self.error = error
            _kill_group(self._process.pid)
        finally:
            with contextlib.suppress(OSError):
                stream.close()

    def join(self, timeout_s: float) -> None:
        """Wait until the input was written or the command has gone."""
        self._thread.join(timeout_s)


class _Drain:
    """Reads a pipe to its end in a thread, keeping the first ``cap_bytes``."""

    def __init__(self, stream: IO[bytes], cap_bytes: int) -> None:
        self._stream, self._cap_bytes = stream, cap_bytes
        self._kept = bytearray()
        self.truncated = False
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        while block := os.read(self._stream.fileno(), 1 << 16):
            room = self._cap_bytes - len(self._kept)
            self._kept += block[:room]
            self.truncated = self.truncated or len(block) > room

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the pipe; a process that left its group may hold it open for ever."""
        self._thread.join(timeout_s)

    def data(self) -> bytes:
        """What was kept."""
        return bytes(self._kept)


def _environment(added: Mapping[str, str] | None) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {**inherited, **(added or {})}


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
