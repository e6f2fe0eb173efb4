"""What the ``args`` of a rank file say of the parallel layout.

Facts: ``megatron/training/arguments.py`` of core 0.16; ``model_parallel_size`` is its name for the tensor-parallel
size before ``checkpoint_version`` 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.of_ranks import MOST_RANKS
from anyckpt.containers.torch_file.values import brief
from anyckpt.data_classes import dataclass
from anyckpt.dtypes import BY_NAME
from anyckpt.errors import FormatError
from anyckpt.pickling import Global, Record
from anyckpt.pickling.plain import to_plain
from anyckpt.pickling.torch_objects import NAMESPACE

_ENUMS = "megatron.core.transformer.enums"
_LAYER_TYPES = {1: "embedding", 2: "loss", 3: "encoder", 4: "decoder", 5: "mtp"}
SAME_ON_EVERY_RANK = tuple(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels num_experts
    padded_vocab_size swiglu untie_embeddings_and_output_weights expert_tensor_parallel_size
    decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers account_for_embedding_in_pipeline_split
    account_for_loss_in_pipeline_split
    """.split()
)
"""Arguments that describe the model or its layout besides the sizes in ``Sizes``."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of ranks along each dimension; None where the arguments do not say."""

    tensor: int | None
    pipeline: int | None
    virtual: int | None
    expert: int | None


def read_sizes(arguments: Mapping[str, Any], path: str) -> Sizes:
    """The sizes that a rank's arguments state.

    Raises:
        FormatError: one is not a number of ranks.
    """

    def size(*keys: str) -> int | None:
        value = next((arguments[key] for key in keys if arguments.get(key) is not None), None)
        if value is None:
            return None
        if type(value) is not int or not 0 < value <= MOST_RANKS:
            raise FormatError(
                f"args.{keys[0]} is not possible", path=path, expected="a number of ranks", found=brief(value)
            )
        return value

    return Sizes(
        size("tensor_model_parallel_size", "model_parallel_size"),
        size("pipeline_model_parallel_size"),
        size("virtual_pipeline_model_parallel_size"),
        size("expert_model_parallel_size"),
    )


def plain_arguments(arguments: Mapping[Any, Any]) -> dict[str, Any]:
    """The arguments as plain data; a layer layout as the text or lists that it was made from."""
    seen = {key: value for key, value in arguments.items() if isinstance(key, str)}
    layout = seen.get("pipeline_model_parallel_layout")
    if isinstance(layout, Record):
        layout = layout.get("input_data")
    if isinstance(layout, list):
        layout = [[_layer_type(kind) for kind in stage] if isinstance(stage, list) else stage for stage in layout]
    if layout is not None:
        seen["pipeline_model_parallel_layout"] = layout
    plain = to_plain(seen)
    return plain if isinstance(plain, dict) else {}


def pickled_arguments(stored: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an ``args`` to write: the stored ones with what the configuration changes or adds.

    A stored value that the configuration shows unchanged is kept as it was pickled.  Where only the configuration's
    plain view is left, an element type and a member of Megatron-Core's enums are made again of it; an object of
    another type is left out rather than replaced by a dictionary, and none that a file merely names is called.
    """
    fields = dict(stored.fields()) if isinstance(stored, Record) and stored.type == NAMESPACE else {}
    shown = to_plain(fields)
    for key, value in config.items():
        if key in shown and shown[key] == value:
            continue
        if isinstance(value, dict) and "__type__" in value:
            member = _enum_member(value)
            if member is not None:
                fields[key] = member
        else:
            fields[key] = _element_type(value)
    return fields


def _element_type(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("torch.") and value.removeprefix("torch.") in BY_NAME:
        return Global("torch", value.removeprefix("torch."))
    return value


def _enum_member(shown: Mapping[str, Any]) -> Record | None:
    module, _, name = str(shown["__type__"]).rpartition(".")
    args = shown.get("args")
    if module != _ENUMS or not name.isidentifier() or not isinstance(args, list) or [type(a) for a in args] != [int]:
        return None
    return Record(Global(module, name), (args[0],))


def _layer_type(kind: Any) -> Any:
    """The name of a ``LayerType``, an enum, which is pickled by its value."""
    if isinstance(kind, Record) and len(kind.args) == 1 and isinstance(kind.args[0], int):
        return _LAYER_TYPES.get(kind.args[0], kind)
    return kind
