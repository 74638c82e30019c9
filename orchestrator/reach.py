"""How the devices of one lab host are reached: connections, work folders, agents, and patience.

``Reach`` keeps nothing that a restart would miss. What several verbs of a worker need of a device at once
is serialised by the device's lock.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import structlog

from orchestrator.agent_push import (
    AgentFile,
    PushedAgent,
    agent_file,
    bring_agent,
    device_architecture,
    remove_others,
)
from orchestrator.deploy import Underway
from orchestrator.errors import HaltedError, LinkError, StableError, TransientError
from orchestrator.inventory import Device
from orchestrator.settings import Settings
from orchestrator.transports import connect
from orchestrator.transports.base import Progress, Transport

REACH_LIMIT_S = 120.0
"""So long is a device waited for that has answered before and is now gone, as for a reboot, from when it was
lost or a transfer to it last got on; one that never answered is tried _TRIES times."""

_FIRST_REACH_S = 8.0
"""A device that never answered is not tried again after so long: nobody answers where it should be."""

HALT_S = 2.0
"""A call that a person stops looks within this time; whoever halts asks again as long as it goes on."""

_TRIES = 3
_RETRY_PAUSE_S = 0.5
_RETRY_PAUSE_MOST_S = 5.0

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


class Reach:
    """The devices of one lab host, by name. Methods raise DeviceError and its kinds."""

    def __init__(self, settings: Settings, devices: Sequence[Device]) -> None:
        self._settings = settings
        self.devices = {device.name: device for device in devices}
        self.locks = {device.name: threading.RLock() for device in devices}
        self._transports: dict[str, Transport] = {}
        self._transports_lock = threading.Lock()
        self._have_agent: set[str] = set()
        self._beside_others: set[str] = set()
        self._agent_files: dict[str, AgentFile] = {}
        self._workdirs: dict[str, str] = {}
        self._reached: set[str] = set()
        self._progress: dict[str, tuple[int, int]] = {}
        self._waits: dict[str, str] = {}
        self._halted_until: dict[str, float] = {}

    def close(self) -> None:
        """Give connections back; agents go on."""
        with self._transports_lock:
            for transport in self._transports.values():
                transport.close()
            self._transports.clear()

    def spool(self, name: str) -> str:
        """The device's work folder; a local one may be relative to the inventory."""
        device = self.devices[name]
        if device.transport == "local":
            given = self._settings.inventory.parent / (device.workdir or "")
            return str(given if device.workdir else self._settings.spool(name))
        if device.workdir is not None:
            return device.workdir
        if (known := self._workdirs.get(name)) is not None:
            return known  # without the lock: a poll does not wait for a deploy
        with self.locks[name]:
            if name not in self._workdirs:
                transport, reached = self.transport(name), name in self._reached
                self._workdirs[name] = self.retried(name, transport.default_workdir)
                if not reached:  # some transports know it without asking the device
                    self._reached.discard(name)
            return self._workdirs[name]

    def transport(self, name: str) -> Transport:
        """The way to a device; nothing is sent over it. Raises: StableError where the inventory's is none."""
        with self._transports_lock:
            if name not in self._transports:
                self._transports[name] = connect(self.devices[name])
            return self._transports[name]

    def device(self, name: str, *, check: bool = False) -> tuple[Device, Transport]:
        """A device and its transport, with the native agent on it where its engine is native.

        ``check``: look again whether it is there and whole, and mend it.
        """
        device, transport = self.devices[name], self.transport(name)
        if device.native and (check or name not in self._have_agent):
            with self.locks[name]:
                try:
                    self.retried(name, lambda: self.bring(name, transport, ("version",)))
                finally:
                    self.transferred(name)
        return device, transport

    def bring(self, name: str, transport: Transport, asking: Sequence[str]) -> PushedAgent:
        """Have the native agent on a device by asking it. Which one that is, is found out once: an executable
        of another architecture would not run there and be replaced."""
        if name not in self._agent_files:
            self._agent_files[name] = agent_file(device_architecture(transport), name)
        file, forward = self._agent_files[name], self.forward(name)
        try:
            agent = bring_agent(transport, self.spool(name), forward, file=file, asking=asking)
        except StableError:
            del self._agent_files[name]  # it may be another machine by now
            raise
        transport.agent_argv = (agent.path,)
        self._have_agent.add(name)
        if not agent.already:
            self._beside_others.add(name)
        return agent

    def let_in(self, name: str) -> None:
        """A device's agent has just let a lease of ours in: where it was pushed by us, others there go."""
        if name in self._beside_others:
            transport = self.transport(name)
            self.retried(name, lambda: remove_others(transport, transport.agent_argv[0]))
            self._beside_others.discard(name)

    def underway(self, name: str) -> Underway:
        """How far the deploy to a device is, and what the call under way waits for; asks nothing of it."""
        return Underway(*self._progress.get(name, (0, 0)), self._waits.get(name, ""))

    def forward(self, name: str) -> Progress:
        """What a transfer to a device tells its progress to; see ``underway``."""

        def forward(done: int, total: int) -> None:
            self._progress[name] = (done, total)
            self._reached.add(name)
            self._go_on(name)

        return forward

    def halt(self, name: str) -> None:
        """End the transfer to a device, or the wait for it, that is under way or begins within HALT_S. What
        has arrived stays there."""
        self._halted_until[name] = time.monotonic() + HALT_S

    def _go_on(self, name: str) -> None:
        """Raises: HaltedError."""
        if time.monotonic() < self._halted_until.get(name, 0.0):
            raise HaltedError("it was stopped.", "Run the command again: it goes on.", device=name)

    def transferred(self, name: str) -> None:
        """Nothing is on its way to the device any more."""
        self._progress.pop(name, None)

    def agent_left(self, name: str) -> None:
        """The device's agent has removed itself."""
        self._have_agent.discard(name)
        self._agent_files.pop(name, None)

    @contextlib.contextmanager
    def waiting_for(self, name: str) -> Iterator[Callable[[str], None]]:
        """For a wait within the block: a function that says what is waited for."""
        try:
            yield lambda what: self._waits.update({name: what})
        finally:
            self._waits.pop(name, None)

    def retried(self, name: str, action: Callable[[], _T]) -> _T:
        """Repeat an idempotent action while its errors are transient: a few times, but for a device that
        was there before and is out of reach REACH_LIMIT_S long. ``underway`` says so meanwhile."""
        try:
            return self._until_it_works(name, action)
        finally:
            self._waits.pop(name, None)

    def _was_there(self, name: str) -> bool:
        """Whether the device has answered: an action that did not end may have asked it more than once."""
        return name in self._reached or self.transport(name).answered

    def _until_it_works(self, name: str, action: Callable[[], _T]) -> _T:
        began = lost = time.monotonic()
        pause_s, tries, furthest = _RETRY_PAUSE_S, 0, -1
        while True:
            try:
                done = action()
            except TransientError as error:
                now, sent = time.monotonic(), self.underway(name).sent_bytes
                if sent > furthest:  # as at the first failure: nobody was waited for before
                    lost, furthest, pause_s = now, sent, _RETRY_PAUSE_S
                out_of_reach = isinstance(error, LinkError)
                waited_for = out_of_reach and self._was_there(name)
                tries += not waited_for
                if now - lost > REACH_LIMIT_S if waited_for else tries >= _TRIES:
                    raise
                if out_of_reach and not waited_for and now - began > _FIRST_REACH_S:
                    raise
                _log.warning("trying again", device=error.device, cause=error.what)
                cause = error.what.removeprefix(f"{name}: ").rstrip(".")
                self._waits[name] = f"out of reach ({cause})" if waited_for else f"trying again ({cause})"
            else:
                self._reached.add(name)
                return done
            self._go_on(name)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _RETRY_PAUSE_MOST_S)
