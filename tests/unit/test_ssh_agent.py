"""An ssh-agent that does not do its part: each way is an error in words, within its limit."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.transports.ssh_agent import AgentTroubleError, SshAgent

LIST = b"\0\0\0\1\x0b"


@contextmanager
def listening(path: Path, answer: bytes | None) -> Iterator[str]:
    """An agent that answers whatever it is asked with this; None: it hangs up at once."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as link:
                if answer is not None:
                    link.recv(len(LIST))
                    link.sendall(answer)
                    link.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        yield str(path)
        thread.join()


@pytest.mark.parametrize(
    ("answer", "trouble"),
    [
        (None, "closed the connection|ended the connection"),
        (b"", "does not answer within"),
        (b"\0\0\0\5\x0c\0\0", "does not answer within"),
        (b"\0\0\0\1\5", "does not list its keys"),
        (b"\0\0\0\5\x0c\xff\xff\xff\xff", "does not list its keys"),
        (b"\xff\xff\xff\xff", "an answer of 4294967295 bytes"),
        (b"\0\0\0\0", "an answer of 0 bytes"),
        (b"\0\0\0\x16\x0c\0\0\0\1\0\0\0\x09\0\0\0\1\xff\0\0\0\0\0\0\0\0", "offers what is no key"),
    ],
)
def test_an_agent_that_does_not_do_its_part(tmp_path: Path, answer: bytes | None, trouble: str) -> None:
    with listening(tmp_path / "agent", answer) as path:
        agent = SshAgent(path, answer_s=0.2)
        try:
            with pytest.raises(AgentTroubleError, match=trouble):
                agent.offered()
        finally:
            agent.close()


def test_no_agent_has_no_keys(tmp_path: Path) -> None:
    assert SshAgent("").offered() == ()
    assert SshAgent(str(tmp_path / "gone")).offered() == ()


def test_an_agent_without_keys(tmp_path: Path) -> None:
    with listening(tmp_path / "agent", b"\0\0\0\5\x0c\0\0\0\0") as path:
        agent = SshAgent(path, answer_s=60)
        assert agent.offered() == ()
        agent.close()
