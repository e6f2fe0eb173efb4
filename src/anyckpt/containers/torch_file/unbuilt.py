"""Tensors of torch before 0.4, whose pickles first make an empty object and then state what it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from anyckpt.containers.torch_file.values import MetaTensor, Storage, TensorFacts
from anyckpt.dtypes import BY_NAME
from anyckpt.errors import FormatError
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import LazyTensor, Stored

View = Callable[[Any, Any, Any, Any], tuple[LazyTensor | MetaTensor, TensorFacts]]


class UnbuiltTensor(Stored):
    """A tensor that is empty until its state is known."""

    __slots__ = ("_facts_of", "_note", "_parameter", "_view")

    def __init__(
        self,
        view: View,
        facts_of: Callable[[LazyTensor], TensorFacts],
        note: Callable[[LazyTensor, TensorFacts], LazyTensor],
        parameter: bool,
    ) -> None:
        super().__init__(MemorySource(b""), 0, BY_NAME["float32"], (0,))
        self._view = view
        self._facts_of = facts_of
        self._note = note
        self._parameter = parameter
        note(self, TensorFacts(parameter=parameter))

    def become(self, tensor: LazyTensor, facts: TensorFacts) -> None:
        """Take the elements of ``tensor``."""
        if not isinstance(tensor, Stored):
            raise FormatError("a tensor is made of something else than a view of a storage")
        self.source, self.offset, self.dtype = tensor.source, tensor.offset, tensor.dtype
        self.shape, self.strides = tensor.shape, tensor.strides
        self._note(self, replace(facts, parameter=self._parameter))

    def set_state(self, state: object) -> None:
        """``Tensor.__setstate__``: (storage, offset, size, stride), (data, ..., requires_grad) or (requires_grad, ...).

        Raises:
            FormatError: another state, or a view that does not lie inside its storage.
        """
        if isinstance(state, tuple) and len(state) == 4 and isinstance(state[0], Storage):
            tensor, facts = self._view(*state)
            if isinstance(tensor, LazyTensor):
                self.become(tensor, facts)
            return
        if isinstance(state, tuple) and len(state) == 5 and isinstance(state[0], LazyTensor):
            self.become(state[0], self._facts_of(state[0]))
            state = (state[3], state[4], state[2])
        if isinstance(state, tuple) and len(state) in (2, 3) and type(state[0]) is bool:
            facts = self._facts_of(self)
            self._note(self, replace(facts, requires_grad=state[0]))
            return
        raise FormatError("a tensor is given a state of unknown form", found=type(state).__name__)
