"""How Megatron and NeMo spell the hub's names, as data; and renaming between these spellings.

The hub's names are Megatron-Core's in Transformer Engine spelling, one tensor per layer.  Dialects differ from it by
a prefix, by stacking the layers (a distributed checkpoint has one tensor for all layers, with a leading layer axis),
and, when read, by the spelling of norms (local specification), of experts and of halves saved apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeGuard

from anyckpt.config import meta_names
from anyckpt.config.hub_names import LANGUAGE
from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError, did_you_mean
from anyckpt.models.dialects import hybrid, trtllm
from anyckpt.models.dialects.before_core import EVIDENCE, core_names
from anyckpt.models.dialects.external import other_dialects, spelled_as
from anyckpt.models.dialects.mamba_sections import joined_mixers, separate_mixers
from anyckpt.models.dialects.tensors_of_layers import (
    fused_norms,
    is_of_all_layers,
    joined_halves,
    put,
    separate_experts,
    stacked,
    stacked_experts,
    unstacked,
)
from anyckpt.models.dialects.wrappers import without_between
from anyckpt.tensor import LazyTensor


@dataclass(frozen=True)
class Dialect:
    """A spelling of the hub's names.

    Attributes:
        name: as formats name it.
        prefix: precedes every name.
        stacked: the layers of one tensor are stacked along a leading axis, if all layers have the same tensors.
    """

    name: str
    prefix: str
    stacked: bool


DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect("hub", "", False),
        Dialect("megatron-core", "", True),
        Dialect("nemo-flat", "model.", False),
        Dialect("nemo-sharded", "model.", True),
        Dialect("nemo2", "module.", True),
    )
}
"""The spellings that are written.  ``hub`` is Megatron-LM's and plain Megatron-Core's state dict."""

_PREFIXES = (
    "",
    "model.",
    "module.",
    "model.module.",
    "module.module.",
    "enc_dec_model.",
    "enc_dec_model.module.",
)
"""Wrappers of a module by Megatron's, NeMo's and PyTorch's classes; ``model.module.`` is ``megatron_amp_O2``, and
``enc_dec_model.`` is NeMo 1's T5."""

_WRAPPERS = r"(?:(?:model|module|net|_orig_mod|_forward_module|_fsdp_wrapped_module|base_model)\.)*"
_FAMILIES = re.compile(
    r"(?:.+\.)?(?:(?:model|language_model|backbone|gpt_neox)\.layers|transformer\.(?:h|blocks|encoder\.layers))\.\d"
    rf"|{_WRAPPERS}(?:(?:bert|vit|vision_model)\.)?encoder\."
    r"(?:layer\.\d|block\.\d|layers\.\d+\.self_attn\.[qkv]_proj)"
    rf"|{_WRAPPERS}(?:vit\.)?layers\.\d+\.attention\.[qkv]_proj"
)
"""How layers are named by transformers' decoders, wrapped or not, and by its encoders in wrappers of some names: as
parts of other models these are not transformers' own."""

_EVIDENCE = re.compile(
    EVIDENCE + r"|embedding\.word_embeddings\.weight|encoder\.layers\.(?:\d+\.)?self_attn\.linear_pos\."
    r"|(?:decoder|encoder)\.layers\.(?:\d+\.)?(?:self_attention\.linear_|mlp\.linear_fc|mlp\.experts\.|mixer\.in_proj|self_attention\.in_proj)"
)
"""Names that only Megatron gives: other models have an ``encoder.layers.0`` too.  Of NeMo's Conformers, which Megatron
has not, the hub's names are NeMo's."""

_TEXT = re.compile(
    rf"(((?:model\.|module\.)*)(?:thinker\.)?{re.escape(LANGUAGE)})decoder\.layers\.(?:\d+\.)?"
    r"(?:self_attention\.(?:linear_|in_proj)|mlp\.(?:linear_fc|experts\.)|mixer\.in_proj)"
)
"""A name of Megatron-Core's layers in such a part; Megatron-LM's older modules, called so too, have none of these."""

IGNORED = (
    (re.compile(r".*\._extra_state(?:[./].*|\d*)?"), "Transformer Engine's state, which carries no weights"),
    (re.compile(r"(?:.*\.)?rotary_pos_emb\.inv_freq"), "rope frequencies, which follow from the configuration"),
)
"""Stored names that carry no weights."""


def detect(names: Iterable[str]) -> str | None:
    """The dialect of a model's stored names: ``hf``, one of ``meta_names.SPELLINGS``, ``trtllm``, one of ``DIALECTS``,
    another package's, or None."""
    known = list(names)
    if (spelled := meta_names.spelling(known)) is not None:
        return spelled
    if trtllm.is_of(known):
        return trtllm.NAME
    if text_prefix(known) is None and any(_FAMILIES.match(without_between(name)) for name in known):
        return "hf"
    prefix = find_prefix(known)
    if prefix is None:
        other = spelled_as(known)
        return None if other is None else other.name
    plain = [name[len(prefix) :] for name in known if name.startswith(prefix)]
    prefix = _outer(prefix)
    stacked = any(is_of_all_layers(name) and not _is_ignored(name) for name in plain)
    if prefix == "":
        return "megatron-core" if stacked else "hub"
    if prefix.startswith(("model.", "enc_dec_model.")):
        return "nemo-sharded" if stacked else "nemo-flat"
    return "nemo2"


def find_prefix(names: Iterable[str]) -> str | None:
    """The wrapper's prefix of Megatron names, or None if they are not Megatron names."""
    known = list(names)
    of_text = text_prefix(known)
    if of_text is not None:
        return of_text
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) and _EVIDENCE.match(name, len(prefix)) for name in known):
            return prefix
    return None


def text_prefix(names: Iterable[str]) -> str | None:
    """What Megatron's names of the text part of a larger model begin with; None if there is no such part."""
    found = (_TEXT.match(name) for name in names if LANGUAGE in name)
    return next((match[1] for match in found if match is not None), None)


def text_and_beside(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """Megatron's tensors that are a text part's, or all, and those of the larger model's other parts, unwrapped."""
    prefix = text_prefix(tensors)
    if prefix is None:
        return dict(tensors), {}
    outer = _outer(prefix)
    text = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix) or _is_ignored(name)}
    return text, {name.removeprefix(outer): tensor for name, tensor in tensors.items() if name not in text}


def _outer(prefix: str) -> str:
    """What is before all names of a larger model, by that of its text part."""
    return prefix.removesuffix(LANGUAGE).removesuffix("thinker.")


def with_beside(
    text: Mapping[str, LazyTensor], beside: Mapping[str, LazyTensor], dialect: str, language: str = LANGUAGE
) -> dict[str, LazyTensor]:
    """The inverse of ``text_and_beside``, of tensors under a dialect's names."""
    outer = by_name(dialect).prefix
    named = {outer + language + name.removeprefix(outer): tensor for name, tensor in text.items()}
    return {**named, **{outer + name: tensor for name, tensor in beside.items()}}


def to_hub_names(
    tensors: Mapping[str, LazyTensor], *, in_blocks: bool = True
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Tensors of any Megatron dialect under the hub's names, and what carries no weights, with the reason.

    Names that no dialect has are kept as they are.

    Args:
        tensors: by stored name.
        in_blocks: two layers of a HybridModel that are the halves of one block are one layer; else each is as it is.

    Raises:
        MappingError: two stored tensors are the same hub tensor, or halves do not fit together.
    """
    found_prefix = find_prefix(tensors)
    other = spelled_as(tensors) if found_prefix is None else None
    if other is not None:
        tensors = other.to_hub(tensors)
    prefix = found_prefix or ""
    kept: dict[str, LazyTensor] = {}
    ignored: dict[str, str] = {}
    for name, tensor in tensors.items():
        reason = _is_ignored(name)
        if reason is not None:
            ignored[name] = reason
            continue
        plain = name[len(prefix) :] if name.startswith(prefix) else name
        plain = plain.replace(".mtp_model_layer.", ".transformer_layer.", 1)  # Megatron-Core's main branch
        put(kept, plain, tensor, name)
    found: dict[str, LazyTensor] = {}
    for name, tensor in core_names(kept).items():
        for key, value in unstacked(name, tensor):
            put(found, key, value, prefix + name)
    named = fused_norms(separate_experts(joined_halves(joined_mixers(found))))
    return hybrid.as_blocks(named) if in_blocks and hybrid.in_halves(named) else named, ignored


def from_hub_names(
    tensors: Mapping[str, LazyTensor], dialect: str, *, numbered: bool = False, in_halves: bool = False
) -> dict[str, LazyTensor]:
    """Tensors under a dialect's names, from the hub's.

    Args:
        tensors: by hub name.
        dialect: one of ``DIALECTS``, or of another package's.
        numbered: layers are never stacked: Megatron-Core numbers those of a heterogeneous model, though they be alike.
        in_halves: blocks are two layers each, as HybridModel has them, which numbers them, too.

    Raises:
        UsageError: no such dialect.
        MappingError: an expert is missing, or a HybridModel has no such tensor.
    """
    if dialect not in DIALECTS and dialect in other_dialects():
        return other_dialects()[dialect].from_hub(tensors)
    target = by_name(dialect)
    named = hybrid.as_halves(tensors) if in_halves else hybrid.with_stacks(tensors)
    if target.stacked:
        named = stacked_experts(separate_mixers(named))
        named = named if numbered or in_halves else stacked(named)
    return {target.prefix + name: tensor for name, tensor in named.items()}


def rename(
    tensors: Mapping[str, LazyTensor], source: str, target: str, *, in_halves: bool | None = None
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Tensors of a model of no known family from one Megatron dialect to another, and what is left out and why.

    Args:
        tensors: by stored name.
        source: the dialect that they are of.
        target: the dialect that they get.
        in_halves: whether blocks are two layers each, as HybridModel has them; None for as they are.

    Raises:
        UsageError: no such dialect.
        MappingError: two stored tensors are the same tensor.
    """
    if source == target and in_halves is None:
        return dict(tensors), {}
    text, beside = text_and_beside(tensors)
    named, ignored = to_hub_names(text, in_blocks=in_halves is not None)
    renamed = from_hub_names(named, target, in_halves=bool(in_halves))
    prefix = text_prefix(tensors) or LANGUAGE
    language = prefix.removeprefix(_outer(prefix))
    return with_beside(renamed, beside, target, language) if beside else renamed, ignored


def is_megatron(name: str | None) -> TypeGuard[str]:
    """Whether a dialect names the hub's tensors: ours, or one of another package."""
    return name is not None and name != "hf" and (name in DIALECTS or name in other_dialects())


def by_name(name: str) -> Dialect:
    """The dialect of ours that is called ``name``.

    Raises:
        UsageError: there is none.
    """
    if name not in DIALECTS:
        known = ("hf", *meta_names.SPELLINGS, *DIALECTS, *other_dialects())
        raise UsageError(
            f"unknown dialect {name!r}",
            expected=f"one of {', '.join(known)}",
            remedy=did_you_mean(name, dict.fromkeys(known, "")),
        )
    return DIALECTS[name]


def _is_ignored(name: str) -> str | None:
    return next((reason for pattern, reason in IGNORED if pattern.fullmatch(name)), None)
