"""Ctrl-C held over a block, and one that Python dropped coming again."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from orchestrator.interrupts import held_interrupts, lost_interrupts_return
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


def test_what_ray_makes_of_sigterm_is_the_exit_code_of_one_that_was_terminated() -> None:
    program = (
        "import sys\n"
        "from orchestrator.cli import app, main\n"
        "app.command('end')(lambda: sys.exit(15))\n"
        "main(['end'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, check=False)
    assert done.returncode == 143, done.stderr.decode()
