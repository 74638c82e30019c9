"""How an event is told: a POST of JSON, or a program with JSON on its input.

Addresses and arguments may be secrets: problems name the host or the program, never a path, an argument or
what either said.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError, NewConnectionError, SSLError, TimeoutError
from urllib3.util import Timeout, parse_url

from sti_runtime.errors import InputError, StifarmError

LIMIT_S = 10.0
"""How long whoever is told may take to answer."""


class NotTakenError(StifarmError):
    """Whoever was to be told did not take it; another time they may."""


def check_url(url: str) -> str:
    """A webhook's address. Raises: InputError, which does not show it."""
    remedy = "Write it like https://host/path."
    try:
        parsed = parse_url(url)
    except HTTPError as error:
        raise InputError("--webhook: that is no URL.", remedy) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError("--webhook: that is no http or https URL.", remedy)
    if parsed.auth is not None:
        raise InputError("--webhook: a URL with a user in it is not used.", remedy)
    return url


def shown_url(url: str) -> str:
    """A webhook's address without what may be secret in it."""
    parsed = parse_url(url)
    port = "" if parsed.port is None else f":{parsed.port}"
    return f"{parsed.scheme}://{parsed.host}{port}/…"


def webhook_url(target: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """The address of a webhook's target. Raises: NotTakenError when its variable is not set or no URL."""
    if "url" in target:
        return target["url"]
    variable = target["variable"]
    try:
        return check_url(environ.get(variable, ""))
    except InputError as error:
        raise NotTakenError(
            f"the variable {variable} holds no URL here.", "Set it where stifarm runs."
        ) from error


def post(url: str, event: Mapping[str, Any], *, limit_s: float = LIMIT_S) -> None:
    """POST an event; any answer of 2xx takes it. Redirects are not followed. Raises: NotTakenError."""
    where = shown_url(url)
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "stifarm",
        "Idempotency-Key": str(event["id"]),
    }
    try:
        with urllib3.PoolManager(retries=False) as pool:
            answer = pool.request(
                "POST",
                url,
                body=json.dumps(event, ensure_ascii=False).encode(),
                headers=headers,
                timeout=Timeout(total=limit_s),
                redirect=False,
                retries=False,
                preload_content=False,  # only its status is wanted, however much it sends
            )
            answer.close()
    except (HTTPError, OSError) as error:
        raise NotTakenError(f"{where}: {_why(error, limit_s)}", "It is tried again.") from error
    if not 200 <= answer.status < 300:
        raise NotTakenError(f"{where}: it answered {answer.status}.", "It is tried again.")


def _why(error: Exception, limit_s: float) -> str:
    if isinstance(error, NewConnectionError):
        return "it cannot be reached."
    if isinstance(error, TimeoutError):
        return f"it did not answer within {limit_s:g} s."
    if isinstance(error, SSLError):
        return "its certificate is not accepted, or it speaks no TLS."
    return f"the exchange failed ({type(error).__name__})."


def startable(program: str) -> str | None:
    """Why a program may not start where stifarm delivers; None when nothing speaks against it here."""
    path = shutil.which(program)
    if path is not None and (Path(program).is_absolute() or os.sep not in program):
        return None
    if path is not None:
        return f"{program} is looked for in the folder that stifarm is started in: give its whole path"
    if Path(program).is_file() and os.sep in program:
        return f"{program} may not be executed"
    where = "there is no such file" if os.sep in program else "no folder of PATH has it"
    return f"{program} cannot be started here: {where}"


def execute(argv: Sequence[str], event: Mapping[str, Any], *, limit_s: float = LIMIT_S) -> None:
    """Run a program with an event on its input; exit code 0 takes it. No shell. Raises: NotTakenError."""
    again = "It is tried again."
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise NotTakenError(f"{argv[0]} cannot be started: {error.strerror}.", again) from error
    try:
        # One that ends without reading all of it is judged by its exit code.
        process.communicate(json.dumps(event, ensure_ascii=False).encode(), timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise NotTakenError(f"{argv[0]} did not end within {limit_s:g} s and was killed.", again) from error
    finally:
        with suppress(ProcessLookupError):  # nobody of its session is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode != 0:
        raise NotTakenError(f"{argv[0]} ended with {process.returncode}.", again)
