"""Language models of transformers with caches: logits by default, keys and values on request."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedmef_fx import Config, export_onnx, transform

transformers = pytest.importorskip("transformers")
onnxruntime = pytest.importorskip("onnxruntime")

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
LLAMA = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 1}
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, **TOKENS}
MIXTURE = {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT": ("OPTForCausalLM", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "Bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 1, "n_head": 2}),
    "Llama": ("LlamaForCausalLM", LLAMA),
    "Qwen2": ("Qwen2ForCausalLM", LLAMA),
    "Mixtral": ("MixtralForCausalLM", MIXTURE),
    "T5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
    ),
    "Bart": ("BartForConditionalGeneration", {**BART, "max_position_embeddings": 32, **TOKENS}),
    "Whisper": ("WhisperForConditionalGeneration", WHISPER),
}


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind, sizes = MODELS[name]
    config = getattr(transformers, f"{name}Config")(vocab_size=64, **sizes)
    model: nn.Module = getattr(transformers, kind)(config).eval()
    if name == "Mixtral":
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]  # a method of transformers
    return model


def _inputs(name: str, batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(3, 64, (batch, 7), generator=generator)
    if name == "Whisper":
        features = torch.randn(batch, 8, 32, generator=generator)
        return {"input_features": features, "decoder_input_ids": tokens[:, :5]}
    if name in ("T5", "Bart"):
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]}
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_written_and_caches_on_request(tmp_path: Path, name: str) -> None:
    inputs = _inputs(name, 2)
    sparse = transform(_model(name), Config(density=0.4), example_inputs=(), example_kwargs=inputs).eval()
    options: dict[str, Any] = {"example_inputs": (), "example_kwargs": inputs, "weights": "packed"}
    report = export_onnx(sparse, tmp_path / "m.onnx", **options)

    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].name == "logits"
    (cache,) = {notice.split(",")[0].removeprefix("left out ") for notice in report.notices if "Cache" in notice}
    assert not any(output.name.startswith(cache) for output in session.get_outputs())
    other = _inputs(name, 5)
    with torch.no_grad():
        expected = sparse(**other)["logits"].numpy()
    feed = {one.name: other[one.name].numpy() for one in session.get_inputs()}
    np.testing.assert_allclose(
        session.run(["logits"], feed)[0], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
    )

    export_onnx(sparse, tmp_path / "m.onnx", **options, outputs=["logits", cache])
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert names[0] == "logits"
    assert len(names) >= 3
    assert all(one.startswith(f"{cache}_") for one in names[1:])


def test_the_remedy_for_mixtures_of_experts_is_named(tmp_path: Path) -> None:
    from fedmef_fx.errors import ExportError  # noqa: PLC0415 -- one test

    model = _model("Mixtral")
    model.set_experts_implementation("grouped_mm")  # type: ignore[operator]  # as above
    with pytest.raises(ExportError, match=r"set_experts_implementation\('batched_mm'\)"):
        export_onnx(model, tmp_path / "m.onnx", example_inputs=(), example_kwargs=_inputs("Mixtral", 2))
