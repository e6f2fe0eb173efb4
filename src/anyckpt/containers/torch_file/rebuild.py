"""From the calls in a torch pickle to lazy tensors: every form in which torch has saved a tensor.

Facts: ``torch/_utils.py``, ``torch/_tensor.py`` and ``torch/serialization.py`` of 0.1 to 2.13.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from anyckpt.containers.torch_file.unbuilt import UnbuiltTensor
from anyckpt.containers.torch_file.values import (
    DistributedTensor,
    MetaTensor,
    NestedTensor,
    QuantizedTensor,
    SparseTensor,
    Storage,
    TensorFacts,
    brief,
)
from anyckpt.dtypes import BY_NAME, BY_STORAGE, DType
from anyckpt.errors import FormatError, UnsafeError
from anyckpt.indexing import Array
from anyckpt.pickling import Global, Record
from anyckpt.pickling.plain import view
from anyckpt.tensor import LazyTensor, Mapped, Stored, from_array

_MOST_AXES = 32  # numpy's own limit before 2.0
_LARGEST = 1 << 62
_LARGEST_REPEAT = 16 << 30
_REPEAT = 64
_REMEDY = "the file is damaged or was made by hand; compare it with its source"
_INTEGERS = {"quint8": "uint8", "qint8": "int8", "qint32": "int32", "quint4x2": "uint8", "quint2x4": "uint8"}
_PACKED = {"quint4x2": 2, "quint2x4": 4}
_PLAIN_CLASSES = {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Buffer", "torch.nn.parameter.Parameter"}


def storage_dtype(kind: Any, where: str) -> DType | None:
    """The element type of a storage class; None for untyped storages.

    Raises:
        FormatError: not one of torch's storage classes.
    """
    if isinstance(kind, Global) and kind.module.partition(".")[0] == "torch":
        name = kind.name.rpartition(".")[2]
        if name in ("UntypedStorage", "_UntypedStorage"):
            return None
        if name in BY_STORAGE:
            return BY_STORAGE[name]
    raise FormatError("unknown class of storage", path=where, expected="one of torch's", found=brief(kind))


class TensorBuilder:
    """Stands in for torch's rebuild functions while a pickle is read.

    Args:
        name: the file's name, for messages.

    Attributes:
        constructors: dotted name of a function or class -> its stand-in, for ``pickling.load``.
        facts: identity of each tensor -> the tensor and what the file says of it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.facts: dict[int, tuple[LazyTensor, TensorFacts]] = {}
        utils: dict[str, Callable[[tuple[Any, ...]], Any]] = {
            "_rebuild_tensor": self._tensor,
            "_rebuild_tensor_v2": self._tensor,
            "_rebuild_tensor_v3": self._tensor_v3,
            "_rebuild_parameter": self._parameter,
            "_rebuild_parameter_with_state": self._parameter,
            "_rebuild_sparse_tensor": self._sparse,
            "_rebuild_sparse_csr_tensor": self._sparse,
            "_rebuild_qtensor": self._quantized,
            "_rebuild_meta_tensor_no_storage": self._meta,
            "_rebuild_nested_tensor": self._nested,
            "_rebuild_device_tensor_from_cpu_tensor": self._from_device,
            "_rebuild_device_tensor_from_numpy": self._from_device,
            "_rebuild_xla_tensor": self._from_device,
        }
        self.constructors: dict[str, Callable[[tuple[Any, ...]], Any]] = {
            **{f"torch._utils.{name}": call for name, call in utils.items()},
            "torch._tensor._rebuild_from_type_v2": self._from_type,
            "torch._tensor._rebuild_from_type": self._from_type,
            "torch.tensor._rebuild_from_type": self._from_type,
            "torch.Tensor": self._unbuilt,
            "torch._tensor.Tensor": self._unbuilt,
            "torch.nn.parameter.Parameter": partial(self._unbuilt, parameter=True),
            "torch.autograd.variable.Variable": self._unbuilt,
        }
        for storage in BY_STORAGE:
            kind = storage.replace("Storage", "Tensor")
            self.constructors[f"torch.{kind}"] = self._unbuilt
            self.constructors[f"torch.cuda.{kind}"] = self._unbuilt

    def facts_of(self, tensor: LazyTensor) -> TensorFacts:
        """What the file says of a tensor that this builder made."""
        found = self.facts.get(id(tensor))
        return TensorFacts() if found is None else found[1]

    def note(self, tensor: LazyTensor, facts: TensorFacts) -> LazyTensor:
        """The tensor, with what the file says of it remembered."""
        self.facts[id(tensor)] = (tensor, facts)
        return tensor

    def _bad(self, problem: str, found: object = None, expected: object = None) -> FormatError:
        return FormatError(problem, path=self._name, expected=expected, found=found, remedy=_REMEDY)

    # -- dense tensors ---------------------------------------------------------------------------------------

    def view(
        self, storage: Any, offset: Any, size: Any, stride: Any, dtype: DType | None = None
    ) -> tuple[LazyTensor | MetaTensor, TensorFacts]:
        """A view of a storage, and what is known of it.

        Raises:
            FormatError: it does not lie inside the storage.
            UnsafeError: it repeats a few stored values without end.
        """
        if not isinstance(storage, Storage):
            raise self._bad("a tensor has no storage", type(storage).__name__)
        kind = dtype or storage.dtype or BY_NAME["uint8"]
        shape, strides = self._lengths(size, "size"), self._lengths(stride, "stride")
        if type(offset) is not int or not 0 <= offset < _LARGEST:
            raise self._bad("a tensor's offset in its storage is not a count", brief(offset))
        if len(shape) != len(strides) or len(shape) > _MOST_AXES:
            raise self._bad("a tensor's size and stride do not fit", f"{len(shape)} and {len(strides)} axes")
        facts = TensorFacts(storage.key, storage.nbytes, offset, strides, storage.location)
        if storage.source is None:
            return MetaTensor(kind, shape), facts
        if math.prod(shape):
            last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            held = storage.nbytes // kind.itemsize
            if last >= held:
                raise self._bad(
                    f"a tensor of size {shape} and stride {strides} reaches outside its storage {storage.key!r}",
                    f"element {last}",
                    f"at most element {held - 1}",
                )
            nbytes = math.prod(shape) * kind.itemsize
            if nbytes >= _LARGEST or nbytes > max(_LARGEST_REPEAT, _REPEAT * storage.nbytes):
                raise UnsafeError(
                    "a tensor repeats a few stored values so often that it cannot be read",
                    path=self._name,
                    expected=f"at most {_REPEAT} times its storage of {storage.nbytes} bytes",
                    found=f"{nbytes} bytes",
                    remedy=_REMEDY,
                )
        source = storage.little_endian(kind)
        first = min(offset * kind.itemsize, source.size)
        usual = _usual_strides(shape, strides) if math.prod(shape) else None
        return Stored(source, first, kind, shape, usual), facts

    def _lengths(self, value: Any, what: str) -> tuple[int, ...]:
        if type(value) not in (tuple, list) or any(type(n) is not int for n in value):
            raise self._bad(f"a tensor's {what} is not a row of numbers", brief(value))
        if any(not 0 <= n < _LARGEST for n in value):
            raise self._bad(f"a tensor's {what} is negative or too large", brief(value))
        return tuple(value)

    def rebuild(self, storage: Any, offset: Any, size: Any, stride: Any) -> LazyTensor | MetaTensor:
        """As ``view``, with the facts noted."""
        tensor, facts = self.view(storage, offset, size, stride)
        return tensor if isinstance(tensor, MetaTensor) else self.note(tensor, facts)

    def _tensor(self, args: tuple[Any, ...], dtype: DType | None = None) -> Any:
        """``_rebuild_tensor(storage, offset, size, stride)`` and ``_v2(..., requires_grad, hooks[, metadata])``."""
        if not 4 <= len(args) <= 7:
            raise self._bad("a tensor is rebuilt from the wrong number of arguments", len(args), "4 to 7")
        tensor, facts = self.view(args[0], args[1], args[2], args[3], dtype)
        if isinstance(tensor, MetaTensor):
            return tensor
        bits = args[6] if len(args) > 6 and isinstance(args[6], dict) else {}
        if bits.get("conj"):
            tensor = Mapped((tensor,), tensor.dtype, _conjugate if tensor.dtype.numpy else _conjugate_half)
        if bits.get("neg"):
            tensor = Mapped((tensor,), tensor.dtype, _negate if tensor.dtype.numpy else _negate_half)
        return self.note(
            tensor,
            replace(
                facts,
                requires_grad=len(args) > 4 and args[4] is True,
                conjugate=bool(bits.get("conj")),
                negative=bool(bits.get("neg")),
            ),
        )

    def _tensor_v3(self, args: tuple[Any, ...]) -> Any:
        """``_rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])``."""
        if len(args) not in (7, 8):
            raise self._bad("a tensor is rebuilt from the wrong number of arguments", len(args), "7 or 8")
        return self._tensor((*args[:6], *args[7:]), self._dtype(args[6]))

    def _dtype(self, value: Any) -> DType:
        if isinstance(value, Global) and value.module == "torch" and value.name in BY_NAME:
            return BY_NAME[value.name]
        raise self._bad("unknown element type", brief(value))

    def _parameter(self, args: tuple[Any, ...]) -> Any:
        """``_rebuild_parameter(data, requires_grad, hooks)`` and ``_with_state(..., state)``."""
        if len(args) not in (3, 4):
            raise self._bad("a parameter is rebuilt from the wrong number of arguments", len(args), "3 or 4")
        if not isinstance(args[0], LazyTensor):
            return args[0] if isinstance(args[0], (MetaTensor, DistributedTensor)) else NotImplemented
        state = args[3] if len(args) > 3 else None
        return self._with(args[0], parameter=True, requires_grad=args[1] is True, attributes=_attributes(state))

    def _with(self, tensor: LazyTensor, **changes: Any) -> LazyTensor:
        """The same tensor as another object, so that what else refers to it is not changed."""
        facts = self.facts_of(tensor)
        if changes.get("attributes"):
            changes["attributes"] = {**facts.attributes, **changes["attributes"]}
        else:
            changes.pop("attributes", None)
        return self.note(copy.copy(tensor), replace(facts, **changes))

    def _from_type(self, args: tuple[Any, ...]) -> Any:
        """``_rebuild_from_type_v2(function, class, arguments, state)``: tensors with attributes, and subclasses."""
        if len(args) != 4 or not isinstance(args[0], Global) or type(args[2]) is not tuple:
            return NotImplemented
        function, kind, arguments, state = args
        if function.path == "torch._utils._rebuild_wrapper_subclass":
            return self._distributed(arguments, state)
        call = self.constructors.get(function.path)
        tensor = NotImplemented if call is None else call(arguments)
        if not isinstance(tensor, LazyTensor):
            return tensor
        name = kind.path if isinstance(kind, Global) else "?"
        parameter = name == "torch.nn.parameter.Parameter" or self.facts_of(tensor).parameter
        subclass = None if name in _PLAIN_CLASSES else name
        named = kind if subclass is not None and isinstance(kind, Global) else None
        return self._with(tensor, parameter=parameter, subclass=subclass, kind=named, attributes=_attributes(state))

    def _from_device(self, args: tuple[Any, ...]) -> Any:
        """``_rebuild_device_tensor_from_*(data, dtype, device, requires_grad)``: a tensor or a numpy array."""
        data = view(args[0]) if len(args) == 4 else None
        if isinstance(data, np.ndarray) and data.dtype.name in BY_NAME:
            data = from_array(data.astype(data.dtype.newbyteorder("<")))
        if not isinstance(data, LazyTensor):
            return NotImplemented
        return self._with(data.cast(self._dtype(args[1])), requires_grad=args[3] is True)

    def _unbuilt(self, args: tuple[Any, ...], parameter: bool = False) -> Any:
        """Classes that torch before 0.4 saved as ``class()`` or ``class(data)`` followed by a state."""
        if len(args) > 2 or (args and not isinstance(args[0], LazyTensor)):
            return NotImplemented
        tensor = UnbuiltTensor(self.view, self.facts_of, self.note, parameter)
        if args:
            tensor.become(args[0], self.facts_of(args[0]))
        return tensor

    # -- tensors of several parts ----------------------------------------------------------------------------

    def _sparse(self, args: tuple[Any, ...]) -> Any:
        """``_rebuild_sparse_tensor(layout, parts)``."""
        if len(args) != 2 or not isinstance(args[0], Record) or type(args[1]) is not tuple:
            return NotImplemented
        layout = args[0].args[0] if args[0].args and type(args[0].args[0]) is str else ""
        layout = layout.removeprefix("torch.")
        data = args[1]
        if layout == "sparse_coo" and len(data) in (3, 4):
            names: tuple[str, ...] = ("indices", "values")
            size = data[2]
        elif layout in ("sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc") and len(data) == 4:
            names = ("compressed_indices", "plain_indices", "values")
            size = data[3]
        else:
            raise self._bad("unknown layout of a sparse tensor", brief(layout))
        parts = dict(zip(names, data, strict=False))
        if not all(isinstance(part, LazyTensor) for part in parts.values()):
            raise self._bad("a part of a sparse tensor is not a tensor")
        coalesced = data[3] if layout == "sparse_coo" and len(data) == 4 and type(data[3]) is bool else None
        return SparseTensor(layout, self._lengths(size, "size"), parts, coalesced)

    def _quantized(self, args: tuple[Any, ...]) -> Any:
        """``_rebuild_qtensor(storage, offset, size, stride, (scheme, ...), requires_grad, hooks)``."""
        if len(args) not in (6, 7) or type(args[4]) is not tuple or len(args[4]) not in (3, 4):
            raise self._bad("a quantized tensor is rebuilt from the wrong arguments", len(args))
        if not isinstance(args[0], Storage) or args[0].dtype is None or args[0].dtype.name not in _INTEGERS:
            raise self._bad("a quantized tensor has no quantized storage")
        dtype = args[0].dtype
        size, stride = self._lengths(args[2], "size"), self._lengths(args[3], "stride")
        count = _PACKED.get(dtype.name)
        if count is None:
            tensor, facts = self.view(args[0], args[1], size, stride, BY_NAME[_INTEGERS[dtype.name]])
        elif args[1] != 0 or _usual_strides(size, stride) is not None:
            return NotImplemented  # a view into the middle of a byte
        else:
            nbytes = -(-math.prod(size) // count)
            tensor, facts = self.view(args[0], 0, (nbytes,), (1,), BY_NAME["uint8"])
        if isinstance(tensor, MetaTensor):
            return tensor
        scheme, scale, zero_point, *rest = args[4]
        name = scheme.name if isinstance(scheme, Global) else brief(scheme)
        axis = rest[0] if rest and type(rest[0]) is int else None
        return QuantizedTensor(self.note(tensor, facts), size, dtype, name, scale, zero_point, axis)

    def _meta(self, args: tuple[Any, ...]) -> Any:
        """``_rebuild_meta_tensor_no_storage(dtype, size, stride, requires_grad)``."""
        if len(args) != 4:
            raise self._bad("a meta tensor is rebuilt from the wrong number of arguments", len(args), 4)
        return MetaTensor(self._dtype(args[0]), self._lengths(args[1], "size"))

    def _nested(self, args: tuple[Any, ...]) -> Any:
        """``_rebuild_nested_tensor(buffer, sizes, strides, offsets)``."""
        if len(args) != 4 or not all(isinstance(part, LazyTensor) for part in args):
            raise self._bad("a nested tensor is rebuilt from something else than four tensors")
        return NestedTensor(*args)

    def _distributed(self, arguments: tuple[Any, ...], state: Any) -> Any:
        """``_rebuild_wrapper_subclass(class, dtype, size, ...)`` of a ``DTensor``; other classes stay records."""
        fields = _attributes(state)
        local, spec = fields.get("_local_tensor"), fields.get("_spec")
        if len(arguments) < 3 or not isinstance(local, LazyTensor) or not isinstance(spec, Record):
            return NotImplemented
        placements = spec.get("placements", ())
        described = tuple(_placement(p) for p in placements) if isinstance(placements, (tuple, list)) else ()
        return DistributedTensor(local, self._lengths(arguments[2], "size"), described, spec, arguments)


def _usual_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """None for C order, whatever the strides of axes of length one, which say nothing."""
    step = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n > 1 and stride != step:
            return strides
        step *= n
    return None


def _attributes(state: Any) -> Mapping[str, Any]:
    """The attributes in an object's state: a dictionary, or a dictionary and slots."""
    if isinstance(state, tuple) and len(state) == 2:
        return {**_attributes(state[0]), **_attributes(state[1])}
    if isinstance(state, dict):
        return {name: value for name, value in state.items() if type(name) is str}
    return {}


def _placement(value: Any) -> str:
    if not isinstance(value, Record):
        return brief(value)
    name = value.path.rpartition(".")[2]
    inside = value.args or tuple(value.fields().values())
    return f"{name}({', '.join(brief(item) for item in inside)})"


def _conjugate(array: Array) -> Array:
    return np.asarray(np.conj(array))


def _conjugate_half(raw: Array) -> Array:
    return np.asarray(raw ^ np.uint32(0x80000000))  # complex32: the upper half is the imaginary part


def _negate(array: Array) -> Array:
    return np.asarray(np.negative(array))


def _negate_half(raw: Array) -> Array:
    return np.asarray(raw ^ np.uint32(0x80008000))
