"""Lets the newest Megatron-Core run where the tests do, on a CPU: import it before anything of Megatron's.

``environment()`` is for processes that are to find that release.  What is replaced there is what needs a GPU: Triton,
whose kernels are defined when modules are imported and never called, which GPU it is, and seeding dropout that is off.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-current"


def environment() -> dict[str, str]:
    """Environment of a process that imports the newest release; the test that asks is skipped where it is not."""
    if not (FOLDER / "made-of").exists():
        pytest.skip("needs the newest Megatron-Core: run python3 tools/current_peers.py")
    found = [str(FOLDER), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(found), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


class _Anything:
    """Whatever is asked of it; a decorator gives back what it decorates."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        alone = len(arguments) == 1 and not settings and callable(arguments[0])
        return arguments[0] if alone and not isinstance(arguments[0], _Anything) else _Anything()


class _Triton(ModuleType):
    __version__ = "3.0.0"
    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(_Anything(), name)


def install() -> None:
    """Put the stand-ins in their places, after torch has looked for the real ones."""
    import torch
    import torch._inductor.compile_fx  # it asks for more of Triton than there is, unless there is none

    for name in ("triton", "triton.language"):
        module = _Triton(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules.setdefault(name, module)
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    CudaRNGStatesTracker.fork = lambda self, *names: contextlib.nullcontext()
