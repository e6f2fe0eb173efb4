"""Cutting a whole model for ranks, with its optimizer's state, as a user asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from anyckpt.checkpoint import Checkpoint, OptimizerState, ParallelLayout, RankShard
from anyckpt.config.hub_names import EMBEDDING
from anyckpt.engine.plan import Plan
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats.registry import Format, WriteOptions
from anyckpt.layout import Geometry, Parallelism, cut, parse_layout
from anyckpt.layout.division import Padding
from anyckpt.layout.from_run import args_from_parallelism, expert_spelling_from_args
from anyckpt.models import partitions
from anyckpt.operations.steps.extra_states import with_states
from anyckpt.operations.steps.joining import geometry_of, parallelism_of, run_words
from anyckpt.operations.steps.pipeline import Stepped
from anyckpt.operations.steps.renaming import Vocabulary
from anyckpt.tensor import LazyTensor

_ROWS = ("override_vocab_size", "padded_vocab_size")  # NeMo's and Megatron's words for the padded vocabulary
_FILLED: Mapping[Padding, str] = {"zeros": "zeros", "repeat-last-row": "copies of the last row"}
_ANY_SIZE = "its distributed checkpoints load at any parallel size: the layout asked for needs nothing done"


@dataclass(frozen=True)
class LayoutRequest:
    """The layout that a user asks for; None is not said.

    Attributes:
        tensor_parallel: ``--tp``.
        pipeline_parallel: ``--pp``.
        virtual_pipeline: ``--vpp``, chunks per stage.
        expert_parallel: ``--ep``.
        expert_tensor_parallel: ``--etp``.
        first_stage_layers: ``--first-stage-layers``.
        last_stage_layers: ``--last-stage-layers``.
        account_for_embedding: ``--account-for-embedding``: the embedding takes a layer's place.
        account_for_loss: ``--account-for-loss``: the output layer takes a layer's place.
        pipeline_layout: ``--pipeline-layout``, as Megatron's ``--pipeline-model-parallel-layout``.
        vocab_size: ``--vocab-size``, without padding rows.
        make_vocab_size_divisible_by: rows are padded to a multiple of this times the tensor-parallel size.
        padding: what fills new padding rows.
        rules: pattern -> partition kind, for names that the built-in table does not have.
        transformer_impl: ``--transformer-impl``: ``local`` or ``transformer_engine``, what the model that will load
            the output is built of.
        keep_extra_state: ``--keep-extra-state``: carry modules' own states.
        megatron_args: ``--no-megatron-args`` is False: ``megatron-core`` without what Megatron-LM reads besides the
            model.
    """

    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    virtual_pipeline: int | None = None
    expert_parallel: int | None = None
    expert_tensor_parallel: int | None = None
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    account_for_embedding: bool = False
    account_for_loss: bool = False
    pipeline_layout: str | None = None
    vocab_size: int | None = None
    make_vocab_size_divisible_by: int | None = None
    padding: Padding = "zeros"
    rules: Mapping[str, str] | None = None
    transformer_impl: str | None = None
    keep_extra_state: bool = False
    megatron_args: bool = True

    @property
    def vocabulary(self) -> Vocabulary:
        """What is said of the vocabulary."""
        return Vocabulary(self.vocab_size, self.make_vocab_size_divisible_by, self.padding)

    @property
    def asks_for_ranks(self) -> bool:
        """Whether any parallel size is said."""
        sizes = (
            self.tensor_parallel,
            self.pipeline_parallel,
            self.virtual_pipeline,
            self.expert_parallel,
            self.expert_tensor_parallel,
            self.first_stage_layers,
            self.last_stage_layers,
            self.pipeline_layout,
        )
        return any(size is not None for size in sizes) or self.account_for_embedding or self.account_for_loss

    def over(self, present: Parallelism) -> Parallelism:
        """The layout asked for, with what is not said taken from ``present``."""
        stages_change = any(
            value is not None
            for value in (
                self.pipeline_parallel,
                self.virtual_pipeline,
                self.first_stage_layers,
                self.last_stage_layers,
                self.pipeline_layout,
                self.account_for_embedding or None,
                self.account_for_loss or None,
            )
        )
        changed: dict[str, Any] = {}
        if stages_change:
            changed = {
                "num_layers_in_first_pipeline_stage": self.first_stage_layers,
                "num_layers_in_last_pipeline_stage": self.last_stage_layers,
                "account_for_embedding": self.account_for_embedding,
                "account_for_loss": self.account_for_loss,
                "pipeline_layout": self.pipeline_layout,
                "virtual_pipeline": self.virtual_pipeline or 1,
            }
        if self.pipeline_layout is not None:
            stages = present.pipeline_parallel if self.pipeline_parallel is None else self.pipeline_parallel
            changed["virtual_pipeline"] = self._chunks(self.pipeline_layout, stages)
        sizes = {
            "tensor_parallel": self.tensor_parallel,
            "pipeline_parallel": self.pipeline_parallel,
            "expert_parallel": self.expert_parallel,
            "expert_tensor_parallel": self.expert_tensor_parallel,
        }
        changed.update({name: size for name, size in sizes.items() if size is not None})
        if present.expert_tensor_parallel == present.tensor_parallel:
            changed.setdefault("expert_tensor_parallel", None)
        return replace(present, **changed)

    def _chunks(self, layout: str, stages: int) -> int:
        """Chunks of a stage in a pipeline layout: as many as fit, which is how Megatron-LM counts them.

        Raises:
            UsageError: other options say otherwise.
        """
        numbers = (self.first_stage_layers, self.last_stage_layers)
        if any(number is not None for number in numbers) or self.account_for_embedding or self.account_for_loss:
            raise UsageError(
                "--pipeline-layout says what each stage has, and other options say so of the first or last one",
                found=layout,
                remedy="give one of the two",
            )
        parts = len(parse_layout(layout))
        chunks = self.virtual_pipeline or max(1, parts // max(1, stages))
        if parts != stages * chunks or (stages == 1 and chunks > 1):
            virtual = f" --vpp {self.virtual_pipeline}" if self.virtual_pipeline is not None else ""
            raise UsageError(
                "--pipeline-layout and --pp do not fit one another",
                expected=f"--pp {parts}, or a part of it",
                found=f"{parts} stages in {layout!r}, and --pp {stages}{virtual}",
                remedy="give as many stages as --pp, or for virtual stages a multiple of it",
            )
        return chunks

    def described(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with the vocabulary that the user says in its configuration, where that is of ranks."""
        if checkpoint.config_kind in (None, "hf"):  # None: none, or the hyper-parameters of training code
            return checkpoint
        said = {"vocab_size": self.vocab_size, "make_vocab_size_divisible_by": self.make_vocab_size_divisible_by}
        config = {**checkpoint.config, **{name: value for name, value in said.items() if value is not None}}
        return replace(checkpoint, config=config)

    def built(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint whose arguments say what the user says of the layers."""
        if self.transformer_impl is None:
            return checkpoint
        return replace(checkpoint, config={**checkpoint.config, "transformer_impl": self.transformer_impl})


@dataclass(frozen=True)
class Aim:
    """What is to be written.

    Attributes:
        target: the format.
        options: what its writer is told.
        cut: for which ranks the files are cut, None where tensors are whole.
        notes: what a user should know of it.
    """

    target: Format
    options: WriteOptions
    cut: Parallelism | None
    notes: tuple[str, ...]

    def plan(self, ready: Checkpoint) -> Plan:
        """The files of a checkpoint that is named and cut for the target."""
        assert self.target.plan is not None  # ConvertOptions has looked
        return self.target.plan(ready, self.options)


def aim_at(stored: Checkpoint, target: Format, options: WriteOptions, request: LayoutRequest, keep: bool) -> Aim:
    """What is to be written of a checkpoint.

    Args:
        stored: the source, as it is stored.
        target: the format to write.
        options: what the user asks of the writer.
        request: the layout that the user asks for.
        keep: whether what it does not say is as the source's files have it.

    Raises:
        UsageError: a layout, kind of layers or state is asked for that the target's files cannot have.
    """
    spread = replace(options, sharded=True)
    if keep and stored.dialect == target.dialect(spread) != target.dialect(options):
        options = spread
    present = present_layout(stored) if keep else Parallelism()
    cut_for, notes = wanted_layout(request, present, target, options)
    if cut_for is not None or target.divides:
        options = replace(options, layout=sizes_of(request.over(present) if cut_for is None else cut_for))
    return Aim(target, options, cut_for, notes)


def wanted_layout(
    request: LayoutRequest, present: Parallelism, target: Format, options: WriteOptions
) -> tuple[Parallelism | None, tuple[str, ...]]:
    """For which ranks the target's files are cut, None if it keeps whole tensors, and what the user should know.

    Args:
        request: what the user says.
        present: what holds where the user says nothing.
        target: the format to write.
        options: of the writer, without ``layout``.

    Raises:
        UsageError: a layout, kind of layers or state is asked for that the target's files cannot have.
    """
    if target.config_kind != "megatron-args":
        for option, said in (
            ("--transformer-impl", request.transformer_impl is not None),
            ("--keep-extra-state", request.keep_extra_state),
        ):
            if said:
                raise UsageError(
                    f"{option} means nothing for {target.name}",
                    expected="one of Megatron's own formats, such as megatron-core or megatron-lm",
                    remedy="leave it out",
                )
    if not request.megatron_args and not target.leaves_out_arguments:
        raise UsageError(
            f"--no-megatron-args means nothing for {target.name}",
            expected="a distributed checkpoint of Megatron-Core",
            remedy="leave it out",
        )
    parallelism = request.over(present)
    parallelism.check()
    layout = sizes_of(parallelism)
    if target.dialect(options) == "hub" or (
        layout != ParallelLayout() and target.dialect(replace(options, layout=layout)) == "hub"
    ):
        return parallelism, ()
    if not request.asks_for_ranks or layout == ParallelLayout():
        return None, ()
    if target.divides and layout == ParallelLayout(tensor_parallel=layout.tensor_parallel):
        return None, ()
    if target.config_kind in (None, "hf") or target.divides:
        raise UsageError(
            f"{target.name} has no parallel layout but a tensor-parallel one"
            if target.divides
            else f"{target.name} keeps whole tensors and has no parallel layout",
            found=f"tensor, pipeline, virtual, expert {tuple(vars(layout).values())}",
            remedy=f"leave {'' if target.divides else '--tp, '}--pp, --vpp, --ep and --etp out",
        )
    return None, (_ANY_SIZE,)


def sizes_of(parallelism: Parallelism) -> ParallelLayout:
    """The sizes alone."""
    return ParallelLayout(
        parallelism.tensor_parallel,
        parallelism.pipeline_parallel,
        parallelism.virtual_pipeline,
        parallelism.expert_parallel,
    )


def present_layout(checkpoint: Checkpoint) -> Parallelism:
    """The layout that a checkpoint's files have; whole tensors if they are not of ranks."""
    return Parallelism() if checkpoint.layout == ParallelLayout() else parallelism_of(checkpoint)


def cut_for_ranks(
    checkpoint: Checkpoint,
    parallelism: Parallelism,
    *,
    rules: Mapping[str, str] | None = None,
    family: str | None = None,
    padding: Padding = "zeros",
) -> Checkpoint:
    """The checkpoint with the ranks' shards beside its tensors, ready for a format that keeps a file per rank.

    Args:
        checkpoint: global tensors under the hub's names, and Megatron's or NeMo's configuration.
        parallelism: the layout wanted.
        rules: pattern -> partition kind, for names that the built-in table does not have.
        family: the model family, where the configuration does not tell; its rules may say how a tensor is divided.
        padding: what fills new padding rows of the vocabulary; padding of optimizer state is zero.

    Raises:
        MappingError: a name that no rule covers, or a tensor that cannot be divided.
        UsageError: the layout is impossible for the model.
    """
    geometry = _target_geometry(checkpoint, parallelism)
    if parallelism.expert_parallel > 1 and geometry.num_experts is None:
        raise UsageError(
            "the model has no experts to spread",
            path=checkpoint.path,
            expected="expert parallel size 1",
            found=parallelism.expert_parallel,
            remedy="leave --ep out",
        )
    spelling = expert_spelling_from_args(run_words(checkpoint))
    divide = partial(
        cut,
        parallelism=parallelism,
        geometry=geometry,
        rules=rules,
        family=partitions(checkpoint, family=family),
        spelling=spelling,
    )
    shards: Sequence[RankShard] = divide(checkpoint.tensors, padding=padding, complete=checkpoint.adapter is None)
    optimizer = checkpoint.optimizer
    arguments = args_from_parallelism(parallelism) if checkpoint.config_kind == "megatron-args" else {}
    if checkpoint.extra_states is not None:
        shards = with_states(shards, checkpoint.extra_states(), parallelism, geometry, spelling)
    rows = _embedding_rows(shards)
    for key in _ROWS:
        if rows and checkpoint.config.get(key) is not None:
            arguments[key] = rows
    return replace(
        checkpoint,
        ranks=tuple(shards),
        layout=sizes_of(parallelism),
        config={**checkpoint.config, **arguments},
        optimizer=None if optimizer is None else partial(_cut_optimizer, optimizer, divide),
    )


def cut_as_asked(whole: Checkpoint, aim: Aim, request: LayoutRequest, family: str | None) -> Stepped:
    """The checkpoint cut for the target's ranks; as it is where tensors stay whole."""
    if aim.cut is None:
        return Stepped(whole)
    done = cut_for_ranks(whole, aim.cut, rules=request.rules, family=family, padding=request.padding)
    return Stepped(done, notes=_padding_notes(whole, done, request.padding))


def _padding_notes(whole: Checkpoint, done: Checkpoint, padding: Padding) -> tuple[str, ...]:
    """What became of the vocabulary's padding rows when a model was cut; nothing if there are none."""
    embedding, true = whole.tensors.get(EMBEDDING), whole.config.get("vocab_size")
    rows = _embedding_rows(done.ranks)
    if embedding is None or not rows:
        return ()
    stored = embedding.shape[0]
    said = []
    if type(true) is int and true < min(stored, rows):
        said.append(f"{min(stored, rows) - true} padding rows are kept as stored")
    if rows > stored:
        said.append(f"{rows - stored} new padding rows are filled with {_FILLED[padding]}")
    if rows < stored:
        said.append(f"{stored - rows} padding rows are left out")
    tokens = f"{true} tokens" if type(true) is int else "tokens of unknown number"
    return (f"the vocabulary of {tokens} has {rows} rows: {', '.join(said)}",) if said else ()


def _embedding_rows(shards: Sequence[RankShard]) -> int:
    """Of the whole embedding: one part for each tensor-parallel rank, which expert ranks and stages repeat."""
    rows = {shard.tensor_rank: shard.tensors[EMBEDDING].shape[0] for shard in shards if EMBEDDING in shard.tensors}
    return sum(rows.values())


def _cut_optimizer(
    find: Callable[[], OptimizerState], divide: Callable[[Mapping[str, LazyTensor]], list[RankShard]]
) -> OptimizerState:
    state = find()
    ranks = {slot: tuple(divide(tensors)) for slot, tensors in state.slots.items()}
    return replace(state, ranks=ranks, slots={})


def _target_geometry(checkpoint: Checkpoint, parallelism: Parallelism) -> Geometry:
    """The model's, with as many rows of vocabulary as Megatron computes for that many tensor-parallel ranks.

    Rows stay as they are for the same number of ranks, and where the true vocabulary is unknown and they divide.
    """
    geometry = geometry_of(checkpoint)
    embedding = checkpoint.tensors.get(EMBEDDING)
    rows = None if embedding is None else embedding.shape[0]
    true = checkpoint.config.get("vocab_size")
    if type(true) is int and rows is not None and true > rows:
        raise MappingError(
            "the vocabulary is larger than what is stored",
            path=checkpoint.path,
            tensor=EMBEDDING,
            expected=f"at least {true} rows",
            found=f"{rows} rows",
            remedy="give the true --vocab-size",
        )
    known = type(true) is int and rows is not None and true > 0
    same = checkpoint.layout.tensor_parallel == parallelism.tensor_parallel
    if rows is None or (same and geometry.padded_vocab_size):
        return replace(geometry, vocab_size=true) if known else geometry
    if known:
        return replace(geometry, vocab_size=true, padded_vocab_size=None)
    return replace(geometry, padded_vocab_size=None if rows % parallelism.tensor_parallel else rows)
