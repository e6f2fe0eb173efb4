"""Runs of Lightning's trainer that are saved, and resumed from whatever checkpoint there is."""

from __future__ import annotations

import io
import os
import pickle
import signal
import warnings
from collections import Counter, OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import fixture_path

torch = pytest.importorskip("torch")
pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from tests.training.lightning_runs import STEPS, Net, batch_of, run, trainer  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt.torch import Settings  # noqa: E402
from anyckpt.torch.lightning import CheckpointIO  # noqa: E402
from anyckpt.torch.tensors import Stored  # noqa: E402
from anyckpt.torch.trainer_state import read_trainer_state, write_trainer_state  # noqa: E402

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

Pair = namedtuple("Pair", "left right")


class Mode(Enum):
    FAST = "fast"


@dataclass
class Facts:
    number: int
    tensor: Any


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run that nothing interrupts."""
    model, _ = run(tmp_path_factory.mktemp("whole"))
    assert len(set(model.losses.values())) == STEPS
    return dict(model.losses)


@pytest.mark.parametrize("saver", ["ours", "theirs"])
@pytest.mark.parametrize("loader", ["ours", "theirs"])
def test_a_resumed_run_goes_on_bit_for_bit(saver: str, loader: str, tmp_path: Path, whole: dict[int, float]) -> None:
    plugins = {"ours": [CheckpointIO()], "theirs": []}
    first, made = run(tmp_path, 3, plugins=plugins[saver])
    made.save_checkpoint(tmp_path / "a.ckpt")
    second, _ = run(tmp_path, resume=str(tmp_path / "a.ckpt"), plugins=plugins[loader])
    assert {**first.losses, **second.losses} == whole
    assert sorted(second.losses) == [3, 4, 5]


def test_what_is_saved_is_what_torch_would_save(tmp_path: Path) -> None:
    _, made = run(tmp_path, 2, model=Net(objects=Pair(timedelta(1), Mode.FAST)))
    state = made._checkpoint_connector.dump_checkpoint()
    write_trainer_state(state, tmp_path / "ours.ckpt")
    torch.save(state, tmp_path / "theirs.ckpt")
    ours, theirs = (torch.load(tmp_path / f"{name}.ckpt", weights_only=False) for name in ("ours", "theirs"))
    assert same(ours, theirs)
    assert ours["state_dict"]._metadata == theirs["state_dict"]._metadata
    assert ours["hyper_parameters"]["objects"] == (timedelta(1), Mode.FAST)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return bool(torch.equal(left, right) and left.dtype == right.dtype)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, Facts):
        return left.number == right.number and same(left.tensor, right.tensor)
    return bool(left == right)


def test_objects_of_any_class_are_saved(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    shared = torch.arange(6.0)
    state = {
        "config": omegaconf.OmegaConf.create({"a": 1, "b": "${a}"}),
        "type": omegaconf.DictConfig,
        "facts": Facts(3, shared),
        "again": [shared, Pair(1, (2, None))],
        "kinds": {"mode": Mode.FAST, "dtype": torch.bfloat16, "size": torch.Size([2]), "set": {1}, "bytes": b"x"},
        "ordered": OrderedDict(a=1),
        "empty": torch.empty(0, 3),
        "numbers": [True, 1, 2.5, 1j, "é"],
        "numpy": {"number": np.float64(2.5), "list": [np.int64(3)], "text": np.str_("a")},
        "others": [Counter("aab"), defaultdict(list, a=[1]), range(3), bytearray(b"x"), frozenset({2}), Path("/x")],
    }
    write_trainer_state(state, tmp_path / "a.ckpt")
    found = torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert same(found, state)
    write_trainer_state({"array": np.arange(6).reshape(2, 3)[:, ::2]}, tmp_path / "b.ckpt")
    assert np.array_equal(torch.load(tmp_path / "b.ckpt", weights_only=False)["array"], [[0, 2], [3, 5]])
    assert found["facts"].tensor.data_ptr() == found["again"][0].data_ptr()
    with pytest.raises(anyckpt.UsageError, match=r"a\.0 cannot be pickled"):
        Stored().value({"a": [lambda: None]})
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(anyckpt.UsageError, match="nested too deep"):
        Stored().value(endless)


def test_configurations_are_plain_data_in_files(tmp_path: Path) -> None:
    write_trainer_state({"hyper_parameters": {"cfg": Settings({"a": {"b": [1]}})}}, tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True) == {"hyper_parameters": {"cfg": {"a": {"b": [1]}}}}


def test_a_failed_save_leaves_the_last_one(tmp_path: Path) -> None:
    write_trainer_state({"a": torch.ones(2)}, tmp_path / "a.ckpt")
    before = (tmp_path / "a.ckpt").read_bytes()
    with pytest.raises(anyckpt.UsageError, match="a.ckpt"):
        CheckpointIO().save_checkpoint({"a": torch.ones(2, device="meta")}, tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").read_bytes() == before
    with pytest.raises(TypeError, match="storage_options"):
        CheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt", storage_options={})
    for plugin in (CheckpointIO(), CheckpointIO(in_flight=1)):
        with pytest.raises(anyckpt.OutputError, match="is a folder"):
            plugin.save_checkpoint({}, tmp_path)
    CheckpointIO().remove_checkpoint(tmp_path / "a.ckpt")
    assert os.listdir(tmp_path) == []
    CheckpointIO().remove_checkpoint(tmp_path / "a.ckpt")


def test_the_callback_of_lightning_keeps_what_it_keeps(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "c", monitor="loss", every_n_train_steps=1, save_top_k=2, save_last=True)
    run(tmp_path, plugins=[CheckpointIO()], callbacks=[callback], enable_checkpointing=True)
    names = {name for name in os.listdir(tmp_path / "c") if not name.startswith(".")}
    assert "last.ckpt" in names and len(names) == 3
    assert {name for name in os.listdir(tmp_path / "c") if name.startswith(".")} == {
        f".{name}.anyckpt-manifest.json" for name in names
    }
    assert not anyckpt.verify(tmp_path / "c" / "last.ckpt").problems


# -- while training goes on -----------------------------------------------------------------------------------------


def test_saves_go_on_beside_the_run(tmp_path: Path, whole: dict[int, float]) -> None:
    """The state may change when a save returns; what is removed meanwhile goes when its successor is whole."""
    callback = ModelCheckpoint(tmp_path / "c", monitor="loss", every_n_train_steps=1, save_top_k=2, save_last=True)
    plugin = CheckpointIO(in_flight=2)
    first, _ = run(tmp_path, 3, plugins=[plugin], callbacks=[callback], enable_checkpointing=True)
    names = {name for name in os.listdir(tmp_path / "c") if not name.startswith(".")}
    assert len(names) == 3 and "last.ckpt" in names
    second, _ = run(tmp_path, resume=str(tmp_path / "c" / "last.ckpt"), plugins=[plugin])
    assert {**first.losses, **second.losses} == whole
    with pytest.raises(anyckpt.UsageError, match="in_flight"):
        CheckpointIO(in_flight=-1)


def test_a_save_that_failed_is_told_and_nothing_is_removed(tmp_path: Path) -> None:
    plugin = CheckpointIO(in_flight=1)
    state = {"a": torch.ones(1 << 20)}
    plugin.save_checkpoint(state, tmp_path / "a.ckpt")
    state["a"].zero_()
    plugin.wait()
    assert torch.load(tmp_path / "a.ckpt")["a"].sum() == 1 << 20
    writer = plugin._background._writer
    assert writer is not None and writer.pid is not None
    os.kill(writer.pid, signal.SIGSTOP)
    plugin.save_checkpoint(state, tmp_path / "b.ckpt")
    plugin.remove_checkpoint(tmp_path / "a.ckpt")
    os.kill(writer.pid, signal.SIGKILL)
    with pytest.raises(anyckpt.OutputError, match="b.ckpt.*SIGKILL"):
        plugin.save_checkpoint(state, tmp_path / "c.ckpt")
    assert (tmp_path / "a.ckpt").exists() and not (tmp_path / "b.ckpt").exists()
    plugin.save_checkpoint(state, tmp_path / "c.ckpt")
    plugin.remove_checkpoint(tmp_path / "a.ckpt")
    plugin.teardown()
    assert (tmp_path / "c.ckpt").exists() and not (tmp_path / "a.ckpt").exists()
    with pytest.raises(anyckpt.FormatError):
        plugin.load_checkpoint(tmp_path / "nowhere.ckpt")


# -- from anything ------------------------------------------------------------------------------------------------


def test_a_sharded_directory_resumes_on_one_device(tmp_path: Path) -> None:
    """Weights and the optimizer's state are those that two ranks saved."""

    path = fixture_path("nemo/lightning_fsdp2/m-step=2.ckpt")
    model = Net()
    model.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    model.scale = torch.nn.Buffer(torch.zeros(3))
    made = trainer(tmp_path, 2, plugins=[CheckpointIO()])
    made.fit(model, ckpt_path=str(path))
    assert made.global_step == 2
    stored = anyckpt.open(path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[f"state_dict.{name}"].torch())
    state = made.optimizers[0].state_dict()
    assert state["param_groups"][0]["initial_lr"] == 0.01
    for number, (name, _) in enumerate(model.named_parameters()):
        assert torch.equal(state["state"][number]["exp_avg"], stored[f"optimizer_0.state.{name}.exp_avg"].torch())


def test_nemo_checkpoints_are_read_without_their_classes() -> None:
    folder = fixture_path("nemo/ptl_ckpt_nemo3_0_0")
    (path,) = folder.glob("*-last.ckpt")
    root = read_trainer_state(path)
    assert root["hyper_parameters"]["cfg"]["dim"] == 4  # OmegaConf's in the file, which torch refuses
    assert {key: tuple(value.shape) for key, value in root["state_dict"].items()} == {
        key: tuple(tensor.shape) for key, tensor in anyckpt.open(path).weights().items()
    }
    assert root["optimizer_states"][0]["state"][0]["exp_avg"].dtype == torch.float32
    assert root["global_step"] == 6 and "fit_loop" in root["loops"]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("nemo/nemo1_basic_v3_0_0/toy.nemo", None),
        ("nemo/speechlm2_v3_0_0/model", None),
        ("nemo/nemo2_llama_spm/model", None),
        ("families/llama/hf", None),
        ("nemo/nemo1_dist_tp1", None),
    ],
)
def test_weights_of_any_checkpoint_are_had(name: str, config: Any) -> None:
    path = fixture_path(name)
    if path.is_dir() and not any((path / mark).exists() for mark in ("config.json", "weights")):
        path = next(inner for inner in path.iterdir() if inner.suffix == ".nemo" or inner.is_dir())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        root = read_trainer_state(path)
    assert root["state_dict"] and root["optimizer_states"] == [] and root["lr_schedulers"] == []
    assert all(isinstance(value, torch.Tensor) for value in root["state_dict"].values() if value is not None)
    if "loops" not in root:
        assert any("starts at step 0" in str(warning.message) for warning in told)


def test_training_goes_on_from_weights_of_another_kind(tmp_path: Path) -> None:
    model = Net()
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(0.25)
    anyckpt.save({f"inner.{key}": value for key, value in model.state_dict().items()}, tmp_path / "w", to="safetensors")
    plugin = CheckpointIO(rename={"inner.": ""})
    resumed, made = run(tmp_path, 1, resume=str(tmp_path / "w"), plugins=[plugin])
    expected = ((model.net(batch_of(0)) - batch_of(0)) ** 2).mean().item()
    assert resumed.losses == {0: expected} and made.global_step == 1
    with pytest.raises(RuntimeError, match="Missing key"):
        run(tmp_path, 1, resume=str(tmp_path / "w"), plugins=[CheckpointIO()])
    with pytest.raises(anyckpt.FormatError, match="does not exist"):
        run(tmp_path, 1, resume=str(tmp_path / "nowhere"), plugins=[CheckpointIO()])


def test_a_model_of_nemo_2_is_trained_as_transformers_has_it(tmp_path: Path) -> None:
    import lightning.pytorch as pl
    from transformers import AutoModelForCausalLM

    path = fixture_path("nemo/nemo2_llama_spm/model")
    anyckpt.convert(path, tmp_path / "hf", to="hf")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModelForCausalLM.from_config(expected.config, dtype=expected.dtype)

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(1, 4, dtype=torch.int64))

    plugin = CheckpointIO(names="hf", rename={"": "model."})
    model, made = run(tmp_path, 1, model=Module(), resume=str(path), plugins=[plugin])
    assert made.global_step == 1
    for name, value in expected.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], value), name


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("where", ["callbacks", "hyper_parameters", "loops", "state_dict"])
def test_pickles_are_not_executed(where: str, tmp_path: Path) -> None:
    _, made = run(tmp_path, 1)
    state = made._checkpoint_connector.dump_checkpoint()
    state[where]["x"] = Evil(tmp_path / "executed")
    torch.save(state, tmp_path / "e.ckpt")
    if where == "hyper_parameters":
        run(tmp_path, 2, resume=str(tmp_path / "e.ckpt"), plugins=[CheckpointIO()])
    else:
        with pytest.raises(anyckpt.UsageError, match="only executing a pickle"):
            run(tmp_path, 2, resume=str(tmp_path / "e.ckpt"), plugins=[CheckpointIO()])
    (tmp_path / "p.ckpt").write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    with pytest.raises(anyckpt.AnyckptError):
        CheckpointIO().load_checkpoint(tmp_path / "p.ckpt")
    assert not (tmp_path / "executed").exists()


def test_a_trusted_file_may_hold_anything(tmp_path: Path) -> None:
    write_trainer_state({"facts": Facts(1, torch.ones(1))}, tmp_path / "t.ckpt")
    assert CheckpointIO().load_checkpoint(tmp_path / "t.ckpt", weights_only=False)["facts"].number == 1
    buffer = io.BytesIO((tmp_path / "t.ckpt").read_bytes())
    assert torch.load(buffer, weights_only=False)["facts"].number == 1
