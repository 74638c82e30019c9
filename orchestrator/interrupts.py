"""Ctrl-C that is not lost: Python drops an exception raised in a fork's callback, a destructor or a weak
reference's callback, and a KeyboardInterrupt with it.

``held_interrupts`` keeps Ctrl-C out of a block that forks; ``lost_interrupts_return`` sends one that Python
dropped anyway once more.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_AGAIN_S = 0.05
"""How long after Python dropped a KeyboardInterrupt it is sent again: its callback is over by then."""


@contextlib.contextmanager
def held_interrupts() -> Iterator[None]:
    """Deliver a Ctrl-C that comes within the block at its end; a second one goes through at once.

    Does nothing outside the main thread, or where SIGINT has no Python handler. Raises: what the handler
    raises (KeyboardInterrupt), also in place of an error of the block.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) > 1:
            handler(number, frame)

    signal.signal(signal.SIGINT, keep)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(caught[0], None)


@contextlib.contextmanager
def lost_interrupts_return() -> Iterator[None]:
    """Within the block, a KeyboardInterrupt that Python drops comes again a moment later."""
    report = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.SIGINT))
            again.daemon = True
            again.start()
        else:
            report(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = report
