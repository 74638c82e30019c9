"""What a training phase consists of while it runs: settings, parameters, AdamW's moments, a step counter,
and the file that keeps them across Ctrl-C and kill -9.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

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


class Trainer:
    """Parameters, AdamW moments and the step counter of one phase."""

    def __init__(self, tensors: Mapping[str, F32], settings: TrainSettings, total: int) -> None:
        self.settings, self.total, self.done, self.loss = settings, total, 0, math.nan
        self.parameters = {n: t.requires_grad_() for n, t in as_torch(tensors, copy=True).items()}
        # Biases and norms are not decayed (BERT's code).
        flat = {n for n, t in self.parameters.items() if t.ndim == 1}
        self.names = sorted(self.parameters, key=lambda n: (n in flat, n))
        groups: list[dict[str, Any]] = [
            {"params": [self.parameters[n] for n in self.names if n not in flat]},
            {"params": [self.parameters[n] for n in self.names if n in flat], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=_BETAS, eps=_EPS, weight_decay=settings.weight_decay
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
        if not math.isfinite(loss):
            raise ResourceError(
                f"Training phase {phase} diverged: the loss of step {self.done + 1} is {loss}.",
                "Use a smaller learning rate.",
            )
        used = [t for t in self.parameters.values() if t.grad is not None]
        torch.nn.utils.clip_grad_norm_(used, self.settings.clip_norm)
        rate = self.rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done, self.loss = self.done + 1, loss

    def save(self, file: Path) -> None:
        """Write parameters, moments and counter; the moments are dropped when the phase is done."""
        state = {f"p:{n}": t.detach().numpy() for n, t in self.parameters.items()}
        if self.done < self.total:
            for name, tensor in self.parameters.items():
                moments = self.optimizer.state.get(tensor)
                if moments:
                    state[f"m:{name}"] = moments["exp_avg"].numpy()
                    state[f"v:{name}"] = moments["exp_avg_sq"].numpy()
                    state[f"s:{name}"] = moments["step"].numpy().reshape(1)
        save_tensors_atomically(file, state, {"done": str(self.done), "loss": repr(self.loss)})

    def restore(self, file: Path) -> None:
        """Continue from ``file``. Raises: FormatError."""
        try:
            with safe_open(file, framework="np") as archive:
                metadata = archive.metadata() or {}
                state = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
            done, loss = int(metadata["done"]), float(metadata["loss"])
            with torch.no_grad():
                for name, tensor in self.parameters.items():
                    tensor.copy_(torch.from_numpy(state[f"p:{name}"]))
                    if f"m:{name}" in state:
                        self.optimizer.state[tensor] = {
                            "step": torch.from_numpy(state[f"s:{name}"]).reshape(()).clone(),
                            "exp_avg": torch.from_numpy(state[f"m:{name}"]).clone(),
                            "exp_avg_sq": torch.from_numpy(state[f"v:{name}"]).clone(),
                        }
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise FormatError(
                f"{file}: this training state is damaged: {error}.",
                "Delete the file; the phase then starts from its beginning.",
            ) from error
        self.done, self.loss = done, loss
