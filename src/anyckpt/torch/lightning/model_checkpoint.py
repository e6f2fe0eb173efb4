"""Lightning's ``ModelCheckpoint`` with what NeMo's adds: exports, names, markers of unfinished saves, averages."""

from __future__ import annotations

import glob
import inspect
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint as _Base
from lightning.pytorch.utilities.data import extract_batch_size

from anyckpt.engine.files import write_error
from anyckpt.errors import UsageError
from anyckpt.formats.lightning.keys import STATE_DICT
from anyckpt.formats.shared.unfinished import averaged_from, marker_path
from anyckpt.operations.retention import Retention, Saved
from anyckpt.operations.run_upkeep import clean, delete, published, write_note
from anyckpt.operations.writer_process import Upkeep
from anyckpt.torch.lightning.averaging import EMA_SUFFIX, of_trainer, second_path
from anyckpt.torch.lightning.checkpoint_io import CheckpointIO
from anyckpt.torch.lightning.strategies import UNPUBLISHED

_CONSUMED = "consumed_samples"
_IN_NAME = re.compile(rf"{_CONSUMED}=(\d+)")


class ModelCheckpoint(_Base):
    """Saves and keeps checkpoints as Lightning's callback, and models for use beside them as NeMo's.

    - ``filename`` may have ``{consumed_samples}``, which is counted where the module does not log it; with a
      ``filename`` the last checkpoint is called the same with ``-last``, and ``ckpt_path="last"`` finds it.
    - An empty file ``NAME-unfinished`` lies beside a checkpoint while it is saved or deleted; what one lies beside when
      a run begins is removed, and never resumed from.
    - With the callback ``EMA`` a second file ``NAME-EMA.ckpt`` has the averaged weights.
    - The model is exported as ``PREFIX.nemo``, by its ``save_to``, and as a hub folder ``PREFIX-hf``, by its
      ``save_pretrained``: that of the end or, with ``save_best_model``, the best; averaged weights where there are.

    Args:
        dirpath, filename, options: as Lightning's.
        prefix: how exports are called.
        postfix: what a ``.nemo`` ends with.
        always_save_nemo: export a ``.nemo`` with every checkpoint.
        save_nemo_on_train_end: export one when training ends; if the model has ``save_to`` where None.
        always_save_hf: export a folder with every checkpoint.
        save_hf_on_train_end: export one when training ends.
        save_best_model: export the best checkpoint's weights.
        keep_backups: what an export would replace becomes ``PREFIX-vN.nemo``; otherwise the new one replaces it when it
            is whole.
        keep: which checkpoints stay, in place of ``save_top_k``, then -1; see ``anyckpt.torch.Retention``.  A
            link ``latest`` leads to the newest.
        samples_per_batch: of one rank, to count consumed samples; as the batch tells if None.

    Raises:
        UsageError: ``keep`` contradicts another argument.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        *,
        prefix: str = "model",
        postfix: str = ".nemo",
        always_save_nemo: bool = False,
        save_nemo_on_train_end: bool | None = None,
        always_save_hf: bool = False,
        save_hf_on_train_end: bool = False,
        save_best_model: bool = False,
        keep_backups: bool = False,
        keep: Retention | None = None,
        samples_per_batch: int | None = None,
        **options: Any,
    ) -> None:
        if keep is not None:
            _check_rules(keep, options, save_best_model)
            options.setdefault("save_top_k", -1)
        super().__init__(None if dirpath is None else os.fspath(dirpath), filename, **options)
        self.prefix = prefix
        self.postfix = postfix
        self.always_save_nemo = always_save_nemo
        self.save_nemo_on_train_end = save_nemo_on_train_end
        self.always_save_hf = always_save_hf
        self.save_hf_on_train_end = save_hf_on_train_end
        self.save_best_model = save_best_model
        self.keep_backups = keep_backups
        self.keep = keep
        self.samples_per_batch = samples_per_batch
        self.consumed_samples = 0
        self._exported_best = ""
        if filename is not None:
            self.CHECKPOINT_NAME_LAST = f"{filename}-last"

    # -- the run ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove what an interrupted run left unfinished.

        Raises:
            UsageError: the model cannot be exported as is asked.
        """
        super().setup(trainer, pl_module, stage)
        wanted = {"save_to": self.always_save_nemo or self.save_nemo_on_train_end}
        wanted["save_pretrained"] = self.always_save_hf or self.save_hf_on_train_end
        for method, asked in wanted.items():
            if asked and not hasattr(pl_module, method):
                raise UsageError(
                    f"{type(pl_module).__name__} has no {method}, which the export needs",
                    remedy="make it of anyckpt.torch.Restorable, too, or do not ask for the export",
                )
        if stage == "fit":
            if trainer.is_global_zero and self.dirpath is not None:
                _remove_unfinished(os.fspath(self.dirpath))
            trainer.strategy.barrier("unfinished checkpoints are removed")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count samples, then save as Lightning does."""
        size = self.samples_per_batch
        if size is None and _CONSUMED in f"{self.filename}{self.CHECKPOINT_NAME_LAST}":
            size = extract_batch_size(batch)
        self.consumed_samples += (size or 0) * _replicas(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last checkpoint, and export the model."""
        super().on_train_end(trainer, pl_module)
        if getattr(trainer, "fast_dev_run", False):
            return
        plugin = trainer.strategy.checkpoint_io
        if isinstance(plugin, CheckpointIO):
            plugin.wait()
        if self.keep is not None and trainer.is_global_zero:
            self._remove_lone_averages(())
        nemo = self.save_nemo_on_train_end
        self._export(
            trainer, nemo=hasattr(pl_module, "save_to") if nemo is None else nemo, hf=self.save_hf_on_train_end
        )

    def state_dict(self) -> dict[str, Any]:
        """As Lightning's, with the samples consumed."""
        return {**super().state_dict(), _CONSUMED: self.consumed_samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Lightning's; counting goes on."""
        super().load_state_dict(state_dict)
        self.consumed_samples = state_dict.get(_CONSUMED, 0)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on counting where a checkpoint of NeMo says in its name how many samples were consumed."""
        said = _IN_NAME.search(os.path.basename(os.fspath(trainer.ckpt_path or "")))
        if said is not None and self.state_key not in checkpoint.get("callbacks", {}):
            self.consumed_samples = int(said[1])

    def _monitor_candidates(self, trainer: pl.Trainer) -> dict[str, torch.Tensor]:
        found = super()._monitor_candidates(trainer)
        found.setdefault(_CONSUMED, torch.tensor(float(self.consumed_samples), dtype=torch.float64))
        return found

    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        if "{" not in self.CHECKPOINT_NAME_LAST:
            return super()._find_last_checkpoints(trainer)
        found = glob.glob(f"{glob.escape(os.fspath(self.dirpath or '.'))}/*-last*{self.FILE_EXTENSION}")
        marked = (marker_path(path) for path in found)
        return {
            os.path.normpath(path)
            for path, marker in zip(found, marked, strict=True)
            if not path.endswith(EMA_SUFFIX + self.FILE_EXTENSION) and not os.path.exists(marker or "")
        }

    # -- saving and removing ---------------------------------------------------------------------------------------

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        average = of_trainer(trainer)
        module = trainer.lightning_module
        original = nullcontext() if average is None else average._weights_in_module(module)
        with _unfinished(trainer, filepath), original:
            self._save_and_keep(trainer, filepath)
            if average is not None:
                dumped = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
                second = average.averaged_checkpoint(dumped, trainer.optimizers, module)
                trainer.strategy.save_checkpoint(second, second_path(filepath))
        self._export(trainer, nemo=self.always_save_nemo, hf=self.always_save_hf, only_new=True)

    def _save_and_keep(self, trainer: pl.Trainer, filepath: str) -> None:
        """Save, and remove what the rules do not keep; a save that is under way does it when it is whole."""
        if self.keep is None:
            super()._save_checkpoint(trainer, filepath)
            return
        plugin = trainer.strategy.checkpoint_io
        metric = None if self.current_score is None else float(self.current_score)
        saved = Saved(os.path.basename(filepath), trainer.global_step, time.time(), metric)
        later = plugin if isinstance(plugin, CheckpointIO) and plugin.in_flight else None
        if trainer.is_global_zero and later is not None:
            later.upkeep = Upkeep(saved, self.keep)
        elif trainer.is_global_zero:
            write_note(filepath, saved)
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            if later is None:
                published(os.path.dirname(filepath), self.keep)
            self._remove_lone_averages(() if later is None else later.pending)

    def _remove_lone_averages(self, pending: Sequence[str]) -> None:
        """Remove averaged weights beside which there is, and will be, no checkpoint."""
        folder = os.fspath(self.dirpath or ".")
        for second in glob.glob(f"{glob.escape(folder)}/*{EMA_SUFFIX}{self.FILE_EXTENSION}"):
            first = averaged_from(second)
            if first is not None and not os.path.exists(first) and first not in pending:
                delete(second)

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        with _unfinished(trainer, filepath):
            super()._remove_checkpoint(trainer, filepath)
            if of_trainer(trainer) is not None or os.path.exists(second_path(filepath)):
                super()._remove_checkpoint(trainer, second_path(filepath))

    # -- exports ---------------------------------------------------------------------------------------------------

    def export_path(self, end: str) -> str:
        """Where the export whose name ends so is."""
        return os.path.abspath(os.path.join(os.path.expanduser(os.fspath(self.dirpath or ".")), self.prefix + end))

    def _export(self, trainer: pl.Trainer, *, nemo: bool, hf: bool, only_new: bool = False) -> None:
        best = self.best_model_path if self.save_best_model else ""
        if not (nemo or hf) or (only_new and best and best == self._exported_best):
            return
        self._exported_best = best
        module: Any = trainer.lightning_module
        state = self._state(trainer, best)
        for method, end, wanted in (("save_to", self.postfix, nemo), ("save_pretrained", "-hf", hf)):
            if wanted:
                path = self.export_path(end)
                self._back_up(trainer, path, end)
                _written(module, method, path, state)
        trainer.strategy.barrier("the model is exported")

    def _state(self, trainer: pl.Trainer, best: str) -> Mapping[str, Any] | None:
        """Weights to export that are not the module's own."""
        plugin = trainer.strategy.checkpoint_io
        reader = plugin if isinstance(plugin, CheckpointIO) else CheckpointIO()
        if best:
            reader.wait()
            second = second_path(best)
            state: Mapping[str, Any] = reader.read(second if os.path.exists(second) else best)[STATE_DICT]
            return state
        average = of_trainer(trainer)
        if average is None:
            return None
        module = trainer.lightning_module
        with average._weights_in_module(module):
            return {
                name: value.full_tensor() if hasattr(value, "full_tensor") else value
                for name, value in average.averaged(module.state_dict()).items()
            }

    def _back_up(self, trainer: pl.Trainer, path: str, end: str) -> None:
        if self.keep_backups and trainer.is_global_zero and os.path.exists(path):
            version = self.STARTING_VERSION
            while os.path.exists(backup := self.export_path(f"-v{version}{end}")):
                version += 1
            os.rename(path, backup)
        trainer.strategy.barrier("the earlier export is kept")


@contextmanager
def _unfinished(trainer: pl.Trainer, path: str) -> Iterator[None]:
    """Mark a checkpoint as unfinished meanwhile; where that raises, the mark stays."""
    marker = marker_path(path) if "://" not in path else None
    if marker is not None and trainer.is_global_zero:
        try:
            os.makedirs(os.path.dirname(marker), exist_ok=True)
            Path(marker).touch()
        except OSError as error:
            raise write_error(marker, error) from error
    trainer.strategy.barrier("the checkpoint is marked")
    yield
    trainer.strategy.barrier("the checkpoint is whole")
    if marker is not None and trainer.is_global_zero:
        with suppress(FileNotFoundError):
            os.unlink(marker)


def _remove_unfinished(folder: str) -> None:
    remover = CheckpointIO()
    for marker in glob.glob(f"{glob.escape(folder)}/*-unfinished"):
        name = marker.removesuffix("-unfinished")
        for path in (f"{name}.ckpt", f"{name}{EMA_SUFFIX}.ckpt", name):
            if os.path.lexists(path):
                remover.remove_checkpoint(path)
        os.unlink(marker)
    for left in glob.glob(f"{glob.escape(folder)}/.*{UNPUBLISHED}*"):
        shutil.rmtree(left)
    clean(folder, others_after=None)


def _replicas(trainer: pl.Trainer) -> int:
    """Ranks that see different samples."""
    told: Any = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return int(told.get("num_replicas", trainer.world_size))


def _check_rules(keep: Retention, options: Mapping[str, Any], save_best_model: bool) -> None:
    if options.get("save_top_k", -1) != -1 or options.get("save_last"):
        raise UsageError("keep is in place of save_top_k and save_last", remedy="say in keep what stays")
    if keep.best and options.get("monitor") is None:
        raise UsageError("keep has best checkpoints, and there is no metric", remedy="give monitor")
    if keep.best and keep.mode != options.get("mode", "min"):
        raise UsageError("keep and mode mean different orders", expected=keep.mode, found=options.get("mode", "min"))
    if save_best_model and not keep.best:
        raise UsageError("save_best_model needs the best checkpoint", remedy="keep it: Retention(best=1)")


def _written(module: Any, method: str, path: str, state: Mapping[str, Any] | None) -> None:
    """Have a module write itself, with other weights where they are given."""
    write = getattr(module, method)
    if state is None:
        write(path)
    elif "state_dict" in inspect.signature(write).parameters:
        write(path, state_dict=state)
    else:
        with _holding(module, state):
            write(path)


@contextmanager
def _holding(module: Any, state: Mapping[str, Any]) -> Iterator[None]:
    """A module with other weights, for exports by a method that takes none."""
    kept = {name: value.detach().clone() for name, value in module.state_dict().items()}
    module.load_state_dict(state)
    try:
        yield
    finally:
        module.load_state_dict(kept)
