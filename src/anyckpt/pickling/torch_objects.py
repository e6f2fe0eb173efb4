"""Records of the torch objects that a checkpoint is made of, as ``torch.save`` of torch 2.13 writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from anyckpt.dtypes import DType
from anyckpt.errors import UsageError
from anyckpt.pickling.records import DictRecord, Global, PersistentId, Record

ORDERED_DICT = Global("collections", "OrderedDict")
NAMESPACE = Global("argparse", "Namespace")
SIZE = Global("torch", "Size")
UNTYPED_STORAGE = Global("torch.storage", "UntypedStorage")
_REBUILD_TYPED = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_UNTYPED = Global("torch._utils", "_rebuild_tensor_v3")


@cache
def dtype_global(dtype: DType) -> Global:
    """``torch.bfloat16`` and the like, which a pickle names as a constant.

    Raises:
        UsageError: torch has no such type.
    """
    if not dtype.in_torch:
        raise UsageError(
            "torch has no such element type", found=dtype.name, remedy="exclude the tensor, or convert to safetensors"
        )
    return Global("torch", dtype.name)


def size(shape: Sequence[int]) -> Record:
    """A ``torch.Size``."""
    return Record(SIZE, (tuple(shape),))


def ordered_dict(items: Mapping[Any, Any], *, metadata: object = None) -> DictRecord:
    """An OrderedDict, with the ``_metadata`` attribute that ``Module.state_dict()`` sets if given."""
    result = DictRecord(ORDERED_DICT, state=None if metadata is None else {"_metadata": metadata})
    result.update(items)
    return result


def namespace(fields: Mapping[str, Any]) -> Record:
    """An ``argparse.Namespace``; ``torch.load(weights_only=True)`` refuses it unless the user allows it."""
    return Record(NAMESPACE, (), True, state=dict(fields))


def storage(dtype: DType, key: str, count: int, *, location: str = "cpu") -> PersistentId:
    """The reference to ``count`` elements of ``dtype`` in the record ``data/<key>``.

    A dtype without a storage class of its own is an untyped storage, whose length is in bytes; its tensors
    must name the dtype (:func:`tensor` does).
    """
    if dtype.storage is None:
        return PersistentId(("storage", UNTYPED_STORAGE, key, location, count * dtype.itemsize))
    return PersistentId(("storage", _storage_global(dtype.storage), key, location, count))


@cache
def _storage_global(name: str) -> Global:
    return Global("torch", name)


def tensor(
    reference: PersistentId,
    offset: int,
    shape: Sequence[int],
    stride: Sequence[int],
    *,
    dtype: DType,
    requires_grad: bool = False,
) -> Record:
    """A tensor over ``reference``; ``offset`` and ``stride`` count elements of ``dtype``."""
    arguments = (reference, offset, tuple(shape), tuple(stride), requires_grad, DictRecord(ORDERED_DICT))
    if dtype.storage is None:
        return Record(_REBUILD_UNTYPED, (*arguments, dtype_global(dtype)))
    return Record(_REBUILD_TYPED, arguments)
