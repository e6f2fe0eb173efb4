"""To the hub and back: bit for bit, and complete or refused."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.models.cases import FAMILIES, MEGATRON_DIALECTS, facts, open_case, partition_of, with_weights
from tests.models.sparse_cases import FAMILIES as SPARSE

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.dtypes import BY_NAME
from anyckpt.errors import MappingError, UsageError
from anyckpt.models.language import rule_operations
from anyckpt.storage import ByteSource
from anyckpt.tensor import Constant, Stored, from_array

TAGS = {"col0": "column", "row1": "row", "gateup0": "gate-up", "vocab0": "vocabulary", "rep": "replicated"}
OPERATIONS = {
    "id": rule_operations.IDENTITY,
    "vocab": rule_operations.IDENTITY,
    "qkv": rule_operations.INTERLEAVED_QKV,
    "qkv_cat": rule_operations.CONCATENATED_QKV,
    "qkv_cat_T": rule_operations.TRANSPOSED_CONCATENATED_QKV,
    "T": rule_operations.TRANSPOSED,
    "gate_up": rule_operations.GATE_UP,
}


@pytest.mark.parametrize("dialect", MEGATRON_DIALECTS)
@pytest.mark.parametrize("name", (*FAMILIES, *SPARSE))
def test_through_each_dialect_and_back(name: str, dialect: str) -> None:
    case = open_case(name)
    out = models.from_hub(replace(case.hub(), model=case.padded()), dialect)
    again = models.to_hub(with_weights(case.checkpoint, out.tensors), case.padded())
    assert facts(again.tensors) == facts(case.megatron)
    assert facts(models.from_hub(again, "hf").tensors) == facts(case.checkpoint.tensors)


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_are_those_of_the_fixture(name: str) -> None:
    case = open_case(name)
    rules_of = case.model.definition.rules
    ours = [(rule.hub, list(rule.source), rule.operation, partition_of(rule.hub)) for rule in rules_of]
    for theirs in case.meta["rules"]:
        place = theirs["mcore"].split(".")[-2]
        partition = {"linear_qkv": "qkv", "linear_fc1": "gate-up"}.get(place, TAGS[theirs["tp"]])
        partition = TAGS[theirs["tp"]] if "layer_norm" in theirs["mcore"] else partition
        assert (theirs["mcore"], theirs["hf"], OPERATIONS[theirs["op"]], partition) in ours


def test_the_table_of_partitions_has_every_name_but_those_of_which_a_rule_says_otherwise() -> None:
    for family in models.known_families().values():
        for rule in family.rules:
            assert partition_of(rule.hub) != rule.partition, rule.hub


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("extra", ["model.layers.0.self_attn.q_scale.weight", "model.layers.9.mlp.up_proj.weight", "v"])
def test_an_unknown_tensor_is_named(name: str, extra: str) -> None:
    case = open_case(name)
    more = {**case.checkpoint.tensors, extra: from_array(np.zeros(3, "<f4"))}
    with pytest.raises(MappingError, match="no rule of family .* covers 1 tensors") as caught:
        models.to_hub(with_weights(case.checkpoint, more, "hf"), case.model)
    assert extra in str(caught.value)
    assert "--family" in str(caught.value)


def test_a_missing_layer_is_called_so() -> None:
    case = open_case("llama")
    rest = {key: tensor for key, tensor in case.checkpoint.tensors.items() if ".layers.1." not in key}
    with pytest.raises(MappingError, match="layer 1 is missing: 9 tensors"):
        models.to_hub(with_weights(case.checkpoint, rest, "hf"), case.model)
    deeper = replace(case.model, config=replace(case.model.config, num_layers=3))
    stacked = models.from_hub(case.hub(), "megatron-core").tensors
    with pytest.raises(MappingError, match="layer 2 is missing"):
        models.to_hub(with_weights(case.checkpoint, stacked), deeper)
    shallower = replace(case.model, config=replace(case.model.config, num_layers=1))
    with pytest.raises(MappingError, match=r"no rule .* covers 6 tensors: decoder\.layers\.1"):
        models.to_hub(with_weights(case.checkpoint, stacked), shallower)


@pytest.mark.parametrize(
    "field", ["hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "vocab_size"]
)
def test_a_shape_that_contradicts_the_configuration(field: str) -> None:
    case = open_case("llama")
    wrong = replace(case.model.config, **{field: 2 * getattr(case.model.config, field)})
    with pytest.raises(MappingError, match="its shape contradicts the configuration .*expected .*found"):
        models.to_hub(case.checkpoint, replace(case.model, config=wrong))
    if field != "vocab_size":
        with pytest.raises(MappingError, match="its shape contradicts the configuration"):
            models.to_hub(with_weights(case.checkpoint, case.megatron), replace(case.model, config=wrong))


def test_parts_of_one_tensor_of_different_types() -> None:
    case = open_case("llama")
    name = "model.layers.0.self_attn.k_proj.weight"
    weights = {**case.checkpoint.tensors, name: case.checkpoint.tensors[name].cast("bf16")}
    with pytest.raises(MappingError, match=r"different element types .*; cast all with --dtype"):
        models.to_hub(with_weights(case.checkpoint, weights, "hf"), case.model)
    hub = models.to_hub(with_weights(case.checkpoint, weights, "hf"), case.model, widen=True)
    fused = hub.tensors["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert fused.dtype.name == "float32"
    again = models.from_hub(hub, "hf").tensors[name]
    assert again.cast("bf16").numpy().tobytes() == weights[name].numpy().tobytes()
    integers = {**weights, name: from_array(np.zeros(weights[name].shape, "i1"))}
    with pytest.raises(MappingError, match=r"different element types .*; copy the weight files again"):
        models.to_hub(with_weights(case.checkpoint, integers, "hf"), case.model, widen=True)


def test_rope_frequencies_are_ignored_knowingly() -> None:
    case = open_case("llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    weights = {**case.checkpoint.tensors, name: from_array(np.zeros(8, "<f4"))}
    hub = models.to_hub(with_weights(case.checkpoint, weights, "hf"), case.model)
    assert hub.ignored == {name: "rope frequencies, which follow from the configuration"}
    unlike = {**case.checkpoint.tensors, f"{name}.x": from_array(np.zeros(8, "<f4"))}
    with pytest.raises(MappingError, match="no rule"):
        models.to_hub(with_weights(case.checkpoint, unlike, "hf"), case.model)


def test_a_redundant_tied_head_is_ignored_only_if_equal() -> None:
    case = open_case("llama_tied_bf16")
    embedding = case.checkpoint.tensors["model.embed_tokens.weight"]
    shared = {**case.checkpoint.tensors, "lm_head.weight": embedding}
    copied = {**case.checkpoint.tensors, "lm_head.weight": from_array(embedding.numpy())}
    for weights in (shared, copied):
        hub = models.to_hub(with_weights(case.checkpoint, weights, "hf"), case.model)
        assert hub.ignored == {"lm_head.weight": "tied to model.embed_tokens.weight"}
        assert "output_layer.weight" not in hub.tensors
    other = {**case.checkpoint.tensors, "lm_head.weight": from_array(embedding.numpy() * 2)}
    with pytest.raises(MappingError, match=r"'lm_head.weight': differs from the embedding"):
        models.to_hub(with_weights(case.checkpoint, other, "hf"), case.model)
    scalars = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), Constant(BY_NAME["bfloat16"], ()))
    with pytest.raises(MappingError, match="differs from the embedding"):
        models.to_hub(with_weights(case.checkpoint, {**case.checkpoint.tensors, **scalars}, "hf"), case.model)
    stage = {**case.megatron, "output_layer.weight": case.megatron["embedding.word_embeddings.weight"]}
    hub = models.to_hub(with_weights(case.checkpoint, stage), case.model)
    assert hub.ignored == {"output_layer.weight": "tied to embedding.word_embeddings.weight"}


def test_a_tie_that_the_configuration_does_not_mention() -> None:
    case = open_case("llama_tied_bf16")
    config = {key: value for key, value in case.checkpoint.config.items() if key != "tie_word_embeddings"}
    model = models.identify(replace(case.checkpoint, config=config))
    assert model is not None
    assert model.config.share_embeddings_and_output_weights
    assert any("taken to be tied" in note for note in model.notes)
    assert facts(models.to_hub(case.checkpoint, model).tensors) == facts(case.hub().tensors)


def test_vocabulary_rows() -> None:
    case = open_case("llama")
    hub = replace(case.hub(), model=case.padded())
    out = models.from_hub(hub, "megatron-core")
    assert out.tensors["output_layer.weight"].shape == (192, 64)
    assert any("41 zero rows" in note for note in out.notes)
    assert not out.tensors["output_layer.weight"].numpy()[151:].any()
    stored = models.to_hub(with_weights(case.checkpoint, out.tensors), case.padded())
    assert stored.tensors["output_layer.weight"].shape == (192, 64), "rows stay as stored"
    back = models.from_hub(stored, "hf")
    assert back.tensors["lm_head.weight"].shape == (151, 64)
    assert any("41 padding rows" in note for note in back.notes)
    larger = replace(case.model, config=replace(case.model.config, vocab_size=200))
    with pytest.raises(MappingError, match="fewer rows than the vocabulary .*expected at least 200, found 151"):
        models.from_hub(replace(hub, model=larger), "hf")


def test_names_of_neither_world() -> None:
    case = open_case("llama")
    weights = {"encoder.layers.0.conv.weight": Constant(BY_NAME["float32"], (2,))}
    with pytest.raises(MappingError, match="neither Hugging Face's nor Megatron's"):
        models.to_hub(with_weights(case.checkpoint, weights), case.model)
    with pytest.raises(UsageError, match="unknown dialect"):
        models.from_hub(case.hub(), "klingon")


class Endless(ByteSource):
    """A source that is never read."""

    def __init__(self, name: str) -> None:
        self.name, self.path, self.size = name, None, 1 << 60

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        raise AssertionError("planning reads no tensor data")


def test_405b_is_mapped_in_a_moment() -> None:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16384, "num_hidden_layers": 126,
        "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256,
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    sources = [Endless(f"shard {number}") for number in range(191)]
    tensors: dict[str, Any] = {}

    def add(name: str, *shape: int) -> None:
        tensors[name] = Stored(sources[len(tensors) % 191], 0, BY_NAME["bfloat16"], shape)

    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        add(name, 128256, 16384)
    add("model.norm.weight", 16384)
    for layer in range(126):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", 16384), ("k", 1024), ("v", 1024), ("o", 16384)):
            add(f"{prefix}self_attn.{name}_proj.weight", rows, 16384)
        for name in ("gate", "up"):
            add(f"{prefix}mlp.{name}_proj.weight", 53248, 16384)
        add(f"{prefix}mlp.down_proj.weight", 16384, 53248)
        for name in ("input_layernorm", "post_attention_layernorm"):
            add(f"{prefix}{name}.weight", 16384)
    checkpoint = Checkpoint("x", "hf", tensors, dialect="hf", config=config, config_kind="hf")
    started = time.process_time()
    model = models.identify(checkpoint)
    assert model is not None
    hub = models.to_hub(checkpoint, model)
    out = models.from_hub(hub, "megatron-core")
    again = models.to_hub(with_weights(checkpoint, out.tensors), model)
    models.from_hub(again, "hf")
    assert time.process_time() - started < 1
    assert out.tensors["decoder.layers.mlp.linear_fc1.weight"].shape == (126, 106496, 16384)
    assert len(again.tensors) == 126 * 6 + 3
