"""Channels beyond the library: limits of time, the signal that ended a command, no message after the last."""

from __future__ import annotations

import threading
import time
from typing import Any

import paramiko
from paramiko.channel import Channel
from paramiko.common import MSG_CHANNEL_CLOSE, MSG_CHANNEL_REQUEST, cMSG_CHANNEL_REQUEST
from paramiko.message import Message


class UnansweredError(Exception):
    """The server lives, but did not answer a request, or took no input, in time."""


def request(channel: Channel, kind: str, what: str, timeout_s: float) -> None:
    """Have a command (``exec``) or a ``subsystem`` begun on a channel; the library's own calls wait for the
    answer without a limit. Source: RFC 4254, section 6.5.

    Raises: UnansweredError, paramiko.SSHException when it is refused, what the connection ended with.
    """
    inner: Any = channel
    message = Message()
    message.add_byte(cMSG_CHANNEL_REQUEST)
    message.add_int(inner.remote_chanid)
    message.add_string(kind)
    message.add_boolean(True)
    message.add_string(what)
    inner._event_pending()
    inner.transport._send_user_message(message)
    answered = channel.event.wait(0 if channel.closed else timeout_s)
    if not answered and channel.closed:
        raise paramiko.SSHException("Channel closed.")  # before it was waited for
    if not answered:
        raise UnansweredError(f"the ssh server answered no {kind} request within {timeout_s:.3g} s")
    inner._wait_for_event()


def send(channel: Channel, data: bytes, timeout_s: float) -> None:
    """Send all of it; nobody else may be sending. Unlike ``settimeout`` the limit is for all of it, and for
    no other thread. Raises: UnansweredError, OSError."""
    until = time.monotonic() + timeout_s
    while data:
        with channel.out_buffer_cv:
            room = channel.out_buffer_cv.wait_for(
                lambda: channel.out_window_size > 0 or channel.closed,
                until - time.monotonic(),
            )
        if not room:
            raise UnansweredError(f"the ssh server took no input within {timeout_s:.3g} s")
        data = data[channel.send(data) :]


class ChannelTransport(paramiko.Transport):
    """A transport whose channels know the signal that ended a command (RFC 4254, section 6.10), and say
    nothing after their farewell.
    """

    _channel_handler_table = {  # noqa: RUF012 - the library's own way to hang in a handler
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
        MSG_CHANNEL_REQUEST: lambda channel, message: _note_signal(channel, message),
    }

    def open_channel(self, *args: Any, **options: Any) -> Channel:
        """As of the library."""
        channel = super().open_channel(*args, **options)
        channel._set_transport(_UntilClosed(self))  # type: ignore[attr-defined]
        return channel


class _UntilClosed:
    """A transport as one channel sees it: what comes after the channel's CLOSE is dropped.

    The library decides under the channel's lock what to send, and sends it without: an end of input or a
    window can so follow the answer to the server's CLOSE. OpenSSH then ends the whole connection ("packet
    referred to nonexistent channel"), or takes it for the next channel of that number.
    """

    def __init__(self, transport: ChannelTransport) -> None:
        self._transport = transport
        self._order = threading.Lock()
        self._closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _send_user_message(self, message: Message) -> None:
        with self._order:
            if self._closed:
                return
            self._closed = message.asbytes()[0] == MSG_CHANNEL_CLOSE
            self._transport._send_user_message(message)  # type: ignore[attr-defined]


def _note_signal(channel: Channel, message: Message) -> None:
    start = message.packet.tell()
    if message.get_text() == "exit-signal":
        message.get_boolean()
        channel.exit_signal = message.get_text()[:40]  # type: ignore[attr-defined]
        channel.status_event.set()
        return
    message.packet.seek(start)
    channel._handle_request(message)  # type: ignore[attr-defined]
