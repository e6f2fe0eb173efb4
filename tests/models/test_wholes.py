"""Larger models that stay whole in Megatron: the text part by its family's rules, the other parts as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests.models.cases import Case, facts, open_case
from tests.models.proofs import samples, values
from tests.support import write_plan

import anyckpt
from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.config.model import WHOLE
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT
from anyckpt.formats.registry import read
from anyckpt.tensor import LazyTensor, stack

TOWER = {
    **{
        f"visual.blocks.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {
            "norm1.weight": (8,), "norm1.bias": (8,), "norm2.weight": (8,), "norm2.bias": (8,),
            "attn.qkv.weight": (24, 8), "attn.qkv.bias": (24,), "attn.proj.weight": (8, 8), "attn.proj.bias": (8,),
            "mlp.linear_fc1.weight": (12, 8), "mlp.linear_fc1.bias": (12,), "mlp.linear_fc2.weight": (8, 12),
            "mlp.linear_fc2.bias": (8,),
        }.items()
    },
    **{
        f"visual.{module}.{name}": shape
        for module in ("merger", "deepstack_merger_list.0")
        for name, shape in {
            "norm.weight": (8,), "norm.bias": (8,), "linear_fc1.weight": (32, 32), "linear_fc1.bias": (32,),
            "linear_fc2.weight": (16, 32), "linear_fc2.bias": (16,),
        }.items()
    },
    "visual.patch_embed.proj.weight": (8, 3, 2, 4, 4), "visual.patch_embed.proj.bias": (8,),
    "visual.pos_embed.weight": (16, 8),
}  # fmt: skip
EYES = {
    "vision_tower.encoder.layers.0.fc1.weight": (3, 2),
    "multi_modal_projector.linear_1.weight": (2, 4),
}
GEMMAS = {
    "vision_tower.vision_model.embeddings.patch_embedding.weight": (4, 3, 2, 2),
    "multi_modal_projector.mm_input_projection_weight": (4, 6),
    "multi_modal_projector.mm_soft_emb_norm.weight": (4,),
}
CASES = {
    "qwen3_vl": ("qwen3", "model.language_model.", "", "model.", TOWER, {"num_heads": 2}),
    "gemma3": ("gemma3", "language_model.model.", "language_model.", "", GEMMAS, {}),
    "mistral3": ("mistral_swa", "language_model.model.", "language_model.", "", EYES, {}),
    "llava": ("llama", "language_model.model.", "language_model.", "", EYES, {}),
    "qwen2_5_vl": ("qwen2", "model.", "", "", {"visual.blocks.0.attn.qkv.weight": (24, 8)}, {}),
    "qwen2_5_omni_thinker": ("qwen2", "model.", "", "", {"audio_tower.conv1.weight": (4, 3, 2)}, {}),
    "unheard_of": ("mixtral", "model.language_model.", "", "model.", EYES, {}),
}
"""Type -> fixture of the text part, how its names begin, what is before the head's and the others', and the others."""


def whole(kind: str) -> tuple[Case, Checkpoint]:
    """A larger model of a type that has a fixture as its text part."""
    fixture, prefix, outer, eyes, shapes, vision = CASES[kind]
    case = open_case(fixture)
    named: dict[str, LazyTensor] = {
        prefix + key.removeprefix("model.") if key.startswith("model.") else outer + key: tensor
        for key, tensor in case.checkpoint.tensors.items()
    }
    named |= {eyes + key: values(key, shape) for key, shape in shapes.items()}
    inside = {"architectures", "tie_word_embeddings"}
    text = {key: value for key, value in case.checkpoint.config.items() if key not in inside}
    config = {
        "model_type": kind,
        "architectures": ["Seeing"],
        "tie_word_embeddings": case.model.config.share_embeddings_and_output_weights,
        "text_config": {**text, "mine": {"kept": True}},
        "vision_config": {"model_type": "eyes", **vision},
        "image_token_id": 7,
    }
    return case, replace(case.checkpoint, tensors=named, config=config, artifacts={}, details={})


def saved(checkpoint: Checkpoint, folder: Path) -> Path:
    assert FORMAT.plan is not None
    return write_plan(FORMAT.plan(checkpoint, WriteOptions()), folder)


@pytest.mark.parametrize("target", ["megatron-core", "megatron-core-zarr", "megatron-bridge"])
@pytest.mark.parametrize("kind", CASES)
def test_there_and_back(kind: str, target: str, tmp_path: Path) -> None:
    _, source = whole(kind)
    done = anyckpt.convert(saved(source, tmp_path / "hf"), tmp_path / "there", to=target)
    assert any(f"the {kind} model stays whole" in note for note in done.notes)
    assert not done.lost()
    there = read(str(tmp_path / "there"))
    assert "language_model.embedding.word_embeddings.weight" in there.tensors
    back = anyckpt.convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert not any("only the text part" in note for note in back.notes)
    after = read(str(tmp_path / "back"))
    assert facts(after.tensors) == facts(source.tensors)
    assert after.config == source.config


def named(kind: str) -> dict[str, LazyTensor]:
    """A larger model as a distributed checkpoint names it."""
    _, source = whole(kind)
    model = models.identify(source)
    assert model is not None
    return models.from_hub(models.to_hub(source, model), "megatron-core", in_place=True).tensors


@pytest.mark.parametrize("kind", CASES)
def test_the_text_part_is_named_as_alone(kind: str) -> None:
    case, source = whole(kind)
    alone = models.from_hub(replace(case.hub(), model=case.model), "megatron-core").tensors
    together = named(kind)
    prefix = "language_model."
    assert facts({key.removeprefix(prefix): t for key, t in together.items() if key.startswith(prefix)}) == facts(alone)
    assert sum(tensor.nbytes for tensor in together.values()) == sum(t.nbytes for t in source.tensors.values())


def test_a_tower_of_megatrons_own_layers() -> None:
    """Query, key and value of Qwen3-VL's tower are interleaved by head, and its layers are stacked."""
    found = {key: tensor.numpy() for key, tensor in named("qwen3_vl").items() if key.startswith("vision_model.")}
    own = {key: values(key, shape).numpy() for key, shape in TOWER.items()}
    layers = [own[f"visual.blocks.{layer}.attn.qkv.weight"].reshape(3, 2, 4, 8) for layer in range(2)]
    expected = np.stack([layer.transpose(1, 0, 2, 3).reshape(24, 8) for layer in layers])
    assert np.array_equal(found["vision_model.decoder.layers.self_attention.linear_qkv.weight"], expected)
    norms = np.stack([own[f"visual.blocks.{layer}.norm2.bias"] for layer in range(2)])
    assert np.array_equal(found["vision_model.decoder.layers.mlp.linear_fc1.layer_norm_bias"], norms)
    merger = found["vision_model.decoder.deepstack_merger_list.0.patch_norm.weight"]
    assert np.array_equal(merger, own["visual.deepstack_merger_list.0.norm.weight"])
    assert np.array_equal(found["vision_model.merger.linear_fc2.bias"], own["visual.merger.linear_fc2.bias"])
    assert sum(array.size for array in found.values()) == sum(array.size for array in own.values())


def test_gemmas_projector_is_transposed() -> None:
    found = named("gemma3")
    projection = values("multi_modal_projector.mm_input_projection_weight", (4, 6)).numpy()
    assert np.array_equal(found["multi_modal_projector.proj.weight"].numpy(), projection.T)
    assert "multi_modal_projector.mm_soft_embed_norm.weight" in found


@pytest.mark.parametrize("heads", [None, 0, "2", 5])
def test_a_tower_without_heads(heads: Any) -> None:
    _, source = whole("qwen3_vl")
    config = {**source.config, "vision_config": {"num_heads": heads}}
    model = models.identify(replace(source, config=config))
    assert model is not None
    with pytest.raises(MappingError, match=r"vision_config\.num_heads"):
        models.from_hub(models.to_hub(replace(source, config=config), model), "megatron-core", in_place=True)


@pytest.mark.parametrize("target", ["nemo", "nemo2", "megatron-lm"])
def test_others_take_the_text_alone(target: str, tmp_path: Path) -> None:
    case, source = whole("qwen3_vl")
    there = tmp_path / ("there.nemo" if target == "nemo" else "there")
    done = anyckpt.convert(saved(source, tmp_path / "hf"), there, to=target)
    assert any("only the text part of the qwen3_vl model is taken" in note for note in done.notes)
    assert {name.removeprefix("model.") for name in done.lost()} == set(TOWER)
    anyckpt.convert(there, tmp_path / "back", to="hf")
    assert facts(read(str(tmp_path / "back")).tensors) == facts(case.checkpoint.tensors)


def test_from_the_whole_to_the_text_alone(tmp_path: Path) -> None:
    """The other parts are left out with ``exclude``, or by a format of Megatron's that has none."""
    case, source = whole("qwen3_vl")
    path = saved(source, tmp_path / "hf")
    anyckpt.convert(path, tmp_path / "text", to="megatron-core", exclude="*visual*")
    assert "embedding.word_embeddings.weight" in read(str(tmp_path / "text")).tensors
    anyckpt.convert(path, tmp_path / "whole", to="megatron-core")
    done = anyckpt.convert(tmp_path / "whole", tmp_path / "lm", to="megatron-lm")
    assert any("only the text part of the qwen3_vl model is taken" in note for note in done.notes)
    for name in ("text", "lm"):
        anyckpt.convert(tmp_path / name, tmp_path / f"{name}-hf", to="hf")
        after = read(str(tmp_path / f"{name}-hf"))
        assert facts(after.tensors) == facts(case.checkpoint.tensors)
        assert after.config["model_type"] == "qwen3"


def test_what_changed_of_the_text_is_in_its_configuration(tmp_path: Path) -> None:
    _, source = whole("qwen3_vl")
    anyckpt.convert(saved(source, tmp_path / "hf"), tmp_path / "there", to="megatron-core", dtype="float32")
    anyckpt.convert(tmp_path / "there", tmp_path / "back", to="hf")
    text = read(str(tmp_path / "back")).config["text_config"]
    before = source.config["text_config"]
    assert text["dtype"] == "float32"
    assert {k: v for k, v in text.items() if not k.endswith("dtype")} == {
        k: v for k, v in before.items() if not k.endswith("dtype")
    }


def test_megatron_files_that_do_not_say_what_they_are_part_of(tmp_path: Path) -> None:
    """As Megatron-Bridge writes them: with ``config.json`` of the whole beside, which the user gives."""
    _, source = whole("llava")
    path = saved(source, tmp_path / "hf")
    anyckpt.convert(path, tmp_path / "there", to="megatron-bridge")
    run_config = next((tmp_path / "there").rglob("run_config.yaml"))
    written = yaml.safe_load(run_config.read_text())
    del written["anyckpt"]["hf_config"]
    run_config.write_text(yaml.safe_dump(written))
    config = tmp_path / "hf" / "config.json"
    anyckpt.convert(tmp_path / "there", tmp_path / "back", to="hf", config=config)
    after = read(str(tmp_path / "back"))
    assert facts(after.tensors) == facts(source.tensors)
    assert after.config == source.config


@pytest.mark.parametrize(
    ("prefix", "outer", "eyes"),
    [("model.text_part.", "", "model."), ("language_model.model.", "language_model.", ""), ("llm.", "llm.", "eyes.")],
)
def test_names_of_a_type_that_is_not_known(prefix: str, outer: str, eyes: str, tmp_path: Path) -> None:
    """They are recorded as they are stored, those of other parts by their first word."""
    case, source = whole("unheard_of")
    named = {
        prefix + key.removeprefix("model.") if key.startswith("model.") else outer + key: tensor
        for key, tensor in case.checkpoint.tensors.items()
    }
    named |= {eyes + key: values(key, shape) for key, shape in EYES.items()}
    named["image_newline"] = values("image_newline", (4,))
    checkpoint = replace(source, tensors=named)
    anyckpt.convert(saved(checkpoint, tmp_path / "hf"), tmp_path / "there", to="megatron-core")
    anyckpt.convert(tmp_path / "there", tmp_path / "back", to="hf")
    after = read(str(tmp_path / "back"))
    assert facts(after.tensors) == facts(named)
    assert after.config == source.config


def test_a_text_part_under_another_key(tmp_path: Path) -> None:
    """As InternVL's own code has it, which says beside it what its pad token is."""
    case, source = whole("unheard_of")
    named = {f"language_model.{key}": tensor for key, tensor in case.checkpoint.tensors.items()}
    more = {"vision_model.x.weight": (3,), "mlp1.0.weight": (2, 2)}
    named |= {key: values(key, shape) for key, shape in more.items()}
    config = {**source.config, "llm_config": source.config["text_config"], "pad_token_id": 5}
    del config["text_config"]
    checkpoint = replace(source, tensors=named, config=config)
    anyckpt.convert(saved(checkpoint, tmp_path / "hf"), tmp_path / "there", to="megatron-core")
    assert more.keys() <= read(str(tmp_path / "there")).tensors.keys()
    anyckpt.convert(tmp_path / "there", tmp_path / "back", to="hf")
    after = read(str(tmp_path / "back"))
    assert facts(after.tensors) == facts(named)
    assert after.config == config


@pytest.mark.parametrize(
    "text", ["1", "{}", '{"text": "a.", "head": "", "parts": []}', '{"text": 1, "head": "", "parts": {}}']
)
def test_a_damaged_record_of_names(text: str) -> None:
    case = open_case("llama")
    arguments = {**models.render_config(case.model, "megatron-args"), "hf_config": "{}", "hf_names": text}
    checkpoint = replace(case.checkpoint, tensors=case.megatron, config=arguments, config_kind="megatron-args")
    with pytest.raises(MappingError, match="hf_names"):
        models.identify(replace(checkpoint, dialect="hub"))


@pytest.mark.parametrize("text", ["no JSON", "[1]", '{"model_type": 3}'])
def test_a_damaged_record_of_the_whole(text: str, tmp_path: Path) -> None:
    case = open_case("llama")
    arguments = {**models.render_config(case.model, "megatron-args"), "hf_config": text}
    checkpoint = replace(case.checkpoint, tensors=case.megatron, config=arguments, config_kind="megatron-args")
    if text.startswith("{"):
        found = models.identify(replace(checkpoint, dialect="hub"))
        assert found is not None
        assert found.config.extra[WHOLE] == json.loads(text)
    else:
        with pytest.raises(MappingError, match="hf_config"):
            models.identify(replace(checkpoint, dialect="hub"))


def test_a_model_that_also_speaks(tmp_path: Path) -> None:
    """Qwen's Omni: its text part is that of its thinker, and its talker has layers of the same names."""
    case, _ = whole("qwen2_5_vl")
    named: dict[str, LazyTensor] = {f"thinker.{key}": tensor for key, tensor in case.checkpoint.tensors.items()}
    others = {
        "thinker.visual.blocks.0.norm1.weight": (8,), "thinker.audio_tower.conv1.weight": (4, 3, 2),
        "talker.model.embed_tokens.weight": (5, 4), "talker.model.layers.0.input_layernorm.weight": (4,),
        "token2wav.x": (2,),
    }  # fmt: skip
    named |= {key: values(key, shape) for key, shape in others.items()}
    text = {key: value for key, value in case.checkpoint.config.items() if key != "architectures"}
    thinker = {"text_config": {**text, "model_type": "qwen2_5_omni_text"}, "audio_config": {"x": 1}}
    config = {"model_type": "qwen2_5_omni", "architectures": ["Omni"], "thinker_config": thinker, "talker_config": {}}
    source = replace(case.checkpoint, tensors=named, config=config, artifacts={}, details={})
    anyckpt.convert(saved(source, tmp_path / "hf"), tmp_path / "there", to="megatron-core")
    there = read(str(tmp_path / "there")).tensors
    assert "thinker.language_model.embedding.word_embeddings.weight" in there
    assert {"thinker.audio_model.conv1.weight", "thinker.visual.blocks.0.norm1.weight", "token2wav.x"} <= there.keys()
    anyckpt.convert(tmp_path / "there", tmp_path / "back", to="hf")
    after = read(str(tmp_path / "back"))
    assert facts(after.tensors) == facts(source.tensors)
    assert after.config == source.config


def test_positions_in_pictures() -> None:
    """Megatron has a word for them, and their sections; text is the same without."""
    _, source = whole("qwen3_vl")
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {**source.config["text_config"], "rope_parameters": rope, "model_type": "qwen3_vl_text"}
    text.pop("rope_scaling", None)
    config = {**source.config, "text_config": text}
    model = models.identify(replace(source, config=config))
    assert model is not None
    assert model.family == "qwen3"
    assert model.config.rope_scaling is None
    arguments = models.render_config(model, "megatron-args")
    assert arguments["position_embedding_type"] == "mrope"
    assert arguments["mrope_section"] == [4, 2, 2]
    again = models.identify(replace(source, tensors=named("qwen3_vl"), config=arguments, config_kind="megatron-args",
                                    dialect="megatron-core"))  # fmt: skip
    assert again is not None
    assert again.family == "qwen3"
    assert again.config.position_embedding_type == "rope"


def test_keys_of_the_text_beside_the_others() -> None:
    """As Qwen2.5-VL is published: no ``text_config``."""
    _, source = whole("qwen2_5_vl")
    text = source.config["text_config"]
    flat = {**text, **{key: value for key, value in source.config.items() if key != "text_config"}}
    checkpoint = replace(source, config=flat)
    model = models.identify(checkpoint)
    assert model is not None
    assert model.family == "qwen2"
    hub = models.to_hub(checkpoint, model)
    assert list(hub.beside) == ["visual.blocks.0.attn.qkv.weight"]


def test_whether_the_output_layer_is_the_embedding_says_the_whole() -> None:
    """transformers 5.24 writes a default of the text part's class beside it, which nothing follows."""
    _, source = whole("llava")
    assert source.config["tie_word_embeddings"] is False
    config = {**source.config, "text_config": {**source.config["text_config"], "tie_word_embeddings": True}}
    model = models.identify(replace(source, config=config))
    assert model is not None
    assert not model.config.share_embeddings_and_output_weights


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts_of_either_orientation(transposed: bool) -> None:
    """Only shapes tell: Qwen3-VL's are (in, out) as published, (out, in) as transformers 5 holds them."""
    checkpoint, model = samples()["qwen3_moe"].open()
    config = model.config
    count = config.num_moe_experts
    assert count is not None
    stacked: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if ".experts." not in name:
            stacked[name] = tensor
    for layer in range(config.num_layers):
        each = f"model.layers.{layer}.mlp.experts"
        if f"{each}.0.gate_proj.weight" not in checkpoint.tensors:
            continue
        for new, olds in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            parts = [_joined(checkpoint.tensors, [f"{each}.{e}.{old}.weight" for old in olds]) for e in range(count)]
            stacked[f"{each}.{new}"] = stack([part.transpose() if transposed else part for part in parts])
    hub = models.to_hub(replace(checkpoint, tensors=stacked), model)
    assert facts(hub.tensors) == facts(models.to_hub(checkpoint, model).tensors)
    same = models.from_hub(hub, "hf", in_place=True).tensors
    assert facts(same) == facts(checkpoint.tensors)


def _joined(tensors: Mapping[str, LazyTensor], names: list[str]) -> LazyTensor:
    from anyckpt.tensor import concatenate

    return concatenate([tensors[name] for name in names], 0)


def test_a_whole_is_no_target_without_a_family(tmp_path: Path) -> None:
    """Of a model whose text part is of no known family nothing is guessed."""
    _, source = whole("llava")
    config = {**source.config, "text_config": {**source.config["text_config"], "model_type": "unheard_of"}}
    with pytest.raises((MappingError, UsageError)):
        anyckpt.convert(saved(replace(source, config=config), tmp_path / "hf"), tmp_path / "x", to="megatron-core")
