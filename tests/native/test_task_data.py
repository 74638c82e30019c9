"""Task data in C: what Python writes is read, whatever Python refuses is refused, and nothing crashes."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.toolchain import SOURCE_FOLDERS
from sti_runtime.errors import FormatError
from sti_runtime.task_data import TaskData, TaskDataInfo, load_task_data, task_data_bytes
from tests.native.sanitized import ENVIRONMENT, build_sanitized

RUNTIME, AGENT = SOURCE_FOLDERS
BASE = [RUNTIME / name for name in ("base.c", "digest.c", "json.c", "json_fields.c", "json_write.c")]
FORMAT_ERROR = 3
ROWS, TOKENS = 5, 7


@pytest.fixture(scope="module")
def program() -> str:
    parts = [AGENT / name for name in ("task_data.c",)]
    program = Path(__file__).with_name("task_data_program.c")
    return str(build_sanitized("address,undefined", program, *parts, runtime=BASE))


def task_data() -> TaskData:
    random_ = np.random.default_rng(1)
    info = TaskDataInfo(
        format="stifarm-task-data",
        version=1,
        task="größer",
        split="dev",
        labels=("no", "yes"),
        tokenizer="0" * 64,
    )
    return TaskData(
        info=info,
        input_ids=random_.integers(0, 2**31 - 1, (ROWS, TOKENS), np.int32),
        token_types=random_.integers(0, 256, (ROWS, TOKENS), np.int32),
        lengths=random_.integers(1, TOKENS + 1, ROWS, np.int32),
        labels=random_.integers(-1, 2, ROWS, np.int32),
    )


def read(program: str, path: Path) -> tuple[int, str]:
    done = subprocess.run(
        [program, str(path)], capture_output=True, text=True, timeout=120, check=False, env=ENVIRONMENT
    )
    return done.returncode, done.stdout.strip()


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: object, data: bytes, padding: int = 0) -> bytes:
    text = json.dumps(header).encode() + b" " * padding
    return struct.pack("<Q", len(text)) + text + data


def test_every_value_arrives(program: str, tmp_path: Path) -> None:
    data = task_data()
    path = tmp_path / "x"
    path.write_bytes(task_data_bytes(data))
    code, text = read(program, path)
    found = json.loads(text)
    assert code == 0
    assert found["labels"] == data.labels.tolist()
    assert [row["ids"] for row in found["rows"]] == data.input_ids.tolist()
    assert [row["types"] for row in found["rows"]] == data.token_types.tolist()
    assert [row["length"] for row in found["rows"]] == data.lengths[:, None].tolist()


def test_tensors_in_another_order_and_a_padded_header_are_read(program: str, tmp_path: Path) -> None:
    header, data = split(task_data_bytes(task_data()))
    path = tmp_path / "x"
    path.write_bytes(joined(dict(reversed(header.items())), data, padding=5))
    assert load_task_data(path).rows == ROWS
    assert read(program, path)[0] == 0


def changed(name: str, **fields: Any) -> bytes:
    header, data = split(task_data_bytes(task_data()))
    header[name] |= fields
    return joined(header, data)


def with_info(**fields: Any) -> bytes:
    header, data = split(task_data_bytes(task_data()))
    info = json.loads(header["__metadata__"]["stifarm"]) | fields
    header["__metadata__"]["stifarm"] = json.dumps(info)
    return joined(header, data)


def with_value(name: str, value: int) -> bytes:
    header, data = split(task_data_bytes(task_data()))
    begin = header[name]["data_offsets"][0]
    return joined(header, data[:begin] + struct.pack("<i", value) + data[begin + 4 :])


def without(name: str) -> bytes:
    header, data = split(task_data_bytes(task_data()))
    del header[name]
    return joined(header, data)


def overlapping() -> bytes:
    header, data = split(task_data_bytes(task_data()))
    header["labels"]["data_offsets"] = header["lengths"]["data_offsets"]
    return joined(header, data)


WHOLE = task_data_bytes(task_data())
BAD = {
    "empty": b"",
    "seven bytes": WHOLE[:7],
    "header cut off": WHOLE[:100],
    "data cut off": WHOLE[:-1],
    "longer than it says": WHOLE + b"\0",
    "huge header": struct.pack("<Q", 2**63) + WHOLE[8:],
    "header beyond the file": struct.pack("<Q", len(WHOLE)) + WHOLE[8:],
    "no JSON": struct.pack("<Q", 4) + b"none",
    "a list": joined([1], b""),
    "no tensor": without("labels"),
    "one tensor more": joined(split(WHOLE)[0] | {"more": split(WHOLE)[0]["labels"]}, split(WHOLE)[1]),
    "no metadata": without("__metadata__"),
    "other metadata": joined(split(WHOLE)[0] | {"__metadata__": {"x": "y"}}, split(WHOLE)[1]),
    "another type": changed("input_ids", dtype="F32"),
    "another rank": changed("lengths", shape=[1, ROWS]),
    "another shape": changed("token_types", shape=[TOKENS, ROWS]),
    "negative shape": changed("input_ids", shape=[-ROWS, -TOKENS]),
    "shape that overflows": changed("input_ids", shape=[2**32, 2**32]),
    "shape of fractions": changed("input_ids", shape=[5.0, 7]),
    "offsets beyond the file": changed("labels", data_offsets=[0, 2**40]),
    "offsets backwards": changed("labels", data_offsets=[ROWS * 4, 0]),
    "overlapping tensors": overlapping(),
    "another format": with_info(format="other"),
    "a later version": with_info(version=2),
    "one label": with_info(labels=["x"]),
    "labels that are no texts": with_info(labels=["x", 1]),
    "a tokenizer that is no digest": with_info(tokenizer="x"),
    "negative token": with_value("input_ids", -1),
    "token type of 256": with_value("token_types", 256),
    "length of nothing": with_value("lengths", 0),
    "length of more than all": with_value("lengths", TOKENS + 1),
    "a label of no name": with_value("labels", 2),
}


@pytest.mark.parametrize("case", BAD)
def test_what_python_refuses_is_refused(program: str, tmp_path: Path, case: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(BAD[case])
    with pytest.raises(FormatError):
        load_task_data(path)
    code, text = read(program, path)
    assert (code, str(path) in text) == (FORMAT_ERROR, True)


def test_sizes_beyond_64_bits_do_not_fit_a_file_of_any_size(program: str) -> None:
    """Nearly 2^62 elements of 4 bytes, in a sparse file of as many bytes; only in memory can one be made."""
    header, _ = split(WHOLE)
    header["input_ids"] |= {"shape": [2**31 - 1, 2**31 - 1], "data_offsets": [0, 2**62]}
    file = os.memfd_create("task-data")
    try:
        os.write(file, joined(header, b""))
        os.truncate(file, 2**62 + 2**20)
        done = subprocess.run(
            [program, f"/proc/self/fd/{file}"], pass_fds=[file], capture_output=True, text=True, timeout=120,
            check=False, env=ENVIRONMENT,
        )  # fmt: skip
    finally:
        os.close(file)
    assert (done.returncode, done.stderr) == (FORMAT_ERROR, "")
    assert "input_ids has a shape that does not fit the file." in done.stdout


def test_a_file_that_is_not_there_is_named(program: str, tmp_path: Path) -> None:
    code, text = read(program, tmp_path / "absent")
    assert code == FORMAT_ERROR
    assert text == f"{tmp_path / 'absent'}: cannot be read: No such file or directory."


def test_flipped_bytes_never_crash_it(program: str, tmp_path: Path) -> None:
    rng = random.Random(5)
    path = tmp_path / "x"
    header_end = 8 + struct.unpack("<Q", WHOLE[:8])[0]
    for _ in range(150):
        content = bytearray(WHOLE)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(header_end)] = rng.randrange(256)
        path.write_bytes(content)
        code, _ = read(program, path)
        assert code in (0, FORMAT_ERROR)
