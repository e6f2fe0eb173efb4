"""Lightning's trainer on several ranks: what one layout saves, every other resumes from."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning.pytorch")

from tests.training.ranks import on_ranks  # noqa: E402

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

IMPORTED = ("tests.training.lightning_runs", "anyckpt.torch.lightning.strategies")
DEEP_STEPS = 5


def of_ranks(strategy: str, sharded: bool) -> dict[str, Any]:
    """Options of a trainer on the ranks that there are."""
    from lightning.pytorch.strategies import DDPStrategy

    from anyckpt.torch.lightning import CheckpointIO, ModelParallelStrategy

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", TORCHELASTIC_RUN_ID="x", GROUP_RANK="0")
    world = int(os.environ["WORLD_SIZE"])
    chosen: Any = DDPStrategy(process_group_backend="gloo")
    if strategy != "ddp":
        data = 1 if strategy == "tp" else world
        chosen = ModelParallelStrategy(data, world // data, sharded, process_group_backend="gloo")
    return {"devices": world, "strategy": chosen, "plugins": [CheckpointIO()], "use_distributed_sampler": False}


def trained(folder: str, strategy: str, steps: int, resume: str | None, save: str | None, sharded: bool = True) -> Any:
    """Losses by step on this rank."""
    warnings.simplefilter("ignore")
    from tests.training.lightning_runs import Net, run, sharded_net

    model = Net() if strategy == "ddp" else sharded_net(strategy)
    model, made = run(folder, steps, resume=resume, model=model, **of_ranks(strategy, sharded))
    if save is not None:
        made.save_checkpoint(save)
    return model.losses


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    from tests.training.lightning_runs import run

    return dict(run(tmp_path_factory.mktemp("whole"), DEEP_STEPS)[0].losses)


def test_ddp_resumes_bit_for_bit(tmp_path: Path, whole: dict[int, float]) -> None:
    path = str(tmp_path / "a.ckpt")
    first = on_ranks(2, trained, str(tmp_path), "ddp", 2, None, path, imported=IMPORTED)
    second = on_ranks(2, trained, str(tmp_path), "ddp", DEEP_STEPS, path, None, imported=IMPORTED)
    assert [{**one, **two} for one, two in zip(first, second, strict=True)] == [whole, whole]
    from tests.training.lightning_runs import run

    alone = run(tmp_path, DEEP_STEPS, resume=path)[0].losses  # plain Lightning, on one device
    assert {**first[0], **alone} == whole


@pytest.mark.parametrize("strategy", ["fsdp", "tp"])
@pytest.mark.parametrize("sharded", [True, False])
def test_sharded_runs_resume_at_other_sizes(
    strategy: str, sharded: bool, tmp_path: Path, whole: dict[int, float]
) -> None:
    from tests.training.lightning_runs import run

    from anyckpt.torch.lightning import CheckpointIO

    path = str(tmp_path / "a.ckpt")
    first = on_ranks(2, trained, str(tmp_path), strategy, 2, None, path, sharded, imported=IMPORTED)
    assert os.path.isdir(path) == sharded
    alone = run(tmp_path, DEEP_STEPS, resume=path, plugins=[CheckpointIO()])[0].losses
    assert {**first[0], **alone} == pytest.approx(whole, rel=1e-5)
    again = on_ranks(2, trained, str(tmp_path), strategy, DEEP_STEPS, path, None, imported=IMPORTED)
    straight = on_ranks(2, trained, str(tmp_path), strategy, DEEP_STEPS, None, None, imported=IMPORTED)
    assert {**first[0], **again[0]} == straight[0]


def saved_over(folder: str) -> Any:
    """A directory saved twice, of which the second save fails on one rank; then plain Lightning resumes from it."""
    warnings.simplefilter("ignore")
    from lightning.pytorch.strategies import ModelParallelStrategy as Plain
    from tests.training.lightning_runs import run, sharded_net
    from torch.distributed import get_rank

    from anyckpt.torch.dcp import Writer

    path = f"{folder}/a.ckpt"
    first, made = run(folder, 2, model=sharded_net("fsdp"), **of_ranks("fsdp", True))
    for _ in range(2):
        made.save_checkpoint(path)
    write, told = Writer.write_data, ""

    def broken(self: Any, *rest: Any) -> Any:
        if get_rank() == 1:
            raise OSError(28, "No space left on device")
        return write(self, *rest)

    Writer.write_data = broken  # type: ignore[method-assign]
    try:
        made.save_checkpoint(path)
    except BaseException as error:
        told = f"{error!r}"
    options = of_ranks("fsdp", True)
    options["strategy"], options["plugins"] = Plain(2, 1, process_group_backend="gloo"), []
    second, _ = run(folder, DEEP_STEPS, model=sharded_net("fsdp"), resume=path, **options)
    return {**first.losses, **second.losses}, told, sorted(os.listdir(folder))


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path: Path, whole: dict[int, float]) -> None:
    import anyckpt

    for losses, told, names in on_ranks(2, saved_over, str(tmp_path), imported=IMPORTED):
        assert losses == pytest.approx(whole, rel=1e-5)
        assert "No space left" in told
        assert names == ["a.ckpt"]
    assert anyckpt.verify(tmp_path / "a.ckpt").sound
    assert sorted(os.listdir(tmp_path / "a.ckpt"))[:2] == [".anyckpt-manifest.json", ".metadata"]
    assert anyckpt.open(tmp_path / "a.ckpt").format == "lightning"


def test_one_device_resumes_on_two(tmp_path: Path, whole: dict[int, float]) -> None:
    """A file, a folder of weights alone, and another strategy's directory."""
    from tests.training.lightning_runs import Net, run

    import anyckpt
    from anyckpt.torch.lightning import CheckpointIO

    path = str(tmp_path / "a.ckpt")
    model, made = run(tmp_path, 2, plugins=[CheckpointIO()])
    made.save_checkpoint(path)
    for strategy in ("fsdp", "tp"):
        found = on_ranks(2, trained, str(tmp_path), strategy, DEEP_STEPS, path, None, imported=IMPORTED)
        assert {**model.losses, **found[0]} == pytest.approx(whole, rel=1e-5)
    fresh = Net()
    fresh.setup("fit")
    anyckpt.save(fresh.state_dict(), tmp_path / "w.safetensors", to="safetensors")
    found = on_ranks(2, trained, str(tmp_path), "fsdp", 1, str(tmp_path / "w.safetensors"), None, imported=IMPORTED)
    assert found[0] == pytest.approx({0: whole[0]}, rel=1e-5)


def saved_beside(folder: str) -> Any:
    """A run whose directories are written by processes beside the ranks; plain Lightning goes on from the last."""
    warnings.simplefilter("ignore")
    from lightning.pytorch.strategies import ModelParallelStrategy as Plain
    from tests.training.lightning_runs import run, sharded_net

    from anyckpt.torch.lightning import EMA, CheckpointIO, ModelCheckpoint

    callback = ModelCheckpoint(f"{folder}/c", monitor="loss", every_n_train_steps=1, save_top_k=1, save_last=True)
    options = of_ranks("fsdp", True)
    options["plugins"] = [CheckpointIO(in_flight=2)]
    first, _ = run(
        folder, 3, model=sharded_net("fsdp"), callbacks=[callback, EMA(0.5)], enable_checkpointing=True, **options
    )
    names = sorted(os.listdir(f"{folder}/c"))
    options = of_ranks("fsdp", True)
    options["strategy"], options["plugins"] = Plain(2, 1, process_group_backend="gloo"), []
    second, _ = run(folder, DEEP_STEPS, model=sharded_net("fsdp"), resume=f"{folder}/c/last.ckpt", **options)
    return {**first.losses, **second.losses}, names


def test_directories_are_saved_beside_the_run(tmp_path: Path, whole: dict[int, float]) -> None:
    import anyckpt

    for losses, names in on_ranks(2, saved_beside, str(tmp_path), imported=IMPORTED):
        assert losses == pytest.approx(whole, rel=1e-5)
        best = names[1].removesuffix(".ckpt")
        assert best.startswith("epoch")
        assert names == [f"{best}-EMA.ckpt", f"{best}.ckpt", "last-EMA.ckpt", "last.ckpt"]
    for name in names:
        assert anyckpt.verify(tmp_path / "c" / name).sound
        assert anyckpt.open(tmp_path / "c" / name).format == "lightning"


def lost_beside(folder: str) -> Any:
    """A save whose writer is killed on one rank, and another one after it."""
    warnings.simplefilter("ignore")
    import signal

    from tests.training.lightning_runs import run, sharded_net
    from torch.distributed import get_rank

    from anyckpt.errors import OutputError
    from anyckpt.torch.lightning import CheckpointIO

    plugin = CheckpointIO(in_flight=1)
    _, made = run(folder, 1, model=sharded_net("fsdp"), **{**of_ranks("fsdp", True), "plugins": [plugin]})
    made.save_checkpoint(f"{folder}/a.ckpt")
    plugin.wait()
    writer = plugin.together()._writer.pid or 0
    if get_rank() == 1:
        os.kill(writer, signal.SIGSTOP)
    made.save_checkpoint(f"{folder}/b.ckpt")
    if get_rank() == 1:
        os.kill(writer, signal.SIGKILL)
    made.strategy.remove_checkpoint(f"{folder}/a.ckpt")
    try:
        made.save_checkpoint(f"{folder}/c.ckpt")
    except OutputError as error:
        told = str(error)
    made.save_checkpoint(f"{folder}/c.ckpt")
    kept = os.path.exists(f"{folder}/a.ckpt")
    made.strategy.remove_checkpoint(f"{folder}/a.ckpt")
    plugin.teardown()
    return told, kept


def test_a_directory_that_was_not_saved_is_told_and_nothing_is_removed(tmp_path: Path) -> None:
    for told, kept in on_ranks(2, lost_beside, str(tmp_path), imported=IMPORTED):
        assert kept
        assert "b.ckpt" in told and "SIGKILL" in told and "(on rank 1)" in told
    assert os.listdir(tmp_path) == ["c.ckpt"]
