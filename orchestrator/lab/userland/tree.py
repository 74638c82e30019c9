"""The folders of a virtual phone: a system with its commands and properties, and data that stays."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from orchestrator.lab.userland.spec import WORKDIR, PhoneSpec, properties

_PROGRAMS = Path(__file__).parent / "programs"
_LIST_LIMIT_S = 60

_COMMANDS = tuple((Path(__file__).parent / "commands.txt").read_text().split())
"""What stock Android has and a shell script may use."""
_SINCE_24 = frozenset({"base64", "sha224sum", "sha256sum", "sha384sum", "sha512sum", "flock", "xxd"})
_PASSWD = "root:x:0:0::/:/system/bin/sh\nshell:x:2000:2000::/:/system/bin/sh\n"
_GROUP = "root:x:0:\nshell:x:2000:\n"


def make_tree(spec: PhoneSpec, folder: Path) -> None:
    """Lay out a phone's folders; its data, where there is some, stays as it is. Raises: OSError."""
    system = folder / "system"
    shutil.rmtree(system, ignore_errors=True)
    for name in ("system/bin", "system/etc", "sdcard", WORKDIR, "data/property", "data/misc/adb"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _link_commands(system / "bin", api=spec.api)
    _install_programs(system / "bin", spec)
    _write_etc(system / "etc")
    lines = (f"{name}={value}\n" for name, value in properties(spec).items())
    (system / "build.prop").write_text("".join(lines))


def _link_commands(bin_folder: Path, *, api: int) -> None:
    """A link for every command: to toybox as on Android, else to what this machine has instead."""
    boxes = {path: _commands_of(path) for name in ("toybox", "busybox") if (path := shutil.which(name))}
    for command in _COMMANDS:
        if api < 24 and command in _SINCE_24:
            continue
        box = next((path for path, commands in boxes.items() if command in commands), None)
        target = box or shutil.which(command)
        if target is not None:
            (bin_folder / command).symlink_to(Path(target).resolve())
    (bin_folder / "sh").symlink_to(Path(shutil.which("mksh") or "/bin/sh").resolve())


def _commands_of(box: str) -> frozenset[str]:
    option = ["--list"] if Path(box).name == "busybox" else []
    done = subprocess.run([box, *option], capture_output=True, timeout=_LIST_LIMIT_S, check=False)
    return frozenset(done.stdout.decode(errors="replace").split())


def _install_programs(bin_folder: Path, spec: PhoneSpec) -> None:
    """The commands that are Android's own: scripts of ours, whose first line is the phone's shell."""
    substitutes: Mapping[str, str] = {"@ARCHITECTURE@": spec.architecture}
    for source in sorted(_PROGRAMS.iterdir()):
        if source.suffix or not source.is_file():
            continue
        text = source.read_text()
        for name, value in substitutes.items():
            text = text.replace(name, value)
        program = bin_folder / source.name
        if program.is_symlink():
            real = bin_folder / ".real"  # what the script calls in its turn
            real.mkdir(exist_ok=True)
            program.rename(real / source.name)
        program.write_text(text.replace("#!/system/bin/sh", f"#!{(bin_folder / 'sh').resolve()}", 1))
        program.chmod(0o755)


def _write_etc(etc: Path) -> None:
    """What the C library of the commands looks for; no machine id, for phones have none."""
    (etc / "passwd").write_text(_PASSWD)
    (etc / "group").write_text(_GROUP)
    (etc / "hosts").write_text("127.0.0.1 localhost\n")
    cache = Path("/etc/ld.so.cache")
    if cache.exists():
        shutil.copy(cache, etc / cache.name)
    if os.path.lexists("/etc/localtime"):
        shutil.copy("/etc/localtime", etc / "localtime")
