"""The user's ssh configuration: its file with what that includes, and what it says of a host.

paramiko reads one file and knows no ``Include``: included text is put in its place first. Source:
ssh_config(5), Include, Host, Match.
"""

from __future__ import annotations

import glob
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import paramiko
from paramiko.ssh_exception import CouldNotCanonicalize

from orchestrator.errors import StableError

_DEPTH = 16
_FILES = 256
_FILE_CAP_CHARS = 1 << 20
_BLOCK = re.compile(r"(host|match)(\s*=\s*|\s+)(.+)", re.IGNORECASE)
_INCLUDE = re.compile(r"include(?:\s*=\s*|\s+)(.+)", re.IGNORECASE)
_EVERY = re.compile(r'(host(\s*=\s*|\s+)"?\*"?|match\s+all)', re.IGNORECASE)
_UNCONDITIONAL = "Host *"


def read_configuration(path: Path, device: str) -> paramiko.SSHConfig:
    """The configuration in ``path``; an empty one when there is no such file.

    Raises: StableError (what of it cannot be read, or is not supported).
    """
    try:
        text = _Reading(path.parent).text_of(path, 0)
        return paramiko.SSHConfig.from_text(text)
    except FileNotFoundError:
        return paramiko.SSHConfig()
    except (OSError, ValueError, RuntimeError, paramiko.ConfigParseError) as error:
        raise _unreadable(path, str(error), device) from error


def said_of(config: paramiko.SSHConfig, host: str, path: Path, device: str) -> paramiko.SSHConfigDict:
    """What the configuration says of a host; its ``port``, where it has one, is a port's number.

    Raises: StableError.
    """
    try:
        said = config.lookup(host)
    except KeyError as error:
        raise _unreadable(path, f"it has no {error.args[0]}, which it needs for {host}", device) from error
    except (ValueError, OSError, ImportError, paramiko.ConfigParseError, CouldNotCanonicalize) as error:
        raise _unreadable(path, f"{error} ({host})", device) from error
    port = said.get("port", "22")
    if re.fullmatch(r"[0-9]{1,5}", port) is None or not 0 < int(port) < 1 << 16:
        raise _unreadable(path, f"Port {port[:40]!r} of {host} is none", device)
    return said


def _unreadable(path: Path, cause: str, device: str) -> StableError:
    return StableError(f"the ssh configuration {path} cannot be used: {cause}.", "Correct it.", device=device)


@dataclass
class _Reading:
    """One reading of a configuration with all that it includes; ``folder``: where relative names are."""

    folder: Path
    files: int = field(default=0, init=False)

    def text_of(self, path: Path, depth: int) -> str:
        """A file's text, included text in its place. Raises: StableError, OSError, ValueError."""
        self.files += 1
        if depth > _DEPTH or self.files > _FILES:
            raise ValueError(f"it includes more than {_DEPTH} levels or {_FILES} files")
        with path.open() as stream:
            text = stream.read(_FILE_CAP_CHARS + 1)
        if len(text) > _FILE_CAP_CHARS:
            raise ValueError(f"{path} is longer than {_FILE_CAP_CHARS} characters")
        block, lines = _UNCONDITIONAL, list[str]()
        for line in map(str.strip, text.splitlines()):
            included = _INCLUDE.fullmatch(line)
            if included is None:
                block = line if _BLOCK.fullmatch(line) else block
                lines.append(line)
            else:
                lines += self._included(included[1], block, depth)
        return "\n".join(lines)

    def _included(self, names: str, block: str, depth: int) -> list[str]:
        """The texts of the files that one line includes, in a block of that beginning."""
        texts = []
        for name in shlex.split(names, comments=True):
            if "%" in name or "${" in name:
                raise ValueError(f"Include {name}: tokens and variables are not supported there")
            pattern = f"{self.folder.parent}{name[1:]}" if name.startswith("~/") else name
            pattern = str(self.folder / Path(pattern).expanduser())
            for found in sorted(glob.glob(pattern)):  # noqa: PTH207 - that of pathlib takes no absolute one
                text = self.text_of(Path(found), depth + 1) if Path(found).is_file() else ""
                begins = any(map(_BLOCK.fullmatch, text.splitlines()))
                if begins and _EVERY.fullmatch(block) is None:
                    raise ValueError(
                        f"Include {name} stands below {block!r}, and {found} has a Host or Match of its own,"
                        " which is not supported: put that Include before the first Host"
                    )
                texts.append(f"{block}\n{text}\n{block}" if begins else text)
        return texts
