"""Tensors that Megatron has and the family has not: zeros on the way in, refused unless zeros on the way out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.models.cases import MEGATRON_DIALECTS, Case, facts, open_case, with_weights

from anyckpt import models
from anyckpt.errors import MappingError
from anyckpt.models import Hub
from anyckpt.models.language.rules import Rule
from anyckpt.tensor import Constant, from_array

LAYERS = "decoder.layers.*.self_attention.linear_qkv.bias"
HEAD = "output_layer.bias"


def biased(name: str) -> tuple[Case, Hub]:
    """A fixture's model, were its family one whose Megatron layers have biases that it has not."""
    case = open_case(name)
    rules = (
        *case.model.definition.rules,
        Rule((), LAYERS, ("qkv",)),
        Rule((), HEAD, ("vocabulary",)),
    )
    case.model = replace(case.model, definition=replace(case.model.definition, rules=rules))
    return case, case.hub()


@pytest.mark.parametrize("name", ["llama", "llama_tied_bf16"])
def test_zeros_of_the_models_element_type(name: str) -> None:
    case, hub = biased(name)
    config = case.model.config
    made = {key: tensor for key, tensor in hub.tensors.items() if key.endswith(".bias")}
    assert set(made) == {HEAD, *(LAYERS.replace("*", str(layer)) for layer in range(config.num_layers))}
    for key, tensor in made.items():
        assert tensor.dtype.name == config.dtype, key
        assert not tensor.numpy().any()
    rows = (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels
    assert made[LAYERS.replace("*", "0")].shape == (rows,)
    assert made[HEAD].shape == (config.rows,)


@pytest.mark.parametrize("dialect", MEGATRON_DIALECTS)
def test_through_each_dialect_and_back(dialect: str) -> None:
    case, hub = biased("llama")
    named = models.from_hub(hub, dialect).tensors
    back = models.to_hub(with_weights(case.checkpoint, named), case.model)
    assert facts(back.tensors) == facts(hub.tensors)
    assert facts(models.from_hub(back, "hf").tensors) == facts(case.checkpoint.tensors)
    less = {key: tensor for key, tensor in named.items() if not key.endswith("output_layer.bias")}
    with pytest.raises(MappingError, match=r"missing: output_layer\.bias"):
        models.to_hub(with_weights(case.checkpoint, less), case.model)


@pytest.mark.parametrize("value", [1.0, -1e-30, float("nan")])
def test_what_is_not_zero_is_refused(value: float) -> None:
    case, hub = biased("llama")
    key = LAYERS.replace("*", "1")
    values = np.zeros(hub.tensors[key].shape, "<f4")
    values[-1] = -0.0
    hub.tensors[key] = from_array(values)
    assert facts(models.from_hub(hub, "hf").tensors) == facts(case.checkpoint.tensors)
    values[-1] = value
    hub.tensors[key] = from_array(values)
    with pytest.raises(MappingError, match="is not zero, and .* have no such tensor") as caught:
        models.from_hub(hub, "hf")
    assert key in str(caught.value)


def test_zeros_of_a_type_that_numpy_lacks() -> None:
    from anyckpt.dtypes import BY_NAME

    _, hub = biased("llama")
    key = LAYERS.replace("*", "1")
    odd = next(kind for kind in BY_NAME.values() if kind.numpy is None)
    for element, fine in ((None, True), (b"\x01" * odd.itemsize, False)):
        hub.tensors[key] = Constant(odd, hub.tensors[key].shape, element)
        if fine:
            models.from_hub(hub, "hf")
        else:
            with pytest.raises(MappingError, match="is not zero"):
                models.from_hub(hub, "hf")
