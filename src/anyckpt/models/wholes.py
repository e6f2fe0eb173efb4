"""Larger models of which a family's model is the text part: how their tensors are named, here and in Megatron.

In Megatron's multimodal models the text part is called ``language_model``, and its names are the hub's.  Whatever else
there is (towers, projectors) is carried as it is under its own name, ``model.`` taken off; the table below has what is
otherwise.  Of a type that it has not, names are recorded as they are stored, else they are those of transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field, replace
from typing import Any

from anyckpt.config.hub_names import LANGUAGE
from anyckpt.config.model import WHOLE, WHOLE_NAMES, ModelConfig
from anyckpt.config.own_part import of_place
from anyckpt.config.possible import LARGEST
from anyckpt.config.spellings import Variant
from anyckpt.config.starred import filled, starred
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError
from anyckpt.models.dialects import spellings
from anyckpt.models.dialects.wrappers import Wrapper, base_of
from anyckpt.models.families.parts import experts
from anyckpt.models.hub import Model
from anyckpt.models.language.rule_operations import CONCATENATED_QKV, IDENTITY, TRANSPOSED, Operation
from anyckpt.models.language.variants import stored_names, with_experts
from anyckpt.tensor import LazyTensor

_MODEL = "model."


@dataclass(frozen=True)
class Moved:
    """What becomes of another part's tensor in Megatron.

    Attributes:
        name: pattern of its name there, with as many stars.
        operation: how it becomes that; sizes are the tower's.
    """

    name: str
    operation: Operation = IDENTITY


@dataclass(frozen=True, kw_only=True)
class Whole:
    """How a larger model's tensors are named.

    Attributes:
        model_types: whose they are.
        text: what Hugging Face's names of the text part begin with, in place of ``model.``.
        head: what is before the names that do not begin so, such as ``lm_head.weight``.
        language: what Megatron's names of the text part begin with.
        again: what begins another part's names -> what begins Megatron's.
        parts: what the other parts' names begin with.
        stored: the same by the first word of what follows, for some parts.
        moved: pattern of another part's name without that -> what becomes of it in Megatron.
        tower: what begins Megatron's names of a part that is made of Megatron-Core's layers.
        heads: keys of ``config.json`` that lead to the number of heads of that part.
        variants: of the text part's names, those that are written.
    """

    model_types: tuple[str, ...] = ()
    text: str = "model.language_model."
    head: str = ""
    language: str = LANGUAGE
    again: Mapping[str, str] = field(default_factory=dict)
    parts: str = _MODEL
    stored: Mapping[str, str] = field(default_factory=dict)
    moved: Mapping[str, Moved] = field(default_factory=dict)
    tower: str = ""
    heads: tuple[str, ...] = ("vision_config", "num_heads")
    variants: tuple[Variant, ...] = ()


def _linear(own: str, megatron: str, operation: Operation = IDENTITY) -> dict[str, Moved]:
    """A linear layer or a norm of a tower; of Megatron's names what is before ``weight`` and ``bias``."""
    return {f"{own}.{part}": Moved(f"{megatron}{part}", operation) for part in ("weight", "bias")}


_BLOCK, _LAYER = "visual.blocks.*", "vision_model.decoder.layers.*"
_QWEN3_TOWER = {
    **_linear("visual.patch_embed.proj", "vision_model.patch_embed.proj."),
    "visual.pos_embed.weight": Moved("vision_model.pos_embed.weight"),
    **_linear(f"{_BLOCK}.norm1", f"{_LAYER}.self_attention.linear_qkv.layer_norm_"),
    **_linear(f"{_BLOCK}.attn.qkv", f"{_LAYER}.self_attention.linear_qkv.", CONCATENATED_QKV),
    **_linear(f"{_BLOCK}.attn.proj", f"{_LAYER}.self_attention.linear_proj."),
    **_linear(f"{_BLOCK}.norm2", f"{_LAYER}.mlp.linear_fc1.layer_norm_"),
    **_linear(f"{_BLOCK}.mlp.linear_fc1", f"{_LAYER}.mlp.linear_fc1."),
    **_linear(f"{_BLOCK}.mlp.linear_fc2", f"{_LAYER}.mlp.linear_fc2."),
    **{
        name: moved
        for own, there in (
            ("visual.merger", "vision_model.merger"),
            ("visual.deepstack_merger_list.*", "vision_model.decoder.deepstack_merger_list.*"),
        )
        for module, megatron in (("norm", "patch_norm"), ("linear_fc1", "linear_fc1"), ("linear_fc2", "linear_fc2"))
        for name, moved in _linear(f"{own}.{module}", f"{there}.{megatron}.").items()
    },
}
_QWEN3 = Whole(model_types=("qwen3_vl", "qwen3_5"), moved=_QWEN3_TOWER, tower="vision_model.")
_LLAVA = Whole(
    model_types=(
        "llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "paligemma", "aya_vision", "mistral3",
        "internvl", "mllama", "got_ocr2", "fuyu", "llama4",
    ),
    text="language_model.model.", head="language_model.", parts="",
)  # fmt: skip
WHOLES = (
    _QWEN3,
    replace(_QWEN3, model_types=("qwen3_vl_moe",), variants=experts.STACKED_TRANSPOSED),
    replace(_QWEN3, model_types=("qwen3_5_moe",), variants=experts.STACKED_WRITTEN),
    _LLAVA,
    replace(
        _LLAVA,
        model_types=("gemma3",),
        moved={
            "multi_modal_projector.mm_soft_emb_norm.weight": Moved("multi_modal_projector.mm_soft_embed_norm.weight"),
            "multi_modal_projector.mm_input_projection_weight": Moved("multi_modal_projector.proj.weight", TRANSPOSED),
        },
    ),
    Whole(model_types=("idefics2", "idefics3", "smolvlm"), text="model.text_model."),
    Whole(
        model_types=("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), text=_MODEL, parts=""
    ),
    Whole(
        model_types=("qwen2_5_omni", "qwen3_omni_moe"),
        text="thinker.model.",
        head="thinker.",
        language=f"thinker.{LANGUAGE}",
        again={"thinker.audio_tower.": "thinker.audio_model."},
        parts="",
    ),
)
"""As they are published, and as transformers 5.24 saves them; Megatron's are those of Megatron-Bridge 0.6.2."""

_ANY = Whole()


def whole_of(model: Model) -> Whole:
    """How the larger model whose text part a model is is named."""
    known = published(model.config)
    if known is not None:
        return known
    stored = model.config.extra.get(WHOLE_NAMES)
    if stored is None:
        return _ANY
    return replace(_ANY, text=stored["text"], head=stored["head"], stored=stored["parts"])


def published(config: ModelConfig) -> Whole | None:
    """How a larger model of this type is published; None if that is not known."""
    model_type = config.extra[WHOLE].get("model_type")
    return next((whole for whole in WHOLES if model_type in whole.model_types), None)


def stored_names_of(wrapper: Wrapper, parts: Iterable[str]) -> dict[str, Any]:
    """How a larger model's tensors are named that a checkpoint has, where its type tells nothing.

    Args:
        wrapper: of its text part.
        parts: stored names of the others.
    """
    begins = {name.removeprefix(_MODEL).partition(".")[0]: name.startswith(_MODEL) for name in parts}
    inside = {word: _MODEL if before else "" for word, before in begins.items()}
    return {"text": wrapper.prefix, "head": wrapper.outer, "parts": inside}


def beside_in_megatron(model: Model, beside: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The other parts under Megatron's names, from those that do not depend on the release of transformers.

    Raises:
        MappingError: a tower's sizes do not fit its tensors.
    """
    known = whole_of(model)
    result: dict[str, LazyTensor] = {}
    for name, tensor in beside.items():
        found = _found(name, {pattern: pattern for pattern in known.moved})
        if found is None:
            result[_again(name, known.again)] = tensor
        else:
            moved = known.moved[found[0]]
            result[filled(moved.name, found[1])] = moved.operation.to_hub([tensor], _tower(known, model, name, tensor))
    layers, others = _by_tower(known, result)
    return {
        **others,
        **{known.tower + name: t for name, t in spellings.from_hub_names(layers, "megatron-core").items()},
    }


def beside_from_megatron(model: Model, beside: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The inverse of ``beside_in_megatron``.

    Raises:
        MappingError: a tower's sizes do not fit its tensors.
    """
    known = whole_of(model)
    layers, named = _by_tower(known, beside)
    named |= {known.tower + name: tensor for name, tensor in spellings.to_hub_names(layers)[0].items()}
    back = {moved.name: own for own, moved in known.moved.items()}
    result: dict[str, LazyTensor] = {}
    for name, tensor in named.items():
        found = _found(name, back)
        if found is None:
            result[_again(name, {there: own for own, there in known.again.items()})] = tensor
        else:
            operation = known.moved[found[0]].operation
            result[filled(*found)] = operation.from_hub(tensor, _tower(known, model, name, tensor))[0]
    return result


def _again(name: str, begins: Mapping[str, str]) -> str:
    """A name that begins otherwise, if it begins with one of these."""
    return next((other + name[len(own) :] for own, other in begins.items() if name.startswith(own)), name)


def _found(name: str, patterns: Mapping[str, str]) -> tuple[str, tuple[str, ...]] | None:
    """What the pattern of a name leads to, and the numbers in the name."""
    for pattern, other in patterns.items():
        match = starred(pattern).fullmatch(name)
        if match is not None:
            return other, match.groups()
    return None


def _by_tower(known: Whole, named: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """Tensors of a part of Megatron-Core's layers, without its prefix, and all others."""
    inside = {name: tensor for name, tensor in named.items() if known.tower and name.startswith(known.tower)}
    others = {name: tensor for name, tensor in named.items() if name not in inside}
    return {name.removeprefix(known.tower): tensor for name, tensor in inside.items()}, others


def _tower(known: Whole, model: Model, name: str, tensor: LazyTensor) -> ModelConfig:
    """What operations on a tensor of a tower need to know of it."""
    if not name.endswith((".qkv.weight", ".qkv.bias", ".linear_qkv.weight", ".linear_qkv.bias")):
        return model.config
    heads = of_place(model.config.extra[WHOLE], known.heads)
    rows = tensor.shape[0] if tensor.ndim else 0
    if type(heads) is not int or not 0 < heads < LARGEST or rows % (3 * heads):
        raise MappingError(
            f"its rows are not query, key and value of the heads that config.json's {'.'.join(known.heads)} says",
            tensor=name, expected=f"a multiple of three times {heads}", found=rows,
        )  # fmt: skip
    return replace(
        model.config, num_attention_heads=heads, num_query_groups=heads, kv_channels=max(1, rows // (3 * heads))
    )


def as_published(
    model: Model, text: Mapping[str, LazyTensor], beside: Mapping[str, LazyTensor], form: str | None = None
) -> dict[str, LazyTensor]:
    """The larger model under Hugging Face's names.

    Args:
        model: its text part.
        text: under the family's names.
        beside: the other parts, under names that do not depend on the release of transformers.
        form: of experts, as a user asks for it; None for the type's.
    """
    known = whole_of(model)
    variants = (*known.variants, *model.definition.hugging_face.variants)
    variants = with_experts(variants, form, model.family)
    base = base_of(model.definition.rules)
    named = {
        known.text + name.removeprefix(base) if name.startswith(base) else known.head + name: tensor
        for name, tensor in stored_names(text, variants).items()
    }
    begins = {name: known.stored.get(name.partition(".")[0], known.parts) for name in beside}
    return {**named, **{begins[name] + name: tensor for name, tensor in beside.items()}}
