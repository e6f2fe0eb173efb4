"""Converting a checkpoint: read, choose, rename, cast, lay out, write."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.data_classes import dataclass
from anyckpt.engine.plan import Plan, describe
from anyckpt.errors import AnyckptError, IncompleteError, MappingError, UsageError
from anyckpt.formats import registry
from anyckpt.formats.shared.no_weights import lost
from anyckpt.operations.chosen_parts import chosen_parts
from anyckpt.operations.keywords import ConvertWords, taking
from anyckpt.operations.options import ConvertOptions
from anyckpt.operations.steps.account import accounted, names_alone, nothing_to_write
from anyckpt.operations.steps.adapter_inside import holds_adapter, without_adapter
from anyckpt.operations.steps.adapters import AdapterRequest, opened_adapter, rename_adapter
from anyckpt.operations.steps.aim import Aim, aim_at
from anyckpt.operations.steps.carried_codes import carries, seen_as_numbers, type_beside, with_codes
from anyckpt.operations.steps.casts import ChangedType, cast_checkpoint
from anyckpt.operations.steps.choosing import renamed_choice
from anyckpt.operations.steps.cutting import cut_as_asked
from anyckpt.operations.steps.destination import check_destination, told_by_name
from anyckpt.operations.steps.extra_states import choose_states
from anyckpt.operations.steps.full_precision import in_full_precision
from anyckpt.operations.steps.joining import join_ranks
from anyckpt.operations.steps.model_ids import check_agreement
from anyckpt.operations.steps.naming import Naming
from anyckpt.operations.steps.one_head import is_hybrid, one_head
from anyckpt.operations.steps.pipeline import Pipeline, Stepped
from anyckpt.operations.steps.renaming import Renamed, rename_for
from anyckpt.operations.steps.training_state import without_state
from anyckpt.operations.steps.user_files import read_tokenizer
from anyckpt.operations.steps.user_names import Called, called, new_name
from anyckpt.operations.steps.writing import Said, write
from anyckpt.storage.location import disk_file_of, public_path
from anyckpt.tensor import LazyTensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from anyckpt.operations.steps.quantizing import Quantized


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
        quantization: what quantizing did to every weight, as ``--report`` writes it; None if no report was asked for.
        holds_states: see ``Checkpoint.holds_states`` of the source.
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
    quantization: dict[str, Any] | None = None
    holds_states: Callable[[], bool] | None = field(default=None, repr=False, compare=False)

    def lost(self) -> dict[str, str]:
        """What of ``ignored`` holds something; with a placeholder of the source nothing is lost.

        Where only the source's files tell which are placeholders, some are read.

        Raises:
            FormatError: one is damaged.
        """
        return lost(self.ignored, self.holds_states)

    def to_json(self) -> dict[str, Any]:
        """As ``convert --json`` prints it; a dry run lists the files."""
        told = {"ignored": [{"name": name, "reason": reason} for name, reason in self.ignored.items()]}
        facts = {**vars(self), **told, "notes": list(self.notes), "missing_shares": list(self.missing_shares)}
        files, _ = facts.pop("files"), facts.pop("holds_states")
        return {**facts, "files": list(files)} if self.dry_run else facts

    def _repr_html_(self) -> str:
        from anyckpt.operations.explorer.notebook import of_conversion

        return of_conversion(self)


@taking(ConvertWords)
def convert(
    source: str | os.PathLike[str] | Checkpoint,
    destination: str | os.PathLike[str],
    *,
    to: str | None = None,
    compress: bool | None = None,
    sources: Sequence[str | os.PathLike[str]] | None = None,
    **others: Unpack[ConvertWords],
) -> Conversion:
    """Write the checkpoint at ``source`` in another format, bit for bit unless a cast is asked for.

    Weights are renamed, fused, split and padded by the rules of the model family if source and target name them
    differently; where the target takes any names, they keep their own.

    Args:
        source: what to read; its format is detected.  Or a checkpoint that is open.
        destination: what to write; it appears only when it is whole.
        to: name of the target format, such as ``hf`` or ``nemo``; if None, what the end of the destination's name
            tells, such as ``.nemo`` or ``.safetensors``.
        sources: every path that an open checkpoint reads, if that is more than its own.

    Raises:
        FormatError: the source is damaged.
        MappingError: names, shapes or configuration do not fit the model family, or the model is incomplete.
        OutputError: the destination exists or cannot be written.
        UsageError: the options contradict each other, or no rule leads from this source to this target.
    """
    told: dict[str, Any] = told_by_name(destination) if to is None else {"to": to}
    if compress is not None:
        told["compress"] = compress
    return converted(source, destination, ConvertOptions(**told, **others), sources=sources)


def converted(
    source: str | os.PathLike[str] | Checkpoint,
    destination: str | os.PathLike[str],
    options: ConvertOptions,
    *,
    sources: Sequence[str | os.PathLike[str]] | None = None,
    made_of: Sequence[Checkpoint] | None = None,
) -> Conversion:
    """What ``convert`` does, with its options as one value.

    Args:
        source: what to read, or a checkpoint that is open.
        destination: what to write.
        options: what the user asks for.
        sources: every path that an open checkpoint reads, if that is more than its own.
        made_of: what an open checkpoint was made of, whose tensors all are accounted for; itself if None.
    """
    output = os.fspath(destination)
    origins = [public_path(path) for path in ([_path(source)] if sources is None else sources)]
    origins += [public_path(put.path) for put in options.puts]
    resumes = options.resume or options.share is not None or options.engine is not None
    check_destination(output, origins, overwrite=options.overwrite, resume=resumes, anywhere=True)
    opened = source if isinstance(source, Checkpoint) else registry.read(source, force=options.force)
    made = prepared(opened, options)
    plan = _planned(made, made_of)
    if options.dry_run:
        count = len({part.name for part in plan.tensors()})
        done = Conversion(output, plan.format, count, 0, plan.nbytes, 0.0, 0, dry_run=True)
    else:
        from anyckpt.operations.steps.model_card import card_of

        on_disk = [file for path in origins if (file := disk_file_of(path)) is not None]
        report = write(
            plan,
            output,
            share=options.part,
            wait=options.patience,
            engine=options.engine,
            gzip=options.gzip,
            overwrite=options.overwrite,
            resume=options.resume,
            workers=options.workers,
            memory=options.budget,
            progress=options.progress,
            source_paths=on_disk,
            said=Said(
                options.private,
                options.commit_message,
                card_of(plan, made_of or [opened], quantized=options.quantize),
            ),
        )
        done = Conversion(**report)
    files = tuple(describe(plan)["files"])
    if options.report is not None and made.quantized is not None and not done.missing_shares:
        assert options.quantization is not None
        from anyckpt.operations.steps.quantization_report import report_on, write_report

        measured = report_on(made.quantized, options.quantization, options.workers)
        write_report(measured, options.report)
        done = replace(done, quantization=measured.to_json())
    return replace(
        done,
        ignored=dict(plan.ignored),
        casts=dict(plan.casts),
        notes=(*plan.notes, *done.notes, *((_UNCOMPRESSED,) if options.dry_run and options.gzip else ())),
        files=files,
        holds_states=opened.holds_states,
    )


_UNCOMPRESSED = "sizes are those before --gzip, of which no more is known until the file is written"


def _path(source: str | os.PathLike[str] | Checkpoint) -> str | os.PathLike[str]:
    return source.path if isinstance(source, Checkpoint) else source


@dataclass(frozen=True)
class Prepared:
    """A conversion as far as it is the same whatever the checkpoint is made into: files, or state in memory.

    Attributes:
        ready: the checkpoint as the target's ``plan`` takes it.
        aim: what the target is.
        steps: what was left out, noted and cast on the way.
        source: what the target's names were given to.
        whole: the source with the tensors of all ranks.
        quantized: what quantizing did; None if it was not asked for.
    """

    ready: Checkpoint
    aim: Aim
    steps: Pipeline
    source: Checkpoint
    whole: Checkpoint
    quantized: Quantized | None


def planned(opened: Checkpoint, options: ConvertOptions, made_of: Sequence[Checkpoint] | None = None) -> Plan:
    """The plan of a conversion: the source taken through the steps, laid out in files, and accounted for.

    Args:
        opened: the source, as it is stored.
        options: what the user asks for.
        made_of: what the source was made of, whose tensors all are accounted for; itself if None.
    """
    return _planned(prepared(opened, options), made_of)


def _planned(made: Prepared, made_of: Sequence[Checkpoint] | None) -> Plan:
    plan = made.aim.plan(made.ready)
    if not (plan.tensors() or names_alone(made.ready, plan) or made.ready.objects.keys() - plan.ignored.keys()):
        raise nothing_to_write(made.whole)
    return accounted(plan, made.source, made.steps, made_of or [made.whole], made.aim.options.max_shard_size)


def prepared(opened: Checkpoint, options: ConvertOptions) -> Prepared:
    """The source taken through the steps, under the target's names.

    Args:
        opened: the source, as it is stored.
        options: what the user asks for.
    """
    request, steps, put = options.request, Pipeline(), None
    if options.puts:
        from anyckpt.operations.put_modules import with_modules_put

        put = with_modules_put(opened, options.puts, options)
        opened = steps.take(put)
    if options.module is not None:
        from anyckpt.operations.steps.model_module import alone

        taken = alone(opened, options.module, options)
        opened, options = steps.take(taken), taken.options
    if options.family is not None and is_hybrid(opened.config):
        opened = steps.take(one_head(opened, options.family))
    if options.model_id is not None and options.given is not None:
        check_agreement(opened, options.given, os.fspath(options.model_id))
    stored = request.described(opened)
    aim = aim_at(stored, options.target, options.writing, request, options.keep_layout)
    steps.notes += aim.notes
    whole = join_ranks(stored, rules=request.rules, family=options.family)
    adapter = AdapterRequest(options.adapter_form, options.alpha)
    parts = chosen_parts(whole, options, aim, steps)
    if put is not None:
        put.check_taken(whole, steps.ignored.keys())
    chosen, options = parts.checkpoint, parts.options
    naming = Naming(
        aim.target,
        aim.options,
        options.family,
        options.plain_config,
        options.cast_to,
        options.names,
        request.vocabulary,
        options.experts,
    )
    chosen = steps.take(choose_states(chosen, keep=request.keep_extra_state))
    if not options.keeps_state:
        chosen = steps.take(without_state(chosen, steps.ignored, aim.target.name))
    if options.tokenizer is not None:
        chosen = replace(
            chosen, tokenizer=read_tokenizer(os.fspath(options.tokenizer), options.tokenizer_library, steps.notes)
        )
    keeps_codes = options.quantization is None and carries(chosen, aim.target, options.cast_to)
    if keeps_codes:
        source = steps.take(seen_as_numbers(chosen, type_beside(chosen)))
    else:
        source = steps.take(in_full_precision(chosen, options.cast_to, options.given))
    given: Called | None = None
    if holds_adapter(source):
        cast = ChangedType(options.cast_to, options.keep_in_fp32)
        if options.renames and not keeps_codes:  # so that what is then said of modules has the names asked for
            given = called(source, options.renames)
            source = steps.take(Stepped(given.checkpoint, notes=given.notes))
            options = replace(options, rename=None)
        apart = without_adapter(source, naming, adapter, cast, keep_state=options.keeps_state)
        source = steps.take(apart if given is None else replace(apart, ignored=given.ignored(apart.ignored)))
        adapter = replace(adapter, alpha=None)
    if options.renames:
        source, renamed = _called_as_asked(source, naming, adapter, parts.unwanted, options)
    else:
        renamed = _under_target_names(source, naming, adapter, parts.unwanted, options.optimizer)
        renamed = renamed if given is None else replace(renamed, ignored=given.ignored(renamed.ignored))
    uncast = steps.take(renamed)
    ready = steps.take(cast_checkpoint(uncast, options.cast_to, options.kept_in_fp32))
    if keeps_codes:
        ready = steps.take(with_codes(ready, renamed.renaming, chosen, source))
    quantized = None
    if options.quantization is not None:
        from anyckpt.operations.steps.quantizing import quantize_checkpoint

        calibration = None
        if options.quantization.statistics is not None:
            from anyckpt.operations.steps.calibrating import calibration_of

            hub = under_hub_names(opened, options)
            calibration = calibration_of(hub, ready, naming, options.quantization)
        quantized = quantize_checkpoint(ready, options.quantization, uncast, calibration)
        ready = steps.take(quantized)
    ready = request.built(ready)
    if options.keeps_state:
        from anyckpt.operations.steps.carried_state import with_state

        ready = steps.take(with_state(source, ready, renamed.renaming, aim, request, len(parts.unwanted)))
    ready = steps.take(cut_as_asked(ready, aim, request, options.family))
    return Prepared(ready, aim, steps, source, whole, quantized)


def _called_as_asked(
    source: Checkpoint,
    naming: Naming,
    request: AdapterRequest,
    unwanted: Mapping[str, LazyTensor],
    options: ConvertOptions,
) -> tuple[Checkpoint, Renamed]:
    """What the user's names are given to, then the target's; and the source, with the names by which its state goes."""
    given = called(source, options.renames)
    others = {new_name(name, source.model_prefix, options.renames): tensor for name, tensor in unwanted.items()}
    renamed = _under_target_names(given.checkpoint, naming, request, others, options.optimizer)
    form = naming.target.optimizer
    if options.keeps_state and (form is None or form.write is None) and given.keeps_state(source):
        return given.checkpoint, replace(renamed, notes=(*given.notes, *renamed.notes))
    return source, given.told(renamed, source)


def under_hub_names(opened: Checkpoint, options: ConvertOptions) -> Checkpoint:
    """The model under Hugging Face's names, in the types of the source, as calibration sees it.

    Args:
        opened: the source, as it is stored.
        options: what the user asks of writing it elsewhere.
    """
    return prepared(opened, options.for_hub(quantized=opened.quantization is not None)).ready


def _under_target_names(
    source: Checkpoint, naming: Naming, request: AdapterRequest, unwanted: Mapping[str, LazyTensor], optimizer: str
) -> Renamed:
    """The adapter or the model that the source is, under the names that the target gives it."""
    adapter = opened_adapter(source, request, target=naming.target, names=naming.names, optimizer=optimizer)
    try:
        if adapter is not None and naming.options.megatron_model is not None:
            raise UsageError(
                "is an adapter, whose layers are numbered as its base model's",
                path=source.path,
                remedy="leave --megatron-model out",
            )
        if adapter is not None:
            return rename_adapter(source, adapter, naming, request)
        try:
            return rename_for(source, naming)
        except IncompleteError as error:
            return renamed_choice(error, source, unwanted, naming)
    except AnyckptError as error:
        if isinstance(error, MappingError) or error.tensor is not None:
            error.path = error.path or source.path
        raise
