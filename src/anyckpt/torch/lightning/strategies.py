"""Lightning's strategy for FSDP2 and tensor parallelism, resuming from any checkpoint at any world size."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy as _Base
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType

from anyckpt.engine.files import sync_directory, write_error
from anyckpt.engine.manifest import beside
from anyckpt.engine.publishing import put_in_place
from anyckpt.errors import MappingError
from anyckpt.formats.lightning.keys import META, OPTIMIZER_STATES, STATE_DICT
from anyckpt.operations.steps.destination import check_destination
from anyckpt.torch.collectives import Ranks
from anyckpt.torch.dcp import Writer
from anyckpt.torch.lightning.checkpoint_io import CheckpointIO
from anyckpt.torch.module_state import load_into
from anyckpt.torch.one_file import write_file
from anyckpt.torch.trainer_state import trainer_plan

UNPUBLISHED = ".anyckpt-new"
"""``.NAME.anyckpt-new`` is what a directory is called until it is whole."""


class ModelParallelStrategy(_Base):
    """Lightning's, whose ``trainer.fit(model, ckpt_path=X)`` takes whatever ``CheckpointIO`` takes.

    Its own sharded directories are loaded by Lightning, at any world size.  Of any other checkpoint each rank maps the
    whole and takes its part.  A directory that is saved gets its name, or replaces another, when every rank's files are
    durable; plain Lightning loads it.  With ``Trainer(plugins=[CheckpointIO(...)])`` that plugin's options count,
    and files (``save_distributed_checkpoint=False``) are saved by it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save as Lightning does, but whole or not at all; with ``CheckpointIO(in_flight=N)``, while training goes on.

        Raises:
            AnyckptError: it cannot be written, on every rank.
        """
        if not self._save_distributed_checkpoint or storage_options is not None or "://" in os.fspath(filepath):
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = os.path.abspath(self.broadcast(os.fspath(filepath)))
        folder, name = os.path.split(path)
        new = os.path.join(folder, f".{name}{UNPUBLISHED}")
        rest = dict(checkpoint)
        state = {STATE_DICT: rest.pop(STATE_DICT)}
        state.update((f"optimizer_{number}", one) for number, one in enumerate(rest.pop(OPTIMIZER_STATES, [])))
        plugin = self.checkpoint_io
        if isinstance(plugin, CheckpointIO) and plugin.in_flight:
            upkeep, plugin.upkeep = plugin.upkeep, None
            plugin.together().save(state, rest, path, upkeep)
            return
        ranks = Ranks()

        def begin() -> None:
            _check_may_go(path)
            _removed(new)
            write_file(trainer_plan(rest, path), os.path.join(new, META))
            _removed(beside(os.path.join(new, META)))

        ranks.broadcast(begin, what="to begin a checkpoint")
        try:
            save(state, storage_writer=Writer(new))
            ranks.broadcast(lambda: _publish(new, path), what="to publish a checkpoint")
        except BaseException:
            if ranks.rank == 0:
                _removed(new)
            raise

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimizers, and give the rest of the trainer's state.

        Raises:
            AnyckptError: as ``CheckpointIO.load_checkpoint``.
            MappingError: weights do not fit, or there are other optimizers.
        """
        path = Path(self.broadcast(os.fspath(checkpoint_path)))
        if isinstance(self.checkpoint_io, CheckpointIO):
            self.checkpoint_io.wait()
        if (path / META).is_file():
            return super().load_checkpoint(path, weights_only=weights_only)
        plugin = self.checkpoint_io if isinstance(self.checkpoint_io, CheckpointIO) else CheckpointIO()
        found = plugin.load_checkpoint(path, weights_only=weights_only)
        module = self.lightning_module
        assert module is not None and self.model is not None
        load_into(self.model, found.pop(STATE_DICT), path=str(path), strict=module.strict_loading)
        states = found.pop(OPTIMIZER_STATES, [])
        if states and module.trainer.state.fn == TrainerFn.FITTING:
            self._load_optimizers(states, str(path))
        return found

    def teardown(self) -> None:
        """As Lightning's; of saves that are under way every rank waits for all, or for its own after an exception."""
        plugin, module = self.checkpoint_io, self.lightning_module
        if isinstance(plugin, CheckpointIO):
            stopped = module is not None and module.trainer.state.status == TrainerStatus.INTERRUPTED
            plugin.teardown(alone=stopped)
        super().teardown()

    def _load_optimizers(self, states: list[Any], path: str) -> None:
        if len(states) != len(self.optimizers):
            raise MappingError(
                "holds the states of other optimizers than the module has",
                path=path,
                expected=f"{len(self.optimizers)} optimizers",
                found=len(states),
                remedy="configure as many, or convert it without optimizer (anyckpt convert --optimizer drop)",
            )
        assert self.model is not None
        for optimizer, state in zip(self.optimizers, states, strict=True):
            named: Mapping[Any, Any] = state
            if any(isinstance(key, int) for key in state["state"]):
                named = FullyShardedDataParallel.rekey_optim_state_dict(
                    dict(state), OptimStateKeyType.PARAM_NAME, self.model
                )
            set_optimizer_state_dict(
                self.model, optimizer, dict(named), options=StateDictOptions(full_state_dict=True, strict=True)
            )


def _check_may_go(path: str) -> None:
    """Raise OutputError if what a new checkpoint replaces is none, or holds somebody's files."""
    if os.path.lexists(path):
        check_destination(path, (), overwrite=True, known=(META,))


def _publish(new: str, path: str) -> None:
    aside = f"{new}-old"
    try:
        sync_directory(new)
        if os.path.lexists(path):
            put_in_place(new, path, aside)
        else:
            os.rename(new, path)
        sync_directory(os.path.dirname(path))
    except OSError as error:
        raise write_error(path, error) from error
    for old in (new, aside, beside(path)):  # of a file that was there, too
        _removed(old)


def _removed(path: str) -> None:
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)
    except OSError as error:
        raise write_error(path, error) from error
