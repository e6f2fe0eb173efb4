"""Models that are saved as one ``.nemo`` file with their configuration and artifacts, and restored from it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from anyckpt.errors import UsageError
from anyckpt.formats.nemo.config import ARTIFACT_SCHEME, NEMO_VERSION, referenced_names, texts
from anyckpt.formats.nemo.write import module_archive
from anyckpt.formats.shared.hub_folder import check_plain_name
from anyckpt.operations.save import save
from anyckpt.operations.steps.live import Live
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.source import ByteSource
from anyckpt.torch.archive import Archive, open_archive, put_artifacts, read_settings
from anyckpt.torch.artifacts import find_artifact, restoring, stored_artifacts
from anyckpt.torch.classes import Classes, class_for, class_path, names_of
from anyckpt.torch.collectives import Ranks
from anyckpt.torch.hub import Pretrained
from anyckpt.torch.module_state import Fitted, full_state, load_into
from anyckpt.torch.one_file import check_no_folder, write_file
from anyckpt.torch.settings import Settings, plain, put, resolved, settings

Model = TypeVar("Model", bound="Restorable")
Path = str | os.PathLike[str]


class Restorable(Pretrained):
    """A mixin for ``nn.Module`` and ``LightningModule``: ``class Model(Restorable, LightningModule)``.

    The constructor takes the configuration as ``cfg`` and hands it on to this one's, which calls the next class's
    without arguments.  Files are what NeMo writes: ``ModelPT.restore_from`` of NeMo 1 to 3 reads them if it has the
    class that they name as ``target``, and what it wrote is read here.

    Attributes:
        cfg: the configuration, in which artifacts are paths of files that exist.
        restored: how the weights fitted, of a model that was restored.
    """

    cfg: Settings
    restored: Fitted | None = None

    def __init__(self, cfg: Any = None, trainer: Any = None) -> None:
        """Keep the configuration.

        Args:
            cfg: a mapping, a data class, or OmegaConf's ``DictConfig``.
            trainer: Lightning's, or None.

        Raises:
            UsageError: the configuration is none.
        """
        super().__init__()
        self.cfg = settings(cfg)
        self._artifacts: dict[str, str] = {}
        self._nemo_submodules: dict[str, str] = {}
        self._carried: dict[str, str] = {}
        self._unreferenced: frozenset[str] = frozenset()
        if trainer is not None and isinstance(inspect.getattr_static(type(self), "trainer", None), property):
            self.trainer = trainer

    # -- while it is built -----------------------------------------------------------------------------------------

    def register_artifact(self, config_path: str, src: str | None, verify_src_exists: bool = True) -> str | None:
        """Say that the model needs a file, which travels with it from then on.

        Args:
            config_path: dotted key in the configuration that names the file; it gets the path that is returned.
            src: the path, as the configuration has it; None and ``""`` are returned as they are.
            verify_src_exists: a file that is not there is an error.

        Returns:
            The file's absolute path, also where the model is restored from an archive, and after that.

        Raises:
            FormatError: there is no such file.
            UsageError: it is a ``.nemo``, or the configuration has no place for the key.
        """
        if src is None or src == "":
            return src
        found = find_artifact(config_path, str(src), verify_src_exists)
        if found is not None:
            self._artifacts[config_path] = found
            put(self.cfg, config_path, found)
        return found

    def register_nemo_submodule(self, name: str, config_field: str, model: Restorable) -> None:
        """Make another restorable model a part of this one: one archive holds both.

        Args:
            name: the attribute, and so what the names of its weights begin with.
            config_field: where its configuration is in this one's.
            model: the other model.

        Raises:
            UsageError: it is no restorable model.
        """
        if not isinstance(model, Restorable):
            raise UsageError(f"{name} is no restorable model", expected="a Restorable", found=type(model).__name__)
        setattr(self, name, model)
        put(self.cfg, config_field, model.cfg)
        self._nemo_submodules[name] = config_field

    # -- saving ----------------------------------------------------------------------------------------------------

    def save_to(self, save_path: Path, *, state_dict: Mapping[str, Any] | None = None) -> None:
        """Write the model as a ``.nemo``, which appears, or replaces another, only when it is whole.

        Every rank of a distributed job calls it; the first writes.

        Args:
            save_path: the file; folders on the way are made.
            state_dict: weights to write in place of the model's own, such as averaged ones; the same on all ranks.

        Raises:
            OutputError: it cannot be written, or an artifact is no longer there.
            UsageError: the state or the configuration has something that the format cannot hold.
        """
        path = os.path.abspath(os.path.expanduser(os.fspath(save_path)))
        state = full_state(self._module()) if state_dict is None else state_dict

        def write() -> None:
            config, members = self._stored_settings()
            plan = module_archive(config, members, Live().tree(state), path)
            write_file(plan, path)

        Ranks().broadcast(write, what="to write the archive")

    def _stored_settings(self, named: bool = True) -> tuple[dict[str, Any], dict[str, ByteSource]]:
        """The configuration as files have it, with the class's name if ``named``; artifacts by their names there."""
        config = resolved(plain(self.cfg), f"the configuration of {type(self).__name__}")
        members = stored_artifacts(self._artifacts, config)
        for name, field in self._nemo_submodules.items():
            inner, files = getattr(self, name)._stored_settings()
            put(config, field, inner)
            members.update(files)
        if named or "target" in config:
            if config.get("target") not in names_of(type(self)):
                config["target"] = class_path(type(self))
            config.setdefault("nemo_version", NEMO_VERSION)
        asked = {text.removeprefix(ARTIFACT_SCHEME) for _, text in texts(config) if text.startswith(ARTIFACT_SCHEME)}
        for name, path in self._carried.items():
            if name not in members and (name in asked or name in self._unreferenced):
                members[name] = LocalFile(path)
        return config, members

    # -- restoring -------------------------------------------------------------------------------------------------

    @classmethod
    def restore_from(
        cls: type[Model],
        restore_path: Path,
        override_config_path: Path | Mapping[str, Any] | None = None,
        map_location: str | torch.device | None = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Any = None,
        *,
        classes: Classes = (),
        artifacts_dir: Path | None = None,
    ) -> Any:
        """Build a model from a ``.nemo``, and give it the weights, which are mapped into memory and not unpacked.

        Nothing in the archive is executed: no pickle, and no class that the program has not named.

        Args:
            restore_path: a ``.nemo`` file, or the folder of an unpacked one.
            override_config_path: a configuration, or a YAML file of one, in place of the archive's.
            map_location: the device to put the model on; where its constructor makes it if None.
            strict: weights that are missing or unexpected are an error that lists all; another shape always is.
            return_config: give the configuration only, as it is stored (``Settings``).
            trainer: Lightning's; handed to the constructor if that takes it.
            classes: classes that the archive may name besides the registered ones.
            artifacts_dir: where its artifacts are put and stay; a folder that is removed when the process ends if None.

        Returns:
            The model, of the calling class or one made from it; or the configuration.

        Raises:
            FormatError: the archive or something in it is missing or damaged.
            MappingError: it holds a model of another class, or its weights do not fit.
            UnsafeError: it has members that a checkpoint has no business containing.
            UsageError: no class for it is allowed, or its weights are not one module's state dict.
        """
        archive = open_archive(restore_path)
        if return_config:
            return Settings(archive.config)
        config = (
            Settings(archive.config) if override_config_path is None else read_settings(override_config_path, archive)
        )
        target = config.get("target")
        chosen: type[Model] = class_for(
            cls, target if isinstance(target, str) else None, classes, path=archive.path, any_class=Restorable
        )
        files = put_artifacts(archive, None if artifacts_dir is None else os.fspath(artifacts_dir))
        with restoring(files, archive.config, None if override_config_path is None else config):
            model = chosen.from_config_dict(config, trainer=trainer)
        model._carried = files
        model._unreferenced = frozenset(files.keys() - referenced_names(archive.config))
        model._take(archive, map_location, strict)
        return model

    @classmethod
    def from_config_dict(cls: type[Model], config: Mapping[str, Any], trainer: Any = None) -> Model:
        """Build the model from a configuration; override it if the constructor takes something else.

        Args:
            config: as a constructor gets it as ``cfg``.
            trainer: handed on if it is there and the constructor takes it.
        """
        arguments = {"trainer": trainer} if trainer is not None and _takes(cls, "trainer") else {}
        return cls(cfg=settings(config), **arguments)

    def _take(self, archive: Archive, map_location: str | torch.device | None, strict: bool) -> None:
        module = self._module()
        if map_location is not None and not any(value.is_meta for value in module.parameters()):
            module.to(map_location)
        self.restored = load_into(module, archive.state(), path=archive.path, strict=strict)
        if map_location is not None:
            module.to(map_location)

    @classmethod
    def extract_state_dict_from(
        cls, restore_path: Path, save_dir: Path, split_by_module: bool = False
    ) -> dict[str, Any]:
        """Write the weights of a ``.nemo`` as files of torch.

        Args:
            restore_path: the ``.nemo``.
            save_dir: a folder, made if it is not there; gets ``model_weights.ckpt``.
            split_by_module: write a file for each top-level module instead (``encoder.ckpt``), without its name in
                front of the weights'.

        Returns:
            The whole state dict.

        Raises:
            FormatError: the archive is damaged.
            OutputError: a file cannot be written.
        """
        archive = open_archive(restore_path)
        state = archive.state()
        parts: dict[str, dict[str, Any]] = {"model_weights": state}
        if split_by_module:
            parts = {}
            for name, value in state.items():
                module, _, rest = name.partition(".")
                check_plain_name(module, archive.path)
                parts.setdefault(module, {})[rest or module] = value
        for part, values in parts.items():
            path = os.path.join(save_dir, f"{part}.ckpt")
            check_no_folder(path)
            save(values, path, to="torch", overwrite=True)
        return dict(state)

    def _module(self) -> nn.Module:
        if not isinstance(self, nn.Module):
            raise UsageError(
                f"{type(self).__name__} is no module of torch",
                remedy="make it of one, too: class Model(Restorable, nn.Module)",
            )
        return self


def _takes(cls: type, name: str) -> bool:
    parameters = inspect.signature(cls).parameters.values()
    return any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
