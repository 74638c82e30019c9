"""What a virtual phone is, and how its folder is laid out. A JSON file in the folder keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

SPEC_FILE = "spec.json"
STATE_FILE = "state.json"
LOG_FILE = "phone.log"
BOOT_ID_FILE = "boot_id"
DELAY_FILE = "reboot_delay_s"
KEYS = Path("data/misc/adb/adb_keys")
OFFERED_KEYS = Path("data/misc/adb/offered_keys")
WORKDIR = Path("data/local/tmp")

_ABIS = {"x86_64": "x86_64", "aarch64": "arm64-v8a"}
_RELEASES = {
    23: "6.0.1",
    24: "7.0",
    26: "8.0.0",
    28: "9",
    29: "10",
    30: "11",
    31: "12",
    33: "13",
    34: "14",
    35: "15",
}


@dataclass(frozen=True)
class PhoneSpec:
    """A phone. ``api``: its level of Android; ``architecture``: ``x86_64`` or ``aarch64``; ``features``: a
    preset of the daemon, or its features with commas; ``secure``: whether hosts must be authorised;
    ``address``: where the daemon listens; ``props``: properties beside, or instead of, the usual ones."""

    name: str
    serial: str
    model: str = "Virtual Phone"
    api: int = 34
    architecture: str = "x86_64"
    features: str = "modern"
    secure: bool = False
    address: str = "127.0.0.1"
    props: Mapping[str, str] = field(default_factory=dict, hash=False)


def properties(spec: PhoneSpec) -> dict[str, str]:
    """All properties of a phone, as a shell's user reads them on a real one."""
    release = _RELEASES.get(spec.api, str(spec.api - 20))
    abi = _ABIS[spec.architecture]
    device = "".join(letter if letter.isalnum() else "_" for letter in spec.name)
    build = f"STIFARM.{spec.api}"
    return {
        "ro.product.name": device,
        "ro.product.device": device,
        "ro.product.model": spec.model,
        "ro.product.brand": "stifarm",
        "ro.product.manufacturer": "stifarm",
        "ro.product.board": "virtual",
        "ro.product.cpu.abi": abi,
        "ro.product.cpu.abilist": abi,
        "ro.hardware": "virtual",
        "ro.board.platform": "virtual",
        "ro.soc.manufacturer": "stifarm",
        "ro.soc.model": f"VIRT-{spec.architecture}",
        "ro.serialno": spec.serial,
        "ro.boot.serialno": spec.serial,
        "ro.build.id": build,
        "ro.build.type": "user",
        "ro.build.tags": "release-keys",
        "ro.build.version.sdk": str(spec.api),
        "ro.build.version.release": release,
        "ro.build.version.incremental": "1",
        "ro.build.fingerprint": f"stifarm/{device}/{device}:{release}/{build}/1:user/release-keys",
        "ro.adb.secure": "1" if spec.secure else "0",
        "ro.debuggable": "0",
        "ro.secure": "1",
        "sys.boot_completed": "1",
        "ro.stifarm.virtual": "1",
        **spec.props,
    }


def save_spec(spec: PhoneSpec, port: int, folder: Path) -> None:
    """Keep a spec, and the port the phone is reached at."""
    (folder / SPEC_FILE).write_text(json.dumps({"port": port, **asdict(spec)}, indent=1))


def load_spec(folder: Path) -> tuple[PhoneSpec, int]:
    """The kept spec and port. Raises: OSError, ValueError, TypeError."""
    values = json.loads((folder / SPEC_FILE).read_text())
    port = values.pop("port")
    return PhoneSpec(**values), port
