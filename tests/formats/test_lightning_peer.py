"""Lightning loads, tests and resumes from what is written, as it does from its own checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
lightning = pytest.importorskip("lightning")

from tests.support import fixture_path, write_plan  # noqa: E402

from anyckpt.checkpoint import Checkpoint  # noqa: E402
from anyckpt.formats import registry  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.lightning import FORMAT  # noqa: E402

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

RUN = Path(__file__).with_name("lightning_sharded_run.py")


class Model(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch: Any, index: int) -> Any:
        return self.layer(batch).pow(2).mean()

    def test_step(self, batch: Any, index: int) -> None:
        self.log("loss", self.layer(batch).pow(2).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]


DATA = torch.utils.data.DataLoader(torch.arange(32.0).reshape(8, 4) / 32, batch_size=2)


def trainer(steps: int) -> Any:
    return lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def train(path: Path | None, steps: int) -> tuple[Any, Any]:
    torch.manual_seed(1)
    module, run = Model(4), trainer(steps)
    run.fit(module, DATA, ckpt_path=path)
    return module, run


def written(checkpoint: Checkpoint, path: Path, **options: Any) -> Path:
    assert FORMAT.plan is not None
    return write_plan(FORMAT.plan(checkpoint, WriteOptions(**options)), path)


def bare(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, tensors=checkpoint.weights(), model_prefix="", state_prefixes=(), objects={})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "step=6.ckpt"
    _, run = train(None, 6)
    run.save_checkpoint(path)
    return path


def test_training_goes_on_as_from_the_original(original: Path, tmp_path: Path) -> None:
    ours = written(registry.read(original), tmp_path / "ours.ckpt")
    expected, _ = train(original, 10)
    found, run = train(ours, 10)
    assert run.global_step == 10
    assert torch.equal(found.layer.weight, expected.layer.weight)
    assert found.optimizers().optimizer.state_dict()["state"][0]["step"] == 10
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 10


def test_weights_alone_start_a_new_optimizer_at_the_same_step(original: Path, tmp_path: Path) -> None:
    ours = written(bare(registry.read(original)), tmp_path / "ours.ckpt")
    module, run = train(ours, 8)
    assert run.global_step == 8
    assert module.optimizers().optimizer.state_dict()["state"][0]["step"] == 2  # two of the eight were its own
    loaded = Model.load_from_checkpoint(ours)
    assert loaded.hparams["width"] == 4
    assert torch.equal(loaded.layer.weight, Model.load_from_checkpoint(original).layer.weight)
    results = [trainer(1).test(Model(4), DATA, ckpt_path=path, verbose=False) for path in (original, ours)]
    assert results[0] == results[1]


def test_weights_from_elsewhere_start_at_step_0(original: Path, tmp_path: Path) -> None:
    weights = registry.read(original).weights()
    ours = written(Checkpoint("elsewhere", "safetensors", weights), tmp_path / "ours.ckpt")
    assert torch.equal(
        Model.load_from_checkpoint(ours, width=4).layer.weight, Model.load_from_checkpoint(original).layer.weight
    )
    module, run = train(ours, 3)
    assert run.global_step == 3
    assert not torch.equal(module.layer.weight, Model.load_from_checkpoint(original).layer.weight)


def test_the_file_loads_with_mmap_and_weights_only(original: Path, tmp_path: Path) -> None:
    ours = written(registry.read(original), tmp_path / "ours.ckpt")
    found = torch.load(ours, weights_only=True, mmap=True)
    expected = torch.load(original, weights_only=True)
    assert list(found) == list(expected)
    assert found["loops"] == expected["loops"]
    assert found["hyper_parameters"] == expected["hyper_parameters"]
    assert str(found["optimizer_states"]) == str(expected["optimizer_states"])
    assert found["lr_schedulers"] == expected["lr_schedulers"]


def test_a_sharded_directory_is_resumed_from(tmp_path: Path) -> None:
    source = fixture_path("nemo/lightning_fsdp2/m-step=2.ckpt")
    ours = written(registry.read(source), tmp_path / "ours.ckpt", sharded=True, ranks=2)
    command = [sys.executable, "-W", "ignore", str(RUN), str(ours), str(tmp_path / "found.json"), "fit"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["step_at_start"], found["steps"], found["step_at_end"]) == (2, [2.0], 4)
    weights = {name: tensor.numpy().tolist() for name, tensor in registry.read(source).weights().items()}
    assert found["validate"] == weights
    assert found["fit_start"] == weights


def test_weights_alone_in_a_sharded_directory_are_validated(tmp_path: Path) -> None:
    source = fixture_path("nemo/lightning_fsdp2_full/m-step=2.ckpt")
    ours = written(bare(registry.read(source)), tmp_path / "ours.ckpt", sharded=True)
    command = [sys.executable, "-W", "ignore", str(RUN), str(ours), str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["validate"] == {name: t.numpy().tolist() for name, t in registry.read(source).weights().items()}
