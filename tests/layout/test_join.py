"""What joining notices: files that are missing, there twice, of another model, or drifted apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from anyckpt.checkpoint import RankShard
from anyckpt.dtypes import dtype
from anyckpt.errors import MappingError, UsageError
from anyckpt.layout import Geometry, Latent, Parallelism, compare, cut, join
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import Constant, LazyTensor, Stored, from_array
from tests.layout.sample import HIDDEN, Numbers, assert_equal, model, rank_of

DENSE = Geometry(
    num_layers=4, num_attention_heads=4, num_query_groups=2, kv_channels=2, gated_linear_unit=True,
    share_embeddings_and_output_weights=True, vocab_size=10, make_vocab_size_divisible_by=4,
)  # fmt: skip
DENSE_LAYOUT = Parallelism(tensor_parallel=2, pipeline_parallel=2)
MOE = dataclasses.replace(DENSE, num_layers=2, num_experts=4)
MOE_LAYOUT = Parallelism(tensor_parallel=2, expert_parallel=2)


def dense() -> list[RankShard]:
    return cut(model(DENSE, ["dense"] * 4, ffn=4, rows=10), DENSE_LAYOUT, DENSE)


def moe() -> list[RankShard]:
    return cut(model(MOE, ["moe"] * 2, ffn=4, rows=10), MOE_LAYOUT, MOE)


def edited(
    shards: list[RankShard], rank: tuple[int, int, int, int], edit: Callable[[dict[str, LazyTensor]], object]
) -> list[RankShard]:
    """The shards with one rank's tensors edited."""
    found = []
    for shard in shards:
        tensors = dict(shard.tensors)
        if rank_of(shard) == rank:
            edit(tensors)
        found.append(dataclasses.replace(shard, tensors=tensors))
    return found


def drifted(name: str) -> Callable[[dict[str, LazyTensor]], object]:
    def edit(tensors: dict[str, LazyTensor]) -> None:
        values = tensors[name].numpy().copy()
        values.reshape(-1)[[0, -1]] += 1
        tensors[name] = from_array(values)

    return edit


def test_a_replicated_tensor_that_drifted_is_named_with_its_rank() -> None:
    name = "self_attention.linear_qkv.layer_norm_weight"
    shards = edited(dense(), (1, 1, 0, 0), drifted(f"decoder.layers.0.{name}"))
    joined = join(shards, DENSE_LAYOUT, DENSE)
    assert joined.warnings == [
        f"decoder.layers.2.{name} differs between ranks: pipeline rank 1, tensor rank 1, expert rank 0 "
        "in 2 of 4 elements; took that of pipeline rank 1, tensor rank 0, expert rank 0"
    ]
    assert_equal(joined.tensors, model(DENSE, ["dense"] * 4, ffn=4, rows=10))


def test_dense_parts_that_expert_ranks_repeat_are_compared() -> None:
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    shards = edited(moe(), (1, 0, 0, 1), drifted(name))
    joined = join(shards, MOE_LAYOUT, MOE)
    assert [warning.split(" differs")[0] for warning in joined.warnings] == [name]
    assert_equal(joined.tensors, model(MOE, ["moe"] * 2, ffn=4, rows=10))


def test_experts_that_tensor_ranks_repeat_are_compared() -> None:
    layout = Parallelism(tensor_parallel=2, expert_tensor_parallel=1)
    shards = cut(model(MOE, ["moe"] * 2, ffn=4, rows=10), layout, MOE)
    assert shards[0].tensors["decoder.layers.0.mlp.experts.linear_fc1.weight3"].shape == (8, HIDDEN)
    name = "decoder.layers.0.mlp.experts.linear_fc1.weight3"
    joined = join(edited(shards, (1, 0, 0, 0), drifted(name)), layout, MOE)
    assert [warning.split(" differs")[0] for warning in joined.warnings] == [name]


class Unreadable(ByteSource):
    """Bytes that a test fails to have read."""

    def __init__(self) -> None:
        self.size = 1 << 40
        self.name = "payload"
        self.path = None

    def _read_into(self, offset: int, buffer: object) -> None:
        raise AssertionError("read")


def test_only_copies_are_read_and_only_when_asked() -> None:
    def unread(shards: list[RankShard], only_large: bool) -> list[RankShard]:
        def view(tensor: LazyTensor) -> LazyTensor:
            if only_large and tensor.ndim < 2:
                return tensor
            return Stored(Unreadable(), 0, tensor.dtype, tensor.shape)

        return [dataclasses.replace(s, tensors={n: view(t) for n, t in s.tensors.items()}) for s in shards]

    joined = join(unread(dense(), only_large=False), DENSE_LAYOUT, DENSE, verify_replicas=False)
    assert not joined.warnings
    assert len(joined.tensors) == 26
    assert len(joined.replicas) == 10  # two norms of four layers, the final norm, and the tied embedding
    untied = dataclasses.replace(DENSE, share_embeddings_and_output_weights=False)
    shards = cut(model(untied, ["dense"] * 4, ffn=4, rows=10), DENSE_LAYOUT, untied)
    assert len(join(unread(shards, only_large=True), DENSE_LAYOUT, untied, verify_replicas=True).tensors) == 27
    with pytest.raises(AssertionError, match="read"):
        compare(joined.replicas)


def test_large_copies_are_compared_only_when_asked() -> None:
    large = (1 << 12, 1 << 12)
    kind = dtype("float32")
    one = Constant(kind, (large[0] + 1, large[1]), np.float32(1).tobytes())
    other = Constant(kind, (large[0] + 1, large[1]), np.float32(2).tobytes())
    name = "decoder.layers.0.mlp.router.weight"
    shards = [RankShard(rank, 0, 0, 0, {name: tensor}, f"rank {rank}") for rank, tensor in enumerate([one, other])]
    layout, geometry = Parallelism(tensor_parallel=2), Geometry(num_layers=1)
    assert join(shards, layout, geometry).warnings == []
    small = [dataclasses.replace(s, tensors={name: s.tensors[name].narrow(0, 0, 3)}) for s in shards]
    assert len(join(small, layout, geometry).warnings) == 1
    assert join(small, layout, geometry, verify_replicas=False).warnings == []


def test_an_output_layer_that_is_not_the_embedding_is_refused() -> None:
    shards = edited(dense(), (0, 1, 0, 0), drifted("output_layer.weight"))
    with pytest.raises(MappingError, match=r"output_layer.weight.*is not the embedding.*found 2 of 40 elements differ"):
        join(shards, DENSE_LAYOUT, DENSE)
    joined = join(shards, DENSE_LAYOUT, dataclasses.replace(DENSE, share_embeddings_and_output_weights=False))
    assert "output_layer.weight" in joined.tensors


def test_a_copy_beside_multi_token_prediction_is_only_warned_about() -> None:
    """Megatron-Core allocates it and never trains it: its own copy of the embedding serves both."""
    geometry = dataclasses.replace(DENSE, mtp_num_layers=1)
    tensors = model(geometry, ["dense"] * 4, ffn=4, rows=10)
    shards = cut(tensors, DENSE_LAYOUT, geometry)
    last = next(s for s in shards if rank_of(s) == (0, 1, 0, 0))
    assert {"embedding.word_embeddings.weight", "output_layer.weight"} <= set(last.tensors)
    joined = join(edited(shards, (0, 1, 0, 0), drifted("output_layer.weight")), DENSE_LAYOUT, geometry)
    assert len(joined.warnings) == 1
    assert_equal(joined.tensors, tensors)


def test_ranks_may_come_in_any_order_and_empty_chunks_may_be_absent() -> None:
    layout = Parallelism(pipeline_parallel=2, virtual_pipeline=3, pipeline_layout="Et|t||t|t|L")
    tensors = model(DENSE, ["dense"] * 4, ffn=4, rows=10)
    shards = cut(tensors, layout, DENSE)
    assert [rank_of(shard) for shard in shards if not shard.tensors] == [(0, 0, 1, 0)]
    joined = join([shard for shard in reversed(shards) if shard.tensors], layout, DENSE)
    assert_equal(joined.tensors, tensors)
    assert list(joined.tensors) == list(tensors)


def renamed(old: str, new: str) -> Callable[[dict[str, LazyTensor]], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def without(prefix: str) -> Callable[[dict[str, LazyTensor]], object]:
    def edit(tensors: dict[str, LazyTensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return edit


def every(
    shards: list[RankShard], edit: Callable[[dict[str, LazyTensor]], object], pipeline_rank: int = 0
) -> list[RankShard]:
    for shard in shards:
        if shard.pipeline_rank == pipeline_rank:
            shards = edited(shards, rank_of(shard), edit)
    return shards


Q = "decoder.layers.0.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.0.mlp.experts.linear_fc1.weight"


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (
            lambda: dense()[:-1],
            "pipeline rank 1: files of ranks are missing.*without tensor 1 expert 0.*copy the folder",
        ),
        (lambda: dense()[:2], "pipeline rank 1: files of ranks are missing.*found 0, without tensor 0"),
        (lambda: [*dense(), dense()[0]], "is of the same rank as pipeline rank 0, tensor rank 0"),
        (
            lambda: [*dense(), dataclasses.replace(dense()[0], tensor_rank=2)],
            "outside the layout.*ranks below .2, 2, 1, 1.",
        ),
        (lambda: [*dense(), dataclasses.replace(dense()[0], virtual_rank=1)], "outside the layout"),
        (lambda: [*dense(), dataclasses.replace(dense()[0], expert_rank=-1)], "outside the layout"),
        (
            lambda: every(dense(), without("decoder.layers.1."), 1),
            r"disagree on the decoder layers of pipeline rank 1.*2 layers by the layout \(0 to 1 as the rank counts, "
            r"global 2 to 3\), found 1 layers in the file \(0\)",
        ),
        (
            lambda: every(
                dense(), lambda t: t.update({n.replace("s.1.", "s.2."): v for n, v in t.items() if "s.1." in n})
            ),
            r"found 3 layers in the file \(0 to 2\)",
        ),
        (
            lambda: edited(dense(), (1, 0, 0, 0), without(Q)),
            f"tensor rank 1.*'{Q}'.*in one rank's file but not in another",
        ),
        (
            lambda: edited(dense(), (0, 0, 0, 0), lambda t: t.update({"decoder.layers.1.input_layernorm.bias": t[Q]})),
            "tensor rank 1.*'decoder.layers.1.input_layernorm.bias'.*not in another",
        ),
        (
            lambda: edited(dense(), (1, 0, 0, 0), lambda t: t.update({Q: t[Q].narrow(0, 0, 4)})),
            f"'{Q}'.*different types or shapes.*found int32 .4, 4. on rank 1",
        ),
        (
            lambda: edited(dense(), (1, 0, 0, 0), lambda t: t.update({Q: t[Q].cast("int64")})),
            "different types or shapes.*expected int32.*found int64",
        ),
        (
            lambda: edited(dense(), (1, 1, 0, 0), lambda t: t.update({"decoder.final_layernorm.weight": Numbers()(5)})),
            "should be the same on every rank.*expected int32 .4,.*found int32 .5,.",
        ),
        (
            lambda: edited(dense(), (0, 0, 0, 0), renamed(Q, "decoder.layers.0.strange")),
            "no rule says.*decoder.layers.0.strange",
        ),
        (
            lambda: every(dense(), lambda t: t.update({Q: t[Q].narrow(0, 0, 4)})),
            "16 rows by the configuration, found 8 rows in all",
        ),
    ],
)
def test_dense_files_that_do_not_fit_are_refused(shards: Callable[[], list[RankShard]], message: str) -> None:
    with pytest.raises(MappingError, match=message):
        join(shards(), DENSE_LAYOUT, DENSE)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (lambda: [s for s in moe() if s.expert_rank == 0], "found 2, without tensor 0 expert 1, tensor 1 expert 1"),
        (
            lambda: edited(moe(), (0, 0, 0, 1), without(f"{FC1}1")),
            "tensor rank 0, expert rank 1.*disagree on the experts.*expected 2 experts .0 to 1 .*found 1 .0.",
        ),
        (
            lambda: edited(moe(), (0, 0, 0, 0), lambda t: t.update({f"{FC1}2": t[f"{FC1}0"]})),
            "expected 2 experts.*found 3 .0 to 2.",
        ),
        (
            lambda: edited(
                moe(),
                (0, 0, 0, 0),
                lambda t: t.update({"decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight": t[f"{FC1}1"]}),
            ),
            "local_experts.1.*is there under two spellings",
        ),
        (
            lambda: edited(
                moe(), (0, 0, 0, 0), lambda t: t.update({"decoder.layers.0.mlp.experts.weight1": Numbers()(4, 7)})
            ),
            "does not hold the experts of a rank.*axis 1 of 2 experts, found .4, 7.",
        ),
    ],
)
def test_expert_files_that_do_not_fit_are_refused(shards: Callable[[], list[RankShard]], message: str) -> None:
    with pytest.raises(MappingError, match=message):
        join(shards(), MOE_LAYOUT, MOE)


def test_contradictions_with_the_configuration_show_both_sides() -> None:
    with pytest.raises(MappingError, match="0 to 3|3 layers by the layout|multiple"):
        join(moe(), MOE_LAYOUT, dataclasses.replace(MOE, num_layers=3))
    with pytest.raises(MappingError, match="is an expert's, but.*says that it is dense"):
        join(moe(), MOE_LAYOUT, dataclasses.replace(MOE, num_experts=None))
    with pytest.raises(MappingError, match="multiple of 2, found 3 experts"):
        join(moe(), MOE_LAYOUT, dataclasses.replace(MOE, num_experts=3))
    with pytest.raises(MappingError, match="found 2 .0 to 1.|expected 4 experts"):
        join(moe(), MOE_LAYOUT, dataclasses.replace(MOE, num_experts=8))
    with pytest.raises(MappingError, match="larger than the stored rows.*at least 17 rows, found 16"):
        join(dense(), DENSE_LAYOUT, dataclasses.replace(DENSE, vocab_size=17))
    with pytest.raises(MappingError, match="24 rows by the configuration, found 16 rows in all"):
        join(dense(), DENSE_LAYOUT, dataclasses.replace(DENSE, padded_vocab_size=24))
    with pytest.raises(UsageError, match="without knowing how many layers"):
        join(dense(), DENSE_LAYOUT, dataclasses.replace(DENSE, num_layers=None))
    with pytest.raises(UsageError, match="another number of layers.*4 decoder.*found 5"):
        join(dense(), dataclasses.replace(DENSE_LAYOUT, pipeline_layout="Ettt|ttL"), DENSE)
    with pytest.raises(MappingError, match="3 layers by the layout .0 to 2.*found 2 layers in the file .0 to 1."):
        join(dense(), dataclasses.replace(DENSE_LAYOUT, pipeline_layout="Ettt|tL"), DENSE)


def test_a_gap_is_noticed_without_a_configuration() -> None:
    tensors = {f"decoder.layers.{i}.mlp.linear_fc2.weight": Numbers()(2, 2) for i in (0, 2)}
    shard = RankShard(0, 0, 0, 0, tensors, "file")
    with pytest.raises(MappingError, match=r"found 2 layers in the file \(0, 2\)"):
        join([shard], Parallelism(), Geometry())
    assert len(join([shard], Parallelism(), Geometry(), complete=False).tensors) == 2
    assert len(cut(tensors, Parallelism(), Geometry(), complete=False)[0].tensors) == 2


def test_a_stack_that_is_missing_altogether_is_noticed() -> None:
    shards = [
        dataclasses.replace(s, tensors={n: t for n, t in s.tensors.items() if ".layers." not in n}) for s in dense()
    ]
    with pytest.raises(MappingError, match="disagree on the decoder layers.*found 0 layers in the file .none."):
        join(shards, DENSE_LAYOUT, DENSE)
    with pytest.raises(MappingError, match="disagree on the mtp layers.*expected 1 layers.*found 0"):
        join(dense(), DENSE_LAYOUT, dataclasses.replace(DENSE, mtp_num_layers=1))
    tensors = model(DENSE, ["dense"] * 4, ffn=4, rows=10)
    with pytest.raises(MappingError, match="disagree on the mtp layers.*expected 0 by the.*found none among"):
        cut(tensors, DENSE_LAYOUT, dataclasses.replace(DENSE, mtp_num_layers=1))


def test_names_without_weights_are_said_to_be_left_out() -> None:
    shards = edited(
        dense(), (0, 0, 0, 0), lambda t: t.update({"decoder.layers.0.mlp.linear_fc1._extra_state": Numbers()(3)})
    )
    joined = join(shards, DENSE_LAYOUT, DENSE)
    assert list(joined.ignored) == ["decoder.layers.0.mlp.linear_fc1._extra_state"]


def test_cutting_refuses_a_second_output_layer() -> None:
    tensors = model(
        dataclasses.replace(DENSE, share_embeddings_and_output_weights=False), ["dense"] * 4, ffn=4, rows=10
    )
    with pytest.raises(MappingError, match=r"output_layer.weight.*says that it is the embedding"):
        cut(tensors, DENSE_LAYOUT, DENSE)


def test_cutting_notices_experts() -> None:
    tensors = model(MOE, ["moe"] * 2, ffn=4, rows=10)
    one = {**tensors, f"{FC1}4": tensors[f"{FC1}0"]}
    with pytest.raises(MappingError, match="experts are missing, or are more.*0 to 3, found 0 to 4"):
        cut(one, MOE_LAYOUT, MOE)
    del tensors[f"{FC1}2"]
    with pytest.raises(MappingError, match="expected 0 to 3, found 0 to 1, 3"):
        cut(tensors, MOE_LAYOUT, MOE)
    other = {**one, "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight": one[f"{FC1}0"]}
    with pytest.raises(MappingError, match="under two spellings"):
        cut(other, MOE_LAYOUT, MOE)


def test_legacy_grouped_experts_have_no_biases() -> None:
    tensors = model(MOE, ["moe"] * 2, ffn=4, rows=10, bias=True)
    with pytest.raises(MappingError, match="linear_fc1.bias.*cannot be written as a legacy grouped expert"):
        cut(tensors, MOE_LAYOUT, MOE, spelling="legacy-grouped")


def test_legacy_grouped_experts_lie_as_megatron_sees_them() -> None:
    """``GroupedMLP.forward``: weight1.view(experts, hidden, -1), weight2.view(experts, -1, hidden), both [in, out]."""
    tensors = model(MOE, ["moe"] * 2, ffn=4, rows=10)
    shards = cut(tensors, Parallelism(expert_parallel=2), MOE, spelling="legacy-grouped")
    second = shards[1].tensors
    weight1 = second["decoder.layers.0.mlp.experts.weight1"].numpy()
    assert weight1.shape == (HIDDEN, 2 * 8)
    np.testing.assert_array_equal(weight1.reshape(2, HIDDEN, -1)[1].T, tensors[f"{FC1}3"].numpy())
    weight2 = second["decoder.layers.0.mlp.experts.weight2"].numpy()
    expected = tensors["decoder.layers.0.mlp.experts.linear_fc2.weight2"].numpy()
    np.testing.assert_array_equal(weight2.reshape(2, -1, HIDDEN)[0].T, expected)


def test_latent_down_projections_are_joined_whether_divided_or_not() -> None:
    """Megatron-Core's implementations differ; as at run time, the rows tell."""
    make = Numbers()
    query, key = "self_attention.linear_q_down_proj.weight", "self_attention.linear_kv_down_proj.weight"
    tensors = {f"decoder.layers.0.{query}": make(4, 2), f"decoder.layers.0.{key}": make(6, 2)}
    layout = Parallelism(tensor_parallel=2)
    for divided in (False, True):
        shards = cut(tensors, layout, Geometry(num_layers=1, latent=Latent(4, 4, 2, down_parallel=divided)))
        assert shards[1].tensors[f"decoder.layers.0.{key}"].shape == ((3, 2) if divided else (6, 2))
        geometry = Geometry(num_layers=1, latent=Latent(4, 4, 2))
        assert_equal(join(shards, layout, geometry).tensors, tensors)
    with pytest.raises(MappingError, match="10 rows by the configuration, or a share of 2 ranks, found .3, 2."):
        join(shards, layout, Geometry(num_layers=1, latent=Latent(4, 8, 2)))
    with pytest.raises(MappingError, match="10 rows by the configuration"):
        cut(tensors, layout, Geometry(num_layers=1, latent=Latent(4, 8, 2)))
