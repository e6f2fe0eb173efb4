"""What Lightning's trainer resumes from, of any checkpoint, and the file in which it is saved."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.torch_file.writer import zip_parts
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import AnyckptError, MappingError, UsageError
from anyckpt.formats import registry
from anyckpt.formats.lightning.keys import (
    HYPER_PARAMETERS,
    LR_SCHEDULERS,
    OPTIMIZER_STATES,
    STATE_DICT,
    VERSION,
)
from anyckpt.formats.lightning.write import Contents, contents
from anyckpt.operations.convert import prepared
from anyckpt.operations.options import ConvertOptions
from anyckpt.operations.steps.joining import check_whole
from anyckpt.pickling.plain import simplify, to_plain
from anyckpt.torch.from_another import Renaming, renamed, weights_as_stored
from anyckpt.torch.one_file import write_file
from anyckpt.torch.tensors import Stored, in_memory, warned
from anyckpt.views import TorchFiles

_HPARAMS_TYPE = "hparams_type"
_OLDEST = "2.0.0"


def read_trainer_state(
    path: str | os.PathLike[str],
    *,
    names: str | None = None,
    family: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    rename: Renaming | None = None,
) -> dict[str, Any]:
    """The dictionary that Lightning's trainer resumes from.

    A Lightning checkpoint, file or sharded directory, gives what is in it.  Any other gives its weights, training state
    as far as it can be translated, and a start at step 0 where it does not say more; a warning tells what is missing.
    No pickle is executed: hyper-parameters are plain data, whatever class they were of.

    Args:
        path: of any format that anyckpt reads.
        names: how to name weights that follow a known family (``hf``); as they are stored if None.
        family, config: as for ``anyckpt.convert``, where the checkpoint does not tell.
        rename: for the weights' names, after that: beginning -> what stands there in the module; see ``initialise``.

    Raises:
        FormatError: it is damaged.
        MappingError: names or shapes do not fit the family, or two weights are renamed to the same.
        UsageError: it holds objects that only executing a pickle would make.
    """
    place = os.fspath(path)
    checkpoint = registry.read(place)
    check_whole(checkpoint)
    state = weights_as_stored(checkpoint) if names is None else None
    root = _translated(checkpoint, place, names, family, config) if state is None else _weights_only(state)
    if rename is not None:
        root[STATE_DICT] = renamed(root[STATE_DICT], rename, place)
    if "loops" not in root:
        warnings.warn(
            f"{place} says nothing of a trainer: weights are loaded, and training starts at step 0", stacklevel=3
        )
    return root


def _weights_only(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "epoch": 0,
        "global_step": 0,
        VERSION: _OLDEST,
        STATE_DICT: state,
        OPTIMIZER_STATES: [],
        LR_SCHEDULERS: [],
        "callbacks": {},
    }


def _translated(
    checkpoint: Checkpoint, path: str, names: str | None, family: str | None, config: Any
) -> dict[str, Any]:
    def made(optimizer: str) -> tuple[Contents, dict[str, str]]:
        options = ConvertOptions(to="lightning", names=names, family=family, config=config, optimizer=optimizer)
        ready = prepared(checkpoint, options)
        found = contents(ready.ready, options.writing)
        return found, {**ready.steps.ignored, **found.ignored}

    try:
        found, ignored = made("keep")
    except (MappingError, UsageError) as error:
        if checkpoint.format == "lightning":
            raise
        found, ignored = made("drop")
        warnings.warn(f"{path}: its optimizer's state is left out: {error}", stacklevel=4)
    if ignored:
        warnings.warn(warned(ignored, path), stacklevel=4)
    stored = checkpoint.training
    root = dict(found.root)
    if "loops" in root and not root[OPTIMIZER_STATES] and not stored.has_optimizer:
        warnings.warn(f"{path} has no optimizer state, so the optimizer starts anew", stacklevel=4)
    root.pop(_HPARAMS_TYPE, None)
    if HYPER_PARAMETERS in root:
        root[HYPER_PARAMETERS] = to_plain(simplify(root[HYPER_PARAMETERS]))
    files = TorchFiles()
    # Optimizers keep what they are given: a mapping of a file that is written over would change under them.
    state = in_memory(root.pop(STATE_DICT), STATE_DICT, files, path)
    rest = {key: in_memory(simplify(value), key, files, path, copy=True) for key, value in root.items()}
    return {**rest, STATE_DICT: state}


def write_trainer_state(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write what ``Trainer.save_checkpoint`` saves, as the file that ``torch.save`` makes of it, durably and whole.

    Args:
        state: as Lightning's trainer gives it.
        path: the file; what is there is replaced when the new one is whole.

    Raises:
        OutputError: it cannot be written.
        UsageError: an object cannot be pickled, or a tensor has no elements in memory.
    """
    place = os.path.abspath(os.fspath(path))
    plan = trainer_plan(state, place)
    write_file(plan, place)


def trainer_plan(state: Mapping[str, Any], path: str) -> Plan:
    """The plan of what ``write_trainer_state`` writes.

    Raises:
        UsageError: an object cannot be pickled, or a tensor has no elements in memory.
    """
    try:
        root = Stored().value(dict(state))
    except AnyckptError as error:
        error.path = error.path or path
        raise
    return Plan("lightning", (OutputFile("", zip_parts(root)),))
