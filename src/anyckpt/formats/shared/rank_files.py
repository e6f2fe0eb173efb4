"""Files of one rank each, as NeMo 1 lays them out: in a ``.nemo``, and beside it as Lightning checkpoints.

A rank's folder is ``mp_rank_TT`` without a pipeline and ``tp_rank_TT_pp_rank_PPP`` with one
(``NLPSaveRestoreConnector`` and ``inject_model_parallel_rank`` of NeMo 1.0 to 2.5).  Layers are numbered from 0 on
every stage.  Names are Megatron-Core's behind ``model.`` (``model.module.`` with ``megatron_amp_O2``), or those of
NeMo's own Megatron modules (``model.language_model.encoder.layers.0.mlp.dense_h_to_4h``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anyckpt.checkpoint import ParallelLayout, RankShard
from anyckpt.config import of_ranks
from anyckpt.containers.torch_file.values import brief
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.formats.shared.no_weights import FREQUENCIES_REASON, note_extra_state
from anyckpt.formats.shared.rank_folders import Place, folder_name
from anyckpt.models.dialects.projections import grouped
from anyckpt.models.dialects.rank_names import flattened, hub_names
from anyckpt.tensor import LazyTensor, concatenate

_WRAPPERS = ("model.", "module.", "enc_dec_model.")
_UP = re.compile(r"^(?P<module>.*\.(?:dense_h_to_4h))_2\.(?P<kind>weight|bias)$")
_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
_VIRTUAL = "virtual_pipeline_model_parallel_size"
_EXPERT = "expert_model_parallel_size"


@dataclass(frozen=True)
class Chunk:
    """What one rank, or one virtual pipeline chunk of it, stores.

    Attributes:
        place: the rank.
        number: the chunk, 0 without virtual pipeline.
        state: the state dict; dictionaries inside it are modules.
        source: the file, for messages.
    """

    place: Place
    number: int
    state: Mapping[Any, Any]
    source: str


def check_places(places: Iterable[Place], config: Mapping[str, Any], path: str) -> ParallelLayout:
    """The layout of the files, every rank of which is there.

    Args:
        places: those of the files.
        config: NeMo 1's configuration; what it leaves out, the folders tell.
        path: where the folders are.

    Raises:
        FormatError: a folder is missing, or is of a rank that the configuration does not have.
    """
    found = set(places)
    sizes = [_size(config, key, path) for key in _SIZES]
    tensor = sizes[0] or 1 + max(place.tensor for place in found)
    pipeline = sizes[1] or 1 + max(place.pipeline for place in found)
    says = f"tensor parallel {tensor} x pipeline parallel {pipeline}"
    says += " by the configuration" if any(sizes) else " by the folders' names"
    for place in sorted(found):
        if place.tensor >= tensor or place.pipeline >= pipeline:
            held = 1 + max(p.tensor for p in found), 1 + max(p.pipeline for p in found)
            raise FormatError(
                "the rank folders and the configuration contradict each other",
                path=path,
                expected=says,
                found=f"folders of tensor parallel {held[0]} x pipeline parallel {held[1]}",
                remedy="gather the ranks of one save, and its own configuration",
            )
    for rank in range(tensor * pipeline):
        place = Place(rank % tensor, rank // tensor)
        if place not in found:
            raise FormatError(
                "a rank folder is missing",
                path=path,
                expected=f"{folder_name(place, pipeline)}: {says}",
                found=f"{len(found)} rank folders",
                remedy="copy the folders of all ranks here",
            )
    if (_size(config, _EXPERT, path) or 1) > 1:
        raise FormatError(
            "has one folder for ranks that hold different experts",
            path=path,
            expected="expert_model_parallel_size 1 in the configuration",
            found=config[_EXPERT],
            remedy="load it in the NeMo that wrote it and save it with use_dist_ckpt true",
        )
    return ParallelLayout(tensor, pipeline)


def with_virtual(
    layout: ParallelLayout, chunks: Sequence[Chunk], config: Mapping[str, Any], path: str
) -> ParallelLayout:
    """The layout with the virtual pipeline that the chunks show.

    Raises:
        FormatError: the configuration says otherwise; then nothing tells which layers a file has.
    """
    found = 1 + max((chunk.number for chunk in chunks), default=0)
    stated = _size(config, _VIRTUAL, path) or 1
    if layout.pipeline_parallel > 1 and found != stated:
        raise FormatError(
            "the rank files and the configuration contradict each other on the virtual pipeline",
            path=path,
            expected=f"{_VIRTUAL} {stated}, by the configuration",
            found=f"{found} chunk(s) in each file",
            remedy="give the configuration that the files were saved with",
        )
    return ParallelLayout(layout.tensor_parallel, layout.pipeline_parallel, found)


def rank_shards(
    chunks: Sequence[Chunk], config: Mapping[str, Any], layout: ParallelLayout, ignored: dict[str, str]
) -> tuple[RankShard, ...]:
    """The ranks' weights under the hub's names.

    Args:
        chunks: every rank's.
        config: NeMo 1's configuration: ``megatron_legacy`` is for models from before October 2020, whose fused
            projections have all queries, then all keys, then all values of the rank.
        layout: of the files.
        ignored: gets the names that carry no weights, with the reason.

    Raises:
        FormatError: something is no dense tensor, or two names are of the same weight.
    """
    stored = [_joined_halves(_weights(chunk, ignored), chunk.source) for chunk in chunks]
    renamed = hub_names(stored, [chunk.source for chunk in chunks])
    heads = 0
    if config.get("megatron_legacy"):
        source, what = chunks[0].source, "of a megatron_legacy model"
        heads = of_ranks.heads_on_a_rank(config, "nemo1", layout.tensor_parallel, source, what)
    shards = [
        RankShard(chunk.place.tensor, chunk.place.pipeline, chunk.number, 0, own, chunk.source)
        for chunk, own in zip(chunks, renamed, strict=True)
    ]
    return tuple(grouped(shard, 0.0, heads) for shard in shards) if heads else tuple(shards)


def has_local_norms(chunks: Sequence[Chunk]) -> bool:
    """Whether norms have modules of their own, as in Megatron-Core's layers without Transformer Engine."""
    return any(str(name).endswith(".input_layernorm.weight") for chunk in chunks for name in chunk.state)


def _weights(chunk: Chunk, ignored: dict[str, str]) -> dict[str, LazyTensor]:
    """A chunk's weights by dotted names without wrappers."""
    flat = flattened(chunk.state, chunk.source)
    cut = 0
    while any(flat and all(name.startswith(wrapper, cut) for name in flat) for wrapper in _WRAPPERS):
        cut = next(iter(flat)).index(".", cut) + 1
    weights: dict[str, LazyTensor] = {}
    for name, value in flat.items():
        short = name[cut:].replace("._orig_mod", "")
        if "_extra_state" in short.rpartition(".")[2]:
            note_extra_state(ignored, short, value)
        elif short.endswith("rotary_pos_emb.inv_freq"):
            ignored[short] = FREQUENCIES_REASON
        elif not isinstance(value, LazyTensor):
            raise FormatError("is not a dense tensor", path=chunk.source, tensor=name, found=brief(value))
        elif short in weights:
            raise FormatError("holds a weight under two names", path=chunk.source, tensor=short)
        else:
            weights[short] = value
    return weights


def _joined_halves(weights: dict[str, LazyTensor], source: str) -> dict[str, LazyTensor]:
    """With ``dense_h_to_4h`` and ``dense_h_to_4h_2``, a rank's gate and up projection apart, in one tensor."""
    ups = {name: found for name in weights if (found := _UP.match(name)) is not None}
    result = {name: tensor for name, tensor in weights.items() if name not in ups}
    for name, found in ups.items():
        gate = f"{found['module']}.{found['kind']}"
        if (
            gate not in weights
            or weights[gate].shape != weights[name].shape
            or weights[gate].dtype != weights[name].dtype
        ):
            raise FormatError(
                "is the second half of a gated layer whose first half is missing or different",
                path=source,
                tensor=name,
                expected=f"{gate} of shape {weights[name].shape}",
                found=weights[gate].shape if gate in weights else "no such tensor",
            )
        result[gate] = concatenate([weights[gate], weights[name]], 0)
    return result


def _size(config: Mapping[str, Any], key: str, path: str) -> int | None:
    value = config.get(key)
    if value is None or (type(value) is int and 0 < value <= 1 << 16):
        return value
    raise FormatError(
        f"{key} in the configuration is not possible", path=path, expected="a number of ranks", found=brief(value)
    )
