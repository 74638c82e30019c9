"""Write the benchmark's model in every peer's format. Runs in the peers' environment:

python -m bench.peers.export MODEL_FOLDER OUT_FOLDER LLAMA_DRIVER
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from transformers import BertConfig, BertForSequenceClassification

from sti_runtime.checkpoint_families import FAMILIES, source_name
from sti_runtime.model import ModelConfig
from sti_runtime.model_store import Model, load_model
from sti_runtime.shard import F32

TOKENS = 128


def main() -> None:
    """Export all; a format that is there is kept."""
    model, out, llama_driver = load_model(Path(sys.argv[1]), verify=False), Path(sys.argv[2]), sys.argv[3]
    out.mkdir(parents=True, exist_ok=True)
    _once(out / "model-q8_0.gguf", lambda: _gguf(model, out, llama_driver))
    checkpoint = out / "hf"
    needed = ("model.onnx", "ct2/model.bin", "model-int8.onnx", "model-int8.prepacked.onnx", "model.xml")
    if all((out / name).exists() for name in needed):
        return
    classifier = _classifier(model)
    classifier.save_pretrained(checkpoint)
    _once(out / "model.onnx", lambda: _onnx(classifier, out / "model.onnx"))
    _once(out / "model.xml", lambda: _openvino(out))
    _once(out / "model-int8.onnx", lambda: _int8(out / "model.onnx", out / "model-int8.onnx"))
    _once(out / "model-int8.prepacked.onnx", lambda: _prepacked(model.config, out))
    _once(out / "ct2" / "model.bin", lambda: _ctranslate2(model, checkpoint, out / "ct2"))
    shutil.rmtree(checkpoint)


def _once(path: Path, make: Callable[[], None]) -> None:
    if not path.exists():
        print(f"making {path.name}", flush=True)
        make()


def _classifier(model: Model) -> Any:
    """The model as Transformers has it."""
    config = model.config
    assert config.head is not None
    settings = {
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn,
        "hidden_act": "gelu",
        "max_position_embeddings": config.positions,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.layer_norm_eps,
        "num_labels": len(config.head.labels),
        "attn_implementation": "eager",
        "position_embedding_type": "absolute",  # CTranslate2's converter asks for it
    }
    made: Any = BertForSequenceClassification(BertConfig.from_dict(settings))
    names = FAMILIES["bert"]
    state = {source_name(name, names, "bert."): torch.from_numpy(t) for name, t in model.tensors.items()}
    missing, unexpected = made.load_state_dict(state, strict=False)
    if unexpected or [name for name in missing if not name.endswith(("position_ids", "token_type_ids"))]:
        raise SystemExit(f"the checkpoint does not fit: {missing} {unexpected}")
    return made.eval()


# ------------------------------------------------------------------ ONNX and what is made of it


def _onnx(model: torch.nn.Module, path: Path) -> None:
    ids = torch.ones(1, TOKENS, dtype=torch.int64)
    names = ("input_ids", "attention_mask", "token_type_ids")
    torch.onnx.export(
        model,
        (ids, torch.ones_like(ids), torch.zeros_like(ids)),
        str(path),
        input_names=names,
        output_names=("logits",),
        opset_version=17,
        dynamo=False,
    )


def _openvino(out: Path) -> None:
    openvino.save_model(openvino.convert_model(out / "model.onnx"), out / "model.xml", compress_to_fp16=False)


def _int8(path: Path, to: Path) -> None:
    # Types of the fused operators' outputs are not inferred; all are float32.
    types = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(path, to, weight_type=QuantType.QInt8, extra_options=types)


def _prepacked(config: ModelConfig, out: Path) -> None:
    """Attention, LayerNorm and GELU fused, then int8, then saved with weights as the kernels want them."""
    fused, int8 = out / "fused.onnx", out / "fused-int8.onnx"
    options = FusionOptions("bert")
    optimize_model(
        str(out / "model.onnx"),
        "bert",
        num_heads=config.heads,
        hidden_size=config.hidden,
        optimization_options=options,
        opt_level=0,
    ).save_model_to_file(str(fused))
    _int8(fused, int8)
    session = onnxruntime.SessionOptions()
    session.optimized_model_filepath = str(out / "model-int8.prepacked.onnx")
    session.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", "model-int8.prepacked.bin"),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        session.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(str(int8), session, providers=["CPUExecutionProvider"])
    fused.unlink()
    int8.unlink()


# ------------------------------------------------------------------ CTranslate2 and llama.cpp


def _ctranslate2(model: Model, checkpoint: Path, out: Path) -> None:
    """Its own converter wants a tokenizer only for the vocabulary, so a made-up one serves."""
    from ctranslate2.converters import transformers as converters

    class Converter(converters.TransformersConverter):  # type: ignore[misc]
        def load_tokenizer(self, tokenizer_class: object, path: str, **options: object) -> object:
            return _NumberedTokens(model.config.vocab)

    Converter(str(checkpoint)).convert(str(out), quantization="int8", force=True)
    np.savez(
        out / "classifier.npz",
        weight=model.tensors["head.classifier.weight"],
        bias=model.tensors["head.classifier.bias"],
    )


class _NumberedTokens:
    """As much of a tokenizer as the converter asks for."""

    unk_token = "t0"
    bos_token = eos_token = pad_token = unk_token

    def __init__(self, size: int) -> None:
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        return {f"t{number}": number for number in range(self._size)}

    def convert_ids_to_tokens(self, number: int) -> str:
        return f"t{number}"


_GGUF_LAYER = {
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "attention.norm": "attn_output_norm",
    "ffn.in": "ffn_up",
    "ffn.out": "ffn_down",
    "ffn.norm": "layer_output_norm",
}
_GGUF_REST = {
    "embeddings.word": "token_embd",
    "embeddings.position": "position_embd",
    "embeddings.token_type": "token_types",
    "embeddings.norm": "token_embd_norm",
    "head.pooler": "cls",
    "head.classifier": "cls.output",
}


def _gguf(model: Model, out: Path, driver: str) -> None:
    """float32 by the gguf package, then llama.cpp's own quantizer. No vocabulary: ids come in."""
    config = model.config
    assert config.head is not None
    full = out / "model-f32.gguf"
    writer = gguf.GGUFWriter(str(full), "bert")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.positions)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_vocab_size(config.vocab)
    writer.add_token_type_count(config.token_types)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_classifier_output_labels(list(config.head.labels))
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in model.tensors.items():
        writer.add_tensor(_gguf_name(name), _plain(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for kind in ("q4_0", "q8_0"):
        to = out / f"model-{kind}.gguf"
        subprocess.run([driver, "quantize", str(full), f"{to}.partial", kind], check=True)
        Path(f"{to}.partial").rename(to)
    full.unlink()


def _gguf_name(ours: str) -> str:
    module, leaf = ours.rsplit(".", 1)
    if module.startswith("layers."):
        _, layer, rest = module.split(".", 2)
        return f"blk.{layer}.{_GGUF_LAYER[rest]}.{leaf}"
    return f"{_GGUF_REST[module]}.{leaf}"


def _plain(tensor: F32) -> F32:
    return np.ascontiguousarray(tensor, np.float32)


if __name__ == "__main__":
    main()
