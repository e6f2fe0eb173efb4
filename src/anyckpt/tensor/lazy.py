"""What every lazy tensor can do.

Its methods give other kinds of lazy tensors, which are its subclasses and so are imported where they are made.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from anyckpt.dtypes import DType, dtype
from anyckpt.errors import UsageError
from anyckpt.identity import Identity
from anyckpt.indexing import (
    Array,
    Shape,
    flat_boxes,
)
from anyckpt.storage.gather import SCRATCH_BYTES, hole, needed
from anyckpt.storage.requests import HELD_BYTES, in_few, is_far

if TYPE_CHECKING:
    from anyckpt.storage.requests import Wanted
    from anyckpt.tensor.nodes import Stored

_MATERIALISE_LIMIT = 64


class LazyTensor(ABC):
    """A tensor that has not been read.

    Attributes:
        dtype: element type.
        shape: elements along each axis.
    """

    __slots__ = ("dtype", "shape")
    dtype: DType
    shape: Shape

    # -- reading ---------------------------------------------------------------------------------------------

    @abstractmethod
    def read_box(self, start: Shape, out: Array) -> None:
        """Fill ``out`` with the box of its shape that begins at ``start``.

        Args:
            start: first index along each axis; the box must lie inside the tensor.
            out: array of raw dtype, of any strides.

        Raises:
            FormatError: bytes are missing from a file.
        """

    @abstractmethod
    def pieces(self) -> Iterator[Stored]:
        """Every stored piece that the tensor is made of, in no stated order."""

    def identity(self) -> Identity | None:
        """Values that tell its elements from all others (see ``anyckpt.identity``); None if there are none."""
        return None

    def read_flat(self, start: int, out: Array) -> None:
        """Fill the one-dimensional ``out`` with elements ``start`` and following, counted in C order.

        Raises:
            FormatError: bytes are missing from a file.
        """
        position = 0
        for box_start, box_shape in flat_boxes(self.shape, start, out.shape[0]):
            count = math.prod(box_shape)
            self.read_box(box_start, out[position : position + count].reshape(box_shape))
            position += count

    @property
    def is_far(self) -> bool:
        """Whether reading means waiting, so that many ranges are asked for at once; its first piece tells."""
        piece = next(self.pieces(), None)
        return piece is not None and is_far(piece.source)

    def fill(self, start: int, out: Array) -> None:
        """As ``read_flat``; of a far tensor, what is needed is asked for at once.

        Raises:
            FormatError: bytes are missing from a file.
        """
        if not self.is_far:
            self.read_flat(start, out)
            return
        in_few(
            lambda first, last: self.read_flat(start + first, out[first:last]),
            lambda first, last: self.needed(start + first, last - first),
            0,
            len(out),
        )

    def needed(self, start: int, count: int) -> list[Wanted]:
        """The ranges of far sources that a run of elements needs; reads nothing, except of a node that computes."""
        return needed(lambda: self.read_flat(start, hole((count,), self.dtype.raw)))

    def numpy(self) -> Array:
        """The whole tensor as an array; ml_dtypes types for bfloat16 and fp8, unsigned integers of the element's width
        for what numpy cannot compute with.

        It is read into memory of its own; ``np.asarray(tensor)`` is a read-only mapping of the file where possible.

        Raises:
            FormatError: bytes are missing from a file.
            UsageError: the tensor repeats stored bytes so often that an array of it is a denial of service.
        """
        stored = sum(piece.stored_bytes() for piece in self.pieces())
        if self.nbytes > max(1 << 20, _MATERIALISE_LIMIT * stored) and stored:
            raise UsageError(
                "repeats a few stored values so often that it is not read whole",
                expected=f"at most {_MATERIALISE_LIMIT} times its {stored} stored bytes",
                found=f"{self.nbytes} bytes",
                remedy="read slices of it",
            )
        out = np.empty(self.shape, dtype=self.dtype.raw)
        if out.size:
            self.fill(0, out.reshape(-1)) if self.is_far else self.read_box((0,) * self.ndim, out)
        return as_numbers(out, self.dtype)

    def chunks(self, nbytes: int = SCRATCH_BYTES) -> Iterator[Array]:
        """The elements in C order, as one-dimensional arrays of at most ``nbytes``; each is valid until the next.

        Raises:
            FormatError: bytes are missing from a file.
        """
        step = max(1, nbytes // self.dtype.itemsize)
        window = self.window(step)
        buffer = np.empty(min(window, self.size), dtype=self.dtype.raw)
        for start in range(0, self.size, window):
            part = buffer[: min(window, self.size - start)]
            self.fill(start, part)
            for first in range(0, len(part), step):
                yield as_numbers(part[first : first + step], self.dtype)

    def window(self, step: int) -> int:
        """How many elements to read at a time where they are looked at by ``step``: of a far tensor, several steps."""
        most = HELD_BYTES // self.dtype.itemsize
        return step * max(1, most // step) if self.is_far else step

    # -- facts -----------------------------------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements in C order, whatever is stored."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor without axes has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazyTensor({self.dtype.name}, shape={self.shape}, {self.nbytes:,} bytes)"

    def _repr_html_(self) -> str:
        from anyckpt.markup import notebook, table

        row = (self.dtype.name, str(list(self.shape)), f"{self.nbytes:,} bytes")
        return notebook(table(type(self).__name__, ("type", "shape", "size"), [row]))

    # -- arrays of other libraries ---------------------------------------------------------------------------

    def region(self) -> Stored | None:
        """The tensor as one strided region of a source; None if it is put together or computed."""
        return None

    def torch(self, *, copy: bool | None = None) -> Any:
        """The whole tensor as a ``torch.Tensor`` of its own type and shape; imports torch.

        Where a local file has the elements as they are in memory, the tensor is a mapping of the file and nothing is
        read yet; what is written to it stays in the process.  Of ``quint8`` and such it has the codes.

        Args:
            copy: memory of its own (True), a mapping of the file (False), or this where possible (None).

        Raises:
            FormatError: bytes are missing from a file.
            MissingLibraryError: torch is not installed.
            UsageError: torch has no such element type, or ``copy`` is False and there is no mapping.
        """
        from anyckpt.views import TorchFiles

        return TorchFiles().tensor(self, copy=copy)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        from anyckpt.views import array_of

        return array_of(self, dtype, copy)

    def __dlpack__(self, **options: Any) -> Any:
        from anyckpt.views import for_dlpack

        return for_dlpack(self).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # the processor's memory

    # -- algebra ---------------------------------------------------------------------------------------------

    def narrow(self, axis: int, start: int, length: int) -> LazyTensor:
        """The part with indices ``[start, start + length)`` along ``axis``."""
        begin = [0] * self.ndim
        begin[axis] = start
        shape = [*self.shape]
        shape[axis] = length
        return self.box(tuple(begin), tuple(shape))

    def box(self, start: Shape, shape: Shape) -> LazyTensor:
        """The box of the given shape that begins at ``start``.

        Raises:
            UsageError: it is not inside the tensor.
        """
        if (
            len(start) != self.ndim
            or len(shape) != self.ndim
            or any(b < 0 or n < 0 or b + n > whole for b, n, whole in zip(start, shape, self.shape, strict=True))
        ):
            raise UsageError("a slice lies outside the tensor", expected=self.shape, found=f"{start} + {shape}")
        if shape == self.shape:
            return self
        return self._box(start, shape)

    def _box(self, start: Shape, shape: Shape) -> LazyTensor:
        from anyckpt.tensor.views import Boxed

        return Boxed(self, start, shape)

    def __getitem__(self, key: Any) -> LazyTensor:
        """As numpy's basic indexing: integers, slices with positive steps, ellipsis.

        Raises:
            UsageError: an index is something else, there are too many, or one lies outside the tensor.
        """
        keys = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in [k for k in keys if k is Ellipsis]:
            at = next(i for i, k in enumerate(keys) if k is Ellipsis)
            keys[at : at + 1] = [slice(None)] * (self.ndim - len(keys) + 1)
        keys += [slice(None)] * (self.ndim - len(keys))
        if len(keys) > self.ndim:
            raise UsageError("too many indices", expected=f"{self.ndim} at most", found=len(keys))
        start: list[int] = []
        shape: list[int] = []
        steps: list[int] = []
        for k, whole in zip(keys, self.shape, strict=True):
            if isinstance(k, slice):
                first, last, step = k.indices(whole)
                if step < 1:
                    raise UsageError("a slice's step must be positive", found=step)
                start.append(first)
                shape.append(max(0, last - first))
                steps.append(step)
            elif isinstance(k, bool) or not isinstance(k, SupportsIndex):
                raise UsageError("an index is neither a whole number nor a slice", found=repr(k)[:80])
            else:
                at = index(k) + (whole if index(k) < 0 else 0)
                if not 0 <= at < whole:
                    raise UsageError("an index lies outside the tensor", expected=f"less than {whole}", found=k)
                start.append(at)
                shape.append(1)
                steps.append(1)
        result = self.box(tuple(start), tuple(shape))
        for axis, step in enumerate(steps):
            if step > 1:
                result = result.every(axis, step)
        if all(isinstance(k, slice) for k in keys):
            return result
        return result.reshape(tuple(n for k, n in zip(keys, result.shape, strict=True) if isinstance(k, slice)))

    def every(self, axis: int, step: int) -> LazyTensor:
        """Each ``step``-th index along ``axis``, from the first on."""
        from anyckpt.tensor.making import zeros_after

        whole, length = self.shape[axis], -(-self.shape[axis] // step)
        padded: LazyTensor = self
        if whole % step:
            padded = zeros_after(self, axis, step - whole % step)
        split = (*self.shape[:axis], length, step, *self.shape[axis + 1 :])
        joined = (*self.shape[:axis], length, *self.shape[axis + 1 :])
        return padded.reshape(split).narrow(axis + 1, 0, 1).reshape(joined)

    def reshape(self, shape: Sequence[int]) -> LazyTensor:
        """The same elements in C order under another shape; one length may be -1.

        Raises:
            UsageError: the number of elements differs.
        """
        wanted, size = tuple(shape), self.size
        if -1 in wanted:
            known = -math.prod(wanted)
            wanted = tuple(size // known if n == -1 and known else n for n in wanted)
        if math.prod(wanted) != size or min(wanted, default=0) < 0:
            raise UsageError("cannot be reshaped", expected=f"{size} elements", found=tuple(shape))
        if not size:
            from anyckpt.tensor.nodes import Constant

            return Constant(self.dtype, wanted)
        return self if wanted == self.shape else self._reshape(wanted)

    def _reshape(self, shape: Shape) -> LazyTensor:
        from anyckpt.tensor.views import Reshaped

        return Reshaped(self, shape)

    def permute(self, axes: Sequence[int]) -> LazyTensor:
        """Axes in another order, as ``numpy.transpose``.

        Raises:
            UsageError: ``axes`` is not a permutation.
        """
        order = tuple(axes)
        if sorted(order) != list(range(self.ndim)):
            raise UsageError("is not an order of the axes", expected=f"a permutation of {self.ndim}", found=order)
        return self if order == tuple(range(self.ndim)) else self._permute(order)

    def _permute(self, axes: Shape) -> LazyTensor:
        from anyckpt.tensor.views import Permuted

        return Permuted(self, axes)

    def transpose(self) -> LazyTensor:
        """Axes in reverse order."""
        return self.permute(range(self.ndim)[::-1])

    @property
    def T(self) -> LazyTensor:  # noqa: N802 (numpy's and torch's name)
        """The tensor with its axes in reverse order."""
        return self.transpose()

    def cast(self, to: DType | str) -> LazyTensor:
        """The values rounded to another type (to nearest, ties to even), or self if it is the same.

        Raises:
            UsageError: either type is one that numpy cannot compute with.
        """
        from anyckpt.tensor.views import Cast, Mapped

        target = dtype(to)
        if target == self.dtype:
            return self
        if self.dtype.numpy is None or target.numpy is None:
            raise UsageError(f"{self.dtype.name} cannot be cast to {target.name}")
        return Mapped((self,), target, Cast(target))

    def pad(self, axis: int, length: int) -> LazyTensor:
        """Zeros appended along ``axis`` up to ``length``.

        Raises:
            UsageError: the axis is longer than that.
        """
        from anyckpt.tensor.making import zeros_after

        extra = length - self.shape[axis]
        if extra < 0:
            raise UsageError("cannot be padded to fewer", expected=f"at least {self.shape[axis]}", found=length)
        return zeros_after(self, axis, extra) if extra else self


def as_numbers(raw: Array, kind: DType) -> Array:
    """An array of raw elements seen as numbers, or as it is where numpy has no such numbers."""
    return raw if kind.numpy is None else raw.view(kind.numpy)
