"""Taking quantized weights under other names, and into another form, as they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import AnyckptError
from anyckpt.formats.format import Format, WriteOptions
from anyckpt.operations.steps.casts import TARGETS
from anyckpt.operations.steps.full_precision import in_full_precision
from anyckpt.operations.steps.pipeline import Stepped
from anyckpt.operations.steps.recorded_renaming import Renaming
from anyckpt.quantization import method_of

_FORM = "trtllm"
_SHAPE = "the shape of packed codes, which the weight has itself"


def carries(checkpoint: Checkpoint, target: Format, to: str | None) -> bool:
    """Whether quantized weights are to be stored in the target's form as they are.

    Args:
        checkpoint: as read.
        target: the format to write.
        to: the type that the user asks for, None for none: then weights stay what they are.
    """
    other = checkpoint.dialect != target.dialect(WriteOptions())
    return to is None and checkpoint.quantization is not None and _FORM in target.quantizes and other


def type_beside(checkpoint: Checkpoint) -> str:
    """The most frequent type of weights that are not quantized."""
    sizes = Counter(dict.fromkeys(TARGETS, 0))
    for tensor in checkpoint.weights().values():
        if tensor.dtype.name in sizes and tensor.ndim:
            sizes[tensor.dtype.name] += tensor.nbytes
    return max(sizes, key=lambda name: sizes[name])


def seen_as_numbers(checkpoint: Checkpoint, to: str) -> Stepped:
    """The checkpoint in full precision, of which names and shapes are taken and no number of a quantized weight."""
    return replace(in_full_precision(checkpoint, to), notes=(), casts={})


def with_codes(ready: Checkpoint, renaming: Renaming, stored: Checkpoint, numbers: Checkpoint) -> Stepped:
    """The checkpoint under the target's names with codes and scales in place of quantized weights.

    Args:
        ready: under the target's names, in full precision.
        renaming: what was done to the weights' names.
        stored: as read.
        numbers: the same in full precision.

    Raises:
        UsageError: the target's form has no such codes.
    """
    from anyckpt.quantization.carried import parts, spread, way_of
    from anyckpt.quantization.forms import FORMS
    from anyckpt.quantization.stored import Request
    from anyckpt.quantization.weights import separated

    assert stored.quantization is not None
    found = separated(stored.weights(), stored.quantization, stored.path)
    way = way_of(found.values(), stored.path)
    plain = numbers.weights()
    codes = renaming.anew({**plain, **{name: each.codes for name, each in found.items()}})
    scales = renaming.anew({**plain, **{name: spread(each) for name, each in found.items()}})
    kind = type_beside(stored)
    layout = FORMS[_FORM][way.algorithm]
    tensors = dict(ready.tensors)
    quantized = [name for name, tensor in codes.items() if tensor.dtype.itemsize == 1]
    for name in quantized:
        try:
            made = parts(codes[name], scales[name], way, kind)
        except AnyckptError as error:
            error.path, error.tensor = stored.path, name
            raise
        del tensors[name]
        tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in made.items()}
    chosen = layout.choose(ready.tensors, ())
    modules = [name.removesuffix(".weight") for name in chosen.weights if name not in quantized]
    request = Request(way.algorithm, _FORM, way.group or 0)
    facts = layout.facts(request, [*chosen.spared, *modules] or ["lm_head"])
    note = (
        f"{len(quantized)} weights keep their codes and scales ({method_of(stored.quantization)}), stored as "
        f"{facts['quant_algo']}"
    )
    shapes = {name: _SHAPE for name in stored.weights() if name.endswith("_shape") and name[: -len("_shape")] in found}
    return Stepped(replace(ready, tensors=tensors, quantization=facts), shapes, (note,))
