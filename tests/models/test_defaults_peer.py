"""What classes take where they are told nothing is what the installed libraries' classes take."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from anyckpt import models
from anyckpt.config import block_keys, defaults, megatron, nemo1, nemo2, nemo_fields
from anyckpt.config.fields import REQUIRED

transformers = pytest.importorskip("transformers")
core = pytest.importorskip("megatron.core.transformer.transformer_config")

pytestmark = pytest.mark.peer


def declared(of: Any) -> dict[str, Any]:
    """A dataclass's own defaults; JSON has no tuples, and functions by their names."""
    found = {}
    for field in dataclasses.fields(of):
        value = field.default_factory() if callable(field.default_factory) else field.default
        found[field.name] = tuple(value) if isinstance(value, list) else value
    return found


def test_transformers() -> None:
    for family in models.known_families().values():
        known = family.hugging_face
        name = known.defaults_of or known.model_types[0]
        if known.defaults is not None:
            continue
        theirs = declared(transformers.CONFIG_MAPPING[name])
        read = known.handled | {known.activation_key, "sliding_window"}
        ours = {key: value for key, value in known.class_defaults.items() if key in read}
        assert ours == {key: theirs[key] for key in ours}, name
        assert {entry.key for entry in known.fields} & theirs.keys() <= ours.keys(), name


@pytest.mark.parametrize("name", ["TransformerConfig", "MLATransformerConfig"])
def test_megatron_core(name: str) -> None:
    theirs = declared(getattr(core, name))
    for key, value in defaults.of_class("nemo2", name).items():
        found = theirs[key]
        assert value == (f"torch.nn.functional.{found.__name__}" if callable(found) else found), key


TABLES = {
    "arguments": (megatron._SIZES, megatron._OTHERS),
    "NeMo": (nemo_fields.SIZES, nemo_fields.SHARED, nemo2._FIELDS),
    "blocks": (block_keys._EXPERTS, block_keys._MAMBA, block_keys._ATTENTION, block_keys._LATENT),
}


@pytest.mark.parametrize("name", TABLES)
def test_what_tables_of_fields_take_is_what_megatron_core_takes(name: str) -> None:
    latent = declared(core.MLATransformerConfig) | {"q_lora_rank": None}  # as Megatron-LM's arguments
    theirs = latent | declared(core.TransformerConfig)
    compared = 0
    for entry in (entry for table in TABLES[name] for entry in table):
        if entry.key in theirs and entry.default is not REQUIRED and not callable(entry.default):
            assert entry.default == theirs[entry.key], entry.key
            compared += 1
    assert compared >= 6


def test_what_nemo_1_takes_of_latent_attention() -> None:
    theirs = declared(core.MLATransformerConfig)
    assert {key: theirs[key] for key in nemo1._LATENT_DEFAULTS} == nemo1._LATENT_DEFAULTS
