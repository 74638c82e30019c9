"""Whether the controllers of a store are there: one rule for every verb that tells of them."""

from __future__ import annotations

import socket
from typing import Literal

from db.controllers import HEARTBEAT_TTL_NS
from db.models import ControllerRow
from orchestrator.processes import identify

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
