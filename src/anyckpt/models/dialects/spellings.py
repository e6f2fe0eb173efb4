"""How Megatron and NeMo spell the hub's names, as data; and renaming between these spellings.

The hub's names are Megatron-Core's in Transformer Engine spelling, one tensor per layer.  Dialects differ from it by
a prefix, by stacking the layers (a distributed checkpoint has one tensor for all layers, with a leading layer axis),
and, when read, by the spelling of norms (local specification), of experts and of halves saved apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from anyckpt.config import meta_names
from anyckpt.config.hub_names import LANGUAGE
from anyckpt.errors import MappingError, UsageError, did_you_mean
from anyckpt.models.dialects import hybrid, trtllm
from anyckpt.models.dialects.before_core import EVIDENCE, core_names
from anyckpt.models.dialects.external import other_dialects, spelled_as
from anyckpt.models.dialects.mamba_sections import has_mixers, joined_mixers, separate_mixers
from anyckpt.models.dialects.wrappers import without_between
from anyckpt.tensor import LazyTensor, concatenate, stack


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

_LAYER = re.compile(r"((?:decoder|encoder)\.layers)\.(\d{1,7})\.(.+)")
_STACK = re.compile(r"((?:decoder|encoder)\.layers)\.(?!\d+\.)(.+)")
_MOST_LAYERS = 10_000
_MOST_EXPERTS = 100_000

IGNORED = (
    (re.compile(r".*\._extra_state(?:[./].*|\d*)?"), "Transformer Engine's state, which carries no weights"),
    (re.compile(r"(?:.*\.)?rotary_pos_emb\.inv_freq"), "rope frequencies, which follow from the configuration"),
)
"""Stored names that carry no weights."""

_NORMS = (
    ("input_layernorm", "self_attention.linear_qkv.layer_norm", "self_attention.linear_qkv.weight"),
    ("input_layernorm", "self_attention.in_proj.layer_norm", "self_attention.in_proj.weight"),
    ("pre_mlp_layernorm", "mlp.linear_fc1.layer_norm", "mlp.linear_fc1.weight"),
    (
        "self_attention.q_layernorm",
        "self_attention.linear_q_up_proj.layer_norm",
        "self_attention.linear_q_up_proj.weight",
    ),
    (
        "self_attention.kv_layernorm",
        "self_attention.linear_kv_up_proj.layer_norm",
        "self_attention.linear_kv_up_proj.weight",
    ),
    ("norm", "mixer.in_proj.layer_norm", "mixer.in_proj.weight"),
    ("input_layernorm", "self_attention.layer_norm", "self_attention.weight"),
    ("pre_mlp_layernorm", "mlp.layer_norm", "mlp.weight"),
)
"""Local specification's module, Transformer Engine's prefix of the fused norm, and the tensor that the layer must
have for the norm to be fused into it (the norm before mixture-of-experts or latent attention has no such home)."""

_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(linear_fc[12])\.(weight|bias)(\d{1,7})")
"""One expert's tensor under the hub's name, which is that of Transformer Engine's grouped layers."""

_EXPERT_MODULE = re.compile(r"(.+\.mlp\.experts)\.(?:local_experts|experts)\.(\d+)\.(linear_fc[12])\.(weight|bias)")
"""One expert's tensor where experts are modules of their own, or in a checkpoint of single experts."""

_EXPERT_STACK = re.compile(r"(.+\.mlp\.experts)\.experts\.(linear_fc[12])\.(weight|bias)")
"""All experts' tensor of a layer in a distributed checkpoint; the word is doubled there."""

_HALF = re.compile(r"(?P<whole>(?:.+\.)?linear_fc1\.(?:weight|bias)\d*)_(?P<half>[wv])")
"""Gate and up projection that ``singleton_local_shards`` saves apart."""


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
    stacked = any(_STACK.fullmatch(name) and not _is_ignored(name) for name in plain)
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
        _put(kept, plain, tensor, name)
    found: dict[str, LazyTensor] = {}
    for name, tensor in core_names(kept).items():
        for key, value in unstacked(name, tensor):
            _put(found, key, value, prefix + name)
    named = _fused_norms(_separate_experts(_joined_halves(joined_mixers(found))))
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
    named = hybrid.as_halves(tensors) if in_halves else dict(tensors)
    if target.stacked:
        named = _stacked_experts(separate_mixers(named))
        named = named if numbered or in_halves else _stacked(named)
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


def _put(tensors: dict[str, LazyTensor], key: str, tensor: LazyTensor, stored: str) -> None:
    if key in tensors:
        raise MappingError("two stored tensors are the same one of the model", tensor=stored, found=key)
    tensors[key] = tensor


def _is_ignored(name: str) -> str | None:
    return next((reason for pattern, reason in IGNORED if pattern.fullmatch(name)), None)


def unstacked(name: str, tensor: LazyTensor) -> Iterable[tuple[str, LazyTensor]]:
    """Every layer's part of a tensor, if its name says that it has all layers', else the tensor itself.

    Raises:
        MappingError: there are too many layers for a model.
    """
    match = _STACK.fullmatch(name)
    if match is None or not tensor.ndim:
        return [(name, tensor)]
    layers = tensor.shape[0]
    if layers > _MOST_LAYERS:
        raise MappingError("has too many layers", tensor=name, expected=f"at most {_MOST_LAYERS}", found=layers)
    return [(f"{match[1]}.{layer}.{match[2]}", tensor[layer]) for layer in range(layers)]


def _grouped(
    tensors: Mapping[str, LazyTensor], pattern: re.Pattern[str], place: Callable[[re.Match[str]], tuple[str, int]]
) -> tuple[dict[str, LazyTensor], dict[str, dict[int, LazyTensor]]]:
    """What is to be stacked, by its name and its number there; and all tensors with the first of each in its place."""
    stacks: dict[str, dict[int, LazyTensor]] = {}
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            key, number = place(match)
            stacks.setdefault(key, {})[number] = tensor
            result.setdefault(key, tensor)
    return result, stacks


def _stacked(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Layers stacked where all of a stack have the same tensors, as Megatron-Core does; otherwise as they are."""
    if has_mixers(tensors):
        return dict(tensors)  # Megatron-Core's MambaStack numbers its layers whatever they are
    result, stacks = _grouped(tensors, _LAYER, lambda layer: (f"{layer[1]}.{layer[3]}", int(layer[2])))
    for encoder_or_decoder in dict.fromkeys(key.partition(".")[0] for key in stacks):
        own = {key: layers for key, layers in stacks.items() if key.startswith(f"{encoder_or_decoder}.")}
        counts = {len(layers) for layers in own.values()}
        shapes_agree = all(len({(t.shape, t.dtype.name) for t in layers.values()}) == 1 for layers in own.values())
        if len(counts) > 1 or not shapes_agree or any(set(s) != set(range(len(s))) for s in own.values()):
            return dict(tensors)
        for key, layers in own.items():
            result[key] = stack([layers[number] for number in range(len(layers))])
    return result


def _separate_experts(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        module, whole = _EXPERT_MODULE.fullmatch(name), _EXPERT_STACK.fullmatch(name)
        if module is not None:
            _put(result, f"{module[1]}.{module[3]}.{module[4]}{module[2]}", tensor, name)
        elif whole is not None and tensor.ndim:
            if tensor.shape[0] > _MOST_EXPERTS:
                raise MappingError(
                    "has too many experts", tensor=name, expected=f"at most {_MOST_EXPERTS}", found=tensor.shape[0]
                )
            for expert in range(tensor.shape[0]):
                _put(result, f"{whole[1]}.{whole[2]}.{whole[3]}{expert}", tensor[expert], name)
        else:
            _put(result, name, tensor, name)
    return result


def _stacked_experts(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The experts of a layer stacked, as distributed checkpoints have them."""
    result, stacks = _grouped(tensors, _EXPERT, lambda one: (f"{one[1]}.experts.{one[2]}.{one[3]}", int(one[4])))
    for key, experts in stacks.items():
        if set(experts) != set(range(len(experts))):
            missing = min(set(range(len(experts))) - set(experts))
            raise MappingError(f"expert {missing} is missing", tensor=key)
        result[key] = stack([experts[number] for number in range(len(experts))])
    return result


def _joined_halves(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        found = _HALF.fullmatch(name)
        if found is None:
            _put(result, name, tensor, name)
            continue
        gate, up = (tensors.get(f"{found['whole']}_{half}") for half in "wv")
        if gate is None or up is None:
            raise MappingError("the other half of a gated projection is missing", tensor=name)
        if found["half"] == "w":
            _put(result, found["whole"], concatenate([gate, up], 0), name)
    return result


def _fused_norms(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Norms under Transformer Engine's names: fused into the linear layer after them where the layer has one."""
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        key = name
        match = _LAYER.fullmatch(name)
        if match is not None:
            layer = f"{match[1]}.{match[2]}."
            for module, fused, home in _NORMS:
                if match[3].startswith(f"{module}.") and layer + home in tensors:
                    key = layer + fused + match[3][len(module) :].replace(".", "_")
                elif match[3].startswith(f"{fused}_") and layer + home not in tensors:
                    key = f"{layer}{module}.{match[3][len(fused) + 1 :]}"
        _put(result, key, tensor, name)
    return result
