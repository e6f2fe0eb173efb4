"""The order in which transformers' modules register parameters, of every family that says one."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.support import fixture_path  # noqa: E402

from anyckpt.models.families import by_name, known_families  # noqa: E402
from anyckpt.models.language.parameter_order import registered_order  # noqa: E402

pytestmark = pytest.mark.peer

SAMPLES = {"mistral": "mistral_swa"}
KNOWN = [name for name in known_families() if by_name(name).hugging_face.registered]


def test_there_are_such_families() -> None:
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"} <= set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_numbered_in_this_order(name: str) -> None:
    config = transformers.AutoConfig.from_pretrained(fixture_path(f"families/{SAMPLES.get(name, name)}/hf"))
    model = transformers.AutoModelForCausalLM.from_config(config)
    expected = [parameter for parameter, _ in model.named_parameters()]
    assert registered_order(sorted(expected), by_name(name).hugging_face.registered) == expected


def test_a_part_that_is_not_known() -> None:
    assert registered_order(["model.layers.0.mlp.gate.weight"], by_name("llama").hugging_face.registered) is None
    assert registered_order(["a.weight"], ()) is None
