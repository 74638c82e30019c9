"""Selectors: which devices a verb is for.

A selector is a comma-separated list of terms: ``all``, a device's name, ``label=value``,
``transport:adb``; ``!`` before a term takes its devices away again. With exclusions only, the
selection starts from all devices. The result keeps the order of the inventory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from orchestrator.errors import SelectorError, near
from orchestrator.inventory import Device

_EXAMPLE = "Write it like all, this-machine, room=lab2, transport:adb or all,!this-machine."


def select(devices: Sequence[Device], selector: str) -> tuple[Device, ...]:
    """The devices that ``selector`` names.

    Raises: SelectorError for an unknown name, label or transport, and for an empty selection.
    """
    terms = [term.strip() for term in selector.split(",")]
    if not all(term.removeprefix("!") for term in terms):
        raise SelectorError(f"The device selector {selector!r} has an empty term.", _EXAMPLE)
    chosen = set() if any(not term.startswith("!") for term in terms) else {device.name for device in devices}
    for term in (term for term in terms if not term.startswith("!")):
        matches = _matcher(devices, term)
        chosen |= {device.name for device in devices if matches(device)}
    for term in (term for term in terms if term.startswith("!")):
        matches = _matcher(devices, term[1:].strip())
        chosen -= {device.name for device in devices if matches(device)}
    selected = tuple(device for device in devices if device.name in chosen)
    if not selected:
        raise SelectorError(
            f"The device selector {selector!r} selects no device.",
            f"The inventory has: {', '.join(device.name for device in devices) or 'none'}.",
        )
    return selected


def _matcher(devices: Sequence[Device], term: str) -> Callable[[Device], bool]:
    """The predicate of one term without its ``!``."""
    if term == "all":
        return lambda device: True
    if term.startswith("transport:"):
        transport = term.removeprefix("transport:")
        known = {device.transport for device in devices}
        if transport not in known:
            raise SelectorError(f"No device has the transport {transport!r}.", near(transport, known))
        return lambda device: device.transport == transport
    if "=" in term:
        label, _, value = term.partition("=")
        known = {name for device in devices for name in device.labels}
        if label not in known:
            raise SelectorError(f"No device has the label {label!r}.", near(label, known))
        return lambda device: device.labels.get(label) == value
    names = {device.name for device in devices}
    if term not in names:
        raise SelectorError(f"No device is called {term!r}.", near(term, names))
    return lambda device: device.name == term
