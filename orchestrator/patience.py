"""Waiting for a store that is away: a database that restarts, a network that blinks.

Devices journal what they measure meanwhile, so a controller that waits loses nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

import structlog

from db.errors import StoreUnreachableError

STORE_LIMIT_S = 600.0
"""So long is a store waited for that was there before."""

_PAUSE_S = 0.5
_PAUSE_MOST_S = 10.0

T = TypeVar("T")


class Stop(Protocol):
    """What ends a wait: a ``threading.Event``."""

    def wait(self, timeout: float) -> bool: ...


def patiently(work: Callable[[], T], *, stop: Stop | None = None, limit_s: float = STORE_LIMIT_S) -> T:
    """Do ``work``, again whenever the store cannot be reached, for ``limit_s``.

    It may have been done although the connection was lost (a commit whose answer did not arrive), so it must
    be work that may be done twice. Raises: StoreUnreachableError when the limit is used up; KeyboardInterrupt
    when ``stop`` is set meanwhile.
    """
    log = structlog.get_logger(__name__)
    since: float | None = None
    pause_s = _PAUSE_S
    while True:
        try:
            done = work()
        except StoreUnreachableError as error:
            if error.waited:
                raise
            now = time.monotonic()
            if since is None:
                since = now
                limit = {} if math.isinf(limit_s) else {"limit_s": limit_s}
                log.warning("the store is away, devices go on; waiting", **limit, cause=error.what)
            if now - since > limit_s:
                gone = StoreUnreachableError(
                    f"{error.what} It was waited for {limit_s:g} s.",
                    f"{error.remedy} Devices keep what they measure meanwhile; nothing is lost.",
                )
                gone.waited = True
                raise gone from error
            if stop is None:
                time.sleep(pause_s)
            elif stop.wait(pause_s):
                raise KeyboardInterrupt from error
            pause_s = min(2 * pause_s, _PAUSE_MOST_S)
        else:
            if since is not None:
                log.warning("the store is there again", after_s=round(time.monotonic() - since, 1))
            return done
