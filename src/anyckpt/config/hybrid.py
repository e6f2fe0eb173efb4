"""A decoder as Megatron-Core's HybridModel, which gives attention and MLP a layer each, in arguments.

Megatron-Core deprecates GPTModel for HybridModel: block i becomes the layers 2i, with attention, and 2i + 1, with the
MLP or experts, and ``hybrid_layer_pattern`` has a letter for each: ``*`` attention, ``+`` latent attention, ``D`` the
same of tokens that an indexer chooses, ``G`` a gated delta net, ``-`` an MLP, ``E`` experts; ``|`` parts pipeline
stages, and ``/`` precedes the layers of a step of multi-token prediction, which GPTModel makes like its last block.

Facts: ``models/hybrid`` (``HybridModel``, ``hybrid_layer_allocation``, ``hybrid_layer_specs``) and
``transformer/{transformer_config,attention,utils}.py`` of Megatron-Core 0.19.2; ``training/checkpointing.py`` there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anyckpt.errors import MappingError

PATTERN = "hybrid_layer_pattern"
_PATTERNS = (PATTERN, "hybrid_override_pattern")
"""The latter is of Megatron-Core until 0.17 and deprecated since; both mean the same."""
_ATTENTION, _LATENT, _INDEXED, _NET, _DENSE, _SPARSE = "*+DG-E"
_VARIANT, _LINEAR = "experimental_attention_variant", "linear_attention_freq"
_DELTA_NET, _SPARSE_ATTENTION = "gated_delta_net", "dsa"
_STEPS, _SCALED = "mtp_num_layers", "use_rope_scaling"
_STAGES = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)
"""How many layers a pipeline stage has."""
_MOST_LAYERS = 10_000

_REFUSED: tuple[tuple[str, Callable[[Mapping[str, Any]], Any], str], ...] = (
    (
        "parallel_residual",
        lambda said: said.get("parallel_residual"),
        "whose attention and MLP are one behind the other, not side by side",
    ),
    (
        "heterogeneous_layers_config_encoded_json",
        lambda said: said.get("heterogeneous_layers_config_encoded_json"),
        "whose layers of a kind are all alike",
    ),
    (_SCALED, lambda said: said.get(_SCALED), "which does not scale rope as Llama 3.1 does"),
    ("rotary_interleaved", lambda said: said.get("rotary_interleaved"), "whose rope is not interleaved"),
    ("rotary_base_local", lambda said: said.get("rotary_base_local"), "which has one base of rope for all layers"),
    (
        _VARIANT,
        lambda said: said.get(_VARIANT) if said.get(_VARIANT) not in (_DELTA_NET, _SPARSE_ATTENTION) else None,
        "for whose layers of this attention there are no rules yet",
    ),
    (
        "bridge_layer_spec",
        lambda said: said.get("bridge_layer_spec"),
        "whose layers are Megatron-Core's own, not those that Megatron-Bridge has for the family",
    ),
    ("encoder_num_layers", lambda said: said.get("encoder_num_layers"), "which has no encoder"),
    (
        "position_embedding_type",
        lambda said: (
            said.get("position_embedding_type") in ("relative", "mrope", "alibi")
            and said.get("position_embedding_type")
        ),
        "which has no such positions",
    ),
)
"""What a GPTModel of Megatron-Core's can be and a HybridModel of 0.19 cannot, and in which way not."""


_LEFT_OUT = "leave --megatron-model out, which writes a GPTModel"
_SET_UP = (
    f"{_LEFT_OUT}; or scale rope in your own HybridModel, and convert with --config of a configuration without the "
    "scaling"
)


def letters_of(arguments: Mapping[str, Any]) -> str | None:
    """A letter per layer if these are of a HybridModel that is a GPTModel's blocks in halves; None for any other.

    Those of steps of multi-token prediction are not among them: they are all like the last block.
    """
    letters, *further = _pattern(arguments).split("/")
    letters = letters.replace("|", "")
    pairs = len(letters) % 2 == 0 and 0 < len(letters) <= 2 * _MOST_LAYERS
    if not pairs or set(letters[1::2]) - {_DENSE, _SPARSE} or not _are_of_one_kind(set(letters[::2])):
        return None
    return letters if set(further) <= {letters[-2:], ""} else None


def _pattern(arguments: Mapping[str, Any]) -> str:
    return next((text for key in _PATTERNS if isinstance(text := arguments.get(key), str) and text), "")


def _are_of_one_kind(attention: set[str]) -> bool:
    """Whether these letters are of layers of attention that one GPTModel can have."""
    return attention in ({_LATENT}, {_INDEXED}) or attention <= {_ATTENTION, _NET}


def hybrid_arguments(arguments: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The arguments of the HybridModel that computes what the GPTModel of these arguments does.

    Args:
        arguments: of a GPTModel; those of such a HybridModel stay as they are.
        notes: what a user must do for it is appended here.

    Raises:
        MappingError: there is none.
    """
    if letters_of(arguments) is not None:
        return dict(arguments)
    for name, found, why in _REFUSED:
        if found(arguments):
            raise MappingError(
                f"the model cannot be Megatron-Core's HybridModel, {why}",
                expected=f"no {name}",
                found=str(found(arguments))[:80],
                remedy=_SET_UP if name == _SCALED else _LEFT_OUT,
            )
    other = next((text for key in _PATTERNS if (text := arguments.get(key))), None)
    if other is not None or arguments.get("is_hybrid_model"):
        raise MappingError(
            "the model is a hybrid one already, and not made of blocks of attention and MLP",
            found=str(other)[:80],
            remedy="leave --megatron-model out",
        )
    layers = _layers(arguments)
    experts = _experts(arguments, layers)
    attention = _LATENT if arguments.get("multi_latent_attention") else _ATTENTION
    attention = _INDEXED if arguments.get(_VARIANT) == _SPARSE_ATTENTION else attention
    has_nets = arguments.get(_VARIANT) == _DELTA_NET
    nets = _with_window(arguments.get(_LINEAR), _LINEAR, layers) if has_nets else [0] * layers
    pattern = "".join(
        (_NET if net else attention) + (_SPARSE if sparse else _DENSE)
        for net, sparse in zip(nets, experts, strict=True)
    )
    steps = [pattern[-2:]] * _further(arguments)
    changed: dict[str, Any] = {
        "num_layers": 2 * layers,
        PATTERN: "/".join([pattern, *steps]),
        "is_hybrid_model": True,
    }
    changed |= {key: 2 * value for key in _STAGES if type(value := arguments.get(key)) is int}
    if arguments.get("moe_layer_freq") is not None:
        changed["moe_layer_freq"] = 1
    for key, of_layer in _OF_ATTENTION.items():
        if arguments.get(key) not in (None, 0):
            changed[key] = [part for one in of_layer(arguments[key], key, layers) for part in (one, 0)]
    if arguments.get("qk_layernorm") or arguments.get("qk_l2_norm"):
        notes.append(
            "Megatron-Core 0.19's hybrid_stack_spec has no norms of queries and keys: build the model with one that "
            "has, for a load does not ask for what the model lacks"
        )
    return {**arguments, **changed, "pipeline_model_parallel_layout": None}


def gpt_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the GPTModel that computes what these of a HybridModel do; those of any other as they are.

    Raises:
        MappingError: what they say of single layers does not fit their number.
    """
    letters = letters_of(arguments)
    if letters is None:
        return dict(arguments)
    layers = len(letters) // 2
    changed: dict[str, Any] = {"num_layers": layers, "is_hybrid_model": False}
    changed |= {key: value // 2 for key in _STAGES if type(value := arguments.get(key)) is int}
    if _NET in letters:
        nets = [int(letter == _NET) for letter in letters[::2]]
        changed |= {_VARIANT: _DELTA_NET, _LINEAR: nets}
    if _INDEXED in letters:
        changed |= {_VARIANT: _SPARSE_ATTENTION, "multi_latent_attention": True}
    steps = len([step for step in _pattern(arguments).split("/")[1:] if step])
    if steps:
        changed[_STEPS] = steps
    sparse = [int(letter == _SPARSE) for letter in letters[1::2]]
    if any(sparse):
        changed["moe_layer_freq"] = 1 if all(sparse) else sparse
    elif arguments.get("num_experts"):
        changed["num_experts"] = None
    for key, of_layer in _OF_ATTENTION.items():
        if arguments.get(key) not in (None, 0) and key not in changed:
            listed = of_layer(arguments[key], key, 2 * layers)[::2]
            numbers = (every for every in range(1, layers + 1) if of_layer(every, key, layers) == listed)
            changed[key] = next(numbers, listed)
    return {**{key: value for key, value in arguments.items() if key not in _PATTERNS}, **changed}


def _layers(arguments: Mapping[str, Any]) -> int:
    layers = arguments.get("num_layers")
    if type(layers) is not int or not 0 < layers <= _MOST_LAYERS:
        raise MappingError(
            "the arguments do not say how many layers there are", expected="num_layers", found=str(layers)[:40]
        )
    return layers


def _further(arguments: Mapping[str, Any]) -> int:
    """How many steps of multi-token prediction there are."""
    steps = arguments.get(_STEPS)
    if steps is not None and (type(steps) is not int or not 0 <= steps <= _MOST_LAYERS):
        raise MappingError("the number of further predictions is not possible", expected=_STEPS, found=str(steps)[:40])
    return steps or 0


def _experts(arguments: Mapping[str, Any], layers: int) -> list[int]:
    """Which layers have experts: every n-th from the first on, or as a list says."""
    if not arguments.get("num_experts"):
        return [0] * layers
    said = arguments.get("moe_layer_freq")
    if said is None or (type(said) is int and said > 0):
        return [int(layer % (said or 1) == 0) for layer in range(layers)]
    return _listed(said, "moe_layer_freq", layers)


def _with_window(said: Any, key: str, layers: int) -> list[int]:
    """Which layers have the window: all but every n-th, or as a list says."""
    if type(said) is int and said > 0:
        return [int((layer + 1) % said != 0) for layer in range(layers)]
    return _listed(said, key, layers)


def _without_rope(said: Any, key: str, layers: int) -> list[int]:
    """Which layers have no rope: every n-th, or as a list says."""
    if type(said) is int and said > 0:
        return [int((layer + 1) % said == 0) for layer in range(layers)]
    return _listed(said, key, layers)


_OF_ATTENTION: Mapping[str, Callable[[Any, str, int], list[int]]] = {
    "window_attn_skip_freq": _with_window,
    "no_rope_freq": _without_rope,
    _LINEAR: _with_window,
}
"""What is said of the attention of single layers, whose numbers differ between the two models."""


def _listed(said: Any, key: str, layers: int) -> list[int]:
    if not isinstance(said, Sequence) or isinstance(said, str) or len(said) != layers:
        raise MappingError(
            f"{key} does not say it of each layer", expected=f"a number, or {layers} of 0 and 1", found=str(said)[:80]
        )
    return [int(bool(one)) for one in said]
