"""Android's own programs in a folder: they print captured output. For agents under STIFARM_ANDROID."""

from __future__ import annotations

from pathlib import Path

CAPTURED = Path(__file__).parent / "data" / "facts"
PIXEL = "google/shiba/shiba:14/UQ1A.240205.004/11269751:user/release-keys"


def captured(name: str) -> str:
    """A file of captured output."""
    return (CAPTURED / f"{name}.txt").read_text()


def android_root(
    folder: Path,
    *,
    serial: str = "38071FDJH00000",
    boot_serial: str = "",
    battery: str = "dumpsys_battery_14",
    thermal: str = "dumpsys_thermalservice_14",
) -> Path:
    """A folder with ``system/bin/getprop`` and ``dumpsys``; the empty name: that service does not exist."""
    programs = folder / "system/bin"
    programs.mkdir(parents=True)
    services = {"battery": battery, "thermalservice": thermal}
    cases = "".join(
        f"{name}) cat '{CAPTURED / f'{file}.txt'}' ;;\n" for name, file in services.items() if file
    )
    scripts = {
        "getprop": f"ro.serialno) echo '{serial}' ;;\nro.boot.serialno) echo '{boot_serial}' ;;\n"
        f"ro.build.fingerprint) echo '{PIXEL}' ;;\n*) echo ;;\n",
        "dumpsys": cases + '*) echo "Can\'t find service: $1" >&2; exit 1 ;;\n',
    }
    for name, script in scripts.items():
        path = programs / name
        path.write_text(f'#!/bin/sh\ncase "$1" in\n{script}esac\n')
        path.chmod(0o755)
    return folder
