"""What the units of one job share: the bundle, the task data, the engine, the executor. Opened on use."""

from __future__ import annotations

import logging
import sys
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from agent.errors import EngineImportError
from agent.spool import Spool
from agent.throttle import throttle_for
from sti_runtime.bundle import Bundle
from sti_runtime.embedding_rows import Request
from sti_runtime.errors import InputError
from sti_runtime.messages import Job, ProbeUnit, Unit
from sti_runtime.pipeline import Executor
from sti_runtime.task_data import TaskData, load_task_data

if TYPE_CHECKING:
    from sti_runtime.torch_engine import TorchEngine

_ENGINE = "sti_runtime.torch_engine"

log = logging.getLogger(__name__)


class Context:
    """One job in one spool. Properties raise InputError when the job names no such thing."""

    def __init__(self, job: Job, spool: Path) -> None:
        self.job = job
        self.spool = spool
        self.throttle = throttle_for(job.emulation)

    @cached_property
    def bundle(self) -> Bundle:
        """The job's bundle. Raises: FormatError if it is not in the spool or damaged."""
        if self.job.bundle is None:
            raise InputError(f"Job {self.job.id} names no bundle, but a unit needs one.")
        return Bundle.open(Spool(self.spool).bundle(self.job.bundle))

    @cached_property
    def task_data(self) -> TaskData:
        """The job's task data. Raises: FormatError if it is not in the spool or damaged."""
        if self.job.task_data is None:
            raise InputError(f"Job {self.job.id} names no task data, but a unit needs rows.")
        return load_task_data(Spool(self.spool).task(self.job.task_data))

    def prepare(self, unit: Unit) -> None:
        """Import the engine, which takes seconds, before the unit holds the machine; a probe needs none.

        Raises: as ``bundle``, which is opened first; EngineImportError.
        """
        if isinstance(unit, ProbeUnit) or _ENGINE in sys.modules:
            return
        log.info("Importing the engine for bundle %s", self.bundle.digest)
        try:
            import_module(_ENGINE)
        except ImportError as error:
            log.exception("The engine cannot be imported")
            raise EngineImportError(f"the engine cannot be imported: {error}") from error

    @cached_property
    def engine(self) -> TorchEngine:
        """The engine, with the bundle's resident parameters loaded."""
        from sti_runtime.torch_engine import TorchEngine, best_device

        device = best_device()
        log.info("The torch engine computes on %s", device)
        return TorchEngine(self.bundle, threads=self.job.threads, device=device)

    @cached_property
    def executor(self) -> Executor:
        """The executor, slowed as the job says."""
        return Executor(
            self.bundle,
            self.engine,
            threads=self.job.threads,
            queue_depth=self.job.queue_depth,
            throttle=self.throttle,
        )

    def request(self, row: int) -> Request:
        """One row of the task data. Raises: InputError if there is no such row."""
        data = self.task_data
        if row >= len(data.lengths):
            raise InputError(f"Row {row} of task data that has {len(data.lengths)} rows was asked for.")
        return Request(
            input_ids=data.input_ids[row], token_types=data.token_types[row], length=int(data.lengths[row])
        )

    def close(self) -> None:
        """Stop the threads and close the files that were opened."""
        for name in ("executor", "engine"):
            if name in self.__dict__:
                self.__dict__.pop(name).close()
