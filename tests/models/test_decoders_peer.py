"""Layouts that no fixture has: transformers' own tiny models, through Megatron's names and arguments and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from tests.models.cases import facts, with_weights  # noqa: E402
from tests.support import write_plan  # noqa: E402

from anyckpt import models  # noqa: E402
from anyckpt.formats.hf import FORMAT  # noqa: E402
from anyckpt.formats.registry import WriteOptions, look_at  # noqa: E402

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FALCON = {"num_attention_heads": 8, "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 64, "ffn_hidden_size": 96}
GPT = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-7b": ("falcon", FALCON),
    "falcon-40b": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 4, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-heads": ("falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True}),
    "pythia": ("gpt_neox", {**SIZES, "use_parallel_residual": True}),
    "qwen2-window": (
        "qwen2",
        {**SIZES, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
    "qwen3-tied": ("qwen3", {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2-window": ("gemma2", {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4}),
    "gemma3-scaled": (
        "gemma3_text",
        {
            **SIZES, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
        },
    ),
    "starcoder2-window": ("starcoder2", {**SIZES, "num_key_value_heads": 2, "sliding_window": 4, "use_bias": False}),
    "santacoder-heads": ("gpt_bigcode", {**GPT, "multi_query": False}),
    "gpt2-untied": ("gpt2", {**GPT, "tie_word_embeddings": False, "activation_function": "gelu"}),
    "phi4-partial": (
        "phi3",
        {
            **SIZES, "num_key_value_heads": 2,
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.75},
        },
    ),
    "nemotron-biased": ("nemotron", {**SIZES, "num_key_value_heads": 2, "mlp_bias": True, "attention_bias": True}),
}  # fmt: skip


def computed(path: Path, inputs: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(inputs).logits


@pytest.mark.parametrize("kind", ["megatron-args", "nemo1"])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, kind: str, tmp_path: Path) -> None:
    model_type, values = MODELS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **values)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    source = FORMAT.read(look_at(tmp_path / "theirs"))
    model = models.identify(source)
    assert model is not None
    named = models.from_hub(models.to_hub(source, model), "megatron-core").tensors
    rendered = models.render_config(model, kind)
    between = replace(with_weights(source, named), config=rendered, config_kind=kind, artifacts={}, details={})
    again = models.identify(between)
    assert again is not None
    assert again.family == model.family
    out = models.from_hub(models.to_hub(between, again), "hf").tensors
    assert facts(out) == facts(source.tensors)
    final = replace(between, tensors=out, dialect="hf", config=models.render_config(again, "hf"), config_kind="hf")
    assert FORMAT.plan is not None
    ours = write_plan(FORMAT.plan(final, WriteOptions()), tmp_path / "ours")
    inputs = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    assert torch.equal(computed(ours, inputs), computed(tmp_path / "theirs", inputs))
    changed = replace(again, config=replace(again.config, layernorm_epsilon=0.1))
    other = replace(final, config=models.render_config(changed, "hf"))
    different = write_plan(FORMAT.plan(other, WriteOptions()), tmp_path / "other")
    assert not torch.equal(computed(different, inputs), computed(ours, inputs)), "the comparison can fail"
