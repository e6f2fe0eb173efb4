"""Models that are no decoders: their fixtures, which family they are, configurations and ranks."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.models.cases import Case, facts, open_case, partition_of, with_weights
from tests.models.encoder_cases import FIXTURES, T5, case, made
from tests.support import fixture_path

import anyckpt
from anyckpt import models
from anyckpt.config.model import ModelConfig
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats import registry
from anyckpt.models.dialects import spellings
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.tensor import from_array

BEHIND = {
    "megatron_bert": set(),
    "t5_v1_1": {"lm_head.output_layer.bias"},
    "clip_vision": {"post_layernorm.weight", "post_layernorm.bias"},
    "vit": {"layernorm.weight", "layernorm.bias"},
}
"""What the hub has besides the fixture's tensors of Megatron-Core: zeros that it adds, norms that it leaves out."""
TAGS = {"col0": {"qkv", "column", "gate-up"}, "row1": {"row"}, "gateup0": {"gate-up"}, "vocab0": {"vocabulary"}}


@pytest.mark.parametrize("name", FIXTURES)
def test_the_hub_is_what_gave_equal_outputs(name: str) -> None:
    found, expected = facts(case(name).hub().tensors), facts(case(name).megatron)
    assert {key: found[key] for key in expected} == expected
    assert found.keys() - expected.keys() == BEHIND[name]


@pytest.mark.parametrize("name", FIXTURES)
def test_partitions_are_those_of_the_fixture(name: str) -> None:
    rules = {rule.hub: partition_of(rule.hub) for rule in case(name).model.definition.rules}
    for rule in case(name).meta["rules"]:
        hub = (
            rule["mcore"].replace("output_layer.weight", "lm_head.output_layer.weight")
            if name == "t5_v1_1"
            else rule["mcore"]
        )
        if hub in rules:
            assert rules[hub] in TAGS.get(rule["tp"], {"replicated"}), hub
    assert all(hub in rules for hub in _patterns(case(name)))


def _patterns(fixture: Case) -> set[str]:
    return {re.sub(r"\.layers\.\d+\.", ".layers.*.", name) for name in fixture.megatron}


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.parametrize("dialect", ["hub", "megatron-core", "nemo-flat"])
def test_the_family_follows_from_parts(name: str, dialect: str) -> None:
    """Megatron's arguments do not name it, and say ``bert_binary_head``, ``img_h`` and so on of a GPT, too."""
    fixture = case(name)
    rendered = models.render_config(fixture.model, "megatron-args")
    del rendered["hf_model_type"]
    named = models.from_hub(fixture.hub(), dialect).tensors
    between = replace(with_weights(fixture.checkpoint, named), config=rendered, config_kind="megatron-args")
    found = models.identify(between)
    assert found is not None
    assert found.family == fixture.model.family


def test_a_gpt_with_the_arguments_of_others() -> None:
    fixture = open_case("gpt2")
    rendered = {
        **models.render_config(fixture.model, "megatron-args"), "bert_binary_head": True, "img_h": 224, "img_w": 224,
        "patch_dim": 16, "num_classes": 1000, "encoder_num_layers": fixture.model.config.num_layers,
        "decoder_num_layers": None, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    }  # fmt: skip
    del rendered["hf_model_type"]
    named = models.from_hub(fixture.hub(), "hub").tensors
    between = replace(with_weights(fixture.checkpoint, named), config=rendered, config_kind="megatron-args")
    found = models.identify(between)
    assert found is not None
    assert found.family == "gpt2"
    blank = ModelConfig("", 1, 1, 1, 1, 1, 1)
    assert all(getattr(found.config, key) == getattr(blank, key) for key in ("img_h", "num_classes", "add_pooler"))
    bert = case("megatron_bert")
    other = replace(
        between, tensors=models.from_hub(bert.hub(), "hub").tensors, config={**rendered, "openai_gelu": False}
    )
    found = models.identify(other)
    assert found is not None
    assert found.family == "megatron-bert", "by the stack that is there"


def test_megatron_lms_own_bert() -> None:
    """Its arguments say nothing of a pooler or of token types: the tensors do."""
    fixture = case("megatron_bert")
    rendered = models.render_config(fixture.model, "megatron-args")
    for key in ("num_tokentypes", "add_pooler", "add_lm_head", "hf_model_type"):
        del rendered[key]
    named = models.from_hub(fixture.hub(), "hub").tensors
    between = replace(with_weights(fixture.checkpoint, named), config=rendered, config_kind="megatron-args")
    found = models.identify(between)
    assert found is not None
    back = models.from_hub(models.to_hub(between, found), "hf").tensors
    assert facts(back) == facts(fixture.checkpoint.tensors)


def test_a_t5_with_positions_of_its_own_is_of_no_family(tmp_path: Path) -> None:
    """Megatron's own T5 learns positions, which transformers' has not: names are translated all the same."""
    checkpoint, model = made({**T5, "scale_decoder_outputs": False})
    rendered = models.render_config(model, "nemo2")
    rendered["config"]["position_embedding_type"] = "learned_absolute"
    named = models.from_hub(models.to_hub(checkpoint, model), "nemo2").tensors
    named["module.embedding.position_embeddings.weight"] = from_array(np.zeros((512, 32), "<f4"))
    between = replace(with_weights(checkpoint, named), config=rendered, config_kind="nemo2")
    assert models.identify(between) is None
    renamed_all = spellings.rename(named, "nemo2", "megatron-core")[0]
    assert "embedding.position_embeddings.weight" in renamed_all


@pytest.mark.parametrize("name", FIXTURES)
def test_stored_names_are_known_without_a_configuration(name: str) -> None:
    assert spellings.detect(case(name).checkpoint.tensors) == "hf"
    for dialect in ("hub", "megatron-core", "nemo-flat", "nemo-sharded", "nemo2"):
        assert spellings.detect(models.from_hub(case(name).hub(), dialect).tensors) == dialect


def test_stacks_of_different_lengths() -> None:
    checkpoint, model = made(T5)
    named = models.from_hub(models.to_hub(checkpoint, model), "megatron-core").tensors
    assert named["encoder.layers.mlp.linear_fc2.weight"].shape == (2, 32, 48)
    assert named["decoder.layers.mlp.linear_fc2.weight"].shape == (3, 32, 48)


@pytest.mark.parametrize(
    ("name", "target"), [("megatron_bert", "nemo"), ("t5_v1_1", "nemo"), ("t5_v1_1", "megatron-lm")]
)
def test_files_of_ranks_there_and_back(name: str, target: str, tmp_path: Path) -> None:
    source = fixture_path(f"families/{name}/hf")
    there = tmp_path / ("there.nemo" if target == "nemo" else "there")
    anyckpt.convert(source, there, to=target, layout=LayoutRequest(tensor_parallel=2))
    stored = registry.read(str(there))
    if target == "nemo":
        prefix = "enc_dec_model" if name == "t5_v1_1" else "model"
        assert all(key.split(".")[1] == prefix for key in stored.tensors)
        assert stored.config["target"].rpartition(".")[2] in ("MegatronBertModel", "MegatronT5Model")
    else:
        assert any(key.endswith("model.output_layer.bias") for key in stored.tensors), "registered twice"
    anyckpt.convert(there, tmp_path / "back", to="hf")
    assert facts(anyckpt.open(tmp_path / "back").tensors) == facts(anyckpt.open(source).tensors)


def test_a_pipeline(tmp_path: Path) -> None:
    """One stack is dealt out; Megatron-LM has no pipeline for a T5."""
    bert, t5 = (fixture_path(f"families/{name}/hf") for name in ("megatron_bert", "t5_v1_1"))
    pipeline = LayoutRequest(pipeline_parallel=2)
    anyckpt.convert(bert, tmp_path / "there", to="megatron-lm", layout=pipeline)
    anyckpt.convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert facts(anyckpt.open(tmp_path / "back").tensors) == facts(anyckpt.open(bert).tensors)
    with pytest.raises(UsageError, match=r"an encoder-decoder is divided at a pipeline split rank.*choose --pp 1"):
        anyckpt.convert(t5, tmp_path / "t5", to="megatron-lm", layout=pipeline)


@pytest.mark.parametrize(("name", "target"), [("clip_vision", "nemo"), ("vit", "nemo"), ("vit", "nemo2")])
def test_frameworks_without_such_models(name: str, target: str, tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="has no models of family"):
        anyckpt.convert(fixture_path(f"families/{name}/hf"), tmp_path / "there", to=target)


@pytest.mark.parametrize("name", FIXTURES)
def test_config_json_comes_back(name: str) -> None:
    """Every key that says something about the model, through each framework's configuration."""
    fixture = case(name)
    dropped = {"initializer_factor", "classifier_dropout", "transformers_version", "use_cache", "dtype", "torch_dtype"}
    dropped |= {"encoder_stride", "pooler_act", "pooler_output_size", "projection_dim", "bos_token_id", "eos_token_id"}
    for dialect, kind in (("hub", "megatron-args"), ("nemo-flat", "nemo1"), ("nemo2", "nemo2")):
        try:
            rendered = json.loads(json.dumps(models.render_config(fixture.model, kind)))
        except MappingError:
            continue
        named = models.from_hub(fixture.hub(), dialect).tensors
        between = replace(with_weights(fixture.checkpoint, named), config=rendered, config_kind=kind)
        again = models.identify(between)
        assert again is not None
        back = models.render_config(again, "hf")
        kept = {key: value for key, value in fixture.checkpoint.config.items() if key not in dropped}
        if kind == "nemo2":
            kept.pop("pad_token_id", None)  # of the tokenizer
        assert {key: back.get(key) for key in kept} == kept, kind
