"""Lightning's strategy for FSDP2 and tensor parallelism, resuming from any checkpoint at any world size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy as _Base
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType

from anyckpt.errors import MappingError
from anyckpt.formats.lightning.keys import META, OPTIMIZER_STATES, STATE_DICT
from anyckpt.torch.lightning.checkpoint_io import CheckpointIO
from anyckpt.torch.module_state import load_into


class ModelParallelStrategy(_Base):
    """Lightning's, whose ``trainer.fit(model, ckpt_path=X)`` takes whatever ``CheckpointIO`` takes.

    Its own sharded directories are loaded and saved by Lightning, as at any world size.  Of any other checkpoint each
    rank maps the whole and takes its part.  With ``Trainer(plugins=[CheckpointIO(...)])`` that plugin's options count,
    and files (``save_distributed_checkpoint=False``) are saved by it.
    """

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimizers, and give the rest of the trainer's state.

        Raises:
            AnyckptError: as ``CheckpointIO.load_checkpoint``.
            MappingError: weights do not fit, or there are other optimizers.
        """
        path = Path(self.broadcast(os.fspath(checkpoint_path)))
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
