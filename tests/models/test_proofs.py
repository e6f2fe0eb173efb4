"""Every family, over all its samples: complete or refused with a name, and no value lost, doubled or put twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.models.cases import facts, open_case, with_weights
from tests.models.proofs import PROOFS, Fixture, Opened, samples

from anyckpt import models
from anyckpt.errors import MappingError
from anyckpt.models import Hub, Model, families
from anyckpt.models.language.delta_operations import ZeroCentred
from anyckpt.tensor import LazyTensor, from_array

SAMPLES = samples()
FRAMEWORKS = (
    ("nemo", "nemo-flat", "nemo1"),
    ("nemo2", "nemo2", "nemo2"),
    ("megatron-core", "megatron-core", "megatron-args"),
)
FIXTURES = {name: sample for name, sample in SAMPLES.items() if isinstance(sample, Fixture)}


@cache
def opened(name: str) -> Opened:
    return SAMPLES[name].open()


def test_every_family_has_a_proof() -> None:
    assert set(PROOFS) == {family.name for family in families.built_in()}
    assert sum(len(proof.samples) for proof in PROOFS.values()) == len(SAMPLES), "a sample's name is its own"
    for family, proof in PROOFS.items():
        assert proof.samples
        assert {opened(sample.name)[1].family for sample in proof.samples} == {family}


@pytest.mark.parametrize("name", FIXTURES)
def test_hub_is_megatron_core_bit_for_bit(name: str) -> None:
    case = open_case(name)
    hub = case.hub()
    assert hub.ignored == {}
    out = models.from_hub(replace(hub, model=case.padded()), "hub").tensors
    for key in FIXTURES[name].beyond:
        del out[key]
    assert facts(out) == facts(case.megatron)


@pytest.mark.parametrize("name", SAMPLES)
def test_to_the_hub_and_back(name: str) -> None:
    checkpoint, model = opened(name)
    hub = models.to_hub(checkpoint, model)
    assert facts(models.from_hub(hub, "hf").tensors) == facts(checkpoint.tensors)
    for dialect in ("hub", "megatron-core", "nemo-flat", "nemo-sharded", "nemo2"):
        out = models.from_hub(hub, dialect).tensors
        again = models.to_hub(with_weights(checkpoint, out), model)
        assert facts(models.from_hub(again, "hf").tensors) == facts(checkpoint.tensors)


@pytest.mark.parametrize(("target", "dialect", "kind"), FRAMEWORKS)
@pytest.mark.parametrize("name", SAMPLES)
def test_the_configuration_through_each_framework(name: str, target: str, dialect: str, kind: str) -> None:
    """config.json, a framework's spelling as its file holds it, config.json again: the same model in every field."""
    checkpoint, model = opened(name)
    if target in SAMPLES[name].refused:
        with pytest.raises(MappingError, match=SAMPLES[name].refused[target]):
            models.render_config(model, kind)
        return
    rendered = json.loads(json.dumps(models.render_config(model, kind)))
    named = models.from_hub(models.to_hub(checkpoint, model), dialect).tensors
    between = models.identify(replace(with_weights(checkpoint, named), config=rendered, config_kind=kind))
    assert between is not None
    assert between.family == model.family
    final = json.loads(json.dumps(models.render_config(between, "hf")))
    again = models.identify(replace(checkpoint, config=final))
    assert again is not None
    assert described(again, kind) == described(model, kind)


def described(model: Model, kind: str) -> dict[str, Any]:
    """Every field; but NeMo 2 has no place for token ids, which come from the tokenizer."""
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id"} if kind == "nemo2" else set()
    config = asdict(model.config)
    return {key: config[key] for key in config if key not in {"extra", "padded_vocab_size", *tokens}}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_missing_tensor_is_named(name: str) -> None:
    checkpoint, model = opened(name)
    hub = models.to_hub(checkpoint, model)
    for missing in checkpoint.tensors:
        with pytest.raises(MappingError, match="missing") as caught:
            models.to_hub(with_weights(checkpoint, without(checkpoint.tensors, missing), "hf"), model)
        assert missing in str(caught.value)
    spare = {item.hub for item in model.definition.expected(model.config) if item.rule.optional}
    for missing in hub.tensors:
        rest = without(hub.tensors, missing)
        if missing in spare:
            assert facts(models.to_hub(with_weights(checkpoint, rest, "hub"), model).tensors) == facts(hub.tensors)
        else:
            with pytest.raises(MappingError, match="missing") as caught:
                models.to_hub(with_weights(checkpoint, rest, "hub"), model)
            assert missing in str(caught.value)
        with pytest.raises(MappingError, match="missing") as caught:
            models.from_hub(replace(hub, tensors=rest), "hf")
        assert missing in str(caught.value)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_surplus_tensor_is_named(name: str) -> None:
    checkpoint, model = opened(name)
    hub = models.to_hub(checkpoint, model)
    for stored, dialect in ((checkpoint.tensors, "hf"), (hub.tensors, "hub")):
        for extra in ("v", *(surplus(key) for key in list(stored)[:: max(1, len(stored) // 8)])):
            more = {**stored, extra: from_array(np.zeros(3, "<f4"))}
            with pytest.raises(MappingError, match="no rule of family .* covers 1 tensors") as caught:
                models.to_hub(with_weights(checkpoint, more, dialect), model)
            assert extra in str(caught.value)
    with pytest.raises(MappingError, match="no rule of family .* covers 1 tensors: v"):
        models.from_hub(replace(hub, tensors={**hub.tensors, "v": from_array(np.zeros(3, "<f4"))}), "hf")


@pytest.mark.parametrize("name", SAMPLES)
def test_every_value_has_one_place(name: str) -> None:
    """Both ways: with every element of its own value, the other side has each of them once, and nothing but zeros else.

    So no tensor can change unseen, and no rule puts two sources in one place.
    """
    checkpoint, model = opened(name)
    numbered = numbers(checkpoint.tensors)
    numbered |= {key: checkpoint.tensors[key] for key in getattr(SAMPLES[name], "unit_rows", ())}
    less_one = [i for i in model.definition.expected(model.config) if isinstance(i.rule.operation, ZeroCentred)]
    numbered |= {item.sources[0]: full(item.shape, 2) for item in less_one}  # and its odd part without 1 is the same
    hub = models.to_hub(with_weights(checkpoint, numbered, "hf"), model)
    assert np.array_equal(odd_parts(hub.tensors.values()), odd_parts(numbered.values()))
    zeros = {item.hub for item in model.definition.expected(model.config) if not item.sources}
    there = {**numbers(hub.tensors), **{name: hub.tensors[name] for name in zeros}}
    there |= {item.hub: full(item.shape, 1) for item in less_one}
    back = models.from_hub(Hub(model, there), "hf").tensors
    assert np.array_equal(odd_parts(back.values()), odd_parts(there.values()))


def full(shape: tuple[int, ...], value: float) -> LazyTensor:
    return from_array(np.full(shape, value))


def without(tensors: Mapping[str, LazyTensor], name: str) -> dict[str, LazyTensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def surplus(name: str) -> str:
    """A name like one that is there."""
    stem, dot, last = name.rpartition(".")
    return f"{stem}{dot}other_{last}"


def numbers(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors of these shapes whose elements are all different, also when they are multiplied by powers of two."""
    result, start = {}, 0
    for name, tensor in tensors.items():
        result[name] = from_array((2.0 * np.arange(start, start + tensor.size) + 1).reshape(tensor.shape))
        start += tensor.size
    return result


def odd_parts(tensors: Iterable[LazyTensor]) -> np.ndarray:
    """The odd number that each element is a power of two times, sorted; zeros are left out."""
    flat = np.concatenate([tensor.numpy().reshape(-1) for tensor in tensors])
    return np.sort(np.frexp(flat[flat != 0])[0])
