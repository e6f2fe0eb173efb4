"""What other packages build families, formats and dialects from.

A package names what it brings as entry points in its ``pyproject.toml``::

    [project.entry-points."anyckpt.families"]
    my-family = "my_package.family:FAMILY"     # a Family: rules of names, shapes, and the configuration's fields

    [project.entry-points."anyckpt.formats"]
    my-format = "my_package.format:FORMAT"     # a Format: detect, read and plan

    [project.entry-points."anyckpt.dialects"]
    my-names = "my_package.names:DIALECT"      # a table of names

Once it is installed, ``--family``, ``--to`` and ``--names`` take them.  ``anyckpt.testing`` has the checks of our own
families and formats, which a package's tests can put to its own.

These names stay where they are whatever moves inside the package.  Each is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyckpt.on_demand import on_demand

if TYPE_CHECKING:
    from anyckpt.checkpoint import (
        AdapterSettings,
        Checkpoint,
        CompositeTensor,
        OptimizerState,
        ParallelLayout,
        RankShard,
        StoredChecksum,
        Tokenizer,
        TrainingState,
    )
    from anyckpt.config.codecs import (
        Fixed,
        Implied,
        Multiple,
        Noted,
        OfClass,
        Power,
        Present,
        Times,
        Words,
        Written,
        negated,
        same_as,
    )
    from anyckpt.config.fields import REQUIRED, Codec, Field
    from anyckpt.config.hugging_face import COMMON as HUGGING_FACE_FIELDS
    from anyckpt.config.model import ModelConfig
    from anyckpt.config.reader import Reader
    from anyckpt.config.spellings import HuggingFace, NeMo2, Variant
    from anyckpt.config.windows import AllBut, From, Layers, LayerWindow, Window
    from anyckpt.containers.safetensors import read_safetensors, safetensors_parts
    from anyckpt.containers.torch_file import read_torch, zip_parts
    from anyckpt.dtypes import DType, dtype
    from anyckpt.engine.plan import Computed, Literal, OutputFile, Plan, SourceData, TensorData, small_file
    from anyckpt.formats.format import Format, WriteOptions
    from anyckpt.formats.shared.loose_tensors import weights_only
    from anyckpt.identity import ElementWise
    from anyckpt.layout.partition import KINDS as PARTITIONS
    from anyckpt.layout.partition import Partition
    from anyckpt.models.dialects.external import OtherDialect as Dialect
    from anyckpt.models.families.parts.decoder import TRAITS as DECODER_TRAITS
    from anyckpt.models.families.parts.decoder import untied
    from anyckpt.models.language.family import Family
    from anyckpt.models.language.rule_operations import (
        CONCATENATED_QKV,
        GATE_UP,
        IDENTITY,
        INTERLEAVED_KV,
        INTERLEAVED_QKV,
        TRANSPOSED,
        TRANSPOSED_CONCATENATED_QKV,
        Leading,
        Operation,
        Scaled,
        Transposed,
    )
    from anyckpt.models.language.rules import AXES, DIMENSIONS, Instance, Rule, has
    from anyckpt.storage.local_file import LocalFile
    from anyckpt.storage.location import Location
    from anyckpt.storage.place import Place
    from anyckpt.storage.source import ByteSource, MemorySource
    from anyckpt.tensor import Constant, LazyTensor, Mapped, Stored, concatenate, from_array, mosaic, stack

__all__ = [
    "AXES",
    "CONCATENATED_QKV",
    "DECODER_TRAITS",
    "DIMENSIONS",
    "GATE_UP",
    "HUGGING_FACE_FIELDS",
    "IDENTITY",
    "INTERLEAVED_KV",
    "INTERLEAVED_QKV",
    "PARTITIONS",
    "REQUIRED",
    "TRANSPOSED",
    "TRANSPOSED_CONCATENATED_QKV",
    "AdapterSettings",
    "AllBut",
    "ByteSource",
    "Checkpoint",
    "Codec",
    "CompositeTensor",
    "Computed",
    "Constant",
    "DType",
    "Dialect",
    "ElementWise",
    "Family",
    "Field",
    "Fixed",
    "Format",
    "From",
    "HuggingFace",
    "Implied",
    "Instance",
    "LayerWindow",
    "Layers",
    "LazyTensor",
    "Leading",
    "Literal",
    "LocalFile",
    "Location",
    "Mapped",
    "MemorySource",
    "ModelConfig",
    "Multiple",
    "NeMo2",
    "Noted",
    "OfClass",
    "Operation",
    "OptimizerState",
    "OutputFile",
    "ParallelLayout",
    "Partition",
    "Place",
    "Plan",
    "Power",
    "Present",
    "RankShard",
    "Reader",
    "Rule",
    "Scaled",
    "SourceData",
    "Stored",
    "StoredChecksum",
    "TensorData",
    "Times",
    "Tokenizer",
    "TrainingState",
    "Transposed",
    "Variant",
    "Window",
    "Words",
    "WriteOptions",
    "Written",
    "concatenate",
    "dtype",
    "from_array",
    "has",
    "mosaic",
    "negated",
    "read_safetensors",
    "read_torch",
    "safetensors_parts",
    "same_as",
    "small_file",
    "stack",
    "untied",
    "weights_only",
    "zip_parts",
]

_HOMES = {
    "checkpoint": (
        "AdapterSettings",
        "Checkpoint",
        "CompositeTensor",
        "OptimizerState",
        "ParallelLayout",
        "RankShard",
        "StoredChecksum",
        "Tokenizer",
        "TrainingState",
    ),
    "config.codecs": (
        "Fixed",
        "Implied",
        "Multiple",
        "Noted",
        "OfClass",
        "Power",
        "Present",
        "Times",
        "Words",
        "Written",
        "negated",
        "same_as",
    ),
    "config.fields": ("REQUIRED", "Codec", "Field"),
    "config.model": ("ModelConfig",),
    "config.reader": ("Reader",),
    "config.spellings": ("HuggingFace", "NeMo2", "Variant"),
    "config.windows": ("AllBut", "From", "LayerWindow", "Layers", "Window"),
    "containers.safetensors": ("read_safetensors", "safetensors_parts"),
    "containers.torch_file": ("read_torch", "zip_parts"),
    "dtypes": ("DType", "dtype"),
    "engine.plan": ("Computed", "Literal", "OutputFile", "Plan", "SourceData", "TensorData", "small_file"),
    "formats.format": ("Format", "WriteOptions"),
    "formats.shared.loose_tensors": ("weights_only",),
    "identity": ("ElementWise",),
    "layout.partition": ("Partition",),
    "models.families.parts.decoder": ("untied",),
    "models.language.family": ("Family",),
    "models.language.rule_operations": (
        "CONCATENATED_QKV",
        "GATE_UP",
        "IDENTITY",
        "INTERLEAVED_KV",
        "INTERLEAVED_QKV",
        "TRANSPOSED",
        "TRANSPOSED_CONCATENATED_QKV",
        "Leading",
        "Operation",
        "Scaled",
        "Transposed",
    ),
    "models.language.rules": ("AXES", "DIMENSIONS", "Instance", "Rule", "has"),
    "storage.local_file": ("LocalFile",),
    "storage.location": ("Location",),
    "storage.place": ("Place",),
    "storage.source": ("ByteSource", "MemorySource"),
    "tensor": ("Constant", "LazyTensor", "Mapped", "Stored", "concatenate", "from_array", "mosaic", "stack"),
}

__getattr__, __dir__ = on_demand(
    __name__,
    {
        **{name: home for home, names in _HOMES.items() for name in names},
        "DECODER_TRAITS": "models.families.parts.decoder:TRAITS",
        "Dialect": "models.dialects.external:OtherDialect",
        "HUGGING_FACE_FIELDS": "config.hugging_face:COMMON",
        "PARTITIONS": "layout.partition:KINDS",
    },
)
