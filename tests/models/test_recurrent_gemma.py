"""RecurrentGemma: NeMo 1's configuration and names, what its classes cannot be, and biases that only NeMo has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models.cases import facts, with_weights
from tests.models.proofs import samples

from anyckpt import models
from anyckpt.checkpoint import Checkpoint, RankShard
from anyckpt.errors import MappingError
from anyckpt.layout import Geometry, Parallelism, cut, join
from anyckpt.operations.convert import convert
from anyckpt.tensor import from_array

GRIFFIN = "nemo.collections.nlp.models.language_modeling.megatron_griffin_model.MegatronGriffinModel"
NEMO_1: dict[str, Any] = {
    "micro_batch_size": 2, "tensor_model_parallel_size": 1, "vocab_size": 64, "encoder_seq_length": 512,
    "max_position_embeddings": 512, "position_embedding_type": "rope", "logits_soft_cap": 3.0, "num_layers": 5,
    "gated_linear_unit": True, "window_size": [7, 0], "num_query_groups": 1, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "hidden_size": 32, "bias_activation_fusion": True, "ffn_hidden_size": 48,
    "num_attention_heads": 4, "init_method_std": 0.02, "kv_channels": None, "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6, "rotary_interleaved": False, "make_vocab_size_divisible_by": 128,
    "megatron_amp_O2": False, "target": GRIFFIN,
}  # fmt: skip
"""The keys of megatron_griffin_config.yaml that describe the model, for the sizes of the sample."""


def opened() -> tuple[Checkpoint, models.Model]:
    return samples()["recurrent-gemma"].open()


def test_names_of_nemos_converter() -> None:
    checkpoint, model = opened()
    named = models.from_hub(models.to_hub(checkpoint, model), "nemo-flat").tensors
    recurrent = {
        "linear_in.layer_norm_weight": (32,), "linear_in.weight": (64, 32), "linear_in.bias": (64,),
        "linear_out.weight": (32, 32), "linear_out.bias": (32,), "conv_1d.conv_1d.weight": (32, 1, 4),
        "conv_1d.conv_1d.bias": (32,), "rg_lru.a_param": (32,), "rg_lru.input_gate.w": (4, 8, 8),
        "rg_lru.input_gate.b": (4, 8), "rg_lru.a_gate.w": (4, 8, 8), "rg_lru.a_gate.b": (4, 8),
    }  # fmt: skip
    attention = {
        "linear_qkv.layer_norm_weight": (32,), "linear_qkv.weight": (48, 32), "linear_qkv.bias": (48,),
        "linear_proj.weight": (32, 32), "linear_proj.bias": (32,),
    }  # fmt: skip
    mlp = {
        "linear_fc1.layer_norm_weight": (32,), "linear_fc1.weight": (96, 32), "linear_fc1.bias": (96,),
        "linear_fc2.weight": (32, 48), "linear_fc2.bias": (32,),
    }  # fmt: skip
    expected: dict[str, tuple[int, ...]] = {
        "model.embedding.word_embeddings.weight": (64, 32),
        "model.decoder.final_layernorm.weight": (32,),
    }
    for layer in range(5):
        blocks: list[tuple[str, dict[str, Any]]] = [("mlp", mlp)]
        blocks.append(("self_attention", attention) if layer == 2 else ("recurrent_layer", recurrent))
        expected |= {f"model.decoder.layers.{layer}.{n}.{k}": shape for n, b in blocks for k, shape in b.items()}
    assert {name: tensor.shape for name, tensor in named.items()} == expected
    first = checkpoint.tensors["model.layers.0.temporal_block.linear_x.weight"].numpy()
    assert np.array_equal(named["model.decoder.layers.0.recurrent_layer.linear_in.weight"].numpy()[:32], first)
    queries = checkpoint.tensors["model.layers.2.temporal_block.q_proj.weight"].numpy()
    qkv = named["model.decoder.layers.2.self_attention.linear_qkv.weight"].numpy()
    assert np.array_equal(qkv[:32], queries), "with one group, all queries come first"


def test_what_nemo_1_writes() -> None:
    checkpoint, model = opened()
    named = models.from_hub(models.to_hub(checkpoint, model), "nemo-flat").tensors
    between = replace(with_weights(checkpoint, named), config=NEMO_1, config_kind="nemo1")
    found = models.identify(between)
    assert found is not None
    assert found.family == "recurrent-gemma"
    config = found.config
    assert (config.rotary_percent, config.final_logit_softcapping, config.window_size) == (0.5, 3.0, (7, 0))
    assert config.activation == "gelu_tanh"
    assert config.layernorm_zero_centered_gamma
    assert facts(models.from_hub(models.to_hub(between, found), "hf").tensors) == facts(checkpoint.tensors)
    rendered = models.render_config(found, "hf")
    same = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "logits_soft_cap", "vocab_size")
    theirs = {**checkpoint.config, "intermediate_size": 96, "attention_window_size": 8, "lru_width": 32}
    for key in (*same, "intermediate_size", "attention_window_size", "lru_width"):
        assert rendered[key] == theirs[key], key
    assert models.identify(replace(between, config={**NEMO_1, "target": None})) is None


def test_the_configuration_for_nemo_1() -> None:
    rendered = models.render_config(opened()[1], "nemo1")
    assert rendered["target"] == GRIFFIN
    said = {
        "logits_soft_cap": 3.0,
        "window_size": [7, 0],
        "rotary_percentage": 0.5,
        "ffn_hidden_size": 48,
        "bias": True,
    }
    assert {key: rendered[key] for key in said} == said


def test_a_bias_that_the_family_has_not() -> None:
    checkpoint, model = opened()
    hub = models.to_hub(checkpoint, model)
    name = "decoder.layers.2.self_attention.linear_qkv.bias"
    assert not hub.tensors[name].numpy().any()
    trained = np.zeros(48, "<f4")
    trained[5] = 1e-8
    hub.tensors[name] = from_array(trained)
    with pytest.raises(
        MappingError, match="is not zero, and Hugging Face's models of family recurrent-gemma"
    ) as caught:
        models.from_hub(hub, "hf")
    assert name in str(caught.value)
    assert name in {key.removeprefix("model.") for key in models.from_hub(hub, "nemo-flat").tensors}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"block_types": ["recurrent", "attention"]}, "block_types"),
        ({"block_types": "recurrent"}, "block_types"),
        ({"conv1d_width": 3}, "conv1d_width"),
        ({"lru_width": 40}, "lru_width"),
        ({"attention_bias": True}, "attention_bias"),
        ({"intermediate_size": 97}, "intermediate_size"),
        ({"intermediate_size": 0}, "ffn_hidden_size is not possible"),
        ({"attention_window_size": 0}, "attention_window_size"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"num_attention_heads": 0}, "num_attention_heads is not possible"),
    ],
)
def test_other_models(values: dict[str, Any], problem: str) -> None:
    checkpoint, _ = opened()
    with pytest.raises(MappingError, match=problem):
        models.identify(replace(checkpoint, tensors={}, config={**checkpoint.config, **values}))


def test_released_sizes() -> None:
    """The keys of google/recurrentgemma-2b that tell sizes: transformers' class halves intermediate_size."""
    config = {
        "model_type": "recurrent_gemma", "architectures": ["RecurrentGemmaForCausalLM"], "hidden_size": 2560,
        "intermediate_size": 15360, "num_attention_heads": 10, "num_key_value_heads": 1, "num_hidden_layers": 26,
        "_block_types": ["recurrent", "recurrent", "attention"], "lru_width": 2560, "conv1d_width": 4,
        "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
    }  # fmt: skip
    model = models.identify(Checkpoint("x", "hf", {}, config=config, config_kind="hf"))
    assert model is not None
    assert (model.config.ffn_hidden_size, model.config.kv_channels) == (7680, 256)
    assert (model.config.window_size, model.config.rotary_percent) == ((2047, 0), 0.5)
    assert models.render_config(model, "hf")["intermediate_size"] == 15360


def test_nemo_cannot_divide_it(tmp_path: Path) -> None:
    checkpoint, model = opened()
    tensors = models.to_hub(checkpoint, model).tensors
    geometry = Geometry(num_layers=5, gated_linear_unit=True, make_vocab_size_divisible_by=1, vocab_size=64)
    whole = cut(tensors, Parallelism(), geometry)
    assert facts(whole[0].tensors) == facts(tensors)
    with pytest.raises(MappingError, match=r"cannot divide .*recurrent_layer.*|recurrent_layer.* cannot divide"):
        cut(tensors, Parallelism(tensor_parallel=2), geometry)
    shards = [
        RankShard(
            rank, 0, 0, 0, {"decoder.layers.0.recurrent_layer.rg_lru.a_param": from_array(np.zeros(16, "<f4"))}, "x"
        )
        for rank in range(2)
    ]
    with pytest.raises(MappingError, match="cannot divide"):
        join(shards, Parallelism(tensor_parallel=2), replace(geometry, num_layers=1))


def test_through_a_nemo_archive(tmp_path: Path) -> None:
    from tests.support import write_plan

    from anyckpt.formats.format import WriteOptions
    from anyckpt.formats.hf import FORMAT
    from anyckpt.formats.registry import read

    checkpoint, _ = opened()
    assert FORMAT.plan is not None
    source = write_plan(FORMAT.plan(checkpoint, WriteOptions()), tmp_path / "hf")
    convert(str(source), tmp_path / "griffin.nemo", to="nemo")
    convert(str(tmp_path / "griffin.nemo"), tmp_path / "back", to="hf")
    assert facts(read(str(tmp_path / "back")).weights()) == facts(checkpoint.tensors)
