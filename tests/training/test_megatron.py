"""Megatron-Core's sharded states, and its ``dist_checkpointing`` with our strategies: each loads the other's."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from tests.training.ranks import on_ranks

pytestmark = pytest.mark.peer

GPT = ("tests.training.megatron_gpt", "anyckpt.torch.megatron.strategies")


def gone_on(path: str, save: str, load: str) -> tuple[list[float], list[float], list[str], Any]:
    """The losses of a run, and of one that went on from a checkpoint; what was written, and the common state."""
    from megatron.core import dist_checkpointing
    from tests.training.megatron_gpt import Trained

    from anyckpt.torch.megatron import LoadStrategy, SaveStrategy

    run = Trained()
    run.train(2)
    Path(path).mkdir(exist_ok=True)
    barrier()
    strategy = SaveStrategy() if save == "ours" else None
    dist_checkpointing.save(run.state(), path, sharded_strategy=strategy, content_metadata={"kind": "tiny"})
    names = sorted(os.listdir(path))
    straight = run.train(2)
    other = Trained(seed=1)
    loaded = dist_checkpointing.load(
        other.state(), path, sharded_strategy=LoadStrategy() if load == "ours" else None, strict="raise_all"
    )
    other.put(loaded)
    return straight, other.train(2), names, {key: loaded[key] for key in ("iteration", "notes", "content_metadata")}


def torch_rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def barrier() -> None:
    import torch.distributed as dist

    dist.barrier()


@pytest.mark.parametrize(("save", "load"), [("ours", "theirs"), ("theirs", "ours"), ("ours", "ours")])
def test_a_run_goes_on_as_if_uninterrupted(save: str, load: str, tmp_path: Path) -> None:
    import anyckpt

    path = tmp_path / "iter_0000002"
    path.mkdir()
    for straight, again, names, common in on_ranks(2, gone_on, str(path), save, load, imported=GPT):
        assert again == straight
        assert common == {"iteration": 2, "notes": {"of": ["the run", (1, 2)]}, "content_metadata": {"kind": "tiny"}}
        if save == "ours":
            shards = ["__0_0.distcp", "__1_0.distcp"]
            assert names == [".anyckpt-manifest.json", ".metadata", *shards, "common.pt", "metadata.json"]
    assert os.listdir(tmp_path) == ["iter_0000002"]
    assert not anyckpt.verify(path).problems
    if save == "ours":
        common = path / "common.pt"
        common.write_bytes(common.read_bytes().replace(b"the run", b"the RUN"))
        assert anyckpt.verify(path).problems[0].where == "common.pt"


def saved(path: str, save: str) -> None:
    from megatron.core import dist_checkpointing
    from tests.training.megatron_gpt import Trained

    from anyckpt.torch.megatron import SaveStrategy

    run = Trained()
    run.train(2)
    Path(path).mkdir(exist_ok=True)
    barrier()
    dist_checkpointing.save(run.state(), path, sharded_strategy=SaveStrategy() if save == "ours" else None)


def loaded(path: str, load: str) -> dict[str, list[float]]:
    """Whole tensors of the model and of the optimizer, as one rank has them."""
    from megatron.core import dist_checkpointing
    from tests.training.megatron_gpt import Trained

    from anyckpt.torch.megatron import LoadStrategy

    other = Trained(seed=1)
    state = other.state()
    found = dist_checkpointing.load(state, path, sharded_strategy=LoadStrategy() if load == "ours" else None)
    other.put(found)
    tensors = {name: tensor.reshape(-1).tolist() for name, tensor in other.model.named_parameters()}
    for number, moments in other.optimizer.state_dict()["state"].items():
        tensors[f"exp_avg {number}"] = moments["exp_avg"].reshape(-1).tolist()
    return tensors


def test_another_tensor_parallelism_takes_its_slices(tmp_path: Path) -> None:
    found = {}
    for save in ("ours", "theirs"):
        path = str(tmp_path / save)
        on_ranks(2, saved, path, save, imported=GPT)
        for load in ("ours", "theirs"):
            (found[save, load],) = on_ranks(1, loaded, path, load, imported=GPT)
    assert all(one == found["theirs", "theirs"] for one in found.values())


def asynchronous(path: str, how: str) -> Any:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from tests.training.megatron_gpt import Trained

    from anyckpt.errors import OutputError
    from anyckpt.torch.megatron import LoadStrategy, SaveStrategy, rank_writing

    if how != "well" and torch_rank() == 1:

        def failing(*arguments: Any, **options: Any) -> Any:
            if how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OutputError("no space left for the output")

        rank_writing.write_files = failing
    run = Trained()
    run.train(2)
    Path(path).mkdir(exist_ok=True)
    barrier()
    request = dist_checkpointing.save(run.state(), path, sharded_strategy=SaveStrategy(), async_sharded_save=True)
    pickle.dumps((request.async_fn, request.async_fn_args, request.preload_fn))  # for a process that is there already
    queue = AsyncCallsQueue()
    queue.schedule_async_request(request)
    straight = run.train(2)  # changes what is being written
    try:
        queue.maybe_finalize_async_calls(blocking=True)
    except OutputError as error:
        barrier()
        return str(error), sorted(os.listdir(path)), os.listdir(os.path.dirname(path))
    other = Trained(seed=1)
    other.put(dist_checkpointing.load(other.state(), path, sharded_strategy=LoadStrategy()))
    return straight, other.train(2), sorted(os.listdir(path))


def test_an_asynchronous_save_has_what_was_there_when_it_began(tmp_path: Path) -> None:
    for straight, again, names in on_ranks(2, asynchronous, str(tmp_path / "x"), "well", imported=GPT):
        assert again == straight
        assert names[-1] == "metadata.json"


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("fails", "the checkpoint could not be written: no space left for the output"),
        ("is killed", "the process that writes the checkpoint ended before it was done"),
    ],
)
def test_what_becomes_of_a_process_that_writes_is_told_to_all_ranks(how: str, problem: str, tmp_path: Path) -> None:
    for told, names, beside in on_ranks(2, asynchronous, str(tmp_path / "x"), how, imported=GPT):
        assert problem in told
        assert names == ["common.pt"]
        assert beside == ["x"]


def of_one_structure(folder: str) -> list[Any]:
    """Saves that differ in contents, in an object's size, and in a tensor's shape; how each was planned and loaded."""
    import torch
    from megatron.core import dist_checkpointing as dist
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    from anyckpt.torch.megatron import LoadStrategy, SaveStrategy, strategies

    def state(value: float, width: int = 3, text: str = "ab") -> Any:
        rank = torch_rank()
        tensor = torch.full((2, width), value + rank)
        return {
            "w": ShardedTensor.from_rank_offsets("w", tensor, (0, rank, 2)),
            "o": ShardedObject("o", text, (2,), (rank,)),
        }

    plan, planned, found = strategies.files_of, [0], []

    def counted(*arguments: Any) -> Any:
        planned[0] += 1
        return plan(*arguments)

    strategies.files_of = counted
    strategy = SaveStrategy(use_cached_ckpt_structure=True)
    changes: list[Any] = [
        (1.0,),
        (2.0,),
        (3.0, 3, "cd"),
        (4.0, 3, "long" * 99),
        (5.0, 4, "long" * 99),
        (6.0, 4, "tall" * 99),
    ]
    for number, change in enumerate(changes):
        planned[0] = 0
        path = f"{folder}/{number}"
        Path(path).mkdir(exist_ok=True)
        barrier()
        dist.save(state(*change), path, strategy)
        loaded = dist.load(state(0.0, *change[1:]), path, LoadStrategy())
        theirs = dist.load(state(0.0, *change[1:]), path)
        assert torch.equal(loaded["w"], theirs["w"]) and loaded["o"] == theirs["o"]
        found.append((planned[0], loaded["w"][0].tolist(), loaded["o"]))
    return found


def test_a_constant_structure_is_planned_once(tmp_path: Path) -> None:
    for rank, found in enumerate(on_ranks(2, of_one_structure, str(tmp_path), imported=GPT)):
        assert [planned for planned, _, _ in found] == [1, 0, 0, 1, 1, 0]
        assert [values[0] - rank for _, values, _ in found] == [1, 2, 3, 4, 5, 6]
        assert [text for _, _, text in found] == ["ab", "ab", "cd", "long" * 99, "long" * 99, "tall" * 99]
    import anyckpt

    assert all(anyckpt.verify(tmp_path / str(number)).sound for number in range(6))


def in_persistent_process(folder: str) -> list[Any]:
    """Three saves through one process that stays, which cannot write during the second."""
    import resource

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import async_utils
    from tests.training.megatron_gpt import Trained, persistent_loop

    from anyckpt.errors import OutputError
    from anyckpt.torch.megatron import LoadStrategy, SaveStrategy

    async_utils.PersistentAsyncCaller.async_loop = staticmethod(persistent_loop)
    queue = async_utils.AsyncCallsQueue(persistent=True)
    run, found = Trained(), []
    for step in range(3):
        run.train(1)
        path = os.path.join(folder, str(step))
        os.mkdir(path)
        if step:
            limit = (1 << 12 if step == 1 else resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(queue.persistent_caller.process.pid, resource.RLIMIT_FSIZE, limit)
        request = dist_checkpointing.save(run.state(), path, sharded_strategy=SaveStrategy(), async_sharded_save=True)
        queue.schedule_async_request(request)
        straight = run.train(1)  # changes what is being written
        try:
            queue.maybe_finalize_async_calls(blocking=True)
        except OutputError as error:
            found.append((str(error), os.listdir(path), sorted(os.listdir(folder))))
            continue
        other = Trained(seed=1)
        other.put(dist_checkpointing.load(other.state(), path, sharded_strategy=LoadStrategy()))
        found.append(other.train(1) == straight)
    queue.close()
    return found


def test_a_process_that_stays_saves_again_after_it_could_not_write(tmp_path: Path) -> None:
    (found,) = on_ranks(1, in_persistent_process, str(tmp_path), imported=GPT)
    assert found[0] is True and found[2] is True
    problem, left, beside = found[1]
    assert "the checkpoint could not be written" in problem and "File too large" in problem
    assert left == ["common.pt"] and beside == ["0", "1"]


def failing_save(path: str) -> tuple[str, list[str]]:
    from megatron.core import dist_checkpointing
    from tests.training.megatron_gpt import Trained

    from anyckpt.errors import AnyckptError
    from anyckpt.torch.megatron import SaveStrategy, rank_writing

    if torch_rank() == 1:

        def failing(*arguments: Any, **options: Any) -> Any:
            raise OSError(28, "No space left on device")

        rank_writing.write_files = failing
    Path(path).mkdir(exist_ok=True)
    barrier()
    try:
        dist_checkpointing.save(Trained().state(), path, sharded_strategy=SaveStrategy())
    except (AnyckptError, OSError) as error:
        barrier()
        return str(error), sorted(os.listdir(path))
    return "", []


def test_a_rank_that_fails_stops_all(tmp_path: Path) -> None:
    for told, names in on_ranks(2, failing_save, str(tmp_path / "x"), imported=GPT):
        assert "No space left on device" in told
        assert names == ["common.pt"]


def in_parallel_on_data(path: str) -> Any:
    """Two replicas of the whole model: each box is written once."""
    from megatron.core import dist_checkpointing
    from tests.training.megatron_gpt import Trained

    from anyckpt.torch.megatron import LoadStrategy, SaveStrategy

    run = Trained(tensor_parallel=1)
    run.train(1)
    Path(path).mkdir(exist_ok=True)
    barrier()
    dist_checkpointing.save(run.state(), path, sharded_strategy=SaveStrategy())
    straight = run.train(1)
    again = []
    for strategy in (None, LoadStrategy()):
        other = Trained(seed=1, tensor_parallel=1)
        other.put(dist_checkpointing.load(other.state(), path, sharded_strategy=strategy))
        again.append(other.train(1))
    return straight, again, [name for name in os.listdir(path) if name.endswith(".distcp")]


def test_replicas_are_written_once(tmp_path: Path) -> None:
    for straight, again, files in on_ranks(2, in_parallel_on_data, str(tmp_path / "x"), imported=GPT):
        assert again == [straight, straight]
        assert files == ["__0_0.distcp"]


def wrapped(path: str) -> list[Any]:
    """Replicas on all ranks, which save and load their shares of the whole."""
    import torch
    from megatron.core import dist_checkpointing as dist
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
        FullyParallelSaveStrategyWrapper,
    )

    from anyckpt.torch.megatron import LoadStrategy, SaveStrategy

    def state(factor: float) -> dict[str, Any]:
        names = ("a", "b", "c")
        tensors = {name: torch.arange(5.0) * factor + ord(name) * factor for name in names}
        return {
            name: dist.ShardedTensor.from_rank_offsets(name, tensor, replica_id=torch_rank())
            for name, tensor in tensors.items()
        }

    Path(path).mkdir(exist_ok=True)
    barrier()
    dist.save(state(1.0), path, FullyParallelSaveStrategyWrapper(SaveStrategy()))
    found = dist.load(
        state(0.0),
        path,
        FullyParallelLoadStrategyWrapper(LoadStrategy(), exchange_algo="gather_object"),
        validate_access_integrity=False,
    )
    sizes = {name: os.path.getsize(os.path.join(path, name)) for name in os.listdir(path) if name.endswith(".distcp")}
    plain = dist.load_plain_tensors(path)
    metadata = dist.serialization.load_sharded_metadata(path, LoadStrategy())
    theirs = dist.serialization.load_sharded_metadata(path)
    assert {name: one.global_shape for name, one in metadata.items()} == {
        name: one.global_shape for name, one in theirs.items()
    }
    return [{name: found[name].tolist() for name in "abc"}, {n: plain[n].tolist() for n in "abc"}, sorted(sizes)]


def test_the_wrappers_of_fully_parallel_saving_and_loading_take_ours(tmp_path: Path) -> None:
    expected = {name: [ord(name) + index for index in map(float, range(5))] for name in "abc"}
    for found, plain, files in on_ranks(2, wrapped, str(tmp_path / "x"), imported=GPT):
        assert found == plain == expected
        assert files == ["__0_0.distcp", "__1_0.distcp"]


def refused(path: str) -> list[str]:
    import torch
    from megatron.core import dist_checkpointing as dist

    from anyckpt.errors import MappingError, UsageError
    from anyckpt.torch.megatron import LoadStrategy, SaveStrategy

    def saving(*parts: Any, key: str = "w") -> str:
        try:
            tensors = [dist.ShardedTensor.from_rank_offsets(key, torch.ones(2, 3), part) for part in parts]
            dist.save(dict(enumerate(tensors)), path, SaveStrategy(), validate_access_integrity=False)
        except (MappingError, UsageError) as error:
            return str(error)
        return ""

    Path(path).mkdir(exist_ok=True)
    barrier()
    rank = torch_rank()
    told = [saving((0, rank, 3)), saving((0, 0, 1)), saving((rank, 0, 2))]
    barrier()
    told += [saving((0, rank, 2))]
    asked = {
        "one": dist.ShardedTensor.from_rank_offsets("w", torch.zeros(4, 4)),
        "two": dist.ShardedTensor.from_rank_offsets("v", torch.zeros(2)),
        "three": dist.mapping.ShardedObject("o", None, (1,), (0,)),
    }
    try:
        dist.load(asked, path, LoadStrategy(), validate_access_integrity=False)
    except MappingError as error:
        told.append(str(error))
    return told


def test_shards_that_do_not_make_a_whole_are_refused_by_name(tmp_path: Path) -> None:
    for holes, twice, shapes, sound, asked in on_ranks(2, refused, str(tmp_path / "x"), imported=GPT):
        assert "'w'" in holes and "missing [4:6, 0:3]" in holes
        assert "'w'" in twice and "is there twice" in twice and "ranks 0, 1" in twice
        assert "'w'" in shapes and "[4, 3] on rank 0; [2, 6] on rank 1" in shapes
        assert sound == ""
        assert "2 that the checkpoint has not: o/shard_0_1, v" in asked
        assert "w: (4, 3) in the checkpoint, (4, 4) in the state" in asked


def fixtures_loaded(paths: list[str]) -> list[int]:
    """Everything in checkpoints of Megatron-Core's, as it and we load it whole; how much there was in each."""
    import torch
    from megatron.core import dist_checkpointing as dist

    from anyckpt.torch.megatron import LoadStrategy

    counts = []
    for path in paths:
        asked = dist.serialization.load_sharded_metadata(path)
        theirs = dist.load(dict(asked), path, validate_access_integrity=False)
        ours = dist.load(dict(asked), path, LoadStrategy(), validate_access_integrity=False)
        for name, value in theirs.items():
            is_tensor = isinstance(value, torch.Tensor)
            same = torch.equal(ours[name], value) if is_tensor else repr(ours[name]) == repr(value)
            assert same, (path, name)
        counts.append(len(asked))
    return counts


def flattened_loaded(path: str) -> list[str]:
    from megatron.core import dist_checkpointing as dist

    import anyckpt
    from anyckpt.torch.megatron import LoadStrategy

    asked = dist.serialization.load_sharded_metadata(path, LoadStrategy())
    found = dist.load(dict(asked), path, LoadStrategy(), validate_access_integrity=False)
    tensors = anyckpt.open(path).tensors
    for name, tensor in tensors.items():
        assert found[name].equal(tensor.torch()), name
    return sorted(name for name in asked if name in tensors)


def test_flattened_states_of_older_releases_load() -> None:
    (names,) = on_ranks(1, flattened_loaded, "tests/fixtures/mcore/torchdist_v015_w2_flat/ckpt", imported=GPT)
    assert names


def test_what_megatron_core_wrote_loads_as_it_loads_it() -> None:
    cases = sorted(Path("tests/fixtures/mcore").glob("gpt_*/ckpt/metadata.json"))
    (counts,) = on_ranks(1, fixtures_loaded, [str(one.parent) for one in cases], imported=GPT)
    assert len(counts) > 10 and min(counts) > 5


def saved_by_us(path: str, format: str) -> Any:
    from tests.training.megatron_gpt import Trained

    import anyckpt.torch

    run = Trained()
    run.train(2)
    anyckpt.torch.save(run.state(), path, format=format)
    return run.train(2)


def gone_on_with_theirs(path: str) -> Any:
    from megatron.core import dist_checkpointing
    from tests.training.megatron_gpt import Trained

    run = Trained(seed=1)
    loaded = dist_checkpointing.load(run.state(), path, strict="raise_all")
    run.put(loaded)
    return run.train(2), loaded["iteration"], loaded["notes"], sorted(loaded)


def gone_on_with_ours(path: str) -> Any:
    from tests.training.megatron_gpt import Trained

    import anyckpt.torch

    run = Trained(seed=1)
    state = run.state()
    anyckpt.torch.load(state, path, strictness="raise_all")
    run.put(state)
    return run.train(2), state["iteration"], state["notes"], sorted(state)


def test_states_of_megatron_core_are_loaded_as_they_are(tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    Path(path).mkdir()
    straight = on_ranks(2, gone_on, path, "theirs", "theirs", imported=GPT)
    again = on_ranks(2, gone_on_with_ours, path, imported=GPT)
    for (losses, *_), found in zip(straight, again, strict=True):
        names = ["content_metadata", "iteration", "model", "notes", "optimizer"]
        assert found == (losses, 2, {"of": ["the run", (1, 2)]}, names)


def test_states_of_megatron_core_are_saved_as_they_are(tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    straight = on_ranks(2, saved_by_us, path, "megatron-core", imported=GPT)
    again = on_ranks(2, gone_on_with_theirs, path, imported=GPT)
    for losses, found in zip(straight, again, strict=True):
        assert found == (losses, 2, {"of": ["the run", (1, 2)]}, ["iteration", "model", "notes", "optimizer"])


def strictly(path: str) -> list[tuple[Any, Any]]:
    """What Megatron-Core makes of each of its words with its strategy, and with ours."""
    import torch
    from megatron.core import dist_checkpointing as dist
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from anyckpt.torch.megatron import LoadStrategy, SaveStrategy

    def state(*names: str) -> dict[str, Any]:
        return {name: dist.ShardedTensor.from_rank_offsets(name, torch.zeros(2)) for name in names}

    def outcome(mode: StrictHandling, strategy: Any) -> Any:
        try:
            found = dist.load(state("there", "lacking"), path, strategy, strict=mode)
        except Exception as error:
            return "refused", "lacking" in str(error)
        found, missing, unexpected = found if isinstance(found, tuple) else (found, None, None)
        return {name: value.tolist() for name, value in found.items()}, missing, unexpected

    Path(path).mkdir(exist_ok=True)
    dist.save(state("there", "left"), path, SaveStrategy())
    found = []
    for mode in StrictHandling:
        if mode is StrictHandling.ASSUME_OK_UNEXPECTED:  # torch's error is none that can be caught as an Exception
            assert outcome(mode, LoadStrategy()) == ("refused", True)
        else:
            found.append((outcome(mode, None), outcome(mode, LoadStrategy())))
    return found


def test_each_strictness_of_megatron_core_does_the_same_with_ours(tmp_path: Path) -> None:
    (found,) = on_ranks(1, strictly, str(tmp_path / "x"), imported=GPT)
    assert all(theirs == ours for theirs, ours in found)
    assert [one for one, _ in found].count(("refused", True)) == 2
    assert ({"there": [0.0, 0.0]}, {"left"}, {"lacking"}) in [one for one, _ in found]
