"""Flat buffers as releases of Megatron filled them before 0.7, one parameter after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """How a release fills a buffer.

    Attributes:
        buckets: there are any; 23.06 has one buffer.
        never_alone: a bucket is not closed while it has one parameter only (0.4, 0.5).
        says_unpadded: the file lists elements without padding.
        shared_alone: an embedding that stages share has a bucket of its own (0.6).
    """

    buckets: bool = True
    never_alone: bool = False
    says_unpadded: bool = True
    shared_alone: bool = False


RELEASES = {
    "23.06": Release(buckets=False, says_unpadded=False),
    "0.4": Release(never_alone=True, says_unpadded=False),
    "0.5": Release(never_alone=True),
    "0.6": Release(shared_alone=True),
}


def filled(
    sizes: Sequence[int], release: Release, bucket_size: int | None, replicas: int, shared: Sequence[bool] = ()
) -> tuple[list[list[int]], list[int], list[int]]:
    """Numbers of the parameters in each bucket, and each bucket's elements with padding and without.

    Args:
        sizes: elements of each parameter, in the order in which modules register them.
        release: by whose rule.
        bucket_size: elements after which a bucket is closed, None for never.
        replicas: to whose multiple buckets are padded.
        shared: which parameters are embeddings that stages share.
    """
    buckets: list[list[int]] = []
    open_bucket: list[int] = []

    def close() -> None:
        buckets.append(list(open_bucket))
        open_bucket.clear()

    for number in reversed(range(len(sizes))):
        alone = release.shared_alone and bool(shared) and shared[number]
        if alone and open_bucket:
            close()
        open_bucket.append(number)
        full = release.buckets and bucket_size is not None and sum(sizes[n] for n in open_bucket) >= bucket_size
        if (full and not (release.never_alone and len(open_bucket) == 1)) or alone:
            close()
    if open_bucket:
        close()
    unpadded = [sum(sizes[number] for number in bucket) for bucket in buckets]
    return buckets, [math.ceil(size / replicas) * replicas for size in unpadded], unpadded
