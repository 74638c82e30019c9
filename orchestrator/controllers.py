"""Whether the controllers of a store are there: one rule for every verb that tells of them."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from db.controllers import HEARTBEAT_TTL_NS
from db.models import ControllerRow
from orchestrator.processes import command, identify

_ON_CAMPAIGNS = ("serve", "campaign")
"""The verbs that work on open runs while they drive devices."""

_TAKING_VALUES = ("--home", "--inventory", "-i", "--db-url")
"""The options before a verb that are two words."""

State = Literal["alive", "silent", "ended"]


def silent_ns(row: ControllerRow, now_wall_ns: int) -> int:
    """How long ago, by the database's clock, it last said that it lives."""
    return max(0, now_wall_ns - row.heartbeat_wall_ns)


def state_of(row: ControllerRow, now_wall_ns: int) -> State:
    """A controller is silent when it said nothing for HEARTBEAT_TTL_NS, or is a process of this machine that
    is gone."""
    if row.ended_wall_ns is not None:
        return "ended"
    here = row.host == socket.gethostname()
    gone = here and identify(row.pid) is None
    return "silent" if gone or silent_ns(row, now_wall_ns) > HEARTBEAT_TTL_NS else "alive"


def may_work_on_campaigns(row: ControllerRow, now_wall_ns: int) -> bool:
    """Whether a controller lives that may work on open runs. Of a process of this machine its verb tells, as
    far as it is known; of another machine's nobody knows."""
    if state_of(row, now_wall_ns) != "alive":
        return False
    verb = verb_of(command(row.pid)) if row.host == socket.gethostname() else None
    return verb is None or verb in _ON_CAMPAIGNS


def verb_of(words: Sequence[str]) -> str | None:
    """The verb of a process that was started with these words; None when they are not stifarm's."""
    program = next((place for place, word in enumerate(words[:2]) if Path(word).name == "stifarm"), None)
    if program is None:
        return None
    rest = iter(words[program + 1 :])
    for word in rest:
        if word in _TAKING_VALUES:
            next(rest, None)
        elif not word.startswith("-"):
            return word
    return None
