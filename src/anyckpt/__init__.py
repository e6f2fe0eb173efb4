"""Open, inspect and convert any large-model checkpoint, exactly, in bounded memory, without its framework.

>>> import anyckpt
>>> checkpoint = anyckpt.open("llama.nemo")                                             # doctest: +SKIP
>>> checkpoint.tensors["model.decoder.final_layernorm.weight"][:4].numpy()             # doctest: +SKIP
>>> anyckpt.convert("llama.nemo", "llama-hf", to="hf")                                  # doctest: +SKIP

Everything here is imported when it is first used, so ``import anyckpt`` costs milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyckpt.on_demand import on_demand

if TYPE_CHECKING:
    from anyckpt.checkpoint import Checkpoint, ParallelLayout, Tokenizer, TrainingState
    from anyckpt.errors import (
        AnyckptError,
        FormatError,
        LastingError,
        MappingError,
        MissingLibraryError,
        OutputError,
        UnknownTensorError,
        UnreachableError,
        UnsafeError,
        UsageError,
    )
    from anyckpt.facts import FamilyFacts, FormatFacts
    from anyckpt.formats.registry import facts as formats
    from anyckpt.models.families import facts as families
    from anyckpt.operations.archive import ArchiveReport, edit, pack, unpack
    from anyckpt.operations.average import average
    from anyckpt.operations.clean import Cleaned, clean
    from anyckpt.operations.convert import Conversion, convert
    from anyckpt.operations.diff import diff
    from anyckpt.operations.difference import Difference
    from anyckpt.operations.inspect import inspect
    from anyckpt.operations.inspection import Inspection
    from anyckpt.operations.merge import merge
    from anyckpt.operations.merge_lora import merge_lora
    from anyckpt.operations.migrate_config import MigratedConfig, migrate_config
    from anyckpt.operations.quantize import quantize
    from anyckpt.operations.report import Report, report
    from anyckpt.operations.reshard import reshard
    from anyckpt.operations.save import save
    from anyckpt.operations.steps.joining import open_checkpoint as open
    from anyckpt.operations.steps.layout_request import LayoutRequest
    from anyckpt.operations.verification import Verification
    from anyckpt.operations.verify import verify
    from anyckpt.tensor import LazyTensor

__version__ = "0.1.0"

__all__ = [
    "AnyckptError",
    "ArchiveReport",
    "Checkpoint",
    "Cleaned",
    "Conversion",
    "Difference",
    "FamilyFacts",
    "FormatError",
    "FormatFacts",
    "Inspection",
    "LastingError",
    "LayoutRequest",
    "LazyTensor",
    "MappingError",
    "MigratedConfig",
    "MissingLibraryError",
    "OutputError",
    "ParallelLayout",
    "Report",
    "Tokenizer",
    "TrainingState",
    "UnknownTensorError",
    "UnreachableError",
    "UnsafeError",
    "UsageError",
    "Verification",
    "__version__",
    "average",
    "clean",
    "convert",
    "diff",
    "edit",
    "families",
    "formats",
    "inspect",
    "merge",
    "merge_lora",
    "migrate_config",
    "open",
    "pack",
    "quantize",
    "report",
    "reshard",
    "save",
    "unpack",
    "verify",
]

_WHERE = {
    **dict.fromkeys(("Checkpoint", "ParallelLayout", "Tokenizer", "TrainingState"), "checkpoint"),
    **dict.fromkeys([name for name in __all__ if name.endswith("Error")], "errors"),
    **dict.fromkeys(("FamilyFacts", "FormatFacts"), "facts"),
    "LazyTensor": "tensor",
    "LayoutRequest": "operations.steps.layout_request",
    **dict.fromkeys(("ArchiveReport", "edit", "pack", "unpack"), "operations.archive"),
    "average": "operations.average",
    **dict.fromkeys(("Cleaned", "clean"), "operations.clean"),
    **dict.fromkeys(("Conversion", "convert"), "operations.convert"),
    "Difference": "operations.difference",
    "diff": "operations.diff",
    "families": "models.families:facts",
    "formats": "formats:",  # a package that can be called
    "Inspection": "operations.inspection",
    "inspect": "operations.inspect",
    "merge": "operations.merge",
    "merge_lora": "operations.merge_lora",
    **dict.fromkeys(("MigratedConfig", "migrate_config"), "operations.migrate_config"),
    "open": "operations.steps.joining:open_checkpoint",
    "quantize": "operations.quantize",
    **dict.fromkeys(("Report", "report"), "operations.report"),
    "reshard": "operations.reshard",
    "save": "operations.save",
    "Verification": "operations.verification",
    "verify": "operations.verify",
}

__getattr__, __dir__ = on_demand(__name__, _WHERE)
