"""What the callback saves, exports, averages and removes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.support import fixture_path

torch = pytest.importorskip("torch")
pytest.importorskip("lightning.pytorch")

from tests.training.lightning_runs import STEPS, Net, run, trainer  # noqa: E402
from tests.training.ranks import on_ranks  # noqa: E402
from tests.training.test_lightning_ranks import IMPORTED, of_ranks  # noqa: E402
from torch import nn  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt.torch import Restorable, Retention, latest, register_class  # noqa: E402
from anyckpt.torch.lightning import EMA, CheckpointIO, ModelCheckpoint  # noqa: E402

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

NAME = "toy--{loss:.4f}-{step}-{consumed_samples}"


@register_class
class Model(Restorable, Net):
    """A run's model that is exported."""

    def __init__(self, cfg: Any = None, trainer: Any = None) -> None:
        super().__init__(cfg, trainer)


def shown(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def saver(folder: Path, **options: Any) -> ModelCheckpoint:
    fixed = {"monitor": "loss", "every_n_train_steps": 1, "save_top_k": 2, "save_last": True}
    return ModelCheckpoint(folder / "c", NAME, **{**fixed, **options})


def with_callbacks(folder: Path, *callbacks: Any, steps: int = STEPS, resume: Any = None, model: Any = None) -> Any:
    return run(
        folder,
        steps,
        resume=resume,
        model=model,
        callbacks=list(callbacks),
        plugins=[CheckpointIO()],
        enable_checkpointing=True,
    )


def test_names_are_nemo_s_and_the_last_is_found(tmp_path: Path) -> None:
    model, _ = with_callbacks(tmp_path, saver(tmp_path), steps=3)
    names = shown(tmp_path / "c")
    last = f"toy--loss={model.losses[2]:.4f}-step=3-consumed_samples=12.0-last.ckpt"
    assert last in names and len(names) == 3
    assert all(name.startswith("toy--loss=") and "-consumed_samples=" in name for name in names)
    callback = saver(tmp_path)
    second, made = with_callbacks(tmp_path, callback, resume="last")
    assert sorted(second.losses) == [3, 4, 5] and made.global_step == STEPS
    assert callback.consumed_samples == 24
    assert callback.last_model_path.endswith("step=6-consumed_samples=24.0-last.ckpt")
    assert anyckpt.open(callback.last_model_path).training.consumed_samples == 24


def test_an_interrupted_save_is_marked_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointIO, "save_checkpoint", broken)
        with pytest.raises(BaseException):  # noqa: B017
            with_callbacks(tmp_path, saver(tmp_path), steps=1)
    (marker,) = [name for name in shown(tmp_path / "c") if name.endswith("-unfinished")]
    checkpoint = tmp_path / "c" / f"{marker.removesuffix('-unfinished')}.ckpt"
    assert checkpoint.read_bytes() == b"half"
    (tmp_path / "c" / "other.ckpt").write_bytes(b"whole")
    for left in (".x.ckpt.anyckpt-new", ".x.ckpt.anyckpt-new-old", ".y.ckpt.anyckpt-partial"):
        (tmp_path / "c" / left).mkdir()
        (tmp_path / "c" / left / "file").write_bytes(b"half")
    with_callbacks(tmp_path, saver(tmp_path, every_n_train_steps=100), steps=1)
    assert not checkpoint.exists() and (tmp_path / "c" / "other.ckpt").exists()
    assert not [name for name in os.listdir(tmp_path / "c") if "unfinished" in name or name.startswith((".x", ".y"))]


def test_models_are_exported_at_the_end_and_always(tmp_path: Path) -> None:
    callback = saver(tmp_path, prefix="toy", always_save_hf=True)
    model, _ = with_callbacks(tmp_path, callback, model=Model({"a": 1}))
    assert {"toy.nemo", "toy-hf"} <= set(shown(tmp_path / "c"))
    again = Restorable.restore_from(tmp_path / "c" / "toy.nemo")
    folder = Model.from_pretrained(tmp_path / "c" / "toy-hf")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value) and torch.equal(folder.state_dict()[name], value)
    with pytest.raises(anyckpt.UsageError, match="Net has no save_to"):
        with_callbacks(tmp_path, saver(tmp_path, always_save_nemo=True))
    with_callbacks(tmp_path / "plain", saver(tmp_path / "plain"), steps=1)  # nothing asked, nothing exported


def test_earlier_exports_are_kept_if_asked(tmp_path: Path) -> None:
    for steps in (1, 2, 3):
        callback = saver(tmp_path, prefix="toy", keep_backups=True, save_hf_on_train_end=True, save_top_k=0)
        with_callbacks(tmp_path, callback, model=Model(), steps=steps)
    exports = [name for name in shown(tmp_path / "c") if name.endswith((".nemo", "-hf"))]
    assert exports == ["toy-hf", "toy-v1-hf", "toy-v1.nemo", "toy-v2-hf", "toy-v2.nemo", "toy.nemo"]


class Worse(Model):
    """Is best at its second step."""

    def training_step(self, batch: Any, index: int) -> Any:
        loss = super().training_step(batch, index)
        self.log("score", torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 6.0][self.trainer.global_step]))
        return loss


class Foreign(Worse):
    """Exports itself by a method that takes a path only, as NeMo's models do."""

    def save_to(self, save_path: Any) -> None:  # type: ignore[override]
        super().save_to(save_path)


@pytest.mark.parametrize("kind", [Worse, Foreign])
def test_the_best_is_exported(kind: Any, tmp_path: Path) -> None:
    register_class(kind)
    callback = saver(tmp_path, monitor="score", save_best_model=True, always_save_nemo=True, save_top_k=1)
    model, _ = with_callbacks(tmp_path, callback, model=kind())
    best = anyckpt.open(callback.best_model_path).state_dict("torch")
    found = kind.restore_from(tmp_path / "c" / "model.nemo").state_dict()
    assert all(torch.equal(found[name], value) for name, value in best.items())
    assert not torch.equal(model.state_dict()["net.0.weight"], best["net.0.weight"])


@pytest.mark.parametrize("in_flight", [0, 2])
def test_rules_keep_checkpoints(in_flight: int, tmp_path: Path) -> None:
    rules = Retention(last=1, best=1, forever_every=3)
    callback = ModelCheckpoint(
        tmp_path / "c", "{step}", monitor="score", every_n_train_steps=1, keep=rules, save_best_model=True
    )
    register_class(Worse)
    run(
        tmp_path,
        model=Worse(),
        callbacks=[EMA(0.5), callback],
        plugins=[CheckpointIO(in_flight=in_flight)],
        enable_checkpointing=True,
    )
    kept = [f"step={step}{end}.ckpt" for step in (1, 2, 3, 6) for end in ("", "-EMA")]  # the first, the best, ...
    names = set(shown(tmp_path / "c"))
    assert names == {*kept, "latest", "model.nemo"}
    assert os.readlink(tmp_path / "c" / "latest") == "step=6.ckpt"
    assert latest(tmp_path / "c") == str(tmp_path / "c" / "step=6.ckpt")
    best = anyckpt.open(tmp_path / "c" / "step=2-EMA.ckpt").state_dict("torch")
    found = anyckpt.open(tmp_path / "c" / "model.nemo").state_dict("torch")
    assert all(torch.equal(found[name], value) for name, value in best.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"save_top_k": 2}, "save_top_k"),
        ({"save_last": True}, "save_last"),
        ({"keep": Retention(best=1)}, "metric"),
        ({"keep": Retention(best=1), "monitor": "x", "mode": "max"}, "orders"),
        ({"save_best_model": True}, "best"),
    ],
)
def test_rules_that_contradict_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(anyckpt.UsageError, match=said):
        ModelCheckpoint(**{"keep": Retention(last=1), **options})


# -- averages -----------------------------------------------------------------------------------------------------


class Watched(Net):
    """Keeps what its weights were after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []
        self.validated: list[Any] = []
        self.tied = nn.Linear(2, 2)
        self.tied_again = self.tied

    def on_train_start(self) -> None:
        self.seen.append({name: value.detach().clone() for name, value in self.named_parameters()})

    def on_train_batch_end(self, *rest: Any) -> None:
        self.on_train_start()

    def validation_step(self, batch: Any, index: int) -> None:
        self.validated.append(self.net[0].weight.detach().clone())

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


def averages(seen: list[dict[str, Any]], decay: float) -> dict[str, Any]:
    found = {name: value.clone() for name, value in seen[0].items()}
    for weights in seen[1:]:
        for name, value in weights.items():
            found[name] = found[name] * decay + value * (1 - decay)
    return found


def test_weights_are_averaged_saved_beside_and_resumed(tmp_path: Path) -> None:
    callback = saver(tmp_path, save_top_k=-1)
    model, _ = with_callbacks(tmp_path, EMA(0.5), callback, model=Watched())
    expected = averages(model.seen, 0.5)
    second = callback.last_model_path.replace("-last.ckpt", "-last-EMA.ckpt")
    found = torch.load(second, weights_only=True)
    plain = torch.load(callback.last_model_path, weights_only=True)
    for name, value in expected.items():
        assert torch.allclose(found["state_dict"][name], value, atol=1e-6), name
        assert torch.equal(plain["state_dict"][name], model.state_dict()[name])
    assert torch.equal(found["state_dict"]["tied_again.weight"], found["state_dict"]["tied.weight"])
    assert found.keys() == plain.keys()
    (state,) = found["optimizer_states"]
    assert list(state) == ["opt", "ema", "current_step", "decay", "every_n_steps"]
    assert [tuple(value.shape) for value in state["ema"]] == [tuple(value.shape) for value in model.parameters()]
    fresh = Watched()
    fresh.load_state_dict(found["state_dict"])
    names = [name for name in shown(tmp_path / "c") if name.endswith(".ckpt")]
    assert sum(name.endswith("-EMA.ckpt") for name in names) * 2 == len(names)

    middle = next(str(tmp_path / "c" / name) for name in names if "-step=3-" in name and "EMA" not in name)
    again = saver(tmp_path / "again")
    with_callbacks(tmp_path, EMA(0.5), again, model=Watched(), resume=middle)
    resumed = torch.load(again.last_model_path.replace("-last.ckpt", "-last-EMA.ckpt"), weights_only=True)
    assert all(torch.equal(resumed["state_dict"][name], found["state_dict"][name]) for name in expected)
    assert len([name for name in shown(tmp_path / "again" / "c") if name.endswith("-EMA.ckpt")]) == 3  # others went


@pytest.mark.parametrize("original", [False, True])
def test_averages_are_validated(original: bool, tmp_path: Path) -> None:
    model, _ = with_callbacks(tmp_path, EMA(0.5, validate_original_weights=original), model=Watched())
    expected = model.seen[-1] if original else averages(model.seen, 0.5)
    assert torch.allclose(model.validated[-1], expected["net.0.weight"], atol=1e-6)
    assert torch.equal(model.state_dict()["net.0.weight"], model.seen[-1]["net.0.weight"])


def test_averages_of_nemo_are_taken_over(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fixture_path("nemo/ptl_ckpt_ema_nemo3_0_0"), tmp_path / "theirs"))
    (path,) = folder.glob("*-last.ckpt")
    stored = anyckpt.open(path)
    averaged = anyckpt.open(str(path).replace("-last.ckpt", "-last-EMA.ckpt")).weights()
    model = Net()
    model.net = nn.Module()
    for name, tensor in stored.weights().items():
        *modules, last = name.split(".")
        at: nn.Module = model
        for module in modules:
            if not hasattr(at, module):
                at.add_module(module, nn.Module())
            at = getattr(at, module)
        at.register_parameter(last, nn.Parameter(torch.zeros(tensor.shape)))
    callback, counting = EMA(0.5), ModelCheckpoint(tmp_path / "c", NAME)
    made = trainer(tmp_path, 6, callbacks=[callback, counting], enable_checkpointing=True, plugins=[CheckpointIO()])
    model.configure_optimizers = lambda: torch.optim.AdamW(model.parameters())
    model.on_train_start = lambda: None
    made.fit(model, ckpt_path=str(path))
    assert counting.consumed_samples == 12
    loaded = callback._averages or callback._loaded
    assert loaded.keys() == averaged.keys()
    assert all(torch.equal(loaded[name].cpu(), tensor.torch()) for name, tensor in averaged.items())


@pytest.mark.parametrize("wrong", [{"decay": 2}, {"decay": 0.5, "every_n_steps": 0}])
def test_impossible_averages_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(anyckpt.UsageError, match="averaged"):
        EMA(**wrong)


def sharded_export(folder: str) -> Any:
    from tests.training.lightning_runs import sharded_net

    class Both(Restorable, type(sharded_net("fsdp"))):  # type: ignore[misc]
        def __init__(self, cfg: Any = None) -> None:
            super().__init__(cfg)

    callback = ModelCheckpoint(Path(folder) / "c", every_n_train_steps=1, save_hf_on_train_end=True)
    run(folder, 2, model=Both(), callbacks=[EMA(0.5), callback], enable_checkpointing=True, **of_ranks("fsdp", True))
    return callback.best_model_path


def test_sharded_runs_are_exported_whole(tmp_path: Path) -> None:
    paths = on_ranks(2, sharded_export, str(tmp_path), imported=IMPORTED)
    second = paths[0].replace(".ckpt", "-EMA.ckpt")
    stored = anyckpt.open(second).state_dict("torch")
    for path in ("model.nemo", "model-hf"):
        found = anyckpt.open(tmp_path / "c" / path).state_dict("torch")
        assert found.keys() == stored.keys()
        assert all(torch.equal(found[name], value) for name, value in stored.items())
    assert not torch.equal(anyckpt.open(paths[0]).state_dict("torch")["net.0.weight"], stored["net.0.weight"])
