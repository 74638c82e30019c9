"""The services of a daemon by the name that opens them. Pure choice; what serves is elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from orchestrator.lab.adbd.connection import Service
from orchestrator.lab.adbd.features import Offer
from orchestrator.lab.adbd.shell import ShellHost, serve_shell
from orchestrator.lab.adbd.shell_format import parse_request
from orchestrator.lab.adbd.stream import Stream, StreamClosedError
from orchestrator.lab.adbd.sync import serve_sync

_SAYINGS = {
    b"root:": "adbd cannot run as root in production builds\n",
    b"unroot:": "adbd not running as root\n",
    b"remount:": 'Not running as root. Try "adb root" first.\n',
    b"tcpip:": "a virtual phone keeps its port\n",
    b"usb:": "a virtual phone has no cable\n",
}
"""Services that are refused in words, as a phone sold to users does."""


def finder(offer: Offer, host: ShellHost, reboot: Callable[[], None]) -> Callable[[bytes], Service | None]:
    """What finds the service of a name; None for one that is not offered: the stream is refused."""
    features = frozenset(offer.features)

    def sync(stream: Stream, name: bytes) -> None:
        serve_sync(stream, features)

    def restart(stream: Stream, name: bytes) -> None:
        stream.close()
        reboot()

    def find(name: bytes) -> Service | None:
        if name == b"sync:":
            return sync
        if name.startswith(b"reboot:"):
            return restart
        for start, text in _SAYINGS.items():
            if name.startswith(start):
                return _saying(text)
        request = parse_request(name, pty_only=offer.pty_only, packets_offered="shell_v2" in features)
        return None if request is None else lambda stream, _: serve_shell(stream, request, host)

    return find


def _saying(text: str) -> Service:
    def say(stream: Stream, name: bytes) -> None:
        with contextlib.suppress(StreamClosedError):
            stream.write(text.encode())

    return say
