"""Meta's names of a decoder's tensors, which Mistral's and torchtitan's code share, and their order of rotary rows.

Tensors are those of transformers, one to one.  Where rotary embeddings turn neighbouring rows of a head (Meta's
complex numbers) rather than its halves (transformers), queries and keys are stored in another order of rows:
transformers' row ``h, half, i`` is Meta's ``h, i, half``, as transformers' own ``convert_llama_weights_to_hf`` of 4.x
has it.  Facts: that script and Mistral's; ``state_dict_adapter.py`` of torchtitan's models, which since torchtitan
0.5 calls the three projections ``attention.qkv_linear.wq`` and the output layer ``lm_head``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import NamedTuple

from anyckpt.config.model import ModelConfig
from anyckpt.config.starred import filled, starred
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError
from anyckpt.tensor import LazyTensor

SPELLINGS = ("meta", "torchtitan")
"""The two dialects: Meta's, Mistral's and that of torchtitan before 0.5; and torchtitan's since."""

HEAD, EMBEDDING = "output.weight", "tok_embeddings.weight"

_IGNORED = (
    (re.compile(r"(?:.+\.)?rope\.freqs|(?:.+\.)?freqs_cis"), "rope frequencies, which follow from the configuration"),
)
_WRAPPERS = frozenset({"_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module"})
"""Segments that wrappers of torch put anywhere in a name."""
_PREFIX = r"(?:(?:model|module)\.)*"
_EVIDENCE = re.compile(rf"{_PREFIX}layers\.\d+\.attention\.(qkv_linear\.)?wq\.weight")
_NEWER = re.compile(r"attention\.(w[qkv])\.")
_OLDER = re.compile(r"attention\.qkv_linear\.(w[qkv])\.")


class Pair(NamedTuple):
    """One tensor under both names.

    Attributes:
        family: pattern of the family's own name, as in its rules.
        meta: pattern of Meta's; stars are the same indices.
        heads: field of the configuration that counts the heads whose rows are in the other order; "" for none.
    """

    family: str
    meta: str
    heads: str = ""


@dataclass(frozen=True)
class MetaNames:
    """How Meta's code, and code after it, names a family's tensors.

    Attributes:
        pairs: every tensor that a rule of the family may name.
        params: keys of which Meta's or Mistral's configuration of such a model has one; none if any other will do.
    """

    pairs: tuple[Pair, ...]
    params: tuple[str, ...] = ()


LAYER = "model.layers.*"
ATTENTION = (
    Pair("model.embed_tokens.weight", EMBEDDING),
    Pair(f"{LAYER}.input_layernorm.weight", "layers.*.attention_norm.weight"),
    Pair(f"{LAYER}.self_attn.q_proj.weight", "layers.*.attention.wq.weight", "num_attention_heads"),
    Pair(f"{LAYER}.self_attn.k_proj.weight", "layers.*.attention.wk.weight", "num_query_groups"),
    Pair(f"{LAYER}.self_attn.v_proj.weight", "layers.*.attention.wv.weight"),
    Pair(f"{LAYER}.self_attn.o_proj.weight", "layers.*.attention.wo.weight"),
    Pair(f"{LAYER}.post_attention_layernorm.weight", "layers.*.ffn_norm.weight"),
    Pair("model.norm.weight", "norm.weight"),
    Pair("lm_head.weight", HEAD),
)
"""What Llama has but its feed-forward layers."""

FEED_FORWARD = (
    Pair(f"{LAYER}.mlp.gate_proj.weight", "layers.*.feed_forward.w1.weight"),
    Pair(f"{LAYER}.mlp.down_proj.weight", "layers.*.feed_forward.w2.weight"),
    Pair(f"{LAYER}.mlp.up_proj.weight", "layers.*.feed_forward.w3.weight"),
)

EXPERTS = (
    Pair(f"{LAYER}.block_sparse_moe.gate.weight", "layers.*.feed_forward.gate.weight"),
    *(
        Pair(f"{LAYER}.block_sparse_moe.experts.*.{name}.weight", f"layers.*.feed_forward.experts.*.{name}.weight")
        for name in ("w1", "w2", "w3")
    ),
)
"""Those of Mixtral, as ``mistral_inference`` names them."""

LLAMA = MetaNames((*ATTENTION, *FEED_FORWARD))


def in_halves(names: MetaNames, *more: Pair, params: tuple[str, ...]) -> MetaNames:
    """The same names and others, of a family whose rows are in transformers' order in torchtitan, too."""
    return MetaNames((*(pair._replace(heads="") for pair in names.pairs), *more), params)


@dataclass(frozen=True)
class FamilyNamed:
    """Tensors under a family's own names.

    Attributes:
        names: the table.
        prefix: of the stored names.
        dialect: of ``SPELLINGS``, which they are of.
        tensors: of the model, and what is not known to the table under its stored name.
        spelled: family's name -> stored name, where it is another.
        ignored: stored names that carry no weights, with the reason.
    """

    names: MetaNames
    prefix: str
    dialect: str
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    def stored(self, name: str) -> str:
        """The stored name of a tensor that the family calls ``name``, or what it would be if it were there."""
        known = self.spelled.get(name)
        own = None if known is not None or name in self.tensors else _own_name(name, self.names)
        return (known or name) if own is None else self.prefix + _respelled(own[0], self.dialect)


def spelling(names: Iterable[str]) -> str | None:
    """Which of ``SPELLINGS`` a model's stored names are of, or None."""
    known = [plain(name) for name in names]
    found = next((match for name in known if (match := _EVIDENCE.fullmatch(name))), None)
    if found is None or not any(name.endswith(EMBEDDING) for name in known):
        return None
    return SPELLINGS[found[1] is not None]


def plain(name: str) -> str:
    """A stored name without what wrappers of torch put into it."""
    parts = name.split(".")
    return name if _WRAPPERS.isdisjoint(parts) else ".".join(part for part in parts if part not in _WRAPPERS)


def meta_name(name: str) -> str:
    """A stored name as Meta has it, whichever of the two spellings and wrappers it has."""
    bare = re.sub(rf"^{_PREFIX}", "", plain(name), count=1)
    return HEAD if bare == "lm_head.weight" else _OLDER.sub(r"attention.\1.", bare, count=1)


def to_family(tensors: Mapping[str, LazyTensor], names: MetaNames, config: ModelConfig) -> FamilyNamed:
    """Stored tensors under the family's names, rows in transformers' order; views.

    Raises:
        MappingError: two stored tensors are the same one, or rows are not of that many heads.
    """
    embedding = next((plain(name) for name in tensors if name.endswith(EMBEDDING)), EMBEDDING)
    result = FamilyNamed(names, embedding.removesuffix(EMBEDDING), spelling(tensors) or SPELLINGS[0])
    for name, tensor in tensors.items():
        reason = next((text for pattern, text in _IGNORED if pattern.fullmatch(name)), None)
        if reason is not None:
            result.ignored[name] = reason
            continue
        key, heads = family_name(name, names)
        if key in result.tensors:
            raise MappingError("two stored tensors are the same one of the model", tensor=name, found=key)
        result.tensors[key] = _halves(name, tensor, getattr(config, heads)) if heads else tensor
        if key != name:
            result.spelled[key] = name
    return result


def family_name(name: str, names: MetaNames) -> tuple[str, str]:
    """What the family calls a stored tensor, and the field of ``Pair.heads``; the name itself if no pair has it."""
    own = meta_name(name)
    for pair in names.pairs:
        match = starred(pair.meta).fullmatch(own)
        if match is not None:
            return filled(pair.family, match.groups()), pair.heads
    return name, ""


def from_family(
    tensors: Mapping[str, LazyTensor], names: MetaNames, config: ModelConfig, wanted: str
) -> dict[str, LazyTensor]:
    """A family's tensors under one of ``SPELLINGS``, rows in Meta's order; views.

    Raises:
        MappingError: Meta's code has no such tensor.
    """
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        found = _own_name(name, names)
        if found is None:
            raise MappingError(
                "Meta's and torchtitan's models have no such tensor",
                tensor=name,
                remedy="convert to another naming, or to safetensors, torch or dcp, which keep names",
            )
        own, heads = found
        result[_respelled(own, wanted)] = _neighbours(name, tensor, getattr(config, heads)) if heads else tensor
    return result


def _respelled(own: str, dialect: str) -> str:
    """One of Meta's names as a dialect has it."""
    if dialect == SPELLINGS[0]:
        return own
    return "lm_head.weight" if own == HEAD else _NEWER.sub(r"attention.qkv_linear.\1.", own, count=1)


def _own_name(name: str, names: MetaNames) -> tuple[str, str] | None:
    """Meta's name of one of the family's tensors, and the field of ``Pair.heads``; None if there is none."""
    for pair in names.pairs:
        match = starred(pair.family).fullmatch(name)
        if match is not None:
            return filled(pair.meta, match.groups()), pair.heads
    return None


def _halves(name: str, tensor: LazyTensor, heads: int) -> LazyTensor:
    """Rows of each head that alternate between its halves, one half after the other."""
    return _regrouped(name, tensor, heads, (-1, 2))


def _neighbours(name: str, tensor: LazyTensor, heads: int) -> LazyTensor:
    """The halves of each head row by row in turn."""
    return _regrouped(name, tensor, heads, (2, -1))


def _regrouped(name: str, tensor: LazyTensor, heads: int, pair: tuple[int, int]) -> LazyTensor:
    shape = tensor.shape
    if not shape or shape[0] % (2 * heads):
        raise MappingError(
            "its rows are not those of pairs in that many heads",
            tensor=name,
            expected=f"a multiple of {2 * heads} rows",
            found=shape,
            remedy="give the configuration that belongs to these weights with --config",
        )
    half = shape[0] // (2 * heads)
    first, second = (half if length < 0 else length for length in pair)
    grouped = tensor.reshape((heads, first, second, *shape[1:]))
    return grouped.permute((0, 2, 1, *range(3, grouped.ndim))).reshape(shape)
