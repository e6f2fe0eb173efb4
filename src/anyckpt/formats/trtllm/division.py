"""How TensorRT-LLM's ranks divide tensors: a table by name, for joining and for cutting.

Facts: files of NVIDIA ModelOpt 0.40 for one and more ranks.  A rank has equal parts of the query, key and value heads
one after the other; where there are more ranks than key heads, neighbours have copies of one.  Scales go with the rows
or columns that they are of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import LastingError, MappingError
from anyckpt.tensor import LazyTensor, concatenate

_LAYER = re.compile(r"transformer\.layers\.(\d{1,5})\.(.+)")
_MODULE = re.compile(
    r"(attention\.qkv|attention\.dense|mlp\.(?:shared_expert\.)?(?:fc|gate|proj))\."
    r"(weight|bias|weights_scaling_factor|weights_scaling_factor_2|prequant_scaling_factor|per_channel_scale"
    r"|activation_scaling_factor|zero|alpha|smoother|act_scale)"
)
_WHOLE = re.compile(
    r"(?:\w*layernorm|attention\.[qk]_layernorm)\.(?:weight|bias|scale_to_int)|mlp\.(?:router|shared_expert_gate)\.\w+"
    r"|attention\.(?:k|v|kv)_cache_scaling_factor|(?:attention|mlp)\.quantization_scaling_factor"
)
_ROW = ("attention.dense", "proj")
_TOP_WHOLE = ("transformer.ln_f.weight", "transformer.ln_f.bias")
_FIRST = ("transformer.vocab_embedding.", "transformer.position_embedding.")
_HEAD = ("lm_head.weight", "lm_head.bias")


@dataclass(frozen=True)
class Heads:
    """What the division of attention depends on.

    Attributes:
        queries: query heads of the model.
        keys: its key heads, and as many value heads.
        ranks: tensor-parallel ranks.
    """

    queries: int
    keys: int
    ranks: int

    @property
    def copies(self) -> int:
        """How many neighbouring ranks have one key head."""
        return max(1, self.ranks // self.keys)

    def check(self) -> None:
        """Raise LastingError if heads are not divided by that many ranks."""
        fits = self.keys % self.ranks == 0 or self.ranks % self.keys == 0
        if self.queries % self.ranks or not fits:
            raise LastingError(
                f"its heads cannot be divided among {self.ranks} tensor-parallel ranks",
                expected=f"a size that divides {self.queries} query heads and divides, or is a multiple of, "
                f"{self.keys} key heads",
                found=self.ranks,
                remedy="choose another --tp",
            )


def heads_of(config: Mapping[str, Any], ranks: int) -> Heads:
    """The heads that a configuration says; one if it says none that is possible, which the tensors contradict."""
    queries, keys = (positive(config, key) for key in ("num_attention_heads", "num_key_value_heads"))
    return Heads(queries or 1, keys or queries or 1, ranks)


def positive(config: Mapping[str, Any], key: str) -> int | None:
    """A size that a configuration says, None if it is not possible."""
    value = config.get(key)
    return value if type(value) is int and value > 0 else None


@dataclass(frozen=True)
class Division:
    """How one tensor is divided.

    Attributes:
        axis: along which; None if every rank has it whole.
        kind: ``parts`` of equal length; ``qkv`` heads; ``halves``, of which each is divided; ``padded`` rows, with
            zeros after the last.
    """

    axis: int | None
    kind: str = "parts"


WHOLE = Division(None)


def layer_of(name: str) -> tuple[int, str] | None:
    """The number of a layer and the name within; None outside layers."""
    match = _LAYER.fullmatch(name)
    return None if match is None else (int(match[1]), match[2])


def is_first(name: str) -> bool:
    """Whether a tensor outside layers is on the first stage; else it is on the last."""
    return name.startswith(_FIRST)


def division(name: str, tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> Division:
    """How ranks divide a tensor.

    Args:
        name: of a whole tensor, or of a rank's part.
        tensors: the others of the same model, or of the same rank: a scale's weight is among them.
        config: TensorRT-LLM's.

    Raises:
        MappingError: that is not known.
    """
    ndim = tensors[name].ndim
    found = layer_of(name)
    if found is None:
        if name in _TOP_WHOLE:
            return WHOLE
        if is_first(name):
            if not config.get("use_parallel_embedding"):
                return WHOLE
            return Division(1) if config.get("embedding_sharding_dim") == 1 else Division(0, "padded")
        if name in _HEAD:
            return Division(0, "padded")
        raise _unknown(name)
    match = _MODULE.fullmatch(found[1])
    if match is None:
        if _WHOLE.fullmatch(found[1]):
            return WHOLE
        raise _unknown(name)
    module, kind = match[1], match[2]
    weight = tensors.get(f"{name.removesuffix(kind)}weight")
    matrix = 2 if weight is None else weight.ndim
    if module.endswith(_ROW):
        return _of_row(kind, ndim, matrix)
    return _of_column(module, kind, tensors[name], matrix, config)


def _of_row(kind: str, ndim: int, matrix: int) -> Division:
    """A layer whose input features are divided."""
    per_block = kind in ("weights_scaling_factor", "zero") and ndim == matrix
    if kind in ("weight", "smoother") or (kind == "prequant_scaling_factor" and ndim) or per_block:
        return Division(ndim - 1)
    return WHOLE


def _of_column(module: str, kind: str, tensor: LazyTensor, matrix: int, config: Mapping[str, Any]) -> Division:
    """A layer whose output features are divided."""
    ndim = tensor.ndim
    if kind in (
        "prequant_scaling_factor",
        "activation_scaling_factor",
        "weights_scaling_factor_2",
        "alpha",
        "act_scale",
    ):
        return WHOLE
    axis = ndim - 1
    if kind == "weight" or (kind in ("weights_scaling_factor", "zero") and ndim == matrix):
        axis = ndim - 2
    elif tensor.size == 1 or not ndim or (ndim == matrix - 1 and ndim > 1 and tensor.shape[-1] == 1):
        return WHOLE  # one scale of the whole weight, or of each expert's
    if module == "attention.qkv":
        return Division(axis, "qkv")
    fused = module == "mlp.shared_expert.fc" or (matrix == 3 and module == "mlp.fc")
    if fused and config.get("hidden_act") in ("swiglu", "fast-swiglu", "geglu"):
        return Division(axis, "halves")
    return Division(axis)


def cut(tensor: LazyTensor, how: Division, rank: int, heads: Heads) -> LazyTensor:
    """A rank's part of a whole tensor; a view.

    Raises:
        LastingError: it cannot be divided so.
    """
    axis, count = how.axis, heads.ranks
    if axis is None or count == 1:
        return tensor
    length = tensor.shape[axis]
    if how.kind == "padded":
        rows = -(-length // count)
        whole = tensor if rows * count == length else tensor.pad(axis, rows * count)
        return whole.narrow(axis, rank * rows, rows)
    if how.kind == "qkv":
        return _cut_heads(tensor, axis, rank, heads)
    parts = 2 if how.kind == "halves" else 1
    if length % (parts * count):
        raise _indivisible(tensor, axis, parts * count)
    own = length // (parts * count)
    pieces = [tensor.narrow(axis, part * (length // parts) + rank * own, own) for part in range(parts)]
    return pieces[0] if parts == 1 else concatenate(pieces, axis)


def _cut_heads(tensor: LazyTensor, axis: int, rank: int, heads: Heads) -> LazyTensor:
    heads.check()
    unit = _head_rows(tensor, axis, heads.queries + 2 * heads.keys)
    queries, keys = heads.queries // heads.ranks, max(1, heads.keys // heads.ranks)
    first = rank // heads.copies if heads.copies > 1 else rank * keys
    pieces = [tensor.narrow(axis, rank * queries * unit, queries * unit)]
    for start in (heads.queries, heads.queries + heads.keys):
        pieces.append(tensor.narrow(axis, (start + first) * unit, keys * unit))
    return concatenate(pieces, axis)


def _head_rows(tensor: LazyTensor, axis: int, heads: int) -> int:
    """Rows of one head; of packed codes half as many."""
    if tensor.shape[axis] % heads:
        raise LastingError(
            "its rows are not those of the configuration's heads",
            expected=f"a multiple of {heads} along axis {axis}",
            found=tensor.shape,
        )
    return tensor.shape[axis] // heads


def join(parts: Sequence[LazyTensor], how: Division, heads: Heads) -> LazyTensor:
    """The whole tensor of the ranks' parts, in their order; padding stays.

    Raises:
        LastingError: the parts are not of one shape and type, or not those of heads.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.dtype != first.dtype or part.shape != first.shape:
            raise LastingError(
                "its parts do not fit one another",
                expected=f"{first.dtype.name} {first.shape}",
                found=f"{part.dtype.name} {part.shape}",
            )
    if how.axis is None or len(parts) == 1:
        return first
    if how.kind == "qkv":
        return _join_heads(parts, how.axis, heads)
    if how.kind == "halves":
        half = first.shape[how.axis] // 2
        pieces = [part.narrow(how.axis, start, half) for start in (0, half) for part in parts]
        return concatenate(pieces, how.axis)
    return concatenate(list(parts), how.axis)


def _join_heads(parts: Sequence[LazyTensor], axis: int, heads: Heads) -> LazyTensor:
    heads.check()
    queries, keys = heads.queries // heads.ranks, max(1, heads.keys // heads.ranks)
    unit = _head_rows(parts[0], axis, queries + 2 * keys)
    pieces = [part.narrow(axis, 0, queries * unit) for part in parts]
    for start in (queries, queries + keys):
        pieces += [part.narrow(axis, start * unit, keys * unit) for part in parts[:: heads.copies]]
    return concatenate(pieces, axis)


def copies(parts: Sequence[LazyTensor], how: Division, heads: Heads) -> list[tuple[LazyTensor, LazyTensor, int]]:
    """What several ranks have and must be equal: the first one's, another's, and the other's rank."""
    if how.axis is None:
        return [(parts[0], part, rank) for rank, part in enumerate(parts) if rank]
    if how.kind != "qkv" or heads.copies == 1:
        return []
    rows = heads.queries // heads.ranks * _head_rows(parts[0], how.axis, heads.queries // heads.ranks + 2)
    rest = [part.narrow(how.axis, rows, part.shape[how.axis] - rows) for part in parts]
    return [(rest[rank - rank % heads.copies], part, rank) for rank, part in enumerate(rest) if rank % heads.copies]


def _unknown(name: str) -> MappingError:
    return MappingError(
        "how tensor-parallel ranks divide this tensor is not known",
        tensor=name,
        expected="a tensor of TensorRT-LLM's decoders",
        remedy="open a checkpoint of one rank, or convert it with TensorRT-LLM's own tools",
    )


def _indivisible(tensor: LazyTensor, axis: int, count: int) -> LastingError:
    return LastingError(
        "cannot be divided among tensor-parallel ranks",
        expected=f"a multiple of {count} along axis {axis}",
        found=tensor.shape,
        remedy="choose another --tp",
    )
