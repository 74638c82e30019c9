"""The farm's branches of the error tree in ``sti_runtime.errors``.

StifarmError
├── InputError
│   ├── InventoryError      the inventory file: every problem with its line
│   ├── CampaignFileError   a campaign file: every problem with its line
│   ├── CampaignError       a campaign, run or schedule that is not there, or not as was asked
│   └── SelectorError       a device selector that names nothing
├── DeviceError             something went wrong with one device
│   ├── TransientError      worth another try: timeout, busy, an interrupted call
│   │   ├── LinkError           the device cannot be reached now: cable, reboot, server gone
│   │   │   └── HostAwayError           its lab host is away: that says nothing of the device
│   │   └── CommandTimeoutError
│   ├── HaltedError         a person stopped it
│   └── StableError         will fail again until somebody changes something: never retried
│       ├── MissingFileError    a file that was to be read is not on the device
│       ├── DeviceFullError     no space for what is to be sent
│       └── AgentError          the agent refused, with its own cause and remedy
├── ToolchainError          the native agent cannot be built
├── LabError                the virtual lab cannot be brought up, changed or taken down
├── HostError               a lab host cannot join, is refused, or is not known
└── PoolError               Ray could not start, or a worker of it died
    └── HostLostError           the lab host that was asked is gone: its devices raise HostAwayError
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from sti_runtime.errors import InputError, StifarmError


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a file; ``line`` counts from 1."""

    line: int
    what: str


class InventoryError(InputError):
    """The inventory is invalid; ``problems`` holds all of them, in the order of their lines."""

    def __init__(self, path: Path, problems: Sequence[Problem]) -> None:
        self.path = path
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = "".join(f"\n{path}:{problem.line}: {problem.what}" for problem in self.problems)
        super().__init__(
            f"The inventory has {count}:{lines}",
            "\nCorrect it and run the command again; nothing was changed.",
        )


class CampaignFileError(InputError):
    """A campaign file is invalid; ``problems`` holds all of them, in the order of their lines."""

    def __init__(self, path: Path, problems: Sequence[Problem]) -> None:
        self.path = path
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        lines = "\n".join(f"{path}:{problem.line}: {problem.what}" for problem in self.problems)
        super().__init__(
            lines, f"\nCorrect {path} and run the command again; docs/campaigns.md has the format."
        )


class CampaignError(InputError):
    """A campaign, a run of one or its schedule is not there, or not as was asked; nothing was changed."""


class SelectorError(InputError):
    """A device selector names nothing, or does not parse."""


class DeviceError(StifarmError):
    """Something went wrong with the device called ``device``; the message starts with its name."""

    def __init__(self, what: str, remedy: str = "", *, device: str) -> None:
        super().__init__(f"{device}: {what}", remedy)
        self.device = device


class TransientError(DeviceError):
    """The link was lost, something took too long or was busy: trying again may help."""


class LinkError(TransientError):
    """The device cannot be reached now: a cable, a reboot, a network, a server. What runs there goes on."""


class HostAwayError(LinkError):
    """The lab host that the device hangs on is away, or the device left the inventory. No fault of the
    device: nobody could ask it."""


class CommandTimeoutError(TransientError):
    """A command on the device did not end in time and was killed."""


class StableError(DeviceError):
    """A misconfiguration or a refusal: trying again without a change cannot help."""


class HaltedError(DeviceError):
    """A person stopped what was under way; the same command goes on with it."""


class MissingFileError(StableError):
    """A file that was to be read does not exist on the device."""


class DeviceFullError(StableError):
    """The device's storage cannot take what is to be sent."""


class AgentError(StableError):
    """The agent on the device refused or failed a verb; ``error`` is the class name it gave."""

    def __init__(self, what: str, remedy: str = "", *, device: str, error: str = "") -> None:
        super().__init__(what, remedy, device=device)
        self.error = error


class ToolchainError(StifarmError):
    """The native agent cannot be built: no compiler, no space, or sources that do not compile."""


class LabError(StifarmError):
    """The virtual lab cannot be brought up, changed or taken down, or a fault cannot be injected in it."""


class HostError(StifarmError):
    """A lab host cannot join, is refused, or is not known."""


class PoolError(StifarmError):
    """Ray could not be started or reached, or one of its workers died."""


class HostLostError(PoolError):
    """A lab host's node or worker is gone; its devices raise HostAwayError until it joins again."""


def new_agent_remedy(device: str) -> str:
    """What to do about an agent whose answers are not to be used: it is of another version, or damaged."""
    return (
        f"Put a new agent there: stifarm devices clean --devices {device}, then stifarm deploy --devices "
        f"{device}. An agent that was installed there by hand must be of this stifarm's version."
    )


def near(word: str, known: Iterable[str]) -> str:
    """What to offer when ``word`` is none of ``known``: the nearest matches, else all of them."""
    names = sorted(known)
    matches = get_close_matches(word, names, n=3, cutoff=0.6)
    if matches:
        return f"Did you mean {' or '.join(matches)}?"
    return f"There is: {', '.join(names)}." if names else "There is none."
