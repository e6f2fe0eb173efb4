"""Which layers see only a window of tokens, and how transformers says it.

transformers' ``sliding_window`` counts the token itself, Megatron's ``window_size`` does not.  Its ``layer_types``
names every layer; older files have a rule in the family's code instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anyckpt.config.fields import Codec, OfKey
from anyckpt.config.model import ModelConfig
from anyckpt.config.possible import layers_of
from anyckpt.config.reader import Reader
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError

_SLIDING, _FULL = "sliding_attention", "full_attention"


def windowed_layers(config: ModelConfig) -> list[bool]:
    """For each layer whether it has the window."""
    return windowed(config.window_size, config.window_attn_skip_freq, config.num_layers)


def windowed(window: tuple[int, int] | None, every: int | tuple[int, ...] | None, layers: int) -> list[bool]:
    """The same of the fields ``window_size``, ``window_attn_skip_freq`` and ``num_layers``."""
    if window is None:
        return [False] * layers
    if isinstance(every, tuple):
        return [bool(layer) for layer in every]
    return [every is None or (layer + 1) % every != 0 for layer in range(layers)]


class Layers:
    """Which layers have the window where ``layer_types`` does not say: as the code of a class has it."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that say it, but for those that a ``config.json`` keeps whatever becomes of the window."""
        return ()

    def read(self, reader: Reader, layers: int) -> list[bool] | None:
        """For each layer whether it has; None if no layer has."""
        return [True] * layers

    def write(self, config: ModelConfig, layers: Sequence[bool]) -> Mapping[str, Any]:
        """What says these layers besides ``layer_types``."""
        return {}


@dataclass(eq=False, repr=False, match_args=False)
class AllBut(Layers):
    """All layers but every n-th.

    Attributes:
        every: n, counted from 1.
        spellings: keys that say another; the first is written where it is another.
    """

    every: int
    spellings: tuple[str, ...] = ()

    def read(self, reader: Reader, layers: int) -> list[bool] | None:
        every = next((number for key in self.spellings if (number := reader.integer(key))), self.every)
        return [(layer + 1) % every != 0 for layer in range(layers)]

    def write(self, config: ModelConfig, layers: Sequence[bool]) -> Mapping[str, Any]:
        every = config.window_attn_skip_freq
        return {self.spellings[0]: every} if self.spellings and isinstance(every, int) and every != self.every else {}


@dataclass(eq=False, repr=False, match_args=False)
class From(Layers):
    """Layers from one on, if windows are switched on.

    Attributes:
        key: of the first layer, counted from 0.
        default: which it is where no key says.
        switch: key that switches windows on.
    """

    key: str
    default: int
    switch: str

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.switch,)

    def read(self, reader: Reader, layers: int) -> list[bool] | None:
        first = reader.integer(self.key)
        first = self.default if first is None else first
        return [layer >= first for layer in range(layers)] if reader.flag(self.switch) else None

    def write(self, config: ModelConfig, layers: Sequence[bool]) -> Mapping[str, Any]:
        on = any(layers)
        return {self.switch: on, **({self.key: list(layers).index(True)} if on else {})}


@dataclass(eq=False, repr=False, match_args=False)
class Window(OfKey):
    """The window that every layer has, if a model has one.

    Attributes:
        key: of its length, which counts the token itself.
        unset: what is written of a model without one; where it is a number, null means what the class's default is.
    """

    key: str = "sliding_window"
    unset: int | None = None

    hubs = ("window_size",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        length = reader.integer(self.key)
        if length is None and (self.key not in reader.values or self.unset is not None):
            length = defaults.get(self.key)
        return {"window_size": None if length is None else _before(length, self.key)}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        return {self.key: self.unset if config.window_size is None else window_length(config, notes)}


@dataclass(eq=False, repr=False, match_args=False)
class LayerWindow(Codec):
    """The window of some layers: ``sliding_window`` and ``layer_types``.

    Attributes:
        layers: which layers have it where ``layer_types`` does not say.
        unset: length to write where no layer has it, for classes that build the window's mask for any model.
        within: ``model_type`` and class of the models whose ``layer_types`` count, where the family's other models
            have the window in every layer; None if all count.
    """

    layers: Layers
    unset: int | None = None
    within: tuple[str, str] | None = None

    hubs = ("window_size", "window_attn_skip_freq")

    @property
    def keys(self) -> tuple[str, ...]:
        return ("sliding_window", "layer_types", *self.layers.keys)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        length = reader.integer("sliding_window")
        if "sliding_window" not in reader.values:
            length = defaults.get("sliding_window")
        count = len(layers_of(found["num_layers"]))
        usual = self.layers.read(reader, count)
        counted = self.within is None or reader.values.get("model_type") == self.within[0]
        layers = (_layer_types(reader, count) if counted else None) or usual or []
        if length is None or usual is None or not any(layers):
            return dict.fromkeys(self.hubs)
        return {"window_size": _before(length, "sliding_window"), "window_attn_skip_freq": _frequency(layers)}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        layers = windowed_layers(config)
        length: dict[str, Any] = {
            "sliding_window": self.unset if config.window_size is None else window_length(config, notes)
        }
        if self.within is not None:
            if config.window_size is None or config.window_attn_skip_freq is None:
                return length
            length |= {"model_type": self.within[0], "architectures": [self.within[1]]}
        types = [_SLIDING if layer else _FULL for layer in layers]
        return {**length, "layer_types": types, **self.layers.write(config, layers)}


def _before(length: int, key: str) -> tuple[int, int]:
    """Megatron's window of a length that counts the token itself."""
    if length < 1:
        raise MappingError(f"config.json's {key} is not possible", expected="a positive length", found=length)
    return length - 1, 0


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
