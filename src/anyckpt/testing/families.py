"""Whether a family's rules and configuration are complete, and read both ways."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.config.hugging_face import surplus
from anyckpt.errors import AnyckptError, MappingError
from anyckpt.models import Family, Hub, Model
from anyckpt.models.from_hub import as_written
from anyckpt.models.language.delta_operations import ZeroCentred
from anyckpt.models.language.rules import Instance
from anyckpt.tensor import LazyTensor, from_array
from anyckpt.testing.observing import facts, require

_MEGATRON = ("hub", "megatron-core", "nemo-flat", "nemo-sharded", "nemo2")
_KINDS = {"nemo1": "nemo-flat", "nemo2": "nemo2", "megatron-args": "megatron-core"}
_WITHOUT_PLACE = {"extra", "padded_vocab_size"}
_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}  # NeMo 2 leaves them to the tokenizer
_OPEN_LENGTHS = {"vocabulary", "positions"}  # which the stored tensors tell where a configuration does not
_MOST_TRIED = 200


def check_family(
    family: Family,
    config: Mapping[str, Any],
    *,
    cannot: Sequence[str] = (),
    unread: Sequence[str] = (),
    values: Mapping[str, LazyTensor] | None = None,
) -> None:
    """Everything that is asked of a family, on a small model of it.

    Names are unique; rules lead to the hub and back with no value lost, doubled or put elsewhere; each tensor that is
    missing or surplus is an error that names it; Megatron's dialects and every framework's spelling of the
    configuration, of those that the family has, lead back to the same model.

    Args:
        family: the family; registered, as ``anyckpt.families()`` shows it.
        config: a ``config.json`` of a model with two layers or so and small sizes, no two of them equal.
        cannot: of ``nemo1``, ``nemo2`` and ``megatron-args``, those that have no words for this model although they
            have for the family.
        unread: keys of ``config`` that no other framework has a word for, and that only become notes.
        values: by stored name, tensors in place of numbers, where a rule computes with them so that only such values
            come back (rows of length 1).

    Raises:
        AssertionError: the contract is broken.
    """
    known = models.known_families().get(family.name)
    require(known is family, f"{family.name} is not registered: install its package")
    for rule in family.rules:
        stars = {pattern.count("*") for pattern in (*rule.source, rule.hub)}
        require(len(stars) == 1, f"the patterns of the rule for {rule.hub} have other numbers of stars")
    model = _model(Checkpoint("config.json", "hf", {}, dialect="hf", config=dict(config), config_kind="hf"))
    require(model.family == family.name, f"config.json is taken for one of family {model.family}")
    expected = model.definition.expected(model.config)
    tensors = {**_numbered(_stored_shapes(model, expected)), **_centred(expected, 2), **(values or {})}
    checkpoint = Checkpoint("sample", "hf", tensors, dialect="hf", config=dict(config), config_kind="hf")
    model = _model(checkpoint)
    dropped = [key for key in surplus(model.config) if key not in unread]
    require(not dropped, f"keys of config.json that nothing reads: {', '.join(dropped)}")
    _check_names(model)
    _check_both_ways(checkpoint, model)
    _check_complete(checkpoint, model)
    _check_configuration(checkpoint, model, cannot)


def _model(checkpoint: Checkpoint) -> Model:
    model = models.identify(checkpoint)
    if model is None:
        raise AssertionError("config.json is of no known family")
    return model


def _check_names(model: Model) -> None:
    expected = model.definition.expected(model.config)
    require(expected, "a model of the family has no tensors")
    hub = [item.hub for item in expected]
    stored = [name for item in expected for name in item.sources]
    for kind, names in (("the hub's", hub), ("the family's", stored)):
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"two rules have {kind} name {twice[:1]}")
    for item in expected:
        require(all(n >= 0 for n in item.shape), f"{item.hub} has the shape {item.shape}")


def _check_both_ways(checkpoint: Checkpoint, model: Model) -> None:
    hub = models.to_hub(checkpoint, model)
    expected = {item.hub: item for item in model.definition.expected(model.config)}
    require(list(hub.tensors) == list(expected), "the hub has other tensors than the rules, or in another order")
    for name, tensor in hub.tensors.items():
        shape = expected[name].shape
        require(tensor.shape == shape, f"{name} is {tensor.shape} on the hub, and its rule says {shape}")
    require(
        np.array_equal(_odd_parts(hub.tensors.values()), _odd_parts(checkpoint.tensors.values())),
        "on the way to the hub a value is lost, doubled or another",
    )
    stored = facts(checkpoint.tensors)
    require(facts(models.from_hub(hub, "hf").tensors) == stored, "the way back from the hub gives other tensors")
    made = {name for name, item in expected.items() if not item.sources}
    there = {**_numbered({n: t.shape for n, t in hub.tensors.items()}), **{n: hub.tensors[n] for n in made}}
    there |= _centred(expected.values(), 1)
    back = models.from_hub(Hub(model, there), "hf").tensors
    require(
        np.array_equal(_odd_parts(back.values()), _odd_parts(there.values())),
        "on the way from the hub a value is lost, doubled or another",
    )
    for dialect in _MEGATRON if model.definition.megatron else ("hub",):
        named = models.from_hub(hub, dialect).tensors
        again = models.to_hub(replace(checkpoint, tensors=named, dialect=None), model)
        require(facts(models.from_hub(again, "hf").tensors) == stored, f"{dialect} names do not lead back")


def _centred(expected: Iterable[Instance], value: int) -> dict[str, LazyTensor]:
    """Norms of which the hub has 1 less, all of one value: of 2 and of 1 the odd part is the same.

    Args:
        expected: what the model consists of.
        value: 2 for the family's tensors, 1 for the hub's.
    """
    items = [item for item in expected if isinstance(item.rule.operation, ZeroCentred)]
    names = {(item.sources[0] if value == 2 else item.hub): item.shape for item in items}
    return {name: from_array(np.full(shape, float(value))) for name, shape in names.items()}


def _check_complete(checkpoint: Checkpoint, model: Model) -> None:
    names = list(checkpoint.tensors)
    for missing in names[:: max(1, len(names) // _MOST_TRIED)]:
        rest = {name: tensor for name, tensor in checkpoint.tensors.items() if name != missing}
        _refused(replace(checkpoint, tensors=rest), model, missing, f"without {missing} the model passes for whole")
    stem, dot, last = names[len(names) // 2].rpartition(".")
    surplus = f"{stem}{dot}other_{last}"
    more = {**checkpoint.tensors, surplus: from_array(np.zeros(3, np.float32))}
    _refused(replace(checkpoint, tensors=more), model, surplus, f"{surplus} is of no rule, and is lost")
    fixed = [item for item in model.definition.expected(model.config) if not _OPEN_LENGTHS & {*item.rule.shape}]
    name = next(name for name, shape in _stored_shapes(model, fixed).items() if shape and name in checkpoint.tensors)
    tensor = checkpoint.tensors[name]
    longer = {**checkpoint.tensors, name: tensor.pad(0, tensor.shape[0] + 1)}
    try:
        models.to_hub(replace(checkpoint, tensors=longer), model)
    except MappingError:
        return
    raise AssertionError(f"{name} may have a row more than the configuration says")


def _refused(checkpoint: Checkpoint, model: Model, name: str, problem: str) -> None:
    try:
        models.to_hub(checkpoint, model)
    except MappingError as error:
        require(name in str(error), f"an error does not name {name}: {error}")
        return
    raise AssertionError(problem)


def _check_configuration(checkpoint: Checkpoint, model: Model, cannot: Sequence[str]) -> None:
    written = _plain(models.render_config(model, "hf"))
    _check_same(_model(replace(checkpoint, config=written)), model, "config.json", set())
    family = model.definition
    has = {"nemo1": family.nemo1, "nemo2": family.nemo2 is not None, "megatron-args": family.megatron}
    hub = models.to_hub(checkpoint, model)
    for kind, dialect in _KINDS.items():
        try:
            rendered = _plain(models.render_config(model, kind))
        except AnyckptError as error:
            require(not has[kind] or kind in cannot, f"{kind} cannot spell the configuration: {error}")
            continue
        require(has[kind], f"{kind} has no such models, and a configuration is written all the same")
        require(kind not in cannot, f"{kind} can spell the configuration")
        named = models.from_hub(hub, dialect).tensors
        stored = replace(checkpoint, tensors=named, dialect=None, config=rendered, config_kind=kind)
        found = _model(stored)
        require(found.family == family.name, f"the {kind} configuration is taken for family {found.family}")
        back = _model(replace(checkpoint, config=_plain(models.render_config(found, "hf"))))
        _check_same(back, model, kind, _TOKENS if kind == "nemo2" else set())


def _check_same(found: Model, model: Model, kind: str, without: set[str]) -> None:
    one, other = asdict(found.config), asdict(model.config)
    for key in other.keys() - _WITHOUT_PLACE - without:
        require(one[key] == other[key], f"{key} is {other[key]!r}, and by way of {kind} {one[key]!r}")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As a file holds it."""
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return plain


def _stored_shapes(model: Model, items: Iterable[Instance]) -> dict[str, tuple[int, ...]]:
    """Shapes by the names under which the family is stored, as the rules say them."""
    tensors: dict[str, LazyTensor] = {}
    for item in items:
        if item.sources:
            shapes = item.rule.operation.source_shapes(item.shape, item.config)
            for name, shape in zip(item.sources, shapes, strict=True):
                tensors[name] = from_array(np.zeros(tuple(shape), np.float32))
    return {name: tensor.shape for name, tensor in as_written(tensors, model).items()}


def _numbered(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    """Tensors whose elements are all different, also when they are multiplied by powers of two."""
    result: dict[str, LazyTensor] = {}
    start = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64))
        result[name] = from_array((2.0 * np.arange(start, start + size) + 1).reshape(shape))
        start += size
    return result


def _odd_parts(tensors: Iterable[LazyTensor]) -> np.ndarray[Any, Any]:
    """The odd number that each element is a power of two times, sorted; zeros are left out."""
    flat = np.concatenate([tensor.numpy().reshape(-1) for tensor in tensors])
    return np.sort(np.frexp(flat[flat != 0])[0])
