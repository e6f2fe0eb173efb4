"""The pytest plugin of ``tools/peer_suites.py``: sees every checkpoint that a peer's tests save.

Settings come in the environment: ``ANYCKPT_PEER_MODE`` (``read``, ``replace`` or ``none``), ``ANYCKPT_PEER_REPORT`` (a
file that gets a line of JSON per checkpoint and test), ``ANYCKPT_PEER_PRETEND`` (modules that make do without GPUs).

``read`` opens what was saved and compares every tensor with what the library that saved it loads.  ``replace`` puts
our conversion into the same format in its place, so that the rest of the test loads ours.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import loaded_by_peers as loaded

import anyckpt
from anyckpt.errors import AnyckptError
from anyckpt.tensor import LazyTensor

MODE = os.environ.get("ANYCKPT_PEER_MODE", "none")
_OWN = ("torch.distributed.checkpoint", "megatron.core.dist_checkpointing")  # their writers call torch.save themselves
_inside = threading.local()
_test = ""


def _report(**facts: Any) -> None:
    target = os.environ.get("ANYCKPT_PEER_REPORT")
    if target:
        with open(target, "a") as file:
            file.write(json.dumps({"test": _test, **facts}, default=repr) + "\n")


# -- what pytest calls ----------------------------------------------------------------------------------------


def pytest_runtest_setup(item: Any) -> None:
    global _test
    _test = item.nodeid


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        last = str(report.longrepr)[-600:] if report.outcome == "failed" else ""
        _report(kind="test", test_id=report.nodeid, when=report.when, outcome=report.outcome, detail=last)


# -- the hooks ------------------------------------------------------------------------------------------------


def _saved(path: str, load: Callable[[str], dict[str, Any]]) -> None:
    """Judge or replace what a peer saved at ``path``; never disturbs the test by an error of ours."""
    if getattr(_inside, "busy", False):
        return
    _inside.busy = True
    try:
        if MODE == "read":
            _report(kind="checkpoint", **_judged(path, load))
        else:
            _report(kind="checkpoint", **_replaced(path))
    except Exception as error:
        _report(kind="checkpoint", outcome="crash", detail=f"{type(error).__name__}: {error}"[:400])
    finally:
        _inside.busy = False


@contextmanager
def _as_one() -> Iterator[None]:
    """What is saved in here is judged as a whole afterwards, and not file by file."""
    before = getattr(_inside, "busy", False)
    _inside.busy = True
    try:
        yield
    finally:
        _inside.busy = before


def _judged(path: str, load: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    try:
        expected = load(path)
    except Exception as error:
        return {"outcome": "unjudged", "detail": f"its own library: {type(error).__name__}: {error}"[:300]}
    try:
        checkpoint = anyckpt.open(path)
        ours = checkpoint.tensors
        differing = [
            name for name, (dtype, shape, data) in expected.items()
            if name not in ours or not _same(ours[name], dtype, shape, data)
        ]  # fmt: skip
    except AnyckptError as error:
        return {"outcome": "refused", "detail": str(error)[:300], "tensors": len(expected)}
    facts = {"format": checkpoint.format, "tensors": len(expected)}
    if differing:
        return {"outcome": "different", "detail": differing[:5], **facts}
    return {"outcome": "equal" if expected else "no tensors", **facts}


def _same(tensor: LazyTensor, dtype: str, shape: tuple[int, ...], data: bytes) -> bool:
    names = {tensor.dtype.name, tensor.dtype.safetensors}
    return dtype in names and tuple(tensor.shape) == shape and tensor.nbytes == len(data) and _bytes(tensor) == data


def _bytes(tensor: LazyTensor) -> bytes:
    out = bytearray(tensor.nbytes)
    if out:
        import numpy as np

        tensor.read_flat(0, np.frombuffer(out, dtype=tensor.dtype.raw))
    return bytes(out)


def _replaced(path: str) -> dict[str, Any]:
    ours = f"{path.rstrip('/')}.anyckpt"
    try:
        checkpoint = anyckpt.open(path)
        done = anyckpt.convert(checkpoint, ours, to=checkpoint.format, optimizer="keep", overwrite=True)
    except AnyckptError as error:
        return {"outcome": "refused", "detail": str(error)[:300]}
    if os.path.isdir(path):
        shutil.rmtree(path)
    os.replace(ours, path)
    return {"outcome": "replaced", "format": done.format, "tensors": done.tensors, "detail": done.ignored}


def _hook_torch() -> None:
    import torch

    first = torch.save

    @functools.wraps(first)
    def save(obj: Any, f: Any, *args: Any, **settings: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        start = _position(f)
        result = first(obj, f, *args, **settings)
        if caller.startswith(_OWN):
            return result
        if isinstance(f, (str, os.PathLike)):
            _saved(os.fspath(f), loaded.by_torch)
        elif start == 0 and (data := _contents(f)):
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "saved.pt")
                with open(path, "wb") as file:
                    file.write(data)
                _saved(path, loaded.by_torch)
                if MODE == "replace":
                    with open(path, "rb") as file:
                        f.seek(0)
                        f.truncate()
                        f.write(file.read())
        return result

    torch.save = torch.serialization.save = save


def _position(file: Any) -> int | None:
    """Where an ordinary file is; None of anything else, whose test may count what is asked of it."""
    if not isinstance(getattr(file, "file", file), io.IOBase):
        return None
    try:
        return int(file.tell())
    except OSError:
        return None


def _contents(file: Any) -> bytes | None:
    """Of a file that is open for both, or in memory; None of one that cannot be read, or holds something behind."""
    try:
        end = file.tell()
        file.seek(0)
        data = bytes(file.read())
        file.seek(end)
    except OSError:
        return None
    return data if end == len(data) else None


def _hook_distributed() -> None:
    from torch.distributed.checkpoint import filesystem

    first = filesystem._FileSystemWriter.finish

    def finish(self: Any, *args: Any, **settings: Any) -> Any:
        result = first(self, *args, **settings)
        if not type(self).__module__.startswith("megatron.") and os.path.isdir(self.path):
            _saved(os.fspath(self.path), loaded.by_torch_distributed)
        return result

    filesystem._FileSystemWriter.finish = finish


def _hook_megatron() -> None:
    import torch
    from megatron.core import dist_checkpointing

    first = dist_checkpointing.save

    @functools.wraps(first)
    def save(state: Any, checkpoint_dir: Any, *args: Any, **settings: Any) -> Any:
        result = first(state, checkpoint_dir, *args, **settings)
        if result is None:  # else it goes on in the background
            torch.distributed.barrier()
            if torch.distributed.get_rank() == 0:
                _saved(os.fspath(checkpoint_dir), loaded.by_torch_distributed)
            torch.distributed.barrier()
        return result

    dist_checkpointing.save = dist_checkpointing.serialization.save = save


def _hook_safetensors() -> None:
    import safetensors
    import safetensors.numpy
    import safetensors.torch

    to_file, to_bytes = safetensors.serialize_file, safetensors.serialize

    @functools.wraps(to_file)
    def serialize_file(tensors: Any, filename: Any, *args: Any, **settings: Any) -> Any:
        result = to_file(tensors, filename, *args, **settings)
        _saved(os.fspath(filename), loaded.by_safetensors)
        return result

    @functools.wraps(to_bytes)
    def serialize(tensors: Any, *args: Any, **settings: Any) -> Any:
        result = to_bytes(tensors, *args, **settings)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "saved.safetensors")
            with open(path, "wb") as file:
                file.write(result)
            _saved(path, loaded.by_safetensors)
            with open(path, "rb") as file:
                return file.read()

    for module in (safetensors, safetensors.torch, safetensors.numpy):
        for name, function in (("serialize_file", serialize_file), ("serialize", serialize)):
            if hasattr(module, name):
                setattr(module, name, function)


def _hook_peft() -> None:
    import peft

    first = peft.PeftModel.save_pretrained

    @functools.wraps(first)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **settings: Any) -> Any:
        with _as_one():
            result = first(self, save_directory, *args, **settings)
        for folder, _, files in os.walk(save_directory):
            if "adapter_config.json" in files and any(name.startswith("adapter_model.") for name in files):
                _saved(folder, loaded.by_peft)
        return result

    peft.PeftModel.save_pretrained = save_pretrained


def _hook_processes() -> None:
    """Have the processes that tests start run with these hooks, too."""
    first = BaseProcess.__init__

    def start(self: Any, group: None = None, target: Any = None, *args: Any, **settings: Any) -> None:
        first(self, group, target and functools.partial(_in_process, _test, target), *args, **settings)

    BaseProcess.__init__ = start  # type: ignore[method-assign]


def _in_process(test: str, target: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    global _test
    _test = test
    return target(*args, **settings)


def _install() -> None:
    """While the plugin is imported: conftests import what is hooked before pytest configures plugins."""
    for name in ("cpu_for_cuda", "ranks_for_gpus"):
        if name in os.environ.get("ANYCKPT_PEER_PRETEND", ""):
            importlib.import_module(name).install()
    hooks = (_hook_safetensors, _hook_torch, _hook_distributed, _hook_megatron, _hook_peft)
    _hook_processes()
    for hook in hooks if MODE != "none" else ():
        try:
            hook()
        except ImportError:
            continue


_install()
