"""Which layers see only a window of tokens, and how transformers says it.

transformers' ``sliding_window`` counts the token itself, Megatron's ``window_size`` does not.  Its ``layer_types``
names every layer; older files have a rule in the family's code instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anyckpt.config.model import ModelConfig, Reader
from anyckpt.errors import MappingError

_SLIDING, _FULL = "sliding_attention", "full_attention"


def windowed_layers(config: ModelConfig) -> list[bool]:
    """For each layer whether it has the window."""
    every = config.window_attn_skip_freq
    if config.window_size is None:
        return [False] * config.num_layers
    if isinstance(every, tuple):
        return [bool(layer) for layer in every]
    return [every is None or (layer + 1) % every != 0 for layer in range(config.num_layers)]


def read_window(reader: Reader, length: int | None, usual: Sequence[bool]) -> dict[str, Any]:
    """The hub's ``window_size`` and ``window_attn_skip_freq`` from a ``config.json``.

    Args:
        reader: the configuration.
        length: its ``sliding_window``, which counts the token itself; None if there is none.
        usual: for each layer, whether the family gives it the window where ``layer_types`` does not say.

    Raises:
        MappingError: the length is not positive, or ``layer_types`` is not that of the model.
    """
    layers = _layer_types(reader, len(usual)) or list(usual)
    if length is None or not any(layers):
        return {"window_size": None, "window_attn_skip_freq": None}
    if length < 1:
        raise MappingError("config.json's sliding_window is not possible", expected="a positive length", found=length)
    return {"window_size": (length - 1, 0), "window_attn_skip_freq": _frequency(layers)}


def write_window(config: ModelConfig, notes: list[str], length: int | None = None) -> dict[str, Any]:
    """``sliding_window`` and ``layer_types``.

    Args:
        config: the model.
        notes: what a user should know is appended.
        length: what to write where no layer has a window; classes that build the window's mask for any model need one.

    Raises:
        MappingError: transformers has no such window.
    """
    layers = windowed_layers(config)
    return {
        "sliding_window": length if config.window_size is None else window_length(config, notes),
        "layer_types": [_SLIDING if layer else _FULL for layer in layers],
    }


def window_length(config: ModelConfig, notes: list[str]) -> int:
    """transformers' ``sliding_window`` of a model that has one.

    Raises:
        MappingError: the window is not of the tokens before, the last ones.
    """
    left, right = config.window_size or (-1, 0)
    if right != 0 or left < 0:
        raise MappingError("transformers has no such attention window", expected="(left, 0)", found=config.window_size)
    if left % 128 == 0 and "hf" not in config.extra:
        notes.append(
            f"a window of ({left}, 0) sees {left + 1} tokens, so sliding_window is {left + 1}; NeMo's importer writes "
            f"({left}, 0) for models of {left}: if this is one, set sliding_window to {left} in config.json"
        )
    return left + 1


def _layer_types(reader: Reader, layers: int) -> list[bool] | None:
    value = reader.values.get("layer_types")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != layers or any(kind not in (_SLIDING, _FULL) for kind in value):
        raise MappingError(
            f"the {reader.what}'s layer_types is not that of the model",
            expected=f"{_SLIDING} or {_FULL} for each of {layers} layers",
            found=repr(value)[:80],
        )
    return [kind == _SLIDING for kind in value]


def _frequency(layers: Sequence[bool]) -> int | tuple[int, ...] | None:
    """Megatron-Core's spelling: None for all layers, N for all but every N-th, or one number for each."""
    if all(layers):
        return None
    first = list(layers).index(False) + 1
    if first > 1 and all(layer == ((number + 1) % first != 0) for number, layer in enumerate(layers)):
        return first
    return tuple(int(layer) for layer in layers)
