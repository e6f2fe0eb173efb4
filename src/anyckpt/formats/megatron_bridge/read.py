"""Opening a Megatron-Bridge checkpoint: an iteration, or the newest one of a training root."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint, ParallelLayout, Tokenizer
from anyckpt.config.megatron_bridge import arguments_of
from anyckpt.containers.torch_file import read_torch
from anyckpt.engine.names import MANIFEST_NAME
from anyckpt.errors import FormatError, UnfinishedError
from anyckpt.formats.dcp.read import read as read_dcp
from anyckpt.formats.megatron_bridge.location import LATEST, RUN_CONFIG, TRAIN_STATE
from anyckpt.formats.megatron_core.fsdp_dtensor import NAME as FSDP
from anyckpt.formats.megatron_core.location import COMMIT, COMMON
from anyckpt.formats.megatron_core.reader import tokenizer_of
from anyckpt.formats.megatron_core_zarr.reader import read_payload
from anyckpt.formats.shared.megatron_adapters import settings_from
from anyckpt.formats.shared.tracker import TRACKER, iteration_folder
from anyckpt.plain_yaml import load_yaml_mapping
from anyckpt.storage.location import Location
from anyckpt.storage.source import ByteSource
from anyckpt.tensor import LazyTensor

_HF = "hf/"
_HF_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_HF_OTHERS = ("config.json", "generation_config.json")
_OF_PAYLOAD = (".metadata", MANIFEST_NAME)
_CONFIG_LIMIT = 64 << 20
_LARGEST = 10**18


def read(location: Location) -> Checkpoint:
    """Open a checkpoint.

    ``config`` is the model in the words of Megatron-LM's arguments, ``details["run_config"]`` the file as it is.
    The payload is ``torch_dist``, ``zarr``, or with Megatron-FSDP plain DCP.

    Raises:
        FormatError: it is unfinished or damaged.
        UnsafeError: the configuration is a bomb, or would build objects other than those that it describes.
    """
    warnings: list[str] = []
    inner = location if RUN_CONFIG in location.names else _newest(location, warnings)
    if RUN_CONFIG not in inner.names:
        raise UnfinishedError(
            f"has no {RUN_CONFIG}: the save was not finished",
            path=inner.path,
            found=", ".join(inner.names[:5]),
            remedy="use the iteration before it",
        )
    file = inner.open(RUN_CONFIG)
    run_config = load_yaml_mapping(file.read_all(_CONFIG_LIMIT), file.name)
    state = _train_state(inner.open(TRAIN_STATE)) if TRAIN_STATE in inner.names else {}
    payload = _payload(inner, location.path)
    arguments = arguments_of(run_config, file.name, warnings)
    artifacts = {name: source for name, source in payload.artifacts.items() if name not in (RUN_CONFIG, TRAIN_STATE)}
    tokenizer = payload.tokenizer or _hf_tokenizer(artifacts)
    used = set() if tokenizer is None else {id(source) for source in tokenizer.files.values()}
    model = run_config["model"]
    saved, call = run_config.get("checkpoint"), run_config.get("peft")
    base = saved.get("pretrained_checkpoint") if isinstance(saved, Mapping) else None
    return replace(
        payload,
        adapter=settings_from(call, file.name, base if isinstance(base, str) else None)
        if isinstance(call, Mapping) and _is_adapter(payload)
        else None,
        path=location.path,
        format="megatron-bridge",
        config=arguments,
        config_kind="megatron-args",
        tokenizer=tokenizer,
        artifacts={name: source for name, source in artifacts.items() if id(source) not in used},
        layout=_layout(arguments, payload.layout),
        training=replace(
            payload.training,
            step=state.get("step", payload.training.step),
            consumed_samples=state.get("consumed_train_samples", payload.training.consumed_samples),
        ),
        warnings=[*warnings, *payload.warnings],
        details={
            **payload.details,
            "iteration_folder": inner.path,
            "run_config": run_config,
            "train_state": state,
            "hf_model_id": _hf_model_id(model),
        },
    )


def _is_adapter(payload: Checkpoint) -> bool:
    """Whether nothing but an adapter was saved: a configuration names it also where it was merged."""
    return bool(payload.tensors) and all(".adapter." in name for name in payload.weights())


def _newest(location: Location, warnings: list[str]) -> Location:
    """The iteration that a training root's trackers name; Megatron-Bridge prefers its own to Megatron-LM's.

    Raises:
        FormatError: a tracker is damaged, or the iteration is missing.
    """
    if LATEST not in location.names:
        return iteration_folder(location)
    file = location.open(LATEST)
    step = _train_state(file).get("step")
    name = "" if step is None else f"iter_{step:07d}"
    if step is None or name not in location.names:
        raise FormatError(
            "names no iteration" if step is None else f"names {name}, which is missing",
            path=file.name,
            found=", ".join(n for n in location.names if n.startswith("iter_")) or "no iteration at all",
            remedy="open one of the iterations that are there",
        )
    if TRACKER in location.names:
        text = location.open(TRACKER).read_all(64).decode("ascii", "replace").strip()
        if text != str(step):
            warnings.append(f"{LATEST} names iteration {step} and {TRACKER} {text!r}; Megatron-Bridge takes the former")
    return location.at(name)


def _train_state(file: ByteSource) -> dict[str, int]:
    """The counts in a ``train_state.pt``, a dictionary of tensors without axes.

    Raises:
        FormatError: it is damaged, or a count is not possible.
    """
    root = read_torch(file).root
    if not isinstance(root, dict):
        raise FormatError("is not a dictionary", path=file.name, found=type(root).__name__)
    counts: dict[str, int] = {}
    for name, value in root.items():
        if not isinstance(value, LazyTensor) or value.dtype.kind != "integer":
            continue
        number = int(value.numpy().reshape(-1)[0]) if value.size == 1 else -1
        if not 0 <= number < _LARGEST:
            raise FormatError("is not a count", path=file.name, tensor=str(name), found=f"{value.shape}, {number}")
        counts[str(name)] = number
    return counts


def _payload(inner: Location, path: str) -> Checkpoint:
    if COMMIT not in inner.names and COMMON not in inner.names and ".metadata" in inner.names:
        found, folder = read_dcp(inner), inner.folder()
        others = [name for name in folder.names() if not name.endswith(".distcp") and name not in _OF_PAYLOAD]
        artifacts = {name: folder.open(name) for name in others}
        return replace(
            found,
            tokenizer=tokenizer_of(artifacts),
            artifacts={name: source for name, source in artifacts.items() if not name.startswith("tokenizer/")},
            details={**found.details, "backend": FSDP},
        )
    return read_payload(inner.folder(), path=path)


def _layout(arguments: Mapping[str, Any], stored: ParallelLayout) -> ParallelLayout:
    """The sizes that the configuration states; else what the payload shows."""

    def size(key: str, otherwise: int) -> int:
        value = arguments.get(f"{key}_model_parallel_size")
        return value if type(value) is int and value > 0 else otherwise

    return ParallelLayout(
        size("tensor", stored.tensor_parallel),
        size("pipeline", stored.pipeline_parallel),
        size("virtual_pipeline", stored.virtual_pipeline),
        size("expert", stored.expert_parallel),
    )


def _hf_tokenizer(artifacts: Mapping[str, ByteSource]) -> Tokenizer | None:
    """The tokenizer among the Hugging Face assets, or None."""
    inside = {name.removeprefix(_HF): source for name, source in artifacts.items() if name.startswith(_HF)}
    files = {
        name: source
        for name, source in inside.items()
        if "/" not in name and name not in _HF_OTHERS and not name.endswith((".safetensors", ".index.json", ".bin"))
    }
    return Tokenizer("huggingface", files) if any(name in files for name in _HF_TOKENIZER) else None


def _hf_model_id(model: Mapping[str, Any]) -> str | None:
    extra = model.get("extra_checkpoint_metadata")
    found = (extra.get("hf_model_id") if isinstance(extra, Mapping) else None) or model.get("hf_model_id")
    return found if isinstance(found, str) else None
