"""The adb transport: phones over USB, and whatever runs adb's daemon, through an adb server.

What is whose: ``adb_socket`` a connection to the server, ``adb_server`` the server itself, ``adb_own`` one
that we started, ``adb_link`` one device behind it, ``adb_script`` and ``adb_shell`` commands, ``adb_files``
and ``adb_sync`` files. Here they are put together.

Every call has connections of its own, so that neither devices nor threads wait for one another. What is lost
with a connection is a ``LinkError``; the next call makes a new one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import StableError
from orchestrator.transports.adb_files import AdbFiles
from orchestrator.transports.adb_link import ANSWER_S, AdbLink
from orchestrator.transports.adb_script import LOOK_UP, new_mark
from orchestrator.transports.adb_server import AdbServer, server_address
from orchestrator.transports.adb_shell import AdbShell
from orchestrator.transports.adb_sync import SyncError
from orchestrator.transports.base import OUTPUT_CAP_BYTES, PROCESS_ID, Completed, Progress

if TYPE_CHECKING:
    from orchestrator.inventory import Device

_SHORT_S = 60.0
_BOOT_ANSWER_S = 30.0
_BOOTED = 'test ! -x /system/bin/getprop || test "$(getprop sys.boot_completed)" = 1'
_LOG_END_BYTES = 2000
_GONE, _UNREADABLE, _NOT_STARTED, _NO_LOG = 90, 92, 93, 94
"""Exit codes of the script below."""

# The started process says its number once it has a session of its own; whether it was executed shows in its
# command line, and where that failed, in its last word to the log. (Without setsid, which Android
# has from 6 on, it has but a group of its own.)
# The command is looked up: mksh would execute what it has built in, like echo, without becoming it.
_DETACH = f"""mark=$1 log=$2;shift 2
{LOOK_UP}case $w in m)exit {_GONE};;p)exit {_UNREADABLE};;esac
mkdir -p "${{log%/*}}" 2>/dev/null
(: >>"$log")||exit {_NO_LOG}
if command -v setsid >/dev/null 2>&1;then s=setsid;else s=;set -m;fi
pid=$($s sh -c 'm=$0 l=$1;shift;echo $$;exec >>"$l" 2>&1 </dev/null;trap "echo $m" EXIT;exec "$@"' \
"$mark" "$log" "$@" &)
while [ -e "/proc/$pid/cmdline" ]&&grep -qs "$mark" "/proc/$pid/cmdline";do :;done
if grep -qs "$mark" "$log";then exit {_NOT_STARTED};fi
echo "$pid" """


def connect(device: Device) -> AdbTransport:
    """The transport of a device of the inventory; the server is first asked when something is done."""
    if device.address is not None and "@" in device.address:
        raise StableError(
            f"address {device.address} has a user, which adb does not know.",
            "Give it as host:port in the inventory.",
            device=device.name,
        )
    address = server_address(device.adb_server)
    server = AdbServer(address, device.name, ours=device.adb_server is None)
    return AdbTransport(AdbLink(device.name, server, serial=device.serial, address=device.address))


class AdbTransport:
    """Commands and files of one device behind an adb server."""

    def __init__(self, link: AdbLink) -> None:
        self._link, self._shell = link, AdbShell(link)
        self._files = AdbFiles(link, self._shell)
        # A phone has no Python: whoever uses the torch agent there has put one into PATH.
        self.agent_argv: tuple[str, ...] = ("python3", "-P", "-m", "agent")
        self.poll_pause_s = 0.5
        self.answered = False

    @property
    def device(self) -> str:
        """The device's name, for messages."""
        return self._link.device

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
        """Run a command; see ``Transport.run``. A daemon without shell protocol 2 gets all input first; the
        command's shell removes the file as soon as it is open."""
        done = self._run(argv, timeout_s, env or {}, output_cap_bytes, stdin, stdin_file)
        self.answered = True
        return done

    def _run(
        self,
        argv: Sequence[str],
        timeout_s: float,
        env: Mapping[str, str],
        cap_bytes: int,
        stdin: Iterable[bytes] | None,
        stdin_file: str | None,
    ) -> Completed:
        deadline = time.monotonic() + timeout_s
        if stdin is None or self.streams_input():
            return self._shell.run(argv, timeout_s=timeout_s, env=env, cap_bytes=cap_bytes, stdin=stdin)
        mark = new_mark()
        path = stdin_file or self._files.temporary_file(mark)
        try:
            self._files.send(path, stdin)
            return self._shell.run(
                argv,
                timeout_s=max(0.001, deadline - time.monotonic()),
                env=env,
                cap_bytes=cap_bytes,
                stdin=None,
                stdin_file=path,
            )
        except BaseException:
            if stdin_file is None:
                self._shell.end(mark)  # remembered where the device cannot be reached: nobody else knows it
            else:
                self._files.remove(path)
            raise

    def streams_input(self) -> bool:
        """Whether the daemon has shell protocol 2; see ``Transport.streams_input``."""
        return self._shell.has_packets()

    def push(self, source: Path, destination: str, *, progress: Progress | None = None) -> None:
        """Copy a file; see ``Transport.push``."""
        self._files.push(source, destination, progress)

    def pull(self, source: str, destination: Path, *, progress: Progress | None = None) -> None:
        """Copy a file; see ``Transport.pull``."""
        self._files.pull(source, destination, progress)

    def read_from(self, path: str, offset: int, limit: int) -> bytes:
        """Read a part of a file; see ``Transport.read_from``."""
        return self._files.read_from(path, offset, limit)

    def start_detached(self, argv: Sequence[str], *, log: str, env: Mapping[str, str] | None = None) -> int:
        """Start a process in a session of its own; see ``Transport.start_detached``."""
        what = f"{argv[0]} cannot be started"
        script = ("sh", "-c", _DETACH, "sh", new_mark(), log, *argv)
        started = self._shell.run(
            script, timeout_s=_SHORT_S, env=env or {}, cap_bytes=OUTPUT_CAP_BYTES, stdin=None
        )
        if started.ok and PROCESS_ID.fullmatch(started.stdout.strip()):
            return int(started.stdout)
        causes = {_GONE: "No such file or directory", _UNREADABLE: "Permission denied"}
        if started.exit_code in causes:
            raise self._files.error(SyncError(causes[started.exit_code], 0), what)
        if started.exit_code == _NOT_STARTED:
            end = self.run(["tail", "-c", str(_LOG_END_BYTES), log], timeout_s=_SHORT_S)
            lines = end.stdout.decode(errors="replace").strip().splitlines() if end.ok else []
            raise self._files.error(SyncError("".join(lines[-2:-1]) or "it cannot be executed", 0), what)
        where = f"; its log {log} cannot be written" if started.exit_code == _NO_LOG else ""
        raise self._files.error(SyncError(started.error_text() or "it did not say why", 0), what + where)

    def default_workdir(self) -> str:
        """Below the folder that Android leaves to adb: writable, and mounted so that programs may run."""
        return "/data/local/tmp/stifarm"

    def not_yet(self) -> str:
        """Whether Android has booted: its shell answers long before settings and sensors do.

        Source: AOSP, sys.boot_completed.
        """
        booted = self.run(["sh", "-c", _BOOTED], timeout_s=_BOOT_ANSWER_S).ok
        return "" if booted else "Android has not booted yet"

    def reconnect(self) -> None:
        """Have the server drop its connection to the device and make it anew. Raises: DeviceError."""
        self.close()
        self._link.reconnect()

    def replace_server(self) -> bool:
        """Start the adb server anew; False when it is not one that we started: that is left alone.

        Other devices behind it are out of reach for a moment. Raises: DeviceError.
        """
        return self._link.replace_server()

    def reboot(self) -> None:
        """Restart the device. Raises: DeviceError."""
        with self._link.open(b"reboot:", ANSWER_S):
            pass

    def close(self) -> None:
        """Close the connections that are kept."""
        self._files.close()
