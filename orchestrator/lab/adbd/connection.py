"""One host's connection: handshake, authorisation, and its streams.

A thread of the connection reads packets; each service has threads of its own. A peer that breaks the
protocol loses the connection and nothing else.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.lab.adbd.auth import PublicKey, add_line, new_token, offered_line, parse_key, trusted_keys
from orchestrator.lab.adbd.features import Offer
from orchestrator.lab.adbd.packets import (
    AUTH,
    CLSE,
    CNXN,
    HEADER_BYTES,
    OKAY,
    OPEN,
    PAYLOAD_LEAST_BYTES,
    PUBLIC_KEY,
    SIGNATURE,
    TOKEN,
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
from orchestrator.lab.adbd.stream import Buffer, Stream

STREAMS_CAP = 256
SERVICE_NAME_CAP_BYTES = 256 << 10
"""The longest command line; Android's own limit is what a kernel takes as one argument."""

Service = Callable[[Stream, bytes], None]
"""Serves a stream to its end; the connection closes it afterwards."""


@dataclass(frozen=True)
class Trust:
    """Who may connect. ``keys``: the list of trusted ones; ``offered``: where strangers' keys are noted.

    ``required`` False: anyone, as with a phone whose build does not ask.
    """

    required: bool
    keys: Path
    offered: Path


class Connection:
    """Serves one socket until it ends; ``find`` gives the service of a name, or None."""

    def __init__(
        self,
        link: socket.socket,
        offer: Offer,
        banner: bytes,
        trust: Trust,
        find: Callable[[bytes], Service | None],
    ) -> None:
        self._link = link
        self._offer = offer
        self._banner = banner
        self._trust = trust
        self._find = find
        self._sending = threading.Lock()
        self._state = threading.Lock()
        self._version = VERSION_CHECKSUM
        self._payload_bytes = PAYLOAD_LEAST_BYTES
        self._token = b""
        self._agreed = (self._version, self._payload_bytes)
        self._key: PublicKey | None = None  # whose signature, or offer, this connection rests on
        self._introduced = False
        self._online = False
        self._streams: dict[int, Stream] = {}
        self._last_id = 0

    def serve(self) -> None:
        """Read and answer packets until the peer leaves. Raises: ProtocolError when it misbehaves."""
        header = bytearray(HEADER_BYTES)
        try:
            while self._receive(header):
                packet = parse_header(header, cap_bytes=self._offer.payload_bytes)
                payload = memoryview(bytearray(packet.length))
                if not self._receive(payload):
                    return
                self._check(packet, payload)
                self._handle(packet, payload)
        except OSError:
            return  # the link is gone
        finally:
            self._drop_streams()
            with contextlib.suppress(OSError):
                self._link.close()

    def trust_changed(self) -> None:
        """Look at the list of keys again: let in who is trusted now, cut off who is no longer."""
        if self._key is None or not self._trust.required:
            return
        trusted = self._key in trusted_keys(self._trust.keys)
        if trusted and not self._online:
            with contextlib.suppress(OSError):
                self._introduce()
        elif not trusted and self._online:
            self.cut()

    def cut(self) -> None:
        """End the connection from another thread."""
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)

    # ------------------------------------------------------------- packets

    def _receive(self, buffer: bytearray | memoryview) -> bool:
        """Fill a buffer from the link; False when the peer has left."""
        view = memoryview(buffer)
        while view:
            count = self._link.recv_into(view)
            if not count:
                return False
            view = view[count:]
        return True

    def _send(self, command: int, arg0: int, arg1: int, payload: Buffer = b"") -> None:
        """Send a packet. Raises: OSError for what opens a connection; later the reading side sees it."""
        checksum = checksum_of(payload) if self._version < VERSION else 0
        header = pack_header(command, arg0, arg1, len(payload), checksum)
        with self._sending:
            sent = self._link.sendmsg([header, payload])
            if sent < HEADER_BYTES:
                self._link.sendall(header[sent:])
            self._link.sendall(memoryview(payload)[max(sent - HEADER_BYTES, 0) :])

    def _send_of_stream(self, command: int, arg0: int, arg1: int, payload: Buffer) -> None:
        try:
            self._send(command, arg0, arg1, payload)
        except OSError:
            self.cut()  # the reader ends, and with it every stream

    def _check(self, packet: Header, payload: memoryview) -> None:
        """Raises: ProtocolError for a wrong checksum."""
        if self._version >= VERSION:
            return
        # A host that reconnects leaves checksums out until it hears again with whom it speaks.
        if not packet.checksum and not self._online:
            return
        if checksum_of(payload) != packet.checksum:
            raise ProtocolError("a payload that does not match its checksum")

    def _handle(self, packet: Header, payload: memoryview) -> None:
        if packet.command == CNXN:
            self._connect(packet)
        elif packet.command == AUTH and self._introduced:
            self._authorise(packet, bytes(payload))
        elif not self._online:
            raise ProtocolError("a packet before the connection")
        elif packet.command == OPEN:
            self._open(packet, payload)
        else:
            self._of_stream(packet, payload)

    def _of_stream(self, packet: Header, payload: memoryview) -> None:
        with self._state:
            stream = self._streams.get(packet.arg1)
        if stream is None or (stream.remote != packet.arg0 and packet.command != CLSE):
            # Late packets of a closed stream are common; a write is answered so that its sender learns it.
            if packet.command == WRTE:
                self._send(CLSE, 0, packet.arg0)
            return
        if packet.command == WRTE:
            stream.deliver(payload)
        elif packet.command == OKAY:
            stream.acknowledged()
        elif packet.command == CLSE and packet.arg0 in (0, stream.remote):
            with self._state:
                self._streams.pop(stream.local, None)
            stream.peer_closed()

    # ----------------------------------------------------------- handshake

    def _connect(self, packet: Header) -> None:
        self._drop_streams()
        self._online = False
        version, payload_bytes = agree(
            packet.arg0,
            packet.arg1,
            own_version=self._offer.version,
            own_payload_bytes=self._offer.payload_bytes,
        )
        self._introduced = True
        self._agreed = (version, payload_bytes)
        if self._trust.required:
            self._ask()
        else:
            self._introduce()

    def _ask(self) -> None:
        self._token = new_token()
        self._send(AUTH, TOKEN, 0, self._token)

    def _introduce(self) -> None:
        with self._state:
            if self._online:
                return
            self._online = True
        # The introduction itself still carries its checksum, for the peer does not know us yet.
        self._send(CNXN, self._offer.version, self._offer.payload_bytes, self._banner)
        self._version, self._payload_bytes = self._agreed

    def _authorise(self, packet: Header, payload: bytes) -> None:
        if self._online or not self._trust.required:
            return
        if packet.arg0 == SIGNATURE:
            keys = trusted_keys(self._trust.keys)
            self._key = next((key for key in keys if key.signed(self._token, payload)), None)
            if self._key is None:
                self._ask()  # the host tries its next key
            else:
                self._introduce()
        elif packet.arg0 == PUBLIC_KEY:
            line = offered_line(payload)
            if line is None:
                raise ProtocolError("an offered key that is none")
            # A phone asks its owner now. Ours waits until the key is in the list.
            self._key = parse_key(line)
            with contextlib.suppress(OSError):  # a full disk: nobody can be authorised then
                add_line(self._trust.offered, line)
            self.trust_changed()

    # ------------------------------------------------------------- streams

    def _open(self, packet: Header, payload: memoryview) -> None:
        name = bytes(payload).rstrip(b"\0")
        service = None
        if packet.arg0 and b"\0" not in name and len(name) <= SERVICE_NAME_CAP_BYTES:
            service = self._find(name)
        with self._state:
            if service is None or len(self._streams) >= STREAMS_CAP:
                stream = None
            else:
                self._last_id += 1
                stream = Stream(self._send_of_stream, self._last_id, packet.arg0, self._payload_bytes)
                self._streams[stream.local] = stream
        if stream is None or service is None:
            self._send(CLSE, 0, packet.arg0)
            return
        self._send(OKAY, stream.local, stream.remote)
        threading.Thread(target=self._serve_stream, args=(service, stream, name), daemon=True).start()

    def _serve_stream(self, service: Service, stream: Stream, name: bytes) -> None:
        try:
            service(stream, name)
        finally:
            with self._state:
                self._streams.pop(stream.local, None)
            stream.close()

    def _drop_streams(self) -> None:
        with self._state:
            streams, self._streams = tuple(self._streams.values()), {}
        for stream in streams:
            stream.peer_closed()
