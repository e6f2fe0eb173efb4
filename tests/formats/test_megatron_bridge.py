"""Megatron-Bridge's folders: a real Megatron-Core payload with the files that Megatron-Bridge puts around it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models.proofs import samples
from tests.support import assert_tensors_equal_expected, expected_of, file_bytes, fixture_path, write_plan

import anyckpt
from anyckpt.checkpoint import Checkpoint, ParallelLayout
from anyckpt.config import megatron as config_megatron
from anyckpt.config.megatron_bridge import Facts, arguments_of, run_config_of
from anyckpt.containers.torch_file import read_torch, zip_parts
from anyckpt.engine.plan import OutputFile
from anyckpt.errors import FormatError, MappingError, UnsafeError, UsageError
from anyckpt.formats import registry
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.megatron_bridge import FORMAT
from anyckpt.formats.registry import look_at
from anyckpt.models import identify, render_config
from anyckpt.plain_yaml import dump_yaml, load_yaml_mapping
from anyckpt.storage.local_file import LocalFile
from anyckpt.tensor import from_array

CASE = "mcore/gpt_dense_tp2pp2"
STEP = 10
MODEL: dict[str, Any] = {
    "_target_": "megatron.bridge.models.llama.llama_provider.Llama31ModelProvider",
    "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
    "add_bias_linear": False, "add_qkv_bias": False, "attention_dropout": 0.0,
    "attention_backend": {"_args_": [5], "_call_": True, "_target_": "megatron.core.transformer.enums.AttnBackend"},
    "bf16": True, "ffn_hidden_size": 8192, "fp16": False, "gated_linear_unit": True,
    "generation_config": {"_call_": True, "_target_": "transformers.X.from_dict", "config_dict": {"top_k": 50}},
    "hidden_dropout": 0.0, "hidden_size": 2048, "high_freq_factor": 4.0, "kv_channels": 64,
    "layernorm_epsilon": 1.0e-05, "layernorm_zero_centered_gamma": False, "low_freq_factor": 1.0,
    "make_vocab_size_divisible_by": 128, "multi_latent_attention": False, "is_hybrid_model": False,
    "heterogeneous_block_specs": False, "mtp_num_layers": None, "normalization": "RMSNorm",
    "num_attention_heads": 32, "num_layers": 16, "num_moe_experts": None, "num_query_groups": 8,
    "old_context_len": 8192, "params_dtype": {"_call_": False, "_target_": "torch.bfloat16"},
    "pipeline_model_parallel_layout": None, "pipeline_model_parallel_size": 2, "position_embedding_type": "rope",
    "qk_layernorm": False, "recompute_modules": ["core_attn"], "rotary_base": 500000.0, "rotary_interleaved": False,
    "rotary_percent": 1.0, "scale_factor": 32.0, "seq_len_interpolation_factor": None, "seq_length": 131072,
    "share_embeddings_and_output_weights": True, "should_pad_vocab": False, "tensor_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": None, "vocab_size": 128256, "window_size": None,
}  # fmt: skip
"""As a training run of Llama 3.2 1B printed it, shortened."""


def state(number: int, **others: Any) -> bytes:
    counts = {"step": number, "consumed_train_samples": number * 512, "skipped_train_samples": 0}
    root: dict[str, Any] = {name: from_array(np.array(value, np.int64)) for name, value in counts.items()}
    root["floating_point_operations_so_far"] = from_array(np.array(1e20, np.float32))
    root["do_train"] = from_array(np.array(True))
    return file_bytes(OutputFile("", zip_parts({**root, **others})))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / f"iter_{STEP:07d}"
    shutil.copytree(fixture_path(f"{CASE}/ckpt"), folder)
    config = {"_target_": "megatron.bridge.training.config.ConfigContainer", "model": MODEL, "peft": None,
              "checkpoint": {"ckpt_format": "torch_dist", "save_optim": True, "save_rng": True}}  # fmt: skip
    (folder / "run_config.yaml").write_text(dump_yaml(config))
    (folder / "train_state.pt").write_bytes(state(STEP))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    (tmp_path / "run" / "iter_0000005").mkdir()
    (tmp_path / "run" / "latest_train_state.pt").write_bytes(state(STEP))
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text(str(STEP))
    return tmp_path / "run"


def iteration(root: Path) -> Path:
    return root / f"iter_{STEP:07d}"


def check(checkpoint: Checkpoint) -> None:
    assert checkpoint.format == "megatron-bridge"
    assert_tensors_equal_expected(checkpoint.tensors, expected_of(CASE)["tensors"])
    assert checkpoint.training.step == STEP and checkpoint.training.consumed_samples == STEP * 512
    assert checkpoint.layout == ParallelLayout(2, 2)
    assert checkpoint.tokenizer is not None and set(checkpoint.tokenizer.files) == {"tokenizer.json"}
    assert set(checkpoint.artifacts) == {"hf/config.json"}
    assert checkpoint.details["run_config"]["model"] == MODEL


def test_root_and_iteration(root: Path) -> None:
    check(registry.read(root))
    check(registry.read(iteration(root)))


@pytest.mark.parametrize("gone", ["latest_train_state.pt", "latest_checkpointed_iteration.txt"])
def test_either_tracker_is_enough(gone: str, root: Path) -> None:
    (root / gone).unlink()
    check(registry.read(root))


def test_bridges_own_tracker_is_preferred(root: Path) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text("5")
    checkpoint = registry.read(root)
    check(checkpoint)
    assert any("iteration 10" in warning and "'5'" in warning for warning in checkpoint.warnings)


def test_the_provider_in_megatrons_words(root: Path) -> None:
    found = registry.read(root).config
    expected = {
        "num_layers": 16, "swiglu": True, "untie_embeddings_and_output_weights": False, "group_query_attention": True,
        "num_query_groups": 8, "vocab_size": 128256, "padded_vocab_size": 128256, "use_rope_scaling": True,
        "rope_scaling_factor": 32.0, "params_dtype": "torch.bfloat16", "max_position_embeddings": 131072,
        "tensor_model_parallel_size": 2, "apply_layernorm_1p": False, "num_experts": None, "squared_relu": False,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    model = identify(registry.read(root))
    assert model is not None and model.family == "llama"
    assert model.config.rope_scaling is not None and model.config.rope_scaling["factor"] == 32.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"should_pad_vocab": True, "vocab_size": 1000}, {"vocab_size": 1000, "padded_vocab_size": 1024}),
        ({"should_pad_vocab": True, "vocab_size": 1025}, {"padded_vocab_size": 1280}),
        ({"vocab_size": None}, {}),
        ({"activation_func": "squared_relu", "gated_linear_unit": False}, {"swiglu": False, "squared_relu": True}),
        ({"scale_factor": None}, {"use_rope_scaling": False}),
        ({"scale_factor": ..., "rope_scaling": True, "rope_scaling_factor": 4.0}, {"rope_scaling_factor": 4.0}),
        ({"num_moe_experts": 8}, {"num_experts": 8}),
        ({"num_layers": ..., "transformer": {"num_layers": 7}}, {"num_layers": 7}),
        ({"layernorm_zero_centered_gamma": True}, {"apply_layernorm_1p": True}),
    ],
)
def test_fields_of_providers(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    model = {key: value for key, value in {**MODEL, **changes}.items() if value is not ...}
    found = arguments_of({"model": model}, "run_config.yaml", [])
    assert {key: found[key] for key in expected} == expected


def test_rope_constants_that_arguments_cannot_say() -> None:
    warnings: list[str] = []
    arguments_of({"model": {**MODEL, "high_freq_factor": 8.0}}, "run_config.yaml", warnings)
    assert len(warnings) == 1 and "high_freq_factor" in warnings[0]


def test_arguments_go_there_and_back() -> None:
    first = arguments_of({"model": MODEL}, "x", [])
    again = run_config_of(first, 128256, Facts("bfloat16", False, False))
    second = arguments_of(again, "x", [])
    assert {key: second[key] for key in first if key in second} == {key: first[key] for key in first if key in second}
    left_out = {"fp16", "bf16", "multi_latent_attention", "is_hybrid_model", "heterogeneous_block_specs"}
    left_out |= {"low_freq_factor", "high_freq_factor", "old_context_len"}  # constants, which only an older class has
    assert set(first) - set(second) <= left_out
    assert again["model"]["tensor_model_parallel_size"] == 2 and again["checkpoint"]["save_optim"] is False


def written(checkpoint: Checkpoint, path: Path) -> Path:
    assert FORMAT.plan is not None
    return write_plan(FORMAT.plan(checkpoint, WriteOptions()), path)


def test_written_again_it_has_bridges_files(root: Path, tmp_path: Path) -> None:
    source = registry.read(root)
    path = written(source, tmp_path / "again")
    theirs = {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}
    ours = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert {name for name in theirs if not name.endswith(".distcp")} == {
        name for name in ours if not name.endswith(".distcp")
    }
    check(registry.read(path))
    config = load_yaml_mapping((iteration(path) / "run_config.yaml").read_bytes(), "x")
    assert config["model"] == MODEL and config["peft"] is None
    has_rng = any(name.startswith("rng_state/") for name in source.objects)
    assert config["checkpoint"]["save_rng"] == has_rng and config["checkpoint"]["save_optim"] is False
    assert (path / "latest_checkpointed_iteration.txt").read_text() == "10"
    for name in ("latest_train_state.pt", f"iter_{STEP:07d}/train_state.pt"):
        contents = read_torch(LocalFile(path / name)).root
        assert contents["step"].numpy() == STEP and contents["step"].shape == ()
        assert contents["consumed_train_samples"].dtype.name == "int64"
        assert contents["floating_point_operations_so_far"].dtype.name == "float32"


@pytest.mark.parametrize("family", ["llama", "llama31_ropescale", "llama_tied_bf16", "mistral_swa"])
def test_families_there_and_back(family: str, tmp_path: Path) -> None:
    source = fixture_path(f"families/{family}/hf")
    anyckpt.convert(source, tmp_path / "bridge", to="megatron-bridge")
    found = registry.read(tmp_path / "bridge")
    assert found.format == "megatron-bridge"
    assert found.details["run_config"]["model"]["_target_"].endswith(".GPTModelProvider")
    anyckpt.convert(tmp_path / "bridge", tmp_path / "hf", to="hf")
    assert not anyckpt.diff(source, tmp_path / "hf")
    names = ("num_hidden_layers", "rope_theta", "vocab_size", "num_key_value_heads", "rms_norm_eps", "sliding_window",
             "tie_word_embeddings", "intermediate_size", "head_dim")  # fmt: skip
    before, after = registry.read(source).config, registry.read(tmp_path / "hf").config
    assert {key: after.get(key) for key in names if key in before} == {
        key: before[key] for key in names if key in before
    }


def test_payload_of_megatron_fsdp(root: Path) -> None:
    """Plain DCP, which Megatron-Bridge calls ``fsdp_dtensor``."""
    folder = iteration(root)
    for name in [file.name for file in folder.iterdir() if file.is_file()]:
        if name.endswith(".distcp") or name in (".metadata", "metadata.json", "common.pt"):
            (folder / name).unlink()
    for file in fixture_path("mcore/dcp_fsdp_w2/ckpt").iterdir():
        shutil.copy(file, folder)
    found = registry.read(root)
    assert found.format == "megatron-bridge" and found.details["backend"] == "fsdp_dtensor"
    assert_tensors_equal_expected(found.tensors, expected_of("mcore/dcp_fsdp_w2")["tensors"])


def test_payload_of_the_zarr_backend(root: Path) -> None:
    folder = iteration(root)
    for name in [file.name for file in folder.iterdir() if file.is_file()]:
        if name.endswith(".distcp") or name in (".metadata", "metadata.json", "common.pt"):
            (folder / name).unlink()
    shutil.copytree(fixture_path("mcore/zarr_v012_w2_flat/ckpt"), folder, dirs_exist_ok=True)
    found = registry.read(root)
    assert found.details["backend"] == "zarr"
    assert_tensors_equal_expected(found.tensors, expected_of("mcore/zarr_v012_w2_flat")["tensors"])


def test_tokenizer_among_the_hugging_face_assets(root: Path) -> None:
    shutil.move(iteration(root) / "tokenizer" / "tokenizer.json", iteration(root) / "hf" / "tokenizer.json")
    found = registry.read(root)
    assert found.tokenizer is not None and set(found.tokenizer.files) == {"tokenizer.json"}
    assert set(found.artifacts) == {"hf/config.json"}


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / name).write_bytes(data)

    return damage


FOLDER = f"iter_{STEP:07d}"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no run_config": (remove(f"{FOLDER}/run_config.yaml"), "has no run_config.yaml: the save was not finished"),
    "no model": (write(f"{FOLDER}/run_config.yaml", b"train: {}"), "has no section 'model'.*train"),
    "list": (write(f"{FOLDER}/run_config.yaml", b"- 1"), "run_config.yaml"),
    "no YAML": (write(f"{FOLDER}/run_config.yaml", b"{"), "run_config.yaml"),
    "tracker leads nowhere": (write("latest_train_state.pt", state(11)), "iter_0000011, which is missing"),
    "tracker without step": (
        write("latest_train_state.pt", file_bytes(OutputFile("", zip_parts({"x": 1})))), "names no iteration"
    ),
    "tracker is no dictionary": (
        write("latest_train_state.pt", file_bytes(OutputFile("", zip_parts([1])))), "not a dictionary"
    ),
    "tracker is no torch file": (write("latest_train_state.pt", b"10"), "latest_train_state.pt"),
    "negative step": (write("latest_train_state.pt", state(-1)), "not a count"),
    "huge step": (write("latest_train_state.pt", state(1, step=from_array(np.array(1 << 62)))), "not a count"),
    "many steps": (
        write("latest_train_state.pt", state(1, step=from_array(np.arange(3)))), "not a count"
    ),
    "damaged state": (write(f"{FOLDER}/train_state.pt", b"PK"), "train_state.pt"),
    "truncated shard": (write(f"{FOLDER}/__0_0.distcp", b"PK"), "__0_0.distcp"),
    "no metadata": (remove(f"{FOLDER}/.metadata"), ".metadata"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_damage_is_named(case: str, root: Path) -> None:
    damage, message = BAD[case]
    damage(root)
    with pytest.raises(FormatError, match=message):
        registry.read(root)


def test_objects_in_the_configuration_are_not_built(root: Path) -> None:
    (iteration(root) / "run_config.yaml").write_bytes(b"model: !!python/object/apply:os.system ['true']")
    with pytest.raises(UnsafeError):
        registry.read(root)


def test_no_configuration_to_write(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--config"):
        written(Checkpoint("x", "torch", {}), tmp_path / "m")


def test_other_roots_are_not_bridges(tmp_path: Path) -> None:
    assert not FORMAT.detect(look_at(tmp_path))
    shutil.copytree(fixture_path(f"{CASE}/ckpt"), tmp_path / FOLDER)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(STEP))
    assert not FORMAT.detect(look_at(tmp_path))
    assert registry.read(tmp_path).format == "megatron-core"


PROVIDERS = {
    "llama": "GPTModelProvider", "llama31_ropescale": "GPTModelProvider", "mixtral": "GPTModelProvider",
    "qwen3_moe": "GPTModelProvider", "deepseek_v3": "MLAModelProvider", "deepseek_v2_lite": "MLAModelProvider",
    "gpt_oss": "GPTModelProvider", "gemma": "GemmaModelProvider", "gemma2": "Gemma2ModelProvider",
    "gemma3": "Gemma3ModelProvider", "gemma3-scaled": "Gemma3ModelProvider", "nemotron_h": "MambaModelProvider",
    "mamba2": "MambaModelProvider", "nemotron": "GPTModelProvider", "llama-nemotron":
    "LlamaNemotronHeterogeneousProvider", "qwen2-window": "GPTModelProvider", "phi4-partial": "GPTModelProvider",
}  # fmt: skip
OLDER = {"llama31_ropescale": "Llama31ModelProvider", "gpt_oss": "GPTOSSProvider"}
"""Classes that Megatron-Bridge has until 0.3, which goes with Megatron-Core 0.16."""


@pytest.mark.parametrize(
    ("name", "release"), [*((name, None) for name in PROVIDERS), *((name, (0, 16)) for name in ("llama", *OLDER))]
)
def test_the_classes_fields_say_the_whole_model(name: str, release: tuple[int, int] | None) -> None:
    """Without what we put beside them: in the words of arguments the model is the same."""
    model = samples()[name].open()[1]
    arguments = render_config(model, "megatron-args")
    written = run_config_of(arguments, model.config.rows, Facts(model.config.dtype, False, False), release)
    expected = PROVIDERS[name] if release is None else OLDER.get(name, PROVIDERS[name])
    assert written["model"]["_target_"].rpartition(".")[2] == expected
    again = arguments_of({"model": yaml_of(written["model"])}, "x", [])
    first, second = asdict(config_megatron.parse(arguments)), asdict(config_megatron.parse(again))
    ours = {"bos_token_id", "eos_token_id", "pad_token_id", "padded_vocab_size", "extra"}
    assert {key: second[key] for key in second if key not in ours} == {
        key: first[key] for key in first if key not in ours
    }


def yaml_of(values: dict[str, Any]) -> dict[str, Any]:
    return load_yaml_mapping(dump_yaml(values).encode(), "x")


def test_what_only_some_classes_are_told() -> None:
    def fields(name: str, **changes: Any) -> dict[str, Any]:
        model = samples()[name].open()[1]
        arguments = {**render_config(model, "megatron-args"), **changes}
        return dict(run_config_of(arguments, model.config.rows, Facts("bfloat16", False, False))["model"])

    spec = fields("deepseek_v3")["transformer_layer_spec"]
    assert spec["_target_"].endswith("get_gpt_decoder_block_spec") and spec["_partial_"] is True
    assert spec["use_transformer_engine"] is True
    assert not fields("deepseek_v3", transformer_impl="local")["transformer_layer_spec"]["use_transformer_engine"]
    assert "transformer_layer_spec" not in fields("mixtral"), "all layers have experts"
    assert fields("deepseek_v2_lite")["q_lora_rank"] is None, "the class has a default that is another"
    gemma = fields("gemma3")
    assert (gemma["interleaved_attn_pattern"], gemma["window_size"]) == ([5, 1], 5)
    assert gemma["rotary_base"] == [10000.0, 1000000]
    assert fields("llama31_ropescale")["rope_scaling_factor"] == 8.0
    assert "moe_router_topk" not in fields("llama", moe_router_topk=2)


def test_what_no_class_says_is_kept_beside_them(tmp_path: Path) -> None:
    source = fixture_path("families/phi3/hf")
    anyckpt.convert(source, tmp_path / "bridge", to="megatron-bridge")
    file = tmp_path / "bridge" / "iter_0000000" / "run_config.yaml"
    config = load_yaml_mapping(file.read_bytes(), "x")
    assert config["anyckpt"]["hf_model_type"] == "phi3"
    assert identify(registry.read(tmp_path / "bridge")).family == "phi3"  # type: ignore[union-attr]
    del config["anyckpt"]
    file.write_text(dump_yaml(config))
    assert identify(registry.read(tmp_path / "bridge")).family == "llama"  # type: ignore[union-attr]


@pytest.mark.parametrize(("every", "pattern"), [(None, [4, 1]), (2, [1, 1]), (6, [5, 1])])
def test_layers_of_gemma_3_that_have_the_window(every: int | None, pattern: list[int]) -> None:
    model = samples()["gemma3-scaled"].open()[1]
    arguments = render_config(
        replace(model, config=replace(model.config, window_attn_skip_freq=every)), "megatron-args"
    )
    written = run_config_of(arguments, model.config.rows, Facts("float32", False, False))
    assert written["model"]["interleaved_attn_pattern"] == pattern
    again = config_megatron.parse(arguments_of({"model": yaml_of(written["model"])}, "x", []))
    assert (again.window_size, again.window_attn_skip_freq) == (model.config.window_size, None if every == 6 else every)


def test_layers_of_gemma_3_without_a_window() -> None:
    model = samples()["gemma3-scaled"].open()[1]
    config = replace(model.config, window_size=None, window_attn_skip_freq=None)
    arguments = render_config(replace(model, config=config), "megatron-args")
    written = run_config_of(arguments, model.config.rows, Facts("float32", False, False))
    assert written["model"]["interleaved_attn_pattern"] == [0, 1], "no number of a layer is left out"


@pytest.mark.parametrize("layers", [(1, 1, 0, 0), (0, 1, 0, 1)])
def test_layers_of_gemma_3_that_no_pattern_says(layers: tuple[int, ...]) -> None:
    model = samples()["gemma3-scaled"].open()[1]
    arguments = render_config(
        replace(model, config=replace(model.config, window_attn_skip_freq=layers)), "megatron-args"
    )
    with pytest.raises(MappingError, match="cannot express which layers have the window"):
        run_config_of(arguments, model.config.rows, Facts("float32", False, False))


@pytest.mark.parametrize("pattern", [[5], [5, 2], ["5", 1], 6])
def test_patterns_that_are_none(pattern: Any) -> None:
    found = arguments_of({"model": {**MODEL, "interleaved_attn_pattern": pattern, "softmax_scale": 0.0}}, "x", [])
    assert "window_attn_skip_freq" not in found
    assert arguments_of({"model": {**MODEL, "interleaved_attn_pattern": [5, 1], "softmax_scale": 0.0}}, "x", [])
