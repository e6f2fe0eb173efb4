"""Models whose state dict has an adapter beside the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.operations.test_merge_in_place import Arrays, factors, random, save
from tests.support import fixture_path

import anyckpt
from anyckpt.errors import MappingError, UsageError
from anyckpt.models.adapters.wrapped import is_wrapped

LLAMA = fixture_path("families/llama/hf")
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj")


def base() -> Arrays:
    return {name: tensor.numpy() for name, tensor in anyckpt.open(LLAMA).tensors.items()}


def wrapped(prefix: str = "base_model.model.", live: str = ".default") -> Arrays:
    """The fixture's model as peft wraps it, with updates of rank 2."""
    result: Arrays = {}
    for name, array in base().items():
        module = name.removesuffix(".weight")
        if module in MODULES:
            result[f"{prefix}{module}.base_layer.weight"] = array
            own = factors(f"{prefix}{module}", *array.shape, prefix="")
            result |= {key.replace(".weight", f"{live}.weight"): value for key, value in own.items()}
        else:
            result[prefix + name] = array
    return result


def expected(scale: float) -> Arrays:
    result = base()
    for module in MODULES:
        own = factors(module, *result[f"{module}.weight"].shape, prefix="")
        result[f"{module}.weight"] = result[f"{module}.weight"] + scale * (
            own[f"{module}.lora_B.weight"] @ own[f"{module}.lora_A.weight"]
        )
    return result


def saved(path: Path, tensors: Arrays) -> Path:
    save(path, tensors)
    return path


def tensors_of(path: Path) -> Arrays:
    return {name: tensor.numpy() for name, tensor in anyckpt.open(path).tensors.items()}


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "model.base_model.model.", "_fsdp.base_model.model."])
@pytest.mark.parametrize("options", [{"to": "hf", "config": LLAMA}, {"to": "safetensors"}])
def test_merged(prefix: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = saved(tmp_path / "m.safetensors", wrapped(prefix))
    done = anyckpt.convert(source, tmp_path / "out", alpha=6, **options)
    assert "the adapter in it is merged: 3 updates of rank 2, alpha 6 over the rank" in done.notes
    found, wanted = tensors_of(tmp_path / "out"), expected(3.0)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        if name.removesuffix(".weight") in MODULES:
            assert np.abs(found[name] - array).max() < 1e-5
        else:
            assert found[name].tobytes() == array.tobytes()


def test_taken_apart(tmp_path: Path) -> None:
    source = saved(tmp_path / "m.safetensors", wrapped())
    done = anyckpt.convert(source, tmp_path / "adapter", to="peft", alpha=6)
    assert len(done.ignored) == len(base()) and done.tensors == 6
    adapter = anyckpt.open(tmp_path / "adapter")
    assert adapter.config["target_modules"] == ["model.layers.0.self_attn.q_proj", "up_proj"]
    anyckpt.convert(source, tmp_path / "base", to="hf", config=LLAMA, exclude="*.lora_*")
    found = anyckpt.diff(tmp_path / "base", LLAMA, raw=True)
    assert [file.name for file in found.files] == ["generation_config.json"]  # made of the configuration that was given
    assert not replace(found, files=())
    anyckpt.merge_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    anyckpt.convert(source, tmp_path / "at once", to="hf", config=LLAMA, alpha=6)
    assert not anyckpt.diff(tmp_path / "merged", tmp_path / "at once", raw=True)


def test_trained_copies_take_the_place_of_modules(tmp_path: Path) -> None:
    tensors = wrapped()
    head = tensors.pop("base_model.model.lm_head.weight")
    tensors["base_model.model.lm_head.original_module.weight"] = head
    tensors["base_model.model.lm_head.modules_to_save.default.weight"] = head + 1
    source = saved(tmp_path / "m.safetensors", tensors)
    done = anyckpt.convert(source, tmp_path / "out", to="hf", config=LLAMA, alpha=6)
    assert list(done.ignored) == ["base_model.model.lm_head.original_module.weight"]
    assert np.array_equal(tensors_of(tmp_path / "out")["lm_head.weight"], head + 1)
    anyckpt.convert(source, tmp_path / "adapter", to="peft", alpha=6)
    assert anyckpt.open(tmp_path / "adapter").config["modules_to_save"] == ["lm_head"]
    assert "base_model.model.lm_head.weight" in anyckpt.open(tmp_path / "adapter").tensors


def test_names_are_kept_where_no_model_is_asked_for(tmp_path: Path) -> None:
    source = saved(tmp_path / "m.safetensors", wrapped())
    done = anyckpt.convert(source, tmp_path / "out", to="torch")
    assert "a LoRA adapter is in it beside the weights, and stays so" in done.notes[0]
    assert tensors_of(tmp_path / "out").keys() == wrapped().keys()
    assert anyckpt.inspect(source).adapter == {
        "kind": "lora", "rank": 2, "alpha": None, "rank_stabilized": False, "form": "inside", "names": "peft",
        "targets": ["model.layers.0.self_attn.q_proj", "up_proj"], "base": None,
    }  # fmt: skip
    assert anyckpt.verify(source)


def test_what_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "m.safetensors", wrapped())
    for to in ("hf", "peft", "megatron-core"):
        with pytest.raises(UsageError, match=r"of rank 2 beside its weights, and nothing says its alpha.*--alpha"):
            anyckpt.convert(source, tmp_path / "out", to=to, config=LLAMA)
    broken = wrapped()
    del broken[f"base_model.model.{MODULES[0]}.lora_B.default.weight"]
    with pytest.raises(MappingError, match="has no lora_B"):
        anyckpt.convert(saved(tmp_path / "b.safetensors", broken), tmp_path / "out", to="hf", config=LLAMA, alpha=6)
    broken[f"base_model.model.{MODULES[0]}.lora_B.default.weight"] = random(3, 2)
    with pytest.raises(MappingError, match="of another base model"):
        anyckpt.convert(saved(tmp_path / "c.safetensors", broken), tmp_path / "out", to="hf", config=LLAMA, alpha=6)
    two = wrapped() | {f"base_model.model.{MODULES[0]}.lora_A.other.weight": random(2, 64)}
    with pytest.raises(MappingError, match="more than one adapter"):
        anyckpt.convert(saved(tmp_path / "d.safetensors", two), tmp_path / "out", to="hf", config=LLAMA, alpha=6)


def test_adapters_alone_are_no_models() -> None:
    names = [
        "base_model.model.e.lora_embedding_A",
        "base_model.model.e.base_layer.weight",
        "base_model.model.q.lora_A.weight",
    ]
    assert not is_wrapped(names)
    assert not is_wrapped(["model.layers.0.q_proj.weight"])


def test_names_that_are_given_are_those_of_its_modules(tmp_path: Path) -> None:
    """An adapter that is taken out adapts modules as they are called then."""
    source = saved(tmp_path / "in.safetensors", wrapped("net.base_model.model."))
    done = anyckpt.convert(source, tmp_path / "adapter", to="peft", alpha=4.0, rename="net.*=*")
    left_out = {name for name in done.ignored if "lm_head" in name}
    assert left_out == {"net.base_model.model.lm_head.weight"}
    anyckpt.merge_lora(LLAMA, tmp_path / "adapter", tmp_path / "merged", to="hf")
    for name, array in expected(2.0).items():
        np.testing.assert_allclose(tensors_of(tmp_path / "merged")[name], array, rtol=1e-6)
