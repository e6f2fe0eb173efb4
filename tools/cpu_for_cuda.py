"""Runs tests that were written for GPUs on a CPU: ``cuda`` devices become ``cpu``, NCCL becomes Gloo.

Only for ``tools/peer_suites.py``: it changes functions of the torch that is imported, for this process.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_PRETENDED_DEVICES = 8


def _moved(value: Any) -> Any:
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


class _OnCpu(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name == "cuda" and args and isinstance(args[0], torch.Tensor):
            return args[0]
        if function is torch.Tensor.is_cuda.__get__:  # Megatron asserts that gradients are on the GPU
            return True
        return function(*map(_moved, args), **{key: _moved(value) for key, value in (kwargs or {}).items()})


def install() -> None:
    """Pretend that there are GPUs, from now on."""
    _OnCpu().__enter__()
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign, assignment]
    cuda: Any = torch.cuda
    for name, value in {
        "is_available": True, "device_count": _PRETENDED_DEVICES, "current_device": torch.device("cpu"),
        "set_device": None, "synchronize": None, "empty_cache": None, "get_rng_state": torch.get_rng_state(),
        "set_rng_state": None, "manual_seed": None, "memory_allocated": 0, "max_memory_allocated": 0,
        "get_device_capability": (8, 0), "current_stream": types.SimpleNamespace(synchronize=lambda: None),
        "reset_peak_memory_stats": None, "is_current_stream_capturing": False,
    }.items():  # fmt: skip
        setattr(cuda, name, lambda *_, value=value, **__: value)
    distributed: Any = torch.distributed
    first = distributed.init_process_group

    def init_process_group(backend: Any = None, *args: Any, **settings: Any) -> Any:
        settings.pop("device_id", None)
        return first("gloo", *args, **settings)

    def in_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            if settings.get("backend") == "nccl":
                settings["backend"] = "gloo"
            settings.pop("pg_options", None)
            return function(*args, **settings)

        return call

    distributed.init_process_group = init_process_group
    distributed.new_group = in_gloo(distributed.new_group)
    os.environ.setdefault("LOCAL_RANK", "0")
    _without_transformer_engine()
    # Megatron-LM's tests download data of hundreds of megabytes before the first one; those of checkpoints need none.
    data = types.ModuleType("tests.test_utils.python_scripts.download_unit_tests_dataset")
    data.download_and_extract_asset = lambda assets_dir: True  # type: ignore[attr-defined]
    sys.modules[data.__name__] = data


def _without_transformer_engine() -> None:
    """Let Megatron-LM's tests run where there is no Transformer Engine.

    Their fixtures ask for its version, and their models are of its layers if nothing else is said; here they are of
    Megatron-Core's own.
    """
    try:
        from megatron.core import utils
        from packaging.version import Version
    except ImportError:
        return
    utils.get_te_version = lambda: Version("0")
    from megatron.core.models.gpt import gpt_layer_specs

    own = gpt_layer_specs.get_gpt_layer_local_spec
    known = inspect.signature(own).parameters

    def layer_spec(*args: Any, **settings: Any) -> Any:
        return own(*args, **{name: value for name, value in settings.items() if name in known})

    gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec = layer_spec
    _with_fewer_ranks()


def _with_fewer_ranks() -> None:
    """Cut tensor and pipeline parallel sizes to the ranks there are: most tests of models are for eight."""
    from megatron.core import parallel_state

    first = parallel_state.initialize_model_parallel
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")

    def initialize(*args: Any, **settings: Any) -> Any:
        settings.update(zip(inspect.signature(first).parameters, args, strict=False))
        left = torch.distributed.get_world_size()
        for name in sizes:
            settings[name] = math.gcd(settings.get(name, 1), left)
            left //= settings[name]
        if settings[sizes[1]] == 1:
            settings["virtual_pipeline_model_parallel_size"] = None
        return first(**settings)

    parallel_state.initialize_model_parallel = initialize
