"""One module of a model taken alone, and the language model of NeMo's SpeechLM2 models with what lies beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.operations.test_merge_in_place import Arrays, factors, save
from tests.support import fixture_path

import anyckpt
from anyckpt.errors import FormatError, UsageError
from anyckpt.tensor import from_array

LLAMA = fixture_path("families/llama/hf")
ADAPTED = "model.layers.1.mlp.up_proj"
PERCEPTION = ("preprocessor.featurizer.window", "encoder.pre_encode.out.weight", "encoder.layers.0.norm_out.weight",
              "modality_adapter.layers.0.norm_out.weight", "proj.weight")  # fmt: skip


def language() -> Arrays:
    return {name: tensor.numpy() for name, tensor in anyckpt.open(LLAMA).tensors.items()}


def merged(scale: float) -> Arrays:
    result = language()
    own = factors(ADAPTED, *result[f"{ADAPTED}.weight"].shape, prefix="")
    result[f"{ADAPTED}.weight"] += scale * (own[f"{ADAPTED}.lora_B.weight"] @ own[f"{ADAPTED}.lora_A.weight"])
    return result


def own_names(kind: str) -> Arrays:
    """The language model as one of SpeechLM2's classes names its tensors."""
    tensors = language()
    if kind == "automodel":
        return {f"llm.{name}": array for name, array in tensors.items()}
    embedding = {"embed_tokens.weight": tensors.pop("model.embed_tokens.weight")}
    if kind == "duplex":
        outside = {**embedding, "lm_head.weight": tensors.pop("lm_head.weight")}
        return outside | {f"llm.{name.removeprefix('model.')}": array for name, array in tensors.items()}
    return embedding | {f"llm.{name}": array for name, array in tensors.items()}


def with_adapter(tensors: Arrays, kind: str) -> Arrays:
    """As peft wraps it, or NeMo Automodel."""
    rows, columns = language()[f"{ADAPTED}.weight"].shape
    own = factors(ADAPTED, rows, columns, prefix="")
    if kind == "automodel":
        return tensors | {f"llm.{name}": array for name, array in own.items()}
    result: Arrays = {}
    for name, array in tensors.items():
        inside = name.removeprefix("llm.")
        if inside == name:
            result[name] = array
        elif inside.removeprefix("model.") == f"{ADAPTED.removeprefix('model.')}.weight":
            module = inside.removesuffix(".weight")
            result[f"llm.base_model.model.{module}.base_layer.weight"] = array
            for key, factor in own.items():
                end = key.removeprefix(f"{ADAPTED}.").replace(".weight", ".default.weight")
                result[f"llm.base_model.model.{module}.{end}"] = factor
        else:
            result[f"llm.base_model.model.{inside}"] = array
    return result


def folder(path: Path, tensors: Arrays, backbone: bool = True, **settings: Any) -> Path:
    speech = {f"perception.{name}": np.full((3,), place, np.float32) for place, name in enumerate(PERCEPTION)}
    path.mkdir()
    save(path / "model.safetensors", {**tensors, **speech})
    config = {
        "model_type": "nemo_speechlm", "architectures": ["NeMoSpeechLMForConditionalGeneration"],
        "pretrained_llm": "a/llama", "pretrained_asr": "an/encoder", **settings,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    (path / "README.md").write_text("a card of the whole")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LLAMA / name, path / name)
    if backbone:
        (path / "llm_backbone").mkdir()
        shutil.copy(LLAMA / "config.json", path / "llm_backbone")
    return path


def arrays_of(path: Path) -> Arrays:
    return {name: tensor.numpy() for name, tensor in anyckpt.open(path).tensors.items()}


def check_equal(path: Path, expected: Arrays) -> None:
    found = arrays_of(path)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["salm", "automodel", "duplex"])
def test_a_language_model_is_the_folder_that_it_was(kind: str, tmp_path: Path) -> None:
    speech = folder(tmp_path / "speech", own_names(kind))
    done = anyckpt.convert(speech, tmp_path / "llm", to="hf", module="llm")
    assert anyckpt.diff(LLAMA, tmp_path / "llm").equal
    assert (tmp_path / "llm" / "tokenizer.json").read_bytes() == (LLAMA / "tokenizer.json").read_bytes()
    assert done.ignored.keys() == {"README.md", *(f"perception.{name}" for name in PERCEPTION)}
    anyckpt.convert(speech, tmp_path / "llm.nemo", module="llm")
    assert anyckpt.diff(LLAMA, tmp_path / "llm.nemo", weights_only=True).equal


@pytest.mark.parametrize(
    ("kind", "settings", "scale"),
    [
        ("salm", {"lora": {"r": 2, "lora_alpha": 6}}, 3.0),
        ("salm", {"lora": {"r": 4}}, 4.0),
        ("duplex", {"lora": {"r": 2, "lora_alpha": 4, "use_rslora": True}}, 2 * 2**0.5),
        ("automodel", {"use_nemo_automodel": True, "lora": {"dim": 2, "alpha": 5}}, 2.5),
        ("automodel", {"use_nemo_automodel": True, "lora": {"dim": 2}}, 16.0),
    ],
)
def test_its_adapter_is_merged_as_its_settings_say(
    kind: str, settings: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    speech = folder(tmp_path / "speech", with_adapter(own_names(kind), kind), **settings)
    anyckpt.convert(speech, tmp_path / "llm", to="hf", module="llm")
    check_equal(tmp_path / "llm", merged(scale))


def test_its_adapter_is_taken_out(tmp_path: Path) -> None:
    speech = folder(tmp_path / "speech", with_adapter(own_names("salm"), "salm"), lora={"r": 2, "lora_alpha": 6})
    anyckpt.convert(speech, tmp_path / "adapter", to="peft", module="llm")
    anyckpt.merge_lora(LLAMA, tmp_path / "adapter", tmp_path / "merged", to="hf")
    check_equal(tmp_path / "merged", merged(3.0))


def test_ranks_that_differ_need_an_alpha(tmp_path: Path) -> None:
    settings = {"lora": {"r": 2, "lora_alpha": 6, "rank_pattern": {"up_proj": 2}}}
    speech = folder(tmp_path / "speech", with_adapter(own_names("salm"), "salm"), **settings)
    with pytest.raises(UsageError, match="nothing says its alpha"):
        anyckpt.convert(speech, tmp_path / "out", to="hf", module="llm")


def test_a_configuration_that_is_given_is_the_language_models(tmp_path: Path) -> None:
    speech = folder(tmp_path / "speech", own_names("salm"), backbone=False)
    anyckpt.convert(speech, tmp_path / "llm", to="hf", module="llm", config=LLAMA)
    assert anyckpt.diff(LLAMA, tmp_path / "llm").equal
    with pytest.raises(UsageError, match="--config"):
        anyckpt.convert(speech, tmp_path / "none", to="nemo2", module="llm")
    (speech / "llm_backbone").mkdir()
    (speech / "llm_backbone" / "config.json").write_text("{")
    with pytest.raises(FormatError, match="is not valid JSON"):
        anyckpt.convert(speech, tmp_path / "damaged", to="hf", module="llm")
    assert "cannot be read" in " ".join(anyckpt.inspect(speech).notes)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_runs_checkpoint_has_it_too(sharded: bool, tmp_path: Path) -> None:
    """In training all lies in a Lightning checkpoint, whose hyper-parameters are the model's settings."""
    speech = folder(tmp_path / "speech", with_adapter(own_names("salm"), "salm"), lora={"r": 2, "lora_alpha": 6})
    anyckpt.convert(speech, tmp_path / "run.ckpt", sharded=sharded)
    anyckpt.convert(tmp_path / "run.ckpt", tmp_path / "llm", to="hf", module="llm", config=LLAMA, alpha=6.0)
    check_equal(tmp_path / "llm", merged(3.0))


def test_an_encoder_keeps_the_names_inside_it(tmp_path: Path) -> None:
    speech = folder(tmp_path / "speech", own_names("salm"))
    done = anyckpt.convert(speech, tmp_path / "encoder.safetensors", module="perception.encoder")
    inside = [name.removeprefix("encoder.") for name in PERCEPTION if name.startswith("encoder.")]
    assert arrays_of(tmp_path / "encoder.safetensors").keys() == {*inside}
    assert {"README.md", "tokenizer.json", "tokenizer_config.json", "embed_tokens.weight"} <= done.ignored.keys()


def test_of_any_model(tmp_path: Path) -> None:
    anyckpt.convert(LLAMA, tmp_path / "one.safetensors", module="model.layers.1", rename="mlp.*=ffn.*")
    assert "ffn.up_proj.weight" in arrays_of(tmp_path / "one.safetensors")
    with pytest.raises(UsageError, match="no module 'layers' .expected lm_head, model"):
        anyckpt.convert(LLAMA, tmp_path / "none", to="safetensors", module="layers")
    with pytest.raises(UsageError, match="--module and --include"):
        anyckpt.convert(LLAMA, tmp_path / "none", to="safetensors", module="model", include="*")


def test_what_it_consists_of_is_told(tmp_path: Path) -> None:
    told = " ".join(anyckpt.inspect(folder(tmp_path / "speech", own_names("salm"))).notes)
    assert "a SpeechLM2 model of NeMo, from a/llama and an/encoder: llm (family llama), perception" in told
    assert "(encoder, modality_adapter, preprocessor, proj)" in told
    bare = folder(tmp_path / "bare", own_names("salm"), backbone=False)
    (bare / "config.json").write_text(json.dumps({"model_type": "nemo_speechlm"}))
    assert "of NeMo: llm (give its configuration with --config)" in " ".join(anyckpt.inspect(bare).notes)
    assert not anyckpt.inspect(LLAMA).notes


def test_another_language_model_is_put_in(tmp_path: Path) -> None:
    """By names, in Python."""
    salm = anyckpt.open(folder(tmp_path / "speech", own_names("salm")))
    outside = {"model.embed_tokens.weight": "embed_tokens.weight"}
    tuned = {name: from_array(array + 1) for name, array in language().items()}
    new = {outside.get(name, f"llm.{name}"): tensor for name, tensor in tuned.items()}
    anyckpt.save({**salm.weights(), **new}, tmp_path / "tuned", to="hf", config=salm.config)
    assert anyckpt.open(tmp_path / "tuned").keys() == salm.keys()
    anyckpt.convert(tmp_path / "tuned", tmp_path / "llm", to="hf", module="llm", config=LLAMA)
    check_equal(tmp_path / "llm", {name: array + 1 for name, array in language().items()})
