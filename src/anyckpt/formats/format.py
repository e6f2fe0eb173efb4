"""What a format is, and what a user asks of one that writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from anyckpt.checkpoint import Checkpoint, OptimizerForm, ParallelLayout
from anyckpt.data_classes import dataclass
from anyckpt.engine.plan import Plan
from anyckpt.storage.location import Location

if TYPE_CHECKING:
    from anyckpt.containers.dcp.chunks import Held


@dataclass(frozen=True)
class WriteOptions:
    """What a user asked of a writer.

    Attributes:
        max_shard_size: bytes per weight file where the format shards by size (``hf``); None for its default.
        sharded: ``nemo``, ``lightning``: write a distributed checkpoint instead of one flat file; ``hf``: files by
            rank.
        ranks: how many files a distributed checkpoint is spread over.
        layout: for which ranks ``Checkpoint.ranks`` is cut, None if it is not.
        transformer_impl: Megatron's formats: ``local`` or ``transformer_engine``, what the model that will load it is
            built of; None for what the source tells.
        held: which boxes of each tensor the processes have that write together, None if all is one process's to write.
            Distributed checkpoints are divided into chunks and files so, and a format of Megatron's keeps names as they
            are and adds no states of modules: the processes have what there is.
        compress: formats with ``Format.archives``: pack all in one archive, rather than write a directory.
        backend: formats with ``Format.backends``: which of them the distributed checkpoint inside is of; None for the
            first.
        tensor_type: formats with ``Format.tensor_types``: which of them matrices are stored in; their own if None.
        megatron_args: formats with ``Format.leaves_out_arguments``: write what Megatron-LM reads besides the model.
        megatron_version: formats with ``Format.by_release``: the release of Megatron-Core that loads it,
            as (0, 19); None for what most releases load.
        megatron_model: Megatron's formats: ``gpt`` or ``hybrid``, which of its models is written; None for the
            source's.
    """

    max_shard_size: int | None = None
    sharded: bool = False
    ranks: int = 1
    layout: ParallelLayout | None = None
    transformer_impl: str | None = None
    compress: bool = False
    backend: str | None = None
    megatron_args: bool = True
    megatron_version: tuple[int, int] | None = None
    megatron_model: str | None = None
    held: Held | None = None
    tensor_type: str | None = None


@dataclass(frozen=True)
class Format:
    """How a checkpoint lies on disk.

    Attributes:
        name: as in ``--to``.
        title: one line for people.
        detect: whether a location holds this format, at the price of a few small reads; formats are asked in the
            registry's order, most specific first.
        read: opens a location; reads indices and configuration, no tensor data.
        plan: lays a checkpoint out in files; tensors already have the names of ``dialect``.  None if read-only.
        dialect: how this format names weights: ``hf``, a Megatron dialect, or None if any names do.  A function of
            the options, because a ``.nemo`` names them one way flat and another sharded.
        config_kind: spelling of the configuration that ``plan`` expects in ``Checkpoint.config``, or None.
        unknown_names: whether weights of no known naming are written under their own, if the source has a
            configuration: the format is not of one kind of model only.
        sharded: whether it can hold a distributed checkpoint, as ``WriteOptions.sharded`` asks.
        adapters: how it names the tensors of an adapter: ``peft`` or as ``models.adapters.megatron.SPELLINGS``; None
            if it has no place for what an adapter says of itself.
        divides: sizes of ``WriteOptions.layout`` by which ``plan`` itself divides whole tensors into files; none if it
            does not.
        archives: whether ``plan`` can pack its files in one archive, as ``WriteOptions.compress`` asks.
        packs: whether what ``plan`` writes is one archive in any case.
        suffixes: how the names of its files and folders end, where that tells the format; the usual one first.
        archive_suffixes: the same of its archives.
        backends: what kinds of distributed checkpoint ``plan`` can put inside, the usual one first; none if it has no
            choice.
        tensor_types: types of its own that ``plan`` can store matrices in; none if it has those of numbers alone.
        in_fp32: globs of weights that its software has in float32 whatever the others are cast to.
        leaves_out_arguments: whether ``plan`` can leave out what Megatron-LM reads besides the model, as
            ``WriteOptions.megatron_args`` says.
        by_release: whether ``plan`` writes as the release of Megatron-Core does that ``WriteOptions.megatron_version``
            names.
        quantizes: forms of ``quantization.forms`` in which it holds quantized weights, the usual ones first; none if it
            says nothing of how they are quantized.
        optimizer: how it keeps an optimizer's state, None if it has no place for it.
        library: what the Hub calls the software that loads it, for a model card; None if no one does, or several.
    """

    name: str
    title: str
    detect: Callable[[Location], bool]
    read: Callable[[Location], Checkpoint]
    plan: Callable[[Checkpoint, WriteOptions], Plan] | None = None
    dialect: Callable[[WriteOptions], str | None] = field(default=lambda options: None)
    config_kind: str | None = None
    unknown_names: bool = False
    sharded: bool = False
    adapters: str | None = None
    divides: tuple[str, ...] = ()
    archives: bool = False
    packs: bool = False
    suffixes: tuple[str, ...] = ()
    archive_suffixes: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    tensor_types: tuple[str, ...] = ()
    in_fp32: tuple[str, ...] = ()
    leaves_out_arguments: bool = False
    by_release: bool = False
    quantizes: tuple[str, ...] = ()
    optimizer: OptimizerForm | None = None
    library: str | None = None


def deferred(module: str, name: str) -> Callable[..., Any]:
    """A function that is imported when it is called: what only detects should not wait for what reads and writes.

    Args:
        module: full name of the module.
        name: of the function in it.
    """

    def call(*arguments: Any) -> Any:
        return getattr(import_module(module), name)(*arguments)

    return call
