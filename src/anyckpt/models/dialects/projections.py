"""The order of rows in fused attention projections, which changed twice in the autumn of 2020.

With ``np`` heads on a rank and ``hn`` channels per head, the rows of query, key and value lie as

=====================  ===============  =======================
``checkpoint_version``  order            written
=====================  ===============  =======================
0 (no such key)        ``[3, np, hn]``  before September 2020
1                      ``[np, hn, 3]``  September 2020
2, 3                   ``[np, 3, hn]``  since 12 October 2020
=====================  ===============  =======================

and those of the key and value of cross attention likewise, with 2 in place of 3.  The order is that of one rank's
rows, so it is changed before shards are joined.

Facts: ``fix_query_key_value_ordering`` in ``megatron/checkpointing.py`` of Megatron-LM 2.0 to core 0.16.
"""

from __future__ import annotations

import re
from dataclasses import replace

from anyckpt.checkpoint import RankShard
from anyckpt.errors import FormatError
from anyckpt.tensor import LazyTensor

_PROJECTION = re.compile(r"\.(self_attention\.linear_qkv|cross_attention\.linear_kv)\.(weight|bias)$")
GROUPED_SINCE = 2.0


def grouped(shard: RankShard, version: float, heads: int) -> RankShard:
    """A rank's shard with the rows of its projections in today's order; itself if they are.

    Args:
        shard: under the hub's names.
        version: the file's ``checkpoint_version``.
        heads: attention heads on this rank.

    Raises:
        FormatError: the rows do not divide into the heads.
    """
    if version >= GROUPED_SINCE:
        return shard
    tensors = {
        name: _grouped_rows(name, tensor, version, heads, shard.source) for name, tensor in shard.tensors.items()
    }
    return replace(shard, tensors=tensors)


def _grouped_rows(name: str, tensor: LazyTensor, version: float, heads: int, path: str) -> LazyTensor:
    """A weight ``[rows, columns]`` or bias ``[rows]`` in today's order; any other tensor as it is."""
    found = _PROJECTION.search(name)
    if found is None:
        return tensor
    parts = 3 if found[1].endswith("qkv") else 2
    rows = tensor.shape[0] if tensor.ndim in (1, 2) else 0
    if not rows or rows % (parts * heads):
        raise FormatError(
            "a fused projection does not divide into the heads",
            path=path,
            tensor=name,
            expected=f"rows that are a multiple of {parts} x {heads} heads",
            found=tensor.shape,
        )
    channels, rest = rows // (parts * heads), tensor.shape[1:]
    others = tuple(range(3, 3 + len(rest)))
    if version >= 1.0:
        return tensor.reshape((heads, channels, parts, *rest)).permute((0, 2, 1, *others)).reshape(tensor.shape)
    return tensor.reshape((parts, heads, channels, *rest)).permute((1, 0, 2, *others)).reshape(tensor.shape)
