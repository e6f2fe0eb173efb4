"""Runs tests of torch that ask for several GPUs on a CPU, with Gloo: only for ``tools/peer_suites.py``.

Most of torch's tests of distributed checkpoints take their device and backend from what is there; what keeps them from
running is a decorator that counts GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def install() -> None:
    """Count no GPUs, from now on."""
    from torch.testing._internal import common_distributed

    def at_any_rate(*_: Any, **__: Any) -> Callable[[Any], Any]:
        return lambda test: test

    common_distributed.skip_if_lt_x_gpu = at_any_rate
    common_distributed.requires_accelerator_dist_backend = at_any_rate
