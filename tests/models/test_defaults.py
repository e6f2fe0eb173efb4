"""What classes take where they are told nothing, from files that a script made of the libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.models.test_config import NEMO2_BASE, model_of

from anyckpt.config import defaults, nemo2
from anyckpt.errors import MappingError
from anyckpt.models import by_name, known_families

DATA = Path(defaults.__file__).parent / "data"


@pytest.mark.parametrize("framework", ["transformers", "nemo2"])
def test_each_file_says_of_which_releases_it_is(framework: str) -> None:
    stored = json.loads((DATA / f"{framework}.json").read_text("utf-8"))
    assert stored["source"].startswith("configuration classes of ")
    assert all(entry["base"] is None or entry["base"] in stored["classes"] for entry in stored["classes"].values())


def test_fields_are_inherited() -> None:
    large, base = (defaults.of_class("nemo2", name) for name in ("Llama31Config70B", "Llama31Config"))
    assert (large["num_layers"], large["scale_factor"], large["attention_dropout"]) == (80, 8.0, 0.0)
    assert base["window_size"] is None
    assert "num_layers" not in base
    assert defaults.of_class("nemo2", "MyConfig") == {}
    assert not defaults.is_known("nemo2", "MyConfig")
    assert defaults.of_class("nemo2", "GPTOSSConfig")["window_size"] == (128, 0)


def test_every_class_that_a_family_reads_is_known() -> None:
    for family in known_families().values():
        if family.nemo2 is not None:
            assert family.nemo2.class_defaults("MyConfig")["activation_func"], family.name
            assert family.nemo2.reads(family.nemo2.configs[0].removesuffix("*"))
            assert not family.nemo2.reads(f"{family.nemo2.configs[0].removesuffix('*')}OfMine")


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("llama.Llama32Config1B", {"max_position_embeddings": 131_072, "share_embeddings_and_output_weights": True}),
        ("gpt_oss.GPTOSSConfig20B", {"activation_func_clamp_value": 7.0, "num_moe_experts": 32}),
        ("mixtral.MixtralConfig8x7B", {"moe_router_pre_softmax": False, "moe_aux_loss_coeff": 0.01}),
        ("nemotron.Nemotron4Config22B", {"num_layers": 40, "hidden_size": 6144, "activation": "squared_relu"}),
    ],
)
def test_defaults_that_tables_by_hand_had_not(name: str, facts: dict[str, Any]) -> None:
    config = model_of({"_target_": f"{NEMO2_BASE}.{name}"}).config
    assert {key: getattr(config, key) for key in facts} == facts


def test_a_class_of_the_users_has_the_defaults_of_the_families_base() -> None:
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    config = nemo2.parse(by_name("qwen2"), {"_target_": "mine.MyQwen", **sizes})
    assert (config.add_qkv_bias, config.layernorm_epsilon, config.rotary_base) == (True, 1e-6, 1e6)


def test_transformers_takes_as_many_groups_as_there_are_heads() -> None:
    family = by_name("deepseek-v2")
    assert family.hugging_face.class_defaults["num_key_value_heads"] is None


def test_a_base_class_that_has_no_sizes() -> None:
    with pytest.raises(MappingError, match="has no hidden_size"):
        nemo2.parse(by_name("nemotron-h"), {"_target_": f"{NEMO2_BASE}.ssm.NemotronHConfigBase"})
