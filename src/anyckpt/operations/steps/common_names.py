"""Names under which the weights of two checkpoints meet, so that they can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError, few
from anyckpt.models import Hub, Model
from anyckpt.models.dialects import spellings as dialects
from anyckpt.models.dialects.hybrid import has_halves
from anyckpt.operations.steps.full_precision import obstacle, seen_in_full_precision
from anyckpt.operations.steps.naming import identify
from anyckpt.operations.steps.recorded_renaming import Renaming
from anyckpt.tensor import LazyTensor


@dataclass(frozen=True)
class CommonNames:
    """The tensors of two checkpoints under names that make them meet.

    Attributes:
        a: those of the first.
        b: those of the second.
        kind: ``hub``, ``weights`` or ``stored``.
        notes: what a user should know.
        models: what both are, if that is known.
        renamings: what brings each one's weights under these names, and other tensors of weights' shapes likewise;
            None if they keep their names.
        rows: common name -> rows of it that are not padding, where there is padding.
    """

    a: dict[str, LazyTensor]
    b: dict[str, LazyTensor]
    kind: str
    notes: tuple[str, ...] = ()
    models: tuple[Model, Model] | None = None
    renamings: tuple[Renaming, Renaming] | None = None
    rows: Mapping[str, int] = field(default_factory=dict)

    def trimmed(self, name: str, tensor: LazyTensor) -> LazyTensor:
        """What a weight has beside it (a moment, a master) without the rows that only pad the vocabulary."""
        rows = self.rows.get(name)
        return tensor if rows is None or tensor.shape[0] <= rows else tensor.narrow(0, 0, rows)


def common_names(a: Checkpoint, b: Checkpoint, *, raw: bool) -> CommonNames:
    """Names under which the same weights of two checkpoints meet.

    Hub names where the family of both is known, or of one whose configuration explains the other; else the weights'
    stored names without their common prefix.  Rows that only pad the vocabulary are left out.  Where one side alone
    is quantized, it is compared by its numbers in the other's type; where both are, codes and scales are.

    Args:
        a: a checkpoint.
        b: another.
        raw: all tensors under their stored names instead.
    """
    if raw:
        return CommonNames(a.tensors, b.tensors, "stored")
    if a.quantization is None or b.quantization is None:
        a, b = seen_in_full_precision(a, b), seen_in_full_precision(b, a)
    try:
        models_of = _identify_both(a, b)
        if models_of is not None:
            renamings = _by_hub(a, models_of[0]), _by_hub(b, models_of[1])
            found = _hub_names(models.to_hub(a, models_of[0]), models.to_hub(b, models_of[1]))
            return replace(found, renamings=renamings)
        why = "the model family of one side is unknown"
    except MappingError as error:
        if a.quantization is not None and b.quantization is not None:
            why = "both are quantized"
        else:
            why = f"they do not fit the model family: {obstacle(a) or obstacle(b) or error}"
    kinds = [c.dialect or dialects.detect(c.weights()) for c in (a, b)]
    first, second = a.weights(), b.weights()
    note = f"compared under stored names, because {why}"
    alike = kinds[0] == kinds[1] and has_halves(first) == has_halves(second)
    if not alike and all(map(dialects.is_megatron, kinds)):
        renamings = Renaming(_by_dialect, first, whole=False), Renaming(_by_dialect, second, whole=False)
        return CommonNames(_by_dialect(first), _by_dialect(second), "weights", (note,), renamings=renamings)
    return CommonNames(first, second, "weights", (note,))


def _by_dialect(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    return dialects.to_hub_names(tensors)[0]


def _by_hub(checkpoint: Checkpoint, model: Model) -> Renaming:
    def rename(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        hub = models.to_hub(checkpoint.with_weights(tensors), model)
        return {**hub.tensors, **_parts(hub)}

    return Renaming(rename, checkpoint.weights(), whole=False)


def _identify_both(a: Checkpoint, b: Checkpoint) -> tuple[Model, Model] | None:
    first, second = identify(a), identify(b)
    if first is not None and second is None:
        second = models.identify(b, family=first.family, config=a.config)
    elif second is not None and first is None:
        first = models.identify(a, family=second.family, config=b.config)
    return None if first is None or second is None else (first, second)


def _hub_names(a: Hub, b: Hub) -> CommonNames:
    first, second = ({**hub.tensors, **_parts(hub)} for hub in (a, b))
    notes = list(dict.fromkeys(note for hub in (a, b) for note in hub.notes if note not in _said_of_parts(hub)))
    without = {name: reason for hub in (a, b) for name, reason in hub.ignored.items() if name not in _stored_parts(hub)}
    for reason in dict.fromkeys(without.values()):
        names = [name for name in without if without[name] == reason]
        notes.append(f"not compared: {few(names, 1)} ({reason})")
    sizes = {v for v in (a.model.config.vocab_size, b.model.config.vocab_size) if v is not None}
    size = sizes.pop() if len(sizes) == 1 else None
    if sizes:
        notes.append(f"the vocabularies differ: {' and '.join(map(str, sorted(sizes)))} tokens, padding aside")
    padding = 0
    kept = {}
    for rule in a.model.definition.rules:
        name = rule.hub
        if size is None or not rule.of_vocabulary or name not in first or name not in second:
            continue
        rows = (first[name].shape[0], second[name].shape[0])
        if min(rows) >= size:
            first[name], second[name] = (side[name].narrow(0, 0, size) for side in (first, second))
            padding = max(padding, max(rows) - size)
            kept[name] = size
    if padding:
        notes.append(f"rows beyond the vocabulary of {size} tokens, up to {padding}, are padding and not compared")
    return CommonNames(first, second, "hub", tuple(notes), (a.model, b.model), rows=kept)


def _parts(hub: Hub) -> dict[str, LazyTensor]:
    """What no rule knows of a larger model, of which the hub has the text."""
    return {} if hub.spelling is None else hub.spelling.common_parts()


def _stored_parts(hub: Hub) -> Mapping[str, LazyTensor]:
    return {} if hub.spelling is None else hub.spelling.parts


def _said_of_parts(hub: Hub) -> tuple[str, ...]:
    return () if hub.spelling is None else hub.spelling.notes
