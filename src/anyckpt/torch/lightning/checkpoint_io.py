"""Lightning's plugin for saving and loading: ``Trainer(plugins=[CheckpointIO()])``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO as _Base
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from anyckpt.errors import FormatError
from anyckpt.operations.writer_process import Upkeep
from anyckpt.torch.from_another import Renaming
from anyckpt.torch.lightning.background import Background
from anyckpt.torch.lightning.together import SavesTogether
from anyckpt.torch.trainer_state import read_trainer_state, write_trainer_state


class CheckpointIO(_Base):
    """Saves files that plain Lightning resumes from, whole or not at all, and resumes from any checkpoint.

    With ``Trainer(plugins=[CheckpointIO()])``, ``trainer.fit(model, ckpt_path=X)`` takes a ``.ckpt`` file, a sharded
    directory, a ``.nemo``, a NeMo 2 directory, a Hugging Face folder, whoever wrote it.  Strategies that shard
    (``FSDPStrategy``, ``ModelParallelStrategy``) do not ask this plugin when they load: see ``strategies``.

    No pickle of a checkpoint is executed unless the trainer is told ``weights_only=False``.  Paths with a scheme
    (``s3://``) are Lightning's to save and load.

    Args:
        names: how to name weights that follow a known family (``hf``); as they are stored if None.
        family, config: as for ``anyckpt.convert``, where a checkpoint does not tell.
        rename: for the names of weights: beginning -> what stands there in the module; see ``initialise``.
        in_flight: so many saves may be under way while training goes on: a save returns when the state is copied, and a
            process beside this one writes it.  0 writes before going on.  A save that failed raises at the next one, or
            when the run ends; what Lightning asks to remove meanwhile goes when the saves before that are whole.
            Directories of our ``ModelParallelStrategy`` are saved so, too, by a process beside each rank.

    Raises:
        UsageError: ``in_flight`` is negative.
    """

    def __init__(
        self,
        *,
        names: str | None = None,
        family: str | None = None,
        config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        rename: Renaming | None = None,
        in_flight: int = 0,
    ) -> None:
        self.names = names
        self.family = family
        self.config = config
        self.rename = rename
        self._remote = TorchCheckpointIO()
        self._background = Background(in_flight)
        self._together: SavesTogether | None = None
        self.upkeep: Upkeep | None = None
        """What follows the next save when it is whole, if that is written while training goes on."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the trainer's state as the file that Lightning would write.

        Raises:
            OutputError: it cannot be written.
            TypeError: there are ``storage_options``, which nothing here takes.
            UsageError: an object cannot be pickled.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options; leave them out of save_checkpoint")
        if _is_remote(path):
            self._remote.save_checkpoint(checkpoint, path)
            return
        if self._background.in_flight:
            upkeep, self.upkeep = self.upkeep, None
            self._background.save(checkpoint, path, upkeep)
        else:
            write_trainer_state(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """The trainer's state of a checkpoint of any format; weights are mapped, and on the CPU.

        Args:
            path: of the checkpoint.
            map_location: for paths with a scheme, and with ``weights_only=False``.
            weights_only: False lets torch execute what a file's pickle asks for.

        Raises:
            FormatError: it is missing or damaged.
            MappingError: names or shapes do not fit a family.
            UsageError: it holds objects that only executing a pickle would make.
        """
        trusted = weights_only is False and os.path.isfile(path) and not os.fspath(path).endswith(".nemo")
        if trusted or _is_remote(path):
            where: Any = map_location or "cpu"
            return self._remote.load_checkpoint(path, where, weights_only)
        return self.read(path)

    def read(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """As ``load_checkpoint``, of a path in a file system.

        Raises:
            AnyckptError: as ``load_checkpoint``.
        """
        self.wait()
        if not os.path.exists(path):
            raise FormatError("does not exist", path=path, remedy="check ckpt_path")
        return read_trainer_state(path, names=self.names, family=self.family, config=self.config, rename=self.rename)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, and what lies beside it under its name."""
        if _is_remote(path):
            self._remote.remove_checkpoint(path)
            return
        removes = self._together if self._together is not None and self._together.pending else self._background
        removes.remove(os.path.abspath(path))

    @property
    def in_flight(self) -> int:
        """How many saves may be under way."""
        return self._background.in_flight

    @property
    def pending(self) -> tuple[str, ...]:
        """Paths of the saves that are under way."""
        return (*self._background.pending, *(() if self._together is None else self._together.pending))

    def together(self) -> SavesTogether:
        """The saves of directories, which all ranks take part in; making it is collective."""
        if self._together is None:
            self._together = SavesTogether(self.in_flight)
        return self._together

    def wait(self) -> None:
        """Wait until every save is whole; collective where directories are under way.

        Raises:
            OutputError: one failed.
        """
        self._background.wait()
        if self._together is not None:
            self._together.wait()

    def teardown(self, *, alone: bool = False) -> None:
        """Wait until every save is whole, and end the process that writes; the trainer calls it when a run ends.

        Args:
            alone: of directories wait for this rank's own part only, for other ranks may not come.

        Raises:
            OutputError: one failed.
        """
        together, self._together = self._together, None
        try:
            self._background.close()
        finally:
            if together is not None:
                together.close(alone=alone)


def _is_remote(path: Any) -> bool:
    return "://" in os.fspath(path)
