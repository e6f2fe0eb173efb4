"""Opens DeepSpeed checkpoints: float32 weights and the optimizer's moments by parameter, put together of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from itertools import chain
from typing import Any

from anyckpt.checkpoint import Checkpoint, TrainingState
from anyckpt.containers.torch_file import TorchContents, read_torch_files
from anyckpt.containers.torch_file.checksums import stored_checksums
from anyckpt.containers.torch_file.parts import stated_shapes
from anyckpt.containers.torch_file.values import brief
from anyckpt.data_classes import dataclass
from anyckpt.dtypes import dtype
from anyckpt.errors import FormatError
from anyckpt.formats.deepspeed.location import Files, find
from anyckpt.formats.deepspeed.partitions import Layout, Vectors, check_slices, divided_groups, divided_parameters
from anyckpt.formats.deepspeed.universal import read_parameters
from anyckpt.formats.shared.hub_folder import other_files, read_json, tokenizer_of
from anyckpt.formats.shared.hub_folder import training_state as trainer_state
from anyckpt.formats.shared.one_save import GATHER, apart
from anyckpt.indexing import Shape
from anyckpt.optimizer.state import whole_number
from anyckpt.storage.location import Location
from anyckpt.tensor import LazyTensor, concatenate

_STATE = "optimizer.state"
_GROUPS = "optimizer.param_groups"
_HALF = ("bfloat16", "float16")
_TOLD = (
    "module",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
    "buffer_names",
    "optimizer",
)
"""Entries of the model states that are read; all others are shown as they are."""


@dataclass
class _Opened:
    """What has been read so far."""

    files: Files
    contents: list[TorchContents] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def roots(self, paths: Sequence[str]) -> list[Mapping[str, Any]]:
        opened = read_torch_files(map(self.files.folder.place.open, paths))
        self.contents += opened
        for path, contents in zip(paths, opened, strict=True):
            if not isinstance(contents.root, dict):
                raise apart("is not a file of DeepSpeed", path=path, expected="a dictionary")
        return [contents.root for contents in opened]


@dataclass
class _Optimizer:
    """The optimizer by parameter."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)


def read(location: Location) -> Checkpoint:
    """Open a save of DeepSpeed, the newest if the folder is that of all saves.

    Weights are the optimizer's own, in float32, as ``zero_to_fp32`` gives them; frozen parameters and buffers are what
    the model states hold, 16-bit buffers widened to float32.  Without ZeRO, weights are those of the model states.

    Raises:
        FormatError: ranks are missing or of different saves, or parameters do not lie where their shapes put them.
    """
    files = find(location)
    opened = _Opened(files)
    if not files.models:
        raise apart(
            "has no model states, which say what the parameters are called",
            path=files.folder.path,
            expected="mp_rank_00_model_states.pt or zero_pp_rank_0_mp_rank_00_model_states.pt",
        )
    models = opened.roots(files.models)
    first = models[0]
    module = first.get("module")
    if not isinstance(module, dict):
        raise apart("has no module", path=files.models[0], expected="a state dict")
    stage = "no ZeRO"
    optimizer = _Optimizer()
    weights: dict[str, LazyTensor] = {}
    if files.universal is not None:
        weights, optimizer.tensors, step = read_parameters(files.universal, opened.contents, _STATE)
        optimizer.objects = {} if step is None else {f"{_GROUPS}.0.step": step}
        stage = "universal"
    elif files.optimizers:
        stage = _read_zero(opened, models, weights, optimizer)
    tensors = _in_order(opened, module, models, weights)
    config = read_json(files.root.open("config.json")) if "config.json" in files.root.names else {}
    tokenizer, artifacts = other_files(files.root, "config.json")
    for name in ("latest", "latest_universal", "zero_to_fp32.py"):
        artifacts.pop(name, None)
    if any(name.endswith("_states.pt") for name in files.root.names):
        artifacts = {}
    others = tuple(name for name in files.root.names if not name.startswith("global_step"))
    trainer = trainer_state(replace(files.root, names=others), artifacts, opened.warnings)
    step = first.get("global_steps")
    version = first.get("ds_version")
    world = max(len(files.optimizers), len(files.models))
    return Checkpoint(
        location.path,
        "deepspeed",
        {**tensors, **optimizer.tensors},
        format_version=" ".join(filter(None, (version if isinstance(version, str) else None, stage))),
        dialect="hf" if config else None,
        state_prefixes=(f"{_STATE}.",) if optimizer.tensors else (),
        objects={**{str(key): value for key, value in first.items() if key not in _TOLD}, **optimizer.objects},
        config=config,
        config_kind="hf" if config else None,
        tokenizer=tokenizer_of(tokenizer),
        artifacts=artifacts,
        training=TrainingState(
            step=step if type(step) is int else trainer.step,
            epoch=trainer.epoch,
            has_optimizer=bool(optimizer.tensors),
            has_scheduler=first.get("lr_scheduler") is not None or trainer.has_scheduler,
            has_rng=trainer.has_rng,
        ),
        warnings=[*dict.fromkeys(text for contents in opened.contents for text in contents.warnings), *opened.warnings],
        details={"stage": stage, "world_size": world, "save": files.folder.name},
        checksums=lambda: chain.from_iterable(map(stored_checksums, opened.contents)),
    )


def _read_zero(
    opened: _Opened, models: Sequence[Mapping[str, Any]], weights: dict[str, LazyTensor], optimizer: _Optimizer
) -> str:
    """Add the trained weights and the optimizer's state; gives the stage in words."""
    paths = opened.files.optimizers
    states = []
    for path, root in zip(paths, opened.roots(paths), strict=True):
        state = root.get("optimizer_state_dict")
        if not isinstance(state, dict):
            raise apart("is not an optimizer's state of DeepSpeed", path=path)
        states.append(state)
    first, world = states[0], len(states)
    _check_world(first, world, paths[0])
    third = "fp32_flat_groups" in first
    key = "fp32_flat_groups" if third else "single_partition_of_fp32_groups"
    vectors = [_vectors(state.get(key), path, key) for state, path in zip(states, paths, strict=True)]
    stated = models[0].get("param_shapes")
    groups = [stated_shapes(group) for group in (stated if isinstance(stated, list) else [stated])]
    _check_names(groups, models, opened.files.models)
    if third:
        if len(models) != world:
            raise apart(
                "the model states are of another number of ranks than the optimizer's",
                path=opened.files.folder.path,
                expected=f"{world} ranks",
                found=f"{len(models)} ranks",
            )
        layout = divided_parameters(groups, vectors, opened.files.folder.path)
        inner = [state.get("optimizer_state_dict") for state in states]
    else:
        layout = divided_groups(groups, vectors, _paddings(first, paths[0]), opened.files.folder.path)
        check_slices(layout, [state.get("param_slice_mappings") for state in states], opened.files.folder.path)
        inner = [state.get("base_optimizer_state") for state in states]
    weights.update(layout.tensors(vectors))
    _read_moments(opened, layout, vectors, inner, first.get("base_optimizer_state_step"), optimizer)
    number = first.get("zero_stage")
    value = getattr(number, "args", None)
    plain = number if type(number) is int else value[0] if value and type(value[0]) is int else None
    return f"ZeRO stage {3 if third else plain or 1}"


def _check_world(state: Mapping[str, Any], world: int, path: str) -> None:
    count = state.get("partition_count")
    stated = count if isinstance(count, (list, tuple)) else [count]
    counts = {own if type(own) is int else None for own in stated}
    if counts != {world}:
        several = len(counts) > 1
        raise FormatError(
            "the parameter groups are cut over different numbers of ranks, as those of experts are"
            if several
            else "the optimizer's files are not those of all ranks",
            path=path,
            expected=f"partition_count {world}, as there are files" if several else f"{brief(count)} files",
            found=brief(count) if several else f"{world} files",
            remedy="convert it with DeepSpeed's ds_to_universal.py first" if several else GATHER,
        )
    groups = state.get("ds_zero_partition_groups")
    for group in groups if isinstance(groups, (list, tuple)) else ():
        if isinstance(group, dict) and group.get("partition_count", world) != world:
            raise FormatError(
                "a parameter group is cut over a part of the ranks, as those of experts are",
                path=path,
                found=f"partition_count {brief(group.get('partition_count'))} of {world} ranks",
                remedy="convert it with DeepSpeed's ds_to_universal.py first",
            )


def _vectors(groups: Any, path: str, key: str) -> list[LazyTensor]:
    if not isinstance(groups, (list, tuple)) or not all(isinstance(g, LazyTensor) and g.ndim == 1 for g in groups):
        raise apart("has no flat partitions of float32 weights", path=path, expected=key)
    return list(groups)


def _paddings(state: Mapping[str, Any], path: str) -> list[list[int]] | None:
    stated = state.get("param_alignment_paddings")
    if stated is None:
        return None
    if not isinstance(stated, (list, tuple)) or not all(
        isinstance(own, (list, tuple)) and all(type(n) is int and n >= 0 for n in own) for own in stated
    ):
        raise apart("its param_alignment_paddings are of unknown form", path=path)
    return [list(own) for own in stated]


def _check_names(
    groups: Sequence[Mapping[str, Shape]], models: Sequence[Mapping[str, Any]], paths: Sequence[str]
) -> None:
    """Raise FormatError unless all ranks' model states list the same parameters."""
    if not any(groups):
        raise apart("does not list its parameters", path=paths[0], expected="param_shapes")
    listed = stated_shapes(models[0].get("param_shapes"))
    for model, path in zip(models, paths, strict=True):
        own = stated_shapes(model.get("param_shapes"))
        if list(own.items()) != list(listed.items()):
            strange = next((n for n in own if own[n] != listed.get(n)), next((n for n in listed if n not in own), None))
            raise apart(
                "its parameters are not those of rank 0, as if it were of another model",
                path=path,
                tensor=strange,
                expected=f"those of {paths[0].rpartition('/')[2]}",
            )


def _read_moments(
    opened: _Opened, layout: Layout, vectors: Vectors, states: Sequence[Any], step: Any, optimizer: _Optimizer
) -> None:
    """Add the optimizer's state by parameter; a warning where there is none, or it is of another form."""
    by_group = [_by_group(state) for state in states]
    slots = sorted({slot for own in by_group for group in own for slot, value in group.items() if _is_flat(value)})
    if not slots:
        opened.warnings.append("the files hold no state of the optimizer besides the float32 weights")
        return
    steps = {whole_number(group.get("step")) for own in by_group for group in own} | {whole_number(step)}
    steps.discard(None)
    if len(steps) > 1:
        raise apart(
            "ranks or parameter groups are of different optimizer steps",
            path=opened.files.folder.path,
            found=", ".join(sorted(map(str, steps))[:8]),
        )
    for slot in slots:
        own: list[list[LazyTensor]] = []
        for rank, groups in enumerate(by_group):
            flat = [group.get(slot) for group in groups]
            needed = [vector.size for vector in vectors[rank]]
            if len(flat) != len(needed) or not all(
                isinstance(f, LazyTensor) and f.ndim == 1 and f.size >= n for f, n in zip(flat, needed, strict=True)
            ):
                raise apart(
                    f"the optimizer's {slot} does not fit the partitions of the weights",
                    path=opened.files.optimizers[rank],
                    expected=f"{len(needed)} vectors of {needed[:4]} elements",
                    found=f"{[f.shape if isinstance(f, LazyTensor) else None for f in flat[:4]]}",
                )
            own.append([f for f in flat if isinstance(f, LazyTensor)])
        for name, tensor in layout.tensors(own).items():
            optimizer.tensors[f"{_STATE}.{name}.{slot}"] = tensor
    _read_groups(layout, states[0], next(iter(steps), None), optimizer)


def _by_group(state: Any) -> list[Mapping[str, Any]]:
    """The optimizer's state of each flat vector: ``torch.optim``'s, or (elastic) a list of them."""
    if isinstance(state, list):
        return [own if isinstance(own, dict) else {} for own in state]
    numbered = state.get("state") if isinstance(state, dict) else None
    if not isinstance(numbered, dict):
        return []
    order = sorted(number for number in numbered if type(number) is int)
    return [numbered[number] if isinstance(numbered[number], dict) else {} for number in order]


def _is_flat(value: Any) -> bool:
    return isinstance(value, LazyTensor) and value.ndim == 1


def _read_groups(layout: Layout, state: Any, step: int | None, optimizer: _Optimizer) -> None:
    """Hyperparameters of the parameter groups; of stage 3, whose groups are cut into more, where one is of all."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    groups = [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    names: dict[int, list[str]] = {}
    for name, number in layout.group_of.items():
        names.setdefault(number, []).append(name)
    vectors = [group.get("params") for group in groups]
    for number, group in enumerate(groups):
        listed = vectors[number]
        held = listed if isinstance(listed, list) else []
        own = [name for vector in held if type(vector) is int for name in names.get(vector, ())]
        for key, value in group.items():
            if type(key) is str and key not in ("params", "step") and not isinstance(value, LazyTensor):
                optimizer.objects[f"{_GROUPS}.{number}.{key}"] = value
        optimizer.objects[f"{_GROUPS}.{number}.params"] = own
    if step is not None:
        optimizer.objects[f"{_GROUPS}.0.step"] = step


def _in_order(
    opened: _Opened, module: Mapping[Any, Any], models: Sequence[Mapping[str, Any]], weights: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """All tensors of the model in the order of its modules: trained, frozen, shared ones and buffers."""
    first = models[0]
    path = opened.files.models[0]
    frozen = _frozen(models, opened.files.models)
    shared = _shared(first.get("shared_params"))
    buffers = first.get("buffer_names")
    known: dict[str, LazyTensor] = {**frozen, **weights}
    found: dict[str, LazyTensor] = {}
    for key, value in module.items():
        name = str(key)
        source = name if name in known else shared.get(name, name)
        if source in known:
            found[name] = known[source]
        elif isinstance(value, LazyTensor):
            stated = stated_shapes(first.get("param_shapes")).get(name)
            if value.size == 0 and len(models) > 1 and not (isinstance(buffers, list) and name in buffers):
                raise apart(
                    "is empty in the model states, and no other file has it",
                    path=path,
                    tensor=name,
                    expected=stated or "its elements in the optimizer's files",
                )
            widened = isinstance(buffers, list) and name in buffers and value.dtype.name in _HALF and bool(weights)
            found[name] = value.cast(dtype("float32")) if widened else value
        else:
            opened.warnings.append(f"{name} in the module is no tensor and left out")
    found.update((name, tensor) for name, tensor in known.items() if name not in found)
    found.update((name, known[of]) for name, of in shared.items() if name not in found and of in known)
    return found


def _shared(stated: Any) -> dict[str, str]:
    """Name that is not stored -> the one that holds its elements."""
    pairs = stated.items() if isinstance(stated, dict) else stated if isinstance(stated, list) else ()
    return {
        pair[0]: pair[1]
        for pair in pairs
        if isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
    }


def _frozen(models: Sequence[Mapping[str, Any]], paths: Sequence[str]) -> dict[str, LazyTensor]:
    """Parameters that are not trained: whole up to stage 2, a piece of each on every rank under stage 3."""
    found: dict[str, LazyTensor] = {}
    for name, shape in stated_shapes(models[0].get("frozen_param_shapes")).items():
        pieces: list[LazyTensor] = []
        for model, path in zip(models, paths, strict=True):
            fragments = model.get("frozen_param_fragments")
            piece = fragments.get(name) if isinstance(fragments, dict) else None
            if not isinstance(piece, LazyTensor):
                raise apart("has not its piece of a frozen parameter", path=path, tensor=name)
            pieces.append(piece)
        if pieces[0].shape == shape:
            found[name] = pieces[0]
            continue
        flat = concatenate([piece.reshape((-1,)) if piece.size else piece.reshape((0,)) for piece in pieces], 0)
        count = 1
        for length in shape:
            count *= length
        if not count <= flat.size < count + len(pieces):
            raise apart(
                "the ranks' pieces do not make up a frozen parameter",
                path=paths[0],
                tensor=name,
                expected=f"{count} elements for {shape}",
                found=f"{flat.size} elements",
            )
        found[name] = flat.narrow(0, 0, count).reshape(shape)
    return found
