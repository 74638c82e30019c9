"""Tokenization against Transformers' tokenizers, and the tokenizers it must refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import BertTokenizer, RobertaTokenizer

from sti_runtime.errors import CheckpointError, FormatError, InputError
from sti_runtime.model import Family, ModelConfig
from sti_runtime.tokenization import TokenizedRows, encode, tokenizer_from_folder
from tests.checkpoints import VOCAB, write_byte_vocab, write_vocab

TRICKY: list[tuple[str, str | None]] = [
    ("The film is not very good.", None),
    ("", None),
    ("CAFÉ, Café, cafe\u0301!", "深圳 is a 深圳film"),
    ("  tab\tand\u00a0nbsp\u200b zero\u0000width ", "bad\u2028bad"),
    ("[SEP] not [MASK] special? [CLS]", "good"),
    ("unknownword ẞ İstanbul ﬁlm 😀", None),
    ("very " * 40, "bad " * 3),
    ("good", "bad , " * 40),
    ("very " * 40, "bad " * 40),
]


def config(family: Family, **changes: Any) -> ModelConfig:
    """A configuration with the test vocabulary's size; RoBERTa's padding is id 1."""
    roberta = family == "roberta"
    values: dict[str, Any] = {
        "family": family,
        "layers": 1,
        "heads": 1,
        "hidden": 4,
        "ffn": 4,
        "vocab": VOCAB,
        "positions": 64,
        "position_offset": 2 if roberta else 0,
        "token_types": 1 if roberta else 2,
        "layer_norm_eps": 1e-5,
        "activation": "gelu",
        "pad_id": 1 if roberta else 0,
        "head": None,
    }
    return ModelConfig(**(values | changes))


def made(folder: Path, family: Family, **changes: Any) -> bytes:
    """The folder's tokenizer.json."""
    content = tokenizer_from_folder(folder, config(family, **changes))
    assert content is not None
    return content


def assert_same_rows(found: TokenizedRows, reference: Any, texts: list[tuple[str, str | None]]) -> None:
    """Ids, types and lengths equal what the Transformers tokenizer gives."""
    length = found.input_ids.shape[1]
    for row, (first, second) in enumerate(texts):
        expected = reference(  # as a batch of one: called on two strings, it drops an empty second text
            [first],
            None if second is None else [second],
            max_length=length,
            truncation="longest_first",
            padding="max_length",
            return_token_type_ids=True,
        )
        assert found.input_ids[row].tolist() == expected["input_ids"][0], (first, second)
        assert found.token_types[row].tolist() == expected["token_type_ids"][0], (first, second)
        assert found.lengths[row] == sum(expected["attention_mask"][0])


@pytest.mark.parametrize("length", [4, 7, 16, 64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    ],
)
def test_vocab_txt_equals_bert_tokenizer(tmp_path: Path, options: dict[str, Any], length: int) -> None:
    write_vocab(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    reference = BertTokenizer.from_pretrained(tmp_path)
    assert_same_rows(encode(made(tmp_path, "bert"), TRICKY, length), reference, TRICKY)


@pytest.mark.parametrize("options", [{}, {"add_prefix_space": True}])
def test_vocab_and_merges_equal_roberta_tokenizer(tmp_path: Path, options: dict[str, Any]) -> None:
    write_byte_vocab(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    reference = RobertaTokenizer.from_pretrained(tmp_path, **options)
    texts: list[tuple[str, str | None]] = [
        ("the other mother  bathes", None),
        ("the other", " the</s>moth"),
        ("", None),
        ("the " * 30, "moth " * 30),
        ("honest .", "  some ! lads"),
    ]
    for length in (6, 16, 64):
        assert_same_rows(encode(made(tmp_path, "roberta"), texts, length), reference, texts)


@given(
    texts=st.lists(st.tuples(st.text(max_size=30), st.none() | st.text(max_size=30)), min_size=1, max_size=4),
    length=st.integers(4, 24),
)
@settings(max_examples=60, deadline=None)
def test_any_text_equals_bert_tokenizer(
    bert: tuple[bytes, Any], texts: list[tuple[str, str | None]], length: int
) -> None:
    content, reference = bert
    assert_same_rows(encode(content, texts, length), reference, texts)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Any]:
    """Our tokenizer.json and Transformers' tokenizer of the test vocabulary."""
    folder = tmp_path_factory.mktemp("bert")
    write_vocab(folder)
    return made(folder, "bert"), BertTokenizer.from_pretrained(folder)


def test_special_tokens_from_the_settings(tmp_path: Path) -> None:
    write_vocab(tmp_path)
    vocab = (tmp_path / "vocab.txt").read_text(encoding="utf-8")
    (tmp_path / "vocab.txt").write_text(vocab.replace("[CLS]", "<s>"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cls_token '\[CLS\]'"):
        made(tmp_path, "bert")
    (tmp_path / "special_tokens_map.json").write_text('{"cls_token": {"content": "<s>", "lstrip": false}}')
    assert encode(made(tmp_path, "bert"), [("film", None)], 4).input_ids.tolist() == [[2, 6, 3, 0]]


def test_existing_tokenizer_json_is_taken_and_its_padding_fixed(tmp_path: Path) -> None:
    write_vocab(tmp_path)
    first = made(tmp_path, "bert")
    foreign = Tokenizer.from_str(first.decode())
    foreign.enable_truncation(5)
    foreign.enable_padding(direction="left", pad_id=4, pad_token="[MASK]", length=9)
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "tokenizer.json").write_text(foreign.to_str(), encoding="utf-8")
    assert made(tmp_path, "bert") == first


def test_rows_have_a_fixed_length_and_type(bert: tuple[bytes, Any]) -> None:
    rows = encode(bert[0], [("film", None), ("the film is bad", "a")], 8)
    for array in (rows.input_ids, rows.token_types):
        assert array.shape == (2, 8)
        assert array.dtype == np.int32
    assert rows.lengths.tolist() == [3, 8]
    assert encode(bert[0], [], 8).input_ids.shape == (0, 8)


def test_no_room_for_text(bert: tuple[bytes, Any]) -> None:
    assert encode(bert[0], [("film", None)], 3).lengths.tolist() == [3]
    with pytest.raises(InputError, match="4 or more"):
        encode(bert[0], [("film", "bad")], 3)


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    write_vocab(tmp_path)
    with pytest.raises(CheckpointError, match="ids up to 66"):
        made(tmp_path, "bert", vocab=60)
    (tmp_path / "tokenizer.json").write_text(Tokenizer(models.WordLevel({"a": 5}, "a")).to_str())
    with pytest.raises(CheckpointError, match="no token with id 0"):
        made(tmp_path, "bert")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"do_basic_tokenize": false}'),
        ("vocab.txt", b"[PAD]\n\xff\n"),
        ("vocab.txt", b""),
    ],
)
def test_damaged_bert_files(tmp_path: Path, name: str, content: bytes) -> None:
    write_vocab(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        made(tmp_path, "bert")


@pytest.mark.parametrize(
    ("name", "content"), [("vocab.json", b"{"), ("merges.txt", b"#version: 0.2\nq q q\n")]
)
def test_damaged_roberta_files(tmp_path: Path, name: str, content: bytes) -> None:
    write_byte_vocab(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        made(tmp_path, "roberta")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_missing_roberta_files(tmp_path: Path, name: str) -> None:
    write_byte_vocab(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=r"vocab\.json with merges\.txt"):
        made(tmp_path, "roberta")


def test_damaged_stored_tokenizer() -> None:
    with pytest.raises(FormatError, match="does not parse"):
        encode(b"{", [("film", None)], 8)


def test_stored_tokenizer_without_padding() -> None:
    bare = Tokenizer(models.WordLevel({"a": 0}, "a")).to_str().encode()
    with pytest.raises(FormatError, match="padding"):
        encode(bare, [("a", None)], 8)
