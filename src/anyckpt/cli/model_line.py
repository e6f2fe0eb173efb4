"""What a model is, in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

_MIXERS = {"M": "Mamba", "*": "attention", "-": "MLP", "E": "expert"}
"""Megatron-Core's letters for the layers of a hybrid model."""


def model_line(model: Mapping[str, Any]) -> str:
    """The sizes that a model of its kind has.

    Args:
        model: ``Inspection.model``.
    """
    mixers = Counter(model["hybrid_override_pattern"] or "*-E")
    facts = [_layers(model), f"MLP {model['ffn_hidden_size']:,}" if mixers["-"] or mixers["E"] else ""]
    if mixers["*"]:
        facts.append(_heads(model))
    if mixers["M"]:
        facts.append(f"{model['mamba_num_heads']} Mamba heads of {model['mamba_head_dim']}")
    if model["num_moe_experts"] is not None:
        facts.append(f"{model['num_moe_experts']} experts, {model['moe_router_topk']} for a token")
    facts += _sound(model) if model["subsampling_factor"] is not None else []
    facts += _images(model) if model["img_h"] is not None else _vocabulary(model)
    return ", ".join(filter(None, facts))


def sizes_line(sizes: Mapping[str, int]) -> str:
    """What a configuration says of a model whose family is unknown, as far as it says it.

    Args:
        sizes: ``Inspection.sizes``.
    """
    words = {
        "num_layers": "layer",
        "num_attention_heads": "head",
        "num_query_groups": "query group",
        "num_moe_experts": "expert",
        "padded_vocab_size": "vocabulary row",
    }
    counts = {
        name: f"{sizes[name]:,} {word}{'s' * (sizes[name] != 1)}" for name, word in words.items() if name in sizes
    }
    widths = {"hidden_size": "width", "ffn_hidden_size": "MLP"}
    told = {**counts, **{name: f"{word} {sizes[name]:,}" for name, word in widths.items() if name in sizes}}
    order = ("num_layers", *widths, *words)
    return (
        f"{', '.join(told[name] for name in dict.fromkeys(order) if name in told)}, by its configuration"
        if told
        else ""
    )


def _layers(model: Mapping[str, Any]) -> str:
    count, pattern = model["num_layers"], model["hybrid_override_pattern"]
    if model["encoder_num_layers"] is not None:
        layers = f"{model['encoder_num_layers']} encoder and {count} decoder layers"
    else:
        layers = f"{count} layer{'' if count == 1 else 's'}"
    kinds = Counter(pattern or "")
    known = [f"{kinds[letter]} {name}" for letter, name in _MIXERS.items() if kinds[letter]]
    named = f" ({', '.join(known)})" if known else ""
    return f"{layers}{named} of width {model['hidden_size']:,}"


def _heads(model: Mapping[str, Any]) -> str:
    heads = f"{model['num_attention_heads']} heads"
    if model["multi_latent_attention"]:
        return f"{heads} of latent attention"
    groups = model["num_query_groups"]
    return f"{heads} of {model['kv_channels']} in {groups} group{'' if groups == 1 else 's'}"


def _vocabulary(model: Mapping[str, Any]) -> list[str]:
    rows, true, types = model["padded_vocab_size"], model["vocab_size"], model["num_tokentypes"]
    vocabulary = f"{true:,} tokens" if true is not None else "unknown vocabulary"
    if rows is not None and rows != true:
        vocabulary += f" padded to {rows:,} rows"
    kinds = f"{types} token type{'' if types == 1 else 's'}" if types else ""
    if model["subsampling_factor"] is not None and not model["share_embeddings_and_output_weights"]:
        return [vocabulary]
    return [vocabulary, kinds, f"{'tied' if model['share_embeddings_and_output_weights'] else 'untied'} embeddings"]


def _sound(model: Mapping[str, Any]) -> list[str]:
    heard = f"hears {model['num_mel_bins']} channels, {model['subsampling_factor']} frames a step"
    layers, durations = model["prediction_num_layers"], model["durations"]
    if model["lookaheads"] is not None:
        ahead = " or ".join(map(str, model["lookaheads"]))
        heard += f", attends to {model['left_context']} steps before and {ahead} ahead"
    if model["num_prompts"] is not None:
        heard += f", is told one of {model['num_prompts']} languages"
    if model["text_num_layers"] is not None:
        text = f"{model['text_num_layers']} layers of text, MLP {model['text_ffn_hidden_size']:,}"
        return [heard, f"{text}, {model['text_num_attention_heads']} heads"]
    if layers is None:
        return [heard]
    predicts = f"predicts by {layers} LSTM{'' if layers == 1 else 's'} of {model['prediction_hidden_size']:,}"
    return [heard, predicts, f"{len(durations)} durations" if durations else ""]


def _images(model: Mapping[str, Any]) -> list[str]:
    patch = model["patch_dim"]
    return [f"images of {model['img_h']} x {model['img_w']} pixels in patches of {patch} x {patch}"]
