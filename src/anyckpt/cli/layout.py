"""Options that describe a parallel layout, shared by the commands that take one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from anyckpt.cli import completion
from anyckpt.cli.command import option
from anyckpt.cli.shared import together

if TYPE_CHECKING:
    from anyckpt.operations.steps.layout_request import LayoutRequest

_SIZE = click.IntRange(min=1)
_PARALLEL = "Parallel layout"
_VOCABULARY = "Vocabulary"
_MEGATRON = "Megatron's formats"
layout_options = together(
    option(
        "--tp",
        "tensor_parallel",
        title=_PARALLEL,
        type=_SIZE,
        metavar="N",
        help="Tensor parallel size, where a file per rank is written.",
    ),
    option("--pp", "pipeline_parallel", title=_PARALLEL, type=_SIZE, metavar="N", help="Pipeline parallel size."),
    option(
        "--vpp",
        "virtual_pipeline",
        title=_PARALLEL,
        type=_SIZE,
        metavar="N",
        help="Virtual pipeline: chunks per stage.",
    ),
    option("--ep", "expert_parallel", title=_PARALLEL, type=_SIZE, metavar="N", help="Expert parallel size."),
    option(
        "--etp",
        "expert_tensor_parallel",
        title=_PARALLEL,
        type=_SIZE,
        metavar="N",
        help="Expert tensor parallel size; as --tp if not given.",
    ),
    option(
        "--first-stage-layers",
        title=_PARALLEL,
        type=_SIZE,
        metavar="N",
        help="Layers of the first pipeline stage.",
    ),
    option("--last-stage-layers", title=_PARALLEL, type=_SIZE, metavar="N", help="Layers of the last pipeline stage."),
    option(
        "--account-for-embedding",
        title=_PARALLEL,
        is_flag=True,
        help="The embedding takes a layer's place in its stage.",
    ),
    option(
        "--account-for-loss",
        title=_PARALLEL,
        is_flag=True,
        help="The output layer takes a layer's place in its stage.",
    ),
    option(
        "--pipeline-layout",
        title=_PARALLEL,
        metavar="TEXT",
        help="Stages in Megatron's notation, such as 'Et|tt|t|tL'.",
    ),
    option(
        "--partition-rules",
        title=_PARALLEL,
        metavar="FILE",
        shell_complete=completion.paths,
        help="YAML of name pattern: kind, for names without a rule.",
    ),
    option("--vocab-size", title=_VOCABULARY, type=_SIZE, metavar="N", help="True vocabulary, without padding rows."),
    option(
        "--new-rows",
        title=_VOCABULARY,
        type=click.Choice(["mean", "zeros"]),
        help="Let the vocabulary grow to --vocab-size, with rows that are the mean of the others, or zeros.",
    ),
    option(
        "--make-vocab-size-divisible-by",
        title=_VOCABULARY,
        type=_SIZE,
        metavar="N",
        help="Pad to a multiple of N x --tp.",
    ),
    option(
        "--vocab-padding",
        "padding",
        title=_VOCABULARY,
        type=click.Choice(["zeros", "repeat-last-row"]),
        default="zeros",
        show_default=True,
        help="What fills new padding rows of the vocabulary.",
    ),
    option(
        "--transformer-impl",
        title=_MEGATRON,
        type=click.Choice(["local", "transformer_engine"]),
        help="What the model that loads it is built of; by default, what the source tells.",
    ),
    option("--keep-extra-state", title=_MEGATRON, is_flag=True, help="Keep FP8 states of the layers."),
    option(
        "--no-megatron-args",
        "megatron_args",
        title=_MEGATRON,
        flag_value=False,
        default=True,
        help="megatron-core: leave out args, checkpoint_version and iteration, which Megatron-LM reads and a bare "
        "model's load_state_dict refuses.",
    ),
    option(
        "--megatron-model",
        title=_MEGATRON,
        type=click.Choice(["gpt", "hybrid"]),
        help="Write a decoder as GPTModel, or as HybridModel, whose layers are attention or MLP; by default, as it is.",
    ),
    option(
        "--megatron-version",
        title=_MEGATRON,
        metavar="X.Y",
        help="The Megatron-Core that loads it; by default, what all releases load.",
    ),
)
"""In the order in which ``--help`` shows them."""


def layout_request(options: dict[str, Any]) -> LayoutRequest:
    """What the user says, taken out of a command's options.

    Raises:
        FormatError: the rules file cannot be read.
    """
    from anyckpt.operations.steps.layout_request import LayoutRequest
    from anyckpt.operations.steps.user_files import read_rules

    rules = options.pop("partition_rules")
    said = {name: options.pop(name) for name in LayoutRequest.__dataclass_fields__ if name in options}
    return LayoutRequest(**said, rules=None if rules is None else read_rules(rules))
