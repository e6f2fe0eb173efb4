"""Opens checkpoints of GPT-NeoX: tensor-parallel ranks joined, under transformers' names where it has such models.

Of a layer, what is before a product is cut along its rows (query, key and value head by head), and what is behind it
along its columns.  Norms are on every rank; as they may drift apart, they are averaged, as NeoX's converter does,
which changes nothing where they are equal.  With ``gpt-j-residual`` the outputs of attention and MLP are summed over
the ranks with their biases, so these add up.  Without it each rank adds the same bias to a sum that all have (NeoX's
converter adds those up, too).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from anyckpt.checkpoint import Checkpoint, ParallelLayout, TrainingState
from anyckpt.containers.torch_file import TorchContents, read_torch_files
from anyckpt.containers.torch_file.checksums import stored_checksums
from anyckpt.containers.torch_file.flatten import flatten
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, few
from anyckpt.formats.gpt_neox.location import FIRST_LAYER, Files, find
from anyckpt.formats.gpt_neox.settings import configuration, others_than_transformers, read_settings
from anyckpt.identity import ElementWise
from anyckpt.indexing import Array
from anyckpt.storage.location import Location
from anyckpt.tensor import LazyTensor, Mapped, concatenate

_STATE = "training."
_SEQUENTIAL = "sequential."
_ROWS = (
    "word_embeddings.weight", "final_linear.weight", "attention.query_key_value.weight",
    "attention.query_key_value.bias", "mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias",
)  # fmt: skip
_COLUMNS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")
_SUMS = ("attention.dense.bias", "mlp.dense_4h_to_h.bias")
_NORMS = tuple(
    f"{name}.{part}" for name in ("input_layernorm", "post_attention_layernorm", "norm") for part in ("weight", "bias")
)
_SAME = ("attention.rotary_emb.inv_freq",)
_NEWER = {"mlp.linear1.": "mlp.dense_h_to_4h.", "mlp.linear2.": "mlp.dense_4h_to_h."}
"""What modules are called since 2024 -> before, which is transformers' way."""
_OUTSIDE = {
    "word_embeddings.weight": "gpt_neox.embed_in.weight",
    "norm.weight": "gpt_neox.final_layer_norm.weight",
    "norm.bias": "gpt_neox.final_layer_norm.bias",
    "final_linear.weight": "embed_out.weight",
}


@dataclass(frozen=True)
class _Combined(ElementWise):
    """The sum of numbers, or their mean, computed in float64, which is exact where they are equal.

    Attributes:
        mean: the latter.
    """

    mean: bool

    def __call__(self, *arrays: Array) -> Array:
        total = arrays[0].astype(np.float64)
        for array in arrays[1:]:
            total += array.astype(np.float64)
        return (total / len(arrays) if self.mean else total).astype(arrays[0].dtype)


def read(location: Location) -> Checkpoint:
    """Open a save, the newest if the folder is that of all saves.

    Raises:
        FormatError: a file is missing or damaged, ranks do not fit one another, or how they are cut is not known.
    """
    files = find(location)
    settings = read_settings([files.folder.place.open(path) for path in files.settings])
    warnings: list[str] = []
    layers, rest, opened = _layers(files)
    first = rest[0] if rest else {}
    ranks = max((len(states) for states in layers.values()), default=1)
    tensors: dict[str, LazyTensor] = {}
    ignored: dict[str, str] = {}
    strange = [*others_than_transformers(settings)] if settings else []
    last = max((number for number, states in layers.items() if _is_transformer(states[0])), default=0)
    for number, states in layers.items():
        for name in states[0]:
            joined = _joined(name, number, states, settings, files.folder.path)
            own = _at_hub(name, number)
            if number > last and name == "word_embeddings.weight":
                ignored[f"{number}.{name}"] = "the embedding once more, which is the output layer"
            elif strange or own is None:
                tensors[f"{number}.{name}"] = joined
            else:
                tensors[own] = joined
    known = not any(name[0].isdigit() for name in tensors)
    config = _configuration(settings, tensors, files.folder.path) if known and settings else {}
    if not known:
        warnings.append(
            "it is another model than transformers' GPT-NeoX, so that its tensors keep the numbers of its pipeline's "
            f"layers: {few(strange or [name for name in tensors if name[0].isdigit()], 4)}"
        )
    elif not settings:
        warnings.append(
            "the run's settings (configs/*.yml) are not there: give the model's configuration with --config"
        )
    unread = [name for name in files.folder.names if name.endswith("_optim_states.pt")]
    if unread:
        warnings.append(f"training state that is not read: {few(unread, 3)}")
    beside = flatten({key: value for key, value in first.items() if key != "module"}, files.folder.path)
    step = next((first[key] for key in ("iteration", "global_steps") if type(first.get(key)) is int), None)
    return Checkpoint(
        location.path,
        "gpt-neox",
        {**tensors, **{_STATE + name: tensor for name, tensor in beside.tensors.items()}},
        format_version=str(first["ds_version"]) if isinstance(first.get("ds_version"), str) else None,
        dialect="hf" if known else None,
        state_prefixes=(_STATE,) if beside.tensors else (),
        objects={_STATE + name: value for name, value in beside.objects.items()},
        config=config,
        config_kind="hf" if config else None,
        layout=ParallelLayout(tensor_parallel=ranks),
        training=TrainingState(step=step, has_optimizer=bool(unread)),
        warnings=[*dict.fromkeys(text for contents in opened for text in contents.warnings), *warnings],
        ignored=ignored,
        details={"save": files.folder.name, "layer_files": sum(map(len, files.layers.values()))},
        checksums=lambda: chain.from_iterable(map(stored_checksums, opened)),
    )


_States = list[dict[str, LazyTensor]]


def _layers(files: Files) -> tuple[dict[int, _States], list[Mapping[str, Any]], list[TorchContents]]:
    """Number of a layer -> its tensors by rank, what else the ranks' files hold, and all files."""
    place = files.folder.place
    paths = [path for of_layer in files.layers.values() for path in of_layer]
    of_ranks = files.ranks if not files.layers else files.ranks[:1]
    opened = read_torch_files(map(place.open, [*paths, *of_ranks]))
    roots = []
    for path, contents in zip([*paths, *of_ranks], opened, strict=True):
        if not isinstance(contents.root, Mapping):
            raise FormatError("does not hold a dictionary", path=path, remedy="copy it again from its origin")
        roots.append(contents.root)
    rest = roots[len(paths) :]
    layers: dict[int, _States] = {}
    if files.layers:
        at = 0
        for number, of_layer in files.layers.items():
            layers[number] = [_tensors(roots[at + rank], path) for rank, path in enumerate(of_layer)]
            at += len(of_layer)
    else:
        for path, root in zip(of_ranks, rest, strict=True):
            module = root.get("module")
            for name, tensor in _tensors(module if isinstance(module, Mapping) else {}, path, _SEQUENTIAL).items():
                layer, _, own = name.partition(".")
                states = layers.setdefault(int(layer), [])
                while len(states) <= of_ranks.index(path):
                    states.append({})
                states[-1][_renamed(own)] = tensor
    _check_alike(layers, len(of_ranks) if not files.layers else None, files.folder.path)
    return {number: states for number, states in sorted(layers.items()) if states[0]}, rest, opened


def _tensors(state: Mapping[Any, Any], path: str, prefix: str = "") -> dict[str, LazyTensor]:
    """The tensors of a state dict; nothing else has a meaning here."""
    found: dict[str, LazyTensor] = {}
    for key, value in state.items():
        name = str(key)
        if isinstance(value, LazyTensor) and name.startswith(prefix):
            own = name[len(prefix) :]
            if prefix and not own.partition(".")[0].isdecimal():
                raise FormatError("is of no layer", path=path, tensor=name, expected=f"{prefix}NUMBER.NAME")
            found[own if prefix else _renamed(own)] = value
    return found


def _renamed(name: str) -> str:
    return next((old + name[len(new) :] for new, old in _NEWER.items() if name.startswith(new)), name)


def _check_alike(layers: Mapping[int, _States], ranks: int | None, path: str) -> None:
    for number, states in layers.items():
        odd = next((name for state in states[1:] for name in sorted(state.keys() ^ states[0].keys())), None)
        if odd is not None or (ranks is not None and len(states) != ranks):
            raise FormatError(
                f"layer {number} is not the same in all tensor-parallel ranks",
                path=path,
                tensor=odd,
                remedy="copy the files again, from one save",
            )


def _is_transformer(state: Mapping[str, LazyTensor]) -> bool:
    return "attention.query_key_value.weight" in state


def _joined(name: str, number: int, states: _States, settings: Mapping[str, Any], path: str) -> LazyTensor:
    """A tensor of all ranks.

    Raises:
        FormatError: its parts do not fit, or how it is cut is not known.
    """
    parts = [state[name] for state in states]
    first = parts[0]
    if len(parts) == 1 or name in _SAME:
        return first
    called = f"{number}.{name}"
    if any(part.dtype != first.dtype or part.shape != first.shape for part in parts):
        raise FormatError(
            "its parts do not fit one another",
            path=path,
            tensor=called,
            expected=f"{first.dtype.name} {first.shape} on every rank",
            found=few([f"{part.dtype.name} {part.shape}" for part in parts], 3),
        )
    if name in _ROWS and first.ndim:
        return concatenate(parts, 0)
    if name in _COLUMNS and first.ndim == 2:
        return concatenate(parts, 1)
    if name in _NORMS:
        return _combined(parts, mean=True)
    if name in _SUMS:
        if not settings:
            raise FormatError(
                "whether the ranks' biases add up is said by gpt-j-residual, and the run's settings are not there",
                path=path,
                tensor=called,
                expected="configs/*.yml",
                remedy="copy the run's configuration beside the layer files",
            )
        return _combined(parts, mean=False) if settings.get("gpt_j_residual") else first
    raise FormatError(
        "how tensor-parallel ranks cut this tensor is not known",
        path=path,
        tensor=called,
        found=first.shape,
        expected="a tensor of transformers' GPT-NeoX",
        remedy="join the ranks with GPT-NeoX's own tools/ckpts first",
    )


def _combined(parts: Sequence[LazyTensor], *, mean: bool) -> LazyTensor:
    return Mapped(tuple(parts), parts[0].dtype, _Combined(mean))


def _at_hub(name: str, number: int) -> str | None:
    """Transformers' name; None if it has no such tensor."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    known = name in (*_ROWS, *_COLUMNS, *_SUMS, *_NORMS, *_SAME)
    return f"gpt_neox.layers.{number - FIRST_LAYER}.{name}" if known else None


def _configuration(settings: Mapping[str, Any], tensors: Mapping[str, LazyTensor], path: str) -> dict[str, Any]:
    embedding = tensors.get("gpt_neox.embed_in.weight")
    inner = tensors.get("gpt_neox.layers.0.mlp.dense_h_to_4h.weight")
    if embedding is None or inner is None or not embedding.ndim or not inner.ndim:
        raise FormatError("has no embedding or no first layer", path=path, remedy="copy the missing files here too")
    config = configuration(settings, embedding.shape[0], inner.shape[0], path)
    return {**config, "dtype": embedding.dtype.name}
