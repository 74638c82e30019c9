"""One setting of a device at a time: a file of sysfs, or a value of Android's settings provider.

A target is a text: ``/sys/…`` or ``namespace/key``. Values are printable ASCII, at most 256 characters.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from agent.android import ROOT
from agent.sensors import SYS, read_int
from sti_runtime.messages import AndroidSetting, FileSetting, Setting

VALUE_CAP = 256
TARGET_FORM = re.compile(
    r"/sys/(class|devices)(/[A-Za-z0-9_:@,+-][A-Za-z0-9_.:@,+-]*)+"
    r"|(global|secure|system)/[A-Za-z][A-Za-z0-9_.]{0,99}"
)
_PRINTABLE = re.compile(r"[ -~]*")
_LIMIT_S = 10.0
_IDLE_STATES = "/sys/devices/system/cpu/cpu*/cpuidle/state*/disable"


class SettingError(Exception):
    """A setting cannot be read or written; says why. Becomes a report, never an end of the run."""


def expand(setting: Setting) -> Iterator[tuple[str, str]]:
    """(target, value) of everything a setting stands for. Raises: SettingError when that is nothing."""
    if isinstance(setting, AndroidSetting):
        yield f"{setting.namespace}/{setting.key}", setting.value
    elif isinstance(setting, FileSetting):
        for target in _matching(setting.path):
            yield target, setting.value
    else:
        for target in _matching(_IDLE_STATES):
            latency_us = read_int(_below_sysfs(target).with_name("latency"))
            if latency_us is None or latency_us > setting.latency_us:
                yield target, "1"


def stated(setting: Setting) -> tuple[str, str]:
    """What a setting is called in a report when it stands for nothing here."""
    if isinstance(setting, AndroidSetting):
        return f"{setting.namespace}/{setting.key}", setting.value
    return (setting.path, setting.value) if isinstance(setting, FileSetting) else (_IDLE_STATES, "1")


def _matching(pattern: str) -> list[str]:
    found = ["/sys"]
    for part in pattern.split("/")[2:]:
        if not part.endswith("*"):
            found = [f"{folder}/{part}" for folder in found]
            continue
        numbered = re.compile(re.escape(part[:-1]) + "[0-9]+")
        found = [
            f"{folder}/{name}" for folder in found for name in _names(folder) if numbered.fullmatch(name)
        ]
    if "*" in pattern:
        found = [target for target in found if _below_sysfs(target).exists()]
    if not found:
        raise SettingError("there is no such file on this device")
    return found


def _names(folder: str) -> list[str]:
    try:
        names = [path.name for path in _below_sysfs(folder).iterdir()]
    except OSError:
        return []
    return sorted(names, key=lambda name: (len(name), name))


def _below_sysfs(target: str) -> Path:
    return SYS / target.removeprefix("/sys").lstrip("/")


# ------------------------------------------------------------------ one target


def read_target(target: str) -> str | None:
    """Its value; None: not set. Raises: SettingError."""
    text = _get_file(target) if target.startswith("/") else _get_android(target)
    if text is None:
        return None
    if len(text) > VALUE_CAP or _PRINTABLE.fullmatch(text) is None:
        raise SettingError("it holds what could not be put back")
    return text


def write_target(target: str, value: str | None) -> None:
    """Set it, or unset it (None). Raises: SettingError."""
    if not target.startswith("/"):
        namespace, _, key = target.partition("/")
        words = ("delete", namespace, key) if value is None else ("put", namespace, key, value)
        _android(*words)
        return
    try:
        with _inside(target).open("wb", buffering=0) as stream:
            stream.write((value or "").encode())
    except OSError as error:
        raise SettingError(f"it cannot be written: {error.strerror}") from error


def _get_file(target: str) -> str:
    try:
        descriptor = os.open(_inside(target), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            text = os.read(descriptor, 4096).decode(errors="replace").strip()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SettingError(f"it cannot be read: {error.strerror}") from error
    if not text:
        raise SettingError("it cannot be read: it is empty")
    return text


def _inside(target: str) -> Path:
    """The file itself, which must exist below sysfs, whatever links lead to it."""
    path = _below_sysfs(target)
    try:
        real = path.resolve(strict=True)
    except OSError as error:
        raise SettingError(f"it cannot be read: {error.strerror}") from error
    if not real.is_relative_to(SYS.resolve()):
        raise SettingError("it leads out of sysfs")
    return real


def _get_android(target: str) -> str | None:
    text = _android("get", *target.split("/", 1))
    return None if text == "null" else text


def _android(*words: str) -> str:
    program = ROOT / "system/bin/settings"
    try:
        done = subprocess.run(
            [program, *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=_LIMIT_S, check=False
        )
    except OSError as error:
        raise SettingError(f"{program} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise SettingError(f"{program} had not ended after {_LIMIT_S:g} s") from error
    if done.returncode != 0:
        raise SettingError(f"{program} {words[0]} failed (exit code {done.returncode})")
    return done.stdout.decode(errors="replace").strip()
