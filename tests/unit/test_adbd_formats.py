"""The adb daemon's packets, messages and requests, and what it does with malformed ones."""

from __future__ import annotations

import base64
import os
import stat
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.lab.adbd import shell_format, sync_format
from orchestrator.lab.adbd.auth import OFFER_CAP_BYTES, add_line, offered_line, parse_key, trusted_keys
from orchestrator.lab.adbd.compression import CODECS, CodecError
from orchestrator.lab.adbd.features import PRESETS, banner, offer_of, parse_properties
from orchestrator.lab.adbd.packets import (
    CNXN,
    PAYLOAD_CAP_BYTES,
    VERSION,
    VERSION_CHECKSUM,
    WRTE,
    Header,
    ProtocolError,
    agree,
    checksum_of,
    pack_header,
    parse_header,
)

WORD = st.integers(0, 0xFFFFFFFF)


@given(arg0=WORD, arg1=WORD, length=st.integers(0, PAYLOAD_CAP_BYTES), checksum=WORD)
def test_a_header_is_read_as_it_was_written(arg0: int, arg1: int, length: int, checksum: int) -> None:
    packed = pack_header(WRTE, arg0, arg1, length, checksum)
    assert parse_header(packed) == Header(WRTE, arg0, arg1, length, checksum)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "a header of 0 bytes"),
        (bytes(24), "magic"),
        (struct.pack("<6I", WRTE, 1, 1, 0, 0, WRTE), "magic"),
        (struct.pack("<6I", 7, 1, 1, 0, 0, 7 ^ 0xFFFFFFFF), "unknown command"),
        (pack_header(WRTE, 1, 1, PAYLOAD_CAP_BYTES + 1, 0), "payload of 1048577 bytes"),
    ],
)
def test_a_header_that_is_none_is_refused(data: bytes, cause: str) -> None:
    with pytest.raises(ProtocolError, match=cause):
        parse_header(data)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_header_or_refused(data: bytes) -> None:
    try:
        header = parse_header(data)
    except ProtocolError:
        return
    assert pack_header(header.command, header.arg0, header.arg1, header.length, header.checksum) == data


def test_the_checksum_is_the_sum_of_the_bytes() -> None:
    data = os.urandom(70_000)
    assert checksum_of(memoryview(data)) == sum(data)
    assert pack_header(CNXN, 0, 0, 0, 0)[:4] == b"CNXN"


def test_two_sides_agree_on_the_lesser() -> None:
    own = {"own_version": VERSION, "own_payload_bytes": 1 << 20}
    assert agree(VERSION_CHECKSUM, 256 << 10, **own) == (VERSION_CHECKSUM, 256 << 10)
    assert agree(VERSION + 7, 1 << 30, **own) == (VERSION, 1 << 20)
    for version, payload_bytes in ((VERSION_CHECKSUM - 1, 4096), (VERSION, 4095), (VERSION, 0)):
        with pytest.raises(ProtocolError):
            agree(version, payload_bytes, **own)


# ---------------------------------------------------------------- features


def test_presets_age_as_phones_did() -> None:
    assert PRESETS["old"].features == ()
    assert PRESETS["old"].version == VERSION_CHECKSUM
    assert "shell_v2" in PRESETS["stat"].features
    assert not any(name.startswith("sendrecv") for name in PRESETS["stat"].features)
    assert set(PRESETS["stat"].features) < set(PRESETS["modern"].features)


def test_an_offer_is_a_preset_or_a_list() -> None:
    assert offer_of("stat") is PRESETS["stat"]
    assert offer_of("shell_v2,stat_v2").features == ("shell_v2", "stat_v2")
    with pytest.raises(ValueError, match="'shell_v3' is neither a preset"):
        offer_of("shell_v2,shell_v3")


def test_the_banner_names_the_product_and_what_it_can() -> None:
    properties = parse_properties("# ro.x=1\nro.product.model=A = B\nnothing\n=x\n")
    assert properties == {"ro.product.model": "A = B"}
    assert banner(properties, ("shell_v2", "cmd")) == b"device::ro.product.model=A = B;features=shell_v2,cmd"


# ------------------------------------------------------------ authorisation


def android_line(key: rsa.RSAPublicKey, comment: str = " me@host") -> str:
    numbers = key.public_numbers()
    modulus = numbers.n.to_bytes(256, "little")
    return (
        base64.b64encode(struct.pack("<II256s256sI", 64, 0, modulus, bytes(256), numbers.e)).decode()
        + comment
    )


def test_only_the_keys_own_signature_of_the_token_counts() -> None:
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    token = os.urandom(20)
    signature = private.sign(token, padding.PKCS1v15(), Prehashed(hashes.SHA1()))
    key = parse_key(android_line(private.public_key()))
    assert key is not None
    assert key.signed(token, signature)
    assert not key.signed(bytes(20), signature)
    assert not key.signed(token, signature[:-1])
    assert not key.signed(token, bytes(256))
    assert not key.signed(token, b"\xff" * 256)
    assert not key.signed(token, b"")


@given(st.text(max_size=200))
def test_a_line_that_is_no_key_is_none(text: str) -> None:
    assert parse_key(text) is None


def test_offered_keys_are_cleaned_and_kept_once(tmp_path: Path) -> None:
    line = android_line(rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key())
    assert offered_line(line.encode() + b"\0") == line
    assert offered_line(line.encode() + b"\x1b[2J\n") == f"{line} [2J"
    assert offered_line(line.encode() + b"x" * OFFER_CAP_BYTES) is None
    assert offered_line(b"\xff\xfe\0") is None
    keys = tmp_path / "misc/adb_keys"
    for _ in range(2):
        add_line(keys, line)
    assert keys.read_text() == f"{line}\n"
    keys.write_text(f"# comment\n\n{line}\nbroken\n")
    assert len(trusted_keys(keys)) == 1
    assert trusted_keys(tmp_path / "none") == ()


# ------------------------------------------------------------------- shell


@pytest.mark.parametrize(
    ("name", "pty", "packets", "command"),
    [
        (b"shell:ls -l", False, False, b"ls -l"),
        (b"shell:", True, False, b""),
        (b"shell,v2,raw:a:b", False, True, b"a:b"),
        (b"shell,v2,TERM=xterm-256color,pty:top", True, True, b"top"),
        (b"exec:cat", False, False, b"cat"),
    ],
)
def test_shell_requests(name: bytes, pty: bool, packets: bool, command: bytes) -> None:
    request = shell_format.parse_request(name, pty_only=False, packets_offered=True)
    assert request is not None
    assert (request.pty, request.packets, request.command) == (pty, packets, command)


def test_an_old_phone_gives_terminals_and_knows_no_packets() -> None:
    old = {"pty_only": True, "packets_offered": False}
    request = shell_format.parse_request(b"shell:id", **old)
    assert request is not None
    assert request.pty
    assert shell_format.parse_request(b"shell,v2:id", **old) is None
    executed = shell_format.parse_request(b"exec:id", **old)
    assert executed is not None
    assert not executed.pty


@pytest.mark.parametrize(
    "name", [b"shell", b"exec:", b"exec,v2:id", b"shell,v9:id", b"shell,TERM=a b:id", b"tcp:1"]
)
def test_what_is_no_shell_request(name: bytes) -> None:
    assert shell_format.parse_request(name, pty_only=False, packets_offered=True) is None


def test_shell_packets_are_bounded() -> None:
    assert shell_format.parse_head(shell_format.pack_head(1, 5)) == (1, 5)
    assert shell_format.parse_head(shell_format.pack_head(1, shell_format.PACKET_CAP_BYTES + 1)) is None
    assert shell_format.parse_window(b"24x80,0x0\0") == (24, 80, 0, 0)
    assert shell_format.parse_window(b"99999x1,0x0") == (65535, 1, 0, 0)
    assert shell_format.parse_window(b"24x80") is None


# -------------------------------------------------------------------- sync


def test_stat_answers_have_the_sizes_of_the_protocol(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    status = path.stat()
    assert struct.unpack("<4s3I", sync_format.stat_1(status))[:3] == (b"STAT", status.st_mode, 5)
    assert sync_format.stat_1(None) == b"STAT" + bytes(12)
    second = sync_format.stat_2(b"STA2", status, 0)
    assert len(second) == 72
    assert struct.unpack("<4sI2Q4IQ3q", second)[4] == status.st_mode
    assert struct.unpack("<4sI", sync_format.stat_2(b"LST2", None, 2)[:8]) == (b"LST2", 2)
    assert len(sync_format.entry(b"n", status, 0, second=True)) == 77
    assert len(sync_format.entry(b"n", status, 0, second=False)) == 21
    assert sync_format.entry(b"n", None, 2, second=False) == b""
    assert len(sync_format.listing_end(second=True)) == 76
    assert len(sync_format.listing_end(second=False)) == 20


def test_names_to_send() -> None:
    mode = stat.S_IFREG | 0o644
    assert sync_format.parse_send_name(f"/a,b/c,{mode}".encode()) == (b"/a,b/c", mode)
    for malformed in (b"", b"/a", b",1", b"/a,", b"/a,-1", b"/a,99999999999", b"/a,0x1"):
        assert sync_format.parse_send_name(malformed) is None


def test_flags_choose_at_most_one_compression() -> None:
    assert sync_format.compression_of(0) == ""
    assert sync_format.compression_of(sync_format.DRY_RUN | 4) == "zstd"
    assert sync_format.compression_of(3) is None
    assert sync_format.compression_of(8) is None


@pytest.mark.parametrize("name", sorted(CODECS))
def test_compressions_give_back_what_they_took_and_refuse_the_rest(name: str) -> None:
    data = os.urandom(100_000) + bytes(3_000_000)
    compressor, decompressor = CODECS[name].compressor(), CODECS[name].decompressor()
    packed = compressor.feed(memoryview(data)) + compressor.finish()
    assert len(packed) < len(data)
    assert not decompressor.complete
    pieces = [piece for start in range(0, len(packed), 65536) for piece in
              decompressor.feed(memoryview(packed)[start : start + 65536])]  # fmt: skip
    assert b"".join(pieces) == data
    assert decompressor.complete
    with pytest.raises(CodecError):
        list(CODECS[name].decompressor().feed(memoryview(b"\xffno stream of anything" * 100)))
