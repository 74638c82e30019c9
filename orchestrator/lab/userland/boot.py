"""One boot of a phone: ``python -m orchestrator.lab.userland.boot FOLDER`` until it is switched off.

Three processes. This one leaves its namespaces and waits. Its child is the phone's first process: it makes
the phone's view (its own /system, /data, /sdcard, /etc, /proc and boot id beside the machine's files) and
looks after orphans; with it ends every process of the phone. The child's child gives up the rights that
this needed, becomes the shell's user of Android, and is the adb daemon. Prints "init PID" and what the
daemon prints. Ends with the daemon's exit code. ``--plain``: only the daemon, in the folder as it is.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.lab.adbd.__main__ import REBOOT_EXIT
from orchestrator.lab.userland import namespaces
from orchestrator.lab.userland.spec import BOOT_ID_FILE, WORKDIR, PhoneSpec, load_spec

SHELL_ID = 2000
"""User and group of Android's shell."""

_OWN = ("data", "system", "sdcard", "etc", "proc", "bin", "sbin", "vendor", "product")
"""What of the root folder is the phone's own."""
_PACKAGES = Path(__file__).parents[3]


def hidden_by_phone() -> str | None:
    """Something that the daemon needs and a phone's own folders would cover; None when nothing is."""
    needed = (sys.executable, sys.prefix, sys.base_prefix, str(_PACKAGES), tempfile.gettempdir())
    covered = tuple(f"/{name}/" for name in _OWN if name not in ("bin", "sbin"))
    return next((path for path in needed if os.path.realpath(path).startswith(covered)), None)


def main(argv: Sequence[str]) -> int:
    """Boot, and wait for the end."""
    folder, plain = Path(argv[0]).absolute(), "--plain" in argv
    spec, port = load_spec(folder)
    namespaces.die_with_parent()
    if plain:
        _say(f"init {os.getpid()}")
        _exec_daemon(spec, port, folder)
    namespaces.become(0, 0)
    namespaces.unshare(namespaces.CLONE_NEWNS | namespaces.CLONE_NEWPID)
    first = os.fork()
    if first == 0:
        os._exit(_guarded(lambda: _first_process(spec, port, folder)))
    _say(f"init {first}")
    return os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])


def _say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def _guarded(body: Callable[[], int]) -> int:
    """The exit code of a process's whole life; what stops it is said in the log."""
    try:
        return body()
    except OSError as error:
        os.write(2, f"boot: {error.filename or 'system call'}: {error.strerror}\n".encode())
        return 1


def _first_process(spec: PhoneSpec, port: int, folder: Path) -> int:
    namespaces.die_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(REBOOT_EXIT))
    _make_view(folder)
    if spec.architecture == "aarch64":
        emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
        if emulator is None:
            raise FileNotFoundError(2, "is not installed", "qemu-aarch64")
        namespaces.run_aarch64_with(os.path.realpath(emulator), Path("/proc/sys/fs/binfmt_misc"))
    daemon = os.fork()
    if daemon == 0:
        os._exit(_guarded(lambda: _as_shell(spec, port)))
    while True:
        pid, status = os.wait()
        if pid == daemon:
            return max(os.waitstatus_to_exitcode(status), 1)


def _make_view(folder: Path) -> None:
    """A root of the phone's own folders and all others of the machine's."""
    namespaces.mount("none", "/", flags=namespaces.MS_REC | namespaces.MS_PRIVATE)
    root = folder / "root"
    root.mkdir(exist_ok=True)
    namespaces.mount("phone", root, "tmpfs", options="mode=755")
    for entry in sorted(Path("/").iterdir()):
        if entry.name in _OWN:
            continue
        if entry.is_symlink():
            (root / entry.name).symlink_to(entry.readlink())
        elif entry.is_dir():
            (root / entry.name).mkdir()
            namespaces.bind(entry, root / entry.name)
    for name in ("system", "sdcard", "data"):  # df names the last mount of a disk: its user wants /data
        (root / name).mkdir()
        namespaces.bind(folder / name, root / name)
    namespaces.make_read_only(root / "system")
    (root / "etc").symlink_to("system/etc")
    (root / "bin").symlink_to("system/bin")
    (root / "proc").mkdir()
    flags = namespaces.MS_NOSUID | namespaces.MS_NODEV | namespaces.MS_NOEXEC
    namespaces.mount("proc", root / "proc", "proc", flags)
    boot_id = root / ".boot_id"
    boot_id.write_text((folder / BOOT_ID_FILE).read_text())
    namespaces.bind(boot_id, root / "proc/sys/kernel/random/boot_id")
    namespaces.make_read_only(root)
    namespaces.change_root(root)


def _as_shell(spec: PhoneSpec, port: int) -> int:
    namespaces.become(SHELL_ID, SHELL_ID)
    return _exec_daemon(spec, port, Path("/"))


def _exec_daemon(spec: PhoneSpec, port: int, root: Path) -> int:
    """Become the daemon; its output stays connected to who booted the phone."""
    argv = [sys.executable, "-P", "-m", "orchestrator.lab.adbd", "--root", str(root)]
    argv += ["--port", str(port), "--address", spec.address]
    argv += ["--props", str(root / "system/build.prop"), "--features", spec.features]
    environment = {"PYTHONPATH": str(_PACKAGES), "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.defpath}
    os.chdir(root / WORKDIR)
    os.execve(argv[0], [*argv, *(["--secure"] if spec.secure else [])], environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
