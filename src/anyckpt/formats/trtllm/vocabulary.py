"""The rows of zeros that ModelOpt gives an AWQ model's vocabulary, whose kernels ask for a multiple of 64.

``vocab_size`` in ``config.json`` counts them, too.  Here a configuration has the true size, and the tensors have all
rows, which tells padding from tokens wherever the model goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from anyckpt.tensor import LazyTensor

_NAMES = ("transformer.vocab_embedding.weight", "lm_head.weight")
_ALGORITHMS = ("W4A16_AWQ", "W4A8_AWQ")
_MULTIPLE = 64


def _padded(facts: Mapping[str, Any] | None) -> bool:
    return facts is not None and facts.get("quant_algo") in _ALGORITHMS


def true_size(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], facts: Mapping[str, Any] | None
) -> int | None:
    """How many tokens there are, where ``vocab_size`` counts rows of zeros; None where it does not.

    Reads at most 63 rows of the embedding and the output layer.
    """
    stated = config.get("vocab_size")
    there = [tensors[name] for name in _NAMES if name in tensors]
    if not _padded(facts) or type(stated) is not int or stated % _MULTIPLE:
        return None
    if not there or any(tensor.ndim != 2 or tensor.shape[0] != stated for tensor in there):
        return None
    zeros = min(_zero_rows(tensor) for tensor in there)
    return stated - zeros if 0 < zeros < stated else None


def _zero_rows(tensor: LazyTensor) -> int:
    """How many rows at the end are zeros."""
    count = min(_MULTIPLE - 1, tensor.shape[0])
    numbers = tensor.narrow(0, tensor.shape[0] - count, count).numpy().astype(np.float32)
    used = np.flatnonzero(np.abs(numbers).max(axis=1, initial=0.0))
    return count - 1 - int(used[-1]) if used.size else count


def with_padding(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], facts: Mapping[str, Any] | None
) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """Tensors and configuration of a model as its algorithm has them."""
    rows = max((tensors[name].shape[0] for name in _NAMES if name in tensors and tensors[name].ndim == 2), default=0)
    if not _padded(facts) or not rows:
        return dict(tensors), dict(config)
    rows = -(-rows // _MULTIPLE) * _MULTIPLE
    padded = {name: tensors[name].pad(0, rows) for name in _NAMES if name in tensors}
    return {**tensors, **padded}, {**config, "vocab_size": rows}
