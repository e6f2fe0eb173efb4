"""What calibration saw of a model's activations: plain numbers by module, and the file that keeps them.

Modules have the names that a Hugging Face folder gives their weights.  With these numbers and the weights, whatever
NVIDIA ModelOpt 0.40 finds by calibration is computed again, so that a second export needs no forward pass.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import field
from typing import Any

import numpy as np

from anyckpt.containers.safetensors import read_safetensors, safetensors_parts
from anyckpt.data_classes import dataclass
from anyckpt.engine.execute import execute
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import FormatError, OutputError, UsageError
from anyckpt.indexing import Array
from anyckpt.storage.location import look_at
from anyckpt.tensor import LazyTensor, from_array

ALPHAS = tuple(number / 10 for number in range(11))
"""The exponents that the search of AWQ tries, in turn."""

_KIND = "anyckpt calibration"
_VERSION = 1
_KEY = "calibration"
_PARTS = ("inputs", "columns", "scales", "losses")
_SAMPLE = 64
_TYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Seen:
    """What was seen of one linear module, of N outputs and K inputs.

    Attributes:
        inputs: the largest magnitude of each input, float32 ``[K]``.
        columns: the largest magnitude in each column of the weight, float32 ``[K]``.
        tokens: how many tokens went in.
        losses: the mean square of what quantizing changes in the module's outputs, summed over batches, for each of
            ``ALPHAS``; float64.
        scales: what AWQ multiplies the columns of the weight by, float32 ``[K]``, for the exponent that loses least.
            Both are None where AWQ was not asked for.
    """

    inputs: Array
    columns: Array
    tokens: int
    losses: Array | None = None
    scales: Array | None = None

    @property
    def alpha(self) -> float | None:
        """The exponent of AWQ: the first of those with the least loss."""
        return None if self.losses is None else ALPHAS[int(np.argmin(self.losses))]


@dataclass(frozen=True)
class Shared:
    """Linear modules that get one and the same tensor.

    Attributes:
        modules: their names, in the order in which they run.
        norm: name of the normalization whose output the tensor is; "" if it is none's.
    """

    modules: tuple[str, ...]
    norm: str = ""


@dataclass(frozen=True)
class Statistics:
    """What calibration saw.

    Attributes:
        model: digest of the model's linear weights, see ``digest_of``.
        computed_in: torch's name of the type that the model ran in, such as ``bfloat16``.
        modules: each linear module that ran.
        shared: those of them that share their input.
        caches: name of an attention's module -> largest magnitude of keys (as they are kept: after rotation), values.
        group_size: columns of a group in the search for these; None if there was none.
        facts: how it was made: ``texts``, ``tokens``, ``sequence_length``, ``batches`` and so on, for reports.
    """

    model: str
    computed_in: str
    modules: Mapping[str, Seen]
    shared: tuple[Shared, ...] = ()
    caches: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    group_size: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file, whole or not at all; statistics that are there are replaced.

        Raises:
            OutputError: it cannot be written, or something else is there.
        """
        check_replaceable(path)
        tensors: dict[str, LazyTensor] = {}
        for name, seen in self.modules.items():
            for part in _PARTS:
                array = getattr(seen, part)
                if array is not None:
                    tensors[f"{name}.{part}"] = from_array(array)
        stated = {
            "kind": _KIND,
            "version": _VERSION,
            "model": self.model,
            "computed_in": self.computed_in,
            "group_size": self.group_size,
            "tokens": {name: seen.tokens for name, seen in self.modules.items()},
            "shared": [[*one.modules, one.norm] for one in self.shared],
            "caches": {name: list(pair) for name, pair in self.caches.items()},
            "facts": dict(self.facts),
        }
        file = OutputFile("", safetensors_parts(tensors, {_KEY: json.dumps(stated)}))
        execute(Plan("safetensors", (file,)), os.fspath(path), overwrite=True)


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Raise OutputError if something is there that is no file of statistics, which is never replaced."""
    if os.path.isdir(path):
        raise OutputError("is a directory", path=path, remedy="choose the name of a file for the statistics")
    if not os.path.lexists(path) or (os.path.isfile(path) and not os.path.getsize(path)):
        return
    try:
        _, metadata = read_safetensors(look_at(path).open())
    except FormatError:
        metadata = None
    if _KEY not in (metadata or {}):
        raise OutputError(
            "is a file of something else than statistics, which is not replaced by them",
            path=path,
            remedy="choose another path or remove it yourself",
        )


def load(path: str | os.PathLike[str]) -> Statistics:
    """Statistics from the file that ``Statistics.save`` wrote.

    Raises:
        FormatError: it is damaged, or none of these.
    """
    location = look_at(path)
    tensors, metadata = read_safetensors(location.open())
    try:
        stated = json.loads((metadata or {})[_KEY])
        if stated["kind"] != _KIND or stated["version"] != _VERSION or stated["computed_in"] not in _TYPES:
            raise ValueError
        modules = {}
        for name, tokens in stated["tokens"].items():
            parts = {part: _array(tensors[f"{name}.{part}"]) for part in _PARTS if f"{name}.{part}" in tensors}
            modules[name] = _checked(Seen(tokens=int(tokens), **parts))
        size = stated["group_size"]
        return Statistics(
            str(stated["model"]),
            stated["computed_in"],
            modules,
            tuple(Shared(tuple(map(str, one[:-1])), str(one[-1])) for one in stated["shared"]),
            {str(name): (_magnitude(keys), _magnitude(values)) for name, (keys, values) in stated["caches"].items()},
            None if size is None else int(size),
            dict(stated["facts"]),
        )
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise FormatError(
            "is no file of calibration statistics",
            path=location.path,
            expected="what anyckpt quantize --save-stats writes",
            found="other tensors" if metadata is None else repr(error)[:80],
        ) from error


def _array(tensor: LazyTensor) -> Array:
    if tensor.ndim != 1 or tensor.dtype.name not in ("float32", "float64"):
        raise ValueError(f"{tensor.dtype.name} {tensor.shape}")
    found = np.array(tensor.numpy())
    if not np.isfinite(found).all():
        raise ValueError("infinite values or not-a-numbers")
    return found


def _checked(seen: Seen) -> Seen:
    alike = [one for one in (seen.inputs, seen.columns, seen.scales) if one is not None]
    if any(one.dtype != np.float32 or one.shape != seen.inputs.shape or (one < 0).any() for one in alike):
        raise ValueError("other than a magnitude of each input")
    if seen.scales is not None and not seen.scales.all():
        raise ValueError("scales of zero")
    if seen.losses is not None and seen.losses.size != len(ALPHAS):
        raise ValueError(f"{seen.losses.size} exponents")
    return seen


def _magnitude(value: Any) -> float:
    found = float(value)
    if not 0 <= found < math.inf:
        raise ValueError(f"{found} is no magnitude")
    return found


def digest_of(weights: Mapping[str, LazyTensor]) -> str:
    """What tells one model's linear weights from another's: their names, shapes and some of their numbers.

    Args:
        weights: under Hugging Face's names, of any floating-point type: as long as numbers are the same, it is, too.
    """
    import xxhash

    state = xxhash.xxh3_128()
    for name in sorted(weights):
        tensor = weights[name]
        state.update(json.dumps([name, *tensor.shape]).encode())
        flat = tensor.reshape((tensor.size,))
        sample = flat.narrow(0, tensor.size // 2, min(_SAMPLE, tensor.size - tensor.size // 2))
        state.update(sample.cast("float32").numpy().tobytes())
    return state.hexdigest()


def check_is_of(statistics: Statistics, weights: Mapping[str, LazyTensor], path: str) -> None:
    """Raise UsageError unless the statistics are of this model.

    Args:
        statistics: of some model.
        weights: the linear weights of this one, under Hugging Face's names.
        path: of this one, for messages.
    """
    for name, weight in weights.items():
        seen = statistics.modules.get(name.removesuffix(".weight"))
        if seen is not None and seen.inputs.shape != (weight.shape[-1],):
            raise UsageError(
                f"{path}: the statistics are of another model",
                tensor=name,
                expected=f"{weight.shape[-1]} inputs",
                found=f"{seen.inputs.size}",
                remedy="calibrate this one",
            )
    known = {name.removesuffix(".weight"): name for name in weights}
    if not known.keys() & statistics.modules.keys():
        raise UsageError(
            f"{path}: the statistics are of another model",
            expected=f"modules such as {next(iter(known), 'none')}",
            found=next(iter(statistics.modules), "none"),
            remedy="calibrate this one",
        )
    both = {known[name]: weights[known[name]] for name in known.keys() & statistics.modules.keys()}
    if len(both) < len(statistics.modules) or digest_of(both) != statistics.model:
        missing = next((name for name in statistics.modules if name not in known), None)
        raise UsageError(
            f"{path}: the statistics are of another model",
            expected="the weights that ran when they were made",
            found="other numbers in weights of the same names" if missing is None else f"a model without {missing}",
            remedy="calibrate this one",
        )
