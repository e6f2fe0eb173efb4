"""A model of transformers without memory for its weights, and a part of it with them."""

from __future__ import annotations

import ctypes
import inspect
import mmap
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from anyckpt.checkpoint import Checkpoint
from anyckpt.data_classes import dataclass
from anyckpt.errors import AnyckptError, UsageError
from anyckpt.tensor import LazyTensor

_CODE = {
    *("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal", "quantization_config"),
}
"""Settings of a configuration that name code, which transformers would fetch from the hub and run, or other weights."""

_NUMBER = re.compile(r"(?:.*?\.)?(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Rows:
    """Where the weight of a module of the checkpoint lies in a parameter of the model.

    Attributes:
        module: its name in the checkpoint.
        start: its first row.
        count: how many it has.
    """

    module: str
    start: int
    count: int


class LazyModel:
    """A causal language model of transformers whose parameters have no memory until they are loaded.

    Args:
        hub: a checkpoint under Hugging Face's names, with its configuration.
        kind: the type in which it runs.

    Raises:
        UsageError: transformers has no such architecture, or weights that it needs are missing.
    """

    def __init__(self, hub: Checkpoint, kind: torch.dtype) -> None:
        self.path = hub.path
        self.whole = _made(hub, kind)
        self.module: nn.Module = getattr(self.whole, self.whole.base_model_prefix, self.whole)
        self._weights = hub.weights()
        self._shapes = {name: tensor.shape for name, tensor in self.whole.state_dict(keep_vars=True).items()}
        self._kinds = {name: tensor.dtype for name, tensor in self.whole.state_dict(keep_vars=True).items()}
        self._converters: dict[str, Any] = {}
        self._sources: dict[str, list[tuple[str, str]]] = {}
        self._find_sources()

    @property
    def prefix(self) -> str:
        """What the names of the whole model's parameters have before those of ``module``'s."""
        return next((f"{name}." for name, module in self.whole.named_modules() if module is self.module and name), "")

    @property
    def cache_argument(self) -> str:
        """What ``forward`` calls its cache; later releases of transformers 5 have another word."""
        return "cache" if "cache" in inspect.signature(self.module.forward).parameters else "past_key_values"

    def layers(self, weights: Mapping[str, LazyTensor]) -> dict[str, nn.Module]:
        """The modules that are loaded one at a time: the outermost numbered ones that have any of these weights.

        Args:
            weights: by their names in the checkpoint.
        """
        targets = [target for target, found in self._sources.items() if any(name in weights for name, _ in found)]
        names = dict.fromkeys(
            target[: match.end(1)] for target in targets if (match := _NUMBER.match(target)) is not None
        )
        return {name: self.whole.get_submodule(name) for name in names}

    def rows(self, parameter: str) -> list[list[Rows]]:
        """The modules of the checkpoint that a matrix is made of, or each of several stacked; empty if that is unknown.

        Args:
            parameter: its name in the whole model.
        """
        found = self._sources.get(parameter, [])
        by_pattern: dict[str, list[str]] = {}
        for name, pattern in found:
            by_pattern.setdefault(pattern, []).append(name)
        shape = self._shapes[parameter]
        experts = shape[0] if len(shape) == 3 else 1
        if any(len(names) != experts for names in by_pattern.values()):
            return []
        result: list[list[Rows]] = []
        for number in range(experts):
            start, several = 0, []
            for names in by_pattern.values():
                count = self._weights[names[number]].shape[0]
                several.append(Rows(names[number].removesuffix(".weight"), start, count))
                start += count
            result.append(several)
        columns = {self._weights[name].shape[-1] for name, _ in found}
        fits = all(several and several[-1].start + several[-1].count == shape[-2] for several in result)
        return result if fits and columns == {shape[-1]} else []

    def source_of(self, parameter: str) -> str:
        """The checkpoint's name for a module with a parameter of its own, such as a normalization; "" if none."""
        found = self._sources.get(parameter, [])
        return found[0][0].removesuffix(".weight") if len(found) == 1 else ""

    def load(self, name: str, module: nn.Module, *, recurse: bool = True) -> None:
        """Give the parameters of a module memory and their numbers, and its persistent buffers theirs.

        Args:
            name: the module's, in the whole model.
            module: it.
            recurse: those of the modules in it, too.

        Raises:
            UsageError: the checkpoint has not all of them.
            FormatError: bytes are missing from a file.
        """
        stem = f"{name}." if name else ""
        for target in self._sources:
            if target.startswith(stem) and (recurse or "." not in target[len(stem) :]):
                for full, tensor in self._converted(target).items():
                    _put(self.whole, full, tensor.to(self._kinds[full]))
        named = module.named_parameters(recurse=recurse)
        lacking = next((own for own, tensor in named if tensor.is_meta), None)
        if lacking is not None:
            raise UsageError(
                f"{self.path}: transformers' {type(self.whole).__name__} needs a weight that the checkpoint has not",
                tensor=stem + lacking,
            )

    def bytes_of(self, name: str) -> int:
        """Bytes of the weights that a module is loaded from."""
        found = {
            source
            for target, several in self._sources.items()
            if target.startswith(f"{name}.")
            for source, _ in several
        }
        return sum(self._weights[source].nbytes for source in found)

    @staticmethod
    def free(module: nn.Module, *, recurse: bool = True) -> None:
        """Take the memory of a module's parameters, and of those in it."""
        for part in module.modules() if recurse else (module,):
            for own, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[own] = _empty(parameter)

    def _find_sources(self) -> None:
        mapping = get_model_conversion_mapping(self.whole)
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        prefix = self.whole.base_model_prefix
        for name in sorted(self._weights, key=_in_order):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._shapes)
            if target not in self._shapes and name in self._shapes:
                target, pattern = rename_source_key(name, [], [], prefix, self._shapes)
            if target in self._shapes:
                if pattern is not None:
                    self._converters[target] = by_pattern[pattern]
                self._sources.setdefault(target, []).append((name, pattern or name))

    def _converted(self, target: str) -> dict[str, torch.Tensor]:
        """What transformers makes of a parameter's sources: it, or all that come of the same."""
        converter = self._converters.get(target)
        if converter is None:
            return {target: self._read(self._sources[target][0][0])}
        own = deepcopy(converter)
        for name, pattern in self._sources[target]:
            own.add_tensor(target, name, pattern, lambda name=name: self._read(name))
        made = own.convert(target, model=self.whole, config=self.whole.config)
        return {full: found[0] if isinstance(found, list) else found for full, found in made.items()}

    def _read(self, name: str) -> torch.Tensor:
        """In memory of its own, which the system gets back at once; malloc would keep most of it between layers."""
        tensor = self._weights[name]
        kind: torch.dtype = getattr(torch, tensor.dtype.name)
        try:
            if not tensor.size:
                return torch.empty(tensor.shape, dtype=kind)
            memory = mmap.mmap(-1, tensor.nbytes)
            tensor.fill(0, np.frombuffer(memory, tensor.dtype.raw))
            return torch.frombuffer(memory, dtype=kind).reshape(tensor.shape)
        except AnyckptError as error:
            error.path, error.tensor = error.path or self.path, error.tensor or name
            raise


def give_back() -> None:
    """Let the system have what malloc keeps; where the C library is not glibc, it decides by itself.

    What is noted of a layer lies between what was freed of it, so that without this a layer's temporary matrices would
    stay for each layer.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _made(hub: Checkpoint, kind: torch.dtype) -> Any:
    name = str(hub.config.get("model_type"))
    stated = _without_code({key: value for key, value in hub.config.items() if key != "model_type"})
    try:
        config = AutoConfig.for_model(name, **stated)
        config._experts_implementation = "eager"  # others put experts' products together, so that none is seen
        with _no_memory():
            made = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=kind, trust_remote_code=False
            )
        return made.eval()
    except Exception as error:  # nothing but transformers' classes, which check values each in its own way
        raise UsageError(
            f"{hub.path}: transformers makes no causal language model of this configuration",
            expected="a model_type that AutoModelForCausalLM knows",
            found=f"{name}: {error}".splitlines()[0][:120],
            remedy="choose an algorithm that needs no activations, or give statistics with --stats",
        ) from error


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what makes transformers look for code elsewhere, or for another way to keep weights."""
    return {
        key: _without_code(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _CODE
    }


@contextmanager
def _no_memory() -> Iterator[None]:
    """While it lasts, parameters are made without memory; buffers, which are small and often computed, have theirs."""
    register = nn.Module.register_parameter

    def without(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, None if param is None else _empty(param))

    nn.Module.register_parameter = without  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    stem, _, own = name.rpartition(".")
    module = model.get_submodule(stem)
    present = module._parameters[own] if own in module._parameters else module._buffers[own]
    if present is not None and present.shape != tensor.shape:
        raise UsageError(
            "has another shape than transformers' model",
            tensor=name,
            expected=(*present.shape,),
            found=(*tensor.shape,),
        )
    if own in module._parameters:
        module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[own] = tensor


def _in_order(name: str) -> list[tuple[int, str]]:
    """Numbers by size, as transformers sorts what it collects."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
