"""What is in a checkpoint, as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any

from anyckpt.checkpoint.grouping import grouped
from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError
from anyckpt.formats.shared import no_weights
from anyckpt.operations.steps.globs import as_patterns, matching

if TYPE_CHECKING:
    from anyckpt.operations.steps.module_tree import Module
    from anyckpt.operations.steps.statistics import Magnitudes, Statistics
    from anyckpt.pickling import Callee

if TYPE_CHECKING:
    from anyckpt.operations.steps.looking import LookedAt

_IN_JSON = tuple(
    """
    path format format_version family parameters bytes tensor_count dtypes layout step has_optimizer artifacts
    config warnings dialect dtype_bytes size model epoch consumed_samples states tokenizer config_kind ignored
    objects values details adapter notes learning_rates loss_scale
    sizes
    """.split()
)
"""Attributes of an inspection that are in ``--json`` as they are, in its order."""

_SHOWN = 8


@dataclass(frozen=True)
class TensorFacts:
    """One tensor.

    Attributes:
        name: stored name, or hub name if these were asked for.
        dtype: torch's name of the element type.
        shape: global shape.
        nbytes: bytes of the elements.
        shards: stored pieces that the tensor is made of.
        files: files that hold them, relative to the checkpoint where they lie inside it.
        same_as: the tensor before it that has the same bytes in the file, as tied weights may; or None.
        sha256: digest of the little-endian bytes in C order, if asked for.
        statistics: if asked for; None also where numpy cannot compute with the type.
        magnitudes: how many elements have which, if asked for; None also where there are no statistics.
        file_bytes: stored bytes of the tensor in each of ``files``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    shards: int
    files: tuple[str, ...]
    sha256: str | None = None
    statistics: Statistics | None = None
    same_as: str | None = None
    magnitudes: Magnitudes | None = None
    file_bytes: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As in ``inspect --json``: ``sha256``, ``stats`` and ``same_as`` are there only if known."""
        facts = {**vars(self), "shape": list(self.shape), "files": list(self.files)}
        for name in ("sha256", "statistics", "same_as", "magnitudes", "file_bytes"):
            del facts[name]
        if self.same_as is not None:
            facts["same_as"] = self.same_as
        if self.sha256 is not None:
            facts["sha256"] = self.sha256
        if self.statistics is not None:
            facts["stats"] = self.statistics.to_json()
        return facts


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one type and shape whose names differ in numbers only.

    Attributes:
        name: one name for all: ``model.layers.{0-31}.mlp.up_proj.weight``.
        tensors: they.
    """

    name: str
    tensors: tuple[TensorFacts, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def shards(self) -> int:
        """Stored pieces of all."""
        return sum(tensor.shards for tensor in self.tensors)

    @property
    def files(self) -> tuple[str, ...]:
        """Files that hold them."""
        return tuple(dict.fromkeys(file for tensor in self.tensors for file in tensor.files))


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint.

    Attributes:
        path: what was opened.
        format: name of the format, as in ``--to``.
        format_version: as far as the files tell, or None.
        family: model family, or None if unknown.
        dialect: naming of the weights, or None if unknown.
        model: what the model is, in Megatron-Core's words, or None if the family is unknown.
        parameters: elements of the weights; tied weights count once.
        size: the same as people say it, such as ``8.0B``.
        bytes: bytes of all tensors, training state included; a tensor stored once under two names counts once.
        tensor_count: stored tensors, training state included.
        dtypes: element type -> number of tensors.
        dtype_bytes: element type -> bytes, tied ones once.
        layout: parallel sizes of the files.
        step: optimizer steps taken, or None.
        epoch: or None.
        consumed_samples: or None.
        states: ``optimizer``, ``scheduler``, ``rng`` -> present.
        artifacts: names of the other files.
        tokenizer: ``library``, ``files`` and ``hub_name``, or None.
        config: the model's configuration as stored.
        config_kind: its spelling, or None.
        ignored: stored names that carry no weights -> reason.
        objects: names of non-tensor state.
        values: the same state as plain data, shortened where it is long; nothing that a file names is executed.
        details: facts that only this format has.
        adapter: of a LoRA or DoRA adapter its ``kind``, ``rank``, ``alpha``, ``rank_stabilized``, ``form``, ``names``,
            ``targets`` and ``base``; None of a model.
        warnings: anything odd.
        notes: what anyckpt said of the output when it wrote this, such as what fills the vocabulary's padding rows.
        tensors: the tensors asked for, or None if none were.
        calls: names that the pickles in it ask for, those that run code first.
        likely_families: where the family is unknown, those that name all tensors as they are named here.
        sizes: where the family is unknown, what the configuration of Megatron or NeMo says of ``model`` all the same.
        learning_rates: those of the optimizers' parameter groups, each once; else what schedulers gave last.
        loss_scale: of fp16 training, or None.
        stages: of a pipeline, its chunks in the order in which data flows through them: ``pipeline_rank``,
            ``virtual_rank``, ``layers`` (stack -> indices), ``embedding`` and ``output``; None if there is no pipeline.
        tree: what each module takes, if asked for.
        part: what this process did of the reading, if another one tells what was found; ``tensors`` is None then.
    """

    path: str
    format: str
    format_version: str | None
    family: str | None
    dialect: str | None
    model: dict[str, Any] | None
    parameters: int
    size: str
    bytes: int
    tensor_count: int
    dtypes: dict[str, int]
    dtype_bytes: dict[str, int]
    layout: dict[str, int]
    step: int | None
    epoch: int | None
    consumed_samples: int | None
    states: dict[str, bool]
    artifacts: list[str]
    tokenizer: dict[str, Any] | None
    config: dict[str, Any]
    config_kind: str | None
    ignored: dict[str, str]
    objects: list[str]
    values: dict[str, Any]
    details: dict[str, Any]
    adapter: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: list[TensorFacts] | None = None
    likely_families: tuple[str, ...] = ()
    calls: tuple[Callee, ...] = ()
    sizes: dict[str, int] | None = None
    learning_rates: list[float] = field(default_factory=list)
    loss_scale: float | None = None
    stages: list[dict[str, Any]] | None = None
    tree: Module | None = None
    part: LookedAt | None = None

    @property
    def has_optimizer(self) -> bool:
        return self.states["optimizer"]

    def to_json(self) -> dict[str, Any]:
        """As ``inspect --json`` prints it."""
        if self.part is not None:
            return {"path": self.path, "format": self.format, **self.part.to_json()}
        facts = {name: getattr(self, name) for name in _IN_JSON}
        facts["likely_families"] = list(self.likely_families)
        facts["calls"] = [callee.to_json() for callee in self.calls]
        facts["stages"] = self.stages
        if self.tree is not None:
            facts["tree"] = self.tree.to_json()
        if self.tensors is not None:
            facts["tensors"] = [tensor.to_json() for tensor in self.tensors]
        return facts

    def lost(self) -> dict[str, str]:
        """What of ``ignored`` holds something; with a placeholder nothing is lost."""
        return no_weights.lost(self.ignored)

    def groups(self) -> list[TensorGroup]:
        """The listed tensors, those of alike layers together; none if none are listed."""
        listed = {tensor.name: tensor for tensor in self.tensors or ()}
        looks = {name: (tensor.dtype, tensor.shape, tensor.same_as is None) for name, tensor in listed.items()}
        return [TensorGroup(group.name, tuple(listed[name] for name in group)) for group in grouped(looks)]

    def state(self, globs: str | Sequence[str]) -> dict[str, Any]:
        """State besides tensors, as in ``values``: what has a name, or a dotted path in it, that a glob matches.

        Raises:
            UsageError: nothing is called so.
        """
        patterns = as_patterns(globs)
        found = {name: self.values[name] for name in matching(self.values, patterns)}
        if not found:
            found = {path: value for path, value in _paths(self.values) if matching([path], patterns)}
        if not found:
            raise UsageError(
                f"no state besides tensors matches {' or '.join(map(repr, patterns))}",
                path=self.path,
                expected=", ".join(list(self.values)[:_SHOWN]) or "nothing: there is none",
                remedy="list all with --objects '*'" if self.values else None,
            )
        return found

    def _repr_html_(self) -> str:
        from anyckpt.operations.explorer.notebook import of_inspection

        return of_inspection(self)


def _paths(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every part of plain data by its dotted path, a whole before its parts."""
    todo = [iter(values.items())]
    while todo:
        item = next(todo[-1], None)
        if item is None:
            todo.pop()
            continue
        path, value = item
        yield path, value
        inside: Sequence[tuple[Any, Any]] = ()
        if isinstance(value, dict):
            inside = list(value.items())
        elif isinstance(value, list):
            inside = list(enumerate(value))
        todo.append(iter([(f"{path}.{key}", part) for key, part in inside]))
