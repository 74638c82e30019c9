"""Where things are: the one place that knows the environment variables and the layout of the state.

State layout below ``home`` (STIFARM_HOME, by default ``.stifarm`` beside the inventory)::

    store.sqlite        the SQL store, unless STIFARM_DB_URL names another
    models/<digest>/    imported or trained models        bundles/<digest>/   what devices are sent
    tasks/<sha>.safetensors   tokenized task data         devices/<name>/     spools of local devices
    emulation/<name>/   verified emulation               logs/               logs of the host side
    shipped/            on a lab host: bundles and task data that the controller sent
    ray_token           the token of this farm's Ray cluster, readable by its owner only
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sti_runtime.errors import InputError

HOME_VARIABLE = "STIFARM_HOME"
INVENTORY_VARIABLE = "STIFARM_INVENTORY"
MACHINE_LOCK = Path("/tmp/stifarm-machine.lock")
DB_URL_VARIABLE = "STIFARM_DB_URL"


@dataclass(frozen=True)
class Settings:
    """Paths and addresses of one farm; all paths are absolute."""

    home: Path
    inventory: Path
    db_url: str
    db_url_given: bool = False
    """Whether somebody named the store, rather than leave it in the state folder."""

    @property
    def models(self) -> Path:
        """Folder of models by digest."""
        return self.home / "models"

    @property
    def bundles(self) -> Path:
        """Folder of bundles by digest."""
        return self.home / "bundles"

    @property
    def tasks(self) -> Path:
        """Folder of tokenized task data by digest."""
        return self.home / "tasks"

    @property
    def logs(self) -> Path:
        """Folder of the host side's logs."""
        return self.home / "logs"

    @property
    def emulation(self) -> Path:
        """Folder of the verified emulation of each slowed device."""
        return self.home / "emulation"

    @property
    def shipped(self) -> Path:
        """Folder of what the controller sent to this host."""
        return self.home / "shipped"

    @property
    def ray_token(self) -> Path:
        """File that holds the token of this farm's Ray cluster."""
        return self.home / "ray_token"

    @property
    def machine_lock(self) -> Path:
        """Lock that timed units of all local devices hold: one per machine, for all users and homes."""
        return MACHINE_LOCK

    def spool(self, device: str) -> Path:
        """Default work folder of a local device."""
        return self.home / "devices" / device


def load_settings(
    *,
    environ: Mapping[str, str] | None = None,
    home: Path | None = None,
    inventory: Path | None = None,
    db_url: str | None = None,
    cwd: Path | None = None,
) -> Settings:
    """Settings from arguments, else the environment, else the defaults.

    Creates nothing. Raises: InputError when the home is, or lies below, something that is no folder.
    """
    environ = os.environ if environ is None else environ
    base = (cwd or Path.cwd()).absolute()
    inventory_path = base / (inventory or environ.get(INVENTORY_VARIABLE) or "inventory.yaml")
    home_text = home or environ.get(HOME_VARIABLE)
    home_path = base / Path(home_text).expanduser() if home_text else inventory_path.parent / ".stifarm"
    for part in (home_path, *home_path.parents):
        if part.exists() and not part.is_dir():
            raise InputError(
                f"The state folder {home_path} cannot be used: {part} is not a folder.",
                f"Set {HOME_VARIABLE} to a folder.",
            )
    given = db_url or environ.get(DB_URL_VARIABLE)
    url = given or f"sqlite:///{home_path / 'store.sqlite'}"
    return Settings(home=home_path, inventory=inventory_path, db_url=url, db_url_given=bool(given))
