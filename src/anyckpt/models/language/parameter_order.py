"""In which order transformers' modules register parameters, which is how PyTorch's optimizers number them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

DECODER = (
    *("model", "lm_head", "embed_tokens", "layers", "norm"),
    *("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "q_norm", "k_norm"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "c_fc", "c_proj"),
    *("weight", "bias"),
)
"""Parts of names in the order of Llama's modules and of those that were made after them."""


def registered_order(names: Iterable[str], parts: Sequence[str]) -> list[str] | None:
    """Names in the order of ``named_parameters()``, None if one has a part whose place is not known.

    Args:
        names: of a model's parameters.
        parts: of such names, in the order in which any two that are siblings are registered; numbers count.
    """
    place = {part: number for number, part in enumerate(parts)}
    keyed: list[tuple[tuple[int, ...], str]] = []
    for name in names:
        key: list[int] = []
        for part in name.split("."):
            if part.isdecimal() and len(part) < 10:
                key.append(int(part))
            elif part in place:
                key.append(place[part])
            else:
                return None
        keyed.append((tuple(key), name))
    return [name for _, name in sorted(keyed)]
