"""Which layers are where: the cases of Megatron-Core's own comments, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from anyckpt.errors import MappingError, UsageError
from anyckpt.layout import Geometry, Parallelism, cut, hybrid_layout, parse_layout
from anyckpt.layout.pipeline import Chunk, chunks
from anyckpt.pickling.records import Global, Record
from tests.layout.sample import model


def laid_out(parallelism: Parallelism, layers: int, mtp: int = 0) -> list[list[list[int]]]:
    """Global layers of each chunk of each stage."""
    found = chunks(parallelism, {"decoder": layers, "mtp": mtp})
    stages: list[list[list[int]]] = [[] for _ in range(parallelism.pipeline_parallel)]
    for chunk in found:
        stages[chunk.pipeline_rank].append(list(chunk.layers["decoder"]))
    return stages


def test_even_stages() -> None:
    assert laid_out(Parallelism(pipeline_parallel=2), 4) == [[[0, 1]], [[2, 3]]]


def test_virtual_chunks_take_turns() -> None:
    assert laid_out(Parallelism(pipeline_parallel=2, virtual_pipeline=4), 8) == [
        [[0], [2], [4], [6]],
        [[1], [3], [5], [7]],
    ]
    assert laid_out(Parallelism(pipeline_parallel=2, virtual_pipeline=2), 8) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_uneven_first_and_last_stage() -> None:
    layout = Parallelism(pipeline_parallel=3, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=2)
    assert laid_out(layout, 6) == [[[0]], [[1, 2, 3]], [[4, 5]]]
    layout = Parallelism(pipeline_parallel=2, virtual_pipeline=2, num_layers_in_first_pipeline_stage=2)
    assert laid_out(layout, 6) == [[[0], [3]], [[1, 2], [4, 5]]]


def test_embedding_and_loss_take_the_place_of_layers() -> None:
    layout = Parallelism(pipeline_parallel=2, account_for_embedding=True, account_for_loss=True)
    assert laid_out(layout, 4) == [[[0, 1]], [[2, 3]]]
    layout = Parallelism(pipeline_parallel=2, virtual_pipeline=2, account_for_embedding=True)
    assert laid_out(layout, 7) == [[[0], [3, 4]], [[1, 2], [5, 6]]]


def test_layout_strings() -> None:
    layout = Parallelism(pipeline_parallel=2, pipeline_layout="Et|tt|t|tL")
    assert laid_out(layout, 5) == [[[0], [3]], [[1, 2], [4]]]
    layout = Parallelism(pipeline_parallel=4, pipeline_layout="E|t*3|(tt|)L")  # no number: nothing is repeated
    with pytest.raises(UsageError, match="not understood"):
        laid_out(layout, 5)
    layout = Parallelism(pipeline_parallel=4, pipeline_layout="E|t*3|,|(t|)*2tt|,t|L")
    assert laid_out(layout, 8) == [[[], [4]], [[0, 1, 2], [5, 6]], [[], [7]], [[3], []]]


def test_products_expand_as_megatron_documents() -> None:
    assert parse_layout("Ettt|(tt|)*29,m|L") == [
        ["embedding", "decoder", "decoder", "decoder"],
        *[["decoder", "decoder"]] * 29,
        ["mtp"],
        ["loss"],
    ]


def member(value: int) -> Record:
    return Record(Global("megatron.core.transformer.enums", "LayerType"), (value,))


@pytest.mark.parametrize(
    "value",
    [
        "Et|tL",
        [["E", "t"], ["t", "L"]],
        [["embedding", "decoder"], ["decoder", "loss"]],
        [["LayerType.embedding", " Decoder "], ["decoder", "loss"]],
        [[member(1), member(4)], (member(4), member(2))],
        Record(
            Global("megatron.core.transformer.pipeline_parallel_layer_layout", "PipelineParallelLayerLayout"),
            new=True,
            state={"input_data": "Et|tL", "pipeline_model_parallel_size": 2},
        ),
    ],
    ids=["string", "letters", "names", "spelled otherwise", "enumeration", "object"],
)
def test_layouts_as_args_keep_them(value: object) -> None:
    assert parse_layout(value) == [["embedding", "decoder"], ["decoder", "loss"]]


def test_hybrid_patterns_part_stages() -> None:
    assert hybrid_layout("M*M-") is None
    assert hybrid_layout("M*|M-E/MM/MM") == [
        ["embedding", "decoder", "decoder"],
        ["decoder", "decoder", "decoder", "mtp", "mtp", "loss"],
    ]


def test_final_norm_follows_the_last_layer_where_tokens_are_predicted_ahead() -> None:
    layout = Parallelism(pipeline_parallel=4, pipeline_layout="Et|t|m|L")
    found = chunks(layout, {"decoder": 2, "mtp": 1})
    assert [sorted(chunk.norms) for chunk in found] == [[], ["decoder"], [], []]
    assert [chunk.embedding for chunk in found] == [True, False, True, False]
    assert [chunk.output for chunk in found] == [False, False, False, True]
    without = chunks(Parallelism(pipeline_parallel=3, pipeline_layout="Et|t|L"), {"decoder": 2})
    assert [sorted(chunk.norms) for chunk in without] == [[], [], ["decoder"]]


def test_encoder_and_decoder_part_at_the_split_rank() -> None:
    layout = Parallelism(pipeline_parallel=3, pipeline_split_rank=1)
    found = chunks(layout, {"encoder": 2, "decoder": 4})
    assert [dict(chunk.layers) for chunk in found] == [
        {"encoder": range(2)},
        {"decoder": range(2)},
        {"decoder": range(2, 4)},
    ]
    assert [chunk.embedding for chunk in found] == [True, True, False]
    assert [sorted(chunk.norms) for chunk in found] == [["encoder"], [], ["decoder"]]


def refused(**options: object) -> Callable[[], tuple[Chunk, ...]]:
    layers = options.pop("layers", 4)
    stacks = options.pop("stacks", {"decoder": layers})
    return lambda: chunks(Parallelism(**options), stacks)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (refused(tensor_parallel=0), "tensor parallel size is not possible.*found 0"),
        (refused(tensor_parallel=True), "tensor parallel size is not possible"),
        (refused(pipeline_parallel=1 << 40), "pipeline parallel size is not possible"),
        (refused(tensor_parallel=4, expert_tensor_parallel=3), "divisor of tensor parallel size 4"),
        (refused(virtual_pipeline=2), "virtual pipeline needs a pipeline"),
        (refused(pipeline_parallel=3), r"multiple of 3, found 4 \(layers\).*--pp"),
        (refused(pipeline_parallel=2, account_for_loss=True), r"found 5 \(layers and output layer\)"),
        (refused(pipeline_parallel=2, virtual_pipeline=4), r"virtual chunks.*multiples of 4, found \[2, 2\]"),
        (refused(pipeline_parallel=2, num_layers_in_first_pipeline_stage=5), "5 in the first, None in the last"),
        (refused(pipeline_parallel=2, num_layers_in_first_pipeline_stage=-1), "-1 in the first"),
        (
            refused(pipeline_parallel=2, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=2),
            "1 in the first, 2 in the last, 1 left",
        ),
        (
            refused(pipeline_parallel=2, num_layers_in_first_pipeline_stage=1, account_for_loss=True),
            "excludes accounting",
        ),
        (refused(num_layers_in_last_pipeline_stage=2), "needs a pipeline"),
        (refused(num_layers_in_first_pipeline_stage=0, num_layers_in_last_pipeline_stage=4), "needs a pipeline"),
        (refused(pipeline_parallel=2, pipeline_layout="Ettt|t|tL"), "does not fit the ranks.*found 3"),
        (refused(pipeline_parallel=2, virtual_pipeline=3, pipeline_layout="Ettt|tL"), "2 stages of 3 chunks"),
        (refused(pipeline_parallel=2, pipeline_layout="Ettt|ttL"), "expected 4 decoder layers.*found 5"),
        (refused(pipeline_parallel=2, pipeline_layout="tttE|tL"), "must begin with the embedding"),
        (refused(pipeline_parallel=2, pipeline_layout="Etttt|"), "end with the output layer"),
        (refused(pipeline_parallel=2, pipeline_layout="Etttm|tL"), "multi-token-prediction"),
        (refused(pipeline_parallel=2, pipeline_layout="Ettt|tmL"), "expected 0.*found 1 on 1 stages"),
        (refused(pipeline_parallel=2, pipeline_layout="Ettt|txL"), "not understood"),
        (refused(pipeline_parallel=2, pipeline_layout="E(t)*99999999|L"), "not understood"),
        (refused(pipeline_parallel=2, pipeline_layout="E((t)*999999)*999999|L"), "too many layers"),
        (refused(pipeline_parallel=2, pipeline_layout="Et*999999|L"), "too many layers"),
        (refused(pipeline_parallel=2, pipeline_layout=[["E"] * 200_000]), "too many layers"),
        (refused(pipeline_parallel=2, pipeline_layout=[["E", "t", 4], [3.5]]), "not understood.*3.5"),
        (refused(pipeline_parallel=2, pipeline_layout=17), "not understood"),
        (refused(pipeline_parallel=2, stacks={"encoder": 2, "decoder": 2}), "split rank between 1 and 1"),
        (
            refused(pipeline_parallel=3, pipeline_split_rank=2, stacks={"encoder": 3, "decoder": 2}),
            "multiples of 2 and 1",
        ),
    ],
)
def test_layouts_that_do_not_fit_are_refused(attempt: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        attempt()


def test_cutting_says_which_layers_are_missing() -> None:
    geometry = Geometry(num_layers=4, num_attention_heads=2, num_query_groups=2, kv_channels=2)
    tensors = model(geometry, ["dense"] * 3, ffn=4, rows=8)
    with pytest.raises(MappingError, match="0 to 3 by the configuration, found 0 to 2 among the tensors"):
        cut(tensors, Parallelism(pipeline_parallel=2), geometry)
