"""Ctrl-C held over a block, and one that Python dropped coming again."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from orchestrator.interrupts import held_interrupts, lost_interrupts_return, terminations_interrupt
from tests.agent_data import REPO


def test_an_interrupt_within_the_block_comes_at_its_end() -> None:
    steps = []

    def block() -> None:
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
            steps.append("after the signal")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert steps == ["after the signal"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # the handler of before is back


def test_a_second_interrupt_goes_through_at_once() -> None:
    steps = []

    def block() -> None:
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
            steps.append("first")
            signal.raise_signal(signal.SIGINT)
            steps.append("second")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert steps == ["first"]


def test_an_interrupt_counts_for_more_than_the_error_it_caused() -> None:
    def block() -> None:
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("a child was interrupted too")

    with pytest.raises(KeyboardInterrupt) as caught:
        block()
    assert isinstance(caught.value.__context__, RuntimeError)


def test_without_an_interrupt_and_in_other_threads_nothing_changes() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with held_interrupts():
        assert signal.getsignal(signal.SIGINT) is not handler
    assert signal.getsignal(signal.SIGINT) is handler
    seen = []

    def other() -> None:
        with held_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [handler]


class Dropping:
    """Ctrl-C in its destructor, from where no exception gets out."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_that_python_drops_comes_again() -> None:
    def block() -> None:
        with lost_interrupts_return():
            dropping = Dropping()
            del dropping
            for _ in range(600):  # the deletion did not raise; the interrupt comes in here
                time.sleep(0.1)

    with pytest.raises(KeyboardInterrupt):
        block()


TERMINATED = """
import contextlib, os, signal
from orchestrator.cli import app, main
from orchestrator.interrupts import held_interrupts

def end() -> None:
    try:
        with held_interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
            print("held")
        print("not reached")
    finally:
        print("unwound")

app.command("end")(end)
main(["end"])
"""


def test_sigterm_unwinds_a_verb_as_an_interrupt_does_and_has_its_own_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TERMINATED], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()) == (143, ["held", "unwound"]), done.stderr
    assert "terminated; run the same command again" in done.stderr


def test_sigterm_is_left_as_it_was() -> None:
    with terminations_interrupt() as came:
        assert callable(signal.getsignal(signal.SIGTERM))
        assert not came()
        with terminations_interrupt(), pytest.raises(KeyboardInterrupt):  # the outer one's
            signal.raise_signal(signal.SIGTERM)
        assert came()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
