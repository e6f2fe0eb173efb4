"""Saying what is in a checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from anyckpt.checkpoint import Checkpoint, Tokenizer
from anyckpt.config import of_ranks
from anyckpt.engine.manifest import read_manifest
from anyckpt.errors import FormatError, LastingError, MappingError, UsageError
from anyckpt.formats import registry
from anyckpt.formats.shared.no_weights import why_ignored
from anyckpt.operations.inspection import Inspection, TensorFacts
from anyckpt.operations.steps.globs import as_patterns
from anyckpt.operations.steps.loader_calls import asked_of_loaders
from anyckpt.operations.steps.looking import Asked, Looking, looking
from anyckpt.operations.steps.threads import Progress
from anyckpt.operations.steps.training_facts import learning_rates, loss_scale
from anyckpt.operations.tensor_facts import by_dtype, facts_of
from anyckpt.pickling.plain import to_plain
from anyckpt.tensor import LazyTensor
from anyckpt.units import size_label

if TYPE_CHECKING:
    from anyckpt.layout.pipeline import Chunk
    from anyckpt.models import Model
    from anyckpt.operations.steps.module_tree import Module

_MODEL_FIELDS = tuple(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size
    padded_vocab_size share_embeddings_and_output_weights max_position_embeddings num_moe_experts moe_router_topk
    hybrid_override_pattern mamba_num_heads mamba_head_dim multi_latent_attention encoder_num_layers num_tokentypes
    patch_dim img_h img_w num_mel_bins subsampling_factor prediction_hidden_size prediction_num_layers durations
    left_context lookaheads num_prompts
    text_num_layers text_ffn_hidden_size text_num_attention_heads
    """.split()
)


def inspect(
    source: str | os.PathLike[str] | Checkpoint,
    *,
    tensors: str | Sequence[str] | None = None,
    stats: bool = False,
    digest: bool = False,
    names: str = "stored",
    tree: bool = False,
    magnitudes: bool = False,
    progress: Progress | None = None,
    share: str | None = None,
    wait: float | None = None,
    records: str | os.PathLike[str] | None = None,
    engine: str | None = None,
) -> Inspection:
    """Say what is in a checkpoint; no tensor data is read unless ``stats`` or ``digest`` ask for it.

    Args:
        source: a path, or a checkpoint that is open.
        tensors: glob or globs of tensors to list; all of them if None and ``stats``, ``digest`` or hub names are
            asked for.
        stats: compute statistics of the listed tensors.
        digest: compute the SHA-256 of the listed tensors.
        names: ``stored``, or ``hub`` for Megatron-Core names with shards joined and layers un-stacked.
        tree: tell what each module of the listed tensors takes, of all if ``tensors`` is None.
        magnitudes: with ``stats``, also count the listed tensors' elements by magnitude.
        progress: called with (bytes done, bytes to do) while tensors are read.
        share: ``I/N``: read the I-th of N parts, as many processes do; one of them returns the whole, for the others
            ``part`` says what they did.  ``auto``: which one ``torchrun``, ``srun`` or ``mpirun`` says.
        wait: with ``share``: the first one waits for the others, until nothing was seen of them for so many seconds,
            and returns the whole; 600 with ``auto``.  Otherwise the last one does.
        records: with ``share``: a folder that all processes see, in which they find one another.
        engine: ``ray``: the nodes of a Ray cluster, which see what is read under the same paths, read it.

    Raises:
        FormatError: the checkpoint is damaged, or none.
        MappingError: hub names are asked for and the model is incomplete.
        OutputError: with ``share``, records of other work are in the folder, or other shares do not come.
        UsageError: hub names are asked for and the family is unknown, a glob matches nothing, or there is nothing to
            share out.
    """
    if names not in ("stored", "hub"):
        raise UsageError("unknown kind of names", expected="stored or hub", found=names)
    for option, value in (("--share", share), ("--engine", engine)):
        if value is not None:
            check_shared(option, stats=stats, digest=digest)
    options = {"tensors": as_patterns(tensors), "stats": stats, "digest": digest, "names": names, "tree": tree}
    options["magnitudes"] = magnitudes
    path = source.path if isinstance(source, Checkpoint) else source
    with looking("inspect", [path], options, Asked(share, wait, records, engine), progress) as work:
        return _inspect(source, tensors, stats, digest, names, tree, magnitudes, progress, work)


def check_shared(option: str, *, stats: bool, digest: bool) -> None:
    """Raise UsageError if nothing is read that several processes could divide, as an option asks."""
    if not (stats or digest):
        raise UsageError("there is nothing to share out", remedy=f"leave out {option}, or ask for --stats or --digest")


def _inspect(
    source: str | os.PathLike[str] | Checkpoint,
    tensors: str | Sequence[str] | None,
    stats: bool,
    digest: bool,
    names: str,
    tree: bool,
    magnitudes: bool,
    progress: Progress | None,
    work: Looking,
) -> Inspection:
    stored = source if isinstance(source, Checkpoint) else registry.read(source)
    checkpoint = _joined(stored)
    numbers = _as_numbers(checkpoint)
    model, warning = _identify(numbers)
    listed = None
    globs = as_patterns(tensors)
    if globs or stats or digest or tree or names == "hub":
        chosen = _hub_names(numbers, model, warning) if names == "hub" else checkpoint.tensors
        listed = facts_of(checkpoint.path, chosen, globs, stats, digest, magnitudes, progress, work)
    parameters = numbers.parameters
    calls = asked_of_loaders(checkpoint)
    counts, sizes = by_dtype(checkpoint.tensors)
    training = checkpoint.training
    weights = {checkpoint.model_prefix + name for name in checkpoint.weights()}
    state = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in weights}
    return Inspection(
        path=checkpoint.path,
        format=checkpoint.format,
        format_version=checkpoint.format_version,
        family=None if model is None else model.family,
        dialect=checkpoint.dialect,
        model=None if model is None else {name: getattr(model.config, name) for name in _MODEL_FIELDS},
        parameters=parameters,
        size=size_label(parameters),
        bytes=sum(sizes.values()),
        tensor_count=len(checkpoint.tensors),
        dtypes=counts,
        dtype_bytes=sizes,
        layout=asdict(checkpoint.layout),
        step=_count(training.step),
        epoch=_count(training.epoch),
        consumed_samples=_count(training.consumed_samples),
        states={
            "optimizer": training.has_optimizer,
            "scheduler": training.has_scheduler,
            "rng": training.has_rng,
        },
        artifacts=list(checkpoint.artifacts),
        tokenizer=_tokenizer_facts(checkpoint.tokenizer),
        config=to_plain(checkpoint.config),
        config_kind=checkpoint.config_kind,
        ignored=why_ignored(checkpoint.ignored, checkpoint.holds_states),
        objects=list(checkpoint.objects),
        values=to_plain(checkpoint.objects),
        details=to_plain(checkpoint.details),
        adapter=_adapter(checkpoint),
        warnings=[*_part(checkpoint), *calls.told_with(checkpoint.warnings), *([] if warning is None else [warning])],
        notes=[*_notes(checkpoint), *_modules(checkpoint)],
        tensors=listed,
        likely_families=_likely(checkpoint) if model is None else (),
        calls=tuple(calls),
        sizes=_sizes(stored) if model is None else None,
        learning_rates=learning_rates(checkpoint.objects, state),
        loss_scale=loss_scale(checkpoint.objects, state),
        stages=_stages(stored),
        tree=_tree(listed) if tree and listed is not None else None,
        part=work.part,
    )


def _sizes(checkpoint: Checkpoint) -> dict[str, int] | None:
    """What a configuration says of a model of whatever family; None if its kind does not say so."""
    if checkpoint.config_kind not in of_ranks.KINDS:
        return None
    try:
        told = of_ranks.sizes(checkpoint.config, checkpoint.config_kind)
    except LastingError:  # what is not possible in it is told elsewhere
        return None
    return {name: told[name] for name in _MODEL_FIELDS if type(told.get(name)) is int}


def _stages(checkpoint: Checkpoint) -> list[dict[str, Any]] | None:
    """The stages of a pipeline; None if there is none, or none is known."""
    if checkpoint.layout.pipeline_parallel == 1:
        return None
    from anyckpt.operations.steps.stages import stages_of

    return [_stage(chunk) for chunk in stages_of(checkpoint)] or None


def _stage(chunk: Chunk) -> dict[str, Any]:
    return {
        "pipeline_rank": chunk.pipeline_rank,
        "virtual_rank": chunk.virtual_rank,
        "layers": {stack: list(layers) for stack, layers in chunk.layers.items() if layers},
        "embedding": chunk.embedding,
        "output": chunk.output,
    }


def _tree(listed: Iterable[TensorFacts]) -> Module:
    """What each module of the listed tensors takes; a tensor that is another's counts nothing."""
    from anyckpt.operations.steps.module_tree import Leaf, module_tree

    def leaf(tensor: TensorFacts) -> Leaf:
        look = f"{tensor.dtype} {list(tensor.shape)}"
        if tensor.same_as is not None:
            return Leaf(tensor.name, f"{look} (as {tensor.same_as})", 0, 0)
        return Leaf(tensor.name, look, math.prod(tensor.shape), tensor.nbytes)

    return module_tree(map(leaf, listed))


def _part(checkpoint: Checkpoint) -> list[str]:
    part = checkpoint.part
    return [] if part is None else [f"{part.what}; {part.remedy}"]


def _as_numbers(checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.quantization is None:
        return checkpoint
    from anyckpt.operations.steps.full_precision import seen_in_full_precision

    return seen_in_full_precision(checkpoint)


def _obstacle(checkpoint: Checkpoint) -> MappingError | None:
    from anyckpt.operations.steps.full_precision import obstacle

    return obstacle(checkpoint)


def _adapter(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What an adapter says of itself, None of a model."""
    named = checkpoint.adapter is not None or checkpoint.dialect == "peft"
    parts = ("lora", ".adapter", ":up", "hada_", "lokr_", "trainable_tokens_")
    if not named and not any(part in name for name in checkpoint.weights() for part in parts):
        return None  # no name of an adapter's is without one of these
    from anyckpt.operations.steps.adapter_inside import facts_inside
    from anyckpt.operations.steps.adapters import facts

    try:
        return facts(checkpoint) or facts_inside(checkpoint)
    except MappingError:  # two adapters in one model
        return None


def _notes(checkpoint: Checkpoint) -> list[str]:
    """Those of the manifest, if there is a sound one."""
    try:
        manifest = read_manifest(checkpoint.path, checkpoint.place)
    except FormatError:
        return []
    return [] if manifest is None else list(manifest.notes)


def _modules(checkpoint: Checkpoint) -> list[str]:
    """What a model of several consists of, where that is known."""
    prefix = f"{checkpoint.model_prefix}perception."
    if not any(name.startswith(prefix) for name in checkpoint.tensors):
        return []
    from anyckpt.operations.steps.model_module import told_of_modules

    return told_of_modules(checkpoint)


def _likely(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Families whose rules explain all names; none if some tensor is of no rule."""
    from anyckpt.models.recognise import resemblance

    nearest = resemblance(checkpoint.weights())
    return () if nearest is None or nearest.strange else nearest.families


def _joined(checkpoint: Checkpoint) -> Checkpoint:
    """With the ranks' shards joined; as stored, with a warning, if they do not make up a model."""
    if not checkpoint.ranks:
        return checkpoint
    from anyckpt.operations.steps.joining import join_ranks

    try:
        return join_ranks(checkpoint, verify_replicas=False)
    except (MappingError, UsageError) as error:
        told = f"tensors are listed as the ranks hold them, for they cannot be joined: {error}"
        return replace(checkpoint, warnings=[*checkpoint.warnings, told])


def _identify(checkpoint: Checkpoint) -> tuple[Model | None, str | None]:
    """The model, or None and why a family that seems known is not."""
    if checkpoint.config_kind is None:
        return None, None
    from anyckpt.operations.steps.naming import identify

    try:
        return identify(checkpoint), None
    except LastingError as error:
        return None, f"the model family cannot be told: {_obstacle(checkpoint) or error}"


def _hub_names(checkpoint: Checkpoint, model: Model | None, why: str | None) -> dict[str, LazyTensor]:
    if model is None:
        raise UsageError(
            "the model family is unknown, so its tensors have no hub names" + (f": {why}" if why else ""),
            path=checkpoint.path,
            remedy="list them with --names stored",
        )
    from anyckpt import models

    return models.to_hub(checkpoint, model).tensors


def _count(value: int | None) -> int | None:
    """A counter from a file; None instead of a number that no training reaches and no JSON reader takes."""
    return value if value is not None and abs(value) < 1 << 63 else None


def _tokenizer_facts(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    return {"library": tokenizer.library, "files": list(tokenizer.files), "hub_name": tokenizer.hub_name}
