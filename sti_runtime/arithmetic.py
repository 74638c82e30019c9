"""Where and how precisely a training phase computes: CPU or CUDA, float32 or mixed precision.

Mixed: parameters, gradients and AdamW's moments stay float32, forward passes run under autocast. float16
has so few exponents that small gradients vanish; there the loss is scaled up before the backward pass.
Source: Micikevicius et al., Mixed Precision Training (ICLR 2018).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from sti_runtime.errors import FormatError, InputError

Precision = Literal["fp32", "bf16", "fp16"]
"""float32 throughout, or forward passes in bfloat16 or float16."""

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(word: str) -> str:
    """The PyTorch device that ``word`` names; "auto": CUDA where there is one, else the CPU.

    Raises: InputError.
    """
    if word == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = word.partition(":")
    if kind not in ("cpu", "cuda") or (number and (kind == "cpu" or not number.isdecimal())):
        raise InputError(f"{word!r} is nothing to train on.", "Choose auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise InputError(
            f"{word}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here.",
            "Install the driver and a CUDA build of PyTorch, or train on the cpu.",
        )
    return word


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 (AVX-512 BF16, AMX)."""
    asked = getattr(torch.cpu, "get_capabilities", None)  # older builds, as boards' vendors ship, have none
    has = asked() if asked is not None else {}
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def choose_precision(word: str, device: str) -> Precision:
    """What ``word`` ("fp32" or "mixed") means on ``device``: mixed is bf16 where its hardware has that, else
    fp16. Raises: InputError for mixed precision on a CPU without bf16 arithmetic: it gains nothing there."""
    if word not in ("fp32", "mixed"):
        raise InputError(f"There is no precision {word!r}.", "Choose fp32 or mixed.")
    if word == "fp32":
        return "fp32"
    if not device.startswith("cuda"):
        if not cpu_multiplies_bf16():
            raise InputError(
                "Mixed precision gains nothing on this CPU, which has no bfloat16 arithmetic.",
                "Leave it out (fp32), or train where PyTorch sees a CUDA device.",
            )
        return "bf16"
    with torch.cuda.device(device):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


class Arithmetic:
    """Forward and backward passes and optimiser steps on one device in one precision.

    ``overflows``: steps left out because a scaled gradient was not finite.
    """

    def __init__(self, device: str, precision: Precision) -> None:
        self.device = torch.device(device)
        self.overflows = 0
        self._type = _TYPES.get(precision)
        self._scaler = torch.amp.GradScaler(self.device.type) if precision == "fp16" else None

    def forward(self) -> AbstractContextManager[object]:
        """Forward passes belong into this block."""
        if self._type is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._type)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` to the parameters', scaled where that is needed."""
        scaled = loss if self._scaler is None else self._scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def step(self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], clip_norm: float) -> None:
        """Clip the gradients and let the optimiser step, unless a scaled gradient overflowed."""
        if self._scaler is None:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            return
        before = self._scaler.get_scale()
        self._scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        self._scaler.step(optimizer)
        self._scaler.update()
        self.overflows += self._scaler.get_scale() < before

    def state(self) -> str:
        """What must be kept for an interrupted phase to go on alike."""
        scaler = {} if self._scaler is None else self._scaler.state_dict()
        return json.dumps({"overflows": self.overflows, "scaler": scaler}, sort_keys=True)

    def restore(self, state: str) -> None:
        """Go on from ``state()``. Raises: FormatError."""
        try:
            found = json.loads(state)
            self.overflows = int(found["overflows"])
            if self._scaler is not None:
                self._scaler.load_state_dict(found["scaler"])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise FormatError(f"The state of the gradient scaler is damaged: {error}.") from error
