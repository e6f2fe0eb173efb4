"""Where parameters lie in flat buffers, against Megatron-Core's own class that fills them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
buffers = pytest.importorskip("megatron.core.distributed.param_and_grad_buffer")

from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402

from anyckpt.errors import MappingError  # noqa: E402
from anyckpt.optimizer.buffers import Rule, place, rules, starts  # noqa: E402
from anyckpt.optimizer.placing import Buffer, placed  # noqa: E402
from anyckpt.optimizer.rank_parameters import Parameter  # noqa: E402
from anyckpt.tensor import Constant, from_array  # noqa: E402

pytestmark = pytest.mark.peer

FLOAT32 = from_array(np.zeros(1, np.float32)).dtype
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
SIZES = st.lists(st.one_of(st.integers(1, 300), st.sampled_from([64, 128, 192])), min_size=1, max_size=9)
SHARED = st.sampled_from([None, "first", "last"])
BUCKETS = st.one_of(st.none(), st.integers(1, 700))
SETTINGS = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(buffers, "log_on_each_pipeline_stage", lambda *args, **options: None)
    yield


def names_of(sizes: list[int], shared: str | None) -> list[str]:
    names = [f"decoder.layers.{number}.weight" for number in range(len(sizes))]
    if shared is not None:
        names[0 if shared == "first" else -1] = EMBEDDING if shared == "first" else HEAD
    return names


def megatrons(
    sizes: list[int], names: list[str], shared: str | None, bucket: int | None, replicas: int
) -> tuple[list[int], int, list[list[tuple[int, int]]]]:
    """First element of each parameter in the saved buffer, its elements, and per parameter its bucket and place."""
    params = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    if shared is not None:
        params[0 if shared == "first" else -1].shared_embedding = True
    group = SimpleNamespace(size=lambda: replicas, rank=lambda: 0)
    config = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=bucket is not None)
    buffer = buffers._ParamAndGradBuffer(
        config, torch.float32, torch.float32, params, group, bucket, dict(zip(params, names, strict=True)), 1.0,
        list(range(len(params))), False, SimpleNamespace(tp=None, dp_cp=group),
    )  # fmt: skip
    before = np.concatenate([[0], np.cumsum([own.numel_unpadded for own in buffer.buckets])])
    found, places = [], []
    for param in params:
        start, _, bucket_id = buffer.param_index_map[param]
        inside = start - buffer.bucket_indices[bucket_id][0]
        found.append(int(before[bucket_id]) + inside)
        places.append([(bucket_id, inside)])
    return found, buffer.numel_unpadded, places


@given(SIZES, SHARED, BUCKETS, st.integers(1, 6))
@SETTINGS
def test_the_saved_buffer_is_filled_as_megatron_fills_it(
    on_cpu: None, sizes: list[int], shared: str | None, bucket: int | None, replicas: int
) -> None:
    names = names_of(sizes, shared)
    expected, elements, _ = megatrons(sizes, names, shared, bucket, replicas)
    rule = Rule(bucket=bucket, shared=() if shared is None else (EMBEDDING, HEAD))
    found, total = starts(list(zip(names, sizes, strict=True))[::-1], rule)
    assert (found[::-1], total) == (expected, elements)


@given(SIZES, SHARED, st.booleans(), st.integers(1, 700), st.integers(1, 6))
@SETTINGS
def test_what_the_arguments_say_leads_to_megatrons_places(
    on_cpu: None, sizes: list[int], shared: str | None, overlap: bool, bucket: int, replicas: int
) -> None:
    """Elsewhere than on the first stage, and without overlap, buckets have no limit."""
    names = names_of(sizes, shared)
    expected, elements, _ = megatrons(sizes, names, shared, bucket if overlap else None, replicas)
    parameters = [Parameter(0, name, Constant(FLOAT32, (size,))) for name, size in zip(names, sizes, strict=True)]
    arguments = {"overlap_grad_reduce": overlap, "ddp_bucket_size": bucket, "data_parallel_size": replicas}
    candidates = rules(arguments, first_chunk=True, shared=shared is not None)
    found = place(parameters, elements, candidates, "file")
    assert [found[own] for own in parameters] == expected


@given(SIZES, SHARED, BUCKETS, st.integers(1, 6))
@SETTINGS
def test_buckets_by_themselves_are_read_without_arguments(
    on_cpu: None, sizes: list[int], shared: str | None, bucket: int | None, replicas: int
) -> None:
    """As ``dp_reshardable`` saves them; where a bucket's end leaves two ways open, neither contradicts the sizes."""
    names = names_of(sizes, shared)
    _, _, places = megatrons(sizes, names, shared, bucket, replicas)
    count = 1 + max(number for ((number, _),) in places)
    elements = [0] * count
    for ((number, first),), size in zip(places, sizes, strict=True):
        elements[number] = max(elements[number], first + size)
    tensors: Any = {number: Constant(FLOAT32, (size,)) for number, size in enumerate(elements)}
    buffer = Buffer("(torch.float32)", dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), tensors), divided=True)
    shapes = {name: (size,) for name, size in zip(names, sizes, strict=True)}
    found = placed(buffer, shapes, shared is not None, "x", "x")
    assert found == {name: place for name, (place,) in zip(names, places, strict=True)}


@given(SIZES, BUCKETS, st.integers(1, 300))
@SETTINGS
def test_a_buffer_of_other_parameters_is_refused(
    on_cpu: None, sizes: list[int], bucket: int | None, other: int
) -> None:
    _, elements, _ = megatrons(sizes, names_of(sizes, None), None, bucket, 1)
    assume(elements != sum(sizes) + other)  # as core 0.7 would fill it, without gaps
    more = [Parameter(0, f"p{n}", Constant(FLOAT32, (size,))) for n, size in enumerate([*sizes, other])]
    arguments = {"overlap_grad_reduce": bucket is not None, "ddp_bucket_size": bucket, "data_parallel_size": 1}
    with pytest.raises(MappingError, match=r"does not fit.*found \d+.*--optimizer drop"):
        place(more, elements, rules(arguments, first_chunk=True, shared=False), "file")
