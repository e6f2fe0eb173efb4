"""What may be asked of saving and loading in training, in one place, under the names of several trainers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError

FORMATS = ("dcp", "megatron-core", "megatron-core-zarr", "hf", "safetensors", "torch")
"""What live state is written as; others have a place for one model's weights, or a file per rank of its own kind."""

WHOLE = ("hf", "safetensors", "torch")
"""Those of which a file has bytes of several ranks."""

STRICTNESS = (
    "assume_ok_unexpected",
    "log_unexpected",
    "log_all",
    "raise_unexpected",
    "raise_all",
    "return_unexpected",
    "return_all",
    "ignore_all",
)
"""Megatron-Core's words: *unexpected* is what the state has and the checkpoint lacks, *missing* the other way round."""

EXCHANGES = ("broadcast", "all-gather", "round-robin")
"""How ranks pass on what one of them has read: see ``passing.pass_on``."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What may be asked of ``save`` and ``load``; the defaults are what most want.

    Attributes:
        format: ``dcp``, ``megatron-core`` (torch_dist), ``megatron-core-zarr``, or one in which tensors are whole:
            ``hf``, ``safetensors``, and ``torch``, a file of ``torch.save``.
        parallel_save: ranks that have copies of the same share the writing, evenly by bytes; False: the first has to.
        parallel_optimizer: the same of an optimizer's state by itself; False: the first has to write all copies of it.
        reshardable_optimizer: save the state of an optimizer of Megatron-Core, which stands in the state itself, as
            tensors of the weights' shapes, which every layout loads; False: each rank its own buffers as they are,
            which only other numbers of data-parallel ranks load.  With ``parallel_optimizer=False`` the first
            data-parallel rank gathers the buffers and writes them.
        save_optimizer: write the optimizer's state (what is under ``optimizer``, ``optim`` and the like, or is an
            optimizer of torch's); False: leave it out.
        within: the process group in which copies are shared, as this rank's data-parallel group; all ranks if None.
        workers: threads that write, and that read, on each rank.
        asynchronous: ``save`` returns when the state is copied, with a handle in its report (see ``async_save``); a
            ``Saver`` always saves so.
        assume_constant_structure: plan the first save only; later ones of the same options in which every rank has the
            same boxes of the same tensors take its plan, and ranks are not compared.  A save of other tensors, names or
            nesting, or whose objects take another size, is planned again; with ``torch``, whose files hold objects and
            tensors together, so is one in which any object changes.
        check_objects: refuse objects that should be alike on all ranks and are not; False: the first rank's is saved.
        config: the model's configuration, for formats that have a place for it (``hf``).
        overwrite: replace what is there, when the new checkpoint is whole; nothing in an object store.
        max_shard_size: bytes per file where the format divides by size; None for its own default.
        parallel_load: every byte is read once by one rank, and passed to those that want it.
        exchange: how, one of ``EXCHANGES``: ``broadcast`` gives each box to those that load it, one box after another;
            ``all-gather`` gives everything to all, many boxes at a time; ``round-robin`` likewise, one box of each
            rank at a time.
        load_optimizer: fill the optimizer's state, as above; False: leave it as it is.
        device: where tensors go that the load makes: all of ``load(path)``, which are copied there as they are read,
            and those of sharded tensors without data; None for the files' own pages and the host's memory.
        strictness: what becomes of names that only the state or only the checkpoint has; one of ``STRICTNESS``.
        cast: take elements of another floating-point type, rounded; refused otherwise.
        verify: compare the checkpoint with its digests before anything is loaded.
        timeout: seconds that ranks wait for one that does not come; None for the process group's own.

    Raises:
        UsageError: an option has no such value.
    """

    format: str = "dcp"
    parallel_save: bool = True
    parallel_optimizer: bool = True
    reshardable_optimizer: bool = True
    save_optimizer: bool = True
    within: Any = None
    workers: int = 2
    asynchronous: bool = False
    assume_constant_structure: bool = False
    check_objects: bool = True
    config: Mapping[str, Any] | None = None
    overwrite: bool = False
    max_shard_size: int | None = None
    parallel_load: bool = False
    exchange: str = "broadcast"
    load_optimizer: bool = True
    device: Any = None
    strictness: str = "assume_ok_unexpected"
    cast: bool = False
    verify: bool = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(
                "live state is not written so",
                expected=f"one of {', '.join(FORMATS)}",
                found=repr(self.format),
                remedy="save dcp, and convert what was saved",
            )
        if self.strictness not in STRICTNESS:
            raise UsageError(
                "there is no such strictness", expected=f"one of {', '.join(STRICTNESS)}", found=self.strictness
            )
        if self.exchange not in EXCHANGES:
            raise UsageError(
                "ranks do not exchange so", expected=f"one of {', '.join(EXCHANGES)}", found=repr(self.exchange)
            )
        if self.workers < 1:
            raise UsageError("at least one worker is needed", found=self.workers)

    @classmethod
    def of(cls, settings: Mapping[str, Any], *, data_parallel_group: Any = None) -> Options:
        """Options under any of the names of ``ALIASES``, as NeMo's configurations have them; None for the default.

        Args:
            settings: name -> value.
            data_parallel_group: what ``dist_ckpt_parallel_save_within_dp`` means.

        Raises:
            UsageError: a name is unknown, two names of one option differ, or the group is needed and not given.
        """
        known = {field.name for field in fields(cls)}
        found: dict[str, Any] = {}
        for name, value in settings.items():
            if name == _MAIN_PARAMS and not value:
                continue
            own = ALIASES.get(name, name)
            if name == _MAIN_PARAMS:
                raise UsageError(
                    f"{name} asks the optimizer of Megatron-Core for another state than is loaded here",
                    remedy="load the optimizer's state, and copy its main parameters into the model",
                )
            if own not in known:
                raise UsageError(
                    f"unknown option {name!r}",
                    expected=f"one of {', '.join(sorted(known))}, or NeMo's {', '.join(sorted(ALIASES))}",
                )
            if value is None:
                continue
            value = _translated(own, value, data_parallel_group)
            if found.setdefault(own, value) != value:
                raise UsageError(f"two names of {own} have different values", found=f"{found[own]} and {value}")
        return cls(**found)

    def to_agree_on(self, names: Sequence[str], path: str | os.PathLike[str]) -> dict[str, Any]:
        """What all ranks must be asked for alike: some options, and how the checkpoint is called.

        Where it lies each rank may spell otherwise: hosts mount one file system in different places.
        """
        name = os.path.basename(os.path.abspath(path))
        return {"name of the checkpoint": name, **{one: getattr(self, one) for one in names}}


DEFAULTS = Options()


def check_agreed(asked: Sequence[Mapping[str, Any]]) -> None:
    """Refuse ranks that are asked for different things.

    Args:
        asked: of each rank, as ``to_agree_on`` gives it.

    Raises:
        UsageError: they are.
    """
    for name, first in asked[0].items():
        other = next((rank for rank, one in enumerate(asked) if one[name] != first), None)
        if other is not None:
            raise UsageError(
                f"ranks are asked for different things: {name}",
                found=f"{first} on rank 0, {asked[other][name]} on rank {other}",
                remedy="give all ranks the same path and options",
            )


ALIASES = {
    "dist_ckpt_format": "format",
    "save_ckpt_format": "format",
    "dist_ckpt_parallel_save": "parallel_save",
    "ckpt_parallel_save": "parallel_save",
    "dist_ckpt_parallel_save_within_dp": "within",
    "ckpt_parallel_save_within_dp": "within",
    "dist_ckpt_parallel_load": "parallel_load",
    "ckpt_parallel_load": "parallel_load",
    "dist_ckpt_torch_dist_multiproc": "workers",
    "ckpt_torch_dist_multiproc": "workers",
    "async_save": "asynchronous",
    "ckpt_async_save": "asynchronous",
    "dist_ckpt_assume_constant_structure": "assume_constant_structure",
    "ckpt_assume_constant_structure": "assume_constant_structure",
    "dist_ckpt_parallel_dist_opt": "parallel_optimizer",
    "ckpt_parallel_save_optim": "parallel_optimizer",
    "dist_ckpt_optim_fully_reshardable": "reshardable_optimizer",
    "ckpt_optim_fully_reshardable": "reshardable_optimizer",
    "ckpt_save_optimizer": "save_optimizer",
    "ckpt_load_optimizer": "load_optimizer",
    "dist_ckpt_load_on_device": "device",
    "ckpt_load_directly_on_device": "device",
    "exchange_algo": "exchange",
    "dist_ckpt_load_strictness": "strictness",
    "ckpt_load_strictness": "strictness",
}
"""NeMo 1's names (``dist_ckpt_*``), NeMo 2's (``ckpt_*``) and Megatron-Core's (``exchange_algo``) -> ours."""

_FORMATS = {"torch_dist": "megatron-core", "zarr": "megatron-core-zarr", "fsdp_dtensor": "dcp"}
_EXCHANGES = {"gather_object": "all-gather", "gather_rounds": "round-robin"}
_MAIN_PARAMS = "ckpt_load_main_params"


def _translated(own: str, value: Any, data_parallel_group: Any) -> Any:
    if own == "format":
        return _FORMATS.get(value, value)
    if own == "strictness":
        # NeMo 2 takes StrictHandling's members, and False for "say what differs and go on".
        return "log_all" if value is False else str(getattr(value, "value", value))
    if own == "exchange":
        return _EXCHANGES.get(value, value)
    if own == "device" and isinstance(value, bool):
        return _accelerator() if value else None
    if own == "within" and isinstance(value, bool):
        if value and data_parallel_group is None:
            raise UsageError(
                "sharing within the data-parallel group needs the group", remedy="give data_parallel_group="
            )
        return data_parallel_group if value else None
    return value


def _accelerator() -> str | None:
    """The device of this process that computes, None if that is the host."""
    import torch

    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else None
