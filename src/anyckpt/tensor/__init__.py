"""Lazy tensors: a dtype, a shape, and where each piece lies.

Slicing, joining, reshaping and permuting give another description and read nothing.  Reading asks for a box
(a hyper-rectangle) or for a run of elements in C order, which is what a writer needs; either touches only the
bytes that it returns.  Only casts and arithmetic compute, box by box.

Boxes are delivered into caller-provided arrays of the *raw* dtype (unsigned integers of the element's width,
see ``dtypes``), so that joining two QKV shards and joining two fp8 scales are the same copy.
"""

from anyckpt.tensor.lazy import LazyTensor, as_numbers
from anyckpt.tensor.making import concatenate, from_array, held, mosaic, stack
from anyckpt.tensor.nodes import Constant, LazySequence, Mosaic, Stored
from anyckpt.tensor.reduction import Reduction
from anyckpt.tensor.views import Boxed, Cast, Combined, Mapped, Permuted, Pointwise, Reshaped, View

__all__ = [
    "Boxed",
    "Cast",
    "Combined",
    "Constant",
    "LazySequence",
    "LazyTensor",
    "Mapped",
    "Mosaic",
    "Permuted",
    "Pointwise",
    "Reduction",
    "Reshaped",
    "Stored",
    "View",
    "as_numbers",
    "concatenate",
    "from_array",
    "held",
    "mosaic",
    "stack",
]
