"""How a run was divided and its layers built, in the words of Megatron-LM's arguments, and back.

Names are those of core 0.16 (``megatron/training/arguments.py``), of the releases before it, and of NeMo 1
(``MegatronBaseModel`` of 1.20 to 2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from anyckpt.checkpoint import ParallelLayout
from anyckpt.config.hybrid import PATTERN
from anyckpt.config.reader import Reader
from anyckpt.errors import MappingError
from anyckpt.layout.experts import Spelling
from anyckpt.layout.geometry import Parallelism
from anyckpt.layout.pipeline import hybrid_layout


def parallelism_from_args(arguments: Mapping[str, Any], layout: ParallelLayout) -> Parallelism:
    """How a model is spread.

    Args:
        arguments: what they say beyond the sizes.
        layout: the sizes, as the files were found to be laid out.

    Raises:
        MappingError: an argument is of the wrong type.
    """
    return Parallelism(
        tensor_parallel=layout.tensor_parallel,
        pipeline_parallel=layout.pipeline_parallel,
        virtual_pipeline=layout.virtual_pipeline,
        expert_parallel=layout.expert_parallel,
        expert_tensor_parallel=_size(arguments, "expert_tensor_parallel_size"),
        num_layers_in_first_pipeline_stage=_first_of(
            arguments, "decoder_first_pipeline_num_layers", "num_layers_in_first_pipeline_stage"
        ),
        num_layers_in_last_pipeline_stage=_first_of(
            arguments, "decoder_last_pipeline_num_layers", "num_layers_in_last_pipeline_stage"
        ),
        account_for_embedding=bool(arguments.get("account_for_embedding_in_pipeline_split")),
        account_for_loss=bool(arguments.get("account_for_loss_in_pipeline_split")),
        pipeline_layout=arguments.get("pipeline_model_parallel_layout") or _parted_by_letters(arguments),
        pipeline_split_rank=_size(arguments, "pipeline_model_parallel_split_rank"),
    )


def _parted_by_letters(arguments: Mapping[str, Any]) -> list[list[str]] | None:
    """The pipeline stages that a HybridModel's letters say, None if they say none."""
    letters = arguments.get(PATTERN)
    return hybrid_layout(letters) if isinstance(letters, str) else None


def letters_in_parts(letters: str, layers: Sequence[int]) -> str:
    """A HybridModel's letters with ``|`` between pipeline stages; those of further predictions follow as they are.

    Args:
        letters: ``hybrid_layer_pattern``, parted or not.
        layers: how many layers each stage has, chunk by chunk in the order in which data flows through them.
    """
    body, *further = letters.split("/")
    ends = list(accumulate(layers))
    plain = body.replace("|", "")
    parted = "|".join(plain[end - count : end] for end, count in zip(ends, layers, strict=True))
    return "/".join([parted, *further])


def args_from_parallelism(parallelism: Parallelism) -> dict[str, Any]:
    """The arguments that describe a layout, to put into a configuration whose model is cut so."""
    return {
        "tensor_model_parallel_size": parallelism.tensor_parallel,
        "pipeline_model_parallel_size": parallelism.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": (
            parallelism.virtual_pipeline if parallelism.virtual_pipeline > 1 else None
        ),
        "expert_model_parallel_size": parallelism.expert_parallel,
        "expert_tensor_parallel_size": parallelism.expert_ways,
        "decoder_first_pipeline_num_layers": parallelism.num_layers_in_first_pipeline_stage,
        "decoder_last_pipeline_num_layers": parallelism.num_layers_in_last_pipeline_stage,
        "account_for_embedding_in_pipeline_split": parallelism.account_for_embedding,
        "account_for_loss_in_pipeline_split": parallelism.account_for_loss,
        "pipeline_model_parallel_layout": parallelism.pipeline_layout,
    }


def expert_spelling_from_args(arguments: Mapping[str, Any]) -> Spelling:
    """How a rank of such a model names its experts: Megatron-Core's ``get_moe_module_spec`` of 0.16."""
    if not arguments.get("moe_grouped_gemm"):
        return "sequential"
    return "legacy-grouped" if is_local(arguments) or arguments.get("moe_use_legacy_grouped_gemm") else "grouped"


def is_local(arguments: Mapping[str, Any]) -> bool:
    """Whether layers are those of Megatron-Core's local implementation rather than Transformer Engine's."""
    return arguments.get("transformer_impl") == "local"


def _first_of(arguments: Mapping[str, Any], *keys: str) -> int | None:
    return next((value for key in keys if (value := _size(arguments, key)) is not None), None)


def _size(arguments: Mapping[str, Any], key: str) -> int | None:
    value = Reader(arguments, "run").integer(key)
    if value is None or value >= 0:
        return value
    raise MappingError(f"the run's {key} is not possible", expected="a size", found=value)
