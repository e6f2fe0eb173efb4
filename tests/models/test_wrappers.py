"""Names with more or less before them than the rules have, and configurations of which a part is the model's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models import sparse_cases
from tests.models.cases import FAMILIES, Case, facts, open_case, with_weights
from tests.models.proofs import samples
from tests.support import write_plan

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.config.model import PART_OF
from anyckpt.errors import MappingError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT
from anyckpt.formats.registry import read
from anyckpt.models.dialects import spellings
from anyckpt.operations.convert import convert
from anyckpt.tensor import LazyTensor, from_array

EVERY = (*FAMILIES, *sparse_cases.FAMILIES)
ENCODERS = ("t5_v1_1", "megatron_bert", "BertForMaskedLM", "BertModel", "vit", "vit-pooler", "clip_vision", "clip-bare")
BASES = ("model.", "backbone.", "transformer.", "gpt_neox.")
WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "language_model.")


def based(name: str, old: tuple[str, ...], new: str) -> str:
    return next((new + name[len(base) :] for base in old if name.startswith(base)), name)


def found(case: Case, tensors: Mapping[str, LazyTensor], config: dict[str, Any] | None = None) -> models.Hub:
    checkpoint = replace(case.checkpoint, tensors=dict(tensors), config=config or case.checkpoint.config)
    model = models.identify(checkpoint)
    assert model is not None
    return models.to_hub(checkpoint, model)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", EVERY)
def test_all_is_wrapped(name: str, wrapper: str) -> None:
    case = open_case(name)
    wrapped = {wrapper + key: tensor for key, tensor in case.checkpoint.tensors.items()}
    assert spellings.detect(wrapped) == "hf"
    hub = found(case, wrapped)
    assert facts(hub.tensors) == facts(case.hub().tensors)
    assert hub.ignored == {}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_parts_are_wrapped(name: str) -> None:
    """As FSDP and torch.compile of each layer name them."""
    case = open_case(name)
    tensors = case.checkpoint.tensors
    for word in (r"\1_orig_mod.", r"_fsdp_wrapped_module.\1_fsdp_wrapped_module._checkpoint_wrapped_module."):
        wrapped = {re.sub(r"^(.+?\.\d+\.)", word, key): tensor for key, tensor in tensors.items()}
        assert spellings.detect(wrapped) == "hf"
        assert facts(found(case, wrapped).tensors) == facts(case.hub().tensors)


@pytest.mark.parametrize("wrapper", ["model.", "module.", "_orig_mod.", "module.model."])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_in_wrappers(name: str, wrapper: str) -> None:
    """As a Lightning module's state dict has them; without configuration, names tell whose they are."""
    checkpoint, model = samples()[name].open()
    wrapped = {wrapper + stored: tensor for stored, tensor in checkpoint.tensors.items()}
    assert spellings.detect(wrapped) == "hf"
    again = replace(checkpoint, tensors=wrapped, dialect=None)
    known = models.identify(again)
    assert known is not None
    assert facts(models.to_hub(again, known).tensors) == facts(models.to_hub(checkpoint, model).tensors)


@pytest.mark.parametrize("name", ["bert_model.encoder.layer.0.output.dense.weight", "asr.encoder.block.0.weight"])
def test_parts_of_other_models_are_not_transformers_own(name: str) -> None:
    assert spellings.detect([name]) is None


@pytest.mark.parametrize("base", ["", "model.language_model.", "module.", "bare."])
@pytest.mark.parametrize("name", EVERY)
def test_all_but_the_head_has_another_prefix(name: str, base: str) -> None:
    case = open_case(name)
    other = {based(key, BASES, base): tensor for key, tensor in case.checkpoint.tensors.items()}
    assert other.keys() != case.checkpoint.tensors.keys()
    assert facts(found(case, other).tensors) == facts(case.hub().tensors)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_errors_name_what_is_stored(name: str, wrapper: str) -> None:
    case = open_case(name)
    wrapped = {wrapper + key: tensor for key, tensor in case.checkpoint.tensors.items()}
    for missing in wrapped:
        if "embed" in missing or ".wte." in missing:
            continue  # by which it is seen that there is a wrapper
        rest = {key: tensor for key, tensor in wrapped.items() if key != missing}
        with pytest.raises(MappingError, match="missing") as caught:
            found(case, rest)
        assert f"missing: {missing}" in str(caught.value)
    for extra in (f"{wrapper}model.layers.0.z.weight", f"{wrapper}z", "z.weight"):
        with pytest.raises(MappingError, match="no rule of family") as caught:
            found(case, {**wrapped, extra: from_array(np.zeros((3, 3), "<f4"))})
        assert extra in str(caught.value)
    first = next(key for key, tensor in wrapped.items() if tensor.ndim == 1)
    short = {**wrapped, first: wrapped[first].narrow(0, 0, 1)}
    with pytest.raises(MappingError, match="its shape contradicts") as caught:
        found(case, short)
    assert first in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "llama_tied_bf16", "gemma3", "deepseek_v3"])
def test_two_spellings_of_one_tensor(name: str) -> None:
    case = open_case(name)
    tensors = case.checkpoint.tensors
    key = "model.embed_tokens.weight"
    twice = {**tensors, f"module.{key}": tensors[key]}
    with pytest.raises(MappingError, match="no rule of family .* covers 1 tensors: module.model.embed"):
        found(case, twice)


# -- the text part of a larger model -------------------------------------------------------------------------

VISION = {
    "vision_tower.encoder.layers.0.fc1.weight": (3, 2),
    "vision_tower.embed_tokens.weight": (5, 2),
    "multi_modal_projector.linear_1.weight": (2, 2),
}


def whole(case: Case, prefix: str, outer: str, eyes: str = "") -> dict[str, LazyTensor]:
    named = {
        prefix + key.removeprefix("model.") if key.startswith("model.") else outer + key: tensor
        for key, tensor in case.checkpoint.tensors.items()
    }
    return {**named, **{eyes + key: from_array(np.zeros(shape, "<f4")) for key, shape in VISION.items()}}


def whole_config(case: Case) -> dict[str, Any]:
    text = {key: value for key, value in case.checkpoint.config.items() if key not in ("dtype", "bos_token_id")}
    return {
        "model_type": "seeing",
        "architectures": ["SeeingForConditionalGeneration"],
        "bos_token_id": 7,
        "dtype": "bfloat16",
        "text_config": {**text, "architectures": None},
        "vision_config": {"model_type": "eyes"},
    }


@pytest.mark.parametrize(
    ("prefix", "outer", "eyes"),
    [
        ("language_model.model.", "language_model.", ""),
        ("model.language_model.", "", "model."),
        ("language_model.", "", ""),
        ("model.", "", ""),
        ("module.language_model.model.", "module.language_model.", "module."),
    ],
)
@pytest.mark.parametrize("name", ["llama", "llama_tied_bf16", "gemma3", "mistral_swa", "qwen3_moe"])
def test_the_text_part(name: str, prefix: str, outer: str, eyes: str) -> None:
    case = open_case(name)
    hub = found(case, whole(case, prefix, outer, eyes), whole_config(case))
    assert facts(hub.tensors) == facts(case.hub().tensors)
    assert set(hub.ignored) == {eyes + key for key in VISION}
    assert "another part of the seeing model" in next(iter(hub.ignored.values()))
    assert any("only the text part of the seeing model is taken: 3 tensors of " in note for note in hub.notes)
    config = hub.model.config
    assert config.extra[PART_OF] == "seeing"
    assert config.bos_token_id == 7
    same = replace(config, extra=case.model.config.extra, bos_token_id=case.model.config.bos_token_id)
    assert same == case.model.config
    rendered = models.render_config(hub.model, "hf")
    assert rendered["model_type"] == case.checkpoint.config["model_type"]
    assert "text_config" not in rendered
    assert "vision_config" not in rendered


def test_a_missing_tensor_of_the_text_part() -> None:
    case = open_case("llama")
    tensors = whole(case, "language_model.model.", "language_model.")
    for missing in ("language_model.lm_head.weight", "language_model.model.norm.weight"):
        rest = {key: tensor for key, tensor in tensors.items() if key != missing}
        with pytest.raises(MappingError, match=f"missing: {missing}"):
            found(case, rest, {**whole_config(case), "tie_word_embeddings": False})
    extra = "language_model.model.layers.0.z"
    with pytest.raises(MappingError, match=f"covers 1 tensors: {extra}"):
        found(case, {**tensors, extra: from_array(np.zeros((3, 3), "<f4"))}, whole_config(case))


def test_parts_of_a_model_that_is_no_part_are_refused() -> None:
    case = open_case("llama")
    with pytest.raises(MappingError, match="covers 3 tensors: .*vision_tower"):
        found(case, whole(case, "language_model.model.", "language_model."))


def test_a_part_of_no_known_family() -> None:
    config = {"model_type": "seeing", "architectures": ["Seeing"], "text_config": {"model_type": "unheard_of"}}
    assert models.identify(Checkpoint("x", "hf", {}, config=config, config_kind="hf")) is None
    config["text_config"] = "llama"  # type: ignore[assignment]
    assert models.identify(Checkpoint("x", "hf", {}, config=config, config_kind="hf")) is None


def test_a_quantized_whole() -> None:
    case = open_case("llama")
    config = {**whole_config(case), "quantization_config": {"quant_method": "awq"}}
    with pytest.raises(MappingError, match="quantized"):
        found(case, with_weights(case.checkpoint, whole(case, "language_model.model.", "")).tensors, config)


def test_the_text_part_alone_for_transformers(tmp_path: Path) -> None:
    """A whole model stays whole; the text part alone is asked for by its names, and gets its own configuration."""
    case = open_case("gemma3")
    whole_model = replace(
        case.checkpoint, tensors=whole(case, "language_model.model.", "language_model."), config=whole_config(case)
    )
    assert FORMAT.plan is not None
    source = write_plan(FORMAT.plan(whole_model, WriteOptions()), tmp_path / "whole")
    convert(str(source), tmp_path / "same", to="hf")
    same = read(str(tmp_path / "same"))
    assert facts(same.tensors) == facts(whole_model.tensors)
    assert same.config["model_type"] == "seeing"
    done = convert(str(source), tmp_path / "named", to="hf", family="gemma3")
    named = read(str(tmp_path / "named"))
    assert facts(named.tensors) == facts(whole_model.tensors)
    assert named.config == same.config
    assert not done.ignored
    assert not done.notes
    convert(str(source), tmp_path / "text", to="hf", family="gemma3", include="language_model.*")
    text = read(str(tmp_path / "text"))
    assert facts(text.tensors) == facts(case.checkpoint.tensors)
    assert text.config["model_type"] == "gemma3_text"
    assert "vision_config" not in text.config
