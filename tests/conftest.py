"""What holds for every test."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Generator, Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

# A suite started in the background of a script inherits an ignored SIGINT and would hand it on to the
# processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes is the machine's affair: it may be loaded, or slow to flush what it writes.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


COMPLETE = "STIFARM_COMPLETE"
"""Environment variable of runs on machines where everything that can be installed is: nothing but what such a
machine cannot be given may then be a reason to skip a test, and any other is a failure."""

CANNOT_BE_GIVEN = re.compile(
    "needs root|CUDA|direct IO|proven to come from storage|no storage behind|needs a tmpfs|tmpfs is not"
    "|cgroup|control group|namespaces|under an emulator|hit the emulator|this CPU has no|x86[-_]64"
    "|no native agent|no agent runs on|binfmt_misc|strace cannot trace|cannot be mounted|HF_HUB_OFFLINE"
    "|STIFARM_SHARED|this machine has not"
)
"""Reasons to skip that are the machine's own: its kernel, processor, file systems, rights, and data."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skipped test is a failed one where nothing lacks that can be installed."""
    report = yield
    if report.skipped and os.environ.get(COMPLETE) and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if CANNOT_BE_GIVEN.search(reason) is None:
            report.outcome, report.longrepr = "failed", f"{COMPLETE} is set, but: {reason}"
    return report


LONGEST = (
    "test_main_job.py",
    "test_lab.py",
    "test_chaos.py",
    "test_ray_pool.py",
    "test_lab_hosts.py",
    "test_agent_process.py",
    "test_agent_logits.py",
    "test_fit.py",
    "test_engine.py",
    "test_lab_faults.py",
)
"""Files that take longest, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin first, and unit tests come last: workers that take file after file then end
    together (with pytest-xdist's --no-loadscope-reorder; it would begin with the files of most tests)."""

    def rank(item: pytest.Item) -> int:
        folder, name = item.path.parts[-2:]
        if name in LONGEST:
            return LONGEST.index(name)
        return len(LONGEST) + (folder == "unit")

    items.sort(key=rank)


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """The command line logs to the standard error of its test, which is closed when the next one runs."""
    yield
    structlog.reset_defaults()
