"""Every setting of NeMo 1's training files has an outcome, and arguments that the new classes have."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import fixture_path

from anyckpt.config.interpolation import resolve
from anyckpt.config.migration import Setting, migrate
from anyckpt.errors import FormatError, UsageError
from anyckpt.operations.migrate_config import MigratedConfig, calls, migrate_config
from anyckpt.plain_yaml import load_yaml_mapping

KEYS = fixture_path("nemo1_settings/keys.txt").read_text().split()
"""The settings of every file in NeMo 1.23's and 2.0's ``examples/nlp/language_modeling/conf``."""

STRATEGY = """
    tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size context_parallel_size
    sequence_parallel expert_model_parallel_size moe_extended_tp expert_tensor_parallel_size ckpt_load_optimizer
    ckpt_save_optimizer ddp fsdp use_te_rng_tracker use_sharp save_ckpt_format ckpt_async_save ckpt_torch_dist_multiproc
    ckpt_assume_constant_structure ckpt_parallel_save ckpt_parallel_save_within_dp ckpt_parallel_load
    ckpt_parallel_save_optim ckpt_load_directly_on_device ckpt_load_strictness use_tp_pp_dp_mapping
    nccl_communicator_config_path
""".split()
"""Arguments of NeMo 2.5's ``MegatronStrategy`` that NeMo 1 has settings for."""

OTHERS = {
    "resume": "restore_config resume_from_directory resume_from_path resume_if_exists resume_past_end"
    " resume_ignore_no_checkpoint",
    "logger": "name log_dir explicit_log_dir version use_datetime_version log_local_rank_0_only log_global_rank_0_only"
    " files_to_copy",
    "precision": "precision grad_reduce_in_fp32 fp8 fp8_margin fp8_amax_history_len fp8_amax_compute_algo"
    " fp8_dot_product_attention fp8_param_gather fp16_initial_loss_scale fp16_loss_scale_window fp16_hysteresis",
    "data": "paths seq_length micro_batch_size global_batch_size rampup_batch_size num_workers reset_position_ids"
    " reset_attention_mask eod_mask_loss seed split index_mapping_dir num_dataset_builder_threads dataloader_type"
    " mmap_bin_files",
    "scheduler": "max_steps warmup_steps constant_steps min_lr",
    "overlap": "tp_comm_overlap tp_comm_overlap_cfg overlap_p2p_comm batch_p2p_comm",
    "garbage_collection": "gc_interval_train gc_interval_val",
    "profiling": "start_step end_step ranks gen_shape",
}


def nested(pairs: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs.items():
        *path, last = key.split(".")
        here = found
        for part in path:
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                break
        else:
            here[last] = value
    return found


def outcome(pairs: dict[str, Any], key: str | None = None) -> Setting:
    settings = {item.key: item for item in migrate(nested(pairs)).settings}
    return settings[key or next(iter(pairs))]


@pytest.mark.parametrize("key", KEYS)
def test_every_setting_of_nemos_own_files_is_known(key: str) -> None:
    found = outcome({key: "x"})
    assert found.outcome != "unknown" and found.did
    assert found.arguments or found.note or found.outcome in ("unset", "carried")


def test_arguments_are_those_of_the_classes() -> None:
    everything = nested(
        dict.fromkeys([*KEYS, *(f"model.{key}" for key in ("use_te_rng_tracker", "context_parallel_size"))], 1)
    )
    found: dict[str, set[str]] = {}
    for item in migrate(everything).settings:
        for section, argument in item.arguments:
            found.setdefault(section, set()).add(argument)
    assert found["strategy"] <= set(STRATEGY) and len(found["strategy"]) > 14
    for section, names in OTHERS.items():
        assert found.get(section, set()) <= set(names.split()), section


def test_checkpoint_settings() -> None:
    done = migrate(
        nested({"model.dist_ckpt_format": "zarr", "model.dist_ckpt_load_on_device": True, "model.num_layers": 2})
    )
    zarr, device, _ = done.settings
    assert zarr.arguments == {("strategy", "save_ckpt_format"): "zarr"} and "deprecated" in zarr.warnings[0]
    assert device.arguments == {("strategy", "ckpt_load_directly_on_device"): True}
    missing = {item.key: (item.was, item.now) for item in done.defaults}
    assert missing["model.dist_ckpt_parallel_save"] == (False, True)
    assert "model.dist_ckpt_format" not in missing


def test_a_scheduler_that_takes_other_values_where_it_is_told_nothing() -> None:
    cosine = migrate(nested({"model.optim.sched.name": "CosineAnnealing", "model.optim.sched.warmup_steps": 5}))
    missing = {item.argument: (item.was, item.now) for item in cosine.defaults if item.argument[0] == "scheduler"}
    assert missing == {
        ("scheduler", "constant_steps"): (0, 80000),
        ("scheduler", "max_steps"): ("trainer.max_steps", 10),
        ("scheduler", "min_lr"): (0.0, 6e-5),
    }
    none = migrate(nested({"model.num_layers": 2})).defaults
    assert not [item for item in none if item.argument[0] == "scheduler"]


@pytest.mark.parametrize(
    ("pairs", "arguments"),
    [
        ({"trainer.precision": "bf16"}, {("precision", "precision"): "bf16-mixed"}),
        ({"trainer.precision": 32}, {("precision", "precision"): "32"}),
        (
            {"model.normalization": "layernorm1p"},
            {("model", "normalization"): "LayerNorm", ("model", "layernorm_zero_centered_gamma"): True},
        ),
        (
            {"model.activation": "fast-swiglu"},
            {
                ("model", "activation_func"): {"_target_": "torch.nn.functional.silu", "_call_": False},
                ("model", "gated_linear_unit"): True,
            },
        ),
        ({"model.optim.betas": [0.9, 0.95]}, {("optimizer", "adam_beta1"): 0.9, ("optimizer", "adam_beta2"): 0.95}),
        (
            {"model.optim.name": "distributed_fused_adam"},
            {("optimizer", "optimizer"): "adam", ("optimizer", "use_distributed_optimizer"): True},
        ),
        ({"model.fp8_e4m3": True, "model.fp8": True}, {("precision", "fp8"): "e4m3"}),
        ({"model.fp8_hybrid": True, "model.fp8": False}, {}),
        (
            {"model.gc_interval": 9},
            {("garbage_collection", "gc_interval_train"): 9, ("garbage_collection", "gc_interval_val"): 9},
        ),
        ({"trainer.gpus": 4}, {("trainer", "devices"): 4}),
        ({"trainer.amp_backend": "native"}, {}),
        (
            {"model.optim.sched.warmup_ratio": 0.01, "model.optim.sched.max_steps": 3000},
            {("scheduler", "warmup_steps"): 30},
        ),
        ({"model.optim.sched.warmup_ratio": 0.01, "trainer.max_steps": -1}, {}),
        ({"model.optim.sched.constant_steps": 0, "model.optim.sched.name": "PolynomialDecayAnnealing"}, {}),
        (
            {"model.optim.sched.warmup_ratio": 0.01, "model.optim.sched.name": "WarmupAnnealing"},
            {("scheduler", "warmup_ratio"): 0.01},
        ),
        (
            {"model.optim.sched.power": 2, "model.optim.sched.name": "PolynomialDecayAnnealing"},
            {("scheduler", "power"): 2},
        ),
        ({"model.bias": False}, {("model", "add_bias_linear"): False}),
        ({"tensor_model_parallel_size": 2, "trainer.devices": 1}, {("strategy", "tensor_model_parallel_size"): 2}),
    ],
)
def test_values_change_with_their_names(pairs: dict[str, Any], arguments: dict[tuple[str, str], Any]) -> None:
    assert outcome(pairs).arguments == arguments


def test_what_customizes_megatron_core_comes_on_top(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("model:\n  mcore_customization_config: {num_layers: 3, strange: 1}\n  num_layers: 2\n")
    done = migrate_config(path)
    section = next(section for section in done.sections if section.name == "model")
    assert section.arguments["num_layers"] == (3, "model.mcore_customization_config.num_layers")
    assert done.warnings() == [
        "model.mcore_customization_config.strange: GPTConfig has no field strange: a class of its own may have"
    ]


def test_interpolations() -> None:
    config = nested(
        {
            "model.a": 3,
            "model.b": "${.a}",
            "model.c": "${model.b}",
            "model.d": "${multiply:${model.a}, ${.b}}",
            "model.inner.e": "${..a}",
            "model.f": "run-${model.a}",
            "model.g": "${sum:${.a},-1}",
            "model.loop": "${model.loop}",
            "model.env": "${oc.env:HOME}",
            "model.none": "${nothing.here}",
        }
    )
    found, troubles = resolve(config)
    assert found["model"] | {"inner": 0} == {
        "a": 3,
        "b": 3,
        "c": 3,
        "d": 9,
        "inner": 0,
        "f": "run-3",
        "g": 2,
        "loop": "${model.loop}",
        "env": "${oc.env:HOME}",
        "none": "${nothing.here}",
    }
    assert found["model"]["inner"] == {"e": 3}
    assert set(troubles) == {"model.loop", "model.env", "model.none"}
    assert "oc.env" in troubles["model.env"] and "itself" in troubles["model.loop"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text("a.${}:,[] 1", max_size=12),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        max_leaves=8,
    )
)
def test_no_interpolation_fails(value: Any) -> None:
    found, _ = resolve({"a": value, "b": "${a}"})
    assert set(found) == {"a", "b"}


def test_both_forms_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(
        "trainer: {devices: 8, precision: bf16, max_steps: 10}\n"
        "exp_manager: {name: run, create_checkpoint_callback: true, checkpoint_callback_params: {save_top_k: 2}}\n"
        "model: {num_layers: 2, restore_from_path: old.nemo, activation: gelu, data: {data_prefix: '???'}}\n"
        "strange: {key: 1}\n"
    )
    done = migrate_config(path)
    parsed = load_yaml_mapping(done.text("yaml").encode(), "new")
    assert parsed == done.to_json()["calls"]
    assigned = {}
    for statement in ast.parse(done.text("python")).body:
        if isinstance(statement, ast.Assign):
            assert isinstance(statement.targets[0], ast.Name) and isinstance(statement.value, ast.Call)
            assigned[statement.targets[0].id] = statement.value
    assert set(assigned) == set(parsed)
    assert ast.unparse(assigned["trainer"].func) == "nemo.lightning.Trainer"
    passed = {word.arg: ast.unparse(word.value) for word in assigned["trainer"].keywords}
    assert passed == {"devices": "8", "max_steps": "10", "plugins": "[precision]"}
    assert "strange.key" in done.text("yaml") and done.unknown() == ["strange.key"]
    assert "must be given where the script is started" in done.text("python")


def test_interpolations_of_parts() -> None:
    config = {
        "sizes": [1, 2, "${..width}"],
        "width": 8,
        "first": "${sizes.0}",
        "second": "${sizes[1]}",
        "third": "${sizes.2}",
        "past": "${sizes.3}",
        "part": {"a": "${width}", "b": ["${.0}", "${..a}"], "c": {"d": "${..a}"}},
        "copy": "${part.c}",
        "bad": "${part}",
    }
    found, troubles = resolve(config)
    assert found["sizes"] == [1, 2, 8] and (found["first"], found["second"], found["third"]) == (1, 2, 8)
    assert found["copy"] == {"d": 8} and "sizes.3" in troubles["past"]
    assert "itself" in troubles["part.b"] and "itself" in troubles["bad"]


def test_interpolations_that_double_end() -> None:
    mappings = {f"k{level}": {"x": f"${{k{level + 1}}}", "y": f"${{k{level + 1}}}"} for level in range(28)}
    texts = {f"t{level}": f"${{t{level + 1}}}${{t{level + 1}}}" for level in range(28)}
    _, troubles = resolve({**mappings, **texts, "k28": 1, "t28": ""})
    assert "too much" in troubles["k0.x"] and "too much" in troubles["t0"]


_TEXT = st.text("ab #:'\"\\\n-[]{}&*!%@`,", max_size=40) | st.sampled_from(["long " * 40, "null", "1", "a\n\n b\n"])
_VALUES = _TEXT | st.floats(allow_nan=False) | st.integers() | st.lists(_TEXT, max_size=2)


@given(
    st.dictionaries(
        st.sampled_from(["profiler", "max-steps", "class", "callbacks", "plugins", "1"]), _VALUES, max_size=4
    ),
    _VALUES,
)
def test_both_forms_can_be_read_whatever_the_values_are(trainer: dict[str, Any], name: Any) -> None:
    migration = migrate(
        {"trainer": {"precision": 16, **trainer}, "exp_manager": {"name": name}, "model": {"gc_interval": 3}}
    )
    done = MigratedConfig("old.yaml", "nemo2", migration, calls(migration, "nemo2"), ())
    assert load_yaml_mapping(done.text("yaml").encode(), "new") == done.to_json()["calls"]
    compile(done.text("python"), "new", "exec")


@pytest.mark.parametrize("keys", [("save_top_k", "save_last"), ("save_last", "save_top_k")])
def test_our_saver_keeps_all_where_all_were_kept(keys: tuple[str, ...]) -> None:
    asked = {"save_top_k": -1, "save_last": True}
    migration = migrate({"exp_manager": {"checkpoint_callback_params": {key: asked[key] for key in keys}}})
    (retention,) = calls(migration, "anyckpt")
    assert {name: value for name, (value, _) in retention.arguments.items()} == {"last": None}


def test_a_reason_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("trainer: {amp_backend: native}\n")
    assert migrate_config(path).text("yaml").count("has no argument amp_backend") == 1


def test_a_setting_with_the_name_of_a_given_call_is_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(
        "trainer: {devices: 2, callbacks: [mine], max_time: .inf}\n"
        "model: {gc_interval: 3, tensor_model_parallel_size: 2, optim: {overlap_grad_sync: true}}\n"
    )
    text = migrate_config(path).text("python")
    assert "callbacks=[garbage_collection, *['mine']]" in text and "max_time=float('inf')" in text
    assert "ddp=ddp" in text and text.index("\nddp = ") < text.index("\nstrategy = ")


def test_megatron_bridges_checkpoint_section(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(
        "exp_manager: {checkpoint_callback_params: {save_weights_only: true, every_n_train_steps: 5}}\n"
        "model: {dist_ckpt_parallel_load: true, hidden_size: 4, dist_ckpt_format: zarr, restore_from_path: x.nemo}\n"
    )
    done = migrate_config(path, to="megatron-bridge")
    (section,) = done.sections
    assert {name: value for name, (value, _) in section.arguments.items()} == {
        "save_optim": False,
        "save_interval": 5,
        "fully_parallel_load": True,
        "ckpt_format": "torch_dist",
        "pretrained_checkpoint": "x.nemo",
    }
    assert done.warnings() == ["model.dist_ckpt_format: Megatron-Bridge does not write zarr"]
    assert "model.hidden_size" in done.text("yaml")


def test_our_own_savers_options(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(
        "exp_manager: {checkpoint_callback_params: {save_top_k: 3, mode: max, save_last: true, dirpath: run}}\n"
        "model: {dist_ckpt_format: torch_dist, dist_ckpt_torch_dist_multiproc: 4}\n"
    )
    done = migrate_config(path, to="anyckpt")
    assert done.to_json()["calls"] == {
        "options": {"_target_": "anyckpt.torch.Options", "format": "megatron-core", "workers": 4},
        "retention": {"_target_": "anyckpt.torch.Retention", "best": 3, "mode": "max", "last": 1},
        "saver": {"_target_": "anyckpt.torch.Saver", "folder": "run"},
    }
    path.write_text("model: {dist_ckpt_parallel_save_within_dp: true}\n")
    (warning,) = migrate_config(path, to="anyckpt").warnings()
    assert warning.endswith("within=group")
    assert "options=options," in done.text("python") and "keep=retention," in done.text("python")


@pytest.mark.parametrize(("said", "best"), [("save_last: true", 3), ("save_last: true, save_top_k: 0", 0)])
def test_as_many_checkpoints_stay_as_before(said: str, best: int, tmp_path: Path) -> None:
    """What NeMo 1 keeps where nothing is said counts, too, once there is a rule of ours."""
    path = tmp_path / "old.yaml"
    path.write_text(f"exp_manager: {{checkpoint_callback_params: {{{said}}}}}\n")
    kept = migrate_config(path, to="anyckpt").to_json()["calls"]["retention"]
    assert (kept["last"], kept["best"]) == (1, best)
    path.write_text("exp_manager: {checkpoint_callback_params: {save_last: true, save_top_k: -1}}\n")
    kept = migrate_config(path, to="anyckpt").to_json()["calls"]["retention"]
    assert kept["last"] is None and "best" not in kept


def test_a_models_configuration_alone(tmp_path: Path) -> None:
    path = tmp_path / "model_config.yaml"
    path.write_text("num_layers: 2\nhidden_size: 8\n")
    done = migrate_config(path)
    assert done.to_json()["calls"]["model"]["num_layers"] == 2 and "at the top" in done.notes[0]


@pytest.mark.parametrize(
    ("text", "error"),
    [("- 1\n", FormatError), ("a: [\n", FormatError), ("a: !!python/object:os.x {}\n", Exception)],
)
def test_what_is_no_training_file(tmp_path: Path, text: str, error: type[Exception]) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(text)
    with pytest.raises(error, match=r"old\.yaml"):
        migrate_config(path)
    with pytest.raises(UsageError, match="cannot be read"):
        migrate_config(tmp_path / "none.yaml")


def test_a_file_without_settings(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert migrate_config(path).notes == ("the file has no settings",)
