"""Looking at a device from the host: which of the two tables fits it, and its values, without an agent."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.device_facts.android_facts import ANDROID_FACTS
from orchestrator.device_facts.linux_facts import LINUX_FACTS
from orchestrator.device_facts.table import Fact, Value, new_mark, script_of, stable_of, values_of
from orchestrator.errors import StableError
from orchestrator.transports.base import Transport

System = Literal["android", "linux"]
TABLES: Mapping[System, tuple[Fact, ...]] = {"android": ANDROID_FACTS, "linux": LINUX_FACTS}
_LIMIT_S = 60.0
_CAP_BYTES = 4 << 20


@dataclass(frozen=True)
class Seen:
    """What the host saw of a device. ``clock_offset_s``: how far its wall clock is ahead of the host's."""

    system: System
    workdir: str
    values: Mapping[str, Value] = field(hash=False)
    clock_offset_s: int | None

    def text(self, name: str) -> str:
        """A fact for a table."""
        value = self.values.get(name)
        return "unknown" if value is None else ", ".join(value) if isinstance(value, tuple) else str(value)

    def number(self, name: str) -> int | None:
        """A fact that is a number."""
        value = self.values.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def words(self, name: str) -> tuple[str, ...]:
        """A fact that is a list."""
        value = self.values.get(name)
        return value if isinstance(value, tuple) else ()

    def stable(self) -> dict[str, Value]:
        """What changes only when the device does, for the store."""
        return {"system": self.system, **stable_of(TABLES[self.system], self.values)}


def look(transport: Transport, workdir: str) -> Seen:
    """Read all facts, in one round trip; the work folder is made if it can be.

    Raises: DeviceError; StableError when the device has no shell.
    """
    mark = new_mark()
    scripts = {system: script_of(facts, workdir, mark) for system, facts in TABLES.items()}
    script = (
        f"if test -x /system/bin/getprop; then\necho {mark} android\n{scripts['android']}\n"
        f"else\necho {mark} linux\n{scripts['linux']}\nfi"
    )
    before = time.time()
    # As input, for it is longer than a command line may be on old phones.
    said = transport.run(
        ["sh", "-s"], timeout_s=_LIMIT_S, output_cap_bytes=_CAP_BYTES, stdin=[f"{script}\n".encode()]
    )
    host_s = (before + time.time()) / 2
    return seen_of(said.stdout.decode(errors="replace"), mark, workdir, host_s, device=transport.device)


def seen_of(output: str, mark: str, workdir: str, host_s: float, *, device: str) -> Seen:
    """What the script's output says. Raises: StableError when it is none of that script."""
    system: System
    if f"{mark} android\n" in output.replace("\r", ""):
        system = "android"
    elif f"{mark} linux\n" in output.replace("\r", ""):
        system = "linux"
    else:
        raise StableError(
            f"its shell ran no script of ours; it said {output[:80]!r}.",
            "Give the user of the device a POSIX shell (sh) that prints nothing by itself.",
            device=device,
        )
    values = values_of(TABLES[system], output, mark)
    clock_s = values.get("clock_s")
    offset = round(clock_s - host_s) if isinstance(clock_s, int) else None
    return Seen(system, workdir, values, offset)
