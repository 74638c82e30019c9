"""Whether a store lies where a given URL says: a mistyped path must not become a new, empty store."""

from __future__ import annotations

import shlex
from pathlib import Path

from db.session import parse_url
from orchestrator.settings import DB_URL_VARIABLE, Settings
from sti_runtime.errors import InputError


class NoStoreError(InputError):
    """There is no store, or no folder for one, where a given URL says; nothing was made."""


def absent_store(settings: Settings, *, existing: bool = False) -> Path | None:
    """The SQLite file that a URL of the command line or the environment names and that is still to be made;
    None where it is there, on a server, or in the state folder by default.

    ``existing``: it must be there, for a new store could answer nothing. Raises: NoStoreError, also where the
    file's folder is missing; InputError for a URL that is not one.
    """
    if not settings.db_url_given:
        return None
    url = parse_url(settings.db_url)
    if url.get_backend_name() != "sqlite" or str(url.database).startswith("file:"):
        return None
    path = Path(url.database or "").absolute()
    try:
        if path.exists():
            return None
        folder = path.parent.exists()
    except OSError:  # opening it tells why
        return None
    if not folder:
        raise NoStoreError(
            f"There is no store at {path}: its folder does not exist.",
            f"Correct --db-url ({DB_URL_VARIABLE}); for a new store there, make the folder first: mkdir -p"
            f" {shlex.quote(str(path.parent))}",
        )
    if existing:
        raise NoStoreError(
            f"There is no store at {path}.",
            f"Correct --db-url ({DB_URL_VARIABLE}), or make a new store there: stifarm --db-url"
            f" {shlex.quote(settings.db_url)} db upgrade",
        )
    return path
