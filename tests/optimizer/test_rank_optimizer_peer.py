"""Optimizer state that PyTorch trained on NeMo's shards, and what Apex's distributed Adam pickles."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from anyckpt.errors import AnyckptError  # noqa: E402
from anyckpt.operations.steps.joining import open_checkpoint  # noqa: E402
from anyckpt.tensor import LazyTensor  # noqa: E402
from tests.optimizer.rank_files import NAME, config_of, ranks_of  # noqa: E402
from tests.optimizer.test_rank_optimizer import state_of  # noqa: E402

pytestmark = pytest.mark.peer

CASE = "nemo/nemo1_mp_tp2_pp2"
STEPS = 3


def as_torch(tensor: LazyTensor) -> Any:
    return torch.frombuffer(bytearray(tensor.numpy().tobytes()), dtype=torch.bfloat16).reshape(tensor.shape)


def trained(weights: list[Any], groups: list[list[int]]) -> tuple[Any, list[Any]]:
    """AdamW on fp32 copies, with gradients that are functions of each element alone; steps like a wrapped optimizer."""
    masters = [weight.float() for weight in weights]
    decays = (0.1, 0.0)
    optimizer = torch.optim.AdamW(
        [{"params": [masters[i] for i in own], "weight_decay": decays[n]} for n, own in enumerate(groups)],
        lr=1e-2, foreach=False,
    )  # fmt: skip
    for _ in range(STEPS):
        for master in masters:
            master.grad = master * 0.5 + 0.25
        optimizer.step()
    return optimizer, masters


def split(named: Mapping[str, Any]) -> list[list[int]]:
    ranks = [[i for i, t in enumerate(named.values()) if (t.ndim > 1) == matrices] for matrices in (True, False)]
    return [own for own in ranks if own]


def saved(root: Path, optimizer: Callable[[dict[str, Any]], Any]) -> Path:
    """Rank files that torch itself writes."""
    for folder, state in ranks_of(CASE).items():
        named = {name: as_torch(value) for name, value in state.items() if isinstance(value, LazyTensor)}
        contents = {
            "epoch": 1, "global_step": STEPS, "pytorch-lightning_version": "2.4.0", "state_dict": named,
            "optimizer_states": [optimizer(named)], "lr_schedulers": [], "hyper_parameters": {"cfg": config_of(CASE)},
        }  # fmt: skip
        (root / folder).mkdir(parents=True)
        torch.save(contents, root / folder / NAME)
    return root


def check(root: Path) -> None:
    """The state is that of one optimizer of the whole model."""
    checkpoint = open_checkpoint(root)
    state = state_of(checkpoint)
    for name, tensor in checkpoint.tensors.items():
        optimizer, (master,) = trained([as_torch(tensor)], [[0], []] if tensor.ndim > 1 else [[], [0]])
        own = optimizer.state_dict()["state"][0]
        expected = {"master": master, "exp_avg": own["exp_avg"], "exp_avg_sq": own["exp_avg_sq"]}
        for slot, value in expected.items():
            assert torch.equal(torch.from_numpy(state.slots[slot][name].numpy()), value), (slot, name)
    assert state.step == STEPS


def wrapped(named: dict[str, Any]) -> dict[str, Any]:
    """As ``MainParamsOptimizerWrapper.state_dict`` does it."""
    groups = split(named)
    optimizer, masters = trained(list(named.values()), groups)
    return {
        "optimizer": optimizer.state_dict(),
        "fp32_from_fp16_params": [[masters[i] for i in own] for own in groups],
    }


def test_main_params_of_every_rank(tmp_path: Path) -> None:
    check(saved(tmp_path / "c", wrapped))


# -- Apex's buckets --------------------------------------------------------------------------------------------


class DistributedFusedAdam:
    """The classes that Apex pickles, with the attributes that they have there."""

    @dataclass
    class ParameterFragment:
        param_group_id: int
        param_id: int
        bucket_id: int
        param_range: tuple[int, int]
        bucket_range: tuple[int, int]
        in_local_shard: bool = False
        shard_range: tuple[int, int] | None = None
        shard_bucket_range: tuple[int, int] | None = None
        shard_param_range: tuple[int, int] | None = None

    class StateBucket:
        def __init__(self, size: int, shards: Mapping[str, Any]) -> None:
            self.bucket_size, self.shard_size = size, size // WORLD
            self.dtype, self.grad_sync_dtype = torch.float32, torch.bfloat16
            self.fragments: list[Any] = []
            self.params_shard = shards.get("param")
            self.param_remainders_shard = shards.get("remainder")
            self.exp_avg_shard, self.exp_avg_sq_shard = shards["exp_avg"], shards["exp_avg_sq"]


WORLD = 2
BUCKET = 256
MODULE = "apex.contrib.optimizers.distributed_fused_adam"


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its module, as far as pickling needs one."""
    module = types.ModuleType(MODULE)
    module.DistributedFusedAdam = DistributedFusedAdam  # type: ignore[attr-defined]
    for kind in (DistributedFusedAdam, DistributedFusedAdam.ParameterFragment, DistributedFusedAdam.StateBucket):
        monkeypatch.setattr(kind, "__module__", MODULE)
    for number in range(1, 5):
        name = ".".join(MODULE.split(".")[:number])
        monkeypatch.setitem(sys.modules, name, module if name == MODULE else types.ModuleType(name))
    yield


def remainders(master: Any) -> Any:
    """What Apex keeps of an fp32 weight beside its bfloat16 one: the low half, of which the high half was rounded."""
    return master.view(torch.int16).reshape(-1, 2)[:, 0].clone()


def by_rank(named: dict[str, Any], *, remainder: bool = False) -> list[dict[str, Any]]:
    """What each data-parallel rank would save: parameters fill buckets one after another, each from 64 on."""
    groups = split(named)
    optimizer, masters = trained(list(named.values()), groups)
    packed = optimizer.state_dict()
    slots: dict[str, list[Any]] = {"exp_avg": [], "exp_avg_sq": [], "remainder" if remainder else "param": []}
    at, fragments = 0, {}
    index = 0
    flat: dict[str, list[tuple[int, Any]]] = {slot: [] for slot in slots}
    for group, own in enumerate(groups):
        for place, number in enumerate(own):
            master, state = masters[number].flatten(), packed["state"][index]
            values = {"exp_avg": state["exp_avg"].flatten(), "exp_avg_sq": state["exp_avg_sq"].flatten()}
            values["remainder" if remainder else "param"] = remainders(master) if remainder else master
            fragments[index] = []
            first = 0
            while first < master.numel():
                bucket, start = divmod(at + first, BUCKET)
                count = min(BUCKET - start, master.numel() - first)
                fragments[index].append(
                    DistributedFusedAdam.ParameterFragment(
                        group, place, bucket, (first, first + count), (start, start + count)
                    )
                )
                first += count
            for slot, value in values.items():
                flat[slot].append((at, value))
            at += -(-master.numel() // 64) * 64
            index += 1
    total = -(-at // BUCKET)
    ranks = []
    for rank in range(WORLD):
        buckets = []
        for bucket in range(total):
            shards = {}
            for slot, placed in flat.items():
                whole = torch.full((total * BUCKET,), 99, dtype=placed[0][1].dtype)
                for start, value in placed:
                    whole[start : start + value.numel()] = value
                width = BUCKET // WORLD
                shards[slot] = whole[bucket * BUCKET + rank * width :][:width].clone()
            buckets.append(DistributedFusedAdam.StateBucket(BUCKET, shards))
        state = {number: {"fragments": own} for number, own in fragments.items()}
        groups_ = [{k: v for k, v in group.items() if k != "step"} for group in packed["param_groups"]]
        ranks.append({"state": {**state, "buckets": buckets, "step": STEPS}, "param_groups": groups_})
    return ranks


def gathered(named: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The first format: every rank's state as bytes."""
    states = []
    for rank in by_rank(named, **options):
        buffer = io.BytesIO()
        torch.save(rank, buffer)
        states.append(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
    return {"gathered_states": states}


def test_buckets_that_were_gathered(tmp_path: Path, apex: None) -> None:
    check(saved(tmp_path / "c", gathered))


def test_fp32_weights_from_bfloat16_ones_and_remainders(tmp_path: Path, apex: None) -> None:
    """There the model has the weights after training; their fp32 copies are theirs and the low halves."""
    root = tmp_path / "c"
    for folder, state in ranks_of(CASE).items():
        named = {name: as_torch(value) for name, value in state.items() if isinstance(value, LazyTensor)}
        optimizer_states = [gathered(named, remainder=True)]
        _, masters = trained(list(named.values()), split(named))
        halves = dict(zip(named, [rounded_half_up(master) for master in masters], strict=True))
        contents = {
            "global_step": STEPS, "pytorch-lightning_version": "2.4.0", "state_dict": halves,
            "optimizer_states": optimizer_states, "hyper_parameters": {"cfg": config_of(CASE)},
        }  # fmt: skip
        (root / folder).mkdir(parents=True)
        torch.save(contents, root / folder / NAME)
    found = state_of(open_checkpoint(root)).slots["master"]
    before = open_checkpoint(saved(tmp_path / "before", wrapped))
    expected = state_of(before).slots["master"]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def rounded_half_up(master: Any) -> Any:
    """A bfloat16 weight as Apex leaves it beside a remainder: the high half, plus one if the low is negative."""
    halves = master.view(torch.int16).reshape(*master.shape, 2)
    return (halves[..., 1] + (halves[..., 0] < 0)).to(torch.int16).view(torch.bfloat16)


def test_one_rank_of_several_is_refused(tmp_path: Path, apex: None) -> None:
    root = saved(tmp_path / "c", lambda named: by_rank(named)[0])
    with pytest.raises(AnyckptError, match=r"bucket 0 .* is not whole.*256 elements.*128 of 1 ranks.*--optimizer drop"):
        state_of(open_checkpoint(root))


def test_fragments_that_leave_gaps_are_refused(tmp_path: Path, apex: None) -> None:
    def damaged(named: dict[str, Any]) -> dict[str, Any]:
        ranks = by_rank(named)
        for rank in ranks:
            rank["state"][0]["fragments"][0].param_range = (1, 257)
        states = []
        for rank in ranks:
            buffer = io.BytesIO()
            torch.save(rank, buffer)
            states.append(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
        return {"gathered_states": states}

    with pytest.raises(AnyckptError, match="fragments of parameter 0 do not cover it.*--optimizer drop"):
        state_of(open_checkpoint(saved(tmp_path / "c", damaged)))
