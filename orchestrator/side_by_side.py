"""Working on many devices at once: those of one machine in turn, those of different machines side by side.

A thread per machine drives its devices; Ctrl-C reaches only the main thread, which then tells the others by
``stop`` and waits for them to leave off.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from orchestrator.inventory import Device

MOST_AT_ONCE = 64
"""Most machines worked on at once; the others wait their turn."""

_LOOK_S = 0.2

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def by_machine(devices: Iterable[Device], own_lock: Path) -> list[list[Device]]:
    """Devices grouped by the machine that they share (``own_lock``: this one's), in the order given."""
    groups: dict[str, list[Device]] = {}
    for device in devices:
        shared = device.shared_machine(own_lock)
        # A device of its own is named apart from every lock file, which is an absolute path.
        groups.setdefault(device.name if shared is None else shared, []).append(device)
    return list(groups.values())


def side_by_side(
    groups: Sequence[Sequence[_Item]],
    action: Callable[[_Item], _Result],
    stop: threading.Event,
) -> Generator[tuple[_Item, _Result], None, None]:
    """``(item, action(item))`` as they come: the items of a group in turn, the groups side by side.

    With one group all happens in the calling thread. On KeyboardInterrupt ``stop`` is set and stays so, no
    further item is begun, and it is raised again when the actions under way have ended (a second one at
    once). Raises: what an action raises, in the same way.
    """
    if len(groups) <= 1:
        for item in (item for group in groups for item in group):
            yield item, action(item)
        return
    run = _Run(groups, action, stop)
    try:
        yield from run.results()
    except BaseException:
        stop.set()
        run.wait()
        raise


class _Run(Generic[_Item, _Result]):
    """The threads of one call; results and errors come back through a queue."""

    def __init__(
        self, groups: Sequence[Sequence[_Item]], action: Callable[[_Item], _Result], stop: threading.Event
    ) -> None:
        self._action, self._stop = action, stop
        self._waiting: queue.SimpleQueue[Sequence[_Item]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[_Item, _Result] | BaseException | None] = queue.SimpleQueue()
        for group in groups:
            self._waiting.put(group)
        count = min(len(groups), MOST_AT_ONCE)
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def results(self) -> Iterator[tuple[_Item, _Result]]:
        """What the threads hand over, until all have ended. Raises: the first error of an action."""
        ended = 0
        while ended < len(self._threads):
            try:
                handed = self._done.get(timeout=_LOOK_S)  # short waits let Ctrl-C through
            except queue.Empty:
                continue
            if handed is None:
                ended += 1
            elif isinstance(handed, BaseException):
                raise handed
            else:
                yield handed

    def wait(self) -> None:
        """Until every thread has ended."""
        for thread in self._threads:
            while thread.is_alive():
                thread.join(_LOOK_S)

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    group = self._waiting.get_nowait()
                except queue.Empty:
                    break
                for item in group:
                    if self._stop.is_set():
                        break
                    self._done.put((item, self._action(item)))
        except BaseException as error:  # noqa: BLE001 - handed to the caller, who raises it
            self._done.put(error)
        finally:
            self._done.put(None)
