"""Which layers each chunk of each pipeline stage holds.

A chunk is (stage, virtual rank).  Chunks in the order in which data flows through them are sorted by virtual rank
first, then by stage, and hold the layers in that order; so how many layers each has says everything.  Sources:
Megatron-Core 0.16's ``get_num_layers_to_build``, ``get_transformer_layer_offset``, ``PipelineParallelLayerLayout``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError
from anyckpt.layout.geometry import Parallelism

_MOST_LAYERS = 100_000
_LETTERS = {"E": "embedding", "L": "loss", "t": "decoder", "m": "mtp"}
_MEMBERS = {
    1: "embedding",
    2: "loss",
    3: "encoder",
    4: "decoder",
    5: "mtp",
}  # megatron.core.transformer.enums.LayerType


@dataclass(frozen=True)
class Chunk:
    """What a chunk of a stage holds.

    Attributes:
        pipeline_rank: the stage.
        virtual_rank: which of the stage's chunks.
        layers: by stack (``decoder``, ``encoder``, ``mtp``), global indices of its layers.
        embedding: it has the embedding, or a copy of it.
        output: it has the output layer.
        norms: stacks whose final norm it has.
    """

    pipeline_rank: int
    virtual_rank: int
    layers: Mapping[str, range]
    embedding: bool
    output: bool
    norms: frozenset[str]

    @property
    def empty(self) -> bool:
        """It holds nothing: Megatron writes no ``model{v}`` for it."""
        return not (self.embedding or self.output or self.norms or any(self.layers.values()))

    def __str__(self) -> str:
        return f"pipeline rank {self.pipeline_rank}" + (f", chunk {self.virtual_rank}" if self.virtual_rank else "")


def chunks(parallelism: Parallelism, stacks: Mapping[str, int]) -> tuple[Chunk, ...]:
    """Every chunk, in the order in which data flows through them.

    Args:
        parallelism: the layout.
        stacks: layers of each stack that the model has: ``decoder`` or ``encoder`` or both, and ``mtp``.

    Raises:
        UsageError: layers cannot be laid out so.
    """
    parallelism.check()
    mtp = stacks.get("mtp", 0)
    main = [name for name in ("encoder", "decoder") if name in stacks]
    if len(main) == 2:
        return _encoder_decoder(parallelism, stacks)
    stack = main[0] if main else "decoder"
    total = stacks.get(stack, 0)
    if parallelism.pipeline_layout is not None:
        stages = _checked(parse_layout(parallelism.pipeline_layout), parallelism, total, mtp)
        counts = [stage.count("decoder") for stage in stages]
        mtps = [stage.count("mtp") for stage in stages]
    else:
        counts = _counts(parallelism, total)
        mtps = [0] * (len(counts) - 1) + [mtp]
    last = len(counts) - 1
    # with multi-token prediction the final norm follows the last layer, else the output layer
    norm = max((i for i, count in enumerate(counts) if count), default=last) if mtp else last
    found, at, mtp_at = [], 0, 0
    for i, (count, mtp_count) in enumerate(zip(counts, mtps, strict=True)):
        virtual_rank, pipeline_rank = divmod(i, parallelism.pipeline_parallel)
        layers = {stack: range(at, at + count), "mtp": range(mtp_at, mtp_at + mtp_count)}
        norms = frozenset([stack] if i == norm else [])
        found.append(Chunk(pipeline_rank, virtual_rank, layers, i == 0 or mtp_count > 0, i == last, norms))
        at += count
        mtp_at += mtp_count
    return tuple(found)


def _counts(parallelism: Parallelism, total: int) -> list[int]:
    """Layers of each chunk of a layout that is given by numbers."""
    stages, virtual = parallelism.pipeline_parallel, parallelism.virtual_pipeline
    first, last = parallelism.num_layers_in_first_pipeline_stage, parallelism.num_layers_in_last_pipeline_stage
    if first is not None or last is not None:
        if parallelism.account_for_embedding or parallelism.account_for_loss:
            raise UsageError("a number of layers in the first or last stage excludes accounting for embedding and loss")
        if stages == 1 and {first, last} - {None} != {total}:
            raise UsageError("a number of layers in the first or last stage needs a pipeline", found="one stage")
        middle = stages - (first is not None) - (last is not None)
        rest = total - (first or 0) - (last or 0)
        if stages > 1 and (rest < 0 or min(first or 0, last or 0) < 0 or (rest % middle if middle else rest)):
            raise UsageError(
                "layers cannot be laid out with these numbers in the first and last pipeline stage",
                expected=f"{total} layers less those, a multiple of {middle} stages",
                found=f"{first} in the first, {last} in the last, {rest} left",
            )
        each = rest // middle if middle > 0 else 0
        per_stage = [each] * stages
        if last is not None:
            per_stage[-1] = last
        if first is not None:
            per_stage[0] = first
    else:
        slots = total + parallelism.account_for_embedding + parallelism.account_for_loss
        if slots % stages:
            counted = " and ".join(
                ["layers"]
                + ["embedding"] * parallelism.account_for_embedding
                + ["output layer"] * parallelism.account_for_loss
            )
            raise UsageError(
                "layers cannot be dealt out evenly to the pipeline stages",
                expected=f"a multiple of {stages}",
                found=f"{slots} ({counted})",
                remedy="choose another --pp, or give the layers of the first and last stage or a pipeline layout",
            )
        per_stage = [slots // stages] * stages
    if any(count % virtual for count in per_stage):
        raise UsageError(
            "a stage's layers cannot be dealt out evenly to its virtual chunks",
            expected=f"multiples of {virtual}",
            found=per_stage,
            remedy="choose another --vpp",
        )
    counts = [count // virtual for _ in range(virtual) for count in per_stage]
    counts[0] -= parallelism.account_for_embedding
    counts[-1] -= parallelism.account_for_loss
    return counts


def _encoder_decoder(parallelism: Parallelism, stacks: Mapping[str, int]) -> tuple[Chunk, ...]:
    """Encoder on the first stages, decoder with a copy of the embedding on the others."""
    stages, split = parallelism.pipeline_parallel, parallelism.pipeline_split_rank
    sizes = {name: stacks[name] for name in ("encoder", "decoder")}
    if stages == 1:
        layers = {name: range(size) for name, size in sizes.items()}
        return (Chunk(0, 0, layers, True, True, frozenset(sizes)),)
    if split is None or not 0 < split < stages or parallelism.virtual_pipeline > 1 or parallelism.pipeline_layout:
        raise UsageError(
            "an encoder-decoder is divided at a pipeline split rank, without virtual pipeline or layout",
            expected=f"a split rank between 1 and {stages - 1}",
            found=split,
            remedy="choose --pp 1",
        )
    if sizes["encoder"] % split or sizes["decoder"] % (stages - split):
        raise UsageError(
            "an encoder-decoder's layers cannot be dealt out evenly to the pipeline stages",
            expected=f"multiples of {split} and {stages - split}",
            found=f"{sizes['encoder']} and {sizes['decoder']} layers",
        )
    found = []
    for stage in range(stages):
        name, at, count = ("encoder", stage, split) if stage < split else ("decoder", stage - split, stages - split)
        each = sizes[name] // count
        norms = frozenset([name] if at == count - 1 else [])
        found.append(Chunk(stage, 0, {name: range(at * each, (at + 1) * each)}, at == 0, stage == stages - 1, norms))
    return tuple(found)


# -- layouts in words ----------------------------------------------------------------------------------------


def parse_layout(value: Any) -> list[list[str]]:
    """The stages of a ``pipeline_model_parallel_layout``, as Megatron-Core 0.16 understands it.

    Args:
        value: a string such as ``Et*3|(tt|)*29,m|L``; a list of stages, each a list of names, letters or members of
            Megatron's LayerType; or the record of a PipelineParallelLayerLayout.

    Returns:
        each stage's parts: ``embedding``, ``decoder``, ``mtp``, ``loss``.

    Raises:
        UsageError: it is none of these.
    """
    fields = getattr(value, "fields", None)
    if callable(fields):
        value = fields().get("input_data")
    if isinstance(value, str):
        return [[_LETTERS[letter] for letter in stage] for stage in _expanded(value).split("|")]
    if isinstance(value, (list, tuple)) and all(isinstance(stage, (list, tuple, str)) for stage in value):
        if sum(len(stage) for stage in value) > _MOST_LAYERS or len(value) > _MOST_LAYERS:
            raise UsageError("the pipeline layout has too many layers", expected=f"at most {_MOST_LAYERS}")
        return [[_part(entry) for entry in stage] for stage in value]
    raise _misunderstood(value)


def _expanded(text: str) -> str:
    """A layout string without its products: first those of parentheses, then those of single letters."""
    plain = text.replace(",", "").replace(" ", "")
    for product in (r"\(([^()]+)\)\*(\d{1,6})(?!\d)", r"([^*\d])\*(\d{1,6})(?!\d)"):
        length = len(plain) + sum(len(m[1]) * int(m[2]) for m in re.finditer(product, plain))
        if length > 2 * _MOST_LAYERS:
            raise UsageError("the pipeline layout has too many layers", expected=f"at most {_MOST_LAYERS}")
        plain = re.sub(product, lambda m: m[1] * int(m[2]), plain)
    if not set(plain) <= {*_LETTERS, "|"}:
        raise _misunderstood(text)
    return plain


def _part(entry: Any) -> str:
    """A part's name, from its name, its letter, a LayerType's record or its value."""
    arguments = getattr(entry, "args", None)
    if isinstance(arguments, tuple) and len(arguments) == 1 and getattr(entry, "path", "").endswith("LayerType"):
        entry = arguments[0]
    if type(entry) is int and entry in _MEMBERS:
        return _MEMBERS[entry]
    if isinstance(entry, str):
        name = entry.strip().rpartition(".")[2]
        name = _LETTERS.get(name, name.lower())
        if name in _MEMBERS.values():
            return name
    raise _misunderstood(entry)


def hybrid_layout(pattern: str) -> list[list[str]] | None:
    """The stages of a ``hybrid_layer_pattern`` in which ``|`` parts pipeline stages; None if it has none.

    Megatron-LM main writes one letter per layer (``M*-E``), and ``/`` before each multi-token-prediction layer.
    """
    body, *mtp = pattern.split("/")
    if "|" not in body:
        return None
    stages = [["decoder"] * len(stage) for stage in body.split("|")]
    stages[0].insert(0, "embedding")
    stages[-1] += ["mtp"] * len(mtp) + ["loss"]
    return stages


def _checked(stages: Sequence[list[str]], parallelism: Parallelism, layers: int, mtp: int) -> Sequence[list[str]]:
    """The stages themselves if they fit the model and the ranks.

    Raises:
        UsageError: they do not.
    """
    size, virtual = parallelism.pipeline_parallel, parallelism.virtual_pipeline
    if len(stages) % size or (virtual > 1 and len(stages) != size * virtual):
        raise UsageError(
            "the pipeline layout does not fit the ranks",
            expected=f"{size} stages " + (f"of {virtual} chunks" if virtual > 1 else "or a multiple"),
            found=f"{len(stages)}, parted by |",
        )
    order = [part for stage in stages for part in stage]
    if order[:1] != ["embedding"] or order[-1] != "loss" or order.count("embedding") + order.count("loss") != 2:
        raise UsageError(
            "the pipeline layout must begin with the embedding, end with the output layer and have each once",
            found=", ".join([*order[:3], "...", *order[-3:]]),
        )
    if order.count("decoder") != layers or order.count("encoder"):
        raise UsageError(
            "the pipeline layout is of another number of layers",
            expected=f"{layers} decoder layers and none of an encoder",
            found=f"{order.count('decoder')} and {order.count('encoder')}",
        )
    behind = order[order.index("mtp") :] if "mtp" in order else []
    if order.count("mtp") != mtp or sum("mtp" in stage for stage in stages) > 1 or "decoder" in behind:
        raise UsageError(
            "the pipeline layout does not fit the multi-token-prediction layers",
            expected=f"{mtp}, on one stage and behind every layer",
            found=f"{order.count('mtp')} on {sum('mtp' in stage for stage in stages)} stages",
        )
    return stages


def _misunderstood(value: Any) -> UsageError:
    return UsageError(
        "the pipeline layout is not understood",
        expected="stages parted by |, of the letters E, t, m, L, with x*n and (...)*n",
        found=repr(value)[:80],
    )
