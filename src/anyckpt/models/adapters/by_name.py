"""Adding an adapter to a base model under the base's own names, whatever its family.

An adapter names modules of the model that it was trained in; the base's files name its tensors.  Where the two agree
nothing else has to be known: what the adapter changes is changed, and every other tensor is the base's.  transformers
renames some models between files and memory, and a part of a model may be stored alone, so names may also differ by
the components that only wrap (``model``, ``language_model``), or by one component in front (``transformer``); a module
must then be the only one that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import field

from anyckpt.checkpoint import AdapterSettings, storage_key
from anyckpt.data_classes import dataclass
from anyckpt.dtypes import DType
from anyckpt.errors import MappingError
from anyckpt.models.adapters.adapter import Adapter, LowRank, Target, all_equal, check_vectors, put
from anyckpt.models.adapters.low_rank import LowRankSum
from anyckpt.models.adapters.merge import Plus, check_computed, no_bias
from anyckpt.models.adapters.peft_names import StoredAdapter, rows_of, update_of
from anyckpt.tensor import LazyTensor, Mapped

_WRAPPING = ("model", "language_model")
_HEADS = ("lm_head", "embed_out", "output_layer")
_RESIZE = "resize the base model's vocabulary as it was resized for training"


class Names:
    """A base's names of tensors, to be found by those of an adapter.

    Args:
        names: the base's.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._inner: dict[tuple[str, ...], list[str]] = {}
        self._headless: dict[tuple[str, ...], list[str]] = {}
        for name in self._names:
            inner = _inner(name)
            self._inner.setdefault(inner, []).append(name)
            self._headless.setdefault(inner[1:], []).append(name)

    def find(self, name: str) -> str | None:
        """The base's name of a tensor, None if it has none.

        Raises:
            MappingError: several fit.
        """
        if name in self._names:
            return name
        inner = _inner(name)
        found = self._inner.get(inner) or self._inner.get(inner[1:]) or self._headless.get(inner) or []
        if len(found) > 1:
            raise MappingError("fits more than one tensor of the base model", tensor=name, found=", ".join(found[:4]))
        return found[0] if found else None


def _inner(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part not in _WRAPPING)


def unplaced(stored: StoredAdapter, find: Callable[[str], str | None]) -> list[str]:
    """Modules and tensors of an adapter that a base has not."""
    modules = {**dict.fromkeys(stored.modules), **dict.fromkeys(stored.tokens)}
    missing = [module for module in modules if find(f"{module}.weight") is None]
    return missing + [name for name in stored.saved if find(name) is None]


def without_tied_copies(
    stored: StoredAdapter, tensors: Mapping[str, LazyTensor], find: Callable[[str], str | None]
) -> None:
    """Leave out whole tensors that a tied base has not, and that are equal to one that it has.

    peft stores the output layer of a resized model beside its embedding, also where the two are one.
    """
    outer = [name for name in stored.saved if not block_of(name)]
    known = [name for name in outer if find(name) is not None]
    for name in outer:
        own = tensors[stored.saved[name]]
        if name not in known and any(all_equal([own, tensors[stored.saved[other]]]) for other in known):
            del stored.saved[name]


@dataclass
class Placed:
    """An adapter on a base's tensors.

    Attributes:
        adapter: with the base's names for weights; replaced tensors and rows are the first source of each.
        conv1d: weights that are (in, out).
        alike: other names of the same tensor, as of a tied output layer.
        vocabulary: rows of the embedding before and after, or None where they stay.
    """

    adapter: Adapter
    conv1d: set[str] = field(default_factory=set)
    alike: dict[str, list[str]] = field(default_factory=dict)
    vocabulary: tuple[int, int] | None = None


def placed(
    stored: StoredAdapter,
    tensors: Mapping[str, LazyTensor],
    base: Mapping[str, LazyTensor],
    settings: AdapterSettings,
    scale: Callable[[str, int], float],
    find: Callable[[str], str | None],
    *,
    tied: bool = False,
) -> Placed:
    """Find the base's tensors that an adapter changes, and check that it fits them.

    Args:
        stored: what the adapter stores; all of it is in the base (see ``unplaced``).
        tensors: the adapter's, by stored name.
        base: the base's weights, by stored name.
        settings: what the adapter says of itself.
        scale: of a module's update, from its name and rank.
        find: the base's name of a tensor, from the adapter's.
        tied: whether the output layer is the embedding, by the base's configuration.

    Raises:
        MappingError: a factor is missing, two are for one tensor, or shapes are of another model.
        UsageError: a scale, or which tokens are trained, is not known.
    """
    result = Placed(Adapter({}))
    adapter = result.adapter

    def known(name: str) -> str:
        found = find(name)
        assert found is not None
        return found

    for name, stored_name in stored.saved.items():
        target = known(name)
        if target in adapter.replaced:
            raise MappingError(
                "takes the place of a tensor that another one replaces", tensor=stored_name, found=target
            )
        adapter.replaced[target] = {0: tensors[stored_name]}
    current = {**base, **{name: values[0] for name, values in adapter.replaced.items()}}
    for module, own in stored.modules.items():
        weight = known(f"{module}.weight")
        put(adapter.updates, Target(weight), update_of(module, own, scale))
    orientation = _Orientation(current, adapter, settings)
    for target_of, update in adapter.updates.items():
        embeds = any("lora_embedding_" in name for name in update.names)
        if orientation.is_conv1d(target_of.weight, update, embeds):
            result.conv1d.add(target_of.weight)
    for module, name in stored.tokens.items():
        weight = known(f"{module}.weight")
        adapter.rows[weight] = {0: rows_of(module, name, tensors[name], settings.token_indices)}
    _find_alike(result, base, tied)
    _check_replaced(result, base, stored, tensors)
    return result


class _Orientation:
    """Whether weights are (out, in), as a linear layer's, or (in, out), as those of transformers' ``Conv1D``.

    peft's ``fan_in_fan_out`` is of the module that it wrapped last.  Shapes tell, and for square weights those of the
    other modules of the same layer.
    """

    def __init__(self, base: Mapping[str, LazyTensor], adapter: Adapter, settings: AdapterSettings) -> None:
        self._base = base
        self._stated = settings.fan_in_fan_out
        self._seen: dict[str, set[bool]] = {}
        for name, tensor in base.items():
            bias = base.get(name.removesuffix("weight") + "bias") if name.endswith(".weight") else None
            told = bias is not None and tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1]
            if told and bias is not None and bias.ndim == 1 and bias.shape[0] in tensor.shape:
                self._seen.setdefault(block_of(name), set()).add(bias.shape[0] == tensor.shape[1])
        for target, update in adapter.updates.items():
            shape = (update.up.shape[0], update.down.shape[1])
            if base[target.weight].ndim == 2 and shape[0] != shape[1]:
                self._seen.setdefault(block_of(target.weight), set()).add(base[target.weight].shape == shape[::-1])

    def is_conv1d(self, name: str, update: LowRank, embeds: bool) -> bool:
        """Whether a weight is (in, out).

        Raises:
            MappingError: the update has another shape.
        """
        weight = self._base[name]
        rows, columns = update.up.shape[0], update.down.shape[1]
        fits = weight.ndim > 1 and (weight.shape[0], weight.size // max(1, weight.shape[0])) == (rows, columns)
        turned = weight.ndim == 2 and weight.shape == (columns, rows) and not embeds
        if not fits and not turned:
            outer = block_of(name) == "" and weight.ndim == 2 and weight.shape[1] == columns
            raise MappingError(
                "the adapter is of another base model",
                tensor=(update.names or (name,))[-1],
                expected=f"an update of a weight of shape {weight.shape}",
                found=f"one of shape {(rows, columns)}",
                remedy=_RESIZE if outer else "give the base model that it was trained on",
            )
        check_vectors(update, update.names[0])
        if not (fits and turned):
            return turned
        seen = self._seen.get(block_of(name), set())
        return seen.pop() if len(seen) == 1 else self._stated


def block_of(name: str) -> str:
    """A name up to its last number: the layer that a tensor is in, empty outside of layers."""
    parts = name.split(".")
    last = max((at for at, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


def _find_alike(result: Placed, base: Mapping[str, LazyTensor], tied: bool) -> None:
    """Find the other names of tensors that are changed: the same bytes, or a stored copy of what is tied."""
    adapter = result.adapter
    changed = {*(target.weight for target in adapter.updates), *adapter.replaced, *adapter.rows}
    names: dict[object, list[str]] = {}
    for name, tensor in base.items():
        key = storage_key(tensor)
        if key is not None:
            names.setdefault(key, []).append(name)
    for name in changed:
        tensor = base[name]
        others = [other for other in names.get(storage_key(tensor), ()) if other not in changed]
        if tied and not block_of(name) and tensor.ndim == 2:
            others += [
                other
                for other, value in base.items()
                if other not in changed
                and other not in others
                and not block_of(other)
                and (value.shape, value.dtype) == (tensor.shape, tensor.dtype)
                and all_equal([tensor, value])
            ]
        if others:
            result.alike[name] = others
    heads = (
        [name for name in adapter.replaced if name.split(".")[-2:-1] and name.split(".")[-2] in _HEADS] if tied else []
    )
    for name in heads:
        value = adapter.replaced[name][0]
        embeddings = (own[0] for other, own in adapter.replaced.items() if other != name and not block_of(other))
        if not any(all_equal([value, own]) for own in embeddings):
            raise MappingError(
                "the adapter has an output layer of its own, and the base model's is tied to its embedding",
                tensor=name,
                expected="an untied base model",
                remedy="untie the base model, or leave the tensor out with --exclude",
            )


def _check_replaced(
    result: Placed, base: Mapping[str, LazyTensor], stored: StoredAdapter, tensors: Mapping[str, LazyTensor]
) -> None:
    """Raise MappingError unless replaced tensors fit, or all that have the vocabulary's rows have others now."""
    resized: dict[str, tuple[int, int]] = {}
    told = {id(tensors[name]): name for name in stored.saved.values()}
    for name, values in result.adapter.replaced.items():
        old, new = base[name].shape, values[0].shape
        if old == new:
            continue
        of_vocabulary = len(old) == 2 or (
            len(old) == 1 and f"{name.removesuffix('.bias')}.weight" in result.adapter.replaced
        )
        if not of_vocabulary or len(old) != len(new) or old[1:] != new[1:] or block_of(name):
            raise MappingError(
                "the adapter replaces a weight by one of another shape",
                tensor=told[id(values[0])],
                expected=old,
                found=new,
                remedy="give the base model that it was trained on",
            )
        resized[name] = (old[0], new[0])
    if not resized:
        return
    rows = set(resized.values())
    before, after = next(iter(rows))
    copies = {other for name in resized for other in result.alike.get(name, ())}
    matrices = {base[name].shape for name in resized if base[name].ndim > 1}
    others = [
        name
        for name, tensor in base.items()
        if name not in resized
        and name not in copies
        and not block_of(name)
        and (tensor.shape in matrices or (name.endswith(".bias") and f"{name[:-5]}.weight" in resized))
    ]
    if len(rows) > 1 or others:
        first = next(iter(resized))
        raise MappingError(
            "the adapter resizes only a part of what has the vocabulary's rows",
            tensor=told[id(result.adapter.replaced[first][0])],
            expected=f"{after} rows for all of them",
            found=", ".join(others[:4]) or f"{', '.join(str(new) for _, new in sorted(rows))} rows",
            remedy=_RESIZE,
        )
    result.vocabulary = (before, after)


def merged_by_name(
    base: Mapping[str, LazyTensor], found: Placed, *, scale: float, cast: Callable[[str, LazyTensor], DType]
) -> dict[str, LazyTensor]:
    """The base's tensors with the adapter in them; views, nothing is computed before it is read.

    Args:
        base: weights by stored name.
        found: the adapter on them.
        scale: every update is multiplied by it, besides its own scale.
        cast: element type that a changed tensor gets, from its name and the base's tensor.

    Raises:
        MappingError: a weight is of a type that nothing can be added to, or the base has no bias that is to change.
    """
    result = dict(base)
    for name, values in found.adapter.replaced.items():
        result[name] = values[0].cast(cast(name, base[name]))
    for name, rows in found.adapter.rows.items():
        result[name] = rows[0].put_into(result[name], cast(name, base[name]))
    for target, update in found.adapter.updates.items():
        name = target.weight
        weight = result[name]
        check_computed(name, weight)
        own = cast(name, base[name])
        flat = weight.transpose() if name in found.conv1d else weight
        matrix = flat.reshape((flat.shape[0], flat.size // flat.shape[0]))
        total = LowRankSum(matrix, update.up, update.down, update.scale * scale, update.magnitude, own)
        result[name] = total.transpose() if name in found.conv1d else total.reshape(weight.shape)
        if update.bias is not None:
            _add_bias(result, name, update, scale, cast)
    for name, others in found.alike.items():
        result.update(dict.fromkeys(others, result[name]))
    return result


def _add_bias(
    tensors: dict[str, LazyTensor],
    weight: str,
    update: LowRank,
    scale: float,
    cast: Callable[[str, LazyTensor], DType],
) -> None:
    bias = weight.removesuffix("weight") + "bias"
    assert update.bias is not None
    if bias not in tensors or tensors[bias].shape != update.bias.shape:
        raise no_bias(update, bias)
    own = cast(bias, tensors[bias])
    tensors[bias] = Mapped((tensors[bias], update.bias), own, Plus(update.scale * scale, own))
