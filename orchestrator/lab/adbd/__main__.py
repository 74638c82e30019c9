"""``python -m orchestrator.lab.adbd --port N --root DIR --props FILE``: run the daemon.

``--root``: the phone's system; commands run there with ``system/bin`` as their path. The daemon prints
"listening on PORT" when it does. It ends with REBOOT_EXIT when a host asks for a reboot: whoever started
it boots the phone again.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.lab.adbd.connection import Trust
from orchestrator.lab.adbd.features import Offer, banner, offer_of, parse_properties
from orchestrator.lab.adbd.server import Server, listen
from orchestrator.lab.adbd.services import finder
from orchestrator.lab.adbd.shell import ShellHost

REBOOT_EXIT = 43
"""The exit code that asks for a reboot; no signal's, no shell's."""


def _offer(text: str) -> Offer:
    try:
        return offer_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.lab.adbd", description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="TCP port; 0: one that is free")
    parser.add_argument("--address", default="127.0.0.1", help="address to listen on (default: loopback)")
    parser.add_argument("--root", type=Path, required=True, help="folder of the phone's system")
    parser.add_argument("--props", type=Path, required=True, help="properties, a line name=value each")
    parser.add_argument("--features", type=_offer, default="modern", help="a preset or a list of features")
    parser.add_argument("--secure", action="store_true", help="ask for an authorised key")
    parser.add_argument("--keys", type=Path, help="list of authorised keys (default: data/misc/adb/adb_keys)")
    return parser.parse_args(argv)


def environment(root: Path, *, serial: str) -> Mapping[str, str]:
    """The environment of commands, as Android's daemon sets it."""
    return {
        "PATH": f"{root / 'system/bin'}",
        "HOME": str(root),
        "SHELL": str(root / "system/bin/sh"),
        "TMPDIR": str(root / "data/local/tmp"),
        "USER": "shell",
        "LOGNAME": "shell",
        "HOSTNAME": serial,
        "ANDROID_ROOT": str(root / "system"),
        "ANDROID_DATA": str(root / "data"),
        "EXTERNAL_STORAGE": str(root / "sdcard"),
    }


def _reboot() -> None:
    os._exit(REBOOT_EXIT)


def main(argv: Sequence[str]) -> int:
    """Serve until killed. Exit 1: the port cannot be had, or a file cannot be read."""
    logging.basicConfig(level=logging.INFO, format="adbd: %(message)s")
    given = _arguments(argv)
    root = given.root.absolute()
    keys = given.keys or root / "data/misc/adb/adb_keys"
    try:
        properties = parse_properties(given.props.read_text())
        listener = listen(given.address, given.port)
    except OSError as error:
        logging.exception("cannot start: %s: %s", error.filename or given.port, error.strerror)
        return 1
    host = ShellHost(
        shell=str(root / "system/bin/sh"),
        environment=environment(root, serial=properties.get("ro.serialno", "localhost")),
        folder=root,
    )
    trust = Trust(required=given.secure, keys=keys, offered=keys.with_name("offered_keys"))
    server = Server(
        given.features,
        banner(properties, given.features.features),
        trust,
        finder(given.features, host, _reboot),
    )
    os.chdir(root)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout.write(f"listening on {listener.getsockname()[1]}\n")
    sys.stdout.flush()
    server.serve(listener)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
