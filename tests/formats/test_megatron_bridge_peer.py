"""What torch and Megatron-Core make of the Megatron-Bridge folders that we write; Megatron-Bridge is not at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
checkpointing = pytest.importorskip("megatron.core.dist_checkpointing")

import yaml  # noqa: E402
from tests.support import fixture_path  # noqa: E402

import anyckpt  # noqa: E402

pytestmark = pytest.mark.peer


@pytest.fixture
def iteration(tmp_path: Path) -> Path:
    anyckpt.convert(fixture_path("families/llama/hf"), tmp_path / "root", to="megatron-bridge")
    return tmp_path / "root" / "iter_0000000"


@pytest.mark.parametrize("name", ["train_state.pt", "../latest_train_state.pt"])
def test_train_state(name: str, iteration: Path) -> None:
    """As ``read_train_state`` does: ``weights_only``, and every value has an ``item()``."""
    state = torch.load(iteration / name, map_location="cpu", weights_only=True)
    values: dict[str, Any] = {key: value.item() for key, value in state.items()}
    assert values == {
        "step": 0, "consumed_train_samples": 0, "skipped_train_samples": 0, "consumed_valid_samples": 0,
        "floating_point_operations_so_far": 0.0, "do_train": False, "do_valid": False, "do_test": False,
    }  # fmt: skip
    assert state["step"].dtype == torch.int64 and state["floating_point_operations_so_far"].dtype == torch.float32


def test_common_state_has_what_a_load_takes_from_it(iteration: Path) -> None:
    assert checkpointing.check_is_distributed_checkpoint(str(iteration))
    common = checkpointing.load_common_state_dict(str(iteration))
    assert common["iteration"] == 0 and common["checkpoint_version"] == 3.0 and "args" not in common
    assert checkpointing.load_content_metadata(preloaded_state_dict=common) is not None
    found = checkpointing.load_tensors_metadata(str(iteration))
    assert "decoder.layers.self_attention.linear_qkv.weight" in found


def test_run_config_has_what_a_load_takes_from_it(iteration: Path) -> None:
    config = yaml.safe_load((iteration / "run_config.yaml").read_text())
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        assert config["model"][key] == 1
    assert {config["checkpoint"][key] for key in ("save_optim", "save_rng")} == {False}
    assert config["checkpoint"]["fully_parallel_save"] is True


def test_the_providers_fields_build_megatron_cores_configuration(iteration: Path) -> None:
    """A provider is a ``TransformerConfig`` with fields of its own; what is not one of these must be one of those."""
    import dataclasses

    from megatron.core.transformer.transformer_config import TransformerConfig

    model = yaml.safe_load((iteration / "run_config.yaml").read_text())["model"]
    own = {
        "_target_", "share_embeddings_and_output_weights", "make_vocab_size_divisible_by", "position_embedding_type",
        "rotary_base", "rotary_percent", "seq_len_interpolation_factor", "seq_length", "vocab_size",
        "should_pad_vocab",
    }  # fmt: skip
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert set(model) - own <= known
    assert model.pop("activation_func")["_target_"] == "torch.nn.functional.silu"
    values = {key: value for key, value in model.items() if key not in own and key != "params_dtype"}
    built = TransformerConfig(**values, activation_func=torch.nn.functional.silu)
    assert built.gated_linear_unit and built.num_query_groups == values["num_query_groups"]
