"""Noting what goes into the linear modules of a layer while it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.torch.calibration.model import LazyModel, Rows

_FAULT = "what goes into the module holds infinite values or not-a-numbers"


@dataclass
class Noted:
    """What was noted of a linear module, of K inputs.

    Attributes:
        inputs: largest magnitude of each input, float32 ``[K]``.
        tokens: how many went in.
        mean: sum over batches of the mean magnitude of each input, float32 ``[K]``.
        batches: how many there were.
        losses: sums over batches, of each exponent.
    """

    inputs: torch.Tensor
    mean: torch.Tensor
    tokens: int = 0
    batches: int = 0
    losses: list[float] = field(default_factory=list)


Observer = Callable[[list[Rows], torch.Tensor, torch.Tensor], None]
"""Called with the modules that a matrix is of, the inputs ``[tokens, K]``, and the matrix ``[N, K]``."""


class Linears(TorchFunctionMode):
    """While it is entered, tells of each product with a matrix of a layer.

    Args:
        model: the whole.
        layer: a module of it, with its weights.
        name: the layer's.
        seen: is told.
    """

    def __init__(self, model: LazyModel, layer: nn.Module, name: str, seen: Observer) -> None:
        super().__init__()
        self._seen = seen
        self._rows: dict[int, tuple[list[list[Rows]], int]] = {}
        for own, parameter in layer.named_parameters():
            if parameter.ndim in (2, 3):
                rows = model.rows(f"{name}.{own}")
                self._rows[parameter.untyped_storage().data_ptr()] = rows, parameter[0].numel()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        output = func(*args, **options)
        if func is nn.functional.linear:
            inputs, weight = [*args, *(options[name] for name in ("input", "weight") if name in options)][:2]
            self._tell(inputs, weight)
        return output

    def _tell(self, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        rows, each = self._rows.get(weight.untyped_storage().data_ptr(), ([], 1))
        if not rows or not inputs.numel() or weight.ndim != 2:
            return
        number = weight.storage_offset() // each if len(rows) > 1 else 0
        with torch._C.DisableTorchFunction():
            self._seen(rows[number], inputs.reshape(-1, inputs.shape[-1]), weight)


class KeysAndValues(DynamicCache):
    """A cache that keeps nothing, and notes the largest magnitude of what it is given.

    Args:
        noted: number of a layer -> largest magnitude of keys and of values.
    """

    def __init__(self, noted: dict[int, tuple[float, float]]) -> None:
        super().__init__()
        self._noted = noted

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **options: Any) -> Any:
        before = self._noted.get(layer_idx, (0.0, 0.0))
        found = (float(key_states.abs().max()), float(value_states.abs().max()))
        self._noted[layer_idx] = (max(before[0], found[0]), max(before[1], found[1]))
        return key_states, value_states


Which = tuple[StorageWeakRef, int, int]
"""Which tensor: its memory, where it begins there, and its elements."""


def _which(tensor: torch.Tensor) -> Which:
    """The same for views of the same elements, and for no other tensor even when its memory is given back."""
    memory = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return memory, int(tensor.storage_offset()), tensor.numel()


@dataclass
class Sharing:
    """Which linear modules get one and the same tensor, and whose output it is; found in one pass of one batch.

    Attributes:
        groups: which tensor -> modules.
        norms: the same -> name of the normalization whose output it is.
    """

    groups: dict[Which, list[str]] = field(default_factory=dict)
    norms: dict[Which, str] = field(default_factory=dict)

    def note(self, rows: list[Rows], inputs: torch.Tensor) -> None:
        """A product with the matrix of these modules."""
        group = self.groups.setdefault(_which(inputs), [])
        group += [one.module for one in rows if one.module not in group]

    @contextmanager
    def watching(self, model: LazyModel, layer: nn.Module, name: str) -> Iterator[None]:
        """Note the outputs of the layer's normalizations."""
        handles = []
        for own, module in layer.named_modules():
            if "norm" in type(module).__name__.lower() and "weight" in module._parameters:
                source = model.source_of(f"{name}.{own}.weight")
                if source and not _is_centred(module):
                    handles.append(module.register_forward_hook(self._hook(source)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, source: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                self.norms[_which(output)] = source

        return hook


def _is_centred(norm: nn.Module) -> bool:
    """Whether a normalization multiplies by one more than its weight, as Gemma's does."""
    weight = norm._parameters["weight"]
    assert weight is not None
    without = {name: torch.zeros_like(own) for name, own in norm.named_parameters()}
    ones = torch.ones(1, weight.shape[-1], dtype=weight.dtype)
    ones[0, 0] = 2
    return bool(torch.func.functional_call(norm, without, (ones,)).any())


@contextmanager
def every_expert(layer: nn.Module) -> Iterator[None]:
    """While it lasts, experts see every token before those that are theirs, as in ModelOpt's calibration.

    transformers' experts get hidden states ``[tokens, K]``, which experts a token goes to, and with which weights.
    """
    changed: list[nn.Module] = []
    for module in layer.modules():
        stacked = [one for one in module._parameters.values() if one is not None and one.ndim == 3]
        taken = list(inspect.signature(module.forward).parameters)
        if stacked and taken[:3] == ["hidden_states", "top_k_index", "top_k_weights"]:
            module.forward = _all_of(module.forward, stacked[0].shape[0])
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _all_of(forward: Callable[..., Any], experts: int) -> Callable[..., Any]:
    def all_then_some(hidden_states: torch.Tensor, top_k_index: Any, top_k_weights: Any, *args: Any) -> Any:
        weights = torch.ones((hidden_states.shape[0], 1), dtype=top_k_weights.dtype)
        for expert in range(experts):  # one at a time, since masks are as large as tokens times experts at a time
            forward(hidden_states, torch.full(weights.shape, expert), weights, *args)
        return forward(hidden_states, top_k_index, top_k_weights, *args)

    return all_then_some


def note_inputs(noted: dict[str, Noted], rows: list[Rows], inputs: torch.Tensor, path: str) -> None:
    """Take one batch's inputs into what was noted.

    Raises:
        FormatError: they are no numbers.
    """
    magnitudes = inputs.abs()
    largest = magnitudes.amax(0).float()
    if not torch.isfinite(largest).all():
        raise FormatError(_FAULT, path=path, tensor=rows[0].module, expected="numbers", found="inf or nan")
    mean = magnitudes.mean(0).float()
    for one in rows:
        before = noted.get(one.module)
        if before is None:
            before = noted[one.module] = Noted(torch.zeros_like(largest), torch.zeros_like(mean))
        before.inputs = torch.maximum(before.inputs, largest)
        before.mean += mean
        before.tokens += inputs.shape[0]
        before.batches += 1
