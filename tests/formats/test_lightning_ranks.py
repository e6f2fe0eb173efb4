"""Lightning checkpoints of one file per rank, made of the state dicts that NeMo 2.5.3 wrote for each rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import assert_tensors_equal_expected, expected_of, file_bytes, fixture_path

import anyckpt
from anyckpt.checkpoint import ParallelLayout
from anyckpt.containers.torch_file import read_torch, zip_parts
from anyckpt.engine.plan import OutputFile
from anyckpt.errors import FormatError, OutputError
from anyckpt.formats import registry
from anyckpt.formats.shared.unfinished import marker_path
from anyckpt.models.dialects import spellings
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.plain_yaml import dump_yaml
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.tar import read_tar
from anyckpt.tensor import from_array

CASE = "nemo/nemo1_mp_tp2_pp2"
NAME = "m--val_loss=1.50-step=6-consumed_samples=12.0-last.ckpt"
Change = Callable[[str, dict[str, Any]], None]


def checkpoints(
    root: Path, *, name: str = NAME, config: bool = True, change: Change = lambda folder, root: None
) -> Path:
    """A folder ``checkpoints`` as NeMo leaves it, of the ranks of a fixture."""
    members = read_tar(LocalFile(fixture_path(f"{CASE}/model.nemo")))
    for member in members.values():
        if not member.name.endswith(".ckpt"):
            continue
        folder = member.name.partition("/")[0]
        contents: dict[str, Any] = {
            "epoch": 1, "global_step": 6, "pytorch-lightning_version": "2.4.0",
            "state_dict": read_torch(member.source).root,
            "optimizer_states": [{"state": {0: {"exp_avg": from_array(np.zeros(2, np.float32))}}, "param_groups": []}],
            "lr_schedulers": [{"last_epoch": 6}], "callbacks": {},
        }  # fmt: skip
        if config:
            contents["hyper_parameters"] = {"cfg": expected_of(CASE)["config"]}
        change(folder, contents)
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).write_bytes(file_bytes(OutputFile("", zip_parts(contents))))
    return root


def check(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    renamed = spellings.rename(checkpoint.weights(), "hub", "nemo-sharded")[0]
    assert_tensors_equal_expected(renamed, expected_of(CASE)["global_tensors_by_sharded_key"])
    assert checkpoint.format == "lightning" and checkpoint.layout == ParallelLayout(2, 2)
    assert checkpoint.config == expected_of(CASE)["config"] and checkpoint.config_kind == "nemo1"
    assert checkpoint.training.step == 6 and checkpoint.training.consumed_samples == 12
    assert checkpoint.training.has_optimizer and checkpoint.warnings == []


@pytest.mark.parametrize("rank", ["tp_rank_00_pp_rank_000", "tp_rank_01_pp_rank_001"])
def test_one_ranks_file_opens_all(rank: str, tmp_path: Path) -> None:
    check(checkpoints(tmp_path / "checkpoints") / rank / NAME)


def test_folder_with_one_name(tmp_path: Path) -> None:
    check(checkpoints(tmp_path / "checkpoints"))


def test_name_as_nemo_gives_it(tmp_path: Path) -> None:
    check(checkpoints(tmp_path / "checkpoints") / NAME)


@pytest.mark.parametrize("where", ["", "checkpoints"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_configuration_in_hparams_yaml(where: str, wrapped: bool, tmp_path: Path) -> None:
    root = checkpoints(tmp_path / "checkpoints", config=False)
    config = expected_of(CASE)["config"]
    (tmp_path / where / "hparams.yaml").write_text(dump_yaml({"cfg": config} if wrapped else config))
    check(root)


def test_what_is_stored_is_listed_by_rank(tmp_path: Path) -> None:
    checkpoint = registry.read(checkpoints(tmp_path))
    for facts in expected_of(CASE)["per_rank_state_dict"]:
        folder = f"tp_rank_{facts['tp']:02d}_pp_rank_{facts['pp']:03d}"
        stored = {name for name in checkpoint.tensors if name.startswith(f"{folder}/state_dict.")}
        assert stored == {f"{folder}/state_dict.{name}" for name in facts["tensors"]}
        assert f"{folder}/optimizer_states.0.state.0.exp_avg" in checkpoint.tensors
        assert f"{folder}/optimizer_states" in checkpoint.objects
    assert all("optimizer" not in name for name in checkpoint.weights())
    assert len(checkpoint.ranks) == 4
    assert list(checkpoint.checksums())


def tokenizer(folder: Path) -> Path:
    """The model file, which a training run has by its path and a checkpoint beside it does not hold."""
    path = folder / "tiny_spm.model"
    members = read_tar(LocalFile(fixture_path(f"{CASE}/model.nemo")))
    path.write_bytes(next(m.source.read_all() for m in members.values() if m.name.endswith(path.name)))
    return path


def test_directory_of_a_distributed_save(tmp_path: Path) -> None:
    """What NeMo 1 leaves in ``checkpoints`` with ``use_dist_ckpt``: Lightning's entries are the common state."""
    case = "nemo/nemo1_dist_tp2"
    path = tmp_path / "checkpoints" / "m--step=6-last"
    for member in read_tar(LocalFile(fixture_path(f"{case}/model.nemo"))).values():
        if member.name.startswith("model_weights/") and not member.is_directory:
            path.mkdir(parents=True, exist_ok=True)
            (path / member.name.rpartition("/")[2]).write_bytes(member.source.read_all())
    config = expected_of(case)["config"]
    common = {"global_step": 6, "epoch": 0, "state_dict": {}, "hyper_parameters": {"cfg": config}, "loops": {}}
    (path / "common.pt").write_bytes(file_bytes(OutputFile("", zip_parts(common))))
    checkpoint = registry.read(path)
    assert_tensors_equal_expected(checkpoint.tensors, expected_of(case)["global_tensors_by_sharded_key"])
    assert checkpoint.config == config and checkpoint.config_kind == "nemo1"
    assert checkpoint.training.step == 6 and checkpoint.layout == ParallelLayout(2, 1)
    anyckpt.convert(path, tmp_path / "m.nemo", to="nemo", tokenizer=tokenizer(tmp_path))
    assert not anyckpt.diff(fixture_path(f"{case}/model.nemo"), tmp_path / "m.nemo")
    (tmp_path / "checkpoints" / "m--step=6-last-unfinished").touch()
    with pytest.raises(FormatError, match="unfinished"):
        registry.read(path)


def test_rank_files_become_an_archive(tmp_path: Path) -> None:
    """A partially trained model: the checkpoint's name as NeMo gives it, the layout kept or changed."""
    path = checkpoints(tmp_path / "checkpoints") / NAME
    whole = fixture_path(f"{CASE}/model.nemo")
    model = tokenizer(tmp_path)
    layout = anyckpt.LayoutRequest(tensor_parallel=4)
    anyckpt.convert(path, tmp_path / "flat.nemo", to="nemo", tokenizer=model)
    anyckpt.convert(path, tmp_path / "four.nemo", to="nemo", tokenizer=model, layout=layout)
    anyckpt.convert(path, tmp_path / "same.nemo", to="nemo", tokenizer=model, keep_layout=True)
    for name, ranks in (("flat", 0), ("four", 4), ("same", 4)):
        assert not anyckpt.diff(whole, tmp_path / f"{name}.nemo")
        assert len(registry.read(tmp_path / f"{name}.nemo").ranks) == ranks
    assert registry.read(tmp_path / "same.nemo").layout == ParallelLayout(2, 2)


def test_several_names_must_be_chosen_from(tmp_path: Path) -> None:
    checkpoints(tmp_path)
    other = checkpoints(tmp_path, name="m-last-EMA.ckpt")
    with pytest.raises(FormatError, match=r"several checkpoints.*m--val_loss.*m-last-EMA"):
        registry.read(tmp_path)
    found = registry.read(other / "m-last-EMA.ckpt")
    assert found.details["last"] and found.details["averaged_weights"]
    found = registry.read(other / NAME)
    assert found.details["last"] and not found.details["averaged_weights"]


def test_markers_of_single_files() -> None:
    root = fixture_path("nemo/ptl_ckpt_ema_nemo3_0_0")
    kinds = {
        path.name: (details["last"], details["averaged_weights"])
        for path in root.glob("*.ckpt")
        for details in [registry.read(path).details]
    }
    assert sorted(kinds.values()) == [(True, False), (True, True)]
    assert all(averaged == name.endswith("-EMA.ckpt") for name, (_, averaged) in kinds.items())


def test_unfinished_ranks_are_refused_unless_forced(tmp_path: Path) -> None:
    path = checkpoints(tmp_path) / "tp_rank_00_pp_rank_000" / NAME
    marker = tmp_path / f"{NAME.removesuffix('.ckpt')}-unfinished"
    assert marker_path(str(path)) == str(marker)
    marker.touch()
    for opened in (path, tmp_path / NAME):
        with pytest.raises(FormatError, match="unfinished"):
            open_checkpoint(opened)
        assert len(open_checkpoint(opened, force=True).tensors) == 15
    with pytest.raises(FormatError, match="unfinished"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("path", "marker"),
    [
        ("c/x.ckpt", "c/x-unfinished"),
        ("c/x-EMA.ckpt", "c/x-unfinished"),
        ("c/x.nemo", "c/x-unfinished"),
        ("c/x/", "c/x-unfinished"),
        ("c/mp_rank_00/x-last-EMA.ckpt", "c/x-last-unfinished"),
        ("c/tp_rank_00_pp_rank_001/x.ckpt", "c/x-unfinished"),
        ("c/mp_rank_00_fsdp_shard_00001/x.ckpt", "c/x-unfinished"),
        ("x.ckpt", os.path.abspath("x-unfinished")),
    ],
)
def test_where_the_marker_is(path: str, marker: str) -> None:
    assert marker_path(path) == marker


def test_virtual_pipeline(tmp_path: Path) -> None:
    """Each chunk is under a key of its own; layers are dealt out chunk by chunk."""
    config = {**expected_of(CASE)["config"], "num_layers": 4, "virtual_pipeline_model_parallel_size": 2}

    def change(folder: str, root: dict[str, Any]) -> None:
        root["hyper_parameters"] = {"cfg": config}
        state = {
            name.removeprefix("model."): value
            for name, value in root.pop("state_dict").items()
            if not name.endswith("_extra_state")
        }
        ends = ("embedding.", "output_layer.", "decoder.final_layernorm.")
        first_stage = folder.endswith("000")
        layers = {name: value for name, value in state.items() if not name.startswith(ends)}
        root["model0"] = state if first_stage else layers
        root["model1"] = layers if first_stage else state
        root["state_dict"] = {}

    checkpoint = open_checkpoint(checkpoints(tmp_path, change=change))
    whole = open_checkpoint(fixture_path(f"{CASE}/model.nemo"))
    assert checkpoint.layout == ParallelLayout(2, 2, 2)
    name = "decoder.layers.{}.mlp.linear_fc1.weight"
    for layer, source in enumerate((0, 1, 0, 1)):
        assert np.array_equal(
            checkpoint.tensors[name.format(layer)].numpy(), whole.tensors[name.format(source)].numpy()
        )


def other_step(folder: str, root: dict[str, Any]) -> None:
    if folder == "tp_rank_01_pp_rank_000":
        root["global_step"] = 5


def no_weights(folder: str, root: dict[str, Any]) -> None:
    if folder == "tp_rank_01_pp_rank_000":
        del root["state_dict"]


def chunked(folder: str, root: dict[str, Any]) -> None:
    root["model0"] = root["model1"] = root.pop("state_dict")
    root["state_dict"] = {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_step, "different steps.*global_step 6.*found 5"),
        (no_weights, "without weights"),
        (chunked, "contradict each other on the virtual pipeline"),
    ],
)
def test_bad_ranks_are_named(change: Change, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        open_checkpoint(checkpoints(tmp_path, change=change))


def test_missing_rank(tmp_path: Path) -> None:
    root = checkpoints(tmp_path)
    (root / "tp_rank_01_pp_rank_000" / NAME).unlink()
    with pytest.raises(FormatError, match="rank folder is missing.*tp_rank_01_pp_rank_000"):
        open_checkpoint(root)


def test_missing_configuration(tmp_path: Path) -> None:
    from anyckpt.errors import UsageError

    with pytest.raises(UsageError, match="--config"):
        open_checkpoint(checkpoints(tmp_path, config=False))


def test_name_that_no_rank_has(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        registry.read(checkpoints(tmp_path) / "other.ckpt")


def test_work_is_not_resumed_when_the_file_of_another_rank_changed(tmp_path: Path) -> None:
    """The path that is opened names one rank's file; all are read."""
    root = checkpoints(tmp_path / "checkpoints")
    first, *others = sorted(root.glob("*/*.ckpt"))
    anyckpt.convert(first, tmp_path / "out", to="dcp")
    assert anyckpt.convert(first, tmp_path / "out", to="dcp", resume=True).resumed_bytes
    os.utime(others[-1], ns=(1, 1))
    with pytest.raises(OutputError, match="already exists"):
        anyckpt.convert(first, tmp_path / "out", to="dcp", resume=True)
