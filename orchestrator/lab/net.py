"""Links of the lab's devices: a pair of virtual Ethernet ends, one here and one in the device's namespace.

Addresses come from 198.18.0.0/15, which RFC 2544 sets aside for benchmarks: no real network has them. A lab
claims a /24 by an unreachable route, so that what is sent to a device that is off goes nowhere else, and each
device has four addresses of it: the second is this end's, the third its own.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable

from orchestrator.errors import LabError
from orchestrator.lab.means import command
from orchestrator.processes import ProcessId

POOL = ipaddress.ip_network("198.18.0.0/15")
PER_DEVICE = 4
DEVICES = 256 // PER_DEVICE
INNER = "eth0"

Network = ipaddress.IPv4Network


def choose_network(lab_id: str) -> str:
    """The first three numbers of a free network. Raises: LabError when none is free."""
    for network in candidates(lab_id, networks_in_use()):
        return prefix_of(network)
    raise LabError(f"No network of {POOL} is free for the lab.", "Take other labs down: stifarm lab down.")


def claim(prefix: str) -> None:
    """Set the lab's network aside; harmless where it is. Raises: LabError."""
    words = f"route replace unreachable {prefix}.0/24".split()
    command(["ip", *words], "the lab's network cannot be set aside")


def give_back(prefix: str) -> None:
    """Give the lab's network back; harmless when it was."""
    routes = json.loads(command(["ip", "-j", "route", "show", f"{prefix}.0/24"], "routes") or b"[]")
    if any(route.get("type") == "unreachable" for route in routes):
        command(
            ["ip", "route", "del", "unreachable", f"{prefix}.0/24"], "the lab's network cannot be given back"
        )


def candidates(lab_id: str, taken: Iterable[Network]) -> list[Network]:
    """The free networks, in the order in which a lab takes one: its own place in the pool first."""
    subnets = [net for net in POOL.subnets(new_prefix=24) if isinstance(net, Network)]
    first, used = int(lab_id, 16) % len(subnets), list(taken)
    ordered = subnets[first:] + subnets[:first]
    return [net for net in ordered if not any(net.overlaps(other) for other in used)]


def networks_in_use() -> list[Network]:
    """Networks of this machine's routes and addresses, the default route apart."""
    text = command(
        ["ip", "-j", "-4", "route", "show", "table", "all"], "this machine's routes cannot be read"
    )
    found: list[Network] = []
    for route in json.loads(text or b"[]"):
        destination = route.get("dst", "default")
        if destination != "default":
            found.append(ipaddress.IPv4Network(destination, strict=False))
    return found


def prefix_of(network: Network) -> str:
    """ "198.18.7" of 198.18.7.0/24."""
    return str(network.network_address).rpartition(".")[0]


def device_address(prefix: str, number: int) -> str:
    """The address of the lab's ``number``-th device."""
    return f"{prefix}.{PER_DEVICE * number + 2}"


def link_name(lab_id: str, number: int) -> str:
    """This machine's end of a device's link."""
    return f"sf{lab_id}-{number}"


def connect(lab_id: str, prefix: str, number: int, process: ProcessId) -> None:
    """Make the link of a device whose first process runs in its own network namespace. Raises: LabError."""
    name, pid = link_name(lab_id, number), str(process.pid)
    what = f"the link {name} cannot be made"
    disconnect(lab_id, number)
    command(["ip", *f"link add {name} type veth peer name {INNER} netns {pid}".split()], what)
    here = f"{prefix}.{PER_DEVICE * number + 1}/30"
    command(["ip", *f"addr add {here} dev {name}".split()], what)
    command(["ip", *f"link set {name} up".split()], what)
    for words in (
        f"addr add {device_address(prefix, number)}/30 dev {INNER}",
        f"link set {INNER} up",
        "link set lo up",
    ):
        inside(process, ["ip", *words.split()], what)


def disconnect(lab_id: str, number: int) -> None:
    """Remove a device's link, if it is there: the kernel does it when the namespace ends, a little later."""
    name = link_name(lab_id, number)
    links = json.loads(command(["ip", "-j", "link", "show", "type", "veth"], "links cannot be read") or b"[]")
    if any(link.get("ifname") == name for link in links):
        try:
            command(["ip", "link", "del", name], f"the link {name} cannot be removed")
        except LabError as error:
            if "Cannot find device" not in error.what:  # the kernel was faster
                raise


def inside(process: ProcessId, argv: list[str], what: str) -> bytes:
    """Run a command in a device's network namespace. Raises: LabError."""
    return command(["nsenter", f"--net=/proc/{process.pid}/ns/net", *argv], what)


# ------------------------------------------------------------------ faults of a link


def set_carrier(process: ProcessId, *, up: bool) -> None:
    """Pull the cable at the device's end, or plug it in again; connections see silence. Raises: LabError."""
    inside(process, ["ip", "link", "set", INNER, "up" if up else "down"], "the link cannot be switched")


def set_rate(lab_id: str, number: int, process: ProcessId, bytes_per_s: int | None) -> None:
    """Slow a link in both directions, or let it go at full speed again (None). Raises: LabError."""
    what = "the link's rate cannot be set"
    name = link_name(lab_id, number)
    if bytes_per_s is None:
        if b"tbf" in command(["tc", "qdisc", "show", "dev", name], what):
            command(["tc", *f"qdisc del dev {name} root".split()], what)
            inside(process, ["tc", *f"qdisc del dev {INNER} root".split()], what)
        return
    rate = f"root tbf rate {8 * bytes_per_s}bit burst 32kb latency 400ms"
    command(["tc", *f"qdisc replace dev {name} {rate}".split()], what)
    inside(process, ["tc", *f"qdisc replace dev {INNER} {rate}".split()], what)
