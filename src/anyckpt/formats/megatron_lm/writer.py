"""Laying out a Megatron-LM checkpoint of one file per rank, as core 0.16 writes it with ``--ckpt-format torch``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from anyckpt.checkpoint import Checkpoint, ParallelLayout, RankShard
from anyckpt.config.hub_names import EMBEDDING
from anyckpt.containers.torch_file import zip_parts
from anyckpt.engine.plan import OutputFile, Plan, small_file
from anyckpt.errors import UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.megatron_lm.location import MODEL_FILE
from anyckpt.formats.megatron_lm.ranks import folder_name
from anyckpt.formats.shared.megatron_arguments import pickled_arguments
from anyckpt.formats.shared.random_states import place_name, random_states
from anyckpt.formats.shared.tracker import TRACKER
from anyckpt.models.dialects.rank_names import part_norms
from anyckpt.models.dialects.registration import with_extra_states
from anyckpt.optimizer.original_groups import original_groups
from anyckpt.optimizer.write_by_rank import OptimizerWriter
from anyckpt.pickling import Record
from anyckpt.pickling.torch_objects import namespace, ordered_dict

_VERSION = 3.0
_KEPT = ("opt_param_scheduler", "num_floating_point_operations_so_far")
_OF_ONE_PROCESS = ("rank", "local_rank", "model_parallel_size")
"""What is only true of the process that saved the file, and an old name of the tensor-parallel size."""
_ALONE = {
    "expert_tensor_parallel_size": 1,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "pipeline_model_parallel_layout": None,
}
"""What a layout of one rank makes of arguments that describe another."""
_TOKENIZERS = {"huggingface": "HuggingFaceTokenizer", "sentencepiece": "GPTSentencePieceTokenizer"}
_OPTIMIZER_OBJECTS = ("/optimizer", "/distrib_optim")
_NOT_CARRIED = "is not carried to another layout"


def plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    """Tracker file, iteration directory, and a file per rank.

    The ranks are ``checkpoint.ranks``, or one that holds everything if there are none.  The directory is that of
    the training step if there is one, else ``release``.  Names are in the spelling of ``transformer_impl`` in the
    configuration: ``local``, or Transformer Engine's, which is also the default.  ``objects`` gives the arguments
    that the configuration was read from, the state of the scheduler, and, if the layout has the same rank folders,
    random states.  The optimizer's state, where there is one, is laid out as Megatron's optimizer without
    distribution keeps it.

    Raises:
        MappingError: a parameter has no optimizer state, or one of another shape.
        UsageError: ranks outside the checkpoint's layout, or an object that cannot be pickled.
    """
    layout = checkpoint.layout if checkpoint.ranks else ParallelLayout()
    shards = checkpoint.ranks or (RankShard(0, 0, 0, 0, checkpoint.tensors, checkpoint.path),)
    files = _by_file(shards, layout)
    state = checkpoint.optimizer() if checkpoint.optimizer is not None and checkpoint.training.has_optimizer else None
    step = checkpoint.training.step or (state.step if state is not None else None) or 0
    local = checkpoint.config_kind == "megatron-args" and checkpoint.config.get("transformer_impl") == "local"
    apart = layout.expert_parallel > 1
    optimizer = None if state is None else OptimizerWriter(state, shards, checkpoint.config, local=local, apart=apart)
    kept = {key: checkpoint.objects[key] for key in _KEPT if key in checkpoint.objects}
    random = _random_states(checkpoint, files)
    common = {
        "args": _arguments(checkpoint, layout, shards, step),
        "checkpoint_version": _VERSION,
        "iteration": step,
        **({} if state is None else original_groups(state)),
    }
    iteration = f"iter_{step:07d}" if step else "release"
    outputs = []
    for folder, chunks in files.items():
        own = {} if optimizer is None else {"optimizer": optimizer.rank([chunks[number] for number in sorted(chunks)])}
        states = {"rng_state": checkpoint.objects[random[folder]]} if random else {}
        contents = {**common, **_models(chunks, layout, local), **own, **kept, **states}
        outputs.append(_rank_file(f"{iteration}/{folder}", folder, contents))
    written = {*common, *kept, *random.values()}
    left = [name for name in checkpoint.objects if name not in written]
    return Plan(
        "megatron-lm",
        (*outputs, small_file(TRACKER, str(step) if step else "release", stage=2)),
        ignored={
            **checkpoint.ignored,
            **{name: _NOT_CARRIED for name in left if optimizer is None or not name.endswith(_OPTIMIZER_OBJECTS)},
        },
        notes=(
            *_notes(step, optimizer is not None, bool(random)),
            *_of_the_optimizer(checkpoint, optimizer is not None),
        ),
    )


def _notes(step: int, optimizer: bool, random: bool) -> tuple[str, ...]:
    """How Megatron-LM must be told to load what is there."""
    missing = [name for name, there in (("--no-load-optim", optimizer), ("--no-load-rng", random)) if not there]
    if not step or not missing:
        return ()
    return (f"load it with {' '.join(missing)}" + ("" if optimizer else ", or --finetune"),)


def _of_the_optimizer(checkpoint: Checkpoint, written: bool) -> tuple[str, ...]:
    """What a run must know whose optimizer was distributed: this format's state is of the one that is not."""
    if not written or checkpoint.config.get("use_distributed_optimizer") is not True:
        return ()
    return (
        "its optimizer's state is for runs without --use-distributed-optimizer; megatron-core's is for those with it",
    )


def _by_file(shards: Sequence[RankShard], layout: ParallelLayout) -> dict[str, dict[int, RankShard]]:
    """Rank folder -> chunk -> shard.

    Raises:
        UsageError: a shard is outside the layout or there twice.
    """
    files: dict[str, dict[int, RankShard]] = {}
    for shard in sorted(shards, key=lambda s: (s.tensor_rank, s.pipeline_rank, s.expert_rank, s.virtual_rank)):
        at = shard.place
        sizes = (layout.tensor_parallel, layout.pipeline_parallel, layout.virtual_pipeline, layout.expert_parallel)
        folder = folder_name(
            shard.tensor_rank,
            shard.pipeline_rank if layout.pipeline_parallel > 1 else None,
            shard.expert_rank if layout.expert_parallel > 1 else None,
        )
        chunks = files.setdefault(folder, {})
        if any(not 0 <= number < size for number, size in zip(at, sizes, strict=True)) or shard.virtual_rank in chunks:
            raise UsageError(
                "a rank lies outside the layout or is there twice",
                expected=f"tensor, pipeline, virtual, expert below {sizes}",
                found=at,
            )
        chunks[shard.virtual_rank] = shard
    return files


def _models(chunks: Mapping[int, RankShard], layout: ParallelLayout, local: bool) -> dict[str, Any]:
    """``model``, or ``model0`` and following; Megatron leaves a chunk without tensors out."""
    models: dict[str, Any] = {}
    for number, shard in chunks.items():
        tensors = part_norms(shard.tensors) if local else shard.tensors
        key = f"model{number}" if layout.virtual_pipeline > 1 else "model"
        if tensors or key == "model":
            models[key] = ordered_dict({**dict(with_extra_states(tensors)), **shard.extra_states})
    return models


def _rank_file(path: str, folder: str, contents: Mapping[str, Any]) -> OutputFile:
    name = MODEL_FILE.removesuffix(".pt")
    parts = zip_parts(dict(contents), archive_name=name, tensor_name=partial(_tensor_name, folder))
    return OutputFile(f"{path}/{MODEL_FILE}", parts)


def _tensor_name(folder: str, path: tuple[Any, ...]) -> str:
    return f"{folder}/" + ".".join(map(str, path))


def _random_states(checkpoint: Checkpoint, files: Mapping[str, Mapping[int, RankShard]]) -> dict[str, str]:
    """The object that is each folder's random state: all or none, since a state belongs to its place in the layout."""
    layout = checkpoint.layout if checkpoint.ranks else ParallelLayout()
    stored = random_states(checkpoint.objects, layout)
    found: dict[str, str] = {}
    for folder, chunks in files.items():
        shard = next(iter(chunks.values()))
        name = place_name(shard.tensor_rank, shard.pipeline_rank, shard.expert_rank, layout)
        if name in stored and isinstance(checkpoint.objects[stored[name]], list):
            found[folder] = stored[name]
    return found if found.keys() == files.keys() else {}


def _arguments(checkpoint: Checkpoint, layout: ParallelLayout, shards: Sequence[RankShard], step: int) -> Record:
    """The ``args``: the stored ones with what the configuration changes or adds, and the layout."""
    config = checkpoint.config if checkpoint.config_kind == "megatron-args" else {}
    fields = pickled_arguments(checkpoint.objects.get("args"), config)
    for gone in _OF_ONE_PROCESS:
        fields.pop(gone, None)
    if not checkpoint.ranks:
        fields.update({key: value for key, value in _ALONE.items() if key in fields})
    fields.update(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        expert_model_parallel_size=layout.expert_parallel,
        iteration=step,
        ckpt_format="torch",
        use_dist_ckpt=False,
    )
    rows = next((shard.tensors[EMBEDDING].shape[0] for shard in shards if EMBEDDING in shard.tensors), None)
    if rows is not None:
        fields["padded_vocab_size"] = rows * layout.tensor_parallel
    if checkpoint.training.consumed_samples is not None:
        fields.setdefault("consumed_train_samples", checkpoint.training.consumed_samples)
    if "position_embedding_type" in fields:
        fields.setdefault("add_position_embedding", fields["position_embedding_type"] == "learned_absolute")
    if checkpoint.tokenizer is not None and checkpoint.tokenizer.library in _TOKENIZERS:
        fields.setdefault("tokenizer_type", _TOKENIZERS[checkpoint.tokenizer.library])
    return namespace(fields)
