"""The journal: a record is there whole or not at all; nothing is skipped, nothing is read twice."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.journal import Journal, scan
from sti_runtime.errors import FormatError
from sti_runtime.journal_format import LINE_CAP_BYTES, encode_line, parse_lines, read_records
from sti_runtime.messages import (
    EvaluateResult,
    FailureRecord,
    JournalRecord,
    Payload,
    ResultRecord,
)

BOOT = "0b2c3d4e-0000-0000-0000-000000000000"


def failure(unit: int, what: str = "a\nmulti-line cause, with ünïcode") -> FailureRecord:
    return FailureRecord(type="failure", unit=unit, error="ResourceError", what=what, remedy="")


def line(seq: int, payload: Payload | None = None) -> bytes:
    payload = failure(seq) if payload is None else payload
    return encode_line(JournalRecord(seq=seq, boot_id=BOOT, wall_ns=seq, payload=payload))


def sequence(data: bytes) -> list[int]:
    return [record.seq for record in parse_lines(data, offset=0, source="j").records]


LINES = [line(seq) for seq in range(5)]
WHOLE = b"".join(LINES)


def test_a_line_is_seq_crc_and_canonical_json() -> None:
    seq, crc, body = LINES[3].rstrip(b"\n").split(b" ", 2)
    assert (seq, len(crc), body[:1]) == (b"3", 8, b"{")
    assert LINES[3].count(b"\n") == 1


def test_append_then_read_back(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    journal = Journal(path, BOOT)
    for unit in range(3):
        journal.append(failure(unit))
    journal.close()
    found = read_records(path, 0)
    assert [record.payload for record in found.records] == [failure(unit) for unit in range(3)]
    assert (found.next_offset, found.problem) == (path.stat().st_size, None)


@given(st.integers(0, len(WHOLE)))
def test_cut_anywhere_resumes_at_the_first_record_that_was_not_whole(cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.log"
        path.write_bytes(WHOLE[:cut])
        whole = WHOLE[:cut].count(b"\n")
        journal = Journal(path, BOOT)
        assert journal.state.failed == set(range(whole))
        for unit in range(whole, 5):
            journal.append(failure(unit))
        journal.close()
        assert sequence(path.read_bytes()) == [0, 1, 2, 3, 4]


@given(st.integers(0, len(WHOLE) - len(LINES[4]) - 2), st.integers(1, 255))
def test_a_flipped_byte_before_the_last_record_is_an_error_not_a_gap(position: int, mask: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[position] ^= mask
    found = parse_lines(bytes(damaged), offset=0, source="j")
    assert found.problem is not None
    assert found.next_offset <= position
    assert [record.seq for record in found.records] == list(range(len(found.records)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.log"
        path.write_bytes(damaged)
        with pytest.raises(FormatError):
            scan(path)


@given(st.lists(st.integers(0, len(WHOLE)), max_size=12))
def test_a_tailing_reader_gets_each_record_once_however_the_file_grows(cuts: list[int]) -> None:
    offset, taken = 0, list[int]()
    for size in [*sorted(cuts), len(WHOLE)]:
        found = parse_lines(WHOLE[offset:size], offset=offset, source="j", expect_seq=len(taken))
        assert found.problem is None
        taken.extend(record.seq for record in found.records)
        offset = found.next_offset
    assert taken == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"5 0000", LINES[4][:-9] + b"\n", b"\0\0\n\0\0\n"])
def test_what_a_crash_leaves_at_the_end_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "journal.log"
    path.write_bytes(b"".join(LINES[:4]) + tail)
    journal = Journal(path, BOOT)
    journal.append(failure(4))
    journal.close()
    assert sequence(path.read_bytes()) == [0, 1, 2, 3, 4]


def test_a_bad_last_line_is_left_for_the_next_read(tmp_path: Path) -> None:
    torn = LINES[1][:-9] + b"\n"
    found = parse_lines(LINES[0] + torn, offset=0, source="j")
    assert (len(found.records), found.next_offset, found.problem) == (1, len(LINES[0]), None)
    found = parse_lines(torn + LINES[2], offset=len(LINES[0]), source="j")
    assert found.problem is not None


def test_a_wrong_number_is_an_error(tmp_path: Path) -> None:
    found = parse_lines(LINES[0] + LINES[2], offset=0, source="j")
    assert found.problem is not None
    assert "record 2 where 1 was due" in found.problem.what
    found = parse_lines(LINES[2], offset=99, source="j", expect_seq=1)
    assert found.problem is not None
    path = tmp_path / "journal.log"
    path.write_bytes(LINES[0] + LINES[2])
    with pytest.raises(FormatError, match="record 2 where 1 was due"):
        scan(path)


def test_a_valid_checksum_over_an_invalid_record_is_an_error_at_once() -> None:
    import zlib

    body = b'{"seq":0,"boot_id":"x","wall_ns":-1,"payload":{"type":"end"}}'
    found = parse_lines(b"0 %08x %s\n" % (zlib.crc32(body), body), offset=0, source="j")
    assert found.problem is not None
    assert "wall_ns" in str(found.problem)


def test_more_torn_bytes_than_one_append_can_leave_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    path.write_bytes(LINES[0] + b"x" * (LINE_CAP_BYTES + 1))
    with pytest.raises(FormatError, match="more than one append"):
        scan(path)


def test_a_reader_past_the_end_is_told_to_start_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    path.write_bytes(LINES[0])
    with pytest.raises(FormatError, match="Read it again from the start"):
        read_records(path, len(LINES[0]) + 1)


def evaluation(loss: float, rows: int) -> ResultRecord:
    predictions = (1,) * rows
    result = EvaluateResult(
        kind="evaluate", content_digest="0" * 64, rows=rows, correct=0, loss=loss, predictions=predictions
    )
    return ResultRecord(type="result", unit=0, result=result)


def test_a_result_that_is_not_finite_or_too_long_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.log", BOOT)
    for payload in (evaluation(float("nan"), 1), evaluation(0.5, 2_200_000)):
        with pytest.raises(FormatError):
            journal.append(payload)
    assert journal.path.stat().st_size == 0
    journal.append(evaluation(0.5, 1))
    journal.close()
    assert scan(journal.path).done == {0}


@settings(max_examples=50)
@given(st.text(max_size=200))
def test_any_text_survives_the_round_trip(what: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in what):
        return
    found = parse_lines(line(0, failure(0, what)), offset=0, source="j")
    assert found.records[0].payload == failure(0, what)
