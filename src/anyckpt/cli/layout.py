"""Options that describe a parallel layout, shared by the commands that take one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from anyckpt.operations.steps.layout_request import LayoutRequest

Command = TypeVar("Command", bound=Callable[..., Any])

_SIZE = click.IntRange(min=1)
_OPTIONS = (
    click.option(
        "--tp",
        "tensor_parallel",
        type=_SIZE,
        metavar="N",
        help="Tensor parallel size, where a file per rank is written.",
    ),
    click.option("--pp", "pipeline_parallel", type=_SIZE, metavar="N", help="Pipeline parallel size."),
    click.option("--vpp", "virtual_pipeline", type=_SIZE, metavar="N", help="Virtual pipeline: chunks per stage."),
    click.option("--ep", "expert_parallel", type=_SIZE, metavar="N", help="Expert parallel size."),
    click.option(
        "--etp",
        "expert_tensor_parallel",
        type=_SIZE,
        metavar="N",
        help="Expert tensor parallel size; as --tp if not given.",
    ),
    click.option("--first-stage-layers", type=_SIZE, metavar="N", help="Layers of the first pipeline stage."),
    click.option("--last-stage-layers", type=_SIZE, metavar="N", help="Layers of the last pipeline stage."),
    click.option("--account-for-embedding", is_flag=True, help="The embedding takes a layer's place in its stage."),
    click.option("--account-for-loss", is_flag=True, help="The output layer takes a layer's place in its stage."),
    click.option("--pipeline-layout", metavar="TEXT", help="Stages in Megatron's notation, such as 'Et|tt|t|tL'."),
    click.option("--vocab-size", type=_SIZE, metavar="N", help="True vocabulary, without padding rows."),
    click.option("--make-vocab-size-divisible-by", type=_SIZE, metavar="N", help="Pad to a multiple of N x --tp."),
    click.option(
        "--vocab-padding",
        "padding",
        type=click.Choice(["zeros", "repeat-last-row"]),
        default="zeros",
        show_default=True,
        help="What fills new padding rows of the vocabulary.",
    ),
    click.option(
        "--transformer-impl",
        type=click.Choice(["local", "transformer_engine"]),
        help="Megatron's formats: what the model that loads it is built of; by default, what the source tells.",
    ),
    click.option("--keep-extra-state", is_flag=True, help="Megatron's formats: keep FP8 states of the layers."),
    click.option(
        "--no-megatron-args",
        "megatron_args",
        flag_value=False,
        default=True,
        help="megatron-core: leave out args, checkpoint_version and iteration, which Megatron-LM reads and a bare "
        "model's load_state_dict refuses.",
    ),
    click.option("--partition-rules", metavar="FILE", help="YAML of name pattern: kind, for names without a rule."),
)


def layout_options(command: Command) -> Command:
    """The options, in the order in which ``--help`` shows them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


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
