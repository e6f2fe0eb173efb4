"""A checkpoint, opened: what every format's reader returns and every format's writer receives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field, replace
from typing import Any

from anyckpt.checkpoint.beside import AdapterSettings, ObjectForms, Part, StoredChecksum, Tokenizer
from anyckpt.checkpoint.ranks import ParallelLayout, RankShard
from anyckpt.checkpoint.training import OptimizerState, TrainingState
from anyckpt.data_classes import dataclass
from anyckpt.errors import AnyckptError, UnknownTensorError, UsageError, alike
from anyckpt.pickling.calls import Calls
from anyckpt.storage.place import LOCAL, Place
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor, Mapped, Stored

_SHOWN_TENSORS = 50  # rows of a notebook's table


@dataclass
class Checkpoint(Mapping[str, LazyTensor]):
    """A checkpoint, opened: names over bytes, and everything beside them.

    It is a mapping of its ``tensors``: ``checkpoint["lm_head.weight"]``, ``in``, ``len``, ``keys()``, ``items()``.

    Attributes:
        path: what was opened.
        format: name of the format, as in ``--to``.
        format_version: writer's version or generation as far as the files tell, or None.
        tensors: every tensor under its full stored name (shards of a distributed checkpoint joined), weights
            and training state alike, in stored order.
        dialect: naming of the weights: ``hf``, a Megatron dialect (see ``models.dialects``), or None if unknown.
        model_prefix: what precedes a weight's own name (``state_dict.`` in a Lightning checkpoint).
        state_prefixes: names that begin with one of these are training state, not weights.
        objects: non-tensor state under dotted names; plain data and inert records, nothing executed.
        config: the model's configuration as stored, as plain data.
        config_kind: spelling of ``config``: ``hf``, ``nemo1``, ``nemo2``, ``megatron-args``, ``meta``, ``trtllm``; or
            None.
        tokenizer: the tokenizer that travels with the model, or None.
        artifacts: other files: name -> contents.
        layout: parallel layout of the files.
        training: where training stood.
        warnings: anything odd that a user should know.
        unloadable: for which of these its own framework refuses to load it; ``verify`` calls that damage.
        unfinished: whether its software did not come to the end of saving it, as far as that can be told.
        ignored: stored names that carry no weights, with the reason (``_extra_state``, ``inv_freq``).
        details: format-specific facts for ``inspect``, as plain data.
        key_paths: stored name -> where it lies in the nested value that was stored, for tensors and objects of formats
            that nest; empty where names are all there is.
        original_keys: path of an item -> its key, where that is not the path's last element.
        common: names of the objects that every rank has alike, for formats that keep those apart; None if not said.
        trainer: what Lightning's trainer says besides weights and training state, which its formats write back.
        registered_order: weights are in the order in which the modules of the format's software register them.
        ranks: the ranks' shards, for formats that keep a file per rank.
        adapter: what it says of itself if it is an adapter for a base model; None if it is a model.
        quantization: how weights are quantized, in Hugging Face's words (``quantization_config``), or None.
        optimizer: finds the optimizer's state by parameter, None if there is none; raises MappingError where the
            counts or shapes in the files do not prove which parameter a state is of.
        extra_states: finds the states that modules have beside their weights (FP8 scaling) by the hub's name, None if
            there are none or they are in ``ranks``.
        holds_states: whether such states that are only read when asked for, of which ``ignored`` has the names, hold
            anything; None if the reasons there say it.
        calls: which names the pickles in its files ask for and call; pickles that are read later are added.
        place: where ``path`` is.
        attached: names of objects that are parts of a weight or of what holds weights (the class of a tensor, what
            stands beside one in a tuple): they go with it where the format stays the same.
        written_back: names of objects that the same format writes again also where training state is left out, for it
            keeps them in ``trainer`` (a Lightning checkpoint's epoch and hyper-parameters).
        forms: what the format that read it needs to write the very same objects again; of what an output does not
            keep of it a note tells.
        checksums: gives the checksums that the container keeps, for ``verify``; may read indices when called.
        part: which part of a model it is, if it is none by itself: ``inspect`` shows it and nothing else takes it.
    """

    path: str
    format: str
    tensors: dict[str, LazyTensor]
    format_version: str | None = None
    dialect: str | None = None
    model_prefix: str = ""
    state_prefixes: tuple[str, ...] = ()
    objects: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_kind: str | None = None
    tokenizer: Tokenizer | None = None
    artifacts: dict[str, ByteSource] = field(default_factory=dict)
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    training: TrainingState = field(default_factory=TrainingState)
    warnings: list[str] = field(default_factory=list)
    unloadable: list[str] = field(default_factory=list)
    unfinished: bool = False
    ignored: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    key_paths: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, repr=False)
    original_keys: Mapping[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)
    common: tuple[str, ...] | None = field(default=None, repr=False)
    trainer: Mapping[str, Any] = field(default_factory=dict, repr=False)
    registered_order: bool = False
    ranks: tuple[RankShard, ...] = ()
    quantization: Mapping[str, Any] | None = None
    optimizer: Callable[[], OptimizerState] | None = field(default=None, repr=False)
    adapter: AdapterSettings | None = None
    extra_states: Callable[[], Mapping[str, Any]] | None = field(default=None, repr=False)
    holds_states: Callable[[], bool] | None = field(default=None, repr=False)
    attached: frozenset[str] = frozenset()
    written_back: frozenset[str] = frozenset()
    forms: ObjectForms | None = field(default=None, repr=False)
    checksums: Callable[[], Iterable[StoredChecksum]] = field(default=tuple, repr=False)
    calls: Calls = field(default_factory=Calls, repr=False)
    place: Place = field(default=LOCAL, repr=False)
    part: Part | None = None

    def __getitem__(self, name: str) -> LazyTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise UnknownTensorError(
                "no tensor has this name",
                path=self.path,
                tensor=str(name),
                expected=alike(str(name), self.tensors) or "one of checkpoint.keys()",
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def state_dict(self, framework: str | None = None) -> dict[str, Any]:
        """The weights by the names that the model gives them, as ``weights()``, for ``load_state_dict`` and the like.

        Args:
            framework: ``torch`` for tensors of torch as by ``LazyTensor.torch``, of which those that share bytes in a
                file (tied weights) share memory; ``numpy`` for arrays as by ``np.asarray``; lazy tensors if None.

        Raises:
            FormatError: bytes are missing from a file.
            MissingLibraryError: torch is not installed.
            UsageError: there is no such framework, or it has no such element type.
        """
        if framework not in (None, "torch", "numpy"):
            raise UsageError("unknown framework", expected="torch or numpy", found=framework)
        weights = self.weights()
        if framework is None:
            return weights
        from anyckpt.views import TorchFiles, array_of

        files = TorchFiles() if framework == "torch" else None
        made: dict[str, Any] = {}
        for name, tensor in weights.items():
            try:
                made[name] = array_of(tensor, None, None) if files is None else files.tensor(tensor)
            except AnyckptError as error:
                error.path, error.tensor = error.path or self.path, error.tensor or name
                raise
        return made

    def weights(self) -> dict[str, LazyTensor]:
        """The model's own tensors, without ``model_prefix`` and without training state."""
        if not self.model_prefix and not self.state_prefixes:
            return dict(self.tensors)
        return {
            name[len(self.model_prefix) :]: tensor
            for name, tensor in self.tensors.items()
            if name.startswith(self.model_prefix) and not name.startswith(self.state_prefixes)
        }

    def with_weights(self, weights: dict[str, LazyTensor], **changes: Any) -> Checkpoint:
        """The same with these weights under the model's own names and no other tensors, and with other attributes."""
        return replace(self, tensors=weights, model_prefix="", state_prefixes=(), **changes)

    @property
    def parameters(self) -> int:
        """Elements of the weights; a tensor that is stored once under two names counts once."""
        seen: set[Any] = set()
        total = 0
        for tensor in self.weights().values():
            key = storage_key(tensor)
            if key is None or key not in seen:
                total += tensor.size
                seen.add(key)
        return total

    def __repr__(self) -> str:
        return (
            f"Checkpoint({self.path!r}, format={self.format!r}, {len(self.tensors)} tensors, "
            f"{self.parameters:,} parameters)"
        )

    def _repr_html_(self) -> str:
        from anyckpt.markup import notebook, table

        shown = list(self.tensors.items())[:_SHOWN_TENSORS]
        rows = [
            (name, tensor.dtype.name, str(list(tensor.shape)), f"{tensor.nbytes:,} bytes") for name, tensor in shown
        ]
        if len(self.tensors) > len(shown):
            rows.append((f"... {len(self.tensors) - len(shown):,} more", "", "", ""))
        return notebook(table(repr(self), ("name", "type", "shape", "size"), rows, numbers=(3,)))


def storage_key(tensor: LazyTensor) -> Any:
    """Equal for two tensors that are the same elements, because they are the same view of the same stored bytes.

    Tied weights are such, also after the same cast.  None for what is put together of several pieces.
    """
    if isinstance(tensor, Mapped) and len(tensor.children) == 1:
        inner = storage_key(tensor.children[0])
        return None if inner is None else (tensor.function, tensor.dtype.name, inner)
    if not isinstance(tensor, Stored):
        return None
    return (tensor.source.place(), tensor.offset, tensor.shape, tensor.strides, tensor.dtype.name)
