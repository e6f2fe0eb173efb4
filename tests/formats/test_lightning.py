"""Lightning checkpoints that Lightning and NeMo wrote: weights, training state, and configuration as data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.formats.torch_archives import archive, tensor
from tests.support import (
    assert_tensors_equal_expected,
    expected_of,
    file_bytes,
    fixture_path,
    sha256_of,
    write_plan,
)

from anyckpt.checkpoint import Checkpoint, TrainingState
from anyckpt.containers.torch_file import read_torch
from anyckpt.engine.plan import Plan
from anyckpt.errors import FormatError
from anyckpt.formats import registry
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.lightning import FORMAT
from anyckpt.formats.registry import look_at
from anyckpt.pickling import Record
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import from_array

NEMO = ("ptl_ckpt_nemo2_5_3", "ptl_ckpt_nemo3_0_0", "ptl_ckpt_ema_nemo3_0_0")
FILES = [(case, name) for case in NEMO for name, facts in expected_of(f"nemo/{case}")["ckpts"].items() if facts["kept"]]
SHARDED = ("lightning_fsdp2", "lightning_tp")
ADAMW = "legacy/ptl_adamw/model--val_loss=0.5-epoch=3.ckpt"


def opened(relative: str) -> Checkpoint:
    path = fixture_path(relative)
    assert registry.detect(look_at(path)).name == "lightning"
    return registry.read(path)


def planned(checkpoint: Checkpoint, **options: Any) -> Plan:
    assert FORMAT.plan is not None
    return FORMAT.plan(checkpoint, WriteOptions(**options))


def saved(plan: Plan) -> Any:
    """The one object of a planned file."""
    assert len(plan.files) == 1
    return read_torch(MemorySource(file_bytes(plan.files[0]))).root


def bare(checkpoint: Checkpoint) -> Checkpoint:
    """What a conversion without ``--optimizer keep`` hands to a writer."""
    return replace(checkpoint, tensors=checkpoint.weights(), model_prefix="", state_prefixes=(), objects={})


def shape_of(value: Any) -> Any:
    """A loaded object with tensors as the fixtures describe them."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return (
            f"Tensor({', '.join(map(str, value.shape))}{',' if len(value.shape) == 1 else ''}):torch.{value.dtype.name}"
        )
    if isinstance(value, dict):
        return {str(key): shape_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [shape_of(item) for item in value]
    return value


@pytest.mark.parametrize(("case", "name"), FILES)
def test_weights_and_state_of_nemo(case: str, name: str) -> None:
    checkpoint = opened(f"nemo/{case}/{name}")
    facts = expected_of(f"nemo/{case}")["ckpts"][name]
    assert_tensors_equal_expected(checkpoint.weights(), facts["tensors"])
    skeleton = facts["skeleton"]
    assert checkpoint.format_version == skeleton["pytorch-lightning_version"]
    assert checkpoint.training == TrainingState(
        step=skeleton["global_step"],
        consumed_samples=12,
        epoch=skeleton["epoch"],
        has_optimizer=True,
        has_scheduler=True,
    )
    assert checkpoint.config["dim"] == 4
    assert checkpoint.config["target"] == "tests.core.toy_models.ToyTrain"
    assert checkpoint.config_kind is None  # not a Megatron model
    root = saved(planned(checkpoint))
    for key in ("optimizer_states", "lr_schedulers", "callbacks", "state_dict"):
        assert shape_of(root[key]) == skeleton[key], key
    assert root["loops"]["predict_loop"] == skeleton["loops"]["predict_loop"]
    assert set(root) == set(skeleton)
    assert list(root)[:4] == ["epoch", "global_step", "pytorch-lightning_version", "state_dict"]


@pytest.mark.parametrize(("case", "name"), FILES)
def test_hyper_parameters_are_written_back_as_they_were(case: str, name: str) -> None:
    checkpoint = opened(f"nemo/{case}/{name}")
    for source in (checkpoint, bare(checkpoint)):
        plan = planned(source)
        record = saved(plan)["hyper_parameters"]
        assert isinstance(record, Record)
        assert record.path == "omegaconf.dictconfig.DictConfig"
        assert "omegaconf.dictconfig.DictConfig" in plan.notes[0]


def test_averaged_weights_of_ema_are_among_the_state() -> None:
    name = "toy--val_loss=1.0282-step=6-consumed_samples=12.0-last-EMA.ckpt"
    checkpoint = opened(f"nemo/ptl_ckpt_ema_nemo3_0_0/{name}")
    assert checkpoint.tensors["optimizer_states.0.ema.0"].shape == (4, 4)
    assert checkpoint.objects["optimizer_states.0.decay"] == 0.5
    assert "optimizer_states.0.ema.0" not in checkpoint.weights()


def test_an_optimizer_is_kept_under_its_numbers() -> None:
    checkpoint = opened(ADAMW)
    expected = expected_of("legacy/ptl_adamw")
    assert_tensors_equal_expected(checkpoint.weights(), expected["tensors"])
    for number, name in enumerate(expected["optimizer_index"]):
        for slot in ("exp_avg", "exp_avg_sq"):
            tensor = checkpoint.tensors[f"optimizer_states.0.state.{number}.{slot}"]
            assert sha256_of(tensor) == expected["optimizer"][name][slot]["sha256"]
        step = checkpoint.tensors[f"optimizer_states.0.state.{number}.step"]
        assert step.numpy() == expected["optimizer"][name]["step"]
    assert (checkpoint.training.epoch, checkpoint.training.step) == (3, 5)
    assert checkpoint.config == {"hidden": 4, "lr": 0.001}


def test_a_full_file_of_fsdp() -> None:
    checkpoint = opened("nemo/lightning_fsdp2_full/m-step=2.ckpt")
    assert_tensors_equal_expected(checkpoint.weights(), expected_of("nemo/lightning_fsdp2_full")["tensors"])


@pytest.mark.parametrize("case", SHARDED)
def test_a_sharded_directory(case: str) -> None:
    checkpoint = opened(f"nemo/{case}/m-step=2.ckpt")
    expected = expected_of(f"nemo/{case}")
    assert_tensors_equal_expected(checkpoint.weights(), expected["full_tensors"])
    stored = {name: facts["size"] for name, facts in expected["dcp"].items() if isinstance(facts, dict)}
    assert {name: list(checkpoint.tensors[name].shape) for name in stored} == stored
    assert set(expected["dcp"]) - set(stored) <= set(checkpoint.objects)
    assert set(expected["meta_pt"]) <= {name.split(".")[0] for name in checkpoint.objects}
    assert checkpoint.training == TrainingState(step=2, epoch=0, has_optimizer=True, has_scheduler=True)
    assert checkpoint.config == {"dim": 8}
    assert checkpoint.objects["optimizer_0.param_groups.0.betas"] == (0.9, 0.999)
    assert checkpoint.objects["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 2


@pytest.mark.parametrize("case", SHARDED)
def test_a_sharded_directory_becomes_the_file_that_lightning_writes(case: str) -> None:
    """FSDP saved the same run as one file too; there the optimizer's parameters have numbers instead of names."""
    ours = saved(planned(opened(f"nemo/{case}/m-step=2.ckpt")))
    theirs = opened("nemo/lightning_fsdp2_full/m-step=2.ckpt")
    expected = saved(planned(theirs))
    assert set(ours) == set(expected)
    groups = ours["optimizer_states"][0]["param_groups"]
    assert groups[0]["params"] == [0, 1, 2, 3]
    assert set(groups[0]) == set(expected["optimizer_states"][0]["param_groups"][0])
    for number, slots in expected["optimizer_states"][0]["state"].items():
        for slot, value in slots.items():
            assert ours["optimizer_states"][0]["state"][number][slot].shape == value.shape
    if case == "lightning_fsdp2":
        for number, slots in expected["optimizer_states"][0]["state"].items():
            for slot, tensor in slots.items():
                assert sha256_of(ours["optimizer_states"][0]["state"][number][slot]) == sha256_of(tensor)


def test_a_file_becomes_a_sharded_directory(tmp_path: Path) -> None:
    source = opened(ADAMW)
    plan = planned(source, sharded=True, ranks=2)
    assert plan.files[-1].path == "meta.pt"
    assert plan.files[-1].stage == 2
    assert "numbers them" in plan.ignored["optimizer_states"]
    path = write_plan(plan, tmp_path / "a.ckpt")
    again = registry.read(path)
    assert again.format == "lightning"
    assert {name: sha256_of(t) for name, t in again.weights().items()} == {
        name: sha256_of(t) for name, t in source.weights().items()
    }
    assert (again.training.step, again.config) == (5, {"hidden": 4, "lr": 0.001})
    assert not [name for name in again.tensors if name.startswith("optimizer")]


@pytest.mark.parametrize("case", SHARDED)
def test_a_sharded_directory_keeps_its_optimizer(case: str, tmp_path: Path) -> None:
    source = opened(f"nemo/{case}/m-step=2.ckpt")
    again = registry.read(write_plan(planned(source, sharded=True), tmp_path / "a.ckpt"))
    assert {name: sha256_of(t) for name, t in again.tensors.items()} == {
        name: sha256_of(t) for name, t in source.tensors.items()
    }
    assert dict(again.objects) == dict(source.objects)
    dropped = registry.read(write_plan(planned(bare(source), sharded=True), tmp_path / "b.ckpt"))
    assert not dropped.training.has_optimizer
    assert dropped.training.step == 2
    assert dropped.objects["loops"] == source.objects["loops"]


def test_other_weights_get_what_lightning_needs() -> None:
    weights = {"layer.weight": from_array(np.ones((2, 2), np.float32))}
    source = Checkpoint(
        "a",
        "nemo",
        weights,
        objects={"note": 1},
        config={"num_layers": 1, "hidden_size": 2, "num_attention_heads": 1},
        config_kind="nemo1",
        training=TrainingState(step=70, epoch=2),
    )
    plan = planned(source)
    root = saved(plan)
    assert (root["epoch"], root["global_step"], root["pytorch-lightning_version"]) == (2, 70, "2.0.0")
    assert (root["optimizer_states"], root["lr_schedulers"], root["callbacks"]) == ([], [], {})
    assert root["hyper_parameters"] == {"cfg": source.config}
    assert list(root["state_dict"]) == ["layer.weight"]
    assert "loops" not in root
    assert set(plan.ignored) == {"note"}
    assert plan.notes == ()


def test_a_megatron_configuration_is_recognised() -> None:
    config = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    data = archive(
        {
            "pytorch-lightning_version": "2.4.0",
            "state_dict": {"model.w": tensor()},
            "hyper_parameters": {"cfg": config, "trainer": None},
        }
    )
    read = FORMAT.read(_location(data))
    assert (read.config, read.config_kind) == (config, "nemo1")


def _location(data: bytes, _kept: list[Any] = []) -> Any:  # noqa: B006
    import tempfile

    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    path = Path(folder.name) / "a.ckpt"
    path.write_bytes(data)
    return look_at(path)


def test_what_only_holds_the_words_is_a_torch_file() -> None:
    location = _location(archive({"inner": {"pytorch-lightning_version": "2", "state_dict": {"w": tensor()}}}))
    assert FORMAT.read(location).format == "torch"
    assert registry.detect(_location(archive({"state_dict": {"w": tensor()}}))).name == "torch"


def test_halves_of_a_checkpoint_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="without weights"):
        FORMAT.read(_location(archive({"pytorch-lightning_version": "2.4.0", "epoch": 1})))
    source = fixture_path("nemo/lightning_fsdp2/m-step=2.ckpt")
    whole = {path.name: path.read_bytes() for path in source.iterdir()}

    def without(name: str, folder: str) -> Path:
        (tmp_path / folder).mkdir()
        for file, data in whole.items():
            if file != name:
                (tmp_path / folder / file).write_bytes(data)
        return tmp_path / folder

    with pytest.raises(FormatError, match=r"no \.metadata"):
        registry.read(without(".metadata", "a"))
    with pytest.raises(FormatError):
        registry.read(without("__1_0.distcp", "b"))
    assert registry.detect(look_at(without("meta.pt", "c"))).name == "dcp"
    damaged = without("", "d")
    (damaged / "meta.pt").write_bytes(whole["meta.pt"][:-50])
    with pytest.raises(FormatError, match=r"meta\.pt"):
        registry.read(damaged)
    (damaged / "meta.pt").write_bytes(archive([1]))
    with pytest.raises(FormatError, match="not a dictionary"):
        registry.read(damaged)


def test_a_truncated_file_is_reported_by_the_torch_format(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(fixture_path(ADAMW).read_bytes()[:-10])
    with pytest.raises(FormatError, match="truncated"):
        registry.read(path)


def test_extra_states_stay_beside_the_weights(tmp_path: Path) -> None:
    data = archive(
        {
            "pytorch-lightning_version": "2.4.0",
            "state_dict": {"w": tensor(), "layer._extra_state": {"recipe": 1}},
            "optimizer_states": tensor(11, (), ()),
        }
    )
    checkpoint = FORMAT.read(_location(data))
    assert checkpoint.objects["state_dict.layer._extra_state"] == {"recipe": 1}
    root = saved(planned(checkpoint))
    assert root["state_dict"]["layer._extra_state"] == {"recipe": 1}
    assert root["optimizer_states"] == []
    again = registry.read(write_plan(planned(checkpoint, sharded=True), tmp_path / "a.ckpt"))
    assert again.objects["state_dict.layer._extra_state"] == {"recipe": 1}
