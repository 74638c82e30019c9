"""Reading task data, splitting it, its file, and the metrics."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from sti_runtime.checkpoint import import_checkpoint
from sti_runtime.errors import DatasetError, FormatError, ResourceError
from sti_runtime.model_store import Model
from sti_runtime.tasks import (
    PRESETS,
    Example,
    TaskData,
    TaskDataInfo,
    TaskSpec,
    accuracy,
    build_task_data,
    count_correct,
    discover_labels,
    load_task_data,
    mean_cross_entropy,
    read_tsv,
    row_losses,
    save_task_data,
    split_digest,
    split_profile,
    store_task_data,
    task_data_bytes,
    task_data_digest,
    user_task,
    wilson_interval,
)
from tests.checkpoints import random_model, write_checkpoint

GLUE = Path(os.environ.get("STIFARM_SHARED", Path(__file__).parents[2].parent / "shared")) / "data" / "glue"
SST2 = PRESETS["sst-2"]
QQP = PRESETS["qqp"]


def tsv(path: Path, content: str | bytes) -> Path:
    """A file with exactly this content."""
    file = path / "data.tsv"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


# ------------------------------------------------------------------ TSV


def test_quotes_are_text_and_lines_end_in_line_feeds(tmp_path: Path) -> None:
    file = tsv(
        tmp_path,
        '\ufeffsentence\tlabel\r\n"a ""quoted" one\t1\r\n\n it\'s\u2028one\x0cline\x85 \t0\nlast\t1',
    )
    assert read_tsv(file, SST2) == [
        Example('"a ""quoted" one', None, 1),
        Example(" it's\u2028one\x0cline\x85 ", None, 0),
        Example("last", None, 1),
    ]


@given(
    cells=st.lists(
        st.tuples(*[st.text(st.characters(exclude_characters="\t\r\n\0", codec="utf-8"), max_size=8)] * 2),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_equals_the_csv_module(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]]
) -> None:
    rows = [(first, second, "1") for first, second in cells]
    file = tmp_path_factory.mktemp("tsv") / "data.tsv"
    lines = ["question1\tquestion2\tis_duplicate", *("\t".join(row) for row in rows)]
    file.write_bytes("\n".join(lines).encode())
    with file.open(encoding="utf-8", newline="") as stream:
        expected = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    assert [[e.text, e.pair, "1"] for e in read_tsv(file, QQP)] == expected


def test_pairs_and_columns_in_any_order(tmp_path: Path) -> None:
    file = tsv(tmp_path, "is_duplicate\tquestion2\tid\tquestion1\n0\tb\t7\ta\n")
    assert read_tsv(file, QQP) == [Example("a", "b", 0)]


def test_unlabelled_rows(tmp_path: Path) -> None:
    file = tsv(tmp_path, "sentence\nfine\n")
    assert read_tsv(file, SST2, labelled=False) == [Example("fine", None, -1)]


def test_labels_are_discovered_in_sorted_order(tmp_path: Path) -> None:
    file = tsv(tmp_path, "text\tmood\nx\tsad\ny\thappy\nz\tsad\n")
    spec = user_task(file, name="moods", text_columns=["text"], label_column="mood")
    assert spec.labels == ("happy", "sad")
    assert [e.label for e in read_tsv(file, spec)] == [1, 0, 1]
    given_labels = user_task(
        file, name="moods", text_columns=["text"], label_column="mood", labels=["sad", "happy", "so-so"]
    )
    assert [e.label for e in read_tsv(file, given_labels)] == [0, 1, 0]


def refusal(path: Path, spec: TaskSpec = SST2) -> str:
    """The message of the DatasetError; it must name the file and a remedy."""
    with pytest.raises(DatasetError) as caught:
        read_tsv(path, spec)
    assert str(path) in caught.value.what
    assert caught.value.remedy
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", ["is empty"]),
        (b"\n\n", ["is empty"]),
        (b"sentence\tlabel\n", ["no rows"]),
        (b"text\tlabel\nx\t1\n", ["line 1", "no column 'sentence'", "'text', 'label'"]),
        (b"sentence\tlabel\tlabel\nx\t1\t1\n", ["line 1", "more than one column 'label'"]),
        (b"sentence\tlabel\nx\t1\ny\tmaybe\n", ["line 3", "unknown label 'maybe'", "'0', '1'"]),
        (b"sentence\tlabel\nx\t1\ny 1\n", ["line 3", "1 columns", "has 2"]),
        (b"sentence\tlabel\nx\t1\t2\n", ["line 2", "3 columns"]),
        (b"sentence\tlabel\nx\t1\nabc\xff\t1\n", ["line 3", "byte 4", "UTF-8"]),
    ],
)
def test_unreadable_data_names_line_and_cause(tmp_path: Path, content: bytes, named: list[str]) -> None:
    message = refusal(tsv(tmp_path, content))
    for part in named:
        assert part in message


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.tsv")
    assert "directory" in refusal(tmp_path)


def test_specs_that_make_no_task(tmp_path: Path) -> None:
    file = tsv(tmp_path, "text\tmood\nx\tsad\n")
    with pytest.raises(DatasetError, match="one label only, 'sad'"):
        discover_labels(file, "mood")
    with pytest.raises(DatasetError, match="text_columns"):
        user_task(file, name="m", text_columns=[], label_column="mood", labels=["sad", "happy"])
    with pytest.raises(DatasetError, match="max_tokens"):
        user_task(file, name="m", text_columns=["text"], label_column="mood", labels=["a", "b"], max_tokens=0)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("task", "folder", "rows", "ones"),
    [
        ("sst-2", "SST-2", 872, 444),
        ("rte", "RTE", 277, 131),
        ("qnli", "QNLI", 5463, 2761),
        ("qqp", "QQP", 7600, 2729),
    ],
)
def test_glue_presets(task: str, folder: str, rows: int, ones: int) -> None:
    if not GLUE.is_dir():
        pytest.skip(f"needs the GLUE data in {GLUE}; set STIFARM_SHARED")
    examples = read_tsv(GLUE / folder / "dev.tsv", PRESETS[task])
    assert len(examples) == rows
    assert sum(e.label for e in examples) == ones
    assert all((e.pair is None) == (task == "sst-2") for e in examples)


# ------------------------------------------------------------------ splits


@given(texts=st.lists(st.text(max_size=3), min_size=2, max_size=40), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=60, deadline=None)
def test_profile_split_is_a_deterministic_partition(texts: list[str], seed: int, data: st.DataObject) -> None:
    examples = [Example(text, None, i % 2) for i, text in enumerate(texts)]
    rows = data.draw(st.integers(1, len(texts) - 1))
    try:
        train, profile = split_profile(examples, rows, seed)
    except DatasetError:
        assert len(set(texts)) < len(texts)  # only repeats can make the number unreachable
        return
    assert len(profile) == rows
    assert sorted([*train, *profile], key=repr) == sorted(examples, key=repr)
    assert not {e.text for e in train} & {e.text for e in profile}
    assert split_profile(examples, rows, seed) == (train, profile)


def test_profile_split_depends_on_the_seed_and_keeps_order() -> None:
    examples = [Example(f"{i:03}", None, 0) for i in range(100)]
    train, profile = split_profile(examples, 20, 1)
    assert split_profile(examples, 20, 2)[1] != profile
    assert [e.text for e in profile] == sorted(e.text for e in profile)
    assert [e.text for e in train] == sorted(e.text for e in train)
    assert split_digest(profile) == split_digest(split_profile(examples, 20, 1)[1])
    assert split_digest(profile) != split_digest(train)


@pytest.mark.parametrize("rows", [0, 10, 11])
def test_impossible_profile_split(rows: int) -> None:
    with pytest.raises(DatasetError, match=f"of {rows} rows"):
        split_profile([Example(str(i), None, 0) for i in range(10)], rows, 0)


# ------------------------------------------------------------------ task data


INFO = TaskDataInfo(
    format="stifarm-task-data", version=1, task="moods", split="dev", labels=("sad", "happy"), tokenizer=None
)


def small(**changes: Any) -> TaskData:
    """Two rows of three tokens."""
    arrays = {
        "input_ids": np.array([[2, 7, 3], [2, 3, 0]], np.int32),
        "token_types": np.zeros((2, 3), np.int32),
        "lengths": np.array([3, 2], np.int32),
        "labels": np.array([1, -1], np.int32),
    }
    return TaskData(info=INFO, **(arrays | changes))


def test_task_data_survives_its_file_byte_for_byte(tmp_path: Path) -> None:
    digest = save_task_data(small(), tmp_path / "deep" / "data.safetensors")
    content = (tmp_path / "deep" / "data.safetensors").read_bytes()
    assert digest == hashlib.sha256(content).hexdigest() == task_data_digest(small())
    loaded = load_task_data(tmp_path / "deep" / "data.safetensors")
    assert loaded.info == INFO
    for name in ("input_ids", "token_types", "lengths", "labels"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(small(), name))
    assert (loaded.rows, loaded.tokens) == (2, 3)
    path = store_task_data(loaded, tmp_path)
    assert path.name == f"{digest}.safetensors"
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_task_data_file_has_the_documented_header() -> None:
    content = task_data_bytes(small())
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header["input_ids"] | {"data_offsets": 0} == {"dtype": "I32", "shape": [2, 3], "data_offsets": 0}
    assert json.loads(header["__metadata__"]["stifarm"])["labels"] == ["sad", "happy"]
    assert list(header["__metadata__"]) == ["stifarm"]


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": np.array([2, 0], np.int32)},
        {"labels": np.array([-2, 0], np.int32)},
        {"labels": np.array([0], np.int32)},
        {"lengths": np.array([4, 1], np.int32)},
        {"lengths": np.array([0, 1], np.int32)},
        {"lengths": np.array([1, 1], np.int64)},
        {"input_ids": np.array([[2, -7, 3], [2, 3, 0]], np.int32)},
        {"token_types": np.zeros((2, 4), np.int32)},
        {"input_ids": np.zeros((0, 3), np.int32)},
    ],
)
def test_task_data_that_does_not_fit_itself(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(FormatError, match=name):
        small(**changes)


def test_damaged_task_data_files(tmp_path: Path) -> None:
    whole = task_data_bytes(small())
    file = tmp_path / "data.safetensors"
    foreign = save({"weights": np.zeros(3, np.float32)})
    bad_labels = whole.replace(np.array([1, -1], "<i4").tobytes(), np.array([9, -1], "<i4").tobytes())
    assert bad_labels != whole
    no_info = whole.replace(b"stifarm-task-data", b"stifarm-task-dat_")
    for content in (b"", whole[:9], whole[:-1], whole + b"x", foreign, bad_labels, no_info):
        file.write_bytes(content)
        with pytest.raises(FormatError, match=str(file)):
            load_task_data(file)
    file.unlink()
    with pytest.raises(FormatError, match="cannot be read"):
        load_task_data(file)


def test_task_data_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="could not be written"):
        save_task_data(small(), tmp_path / "file" / "data.safetensors")


@pytest.mark.parametrize(("family", "types"), [("bert", [0, 1]), ("distilbert", [0]), ("roberta", [0])])
def test_rows_are_tokenized_for_the_model(tmp_path: Path, family: str, types: list[int]) -> None:
    model: Model = import_checkpoint(write_checkpoint(tmp_path, random_model(family, "encoder")))
    assert model.tokenizer_json is not None
    spec = QQP.model_copy(update={"max_tokens": 12})
    examples = [Example("the film", "the film is not bad", 1), Example("the", "a", 0)]
    data = build_task_data(examples, spec, "dev", config=model.config, tokenizer_json=model.tokenizer_json)
    assert (data.rows, data.tokens) == (2, 12)
    assert data.labels.tolist() == [1, 0]
    assert sorted(set(data.token_types.ravel().tolist())) == types
    assert data.info.tokenizer == model.info.tokenizer_digest
    assert (data.input_ids[1, data.lengths[1] :] == model.config.pad_id).all()
    too_long = QQP.model_copy(update={"max_tokens": 21})
    with pytest.raises(DatasetError, match="allows 20"):
        build_task_data(examples, too_long, "dev", config=model.config, tokenizer_json=model.tokenizer_json)
    with pytest.raises(DatasetError, match="no rows"):
        build_task_data([], spec, "dev", config=model.config, tokenizer_json=model.tokenizer_json)


# ------------------------------------------------------------------ metrics


def test_cross_entropy_equals_torch_and_leaves_unknown_rows_out() -> None:
    generator = np.random.default_rng(3)
    logits = (generator.normal(size=(50, 4)) * 30).astype(np.float32)
    labels = generator.integers(-1, 4, size=50).astype(np.int32)
    known = labels >= 0
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[known]).double(), torch.from_numpy(labels[known]).long()
    )
    assert math.isclose(mean_cross_entropy(logits, labels), float(expected), rel_tol=1e-12)
    assert np.isnan(row_losses(logits, labels)[~known]).all()
    assert mean_cross_entropy(logits[::-1], labels[::-1]) == mean_cross_entropy(logits, labels)
    predictions = logits.argmax(1)
    assert count_correct(predictions, labels) == (int((predictions == labels).sum()), int(known.sum()))


def test_huge_logits_do_not_overflow() -> None:
    assert mean_cross_entropy(np.array([[1e4, 0.0]], np.float32), [1]) == 1e4


def test_wilson_interval_against_published_values() -> None:
    # Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29 by the score method without continuity correction.
    for correct, rows, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson_interval(correct, rows)
        assert found == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1.0


@given(rows=st.integers(1, 10_000), data=st.data())
def test_accuracy_lies_in_its_interval(rows: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, rows))
    score = accuracy(correct, rows)
    assert 0 <= score.low <= score.value <= score.high <= 1


def test_no_labelled_rows() -> None:
    with pytest.raises(DatasetError):
        accuracy(0, 0)
    with pytest.raises(DatasetError):
        mean_cross_entropy(np.zeros((2, 2), np.float32), [-1, -1])
