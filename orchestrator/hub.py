"""Checkpoints from a hub: a folder or a Hugging Face id becomes a local folder.

Only what an import reads is downloaded. The endpoint is the argument's, else ``HF_ENDPOINT``'s, else
huggingface.co; a token comes from ``HF_TOKEN`` or ``hf auth login``, never from our files.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sti_runtime.checkpoint_weights import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from sti_runtime.errors import CheckpointError, ResourceError, StifarmError

NEEDED_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    INDEX_FILE,
    "model-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
"""Patterns of the files that an import may read."""

_PROBE_TIMEOUT_S = 10

log = logging.getLogger(__name__)


class HubUnreachableError(StifarmError):
    """The hub did not answer, or broke off; trying again may help."""


def fetch_checkpoint(
    id_or_path: str, cache_dir: Path, *, revision: str | None = None, endpoint: str | None = None
) -> Path:
    """The local folder of a checkpoint: ``id_or_path`` itself if it is one, else a download of that id.

    ``revision``: branch, tag or commit of a hub id; the folder is named by the commit. A complete download
    is not fetched twice, an interrupted one goes on.
    Raises: CheckpointError when it is not there, gated or has no safetensors; HubUnreachableError;
    ResourceError when the storage is full.
    """
    local = Path(id_or_path).expanduser()
    if local.is_dir():
        return local
    if local.exists() or _is_a_path(id_or_path):
        problem = "is a file, not a folder" if local.exists() else "there is no such folder"
        raise CheckpointError(
            f"{id_or_path}: {problem}.",
            "Give the folder that holds config.json, or a hub id such as google-bert/bert-base-uncased.",
        )
    hub = (endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    unreachable = _probe(id_or_path, revision, hub)
    try:
        folder = Path(
            snapshot_download(
                id_or_path,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=list(NEEDED_FILES),
                endpoint=hub,
                local_files_only=unreachable is not None,
            )
        )
    except Exception as error:  # noqa: BLE001 - of several libraries; each is explained and chained
        raise _explained(error, id_or_path, revision, hub, unreachable) from (unreachable or error)
    if unreachable is not None:
        log.warning(
            "%s cannot be reached (%s): %s taken from the cache, commit %s",
            hub,
            _first_line(unreachable),
            id_or_path,
            folder.name,
        )
    else:
        log.info("checkpoint %s from %s: commit %s", id_or_path, hub, folder.name)
    _check_complete(folder, id_or_path)
    return folder


def _probe(name: str, revision: str | None, hub: str) -> Exception | None:
    """Ask the hub for the revision: None when it is there, the error when the hub does not answer.

    Raises: CheckpointError when the hub answers that there is no such thing.
    """
    try:
        HfApi(endpoint=hub).model_info(name, revision=revision, timeout=_PROBE_TIMEOUT_S)
    except Exception as error:
        if isinstance(error, _ANSWERS):
            raise _explained(error, name, revision, hub, None) from error
        return error
    return None


def _is_a_path(text: str) -> bool:
    """Whether ``text`` can only be meant as a path: a hub id is ``name`` or ``owner/name``."""
    return text.startswith(("/", ".", "~")) or text.endswith("/") or text.count("/") > 1 or "\\" in text


def _check_complete(folder: Path, name: str) -> None:
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{name}: the repository has no {CONFIG_FILE}.", "Choose one that holds a model."
        )
    if not any((folder / file).is_file() for file in (WEIGHTS_FILE, INDEX_FILE)):
        raise CheckpointError(
            f"{name}: the repository has no {WEIGHTS_FILE}; pickled weights can run code and are "
            "not fetched.",
            "Choose a revision with safetensors (many have one in refs/pr/…), or convert the model with "
            "Transformers' save_pretrained and give its folder.",
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _explained(
    error: Exception, name: str, revision: str | None, hub: str, unreachable: Exception | None
) -> StifarmError:
    """The error of ours for one of the hub library's: what happened and what to do."""
    for cause, what, remedy in _EXPLANATIONS:
        if isinstance(error, cause):
            fields = {"name": name, "revision": revision or "main", "hub": hub}
            return CheckpointError(what.format(**fields), remedy.format(**fields))
    if isinstance(error, LocalEntryNotFoundError):
        return HubUnreachableError(
            f"{name}: {hub} cannot be reached ({_first_line(unreachable or error)}) and there is no complete "
            "copy in the cache.",
            "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(
            f"{name}: the download does not fit: {error}.",
            "Free some space in the cache folder and run the same command again; it goes on.",
        )
    return HubUnreachableError(
        f"{name}: the download from {hub} failed: {type(error).__name__}: {_first_line(error)}.",
        "Run the same command again; it goes on where it stopped.",
    )


_EXPLANATIONS: tuple[tuple[type[Exception], str, str], ...] = (
    (  # before its base class
        GatedRepoError,
        "{name}: {hub} gives it only to users who accepted its terms.",
        "Accept them at {hub}/{name}, then log in with `hf auth login` or set HF_TOKEN.",
    ),
    (
        RepositoryNotFoundError,
        "{name}: neither a local folder nor a repository that {hub} shows you.",
        "Check the spelling; for a private repository log in with `hf auth login` or set HF_TOKEN.",
    ),
    (
        RevisionNotFoundError,
        "{name}: {hub} has no revision {revision!r} of it.",
        "Give a branch, a tag or a whole commit.",
    ),
    (
        HFValidationError,
        "{name!r} is neither a local folder nor a hub id.",
        "Give the folder that holds config.json, or a hub id such as google-bert/bert-base-uncased.",
    ),
)
_ANSWERS = tuple(cause for cause, _, _ in _EXPLANATIONS)
