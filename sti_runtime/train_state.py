"""What a training phase consists of while it runs: settings, parameters, AdamW's moments, a step counter,
and the file that keeps them across Ctrl-C and kill -9.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from sti_runtime.arithmetic import Arithmetic, Precision
from sti_runtime.early_stop import Best, EarlyStop, PhaseEnd
from sti_runtime.errors import FormatError, ResourceError
from sti_runtime.shard import F32
from sti_runtime.tensor_files import save_tensors_atomically
from sti_runtime.torch_tensors import as_torch

_BETAS = (0.9, 0.999)
_EPS = 1e-8


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """One phase's settings; the defaults are DynaBERT's published ones.

    ``max_steps`` caps the phase (the short mode), the schedule included. ``warmup_share`` of all steps
    warms up, the rest decays to 0. ``threads`` 0 leaves torch's setting. ``checkpoint_every`` in steps.
    ``early_stop`` None: every step is taken and the last weights are the result. ``device``, ``precision``:
    where and how precisely it computes.
    """

    epochs: int = 3
    batch: int = 32
    learning_rate: float = 2e-5
    max_steps: int | None = None
    max_tokens: int = 128
    seed: int = 0
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    threads: int = 0
    checkpoint_every: int = 50
    early_stop: EarlyStop | None = None
    device: str = "cpu"
    precision: Precision = "fp32"


@dataclass(frozen=True, slots=True)
class PhaseStatus:
    """How far a phase is: steps done and in all, loss of the last step.

    ``best_nano``: the best check on held-out rows so far, ``patience_left`` the checks without a gain that
    are still borne; None: nothing is checked. ``ended``: this was its last step, maybe before ``total``.
    """

    phase: str
    done: int
    total: int
    loss: float
    best_nano: int | None = None
    patience_left: int | None = None
    ended: bool = False


class Trainer:
    """Parameters, AdamW moments, the best weights so far and the step counter of one phase.

    ``why``: how it ended; None while it goes on.
    """

    def __init__(self, tensors: Mapping[str, F32], settings: TrainSettings, total: int) -> None:
        self.settings, self.total, self.done, self.loss = settings, total, 0, math.nan
        self.why: Literal["all-steps", "no-gain"] | None = None
        self.arithmetic = Arithmetic(settings.device, settings.precision)
        self.best = None if settings.early_stop is None else Best(settings.early_stop)
        copies = as_torch(tensors, copy=True, device=settings.device)
        self.parameters = {n: t.requires_grad_() for n, t in copies.items()}
        # Biases and norms are not decayed (BERT's code).
        flat = {n for n, t in self.parameters.items() if t.ndim == 1}
        self.names = sorted(self.parameters, key=lambda n: (n in flat, n))
        groups: list[dict[str, Any]] = [
            {"params": [self.parameters[n] for n in self.names if n not in flat]},
            {"params": [self.parameters[n] for n in self.names if n in flat], "weight_decay": 0.0},
        ]
        # On a CPU the fused step takes a sixth of the time (bench.training_step); on CUDA PyTorch has others.
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=_BETAS,
            eps=_EPS,
            weight_decay=settings.weight_decay,
            fused=self.arithmetic.device.type == "cpu" or None,
        )

    def rate(self) -> float:
        """Learning rate of the next step."""
        warmup = max(1, round(self.settings.warmup_share * self.total))
        share = (
            (self.done + 1) / warmup
            if self.done < warmup
            else (self.total - self.done) / max(1, self.total - warmup)
        )
        return self.settings.learning_rate * min(1.0, share)

    def update(self, loss: float, phase: str) -> None:
        """Clip, step, forget the gradients."""
        self.require_finite(loss, f"the loss of step {self.done + 1}", phase)
        rate = self.rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        used = [t for t in self.parameters.values() if t.grad is not None]
        self.arithmetic.step(self.optimizer, used, self.settings.clip_norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.done, self.loss = self.done + 1, loss

    def require_finite(self, loss: float, of: str, phase: str) -> None:
        """Raises: ResourceError when ``loss`` is not finite."""
        if not math.isfinite(loss):
            raise ResourceError(
                f"Training phase {phase} diverged: {of} is {loss}.",
                "Use a smaller learning rate.",
            )

    def end_if_due(self) -> None:
        """End the phase after its last step, or when patience is at its end; the best weights come back."""
        if self.best is not None and self.done < self.total and self.best.patience_left == 0:
            self.why = "no-gain"
        elif self.done >= self.total:
            self.why = "all-steps"
        if self.why is not None and self.best is not None:
            self.best.put_back(self.parameters)

    def status(self, phase: str) -> PhaseStatus:
        """How far the phase is."""
        best = self.best
        return PhaseStatus(
            phase=phase,
            done=self.done,
            total=self.total,
            loss=self.loss,
            best_nano=None if best is None else best.nano,
            patience_left=None if best is None else best.patience_left,
            ended=self.why is not None,
        )

    def end(self, phase: str, epoch_steps: int) -> PhaseEnd:
        """How the phase ended."""
        assert self.why is not None
        best = self.best
        return PhaseEnd(
            phase=phase,
            steps=self.done,
            planned=self.total,
            epoch_steps=epoch_steps,
            why=self.why,
            measure="loss" if best is None else best.rule.measure,
            best_step=None if best is None else best.step,
            best_nano=None if best is None else best.nano,
            overflows=self.arithmetic.overflows,
        )

    def save(self, file: Path) -> None:
        """Write parameters, moments, best weights and counter; of an ended phase only its result."""
        state = {f"p:{n}": t.detach().cpu().numpy() for n, t in self.parameters.items()}
        if self.why is None:
            for name, tensor in self.parameters.items():
                moments = self.optimizer.state.get(tensor)
                if moments:
                    state[f"m:{name}"] = moments["exp_avg"].cpu().numpy()
                    state[f"v:{name}"] = moments["exp_avg_sq"].cpu().numpy()
                    state[f"s:{name}"] = moments["step"].cpu().numpy().reshape(1)
            if self.best is not None:
                state |= {f"b:{name}": tensor.cpu().numpy() for name, tensor in self.best.tensors.items()}
        facts = {
            "done": str(self.done),
            "loss": repr(self.loss),
            "why": self.why or "",
            "arithmetic": self.arithmetic.state(),
        }
        if self.best is not None:
            facts["best"] = self.best.state()
        save_tensors_atomically(file, state, facts)

    def restore(self, file: Path) -> None:
        """Continue from ``file``. Raises: FormatError."""
        try:
            with safe_open(file, framework="np") as archive:
                metadata = archive.metadata() or {}
                state = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
            done, loss, why = int(metadata["done"]), float(metadata["loss"]), metadata["why"]
            self._restore_tensors(state)
            self.arithmetic.restore(metadata["arithmetic"])
            if self.best is not None:
                kept = {n: torch.from_numpy(state[f"b:{n}"]) for n in self.parameters if f"b:{n}" in state}
                on_device = {name: tensor.to(self.arithmetic.device) for name, tensor in kept.items()}
                self.best.restore(metadata["best"], on_device)
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, FormatError) as error:
            raise FormatError(
                f"{file}: this training state is damaged: {error}.",
                "Delete the file; the phase then starts from its beginning.",
            ) from error
        self.done, self.loss = done, loss
        self.why = "no-gain" if why == "no-gain" else "all-steps" if why == "all-steps" else None

    def _restore_tensors(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, tensor in self.parameters.items():
                tensor.copy_(torch.from_numpy(state[f"p:{name}"]))
                if f"m:{name}" in state:
                    self.optimizer.state[tensor] = {
                        # AdamW counts on the CPU, unless it is fused or captured on CUDA.
                        "step": torch.from_numpy(state[f"s:{name}"]).reshape(()).clone(),
                        "exp_avg": torch.from_numpy(state[f"m:{name}"]).to(tensor.device, copy=True),
                        "exp_avg_sq": torch.from_numpy(state[f"v:{name}"]).to(tensor.device, copy=True),
                    }
