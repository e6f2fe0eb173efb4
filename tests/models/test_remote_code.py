"""What is particular about Baichuan 2, ChatGLM and MPT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.models.cases import facts, model_of, notes_of, with_weights
from tests.models.proofs import samples
from tests.models.remote_code import BAICHUAN, BAICHUAN_13B, CHATGLM, INTERNLM2, baichuan_shapes, chatglm_shapes
from tests.support import write_plan

import anyckpt
from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT
from anyckpt.models import Hub
from anyckpt.models.dialects.spellings import detect
from anyckpt.models.language.unit_rows import RowsOfLengthOne
from anyckpt.tensor import LazyTensor, from_array

NEMO = "nemo.collections.llm.gpt.model"
MPT = {
    "model_type": "mpt", "architectures": ["MPTForCausalLM"], "d_model": 32, "n_heads": 4, "n_layers": 2,
    "expansion_ratio": 4, "max_seq_len": 64, "vocab_size": 64, "no_bias": True, "learned_pos_emb": True,
    "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_type": "multihead_attention", "clip_qkv": None},
}  # fmt: skip


def random(shapes: dict[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    generator = np.random.default_rng(0)
    return {name: from_array(generator.standard_normal(shape).astype("<f4")) for name, shape in shapes.items()}


def taken(config: dict[str, Any], tensors: dict[str, LazyTensor]) -> Hub:
    source = Checkpoint("x", "hf", tensors, dialect="hf", config=config, config_kind="hf")
    model = models.identify(source)
    assert model is not None
    return models.to_hub(source, model)


# -- rows of length 1 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["<f4", "<f8", "<f2", ml_dtypes.bfloat16])
def test_rows_are_divided_by_their_length(kind: Any) -> None:
    values = (np.random.default_rng(0).standard_normal((300, 24)) * 0.3).astype(kind)
    values[7] = 0
    found = RowsOfLengthOne(from_array(values)).numpy()
    wide = values.astype("<f8")
    lengths = np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    assert found.dtype == values.dtype
    assert np.array_equal(found, (wide / lengths).astype(kind))
    again = RowsOfLengthOne(from_array(found)).numpy()
    assert again.tobytes() == found.tobytes(), "nothing changes a second time"


def test_a_part_is_that_of_the_whole() -> None:
    tensor = RowsOfLengthOne(from_array(np.random.default_rng(0).standard_normal((5000, 48)).astype("<f4")))
    whole = tensor.numpy()
    assert np.array_equal(tensor.box((4001, 5), (37, 11)).numpy(), whole[4001:4038, 5:16])
    assert np.array_equal(tensor.permute((1, 0)).numpy(), whole.T)
    assert np.array_equal(np.concatenate([part.copy() for part in tensor.chunks(1000)]).reshape(whole.shape), whole)
    assert len(list(tensor.pieces())) == 1


# -- Baichuan ------------------------------------------------------------------------------------------------


def test_the_output_layer_of_the_second_generation() -> None:
    tensors = random(baichuan_shapes(BAICHUAN))
    hub = taken(BAICHUAN, tensors)
    head = hub.tensors["output_layer.weight"].numpy()
    assert np.allclose(np.linalg.norm(head, axis=1), 1)
    assert np.allclose(head * np.linalg.norm(tensors["lm_head.weight"].numpy(), axis=1, keepdims=True),
                       tensors["lm_head.weight"].numpy())  # fmt: skip
    assert any("output_layer.weight: the model's own code brings rows to length 1" in note for note in hub.notes)
    out = models.from_hub(hub, "hf").tensors
    del out["lm_head.weight"], tensors["lm_head.weight"]
    assert facts(out) == facts(tensors)


def test_the_output_layer_of_the_first_generation() -> None:
    config = {**BAICHUAN, "vocab_size": 64_000, "hidden_size": 8, "intermediate_size": 16}
    tensors = random(baichuan_shapes(config))
    hub = taken(config, tensors)
    assert facts({"head": hub.tensors["output_layer.weight"]}) == facts({"head": tensors["lm_head.weight"]})
    assert not any("length 1" in note for note in hub.notes)


def test_an_output_layer_that_cannot_be_divided() -> None:
    tensors = random(baichuan_shapes(BAICHUAN))
    tensors["lm_head.weight"] = from_array(np.zeros((128, 64), "<i4"))
    with pytest.raises(MappingError, match=r"brought to length 1.*found int32"):
        taken(BAICHUAN, tensors)


def test_two_kinds_of_positions() -> None:
    rope, alibi = model_of(BAICHUAN), model_of(BAICHUAN_13B)
    assert (rope.config.position_embedding_type, rope.config.max_position_embeddings) == ("rope", 64)
    assert (alibi.config.position_embedding_type, alibi.config.max_position_embeddings) == ("alibi", 64)
    for model in (rope, alibi):
        again = model_of(models.render_config(model, "hf"))
        assert again.config == replace(model.config, extra=again.config.extra)
    for kind in ("nemo1", "megatron-args", "nemo2"):
        if kind == "nemo1":
            rendered = models.render_config(alibi, kind)
            assert (rendered["mcore_gpt"], rendered["transformer_engine"]) == (False, False)
            assert model_of(rendered).config.position_embedding_type == "alibi"
        else:
            with pytest.raises(MappingError, match="no such position embedding"):
                models.render_config(alibi, kind)
        again = model_of(models.render_config(rope, kind))
        assert (again.family, again.config.position_embedding_type) == ("baichuan", "rope")
        assert again.config.layernorm_epsilon == 1e-6


def test_a_model_that_megatron_trained_can_be_llama() -> None:
    source, model = samples()["baichuan2"].open()
    hub = models.to_hub(source, model)
    arguments = models.render_config(model, "megatron-args")
    between = replace(with_weights(source, models.from_hub(hub, "hub").tensors), config=arguments,
                      config_kind="megatron-args", artifacts={})  # fmt: skip
    llama = models.identify(between, family="llama")
    assert llama is not None
    out = models.from_hub(models.to_hub(between, llama), "hf").tensors
    packed = source.tensors["model.layers.1.self_attn.W_pack.weight"].numpy()
    parts = [out[f"model.layers.1.self_attn.{part}_proj.weight"].numpy() for part in "qkv"]
    assert np.array_equal(np.concatenate(parts), packed)


def test_nemo_2_of_baichuan() -> None:
    model = model_of({"_target_": f"{NEMO}.baichuan.Baichuan2Config7B", "vocab_size": 125696})
    assert (model.family, model.config.hidden_size, model.config.ffn_hidden_size) == ("baichuan", 4096, 11008)
    assert (model.config.layernorm_epsilon, model.config.position_embedding_type) == (1e-6, "rope")
    assert models.render_config(model, "nemo2")["config"]["_target_"].endswith(".Baichuan2Config7B")


# -- ChatGLM -------------------------------------------------------------------------------------------------


def test_chatglm() -> None:
    config = model_of(CHATGLM).config
    assert (config.rotary_percent, config.rotary_interleaved, config.num_query_groups) == (0.5, True, 2)
    assert (config.add_qkv_bias, config.add_bias_linear, config.rotary_base) == (True, False, 10000.0)
    for kind in ("hf", "nemo1", "megatron-args", "nemo2"):
        again = model_of(models.render_config(model_of(CHATGLM), kind))
        kept = {"extra": {}, "dtype": None, "padded_vocab_size": None, "eos_token_id": None, "pad_token_id": None}
        assert again.family == "chatglm"
        assert replace(again.config, **kept) == replace(config, **kept), kind


def test_chatglm_with_as_many_key_heads_and_biases() -> None:
    change = {"multi_query_attention": False, "multi_query_group_num": 1, "add_bias_linear": True}
    model = model_of({**CHATGLM, **change})
    assert model.config.num_query_groups == 4
    names = {name for item in model.definition.expected(model.config) for name in item.sources}
    assert "transformer.encoder.layers.1.mlp.dense_4h_to_h.bias" in names
    rendered = models.render_config(model, "hf")
    assert (rendered["multi_query_attention"], rendered["multi_query_group_num"]) == (False, 4)


@pytest.mark.parametrize(
    ("path", "base", "scaling"),
    [
        ("THUDM/chatglm3-6b-32k", 500_000.0, None),
        ("THUDM/glm-4-9b", 500_000.0, None),
        ("THUDM/chatglm2-6b-32k", 10_000.0, {"rope_type": "linear", "factor": 50.0}),
    ],
)
def test_two_meanings_of_rope_ratio(path: str, base: float, scaling: Any) -> None:
    model = model_of({**CHATGLM, "_name_or_path": path, "rope_ratio": 50})
    assert (model.config.rotary_base, model.config.rope_scaling) == (base, scaling)
    for kind in ("megatron-args", "nemo1", "nemo2"):
        again = model_of(models.render_config(model, kind))
        assert (again.config.rotary_base, again.config.rope_scaling) == (base, scaling)
        rendered = models.render_config(again, "hf")
        assert rendered["rope_ratio"] == 50
        final = model_of(rendered).config
        assert (final.rotary_base, final.rope_scaling) == (base, scaling)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rmsnorm": False}, "rmsnorm is not that of family chatglm"),
        ({"post_layer_norm": False}, "post_layer_norm is not that of family chatglm"),
        ({"apply_residual_connection_post_layernorm": True}, "not that of family chatglm"),
        ({"pre_seq_len": 128}, "prefix encoder or packed weights"),
        ({"quantization_bit": 4}, "prefix encoder or packed weights"),
        ({"multi_query_group_num": 3}, "do not divide into its query groups"),
    ],
)
def test_what_chatglm_cannot_be(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(MappingError, match=problem):
        model_of({**CHATGLM, **change})


def test_what_chatglm_cannot_say() -> None:
    model = model_of(CHATGLM)
    scaled = replace(model, config=replace(model.config, rope_scaling={"rope_type": "yarn", "factor": 2.0}))
    with pytest.raises(MappingError, match="ChatGLM has no such rope"):
        models.render_config(scaled, "hf")


def test_frequencies_are_left_out() -> None:
    tensors = random({**chatglm_shapes(CHATGLM), "transformer.rotary_pos_emb.inv_freq": (4,)})
    assert detect(tensors) == "hf"
    hub = taken(CHATGLM, tensors)
    assert list(hub.ignored) == ["transformer.rotary_pos_emb.inv_freq"]


@pytest.mark.parametrize(("name", "length"), [("ChatGLM2Config6B", 32768), ("ChatGLM3Config6B", 8192)])
def test_nemo_2_of_chatglm(name: str, length: int) -> None:
    model = model_of({"_target_": f"{NEMO}.chatglm.{name}"})
    config = model.config
    assert (model.family, config.max_position_embeddings, config.num_query_groups) == ("chatglm", length, 2)
    assert (config.add_qkv_bias, config.make_vocab_size_divisible_by) == (True, 65024)
    rendered = models.render_config(replace(model, config=replace(config, vocab_size=65024)), "nemo2")
    assert rendered["config"]["_target_"].endswith(f".{name}")


@pytest.mark.parametrize("through", ["megatron-core", "nemo2", "nemo"])
def test_chatglm_becomes_transformers_own_glm(through: str, tmp_path: Path) -> None:
    source, _ = samples()["chatglm"].open()
    assert FORMAT.plan is not None
    write_plan(FORMAT.plan(source, WriteOptions()), tmp_path / "hf")
    there = tmp_path / ("there.nemo" if through == "nemo" else "there")
    anyckpt.convert(tmp_path / "hf", there, to=through)
    anyckpt.convert(there, tmp_path / "glm", to="hf", family="glm")
    found = anyckpt.open(tmp_path / "glm")
    assert found.config["architectures"] == ["GlmForCausalLM"]
    assert (found.config["num_key_value_heads"], found.config["head_dim"]) == (2, 16)
    assert (found.config["attention_bias"], found.config["partial_rotary_factor"]) == (True, 0.5)
    for part in ("weight", "bias"):
        packed = source.tensors[f"transformer.encoder.layers.1.self_attention.query_key_value.{part}"].numpy()
        rows = {"q_proj": packed[:64], "k_proj": packed[64:96], "v_proj": packed[96:]}
        for name, values in rows.items():
            assert np.array_equal(found.tensors[f"model.layers.1.self_attn.{name}.{part}"].numpy(), values)
    gate_up = source.tensors["transformer.encoder.layers.0.mlp.dense_h_to_4h.weight"].numpy()
    assert np.array_equal(found.tensors["model.layers.0.mlp.gate_up_proj.weight"].numpy(), gate_up)


# -- MPT -----------------------------------------------------------------------------------------------------


def test_mpt() -> None:
    model = model_of(MPT)
    assert (model.config.ffn_hidden_size, model.config.share_embeddings_and_output_weights) == (128, True)
    rendered = models.render_config(model, "hf")
    assert rendered["attn_config"] == MPT["attn_config"]
    assert (rendered["expansion_ratio"], rendered["architectures"]) == (4, ["MptForCausalLM"])
    again = model_of(models.render_config(model, "nemo1"))
    assert (again.family, again.config.ffn_hidden_size) == ("mpt", 128)
    assert models.render_config(again, "hf")["attn_config"] == {"alibi": True}
    unnamed = {key: value for key, value in models.render_config(model, "nemo1").items() if key != "hf_model_type"}
    assert model_of(unnamed).family == "mpt"
    with pytest.raises(MappingError, match="NeMo 2 has no models of family mpt"):
        models.render_config(model, "nemo2")
    with pytest.raises(MappingError, match="no such position embedding"):
        models.render_config(model, "megatron-args")


def test_what_mpts_attention_is_besides_is_said_to_be_lost() -> None:
    clipped = model_of({**MPT, "attn_config": {**MPT["attn_config"], "clip_qkv": 6}})  # type: ignore[dict-item]
    assert "attn_config's clip_qkv of 6 has no place there" in notes_of(clipped, "nemo1")
    assert notes_of(clipped, "hf") == ""
    assert notes_of(model_of(MPT), "nemo1") == ""
    assert models.render_config(clipped, "hf")["attn_config"]["clip_qkv"] == 6


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"attn_config": {"alibi": False}}, "expected alibi"),
        ({"attn_config": {"qk_ln": True}}, "qk_ln is not that of the family"),
        ({"attn_config": {"attn_type": "multiquery_attention"}}, "attn_type is not that of the family"),
        ({"attn_config": {"softmax_scale": 0.5}}, "softmax_scale is not that of the family"),
        ({"attn_config": []}, "attn_config is of the wrong type"),
        ({"norm_type": "low_precision_rmsnorm"}, "norm_type is unknown"),
        ({"no_bias": False}, "no_bias is not that of family mpt"),
        ({"logit_scale": "inv_sqrt_d_model"}, "logit_scale is not that of family mpt"),
        ({"expansion_ratio": 0}, "ffn_hidden_size is not possible"),
    ],
)
def test_what_mpt_cannot_be(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(MappingError, match=problem):
        model_of({**MPT, **change})


def test_what_mpt_cannot_say() -> None:
    model = model_of(MPT)
    wider = replace(model, config=replace(model.config, ffn_hidden_size=100))
    with pytest.raises(MappingError, match="no expansion_ratio says .* .expected a multiple of 32, found 100"):
        models.render_config(wider, "hf")


def test_norms_have_biases_of_zeros_in_megatron() -> None:
    source, model = samples()["mpt"].open()
    hub = models.to_hub(source, model)
    made = [name for name in hub.tensors if name.endswith("bias")]
    assert len(made) == 2 * 2 + 1
    assert not any(hub.tensors[name].numpy().any() for name in made)
    trained = {**hub.tensors, made[0]: from_array(np.ones(32, "<f4"))}
    with pytest.raises(MappingError, match="is not zero"):
        models.from_hub(Hub(model, trained), "hf")


# -- InternLM 2 ----------------------------------------------------------------------------------------------


def test_rope_of_internlm2_is_written_as_its_code_takes_it() -> None:
    """``configuration_internlm2.py`` raises for any other keys than ``type`` and ``factor``."""
    scaling = {"type": "linear", "factor": 2.0}
    model = model_of({**INTERNLM2, "rope_scaling": scaling})
    assert models.render_config(model, "hf")["rope_scaling"] == scaling
    again = model_of(models.render_config(model, "megatron-args"))
    assert (again.family, models.render_config(again, "hf")["rope_scaling"]) == ("internlm2", scaling)
    dynamic = model_of({**INTERNLM2, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert models.render_config(dynamic, "hf")["rope_scaling"] == {"type": "dynamic", "factor": 2.0}
    with pytest.raises(MappingError, match="cannot express this rope scaling"):
        models.render_config(dynamic, "megatron-args")


def test_rope_that_internlm2_has_not() -> None:
    scaled = model_of({**INTERNLM2, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}})  # fmt: skip
    notes: list[str] = []
    models.render_config(scaled, "hf", notes=notes)
    assert any("InternLM 2's own code has no such rope_scaling" in note for note in notes)


def test_biases_of_internlm2_are_refused() -> None:
    """They would be of attention alone, but in Megatron-Core also of the MLP."""
    with pytest.raises(MappingError, match="bias is not that of family internlm2"):
        model_of({**INTERNLM2, "bias": True})
