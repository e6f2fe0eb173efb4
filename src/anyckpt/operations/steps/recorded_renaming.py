"""A renaming as a value: which tensors each new one is made of and how, found once and applied to whatever has their
names and shapes, be it weights, masters or moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

from anyckpt.dtypes import DType
from anyckpt.errors import MappingError
from anyckpt.identity import Identity
from anyckpt.indexing import Array, Shape
from anyckpt.models.complete import some
from anyckpt.models.copies import is_equal
from anyckpt.optimizer.parameters import buffers
from anyckpt.tensor import Boxed, Cast, Constant, LazyTensor, Mapped, Mosaic, Permuted, Reshaped, Stored, View

Tensors = dict[str, LazyTensor]


class Renaming:
    """What becomes of tensors that have the names and shapes of a checkpoint's weights.

    A function of such tensors, by name, that gives the new ones; what is made of buffers alone is left out where these
    are not among them, and what is of no weight stays as it is, for whoever knows what should be there.

    Args:
        rename: a function of the weights by name, that moves elements and decides by names, shapes and elements.
        weights: by name.
        whole: whether it takes whole models only, buffers aside.
    """

    def __init__(self, rename: Callable[[Tensors], Tensors], weights: Mapping[str, LazyTensor], *, whole: bool) -> None:
        self._rename = rename
        self._weights = weights
        self._whole = whole

    @cached_property
    def _made(self) -> Tensors:
        """The new tensors, of origins."""
        return self._rename({name: Origin(name, tensor) for name, tensor in self._weights.items()})

    @cached_property
    def sources(self) -> dict[str, frozenset[str]]:
        """New name -> names of those that the tensor is made of."""
        return {name: frozenset(origin.name for origin in _origins(made)) for name, made in self._made.items()}

    @property
    def computes(self) -> bool:
        """Whether any element of a new tensor is another number than what it is made of."""
        return any(map(_computes, self._made.values()))

    def __call__(self, tensors: Tensors) -> Tensors:
        """
        Raises:
            MappingError: tensors are missing of which others are made together with those given, or have other shapes
                than the weights, or a weight that is stored twice has two of them that differ.
        """
        self._check_whole(tensors)
        self._check_copies(tensors)
        kind = next((tensor.dtype for tensor in tensors.values()), None)
        unknown = {name: tensor for name, tensor in tensors.items() if name not in self._weights}
        if kind is None:
            return unknown
        names = [name for name, sources in self.sources.items() if sources <= tensors.keys()]
        if not self._whole:  # a model of any names is in the order of what is given
            place = {name: number for number, name in enumerate(tensors)}
            names.sort(key=lambda name: min(map(place.__getitem__, self.sources[name]), default=len(place)))
        made = {name: self._made[name] for name in names}
        return unknown | {
            name: tensors[new.name] if isinstance(new, Origin) else _of(new, tensors, kind)
            for name, new in made.items()
        }

    def anew(self, tensors: Tensors) -> Tensors:
        """The same done to a whole model's other tensors of these names and shapes, element types being as they are."""
        return self._rename(tensors)

    def after(self, stored: Mapping[str, str], weights: Mapping[str, LazyTensor]) -> Renaming:
        """The renaming of weights that get the names which this one takes.

        Args:
            stored: such a name -> the weight's.
            weights: by their names.
        """

        def rename(tensors: Tensors) -> Tensors:
            return self._rename({name: tensors[old] for name, old in stored.items()})

        return Renaming(rename, weights, whole=self._whole)

    def _check_whole(self, tensors: Tensors) -> None:
        without = buffers(self._weights)
        lacking: dict[str, None] = {}
        for names in self.sources.values():
            absent = names - tensors.keys()
            if absent and (self._whole or len(absent) < len(names)):
                lacking.update(dict.fromkeys(sorted(absent - without.keys())))
        if lacking:
            raise MappingError(
                f"{len(lacking)} tensors of the model are missing: {some(lacking)}",
                tensor=next(iter(lacking)) if len(lacking) == 1 else None,
            )

    def _check_copies(self, tensors: Tensors) -> None:
        """Raise MappingError unless weights that are left out as copies of others have the others' tensors."""
        used = frozenset().union(*self.sources.values())
        for name in [name for name in tensors if name not in used and name in self._weights]:
            for other in used & tensors.keys():
                if is_equal(self._weights[name], self._weights[other]) and not is_equal(tensors[name], tensors[other]):
                    raise MappingError(
                        f"differs from that of {other}, though the weight is the same",
                        tensor=name,
                        expected="equal values",
                    )


class Origin(View):
    """A tensor that keeps its name whatever is made of it."""

    __slots__ = ("name",)

    def __init__(self, name: str, child: LazyTensor) -> None:
        super().__init__(child)
        self.name = name

    def identity(self) -> Identity:
        return (self.child,)

    def read_box(self, start: Shape, out: Array) -> None:
        self.child.read_box(start, out)


def _parts(tensor: LazyTensor) -> tuple[LazyTensor, ...]:
    """What a tensor is directly made of."""
    if isinstance(tensor, Mosaic):
        return tuple(tensor.tiles)
    if isinstance(tensor, Mapped):
        return tensor.children
    return (tensor.child,) if isinstance(tensor, View) and not isinstance(tensor, Origin) else ()


def _origins(tensor: LazyTensor) -> Iterator[Origin]:
    if isinstance(tensor, Origin):
        yield tensor
    for part in _parts(tensor):
        yield from _origins(part)


def _computes(tensor: LazyTensor) -> bool:
    moves = isinstance(tensor, (Origin, Stored, Constant, Mosaic, Boxed, Permuted, Reshaped)) or _widens(tensor)
    return not moves or any(map(_computes, _parts(tensor)))


def _widens(tensor: LazyTensor) -> bool:
    """Whether it is a cast, as parts of one fused tensor get that are of different types."""
    return isinstance(tensor, Mapped) and isinstance(tensor.function, Cast)


def _of(made: LazyTensor, tensors: Tensors, kind: DType) -> LazyTensor:
    """The same made of other tensors, of an element type of their own."""
    if isinstance(made, Origin):
        found = tensors[made.name]
        if found.shape != made.shape:
            raise MappingError(
                "has another shape than the weight", tensor=made.name, expected=made.shape, found=found.shape
            )
        return found
    if isinstance(made, Constant):
        return made if any(made.element) else Constant(kind, made.shape)
    parts = [_of(part, tensors, kind) for part in _parts(made)]
    if isinstance(made, Mosaic):
        return Mosaic(parts[0].dtype, made.shape, made.starts, made.stops, parts)
    if isinstance(made, Boxed):
        return parts[0].box(made.start, made.shape)
    if isinstance(made, Permuted):
        return parts[0].permute(made.axes)
    if isinstance(made, Reshaped):
        return parts[0].reshape(made.shape)
    assert _widens(made)
    return parts[0]
