"""Ctrl-C that is not lost: Python drops an exception raised in a fork's callback, a destructor or a weak
reference's callback, and a KeyboardInterrupt with it.

``held_interrupts`` keeps Ctrl-C out of a block that forks; ``lost_interrupts_return`` sends one that Python
dropped anyway once more. ``terminations_interrupt`` makes SIGTERM the same as Ctrl-C, which all of it then
holds for, too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_AGAIN_S = 0.05
"""How long after Python dropped a KeyboardInterrupt it is sent again: its callback is over by then."""


@contextlib.contextmanager
def held_interrupts() -> Iterator[None]:
    """Deliver a Ctrl-C or SIGTERM that comes within the block at its end; a second one goes through at once.

    Does nothing outside the main thread, or for a signal that has no Python handler. Raises: what the handler
    raises (KeyboardInterrupt), also in place of an error of the block.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    held = {number: handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        held = {}
    caught: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) > 1:
            held[signal.Signals(number)](number, frame)

    for number in held:
        signal.signal(number, keep)
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if caught:
            held[signal.Signals(caught[0])](caught[0], None)


@contextlib.contextmanager
def terminations_interrupt() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM does what Ctrl-C does; whether one has come. In the main thread only, and
    where nobody else has a handler for it."""
    came = threading.Event()

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        came.set()
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield came.is_set
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
