"""Megatron-Core torch_dist checkpoints: what real savers wrote, training roots, and damaged ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import (
    FIXTURES,
    assert_tensors_equal_expected,
    expected_of,
    fixture_path,
    sha256_of,
    write_plan,
)

from anyckpt.checkpoint import Checkpoint, ParallelLayout, Tokenizer, TrainingState
from anyckpt.containers.dcp import dcp_files
from anyckpt.containers.torch_file import read_torch, zip_parts
from anyckpt.engine.plan import Plan
from anyckpt.errors import FormatError, UsageError
from anyckpt.formats import dcp, megatron_core
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.megatron_core.implementation import extra_states, implementation_of, spelled
from anyckpt.formats.megatron_core.writer import torch_dist_files
from anyckpt.formats.registry import look_at
from anyckpt.operations.convert import convert
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.pickling import Global, Record, dumps, load
from anyckpt.pickling.torch_objects import namespace
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import LazyTensor, from_array

CASES = sorted(path.name for path in (FIXTURES / "mcore").iterdir() if not path.name.startswith(("dcp_", "zarr_")))
GPT = [case for case in CASES if case.startswith("gpt_")]


def opened(path: Path) -> Checkpoint:
    location = look_at(path)
    assert megatron_core.FORMAT.detect(location)
    return megatron_core.FORMAT.read(location)


def planned(checkpoint: Checkpoint, **options: Any) -> Plan:
    assert megatron_core.FORMAT.plan is not None
    return megatron_core.FORMAT.plan(checkpoint, WriteOptions(**options))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    copy = tmp_path / "ckpt"
    shutil.copytree(fixture_path("mcore/gpt_dense_tp2pp2/ckpt"), copy)
    return copy


@pytest.mark.parametrize("case", CASES)
def test_fixtures(case: str) -> None:
    checkpoint = opened(fixture_path(f"mcore/{case}/ckpt"))
    expected = expected_of(f"mcore/{case}")
    assert_tensors_equal_expected(checkpoint.tensors, expected["tensors"])
    assert checkpoint.dialect == "megatron-core" and checkpoint.format == "megatron-core"
    assert checkpoint.warnings == []
    extra = {name.split("/")[0] for name in expected["objects"] if "_extra_state" in name}
    assert set(checkpoint.ignored) == extra
    assert not any("_extra_state" in name for name in checkpoint.objects)
    assert {name for name in expected["objects"] if "_extra_state" not in name} <= set(checkpoint.objects)
    assert checkpoint.training.step == expected["common"]["iteration"]


@pytest.mark.parametrize(
    ("case", "version"),
    [
        ("torchdist_v012_w4_flat", "0.12 or older"),
        ("torchdist_v015_w2_flat", "0.13 to 0.15"),
        ("torchdist_plain_w4", "0.16 to 0.18"),
        ("torchdist_v020main_w2", "0.19 or newer"),
    ],
)
def test_versions(case: str, version: str) -> None:
    assert opened(fixture_path(f"mcore/{case}/ckpt")).format_version == f"torch_dist, Megatron-Core {version}"


def test_facts_of_a_training_checkpoint() -> None:
    checkpoint = opened(fixture_path("mcore/gpt_dense_tp2pp2/ckpt"))
    assert checkpoint.layout == ParallelLayout(tensor_parallel=2, pipeline_parallel=2)
    assert checkpoint.config["num_layers"] == 2 and checkpoint.config_kind == "megatron-args"
    assert checkpoint.training == TrainingState(step=10, has_rng=True)
    assert checkpoint.objects["checkpoint_version"] == 3.0
    assert checkpoint.details["content_metadata"]["singleton_local_shards"] is False
    assert checkpoint.parameters == sum(tensor.size for tensor in checkpoint.tensors.values())


@pytest.mark.parametrize(
    ("case", "prefixes"),
    [
        ("gpt_opt_plain", ("optimizer.",)),
        ("gpt_opt_fully_reshardable_dp2", ("optimizer.",)),
        ("gpt_opt_dp_reshardable_dp2", ("optimizer.",)),
        ("gpt_opt_dp_zero_dp2", ()),
        ("gpt_moe_opt_chained_ep2", ("optimizer.",)),
        ("gpt_moe_opt_chained_ep2_dp_reshardable", ("chained_0.optimizer.", "chained_1.optimizer.")),
    ],
)
def test_optimizer_state_is_told_from_weights(case: str, prefixes: tuple[str, ...]) -> None:
    checkpoint = opened(fixture_path(f"mcore/{case}/ckpt"))
    assert checkpoint.state_prefixes == prefixes
    assert checkpoint.training.has_optimizer and checkpoint.training.has_scheduler
    assert not any("optimizer" in name for name in checkpoint.weights())


def test_tensor_parallel_size_without_arguments(good: Path) -> None:
    write_common(good, {"iteration": 3})
    checkpoint = opened(good)
    assert checkpoint.layout == ParallelLayout(tensor_parallel=2, pipeline_parallel=2), "from the random states' grid"
    assert checkpoint.config == {} and checkpoint.config_kind is None


def test_tensor_parallel_size_from_the_cut_of_the_projections(good: Path) -> None:
    """Neither arguments nor random states: the row-parallel projections are cut along their last axis."""
    write_common(good, {"iteration": 3})
    index = load((good / ".metadata").read_bytes(), name="index")
    entries = index.state["state_dict_metadata"]
    for name in [name for name in entries if name.startswith("rng_state")]:
        del entries[name]
    (good / ".metadata").unlink()
    (good / ".metadata").write_bytes(dumps(index, protocol=4))
    assert opened(good).layout == ParallelLayout(tensor_parallel=2)


def write_common(folder: Path, common: Any) -> None:
    from anyckpt.engine.plan import OutputFile

    (folder / "common.pt").unlink(missing_ok=True)
    write_plan(Plan("x", (OutputFile("common.pt", tuple(zip_parts(common, archive_name="common"))),)), folder)


@pytest.mark.parametrize(("tracker", "name"), [("10", "iter_0000010"), ("release\n", "release")])
def test_a_training_root_leads_to_its_newest_iteration(tmp_path: Path, tracker: str, name: str) -> None:
    shutil.copytree(fixture_path("mcore/gpt_opt_plain/ckpt"), tmp_path / name)
    (tmp_path / "iter_0000005").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    checkpoint = opened(tmp_path)
    assert checkpoint.path == str(tmp_path)
    assert_tensors_equal_expected(checkpoint.tensors, expected_of("mcore/gpt_opt_plain")["tensors"])


def test_megatron_bridge_files_beside_the_payload_are_kept(good: Path) -> None:
    (good / "run_config.yaml").write_text("model: {}")
    (good / "tokenizer").mkdir()
    (good / "tokenizer" / "tokenizer.json").write_text("{}")
    (good / "tokenizer" / "special_tokens_map.json").write_text("{}")
    checkpoint = opened(good)
    assert set(checkpoint.artifacts) == {"run_config.yaml"}
    assert checkpoint.tokenizer is not None and checkpoint.tokenizer.library == "huggingface"
    assert set(checkpoint.tokenizer.files) == {"tokenizer.json", "special_tokens_map.json"}


def test_a_sentencepiece_tokenizer(good: Path) -> None:
    (good / "tokenizer").mkdir()
    (good / "tokenizer" / "m.model").write_bytes(b"m")
    tokenizer = opened(good).tokenizer
    assert tokenizer is not None and (tokenizer.library, tokenizer.model_file) == ("sentencepiece", "m.model")


@pytest.mark.parametrize(("prefix", "dialect"), [("module.", "nemo2"), ("model.", "nemo-sharded")])
def test_dialects_of_nemo(tmp_path: Path, prefix: str, dialect: str) -> None:
    tensors = {f"{prefix}decoder.final_layernorm.weight": from_array(np.zeros(3, dtype=np.float32))}
    write_plan(Plan("x", tuple(dcp_files(tensors, {}, megatron=True))), tmp_path / "c")
    (tmp_path / "c" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert opened(tmp_path / "c").dialect == dialect


# -- writing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_the_same_checkpoint(tmp_path: Path, case: str) -> None:
    source = opened(fixture_path(f"mcore/{case}/ckpt"))
    inside = case.startswith("current_")  # Megatron-Core 0.19 saves no common.pt
    plan = planned(source, ranks=2, megatron_version=(0, 19) if inside else None)
    stages = {file.path: file.stage for file in plan.files}
    assert stages["metadata.json"] == 2 and stages[".metadata"] == 1 and ("common.pt" in stages) is not inside
    assert plan.ignored == source.ignored
    again = opened(write_plan(plan, tmp_path / "out"))
    assert_tensors_equal_expected(again.tensors, expected_of(f"mcore/{case}")["tensors"])
    assert set(again.objects) == set(source.objects)
    assert again.config == source.config and again.training == source.training
    if case not in ("torchdist_v012_w4_flat", "torchdist_v015_w2_flat", "torchdist_v020main_w2"):
        # The commit marker is the same file as Megatron-Core writes.
        marker = fixture_path(f"mcore/{case}/ckpt/metadata.json").read_bytes()
        assert (tmp_path / "out" / "metadata.json").read_bytes() == marker


@pytest.mark.parametrize("case", ["gpt_dense_tp2pp2", "current_gpt_moe", "torchdist_v012_w4_flat"])
@pytest.mark.parametrize("version", ["0.19", "0.18.2", None])
def test_the_common_state_is_where_the_release_looks(tmp_path: Path, case: str, version: str | None) -> None:
    """Only 0.19 and later find it inside; it is the same state, and nothing else changes."""
    before, release = opened(fixture_path(f"mcore/{case}/ckpt")), LayoutRequest(megatron_version=version).release
    after = opened(write_plan(planned(before, megatron_version=release), tmp_path / "out"))
    assert (tmp_path / "out" / "common.pt").exists() is (version != "0.19")
    assert after.format_version is not None and after.format_version.endswith("or newer") is (version == "0.19")
    assert after.config == before.config and after.training == before.training
    assert set(after.objects) == set(before.objects) and after.tensors.keys() == before.tensors.keys()


@pytest.mark.parametrize(
    ("to", "version", "message"),
    [
        ("megatron-lm", "0.19", "means nothing for megatron-lm"),
        ("hf", "0.19", "means nothing for hf"),
        ("megatron-core", "newest", "is not a release"),
    ],
)
def test_a_release_that_is_none_or_means_nothing(tmp_path: Path, to: str, version: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        convert(
            fixture_path("families/llama/hf"), tmp_path / "out", to=to, layout=LayoutRequest(megatron_version=version)
        )


def common_of(folder: Path) -> dict[str, Any]:
    common: dict[str, Any] = read_torch(LocalFile(folder / "common.pt")).root
    return common


def test_a_common_state_gets_nothing_that_it_did_not_have(tmp_path: Path) -> None:
    """A caller of ``dist_checkpointing.load`` is handed all of it, and a model's ``load_state_dict`` takes no other."""
    weights = {"w": from_array(np.ones((2, 4), np.float32))}
    write_plan(Plan("x", tuple(torch_dist_files(weights, {}, {"common": 5}))), tmp_path / "a")
    for optimizer, left in (("keep", {"common": 5}), ("drop", {})):
        convert(tmp_path / "a", tmp_path / optimizer, to="megatron-core", optimizer=optimizer)
        assert common_of(tmp_path / optimizer) == left


@pytest.mark.parametrize("to", ["megatron-core", "megatron-core-zarr"])
def test_what_megatron_lm_reads_comes_with_a_model_of_another_format_unless_told(tmp_path: Path, to: str) -> None:
    weights: dict[str, LazyTensor] = {"decoder.final_layernorm.weight": from_array(np.ones(3, np.float32))}
    source = Checkpoint(
        __file__, "torch", weights, dialect="megatron-core", config={"num_layers": 1}, config_kind="megatron-args"
    )
    bare = LayoutRequest(megatron_args=False)
    convert(source, tmp_path / "full", to=to)
    convert(source, tmp_path / "bare", to=to, layout=bare)
    convert(replace(source, config={}, config_kind=None), tmp_path / "unknown", to=to)
    assert set(common_of(tmp_path / "full")) == {"args", "checkpoint_version", "iteration"}
    assert common_of(tmp_path / "bare") == {}
    assert common_of(tmp_path / "unknown") == {"checkpoint_version": 3.0, "iteration": 0}
    with pytest.raises(UsageError, match="--no-megatron-args means nothing for dcp"):
        convert(source, tmp_path / "dcp", to="dcp", layout=bare)


def test_arguments_are_a_namespace_of_the_configuration(tmp_path: Path) -> None:
    checkpoint = Checkpoint(
        path="x",
        format="hf",
        tensors={"decoder.layers.mlp.linear_fc1.weight": from_array(np.zeros((2, 4, 3), dtype=np.float32))},
        objects={"epoch": 4, "rng_state/shard_0.0_1.1": [1]},
        config={"num_layers": 2, "swiglu": True, "rotary_base": 10000},
        config_kind="megatron-args",
        tokenizer=Tokenizer("sentencepiece", {"m.model": MemorySource(b"spm")}, "m.model"),
        training=TrainingState(step=7),
    )
    plan = planned(checkpoint)
    assert plan.ignored == {"epoch": "state of another framework, which Megatron-Core has no place for"}
    out = write_plan(plan, tmp_path / "out")
    common = read_torch(LocalFile(out / "common.pt")).root
    assert common["args"].path == "argparse.Namespace" and common["args"].fields() == checkpoint.config
    assert (common["checkpoint_version"], common["iteration"]) == (3.0, 7)
    assert (out / "tokenizer" / "m.model").read_bytes() == b"spm"
    again = opened(out)
    assert again.objects["rng_state/shard_0.0_1.1"] == [1]
    assert set(again.ignored) == {"decoder.layers.mlp.linear_fc1._extra_state"}


def test_changed_arguments_replace_stored_ones_and_others_stay_as_they_were(tmp_path: Path, good: Path) -> None:
    dtype = Global("torch", "bfloat16")
    enum = Record(Global("megatron.core.enums", "ModelType"), (1,))
    write_common(good, {"args": namespace({"num_layers": 2, "params_dtype": dtype, "model_type": enum})})
    source = opened(good)
    assert source.config["params_dtype"] == "torch.bfloat16"
    source.config["num_layers"] = 3
    fields = read_torch(LocalFile(write_plan(planned(source), tmp_path / "out") / "common.pt")).root["args"].fields()
    assert fields["num_layers"] == 3 and fields["params_dtype"] == dtype
    assert fields["model_type"].path == "megatron.core.enums.ModelType"


def test_extra_states_cover_those_that_megatron_core_saved() -> None:
    for case in GPT:
        checkpoint = opened(fixture_path(f"mcore/{case}/ckpt"))
        saved = {name for name in expected_of(f"mcore/{case}")["objects"] if "_extra_state" in name}
        made = list(extra_states(checkpoint.tensors))
        assert len(made) == len(set(made))
        assert saved <= set(made), case
        others = {name.split("._extra_state")[0].rsplit(".", 1)[-1] for name in set(made) - saved}
        assert others <= {"core_attention", "final_layernorm", "q_layernorm", "k_layernorm", "input_layernorm"}
        assert implementation_of(checkpoint) == "local"
        assert set(extra_states(checkpoint.tensors, "local")) == saved, case


def test_what_a_model_is_built_of_is_what_its_arguments_or_its_own_states_say() -> None:
    def of(impl: str | None, states: list[str], asked: str | None = None, norm: str = "input") -> str | None:
        config = {"num_layers": 1, **({} if impl is None else {"transformer_impl": impl})}
        ignored = {f"decoder.layers.{name}._extra_state": "" for name in states}
        return implementation_of(
            Checkpoint(
                "x",
                "megatron-core",
                {f"decoder.layers.{norm}_layernorm.weight": from_array(np.zeros(1))},
                config=config,
                config_kind="megatron-args",
                ignored=ignored,
            ),
            asked,
        )

    linear, norm, kernel = "mlp.linear_fc1", "q_layernorm", "self_attention.core_attention"
    assert of("local", []) == of("local", [linear, norm]) == of(None, [linear]) == "local"
    assert of(None, []) is of(None, [linear, norm]) is of(None, [linear, kernel]) is None
    assert of(None, [linear], norm="pre_mlp") is None  # local layers call the norm before experts otherwise
    assert of("transformer_engine", [linear]) is None  # older ones had no states of norms
    assert of("local", [linear], "transformer_engine") == "transformer_engine"
    assert of(None, [linear, norm], "local") == "local"


def test_the_norm_before_experts_is_called_as_each_kind_of_layers_calls_it() -> None:
    fused = ["decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"]
    own = ["decoder.layers.1.mlp.router.weight", "decoder.layers.1.pre_mlp_layernorm.weight"]
    local = [*own[:1], "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"]
    for stacked in (False, True):
        names = [[n.replace(".1.", ".") if stacked else n for n in given] for given in (own, local)]
        assert list(spelled(dict.fromkeys(names[0]), "local")) == names[1]
        assert list(spelled(dict.fromkeys(names[1]), "transformer_engine")) == names[0]
        assert list(spelled(dict.fromkeys(names[1]), None)) == names[1]
    for kind in ("local", "transformer_engine", None):
        assert list(spelled(dict.fromkeys(fused), kind)) == fused  # type: ignore[arg-type]
    state = {"optimizer.state.exp_avg.decoder.layers.pre_mlp_layernorm.weight": 1}
    assert list(spelled(state, "local")) == ["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.layer_norm_weight"]


def test_extra_states_of_prefixed_and_numbered_layers() -> None:
    def tensor(*shape: int) -> LazyTensor:
        return from_array(np.zeros(shape, dtype=np.float32))

    names = {
        "module.decoder.layers.mlp.experts.experts.linear_fc2.weight": tensor(2, 3, 1, 1),
        "decoder.layers.4.mlp.linear_fc1.weight_w": tensor(1, 1),
        "decoder.layers.4.mlp.linear_fc1.weight_v": tensor(1, 1),
        "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight": tensor(1, 1),
        "embedding.word_embeddings.weight": tensor(1, 1),
    }
    assert list(extra_states(names)) == [
        *(
            f"module.decoder.layers.mlp.experts.experts.linear_fc2._extra_state/shard_{layer}.{expert}_2.3"
            for layer in range(2)
            for expert in range(3)
        ),
        "decoder.layers.4.mlp.linear_fc1._extra_state/shard_0_1",
    ]


# -- damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty.*interrupted"),
        ("{", "is not valid JSON"),
        ("[1]", "a list where an object is expected"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"sharded_backend": "other"}', "unknown backend.*torch_dist.*other"),
        ("{}", "unknown backend.*None"),
        ("\xff\xfe", "is not valid JSON"),
        ('{"sharded_backend": "zarr", "sharded_backend_version": 1}', "unknown backend.*expected torch_dist.*zarr"),
    ],
)
def test_commit_marker(good: Path, text: str, message: str) -> None:
    (good / "metadata.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=message) as problem:
        opened(good)
    assert str(good) in str(problem.value)


def test_a_missing_commit_marker_is_a_warning(good: Path) -> None:
    (good / "metadata.json").unlink()
    assert any("no metadata.json" in warning for warning in opened(good).warnings)


def test_unfinished_asynchronous_save(good: Path) -> None:
    (good / "metadata.json").unlink()
    (good / ".metadata").unlink()
    with pytest.raises(FormatError, match=r"shards but no \.metadata: the save was not finished"):
        opened(good)


def test_another_metadata_json_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"format": "pt"}')
    assert not megatron_core.FORMAT.detect(look_at(tmp_path))
    (tmp_path / "metadata.json").write_text("")
    assert not megatron_core.FORMAT.detect(look_at(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.write_bytes(b""), "common.pt"),
        (lambda p: p.write_bytes(p.read_bytes()[:200]), "common.pt"),
        (lambda p: write_common(p.parent, [1, 2]), "common.pt: is not a dictionary.*list"),
    ],
)
def test_damaged_common_state(good: Path, change: Callable[[Path], Any], message: str) -> None:
    common = good / "common.pt"
    data = common.read_bytes()
    common.unlink()
    common.write_bytes(data)
    change(common)
    with pytest.raises(FormatError, match=message):
        opened(good)


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("", "does not name an iteration"),
        ("latest", "does not name an iteration"),
        ("../x", "does not name an iteration"),
        ("9" * 30, "does not name an iteration"),
        ("x" * 1000, "too large"),
        ("20", "names iter_0000020, which is missing.*iter_0000010"),
        ("release", "names release, which is missing"),
    ],
)
def test_trackers_that_lead_nowhere(tmp_path: Path, tracker: str, message: str) -> None:
    shutil.copytree(fixture_path("mcore/gpt_opt_plain/ckpt"), tmp_path / "iter_0000010")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    with pytest.raises(FormatError, match=message):
        opened(tmp_path)


def test_a_root_of_rank_folders_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "iter_0000010" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    assert not megatron_core.FORMAT.detect(look_at(tmp_path))


def test_plain_dcp_is_not_ours() -> None:
    assert not megatron_core.FORMAT.detect(look_at(fixture_path("mcore/dcp_fsdp_w2/ckpt")))
    assert dcp.FORMAT.detect(look_at(fixture_path("mcore/dcp_fsdp_w2/ckpt")))


def test_checksums_agree_with_the_bytes() -> None:
    import zlib

    checkpoint = opened(fixture_path("mcore/gpt_dense_tp2pp2/ckpt"))
    stored = list(checkpoint.checksums())
    assert any("common.pt" in checksum.name for checksum in stored)
    assert sum(name.name.endswith("archive/data/0") for name in stored) >= sum(checkpoint.details["chunks"].values())
    for checksum in stored:
        assert zlib.crc32(checksum.source.read_all()) == checksum.crc32, checksum.name


def test_tensors_of_objects_stay_lazy() -> None:
    value = opened(fixture_path("mcore/gpt_opt_dp_zero_dp2/ckpt")).objects[
        "optimizer.distributed.dp_group_idx_0.param_state/shard_0_1"
    ]
    assert value["buckets_coalesced"] is True
    assert isinstance(next(iter(value[0].values()))["exp_avg"], LazyTensor)
    assert sha256_of(next(iter(value[0].values()))["exp_avg"])


def test_every_linear_map_and_norm_asks_for_a_state() -> None:
    """Those of Mamba's mixers and of gated delta nets, too, whose input projection is stored in pieces."""
    layer, one = "decoder.layers.0", from_array(np.zeros((2, 2), "f4"))
    linear = (
        f"{layer}.mixer.in_proj", f"{layer}.mixer.out_proj", f"{layer}.self_attention.in_proj",
        f"{layer}.self_attention.out_proj", f"{layer}.mlp.fc1_latent_proj", "mtp.layers.0.eh_proj",
    )  # fmt: skip
    norms = (f"{layer}.self_attention.out_norm", "mtp.layers.0.enorm", "mtp.layers.0.hnorm", "decoder.final_norm")
    pieces = {f"{name}.weight.{piece}": one for name in linear if name.endswith("in_proj") for piece in "zx"}
    whole = {f"{name}.weight": one for name in (*linear, *norms) if not name.endswith("in_proj")}
    others = dict.fromkeys((f"{layer}.mixer.norm.weight", f"{layer}.self_attention.A_log"), one)
    found = [key.split("._extra_state")[0] for key in extra_states(pieces | whole | others, "transformer_engine")]
    assert sorted(found) == sorted((*linear, *norms, "output_layer"))
    local = [key.split("._extra_state")[0] for key in extra_states(pieces | whole | others, "local")]
    assert sorted(local) == sorted((*linear, "output_layer"))
