"""Models as folders for the Hugging Face hub: ``config.json``, ``model.safetensors``, ``README.md``.

The layout is that of huggingface_hub's ``PyTorchModelHubMixin``, which SpeechLM2 of NeMo 3.0 uses: tied weights are
stored once, and the file's metadata says under which name.
"""

from __future__ import annotations

import json
import os
import tempfile
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch

from anyckpt.checkpoint import storage_key
from anyckpt.containers.safetensors import read_safetensors, safetensors_parts
from anyckpt.engine.execute import execute
from anyckpt.engine.plan import OutputFile, Plan, SourceData, small_file
from anyckpt.errors import FormatError, OutputError, UsageError
from anyckpt.formats import registry
from anyckpt.formats.shared.hub_folder import read_json
from anyckpt.operations.steps.live import Live
from anyckpt.storage.hub.library import explained, failures, library
from anyckpt.storage.hub.paths import SCHEME, parse
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.place import scheme_of
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor
from anyckpt.torch.artifacts import restoring
from anyckpt.torch.collectives import Ranks
from anyckpt.torch.module_state import full_state, load_into
from anyckpt.torch.one_file import write_file
from anyckpt.torch.settings import Settings, settings
from anyckpt.views import TorchFiles

Model = TypeVar("Model", bound="Pretrained")

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
_OTHER_FILES = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf")
_NESTED = "llm_backbone"
"""A folder with the configuration of the language model inside, as SpeechLM2's exports have it."""


class Pretrained:
    """``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` of ``Restorable``.

    Attributes:
        hub_settings: what ``config.json`` has besides the configuration, such as ``model_type``.
    """

    hub_settings: ClassVar[Mapping[str, Any]] = {}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the model as a folder; each file appears, or replaces another, only when it is whole.

        Every rank of a distributed job calls it; the first writes.  A ``README.md`` that is there stays.

        Args:
            save_directory: made if it is not there.
            repo_id: for ``push_to_hub``; the folder's name if None.
            push_to_hub: send it to the hub, too.
            state_dict: weights to write in place of the model's own; the same on all ranks.

        Raises:
            MissingLibraryError: it is to be sent, and huggingface_hub is not installed.
            OutputError: it cannot be written.
            UsageError: the state or the configuration has something that the format cannot hold.
        """
        folder = os.path.abspath(os.path.expanduser(os.fspath(save_directory)))
        module: Any = self
        state = full_state(module) if state_dict is None else state_dict

        def write() -> None:
            files = self._hub_files(state)
            if not os.path.lexists(folder):
                execute(Plan("hf", files), folder)
                return
            for file in files:
                path = os.path.join(folder, file.path)
                if file.path != CARD or not os.path.exists(path):
                    write_file(Plan("hf", (OutputFile("", file.parts),)), path)

        Ranks().broadcast(write, what="to write the folder")
        if push_to_hub:
            self._send(folder, repo_id or os.path.basename(folder))

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Send the model to the Hugging Face hub.

        Args:
            repo_id: ``owner/name``; made if it is not there.
            options: ``private`` and ``token``, and what ``HfApi.upload_folder`` takes (``commit_message``,
                ``revision``, ``create_pr``).

        Returns:
            What ``HfApi.upload_folder`` says; the same on every rank.

        Raises:
            MissingLibraryError: huggingface_hub is not installed.
            OutputError: files cannot be written, or the Hub does not take them.
        """
        library()
        with tempfile.TemporaryDirectory(prefix="anyckpt-push-") as folder:
            self.save_pretrained(folder)
            return self._send(folder, repo_id, **options)

    def _send(self, folder: str, repo_id: str, **options: Any) -> Any:
        hub = library()

        def send() -> Any:
            api = hub.HfApi(token=options.pop("token", None))
            try:
                made = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True)
                return api.upload_folder(repo_id=made.repo_id, folder_path=folder, **options)
            except failures() as error:
                raise explained(error, repo_id).told_as(OutputError) from None

        return Ranks().broadcast(send, what="to send the folder")

    def _hub_files(self, state: Mapping[str, Any]) -> tuple[OutputFile, ...]:
        name = type(self).__name__
        values, artifacts = self._stored_settings(named=False)
        for key, value in self.hub_settings.items():
            values.setdefault(key, value)
        card = (
            f"---\nlibrary_name: pytorch\ntags:\n- model_hub_mixin\n---\n\nWeights of `{name}`, written by anyckpt.\n"
        )
        return (
            OutputFile(WEIGHTS, _weights(state)),
            small_file(CONFIG, json.dumps(values, sort_keys=True, indent=2)),
            small_file(CARD, card),
            *(OutputFile(name, (SourceData(source),) if source.size else ()) for name, source in artifacts.items()),
        )

    @abstractmethod
    def _stored_settings(self, named: bool) -> tuple[dict[str, Any], dict[str, ByteSource]]:
        """The configuration and the artifacts that it names; ``Restorable`` knows them."""

    @classmethod
    def from_pretrained(
        cls: type[Model],
        model_id: str | os.PathLike[str],
        *,
        map_location: str | torch.device | None = None,
        strict: bool = True,
        trainer: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> Model:
        """Build a model from a folder of ``save_pretrained``, a ``.nemo``, or a repository of the hub with either.

        Args:
            model_id: a path, or ``owner/name`` on the Hugging Face hub, also as ``hf://owner/name@revision``.
            map_location: the device to put the model on; where its constructor makes it if None.
            strict: weights that are missing or unexpected are an error; another shape always is.
            trainer: Lightning's; handed to the constructor if that takes it.
            revision, token, cache_dir, local_files_only: as huggingface_hub takes them.
            overrides: values for keys of the configuration.

        Returns:
            The model, in evaluation mode.

        Raises:
            FormatError: there is no such model, or it is damaged.
            MappingError: the weights do not fit.
            MissingLibraryError: it is on the hub, and huggingface_hub is not installed.
            UsageError: no class for it is allowed.
        """
        place = os.fspath(model_id)
        if not os.path.exists(os.path.expanduser(place)):
            place = _fetched(*_named(place, revision), token, cache_dir, local_files_only)
        place = os.path.expanduser(place)
        if os.path.isdir(place) and not os.path.exists(os.path.join(place, CONFIG)):
            place = _only_archive(place)
        if not os.path.isdir(place):
            return cast("Model", _restored(cls, place, map_location, strict, trainer, overrides))
        stored = read_json(LocalFile(os.path.join(place, CONFIG)))
        config = Settings(_with_folder(dict(stored), place))
        config.update(overrides)
        files = {name: path for name in os.listdir(place) if os.path.isfile(path := os.path.join(place, name))}
        with restoring(files, stored, overrides):
            model: Any = cls.from_config_dict(config, trainer=trainer)  # type: ignore[attr-defined]
        if map_location is not None and not any(value.is_meta for value in model.parameters()):
            model.to(map_location)
        model.restored = load_into(model, folder_state(place), path=place, strict=strict)
        if map_location is not None:
            model.to(map_location)
        return cast("Model", model.eval())


def folder_state(folder: str) -> dict[str, Any]:
    """The weights of a hub folder as tensors of torch that are the files, tied ones under all of their names.

    Raises:
        FormatError: they are missing or damaged.
    """
    single = os.path.join(folder, WEIGHTS)
    metadata: dict[str, str] = {}
    if os.path.exists(single):
        tensors, found = read_safetensors(LocalFile(single))
        metadata = found or {}
    else:
        tensors = registry.read(folder).weights()
    files = TorchFiles()
    state = {name: files.tensor(tensor) for name, tensor in tensors.items()}
    for name, kept in metadata.items():
        if kept in state:
            state.setdefault(name, state[kept])
    return state


def _weights(state: Mapping[str, Any]) -> tuple[Any, ...]:
    """The parts of a safetensors file; of tied weights the first by name is stored, and the metadata says of which."""
    tree = Live().tree(state)
    stored: dict[str, LazyTensor] = {}
    ties: dict[str, str] = {}
    kept: dict[Any, str] = {}
    for name in sorted(tree):
        tensor = tree[name]
        if not isinstance(tensor, LazyTensor):
            raise UsageError(
                "a folder for the hub holds tensors only",
                tensor=name,
                found=type(tensor).__name__,
                remedy="save a .nemo (save_to), or leave the state out of state_dict()",
            )
        key = storage_key(tensor)
        if key is not None and key in kept:
            ties[name] = kept[key]
            continue
        stored[name] = tensor
        if key is not None:
            kept[key] = name
    return safetensors_parts(stored, {"format": "pt"} | ties)


def _with_folder(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """A configuration as SpeechLM2 of NeMo 3.0 changes it when it opens a folder: nothing is downloaded again."""
    language_models = [key for key in ("pretrained_llm", "pretrained_lm_name") if key in config]
    if language_models or "pretrained_asr" in config or "pretrained_weights" in config:
        config["pretrained_weights"] = False
    if os.path.exists(os.path.join(folder, "tokenizer_config.json")):
        config["tokenizer_path"] = folder
    nested = os.path.join(folder, _NESTED)
    if os.path.exists(os.path.join(nested, CONFIG)):
        config.update(dict.fromkeys(language_models, nested))
    return config


def _restored(cls: Any, path: str, map_location: Any, strict: bool, trainer: Any, overrides: Mapping[str, Any]) -> Any:
    config = None
    if overrides:
        config = settings(cls.restore_from(path, return_config=True))
        config.update(overrides)
    return cls.restore_from(path, config, map_location, strict, trainer=trainer).eval()


def _only_archive(folder: str) -> str:
    found = sorted(name for name in os.listdir(folder) if name.endswith(".nemo"))
    if "model_config.yaml" in os.listdir(folder):
        return folder
    if len(found) != 1:
        raise FormatError(
            "is no model's folder",
            path=folder,
            expected="config.json and model.safetensors, or one .nemo file",
            found=", ".join(found) or ", ".join(sorted(os.listdir(folder))[:5]) or "no files",
            remedy="name the .nemo file" if found else "check the path",
        )
    return os.path.join(folder, found[0])


def _named(model_id: str, revision: str | None) -> tuple[str, str | None]:
    """The name of a repository, and the revision that is asked for or named with it."""
    if scheme_of(model_id) != SCHEME:
        return model_id, revision
    found = parse(model_id)
    if found.inner or found.kind != "model":
        raise FormatError("is not the repository of a model", path=model_id, expected="hf://owner/name@revision")
    return found.repository, revision or found.revision


def _fetched(
    repo_id: str, revision: str | None, token: str | bool | None, cache_dir: Any, local_files_only: bool
) -> str:
    if repo_id.count("/") > 1 or repo_id.startswith((".", "/", "~")):
        raise FormatError("does not exist", path=repo_id, expected="a path, or owner/name on the Hugging Face hub")
    hub = library()
    try:
        found: str = hub.snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            ignore_patterns=list(_OTHER_FILES),
        )
    except failures() as error:
        told = explained(error, repo_id)
        raise told.told_as(
            FormatError, f"is neither a path nor to be had from the Hugging Face Hub: {told.problem}"
        ) from None
    return found
