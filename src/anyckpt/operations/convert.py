"""Converting a checkpoint: read, choose, rename, cast, lay out, write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.engine.execute import DEFAULT_MEMORY
from anyckpt.engine.plan import Plan, SourceData, describe
from anyckpt.errors import AnyckptError, IncompleteError, MappingError, UsageError
from anyckpt.formats import registry
from anyckpt.layout import Parallelism
from anyckpt.operations.steps.account import forms_not_kept, nothing_to_write, unaccounted
from anyckpt.operations.steps.adapters import AdapterRequest, opened_adapter, rename_adapter
from anyckpt.operations.steps.casts import KEEP_IN_FP32, ChangedType, cast_target, cast_weights
from anyckpt.operations.steps.choosing import choose, renamed_choice, renumbered
from anyckpt.operations.steps.cutting import (
    LayoutRequest,
    cut_for_ranks,
    padding_notes,
    present_layout,
    sizes_of,
    wanted_layout,
)
from anyckpt.operations.steps.destination import check_destination
from anyckpt.operations.steps.extra_states import choose_states, is_kept
from anyckpt.operations.steps.file_sizes import above_limit
from anyckpt.operations.steps.full_precision import in_full_precision
from anyckpt.operations.steps.globs import as_patterns
from anyckpt.operations.steps.joining import join_ranks
from anyckpt.operations.steps.optimizer_state import Carried, carry_optimizer, moves_state
from anyckpt.operations.steps.renaming import Vocabulary, rename_for
from anyckpt.operations.steps.threads import Progress
from anyckpt.operations.steps.unwrap import HOW_TO_MERGE, adapter_inside, holds_adapter, merged_inside
from anyckpt.operations.steps.user_files import read_config, read_tokenizer
from anyckpt.operations.steps.writing import parse_share, write
from anyckpt.storage.place import look_at
from anyckpt.tensor import LazyTensor
from anyckpt.units import parse_bytes

_STATE = "state besides the weights; --optimizer keep carries it where the target can hold it"


@dataclass(frozen=True)
class Conversion:
    """What a conversion did, or with ``dry_run`` would do.

    Attributes:
        output: the path that now holds the output.
        format: its format.
        tensors: tensors written.
        bytes_read: bytes read from the source's files; 0 in a dry run.
        bytes_written: size of the output's files; in a dry run what it would be.
        seconds: wall time of reading and writing; 0 in a dry run.
        peak_rss_bytes: the process's largest resident set so far; 0 in a dry run.
        ignored: source names that the output leaves out -> reason.
        casts: "float32 -> bfloat16" -> number of tensors.
        notes: what a user should know about the output.
        files: its files, as ``path``, ``bytes`` and ``tensors``.
        resumed_bytes: bytes that an interrupted run had written before.
        dry_run: nothing was written.
        share: ``I/N`` if this was the work of one process among several, whose bytes and seconds these are; or None.
        missing_shares: those that are not written yet, so that the output is not there.
    """

    output: str
    format: str
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_rss_bytes: int
    ignored: dict[str, str] = field(default_factory=dict)
    casts: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: tuple[dict[str, Any], ...] = ()
    resumed_bytes: int = 0
    dry_run: bool = False
    share: str | None = None
    missing_shares: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As ``convert --json`` prints it; a dry run lists the files."""
        facts: dict[str, Any] = {
            "output": self.output, "format": self.format, "tensors": self.tensors, "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written, "seconds": self.seconds, "peak_rss_bytes": self.peak_rss_bytes,
            "ignored": [{"name": name, "reason": reason} for name, reason in self.ignored.items()],
            "casts": self.casts, "notes": list(self.notes), "resumed_bytes": self.resumed_bytes,
            "dry_run": self.dry_run, "share": self.share, "missing_shares": list(self.missing_shares),
        }  # fmt: skip
        if self.dry_run:
            facts["files"] = list(self.files)
        return facts


def convert(
    source: str | os.PathLike[str] | Checkpoint,
    destination: str | os.PathLike[str],
    *,
    to: str,
    family: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    names: str | None = None,
    adapter_form: str | None = None,
    alpha: float | None = None,
    dtype: str | None = None,
    keep_in_fp32: Sequence[str] = KEEP_IN_FP32,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    max_shard_size: int | str | None = None,
    sharded: bool = False,
    optimizer: str = "drop",
    layout: LayoutRequest | None = None,
    keep_layout: bool = False,
    force: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    share: str | None = None,
    workers: int | None = None,
    memory: int | str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    sources: Sequence[str | os.PathLike[str]] | None = None,
    made_of: Sequence[Checkpoint] | None = None,
) -> Conversion:
    """Write the checkpoint at ``source`` in another format, bit for bit unless a cast is asked for.

    Weights are renamed, fused, split and padded by the rules of the model family if source and target name them
    differently; where the target takes any names, they keep their own.

    Args:
        source: what to read; its format is detected.  Or a checkpoint that is open.
        destination: what to write; it appears only when it is whole.
        to: name of the target format, such as ``hf`` or ``nemo``.
        family: the model family, where the checkpoint does not tell.
        config: the model's configuration (Hugging Face, NeMo or Megatron), as a file, the folder of a model that has
            it, or a dictionary, where the checkpoint has none; of an adapter, its base model's.
        tokenizer: a sentencepiece model or a folder of Hugging Face tokenizer files to send along.
        names: ``hf`` or one of ``models.dialects.DIALECTS``: how to name weights where the target takes any names.
        adapter_form: of an adapter: ``canonical``, an update per Hugging Face module, or ``fused``, one per fused
            weight of Megatron, at a higher rank; as the source has it if None.
        alpha: of an adapter: updates are multiplied by it over their rank; what the adapter says if None.
        dtype: ``bf16``, ``fp16`` or ``fp32``: cast floating-point weights, and dequantize quantized ones.
        keep_in_fp32: globs of weights that a cast leaves alone.
        include: glob or globs of the source's weight names; others are left out.  A glob that matches no weight chooses
            what is stored beside them, such as an averaged copy, to be written as the weights.
        exclude: glob or globs of weight names to leave out.
        max_shard_size: bytes per weight file, or a text such as ``5GB``, where the target shards by size.
        sharded: ``nemo``, ``lightning``: write a distributed checkpoint in place of a flat file.
        optimizer: ``drop``, or ``keep`` to carry training state: as it is stored where weights keep their names
            and the target has the source's form, else by parameter, through the same rules as the weights.
        layout: parallel sizes and vocabulary of the target, where it keeps a file per rank.
        keep_layout: take what ``layout`` does not say from the source's files rather than leave tensors whole.
        force: read a source that is marked as unfinished, too.
        overwrite: replace an existing checkpoint at the end.
        resume: continue what an interrupted run of the same conversion left.
        share: ``I/N``: do the I-th of N parts of the writing, which as many processes do; the last one publishes.
        workers: threads.
        memory: bytes for blocks in flight, or a text such as ``512MB``.
        dry_run: plan, and write nothing.
        progress: called with (bytes done, bytes in all) from any thread.
        sources: every path that an open checkpoint reads, if that is more than its own.
        made_of: what an open checkpoint was made of, whose tensors all are accounted for; itself if None.

    Raises:
        FormatError: the source is damaged.
        MappingError: names, shapes or configuration do not fit the model family, or the model is incomplete.
        OutputError: the destination exists or cannot be written.
        UsageError: the options contradict each other, or no rule leads from this source to this target.
    """
    output = os.fspath(destination)
    origins = [os.fspath(path) for path in ([_path(source)] if sources is None else sources)]
    target = registry.by_name(to)
    if target.plan is None:
        raise UsageError(f"{to} can be read but not written")
    if sharded and not target.sharded:
        raise UsageError(f"--sharded means nothing for {to}", remedy="leave it out, or convert to nemo or lightning")
    if optimizer not in ("keep", "drop"):
        raise UsageError("unknown value for optimizer", expected="keep or drop", found=optimizer)
    options = registry.WriteOptions(
        max_shard_size=None if max_shard_size is None else parse_bytes(max_shard_size, "--max-shard-size"),
        sharded=sharded,
        transformer_impl=None if layout is None else layout.transformer_impl,
        megatron_args=layout is None or layout.megatron_args,
    )
    part = parse_share(share)
    budget = DEFAULT_MEMORY if memory is None else parse_bytes(memory, "--memory")
    check_destination(output, origins, overwrite=overwrite, resume=resume or share is not None)

    request = LayoutRequest() if layout is None else layout
    opened = source if isinstance(source, Checkpoint) else registry.read(source, force=force)
    stored = request.described(opened)
    spread = replace(options, sharded=True)
    if keep_layout and stored.dialect == target.dialect(spread) != target.dialect(options):
        options = spread
    present = present_layout(stored) if keep_layout else Parallelism()
    cut, layout_notes = wanted_layout(request, present, target, options)
    if cut is not None or target.divides:
        options = replace(options, layout=sizes_of(request.over(present) if cut is None else cut))
    whole = join_ranks(stored, rules=request.rules, family=family)
    checkpoint, left_out = choose(whole, as_patterns(include), as_patterns(exclude), keep_state=optimizer == "keep")
    apart = {name: t for name, t in whole.weights().items() if whole.model_prefix + name in left_out}
    if optimizer == "drop" and not checkpoint.weights():
        raise nothing_to_write(whole)
    given = read_config(config)
    if apart and optimizer == "drop":
        checkpoint, layer_numbers = renumbered(checkpoint, apart, given)
        layout_notes += tuple(layer_numbers)
    checkpoint, state_notes = choose_states(checkpoint, keep=request.keep_extra_state)
    if optimizer == "drop":
        again = target.name == opened.format
        checkpoint, dropped = _without_state(checkpoint, _attached(checkpoint, left_out) if again else ())
        written_back = checkpoint.written_back if again else frozenset()
        left_out.update((name, reason) for name, reason in dropped.items() if name not in written_back)
    if tokenizer is not None:
        checkpoint = replace(checkpoint, tokenizer=read_tokenizer(os.fspath(tokenizer)))
    wanted = cast_target(dtype)
    full = in_full_precision(checkpoint, wanted, given)
    checkpoint, given = full.checkpoint, full.config
    left_out.update(full.ignored)
    inside: list[str] = []
    if holds_adapter(checkpoint):
        if optimizer == "keep":
            raise UsageError("the optimizer's state is that of an adapter's factors", path=checkpoint.path,
                             remedy="leave the state out with --optimizer drop")  # fmt: skip
        if target.adapters == target.name:
            checkpoint, unused = adapter_inside(checkpoint, alpha)
            left_out.update(unused)
            alpha = None
        elif alpha is not None or names is not None or target.dialect(options) is not None:
            checkpoint, unused, inside = merged_inside(checkpoint, alpha, ChangedType(wanted, keep_in_fp32))
            left_out.update(unused)
            alpha = None
        else:
            inside = [f"a LoRA adapter is in it beside the weights, and stays so: {HOW_TO_MERGE}"]
    told = AdapterRequest(adapter_form, alpha)
    adapter = opened_adapter(checkpoint, told, target=target, names=names, optimizer=optimizer)
    try:
        if adapter is not None:
            renamed = rename_adapter(
                checkpoint, adapter, target, options, told, family=family, config=given, dtype=wanted
            )  # fmt: skip
        else:
            rename = partial(
                rename_for, target=target, options=options, family=family, config=given, dtype=wanted, names=names,
                vocabulary=request.vocabulary,
            )  # fmt: skip
            try:
                renamed = rename(checkpoint)
            except IncompleteError as error:
                needs_whole = None if target.dialect(options) is None else target.name
                renamed = renamed_choice(error, checkpoint, apart, rename, needs_whole)
    except AnyckptError as error:
        if isinstance(error, MappingError) or error.tensor is not None:
            error.path = error.path or checkpoint.path
        raise
    if renamed.computed and optimizer == "keep":
        raise UsageError(
            "weights are computed on the way, and the optimizer's moments do not go with them", path=checkpoint.path,
            remedy="leave the state out with --optimizer drop",
        )  # fmt: skip
    cast = cast_weights(renamed.checkpoint.weights(), wanted, keep_in_fp32)
    ready = request.built(_with_cast(renamed.checkpoint, cast.tensors))
    carried = Carried(ready)
    if optimizer == "keep" and moves_state(checkpoint, renamed.checkpoint, target, cut is not None):
        rename_state = partial(_renamed_tensors, checkpoint, target, options, family, given, names, request.vocabulary)
        if cut is None and request.expert_parallel is not None:
            ready = replace(ready, layout=replace(ready.layout, expert_parallel=request.expert_parallel))
        carried = carry_optimizer(checkpoint, ready, target, rename_state)
        ready = carried.checkpoint
    elif apart and optimizer == "keep" and checkpoint.training.has_optimizer:
        state_notes = (
            *state_notes,
            f"{len(apart)} weights are left out, and the optimizer's state is kept as it is, of all weights: it fits "
            "only a model that has the others too",
        )
    if cut is not None:
        uncut = ready
        ready = cut_for_ranks(uncut, cut, rules=request.rules, family=family, padding=request.padding)
        layout_notes += padding_notes(uncut, ready, request.padding)
    laid_out = target.plan(ready, options)
    if not (laid_out.tensors() or _named_only(ready, laid_out) or ready.objects.keys() - laid_out.ignored.keys()):
        raise nothing_to_write(whole)
    plan = replace(
        laid_out,
        ignored={
            **checkpoint.ignored,
            **left_out,
            **{name: reason for name, reason in renamed.ignored.items() if name not in carried.moved},
            **carried.ignored,
            **_unused_files(checkpoint, laid_out),
            **laid_out.ignored,
        },
        casts={**cast.casts, **full.casts},
        notes=(
            *checkpoint.warnings,
            *layout_notes,
            *state_notes,
            *full.notes,
            *inside,
            *renamed.notes,
            *carried.notes,
            *cast.notes,
            *laid_out.notes,
        ),
    )
    lost = unaccounted(made_of or [whole], plan)
    lost = {name: reason for name, reason in lost.items() if name not in carried.moved}
    plan = replace(plan, ignored={**plan.ignored, **lost})
    plan = replace(plan, notes=(*plan.notes, *forms_not_kept(made_of or [whole], plan)))
    if checkpoint.extra_states is not None:
        plan = replace(plan, ignored={name: reason for name, reason in plan.ignored.items() if not is_kept(name)})
    files = tuple(describe(plan)["files"])
    if options.max_shard_size is not None:
        plan = replace(plan, notes=(*plan.notes, *above_limit(plan, options.max_shard_size)))
    if dry_run:
        count = len({part.name for part in plan.tensors()})
        done = Conversion(output, plan.format, count, 0, plan.nbytes, 0.0, 0, dry_run=True)
    else:
        report = write(
            plan, output, share=part, overwrite=overwrite, resume=resume, workers=workers, memory=budget,
            progress=progress, source_paths=[file for path in origins if (file := look_at(path).on_disk) is not None],
        )  # fmt: skip
        done = Conversion(**report)
    return replace(done, ignored=dict(plan.ignored), casts=dict(plan.casts), notes=plan.notes, files=files)


def _path(source: str | os.PathLike[str] | Checkpoint) -> str | os.PathLike[str]:
    return source.path if isinstance(source, Checkpoint) else source


def _renamed_tensors(
    checkpoint: Checkpoint,
    target: registry.Format,
    options: registry.WriteOptions,
    family: str | None,
    config: dict[str, Any] | None,
    names: str | None,
    vocabulary: Vocabulary,
    tensors: dict[str, LazyTensor],
) -> dict[str, LazyTensor]:
    """What becomes of tensors that have the names and shapes of the checkpoint's weights."""
    bare = replace(checkpoint, tensors=tensors, model_prefix="", state_prefixes=(), objects={}, optimizer=None)
    renamed = rename_for(bare, target, options, family=family, config=config, names=names, vocabulary=vocabulary)
    return renamed.checkpoint.tensors


def _attached(checkpoint: Checkpoint, left_out: Iterable[str]) -> list[str]:
    """What is attached to weights but to those alone that are left out: in the innermost thing that holds any."""
    kept, gone = _holders(checkpoint.tensors), _holders(left_out)

    def stays(name: str) -> bool:
        parents = [name[:end] for end, letter in enumerate(name) if letter == "."]
        holder = next((parent for parent in reversed(parents) if parent in kept or parent in gone), None)
        return holder is None or holder in kept

    return [name for name in checkpoint.attached if stays(name)]


def _holders(names: Iterable[str]) -> set[str]:
    """Every beginning of the names that ends before a dot."""
    return {name[:end] for name in names for end, letter in enumerate(name) if letter == "."}


def _without_state(checkpoint: Checkpoint, attached: Iterable[str]) -> tuple[Checkpoint, dict[str, str]]:
    """The weights alone under their own names, and what else there was.

    A weight of several parts (sparse, quantized) is an object besides its tensors, and stays, and so does what is
    attached to weights.
    """
    weights, prefix = checkpoint.weights(), checkpoint.model_prefix
    wholes = _holders(weights)
    wholes |= {name[len(prefix) :] for name in attached if name.startswith(prefix)}
    composite = {name: checkpoint.objects[prefix + name] for name in wholes if prefix + name in checkpoint.objects}
    stored = {prefix + name for name in (*weights, *composite)}
    dropped = {name: _STATE for name in (*checkpoint.tensors, *checkpoint.objects) if name not in stored}
    if checkpoint.optimizer is not None:
        dropped.setdefault("optimizer", _STATE)
    training = replace(checkpoint.training, has_optimizer=False, has_scheduler=False, has_rng=False)
    bare = replace(
        checkpoint, tensors=weights, model_prefix="", state_prefixes=(), objects=composite, training=training,
        optimizer=None,
    )  # fmt: skip
    return bare, dropped


def _named_only(checkpoint: Checkpoint, plan: Plan) -> bool:
    """Whether there are weights without elements, of which a container may hold the name and no bytes."""
    weights = checkpoint.weights()
    return any(not weights[name].nbytes for name in weights.keys() - plan.ignored.keys())


def _unused_files(checkpoint: Checkpoint, plan: Plan) -> dict[str, str]:
    """Artifacts and tokenizer files that no part of the plan copies."""
    files = {**checkpoint.artifacts, **(checkpoint.tokenizer.files if checkpoint.tokenizer is not None else {})}
    used = {id(part.source) for file in plan.files for part in file.parts if isinstance(part, SourceData)}
    return {name: f"a {plan.format} checkpoint has no place for it" for name, s in files.items() if id(s) not in used}


def _with_cast(checkpoint: Checkpoint, weights: dict[str, LazyTensor]) -> Checkpoint:
    prefix = checkpoint.model_prefix
    changed = {prefix + name: tensor for name, tensor in weights.items()}
    return replace(checkpoint, tensors={**checkpoint.tensors, **changed})
