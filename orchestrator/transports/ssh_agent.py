"""The user's ssh-agent: the keys it holds, signing with them, and a limit on each of its answers.

Source: draft-ietf-sshm-ssh-agent (the SSH agent protocol), 3 to 5.
"""

from __future__ import annotations

import socket
import time

from paramiko import SSHException
from paramiko.agent import AgentKey
from paramiko.message import Message

ANSWER_S = 10.0
SIGN_S = 60.0
"""Somebody may have to confirm that a key is used, or to touch it."""

_LIST, _LISTED, _SIGN, _SIGNED = 11, 12, 13, 14
_MESSAGE_CAP_BYTES = 1 << 18
_KEY_LEAST_BYTES = 8


class AgentTroubleError(SSHException):
    """The ssh-agent is there and does not do its part. Its text has the ssh-agent as its subject."""


class SshAgent:
    """The ssh-agent that listens at ``path``, asked from the first use on; none where nothing listens there.

    Raises, in each method: AgentTroubleError.
    """

    def __init__(self, path: str, *, answer_s: float = ANSWER_S, sign_s: float = SIGN_S) -> None:
        self.path = path
        self._answer_s, self._sign_s = answer_s, sign_s
        self._link: socket.socket | None = None

    def offered(self) -> tuple[AgentKey, ...]:
        """The keys it offers."""
        if not self._connect():
            return ()
        kind, answer = self._send_message(bytes([_LIST]))
        count = answer.get_int()
        if kind != _LISTED or count * _KEY_LEAST_BYTES > len(answer.asbytes()):
            raise AgentTroubleError("does not list its keys")
        try:
            return tuple(self._key(answer) for _ in range(count))
        except (ValueError, SSHException) as error:
            raise AgentTroubleError(f"offers what is no key ({error})") from error

    def close(self) -> None:
        """End the connection."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _key(self, answer: Message) -> AgentKey:
        blob, comment = answer.get_binary(), answer.get_binary()
        return AgentKey(self, blob, comment.decode(errors="replace"))  # type: ignore[arg-type]

    def _connect(self) -> bool:
        if self._link is None and self.path:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            link.settimeout(self._answer_s)
            try:
                link.connect(self.path)
            except TimeoutError as error:
                link.close()
                raise AgentTroubleError(f"takes no connection within {self._answer_s:g} s") from error
            except OSError:  # the one that was there has ended, or is another user's
                link.close()
                return False
            self._link = link
        return self._link is not None

    def _send_message(self, message: bytes | Message) -> tuple[int, Message]:
        """Ask it something; (kind, answer). Its name is what ``AgentKey`` signs by."""
        asked = message if isinstance(message, bytes) else message.asbytes()
        limit_s = self._sign_s if asked[0] == _SIGN else self._answer_s
        if self._link is None:
            raise AgentTroubleError("is not connected any more")
        try:
            self._link.settimeout(limit_s)
            self._link.sendall(len(asked).to_bytes(4, "big") + asked)
            deadline = time.monotonic() + limit_s
            size = int.from_bytes(self._exactly(4, deadline), "big")
            if not 0 < size <= _MESSAGE_CAP_BYTES:
                raise AgentTroubleError(f"gives an answer of {size} bytes")
            answer = Message(self._exactly(size, deadline))
        except TimeoutError as error:
            raise AgentTroubleError(f"does not answer within {limit_s:g} s") from error
        except OSError as error:
            raise AgentTroubleError(f"ended the connection ({error.strerror})") from error
        kind = answer.get_byte()[0]
        if asked[0] == _SIGN and kind != _SIGNED:
            raise AgentTroubleError("refuses to sign with a key that it offers")
        return kind, answer

    def _exactly(self, count: int, deadline: float) -> bytes:
        assert self._link is not None
        data = b""
        while len(data) < count:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._link.settimeout(left_s)
            more = self._link.recv(count - len(data))
            if not more:
                raise AgentTroubleError("closed the connection instead of answering")
            data += more
        return data
