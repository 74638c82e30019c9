"""Token authentication of our clusters: always on, whatever the environment said before."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog

from orchestrator.errors import PoolError
from orchestrator.home_files import refused, remove

_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_MODE_VARIABLE = "RAY_AUTH_MODE"
_TOKEN_CAP_BYTES = 4096
_GCS_WAIT_S = "120"
"""So long Ray's first process may take to come up; its own 30 s are short for a machine at its limits."""

_log = structlog.get_logger(__name__)


@contextlib.contextmanager
def authenticated(token_path: Path, *, make: bool = True) -> Iterator[None]:
    """Within the block, Ray in this process and below it speaks to clusters of this token only.

    A token that the environment gives is kept; else it is that of the file, which is made unless ``make`` is
    False. Raises: PoolError when there is no token, or none to use, or authentication cannot be switched on;
    ResourceError when the file cannot be made.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else a thread that calls after the end of our cluster would start another one, by Ray's own defaults.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", _GCS_WAIT_S)
    with _environment(_authentication(token_path, make=make)):
        _enforce_token_authentication()
        yield


def token_source(token_path: Path) -> str:
    """Where the token in use is from, for people."""
    given = [name for name in _TOKEN_VARIABLES if os.environ.get(name)]
    if "RAY_AUTH_TOKEN_PATH" in given:
        return os.environ["RAY_AUTH_TOKEN_PATH"]
    return given[0] if given else str(token_path)


def _authentication(token_path: Path, *, make: bool) -> dict[str, str]:
    """Variables that switch token authentication on, whatever they were; a token given there is kept."""
    given = {name: os.environ[name] for name in _TOKEN_VARIABLES if os.environ.get(name)}
    if not given:
        if make:
            _ensure_token(token_path)
        elif not token_path.exists():
            raise PoolError(
                f"This machine has no token of the farm: there is no {token_path}.",
                "Copy the file ray_token of the controller's state folder to that path, mode 0600; or name "
                "one with --token.",
            )
        given = {"RAY_AUTH_TOKEN_PATH": str(token_path)}
    if "RAY_AUTH_TOKEN" not in given:
        require_token(Path(given["RAY_AUTH_TOKEN_PATH"]))
    return {_MODE_VARIABLE: "token", **given}


def require_token(path: Path) -> None:
    """See that a file can be a token's: Ray says little where it is none. Raises: PoolError."""
    why = ""
    try:
        with path.open("rb") as stream:
            token = stream.read(_TOKEN_CAP_BYTES + 1)
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
    else:
        if not token.strip():
            why = "is empty"
        elif len(token) > _TOKEN_CAP_BYTES or not token.isascii() or not token.decode().strip().isprintable():
            why = "holds no token"
    if why:
        raise PoolError(
            f"The farm's token {path} {why}.",
            "On a lab host copy the file ray_token of the controller's state folder there again, mode 0600. "
            f"On the controller: rm {path}; the next start makes a new one, which every lab host needs then.",
        )


def _ensure_token(path: Path) -> None:
    """A token made by Ray's own generator, readable by its owner only, unless there is one. Raises:
    ResourceError."""
    from ray._private.authentication.authentication_token_generator import generate_new_authentication_token

    if path.exists():
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as stream:
            stream.write(generate_new_authentication_token())
        os.link(partial, path)  # fails if another process was first: its token counts
    except FileExistsError:
        _log.debug("another process made the token first", path=str(path))
    except OSError as error:
        raise refused(error, f"The farm's token {path} cannot be written") from error
    finally:
        remove(partial)


def _enforce_token_authentication() -> None:
    """Make Ray read the environment anew, and refuse to go on without authentication."""
    raylet: Any = importlib.import_module("ray._raylet")  # compiled, without annotations
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    if raylet.get_authentication_mode() != raylet.AuthenticationMode.TOKEN:
        raise PoolError(
            "Ray's token authentication cannot be switched on.",
            "Install the version of Ray in this project's lock file.",
        )


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Change environment variables for a while."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
