"""Text to token ids, by the tokenizers library; done on the host, devices get ids.

A model carries one ``tokenizer.json`` whatever it came with: an existing one, a BERT ``vocab.txt``, or
RoBERTa's ``vocab.json`` and ``merges.txt``. It states the padding token and no truncation.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers import decoders as token_decoders

from sti_runtime.errors import CheckpointError, FormatError, InputError
from sti_runtime.model import ModelConfig

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_BATCH = 1024  # rows tokenized at once: bounds the memory of the library's objects

I32 = npt.NDArray[np.int32]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenizedRows:
    """Token ids of R rows, padded on the right to L: ids and types [R, L], real tokens [R]."""

    input_ids: I32
    token_types: I32
    lengths: I32


def encode(tokenizer_json: bytes, texts: Sequence[tuple[str, str | None]], max_tokens: int) -> TokenizedRows:
    """Tokenize texts and pairs to rows of exactly ``max_tokens``, special tokens included.

    Too long rows lose tokens at the end of their longer text (longest first).
    Shapes: R = len(texts), L = max_tokens.
    Raises: FormatError for a damaged tokenizer; InputError when ``max_tokens`` leaves no room for text.
    """
    tokenizer = _parse(tokenizer_json)
    padding = tokenizer.padding
    if padding is None:
        raise FormatError(
            "This tokenizer.json states no padding token.",
            "It is not from a model folder; import the model again.",
        )
    special = tokenizer.num_special_tokens_to_add(any(second is not None for _, second in texts))
    if max_tokens <= special:
        raise InputError(
            f"{max_tokens} tokens leave no room for text beside {special} special ones.",
            f"Set max_tokens to {special + 1} or more.",
        )
    tokenizer.enable_truncation(max_tokens, strategy="longest_first")
    tokenizer.no_padding()
    input_ids = np.full((len(texts), max_tokens), padding["pad_id"], dtype=np.int32)
    token_types = np.zeros((len(texts), max_tokens), dtype=np.int32)
    lengths = np.zeros(len(texts), dtype=np.int32)
    for start in range(0, len(texts), _BATCH):
        batch = [
            first if second is None else (first, second) for first, second in texts[start : start + _BATCH]
        ]
        for row, encoding in enumerate(tokenizer.encode_batch(batch), start):
            length = len(encoding.ids)
            input_ids[row, :length] = encoding.ids
            token_types[row, :length] = encoding.type_ids
            lengths[row] = length
    return TokenizedRows(input_ids=input_ids, token_types=token_types, lengths=lengths)


def tokenizer_from_folder(folder: Path, config: ModelConfig, *, required: bool = True) -> bytes | None:
    """The ``tokenizer.json`` of a checkpoint folder, made from its older files where need be.

    Raises: CheckpointError when files are missing (unless not ``required``: then None), malformed, or
    of another vocabulary than the model's.
    """
    family = "roberta" if config.family == "roberta" else "bert"
    if (folder / "tokenizer.json").is_file():
        tokenizer = _load_existing(folder / "tokenizer.json")
    elif all((folder / name).is_file() for name in _NEEDED[family]):
        tokenizer = _BUILDERS[family](folder, _settings(folder))
    elif required:
        raise CheckpointError(
            f"{folder}: there is no tokenizer.json and no {' with '.join(_NEEDED[family])}.",
            "Put the checkpoint's tokenizer files beside config.json.",
        )
    else:
        log.warning("%s: imported without a tokenizer, it has no tokenizer files", folder)
        return None
    return _normalised(tokenizer, config, folder)


def _parse(tokenizer_json: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_str(tokenizer_json.decode())
    except Exception as error:  # the library raises bare Exception for whatever does not parse
        raise FormatError(
            f"A tokenizer.json does not parse: {error}.",
            "The model folder is damaged; import the model again.",
        ) from error


def _load_existing(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(file.read_bytes().decode())
    except Exception as error:  # as above
        raise CheckpointError(
            f"{file}: not a file the tokenizers library reads: {error}.", "Download the file again."
        ) from error


def _normalised(tokenizer: Tokenizer, config: ModelConfig, folder: Path) -> bytes:
    """Fix padding, drop truncation, check ids against the embedding table."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.vocab:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {largest}, the model {config.vocab} embedding rows.",
            "The tokenizer is another model's; use the one the checkpoint was trained with.",
        )
    pad_token = tokenizer.id_to_token(config.pad_id)
    if pad_token is None:
        raise CheckpointError(
            f"{folder}: the tokenizer has no token with id {config.pad_id}, the model's pad_token_id.",
            "The tokenizer is another model's; use the one the checkpoint was trained with.",
        )
    tokenizer.no_truncation()
    tokenizer.enable_padding(direction="right", pad_id=config.pad_id, pad_token=pad_token)
    return tokenizer.to_str().encode()


# ------------------------------------------------------------------ older tokenizer files


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; tokens written as objects become their text."""
    merged: dict[str, Any] = {}
    for name in (SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE):
        file = folder / name
        if not file.is_file():
            continue
        try:
            value = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file}: not readable as JSON: {error}.", "Download the file again."
            ) from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{file}: holds no JSON object.", "Download the file again.")
        merged |= value
    return {
        key: value["content"]
        if key.endswith("_token") and isinstance(value, dict) and "content" in value
        else value
        for key, value in merged.items()
    }


def _special_tokens(settings: Mapping[str, Any], defaults: Mapping[str, str]) -> dict[str, str]:
    return {name: str(settings.get(name) or default) for name, default in defaults.items()}


def _add_special(tokenizer: Tokenizer, tokens: Mapping[str, str], folder: Path) -> None:
    """Mark special tokens; one the vocabulary lacks must not get a new id past the embedding table."""
    for name in ("cls_token", "sep_token", "unk_token", "pad_token"):
        if tokenizer.token_to_id(tokens[name]) is None:
            raise CheckpointError(
                f"{folder}: the vocabulary lacks the {name} {tokens[name]!r}.",
                f"Name the right token in {TOKENIZER_CONFIG_FILE}, or download the vocabulary again.",
            )
    known = dict.fromkeys(token for token in tokens.values() if tokenizer.token_to_id(token) is not None)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in known])


def _from_vocab_txt(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """WordPiece with BERT's normaliser. Source: transformers' BertTokenizer."""
    if settings.get("do_basic_tokenize") is False:
        raise CheckpointError(
            f"{folder / TOKENIZER_CONFIG_FILE}: do_basic_tokenize = false is not supported.",
            "Save the tokenizer with Transformers' save_pretrained; its tokenizer.json is read.",
        )
    file = folder / "vocab.txt"
    try:
        lines = file.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not UTF-8: {error}.", "Download the file again.") from error
    if lines[-1] == "":
        lines.pop()
    vocab = {token.rstrip("\r"): index for index, token in enumerate(lines)}
    tokens = _special_tokens(
        settings,
        {
            "unk_token": "[UNK]",
            "sep_token": "[SEP]",
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "mask_token": "[MASK]",
        },
    )
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=tokens["unk_token"]))
    _add_special(tokenizer, tokens, folder)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = token_decoders.WordPiece(prefix="##")
    cls, sep = tokens["cls_token"], tokens["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
    )
    return tokenizer


def _from_vocab_and_merges(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE. Source: transformers' RobertaTokenizer."""
    try:
        vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        model = models.BPE(vocab, merges)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{folder}: vocab.json and merges.txt do not make a tokenizer: {error}.",
            "Download both files again.",
        ) from error
    tokens = _special_tokens(
        settings,
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "cls_token": "<s>",
            "mask_token": "<mask>",
        },
    )
    tokenizer = Tokenizer(model)
    _add_special(tokenizer, tokens, folder)
    prefix = bool(settings.get("add_prefix_space", False))
    trim = bool(settings.get("trim_offsets", True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = token_decoders.ByteLevel()
    cls, sep = tokens["cls_token"], tokens["sep_token"]
    tokenizer.post_processor = processors.RobertaProcessing(
        (sep, vocab[sep]), (cls, vocab[cls]), trim_offsets=trim, add_prefix_space=prefix
    )
    return tokenizer


_NEEDED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"bert": ("vocab.txt",), "roberta": ("vocab.json", "merges.txt")}
)
_BUILDERS: Mapping[str, Callable[[Path, Mapping[str, Any]], Tokenizer]] = MappingProxyType(
    {"bert": _from_vocab_txt, "roberta": _from_vocab_and_merges}
)
