"""What every format's reader returns and every format's writer receives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from anyckpt.errors import AnyckptError, UnknownTensorError, UsageError, alike
from anyckpt.pickling.calls import Calls
from anyckpt.storage.place import LOCAL, Place
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor, Mapped, Stored

_SHOWN_TENSORS = 50  # rows of a notebook's table


@dataclass(frozen=True)
class ParallelLayout:
    """How the files divide the model over ranks; 1 everywhere means whole tensors."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1
    expert_parallel: int = 1


@dataclass(frozen=True)
class RankShard:
    """What one rank, and one virtual pipeline chunk of it, holds.

    Attributes:
        tensor_rank: tensor-parallel rank.
        pipeline_rank: pipeline stage.
        virtual_rank: chunk of the stage, 0 without virtual pipeline.
        expert_rank: expert-parallel rank.
        tensors: by the hub's spelling of the name, layers numbered as the rank does, from 0.
        source: the file, for messages.
        extra_states: of modules that have a state beside their weights, by the module's name and ``_extra_state``.
    """

    tensor_rank: int
    pipeline_rank: int
    virtual_rank: int
    expert_rank: int
    tensors: dict[str, LazyTensor]
    source: str
    extra_states: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingState:
    """Where training stood.

    Attributes:
        step: optimizer steps taken (Lightning's ``global_step``, Megatron's ``iteration``), or None.
        consumed_samples: samples seen, or None.
        epoch: as Lightning counts, or None.
        has_optimizer: optimizer state is present, in tensors or objects.
        has_scheduler: a learning-rate scheduler's state is present.
        has_rng: random-number-generator states are present.
    """

    step: int | None = None
    consumed_samples: int | None = None
    epoch: int | None = None
    has_optimizer: bool = False
    has_scheduler: bool = False
    has_rng: bool = False


GROUP = "group"
"""What is no state, but travels as a slot from ranks to the whole model: which group a parameter is in."""


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's state by parameter, whatever container it came from.

    A slot is ``master`` (the weights in float32) or what the optimizer calls it: Adam's ``exp_avg`` and
    ``exp_avg_sq``, ``momentum_buffer``, ``square_avg``, ``sum``.  Its tensors have the weights' names and shapes, and
    are joined, cut and renamed by the weights' rules.

    Attributes:
        slots: slot -> weight's name -> tensor, for a whole model.
        others: slot -> weight's name -> what has not the weight's shape: a number, Adafactor's row and column means,
            steps that differ.  No rule says what becomes of them, so that they travel only where the weight keeps its
            name and shape.
        ranks: slot -> the ranks' shards, for formats that keep a file per rank; then ``slots`` is empty.  The slot
            ``GROUP``, where there is one, has in every element the index of the parameter's group.
        step: optimizer steps taken, or None.
        groups: hyperparameters of the parameter groups as stored, without ``params``.
        group_of: weight's name -> index in ``groups``, where the container says or counts prove it; empty where only
            the weights' names and shapes tell.
        order: names of the parameters in the framework that numbers them, in its order; kept as they are whatever
            the weights are called meanwhile.  Empty where the state never was by number.
        grad_scaler: state of the loss scaler of fp16 training as stored, or None.
        warnings: copies on several ranks that differ.
    """

    slots: Mapping[str, dict[str, LazyTensor]] = field(default_factory=dict)
    others: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    ranks: Mapping[str, tuple[RankShard, ...]] = field(default_factory=dict)
    step: int | None = None
    groups: tuple[dict[str, Any], ...] = ()
    group_of: Mapping[str, int] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    grad_scaler: Any = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptimizerForm:
    """How a format keeps an optimizer's state; a reader of the form gives it as ``Checkpoint.optimizer``.

    Attributes:
        name: state stays as it is stored between formats with forms of one name.
        write: gets the weights under the format's names and the state under the same names, and gives the checkpoint
            that ``Format.plan`` lays out: with the state among tensors and objects, or as ``Checkpoint.optimizer``.
            Raises MappingError for state that has no place.  None if state can only stay as it is stored.
        adam_only: it has a place for Adam's state only.
    """

    name: str
    write: Callable[[Checkpoint, OptimizerState], Checkpoint] | None = None
    adam_only: bool = False


@dataclass(frozen=True)
class AdapterSettings:
    """What an adapter (LoRA, DoRA) says of itself beside its tensors.

    Attributes:
        kind: ``lora`` or ``dora``.
        rank: of its updates, None if not said.
        alpha: updates are multiplied by alpha over their rank; None if not said.
        rank_stabilized: alpha is divided by the rank's square root instead (rsLoRA).
        ranks: pattern of module names -> another rank; patterns are regular expressions of the end of a name.
        alphas: pattern of module names -> another alpha.
        dropout: during training.
        targets: modules that it adapts, in the words of its writer.
        base: name or path of the model that it was trained on, None if not said.
        fan_in_fan_out: weights that it adapts are (in, out), as Conv1D of transformers has them.
        token_indices: pattern of module names -> the rows of it that are trained and stored one by one; the pattern is
            empty where there is one such module.
    """

    kind: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    rank_stabilized: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    base: str | None = None
    fan_in_fan_out: bool = False
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer's files and how to call it; never loaded.

    Attributes:
        library: ``sentencepiece`` or ``huggingface``, or whatever the checkpoint says.
        files: file name -> contents.  For ``sentencepiece`` one file is the model; for ``huggingface`` the files
            of the folder that ``AutoTokenizer.from_pretrained`` takes.
        model_file: name in ``files`` of the sentencepiece model, or None.
        settings: what the checkpoint says besides (special tokens, chat template, legacy), spelled as NeMo does.
        hub_name: name on the Hugging Face hub if the checkpoint only names it, or None.
    """

    library: str
    files: Mapping[str, ByteSource] = field(default_factory=dict)
    model_file: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    hub_name: str | None = None


@dataclass(frozen=True)
class StoredChecksum:
    """A checksum that a container keeps of some of its bytes.

    Attributes:
        name: what the bytes are, for messages.
        source: the bytes.
        crc32: their CRC-32 as stored.
    """

    name: str
    source: ByteSource
    crc32: int


class CompositeTensor(ABC):
    """A tensor of several parts (quantized, sparse, nested): an object whose parts are tensors of their own.

    The parts of an object ``w`` are among a checkpoint's tensors, as ``w.int_repr`` and so on.
    """

    @abstractmethod
    def part_tensors(self) -> dict[str, LazyTensor]:
        """The tensors that it consists of, by the part's name."""

    @abstractmethod
    def companions(self) -> dict[str, LazyTensor]:
        """What else it consists of (a scale, a shape), as tensors by name, for formats that hold nothing else.

        Raises:
            UsageError: tensors alone do not tell what it is.
        """


class ObjectForms(ABC):
    """What a file of objects says of them besides elements, types, shapes and names.

    These are kinds of containers and tensors, strides, storages that are shared.  Only the format that read them can
    write them; the others can tell what they do not keep.
    """

    @abstractmethod
    def described(self) -> dict[str, str]:
        """All that is odd, in words by name or dotted path, so that copies can be compared."""

    @abstractmethod
    def particulars(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """What a table of elements, types and shapes by name does not say, by a tensor's name or a container's.

        Each is of a kind, and some have a detail: ``("strides", "(1, 3)")``.
        """

    @abstractmethod
    def holds(self, container: str, tensors: Iterable[str]) -> bool:
        """Whether a container, by its name among the particulars, holds one of these tensors."""


@dataclass(frozen=True)
class Part:
    """What a checkpoint is that holds only a part of each tensor, or of the model.

    Attributes:
        what: which part, as a message says it: "is the part of rank 1 of 2 ...".
        remedy: what to open in its place.
    """

    what: str
    remedy: str


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
        config_kind: spelling of ``config``: ``hf``, ``nemo1``, ``nemo2``, ``megatron-args`` or None.
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
    layout: ParallelLayout = ParallelLayout()
    training: TrainingState = TrainingState()
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
        return {
            name[len(self.model_prefix) :]: tensor
            for name, tensor in self.tensors.items()
            if name.startswith(self.model_prefix) and not name.startswith(self.state_prefixes or ("\0",))
        }

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
        from anyckpt.escaping import html_table

        shown = list(self.tensors.items())[:_SHOWN_TENSORS]
        rows = [
            (name, tensor.dtype.name, str(list(tensor.shape)), f"{tensor.nbytes:,} bytes") for name, tensor in shown
        ]
        if len(self.tensors) > len(shown):
            rows.append((f"... {len(self.tensors) - len(shown):,} more", "", "", ""))
        return html_table(repr(self), ("name", "type", "shape", "size"), rows)


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
