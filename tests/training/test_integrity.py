"""Properties of what all ranks have together: exact covers pass, anything else is named, and shares are even."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

pytestmark = pytest.mark.peer

Box = tuple[tuple[int, ...], tuple[int, ...]]


@st.composite
def divided(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that cover it once: cut in two again and again."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        number = draw(st.integers(0, len(boxes) - 1))
        offset, sizes = boxes[number]
        axis = draw(st.integers(0, len(shape) - 1))
        if sizes[axis] < 2:
            continue
        at = draw(st.integers(1, sizes[axis] - 1))
        first = (*sizes[:axis], at, *sizes[axis + 1 :])
        second = (*sizes[:axis], sizes[axis] - at, *sizes[axis + 1 :])
        begin = (*offset[:axis], offset[axis] + at, *offset[axis + 1 :])
        boxes[number : number + 1] = [(offset, first), (begin, second)]
    return shape, boxes


def records(shape: tuple[int, ...], boxes: list[tuple[Box, int]], world: int, replica: int | None) -> list[Any]:
    from anyckpt.dtypes import dtype
    from anyckpt.torch.integrity import RankRecord

    pieces: list[list[Any]] = [[] for _ in range(world)]
    for (offset, sizes), rank in boxes:
        pieces[rank].append(("w", dtype("float32"), shape, offset, sizes, replica))
    return [RankRecord(tuple(own), {}, {}) for own in pieces]


@given(divided(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_what_covers_a_tensor_once_is_taken(found: Any, world: int, random: Any) -> None:
    from anyckpt.torch.integrity import survey
    from anyckpt.torch.whole import shared_out

    shape, boxes = found
    held = [(box, rank) for box in boxes for rank in random.sample(range(world), random.randint(1, world))]
    everything = survey(records(shape, held, world, None))
    share = shared_out(everything)
    assert sum(math.prod(box.shape) for box in share["w"]) == math.prod(shape)
    owners = {(box.start, box.shape): box.rank for box in share["w"]}
    assert all(((offset, sizes), rank) in held for (offset, sizes), rank in owners.items())
    alone = shared_out(everything, parallel=False)
    assert all(box.rank == min(rank for at, rank in held if at == (box.start, box.shape)) for box in alone["w"])


@given(divided(), st.randoms(use_true_random=False))
def test_what_does_not_is_refused(found: Any, random: Any) -> None:
    from anyckpt.errors import MappingError
    from anyckpt.torch.integrity import survey

    shape, boxes = found
    number = random.randrange(len(boxes))
    less = [(box, 0) for box in boxes[:number] + boxes[number + 1 :]]
    if less:
        with pytest.raises(MappingError, match="'w': is not written exactly once.*missing"):
            survey(records(shape, less, 1, None))
    twice = [(box, 0) for box in boxes] + [(boxes[number], 1)]
    with pytest.raises(MappingError, match="'w': is there twice.*ranks 0, 1"):
        survey(records(shape, twice, 2, 0))
    if len(boxes) > 1:
        with pytest.raises(MappingError, match="'w': is not written exactly once.*twice"):
            survey(records(shape, [*((box, 0) for box in boxes), (((0,) * len(shape), shape), 1)], 2, None))


def test_sources_and_tensors_of_training_say_what_they_are() -> None:
    import anyckpt.torch
    from anyckpt.storage.source import ByteSource
    from anyckpt.tensor import LazyTensor

    for module in pkgutil.walk_packages(anyckpt.torch.__path__, "anyckpt.torch."):
        if "lightning" not in module.name and "megatron" not in module.name:  # which take seconds to import
            importlib.import_module(module.name)
    for kind in (LazyTensor, ByteSource):
        below = [each for each in kind.__subclasses__() if each.__module__.startswith("anyckpt.torch.")]
        assert below
        silent = kind.__dict__.get("identity")
        assert [each.__name__ for each in below if not inspect.isabstract(each) and each.identity is silent] == []


class Together:
    """Ranks that are threads of one process."""

    def __init__(self, world: int) -> None:
        self.size = world
        self._barrier = threading.Barrier(world)
        self._sent: dict[tuple[int, int], Any] = {}

    def run(self, action: Any) -> list[Any]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: action(Rank(self, rank)), range(self.size)))


class Rank:
    def __init__(self, together: Together, rank: int) -> None:
        self.rank = rank
        self.size = together.size
        self._together = together

    def transfer(self, outgoing: Any, expected: Any) -> Any:
        self._together._sent.update({(self.rank, target): data for target, data in outgoing.items()})
        self._together._barrier.wait(20)
        arrived = {source: self._together._sent[source, self.rank] for source in expected}
        assert {source: data.nbytes for source, data in arrived.items()} == expected
        return arrived


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    from anyckpt.engine import blocks
    from anyckpt.torch import settling

    for module in (blocks, settling):
        monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    return 64


@given(
    divided(), st.integers(1, 3), st.sampled_from(["float32", "bfloat16", "uint8"]), st.randoms(use_true_random=False)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_block_has_one_owner_who_has_its_bytes(
    small_blocks: int, found: Any, world: int, kind: str, random: Any
) -> None:
    import numpy as np
    import torch

    from anyckpt.containers.safetensors import safetensors_parts
    from anyckpt.dtypes import dtype
    from anyckpt.engine.blocks import cut_all
    from anyckpt.engine.plan import OutputFile, Plan
    from anyckpt.torch.integrity import survey
    from anyckpt.torch.live import LivePiece, LiveState
    from anyckpt.torch.settling import settled
    from anyckpt.torch.whole import shared_out, whole_of

    shape, boxes = found
    count = math.prod(shape)
    full = torch.arange(count * dtype(kind).itemsize, dtype=torch.uint8).view(getattr(torch, kind)).reshape(shape)
    held = [(box, random.randrange(world)) for box in boxes]
    everything = survey(records(shape, held, world, None))
    everything.tensors["w"] = (dtype(kind), *everything.tensors["w"][1:])

    def rank_of(rank: Rank) -> Any:
        pieces = []
        for (offset, sizes), owner in held:
            if owner == rank.rank:
                inside = full
                for axis, (begin, length) in enumerate(zip(offset, sizes, strict=True)):
                    inside = inside.narrow(axis, begin, length)
                pieces.append(LivePiece("w", dtype(kind), shape, offset, inside.clone()))
        whole = whole_of(everything, shared_out(everything), LiveState(pieces), rank.rank, "key")
        plan = Plan("sample", (OutputFile("", safetensors_parts(whole.tensors)),))
        return settled(plan, rank, "key")  # type: ignore[arg-type]

    plans = Together(world).run(rank_of)
    data = full.reshape(-1).view(torch.uint8).numpy().tobytes()
    seen = 0
    for blocks in zip(*(cut_all(plan.files, owned=True).blocks[0] for plan in plans), strict=True):
        assert len({(block.offset, block.nbytes, block.owner) for block in blocks}) == 1
        for piece in blocks[0].pieces:
            if piece.part == 0:
                continue
            tensor = plans[(blocks[0].owner or 1) - 1].files[0].parts[1].tensor
            out = np.empty((piece.stop - piece.start) // tensor.dtype.itemsize, dtype=tensor.dtype.raw)
            tensor.fill(piece.start // tensor.dtype.itemsize, out)
            assert out.tobytes() == data[piece.start : piece.stop]
            seen += piece.stop - piece.start
    assert seen == len(data)
