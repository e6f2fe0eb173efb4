"""The order in which transformers' modules register parameters, of every family that says one."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.models.proofs import PROOFS, Fixture, Tiny  # noqa: E402
from tests.support import fixture_path  # noqa: E402

from anyckpt.models.families import by_name, known_families  # noqa: E402
from anyckpt.models.language.parameter_order import registered_order  # noqa: E402

pytestmark = pytest.mark.peer

SAMPLES = {"mistral": "mistral_swa"}
KNOWN = [name for name in known_families() if by_name(name).hugging_face.registered]


def test_there_are_such_families() -> None:
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"} <= set(KNOWN)


def config_of(name: str) -> Any:
    """What transformers makes of the family's first sample."""
    first = PROOFS[name].samples[0]
    if isinstance(first, Tiny):
        return transformers.AutoConfig.for_model(**first.config)
    assert isinstance(first, Fixture)
    return transformers.AutoConfig.from_pretrained(fixture_path(f"families/{SAMPLES.get(name, first.name)}/hf"))


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_numbered_in_this_order(name: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config_of(name))
    expected = [parameter for parameter, _ in model.named_parameters()]
    assert registered_order(sorted(expected), by_name(name).hugging_face.registered) == expected


def test_a_part_that_is_not_known() -> None:
    assert registered_order(["model.layers.0.mlp.gate.weight"], by_name("llama").hugging_face.registered) is None
    assert registered_order(["a.weight"], ()) is None
