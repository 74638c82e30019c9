"""The peers: what each is called, computes in, loads, and how it is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.engine_model import TOKENS
from bench.peers.setup import PeersHome

Precision = Literal["fp32", "int8", "4 bits"]


@dataclass(frozen=True)
class Peer:
    """``native``: its driver is a program, so from its spawn to its logits is its own doing; the others' are
    Python, and what counts is from the start of engine creation. ``lacks``: what it does differently."""

    name: str
    package: str
    precision: Precision
    native: bool
    files: tuple[str, ...]
    command: tuple[str, ...]
    lacks: str = ""

    def model_files(self, home: PeersHome) -> tuple[Path, ...]:
        """What it reads."""
        return tuple(home.models / name for name in self.files)

    def argv(self, home: PeersHome, threads: int, rows_file: Path, requests: int) -> tuple[str, ...]:
        """How to start it for requests over the rows of ``rows_file``."""
        model = str(home.models / self.files[0])
        rest = (str(threads), str(rows_file), str(TOKENS), str(requests))
        if self.native:
            return (str(home.llama_driver), "run", model, *self.command, *rest)
        return (str(home.python), "-m", *self.command, model, *rest)


def _llama(kind: str, mode: str, precision: Precision) -> Peer:
    return Peer(
        name=f"llama.cpp {kind}, {'mmap' if mode == 'mmap' else 'direct IO'}",
        package="llama-cpp-python",
        precision=precision,
        native=True,
        files=(f"model-{kind}.gguf",),
        command=(mode,),
        lacks="GELU in its tanh form, by table; embeddings quantized",
    )


def _onnxruntime(name: str, precision: Precision, *files: str) -> Peer:
    return Peer(name, "onnxruntime", precision, False, files, ("bench.peers.run_onnxruntime",))


PEERS: Sequence[Peer] = (
    _llama("q4_0", "mmap", "4 bits"),
    _llama("q4_0", "direct", "4 bits"),
    _llama("q8_0", "mmap", "int8"),
    _llama("q8_0", "direct", "int8"),
    _onnxruntime("ONNX Runtime fp32", "fp32", "model.onnx"),
    _onnxruntime("ONNX Runtime int8, dynamic", "int8", "model-int8.onnx"),
    _onnxruntime(
        "ONNX Runtime int8, fused, prepacked, mmapped",
        "int8",
        "model-int8.prepacked.onnx",
        "model-int8.prepacked.bin",
    ),
    Peer(
        "OpenVINO fp32",
        "openvino",
        "fp32",
        False,
        ("model.xml", "model.bin"),
        ("bench.peers.run_openvino",),
    ),
    Peer(
        "CTranslate2 int8",
        "ctranslate2",
        "int8",
        False,
        ("ct2/model.bin", "ct2/vocabulary.json", "ct2/config.json", "ct2/classifier.npz"),
        ("bench.peers.run_ctranslate2",),
        lacks="no classifier: applied in numpy",
    ),
)
