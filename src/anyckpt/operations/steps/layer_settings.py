"""A configuration of other layers: how many there are, and whatever is said of each.

Keys are those of transformers 5 (``layer_types``, ``no_rope_layers``, ``mlp_only_layers``, ...), of NVIDIA's models
(``block_configs``, ``hybrid_override_pattern``), and of Megatron-Core's, NeMo's and Bridge's configurations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anyckpt.errors import UsageError

_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_num_layers",
    "num_encoder_layers",
    "depth",
)
_OF_EACH = (
    "layer_types",
    "no_rope_layers",
    "moe_layer_freq",
    "window_attn_skip_freq",
    "no_rope_freq",
    "block_configs",
    "layers_block_type",
    "mlp_layer_types",
    "activation_sparsity_pattern",
    "attention_layers",
    "block_types",
    "num_key_value_heads",
    "num_query_heads",
    "num_kv_heads",
    "ffn_multipliers",
    "intermediate_size",
    "hybrid_pattern",
    "linear_attention_pattern",
    "attn_type_list",
    "attn_layers",
    "attention_window",
    "indexer_types",
    "layer_rope_theta",
    "moe_intermediate_size",
    "moe_topk",
    "num_attention_heads",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "num_shared_expert",
    "swiglu_limits",
    "swiglu_limits_shared",
)
"""Lists of something for each layer."""
_PATTERNS = ("hybrid_override_pattern", "hybrid_layer_pattern")
"""Texts of a letter for each layer; ``/`` before the layers of further predictions, ``|`` between pipeline stages."""
_INDICES = {
    "mlp_only_layers": 0,
    "moe_layers": 0,
    "cross_attention_layers": 0,
    "attn_layer_indices": 0,
    "full_attn_idxs": 0,
    "local_layer_ids": 0,
    "rope_scaling_layers": 0,
    "slstm_at": 0,
    "full_attn_layers": 1,
    "kda_layers": 1,
}
"""Lists of layers, and the number that they have for the first layer; those of Kimi Linear begin with 1."""
_LEADING = ("first_k_dense_replace", "max_window_layers", "num_dense_layers", "moe_layer_start_index")
"""How many layers from the first on are of a kind."""
_TRAILING = ("num_kv_shared_layers",)
"""How many of the last layers are of a kind."""
_LAST = ("moe_layer_end_index",)
"""The last layer of a kind."""
_PERIODS = (
    "decoder_sparse_step",
    "interleave_moe_layer_step",
    "moe_layer_interval",
    "cross_layer_interval",
    "moe_layer_freq",
    "window_attn_skip_freq",
    "no_rope_freq",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "full_attention_interval",
    "no_rope_layer_interval",
    "attn_layer_period",
    "expert_layer_period",
    "global_attn_every_n_layers",
    "moe_every_n_layers",
    "cross_attention_interval",
    "layer_group_size",
)
"""Every so many layers one is of another kind."""
_INSTEAD = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
    "max_window_layers": "layer_types",
}
"""Lists that say the same and are looked at first."""
_CYCLES = ("block_types", "_block_types")
"""Lists that are repeated along the layers."""
_STAGES = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "num_layers_per_virtual_pipeline_stage",
    "pipeline_model_parallel_layout",
    "virtual_pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
)
"""How layers lie in pipeline stages, which other layers do not."""
_SIDE_BY_SIDE = ("hidden_size_per_layer_input",)
"""Where they are not 0, some tensors have so many columns for each layer, as Gemma 3n's ``embed_tokens_per_layer``."""
_NOT_OF_LAYERS = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "mlp_multipliers", "ssm_multipliers")
_OF_NUMBERED = re.compile(r"layer\w*_(?:index|idx|id|interval|period|freq|pattern|start|end)|every_n_layers")
"""What keys are called that say of layers by their numbers."""
_MADE: dict[str, Callable[[int, int], Any]] = {
    "moe_layer_freq": lambda layer, every: int(layer % every == 0),
    "window_attn_skip_freq": lambda layer, every: int((layer + 1) % every != 0),
    "no_rope_freq": lambda layer, every: int((layer + 1) % every == 0),
}
"""What a period of Megatron-Core's says of a layer, where a list of that may stand in its place."""


def layers_of(config: Mapping[str, Any]) -> int | None:
    """How many layers a configuration says there are; None if it does not say."""
    for part in _parts(config):
        for key in _COUNTS:
            if type(part.get(key)) is int:
                return int(part[key])
    for part in _parts(config):
        for key in _PATTERNS:
            if isinstance(part.get(key), str):
                return len(_letters(part[key]))
        for key in ("layers_block_type", "layer_types", "block_configs"):
            if isinstance(part.get(key), (list, tuple)):
                return len(part[key])
    return None


def inside_with_layers(value: Any, kept: Sequence[int], count: int, path: str) -> Any:
    """What a format keeps of a run besides, with these layers wherever a mapping in it has as many as the model.

    Raises:
        UsageError: as ``with_layers``.
    """
    if not isinstance(value, Mapping):
        return value
    inner = {key: inside_with_layers(item, kept, count, path) for key, item in value.items()}
    if any(type(inner.get(key)) is int and inner[key] == count for key in _COUNTS):
        return _changed(inner, kept, count, path, [])
    return inner if any(inner[key] is not value[key] for key in inner) else value


def _letters(pattern: str) -> str:
    return pattern.partition("/")[0].replace("|", "")


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The configuration and what in it is one of a text model."""
    inner = [config[key] for key in ("text_config", "llm_config", "language_config", "config") if key in config]
    return [config, *(part for part in inner if isinstance(part, Mapping))]


def with_layers(config: Mapping[str, Any], kept: Sequence[int], path: str) -> tuple[dict[str, Any], list[str]]:
    """A configuration of these layers of the model alone, and what to say of it.

    Raises:
        UsageError: it says by a rule what layers are, which does not hold for these; the key is named.
    """
    count = layers_of(config)
    if count is None:
        return dict(config), []
    notes: list[str] = []
    result = _changed(config, kept, count, path, notes)
    for key in ("text_config", "llm_config", "language_config", "config"):
        part = result.get(key)
        if isinstance(part, Mapping) and layers_of(part) == count:
            result[key] = _changed(part, kept, count, path, notes)
    return result, notes


def with_stack_layers(
    config: Mapping[str, Any], stack: str, kept: Sequence[int], count: int, path: str
) -> tuple[dict[str, Any], list[str]]:
    """An encoder-decoder's configuration in transformers' keys, with these layers of a stack, and what to say of it.

    T5's ``num_decoder_layers`` is as many as ``num_layers`` where it is not said; BART's ``num_hidden_layers`` repeats
    ``encoder_layers``.

    Args:
        config: of the model.
        stack: ``encoder`` or ``decoder``.
        kept: the layers that stay.
        count: the layers that there are.
        path: of the checkpoint, for messages.

    Raises:
        UsageError: it does not say how many layers the stack has, or says of layers what cannot be said of these.
    """
    bart = type(config.get("encoder_layers")) is int and type(config.get("decoder_layers")) is int
    keys = {"encoder": "encoder_layers", "decoder": "decoder_layers"} if bart else _T5
    result = dict(config)
    if not bart and type(config.get("num_layers")) is int and result.get("num_decoder_layers") is None:
        result["num_decoder_layers"] = config["num_layers"]
    if result.get(keys[stack]) != count:
        raise UsageError(
            f"the configuration does not say that the {stack} has {count} layers",
            path=path,
            expected=f"{keys[stack]} {count}",
            found=str(result.get(keys[stack])),
            remedy="convert it to hf first, or give the configuration of transformers with --config",
        )
    rule = next((key for key, value in config.items() if "sparse" in key and value), None)
    if rule is not None:
        raise UsageError(
            f"the configuration's {rule} says by a rule which layers have experts, which is not so of others", path=path
        )
    result[keys[stack]] = len(kept)
    if bart and stack == "encoder" and config.get("num_hidden_layers") == count:
        result["num_hidden_layers"] = len(kept)
    unknown = [
        key for key, value in config.items() if key not in keys.values() and _may_be_of_layers(key, value, count)
    ]
    return result, [
        f"{key} of the configuration is left as it is, and may be of the layers that were there" for key in unknown
    ]


_T5 = {"encoder": "num_layers", "decoder": "num_decoder_layers"}


def _changed(config: Mapping[str, Any], kept: Sequence[int], count: int, path: str, notes: list[str]) -> dict[str, Any]:
    result = dict(config)
    for key, value in sorted(config.items(), key=lambda item: item[0] in _PERIODS):  # lists before what they replace
        if key in _COUNTS and value == count and type(value) is int:
            result[key] = len(kept)
        elif key in _OF_EACH and isinstance(value, (list, tuple)) and len(value) == count:
            result[key] = [value[layer] for layer in kept]
        elif key in _CYCLES and isinstance(value, list) and value and len(value) < count:
            result[key] = _cycle(value, kept)
        elif key in _PATTERNS and isinstance(value, str):
            result[key] = _pattern(value, kept, count)
        elif key in _INDICES and isinstance(value, list):
            first = _INDICES[key]
            result[key] = [number + first for number, layer in enumerate(kept) if layer + first in value]
        elif key in _LEADING and type(value) is int:
            result[key] = _first_ones(config, key, [layer < value for layer in kept], path)
        elif key in _TRAILING and type(value) is int:
            result[key] = _first_ones(config, key, [layer >= count - value for layer in reversed(kept)], path)
        elif key in _LAST and type(value) is int and value >= 0:
            result[key] = _first_ones(config, key, [layer <= value for layer in kept], path) - 1
        elif key == "attention_types" and isinstance(value, list) and isinstance(config.get("attention_layers"), list):
            result[key] = [[[kind], 1] for kind in _of_kept(config["attention_layers"], kept, count)]
        elif key == "linear_attn_config" and isinstance(value, Mapping):
            result[key] = _changed(value, kept, count, path, notes)
        elif key in _PERIODS and type(value) is int and value > 1:
            _period(result, key, value, kept, path)
        elif key in _STAGES and value is not None:
            result[key] = None
            notes.append(f"{key} of the configuration is taken out: it is of the layers that were there")
        elif key in _SIDE_BY_SIDE and value:
            raise UsageError(
                f"the configuration's {key} says that tensors hold columns of all layers side by side, which are not "
                "told apart",
                path=path,
                remedy="leave layers out where the model was made",
            )
        elif not isinstance(config.get(_INSTEAD.get(key, "")), (list, tuple)) and _may_be_of_layers(key, value, count):
            notes.append(f"{key} of the configuration is left as it is, and may be of the layers that were there")
    return result


def _first_ones(config: Mapping[str, Any], key: str, ones: Sequence[bool], path: str) -> int:
    """How many layers at an end of the model are of a kind.

    Raises:
        UsageError: some are not at the end, as where a model's first layers are put behind others.
    """
    count = sum(ones)
    said = isinstance(config.get(_INSTEAD.get(key, "")), (list, tuple))
    if any(ones[count:]) and not said and not (key == "max_window_layers" and not config.get("use_sliding_window")):
        raise UsageError(
            f"the configuration's {key} says of layers at an end of the model that they are of another kind, which is "
            "not so of these",
            path=path,
            expected="such layers next to one another at that end",
            remedy="choose layers so that they are",
        )
    return count


def _of_kept(values: list[Any], kept: Sequence[int], count: int) -> list[Any]:
    return [values[layer] for layer in kept] if len(values) == count else values


def _may_be_of_layers(key: str, value: Any, count: int) -> bool:
    """Whether a setting that is not known is of each layer, or of some by their numbers, as far as one can see."""
    if key in {*_COUNTS, *_OF_EACH, *_PATTERNS, *_INDICES, *_LEADING, *_PERIODS, *_CYCLES}:
        return isinstance(value, str) and key not in _PATTERNS and bool(value)
    if isinstance(value, (list, tuple)):
        listed = len(value) == count > 2 and key not in _NOT_OF_LAYERS
        return listed or (bool(value) and "layer" in key and all(type(item) is int for item in value))
    return type(value) is int and value > 1 and _OF_NUMBERED.search(key) is not None


def _pattern(value: str, kept: Sequence[int], count: int) -> str:
    _, slash, further = value.partition("/")
    letters = _letters(value)
    return "".join(letters[layer] for layer in kept) + slash + further if len(letters) == count else value


def _cycle(value: list[Any], kept: Sequence[int]) -> list[Any]:
    wanted = [value[layer % len(value)] for layer in kept]
    return value if all(kind == value[n % len(value)] for n, kind in enumerate(wanted)) else wanted


def _period(result: dict[str, Any], key: str, every: int, kept: Sequence[int], path: str) -> None:
    """Leave a period where it holds for the layers that are kept, or say the same of each, or raise UsageError."""
    if all(layer % every == number % every for number, layer in enumerate(kept)):
        return
    if isinstance(result.get(_INSTEAD.get(key, "")), (list, tuple)):
        return
    others = [(layer + 1) % every == 0 for layer in kept]
    if key in _MADE:
        result[key] = [_MADE[key](layer, every) for layer in kept]
    elif key in _KINDS:
        result["layer_types"] = [_KINDS[key] if not other else "full_attention" for other in others]
    elif key == "decoder_sparse_step":
        dense = {number for number, sparse in enumerate(others) if not sparse}
        result[key] = 1
        result["mlp_only_layers"] = sorted(dense | {*result.get("mlp_only_layers", ())})
    elif key == "interleave_moe_layer_step":
        result["moe_layers"] = [number for number, sparse in enumerate(others) if sparse]
    elif key == "no_rope_layer_interval":
        result["no_rope_layers"] = [int(not without) for without in others]
    else:
        raise UsageError(
            f"the configuration's {key} says that one in {every} layers is of another kind, which is not so of these",
            path=path,
            expected=f"each kept layer at the same place in its {every}",
            remedy=f"leave out {every} layers together, such as {every}-{2 * every - 1}",
        )


_KINDS = {
    "sliding_window_pattern": "sliding_attention",
    "_sliding_window_pattern": "sliding_attention",
    "full_attention_interval": "linear_attention",
}
"""What transformers calls the layers between those of full attention."""
