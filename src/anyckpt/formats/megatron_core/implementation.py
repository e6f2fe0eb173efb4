"""The ``_extra_state`` objects that Megatron-Core asks for beside the weights.

Every linear map of a Megatron-Core model, and with Transformer Engine every norm, has a non-tensor state (FP8
scaling, None without FP8).  A load with the default strictness fails on the first one that the checkpoint does not
have ("Missing key in checkpoint state_dict"), so a checkpoint made from weights alone gets them, with None.

One checkpoint serves models with and without Transformer Engine: objects that a model does not ask for are passed
over, unless the load is told to refuse them (``StrictHandling.RAISE_ALL``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from anyckpt.formats.dcp.chunks import stacked_axes
from anyckpt.tensor import LazyTensor

_LINEAR = re.compile(
    r"^(?P<module>.*\.(?:linear_\w+|mixer\.in_proj|mixer\.out_proj|layers\.\d+\.(?:self_attention|mlp)))"
    r"\.weight(_w)?$"
)
_NORM = re.compile(r"^(?P<module>(?:.*\.)?(?:\w+_)?layernorm)\.weight$")
_ATTENTION = re.compile(r"^(?P<attention>.*(?:self|cross)_attention)\.linear_proj$")
_STATE = re.compile(r"^(chained_\d+\.)?optimizer\.")


def extra_states(tensors: Mapping[str, LazyTensor]) -> Iterator[str]:
    """Keys of the objects that models with these weights ask for.

    Layers that are stacked in one tensor have an object each, ``<module>._extra_state/shard_{layer}_{layers}``, and
    experts one per layer and expert; a layer under its own number has ``.../shard_0_1``.  The attention kernel's is
    what Megatron-Core before 0.13 with Transformer Engine asks for.
    """
    for name, tensor in tensors.items():
        found = None if _STATE.match(name) else _LINEAR.match(name) or _NORM.match(name)
        if found is None:
            continue
        modules = [found["module"]]
        attention = _ATTENTION.match(found["module"])
        if attention is not None:
            modules.append(f"{attention['attention']}.core_attention")
        grid = tensor.shape[: min(stacked_axes(name), tensor.ndim)] or (1,)
        whole = ".".join(map(str, grid))
        for module in modules:
            for index in np.ndindex(*grid):
                yield f"{module}._extra_state/shard_{'.'.join(map(str, index))}_{whole}"
