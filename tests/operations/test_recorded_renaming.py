"""A renaming as a value: found once from the weights, and right for whatever has their names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tests.support import fixture_path, sha256_of

import anyckpt
from anyckpt import models
from anyckpt.errors import MappingError
from anyckpt.formats import registry
from anyckpt.operations.steps.naming import Naming
from anyckpt.operations.steps.recorded_renaming import Renaming
from anyckpt.operations.steps.renaming import rename_for
from anyckpt.tensor import LazyTensor, concatenate, from_array, stack

FAMILIES = ["llama", "deepseek_v3", "gpt2", "gemma3", "mixtral", "nemotron_h", "starcoder2", "gpt_oss"]


def numbers(*shape: int, start: int = 0) -> LazyTensor:
    return from_array(np.arange(start, start + int(np.prod(shape)), dtype=np.float32).reshape(shape))


def other_values(weights: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {name: numbers(*tensor.shape, start=number) for number, (name, tensor) in enumerate(weights.items())}


@pytest.mark.parametrize("target", ["megatron-core", "megatron-lm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_does_to_other_tensors_what_the_rules_do(family: str, target: str) -> None:
    source = anyckpt.open(next(fixture_path(f"families/{family}").glob("*hf*")))
    naming = Naming(registry.by_name(target))
    renamed = rename_for(source, naming)
    again = renamed.renaming(source.weights())
    assert list(again) == list(renamed.checkpoint.tensors)
    others = other_values(source.weights())
    direct = rename_for(anyckpt.Checkpoint(source.path, "hf", others, dialect="hf", config=source.config,
                                           config_kind="hf"), naming)  # fmt: skip
    found = renamed.renaming(others)
    assert {name: sha256_of(tensor) for name, tensor in found.items()} == {
        name: sha256_of(tensor) for name, tensor in direct.checkpoint.tensors.items()
    }


def test_every_name_leads_back_to_those_that_it_is_made_of() -> None:
    renamed = rename_for(anyckpt.open(fixture_path("families/llama/hf")), Naming(registry.by_name("megatron-lm")))
    layer = "model.layers.1.self_attn"
    assert renamed.renaming.sources["decoder.layers.1.self_attention.linear_qkv.weight"] == {
        f"{layer}.{part}_proj.weight" for part in "qkv"
    }
    assert not renamed.renaming.computes


def test_the_rules_are_asked_once_for_weights_and_once_for_all_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        models, "to_hub", lambda *args, _real=models.to_hub, **more: calls.append(1) or _real(*args, **more)
    )
    source = fixture_path("legacy/megatron_gpt_fp32_optim_tp2")
    anyckpt.convert(source, tmp_path / "out", to="dcp", names="hf", optimizer="keep")
    assert len(calls) <= 2


def test_state_of_buffers_alone_is_not_made_up_and_that_of_parameters_is_not_forgotten() -> None:
    weights = {"a": numbers(2), "b": numbers(2), "norm.running_mean": numbers(2)}
    renaming = Renaming(
        lambda t: {"ab": concatenate([t["a"], t["b"]], 0), "mean": t["norm.running_mean"]}, weights, whole=True
    )
    assert list(renaming({"a": numbers(2), "b": numbers(2)})) == ["ab"]
    with pytest.raises(MappingError, match="1 tensors of the model are missing: b"):
        renaming({"a": numbers(2)})


def test_a_part_of_a_model_of_no_known_family_takes_what_is_there() -> None:
    weights = {"a.0": numbers(2), "a.1": numbers(2), "b": numbers(3)}
    renaming = Renaming(lambda t: {"a": stack([t["a.0"], t["a.1"]]), "c": t["b"]}, weights, whole=False)
    assert list(renaming({"b": numbers(3)})) == ["c"]
    with pytest.raises(MappingError, match=r"missing: a\.1"):
        renaming({"a.0": numbers(2)})


def test_tensors_of_other_shapes_than_the_weights_are_not_put_together() -> None:
    renaming = Renaming(
        lambda t: {"ab": concatenate([t["a"], t["b"]], 0)}, {"a": numbers(2), "b": numbers(2)}, whole=True
    )
    with pytest.raises(MappingError, match="another shape than the weight"):
        renaming({"a": numbers(2), "b": numbers(3)})


def test_a_weight_that_is_stored_twice_has_one_state() -> None:
    renaming = Renaming(lambda t: {"c": t["a"]}, {"a": numbers(2), "copy": numbers(2), "d": numbers(2, 2)}, whole=True)
    assert list(renaming({"a": numbers(2, start=5), "copy": numbers(2, start=5), "d": numbers(2, 2)})) == ["c"]
    with pytest.raises(MappingError, match="differs from that of a"):
        renaming({"a": numbers(2), "copy": numbers(2, start=5)})


def test_state_does_not_go_with_weights_that_are_computed() -> None:
    """Megatron's T5 has its queries multiplied, of which no moment is that of the other."""
    renamed = rename_for(anyckpt.open(fixture_path("families/t5_v1_1/hf")), Naming(registry.by_name("megatron-core")))
    assert renamed.renaming.computes


def test_objects_of_weights_are_written_in_their_order(tmp_path: Path) -> None:
    source = anyckpt.open(fixture_path("legacy/modules/quantized_dynamic_state_dict.pt"))
    anyckpt.convert(source.path, tmp_path / "out.ckpt", to="lightning")
    written = [re.sub(r"^state_dict\.", "", name) for name in anyckpt.open(tmp_path / "out.ckpt").objects]
    kept = [name for name in source.objects if name in written]
    assert kept
    assert [name for name in written if name in kept] == kept
