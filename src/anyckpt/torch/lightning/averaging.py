"""Weights averaged over a run of Lightning's trainer (exponential moving average), saved and resumed with it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch

from anyckpt.errors import FormatError, UsageError
from anyckpt.formats.lightning.keys import OPTIMIZER_STATES, STATE_DICT
from anyckpt.torch.trainer_state import read_trainer_state

EMA_SUFFIX = "-EMA"
"""What NeMo puts before ``.ckpt`` in the name of the second file, which has averaged weights."""


class EMA(pl.Callback):
    """Keeps ``average = decay * average + (1 - decay) * weight`` of every parameter.

    The averages are in the callback's state in every checkpoint, so that a run resumes with them.  With
    ``anyckpt.torch.lightning.ModelCheckpoint`` a second file ``NAME-EMA.ckpt`` lies beside each checkpoint, as NeMo
    writes it: the averages are its weights.  Where a checkpoint of NeMo is resumed, they are taken from that file.

    Args:
        decay: from 0 to 1.
        every_n_steps: averages are taken at every so many optimizer steps.
        start_step: the first step at which they are.
        validate_original_weights: validate and test with the weights themselves instead of the averages.

    Raises:
        UsageError: ``decay`` or a number of steps is not possible.
    """

    def __init__(
        self,
        decay: float,
        every_n_steps: int = 1,
        start_step: int = 0,
        validate_original_weights: bool = False,
    ) -> None:
        if not 0 <= decay <= 1 or every_n_steps < 1 or start_step < 0:
            raise UsageError(
                "weights cannot be averaged so",
                expected="a decay from 0 to 1, and positive numbers of steps",
                found=f"decay {decay}, every_n_steps {every_n_steps}, start_step {start_step}",
            )
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.start_step = start_step
        self.validate_original_weights = validate_original_weights
        self._averages: dict[str, torch.Tensor] = {}
        self._tied: dict[str, str] = {}
        self._loaded: Mapping[str, torch.Tensor] = {}
        self._last_step = -1
        self._swapped = False

    # -- during the run --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the weights as they are, or with the averages that a checkpoint had."""
        self._averages = {name: value.detach().clone() for name, value in pl_module.named_parameters()}
        first = {id(value): name for name, value in pl_module.named_parameters()}
        every = pl_module.named_parameters(remove_duplicate=False)
        self._tied = {name: first[id(value)] for name, value in every}
        self._last_step = trainer.global_step
        missing = [name for name in self._averages if self._loaded and name not in self._loaded]
        if missing:
            raise FormatError(
                "the averages in the checkpoint are of another model",
                path=trainer.ckpt_path,
                expected=missing[0],
                found=", ".join(list(self._loaded)[:5]),
            )
        for name, value in self._loaded.items():
            if name in self._averages:
                _copy(self._averages[name], value)
        self._loaded = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Average, if the optimizer has made a step."""
        step = trainer.global_step
        if step == self._last_step or step < self.start_step or step % self.every_n_steps:
            return
        self._last_step = step
        for name, value in pl_module.named_parameters():
            self._averages[name].mul_(self.decay).add_(value.detach(), alpha=1 - self.decay)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate with the averages."""
        self._exchange(pl_module, wanted=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train with the weights."""
        self._exchange(pl_module, wanted=False)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Test with the averages."""
        self._exchange(pl_module, wanted=True)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the weights."""
        self._exchange(pl_module, wanted=False)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module with its weights."""
        self._exchange(pl_module, wanted=False)

    @torch.no_grad()
    def _exchange(self, module: pl.LightningModule, *, wanted: bool) -> None:
        """Put the averages into the module, or take them out again."""
        if self._swapped == wanted or (wanted and (self.validate_original_weights or not self._averages)):
            return
        self._swapped = wanted
        for name, value in module.named_parameters():
            kept = value.detach().clone()
            value.copy_(self._averages[name])
            self._averages[name].copy_(kept)

    @contextmanager
    def _weights_in_module(self, module: pl.LightningModule) -> Iterator[None]:
        """Saving happens at the end of a validation, too: a checkpoint has the weights, not the averages."""
        swapped = self._swapped
        self._exchange(module, wanted=False)
        try:
            yield
        finally:
            if swapped:
                self._exchange(module, wanted=True)

    # -- saved and loaded ------------------------------------------------------------------------------------------

    def averaged(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict with the averages in place of the parameters."""
        return {name: self._averages.get(self._tied.get(name, name), value) for name, value in state.items()}

    def averaged_checkpoint(self, checkpoint: Mapping[str, Any], optimizers: list[Any], module: Any) -> dict[str, Any]:
        """What NeMo saves in the second file: averages as the weights, and beside the optimizer's state.

        Args:
            checkpoint: as the trainer dumps it.
            optimizers: the trainer's.
            module: whose parameters the optimizers have.
        """
        names = {id(value): name for name, value in module.named_parameters()}
        states = []
        for optimizer, state in zip(optimizers, checkpoint.get(OPTIMIZER_STATES, []), strict=False):
            order = [value for group in optimizer.param_groups for value in group["params"]]
            averages = [self._averages[names[id(value)]] for value in order]
            facts = {"current_step": self._last_step, "decay": self.decay, "every_n_steps": self.every_n_steps}
            states.append({"opt": state, "ema": averages, **facts})
        weights = self.averaged(checkpoint[STATE_DICT])
        return {**checkpoint, STATE_DICT: weights, **({OPTIMIZER_STATES: states} if states else {})}

    def state_dict(self) -> dict[str, Any]:
        """The averages; whole tensors, whatever this rank has of them."""
        return {"last_step": self._last_step, "averages": {name: _whole(v) for name, v in self._averages.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the averages of a checkpoint."""
        self._loaded = state_dict["averages"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the averages from NeMo's second file, if the checkpoint has none of this callback's."""
        path = os.fspath(trainer.ckpt_path or "")
        second = second_path(path)
        if self.state_key not in checkpoint.get("callbacks", {}) and path and os.path.exists(second):
            self._loaded = read_trainer_state(second)[STATE_DICT]


def second_path(path: str) -> str:
    """Where the averaged weights of the checkpoint at ``path`` lie."""
    root, suffix = os.path.splitext(path) if path.endswith(".ckpt") else (path, "")
    return root + EMA_SUFFIX + suffix


def of_trainer(trainer: pl.Trainer) -> EMA | None:
    """The trainer's callback that averages weights, and has begun to."""
    return next((one for one in _callbacks(trainer) if isinstance(one, EMA) and one._averages), None)


def _callbacks(trainer: Any) -> list[Any]:
    return list(trainer.callbacks)


def _whole(value: Any) -> torch.Tensor:
    whole: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach().cpu()


def _copy(target: Any, value: torch.Tensor) -> None:
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements)
    target.copy_(value)
