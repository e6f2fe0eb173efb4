"""What is asked of quantizing, and how a form stores what an algorithm makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType
from anyckpt.errors import UsageError
from anyckpt.quantization.calibrated import Smoothing
from anyckpt.quantization.choosing import Choice, choose_linear
from anyckpt.quantization.quantizing import Options
from anyckpt.quantization.statistics import Statistics
from anyckpt.tensor import LazyTensor

Facts = dict[str, Any]

PLAIN = {"weight": "weight", "scale": "weight_scale"}
"""Names of a weight and its scale in most forms; see ``Layout.names``."""


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        algorithm: one of ``ALGORITHMS``.
        form: one of ``FORMS``; the algorithm's usual one if None.
        group_size: ``int4``: columns with one scale.
        activation_scale: the scale of every quantized activation, where it is stored; see ``Layout.static``.
        exclude: globs of modules that stay as they are.
        activation_scales: the same of modules by name, which go before the one for all; None if none are given.
        statistics: what calibration saw of the model's activations; None if it was not calibrated.
        alpha: of SmoothQuant.
        cache: keep keys and values in 8 bits; None for what ``forms.with_usual_cache`` says.
        decoder: NeMo's word for the family; "" if nobody said.
    """

    algorithm: str
    form: str | None = None
    group_size: int = 128
    activation_scale: float | None = None
    exclude: tuple[str, ...] = ()
    activation_scales: Mapping[str, float] | None = None
    statistics: Statistics | None = None
    alpha: float = 1.0
    cache: bool | None = None
    decoder: str = ""

    @property
    def knows_activations(self) -> bool:
        """Whether scales of activations are given."""
        return self.scales_given or self.statistics is not None

    @property
    def scales_given(self) -> bool:
        """Whether the user says them."""
        return self.activation_scale is not None or self.activation_scales is not None

    @property
    def cache_kind(self) -> str | None:
        """How keys and values are kept, ``FP8`` or ``INT8``; None if it is as they are."""
        if self.statistics is None or not self.cache:
            return None
        return "INT8" if self.algorithm in ("int8", "int8_sq") else "FP8"

    def scale_of(self, module: str) -> float:
        """The scale of what goes into a module; 1 if nothing is given.

        Raises:
            UsageError: scales are given, and none is this module's.
        """
        found = (self.activation_scales or {}).get(module, self.activation_scale)
        if found is None and self.activation_scales is not None:
            raise UsageError(
                f"no scale is given for what goes into {module}",
                expected=f"it among the {len(self.activation_scales)} of --activation-scales",
                remedy="add it, or give one for all others with --activation-scale",
            )
        return 1.0 if found is None else found


@dataclass(frozen=True)
class Layout:
    """How one form stores what one algorithm makes.

    Attributes:
        algorithm: as ``quantized`` knows it; "" if weights stay numbers, which are quantized when they are loaded.
        names: role -> what follows a module's name (of ``quantized``, and ``shape`` of packed codes).
        facts: the ``quantization_config``, of the request and the modules that are not quantized.
        options: of ``quantized``, of the request and the weight's element type.
        shapes: role -> shape of the scale, where it is not that which ``quantized`` gives.
        static: name of the scale of activations, which is stored; "" if they are scaled when the model runs.
        static_shape: of that scale; stacked experts have one in all, ``(1,)``.
        static_needed: 1 is no such scale for any model, so that one must be said.
        inputs: name of what the layer's inputs are multiplied by, which is stored as ones; "" if it is not.
        smoothing: what moves from activations into weights before they are coded.
        over: the largest code of activations, where ``static`` is stored: what their largest magnitude is divided by.
        second: name of the scale of the whole weight in 8-bit floats, which W4A8 has beside its groups'; "".
        folded: factors of inputs go into the normalization before, where others share it.
        caches: what follows the name of an attention's module in that of a scale of its cache -> ``k``, ``v`` or
            ``kv``, whose scale it is.
        cache_shape: of these.
        unrounded: codes are made of the weights before they are cast to the type of those that are not quantized.
        apart: experts that lie in one tensor have a scale each where others have one of the whole tensor.
        choose: which weights are quantized, of the tensors and globs of modules to leave as they are.
        key: where a configuration says how; "" if the format says it.
        instead: what scales activations when the model runs, where ``static`` is stored.
        siblings: modules that are one when a model runs have one scale of the whole tensor.
        experts: it is stacked experts that are quantized, and they lie ``[experts, inputs, outputs]``.
        experts_unread: what transformers makes of experts that are stored so, where it is not the model, and what to
            choose for it; "" if it reads them.
        file: the text of ModelOpt's own file, of the facts, or None.
    """

    algorithm: str
    names: Mapping[str, str]
    facts: Callable[[Request, Sequence[str]], Facts]
    options: Callable[[Request, DType], Options] = field(default=lambda request, kind: Options())
    shapes: Mapping[str, Callable[[LazyTensor], tuple[int, ...]]] = field(default_factory=dict)
    static: str = ""
    static_shape: tuple[int, ...] = (1,)
    static_needed: bool = False
    inputs: str = ""
    smoothing: Smoothing = ""
    over: float = 448.0
    second: str = ""
    folded: bool = False
    caches: Mapping[str, str] = field(default_factory=dict)
    cache_shape: tuple[int, ...] = (1,)
    unrounded: bool = False
    apart: bool = False
    choose: Callable[[Mapping[str, LazyTensor], Sequence[str]], Choice] = choose_linear
    key: str = "quantization_config"
    siblings: bool = False
    instead: str = "--quantize-form compressed-tensors"
    experts: bool = False
    experts_unread: str = ""
    file: Callable[[Facts, Request], str] | None = None

    @property
    def sees_activations(self) -> bool:
        """Whether activations decide anything of what is stored."""
        return bool(self.static or self.smoothing)
