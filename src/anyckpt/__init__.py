"""Open, inspect and convert any large-model checkpoint, exactly, in bounded memory, without its framework.

>>> import anyckpt
>>> checkpoint = anyckpt.open("llama.nemo")                                             # doctest: +SKIP
>>> checkpoint.tensors["model.decoder.final_layernorm.weight"][:4].numpy()             # doctest: +SKIP
>>> anyckpt.convert("llama.nemo", "llama-hf", to="hf")                                  # doctest: +SKIP

Everything here is imported when it is first used, so ``import anyckpt`` costs milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyckpt.checkpoint import Checkpoint, ParallelLayout, Tokenizer, TrainingState
    from anyckpt.errors import (
        AnyckptError,
        FormatError,
        MappingError,
        MissingLibraryError,
        OutputError,
        UnknownTensorError,
        UnsafeError,
        UsageError,
    )
    from anyckpt.operations.archive import ArchiveReport, edit, pack, unpack
    from anyckpt.operations.average import average
    from anyckpt.operations.convert import Conversion, convert
    from anyckpt.operations.diff import Difference, diff
    from anyckpt.operations.inspect import Inspection, inspect
    from anyckpt.operations.merge_lora import merge_lora
    from anyckpt.operations.reshard import reshard
    from anyckpt.operations.save import save
    from anyckpt.operations.steps.cutting import LayoutRequest
    from anyckpt.operations.steps.joining import open_checkpoint as open
    from anyckpt.operations.verify import Verification, verify
    from anyckpt.tensor import LazyTensor

    __version__: str

__all__ = [
    "AnyckptError",
    "ArchiveReport",
    "Checkpoint",
    "Conversion",
    "Difference",
    "FormatError",
    "Inspection",
    "LayoutRequest",
    "LazyTensor",
    "MappingError",
    "MissingLibraryError",
    "OutputError",
    "ParallelLayout",
    "Tokenizer",
    "TrainingState",
    "UnknownTensorError",
    "UnsafeError",
    "UsageError",
    "Verification",
    "__version__",
    "average",
    "convert",
    "diff",
    "edit",
    "inspect",
    "merge_lora",
    "open",
    "pack",
    "reshard",
    "save",
    "unpack",
    "verify",
]

_WHERE = {
    **dict.fromkeys(("Checkpoint", "ParallelLayout", "Tokenizer", "TrainingState"), "checkpoint"),
    **dict.fromkeys(
        (
            "AnyckptError",
            "FormatError",
            "MappingError",
            "MissingLibraryError",
            "OutputError",
            "UnknownTensorError",
            "UnsafeError",
            "UsageError",
        ),
        "errors",
    ),
    "LazyTensor": "tensor",
    "average": "operations.average",
    **dict.fromkeys(("Conversion", "convert"), "operations.convert"),
    **dict.fromkeys(("Difference", "diff"), "operations.diff"),
    **dict.fromkeys(("Inspection", "inspect"), "operations.inspect"),
    "LayoutRequest": "operations.steps.cutting",
    "merge_lora": "operations.merge_lora",
    "reshard": "operations.reshard",
    "save": "operations.save",
    **dict.fromkeys(("Verification", "verify"), "operations.verify"),
    **dict.fromkeys(("ArchiveReport", "edit", "pack", "unpack"), "operations.archive"),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    value: Any
    if name == "open":
        value = import_module("anyckpt.operations.steps.joining").open_checkpoint
    elif name == "__version__":
        from importlib.metadata import version

        value = version("anyckpt")
    elif name in _WHERE:
        value = getattr(import_module(f"anyckpt.{_WHERE[name]}"), name)
    else:
        raise AttributeError(f"module 'anyckpt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
