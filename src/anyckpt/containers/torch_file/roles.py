"""Which tensors of a torch file are the model's weights, told by how the file is built.

Trainers agree on no names, but on forms.  The state of an optimizer is ``{state, param_groups}`` at any depth.  A
network is an entry with a dictionary of named tensors, as ``state_dict()`` gives it: names of modules, dots between
them.  One network is the model, and its names need nothing before them; several (a generator and its discriminators,
an actor and a critic) are all weights, under the names of their entries, and so are then the small tables of tensors
beside them.  Numbers beside a network are no weights.

A copy of a network that averages its weights (EMA) is training state where an optimizer is there to go on with; in a
file without one it was put in to be used.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from functools import lru_cache
from typing import Any

from anyckpt.checkpoint import TrainingState
from anyckpt.containers.torch_file.flatten import Flat, Path
from anyckpt.data_classes import dataclass
from anyckpt.pickling import Record

_OPTIMIZER = frozenset({"optim", "optimizer", "optimizers", "optimiser", "optimisers"})
_SCHEDULER = frozenset({"sched", "scheduler", "schedulers"})
_RANDOM = frozenset({"rng", "random"})
_OTHER = frozenset({"scaler", "scalers", "callbacks", "loops"})
_AVERAGED = frozenset({"ema", "swa", "averaged", "average", "shadow"})
_LEAF_NAMES = frozenset({"weight", "bias"})
_WRAPPERS = ("module.", "_orig_mod.")
_GENERATOR_BYTES = (5056, 816, 16)
"""Bytes of a generator's state: Python and CPU, CUDA until torch 1.8, CUDA since."""
_STEPS = tuple(
    """
    global_step global_steps iteration step steps iter iter_num num_updates training_step iterations current_step
    current_iteration
    """.split()
)
_EPOCHS = ("epoch", "current_epoch", "last_epoch")
_SETTINGS = frozenset({"args", "cfg", "config", "configs", "hparams", "hyper", "settings", "params", "options"})
_DEEPEST_COUNTER = 4


@dataclass(frozen=True)
class Roles:
    """What the tensors of a file are.

    Attributes:
        prefix: what precedes the weights' own names.
        states: names that begin with one of these are no weights.
        averaged: entries that are an averaged copy of the weights, and training state.
    """

    prefix: str
    states: tuple[str, ...]
    averaged: tuple[str, ...] = ()


def is_filled(value: Any) -> bool:
    """Whether an entry is there and not an empty container."""
    return value is not None and not (isinstance(value, (dict, list, tuple)) and not value)


@lru_cache(maxsize=4096)
def _words(key: str | int) -> frozenset[str]:
    """``optimG`` and ``lr_scheduler`` as words in lower case."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(key)[:200])
    return frozenset(re.split(r"[^a-z0-9]+", parted.lower()))


@dataclass
class _Entry:
    """Tensors that lie together.

    Attributes:
        path: of what holds them.
        names: of the tensors.
        named: they are in a dictionary, by text.
        strong: some are named as tensors of a module are.
        dotted: and some as those of a module in a module.
    """

    path: Path
    names: list[str] = field(default_factory=list)
    named: bool = False
    strong: bool = False
    dotted: bool = False

    def add(self, name: str, path: Path, flat: Flat) -> None:
        last = path[-1] if path else ""
        self.names.append(name)
        of_module = bool(flat.modules) and any(path[:depth] in flat.modules for depth in range(len(path)))
        if of_module or (type(last) is str and path not in flat.original_keys):
            self.named = True
            self.dotted = self.dotted or of_module or "." in str(last)
            self.strong = self.strong or self.dotted or last in _LEAF_NAMES


def roles(flat: Flat) -> Roles:
    """Which of a file's tensors are the model's weights."""
    paths = {name: _path_of(name, flat) for name in flat.tensors}
    optimizers = set(flat.optimizers)
    states = {name for name, path in paths.items() if _is_state(name, path, flat, optimizers)}
    impure = {path[:depth] for path in (*optimizers, *map(paths.__getitem__, states)) for depth in range(len(path))}
    rest = [name for name in paths if name not in states]
    entries = _entries(rest, paths, impure, flat)
    networks = [entry for entry in entries if entry.strong]
    if not any(entry.dotted for entry in networks):
        networks = [entry for entry in entries if entry.named]
    averaged: list[_Entry] = []
    if optimizers or any(_is_called_optimizer(paths[name]) for name in states):
        averaged = [entry for entry in networks if _is_average(entry, networks, flat)]
        networks = [entry for entry in networks if entry not in averaged]
    chosen = set(rest)
    prefix: Path = ()
    if len(networks) == 1:
        chosen = set(networks[0].names)
        prefix = _innermost(networks[0], paths, flat)
    elif networks:
        chosen = {name for entry in entries if entry.named and entry not in averaged for name in entry.names}
        prefix = _common([entry.path for entry in networks])
    if not any(entry.strong for entry in networks) and any(_leads_through_numbers(paths[n], flat) for n in chosen):
        prefix = ()
    prefix = _outside_tensors(prefix, flat)
    return Roles(
        "".join(f"{step}." for step in prefix),
        _state_prefixes(paths, chosen, prefix),
        tuple(_dotted(entry.path) for entry in averaged),
    )


def _path_of(name: str, flat: Flat) -> Path:
    """Where a tensor is; a part of a tensor of several is where the whole is."""
    known = flat.paths.get(name)
    return flat.paths.get(name.rpartition(".")[0], (name,)) if known is None else known


def _is_state(name: str, path: Path, flat: Flat, optimizers: set[Path]) -> bool:
    if any(path[:depth] in optimizers for depth in range(len(path) + 1)):
        return True
    if any(path[:depth] in flat.beside for depth in range(1, len(path) + 1)):
        return True
    if _is_called_optimizer(path):
        return True
    tensor = flat.tensors[name]
    is_generator = tensor.dtype.name == "uint8" and len(tensor.shape) == 1 and tensor.shape[0] in _GENERATOR_BYTES
    return is_generator and any(_words(step) & _RANDOM for step in path)


def _is_called_optimizer(path: Path) -> bool:
    return any(_words(step) & _OPTIMIZER for step in path[: min(2, len(path) - 1)])


def _entries(names: Iterable[str], paths: Mapping[str, Path], impure: set[Path], flat: Flat) -> list[_Entry]:
    """Tensors by the outermost entry that holds no state; those beside such entries by what holds them."""
    found: dict[Path, _Entry] = {}
    bare: dict[Path, _Entry] = {}
    for name in names:
        path = paths[name]
        depth = next((depth for depth in range(1, len(path)) if path[:depth] not in impure), None)
        module = next((depth for depth in range(len(path)) if path[:depth] in flat.modules), None)
        if module is not None and (depth is None or depth > module):
            depth = module
        where, table = (path[:-1], bare) if depth is None else (path[:depth], found)
        table.setdefault(where, _Entry(where)).add(name, path, flat)
    for where, entry in bare.items():
        if entry.strong:  # a state dict with other things in it: what is below it is its own
            below = [path for path in found if path[: len(where)] == where]
            entry.names += [name for path in below for name in found.pop(path).names]
        else:
            entry.names = [name for name in entry.names if flat.tensors[name].shape]
        if entry.names:
            found[where] = entry
    other = _RANDOM | _SCHEDULER | _OTHER
    return [entry for entry in found.values() if entry.strong or not any(_words(step) & other for step in entry.path)]


def _is_average(entry: _Entry, networks: list[_Entry], flat: Flat) -> bool:
    """Whether an entry is called an average, and another has tensors of the same names and shapes."""
    if not any(_words(step) & _AVERAGED for step in entry.path):
        return False
    own = _relative(entry, flat)
    for other in networks:
        if other is not entry and not any(_words(step) & _AVERAGED for step in other.path):
            theirs = _relative(other, flat)
            if 2 * sum(theirs.get(name) == shape for name, shape in own.items()) > len(own):
                return True
    return False


def _relative(entry: _Entry, flat: Flat) -> dict[str, tuple[int, ...]]:
    """Shapes by name inside the entry, without what wraps a module."""
    found = {}
    for name in entry.names:
        own = name.removeprefix(_dotted(entry.path)).lstrip(".")
        for wrapper in _WRAPPERS:
            own = own.removeprefix(wrapper)
        found[own] = flat.tensors[name].shape
    return found


def _innermost(entry: _Entry, paths: Mapping[str, Path], flat: Flat) -> Path:
    """The path that all of an entry's tensors lie directly at; the entry's own if they lie at several."""
    holders = {paths[name][:-1] for name in entry.names}
    if entry.path in flat.modules:
        return entry.path
    return holders.pop() if len(holders) == 1 and entry.named else entry.path


def _outside_tensors(path: Path, flat: Flat) -> Path:
    """The path, up to the first tensor of a class of its own, whose parts it may lead to."""
    for depth in range(1, len(path) + 1):
        container = flat.containers.get(path[:depth])
        if isinstance(container, Record) and container.path.startswith(
            ("torch._tensor._rebuild", "torch._utils._rebuild")
        ):
            return path[: depth - 1]
    return path


def _leads_through_numbers(path: Path, flat: Flat) -> bool:
    """Whether a tensor lies in a list or under a key that is no text: in a table, whose keys are no modules' names."""
    return any(type(path[depth - 1]) is int or path[:depth] in flat.original_keys for depth in range(1, len(path) + 1))


def _common(paths: list[Path]) -> Path:
    shared: list[str | int] = []
    for steps in zip(*paths, strict=False):
        if any(step != steps[0] for step in steps):
            break
        shared.append(steps[0])
    return tuple(shared)


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _state_prefixes(paths: Mapping[str, Path], chosen: set[str], prefix: Path) -> tuple[str, ...]:
    """Beginnings of the names of all tensors that are not chosen, and of no other."""
    kept = sorted(chosen)
    above = {paths[name][:depth] for name in chosen for depth in range(len(paths[name]))}
    found: dict[str, None] = {}
    covered: set[Path] = set()
    start = "".join(f"{step}." for step in prefix)
    for name, path in paths.items():
        if name in chosen or not name.startswith(start):
            continue
        steps = [path[:depth] for depth in range(len(prefix) + 1, len(path))]
        if any(step in covered for step in steps):
            continue
        for step in steps:
            if step not in above and not _begins(kept, f"{_dotted(step)}.") and name.startswith(f"{_dotted(step)}."):
                found[f"{_dotted(step)}."] = None
                covered.add(step)
                break
        else:
            if not _begins(kept, name):
                found[name] = None
    return tuple(found)


def _begins(names: list[str], start: str) -> bool:
    """Whether one of the sorted names begins so."""
    at = bisect_left(names, start)
    return at < len(names) and names[at].startswith(start)


def training_state(root: Any, flat: Flat) -> TrainingState:
    """Where training stood, as far as the file's counters tell: the outermost of the usual names, and of these the
    first, outside settings, optimizers and networks."""
    counters = list(_counters(root, flat))
    return TrainingState(
        step=_counter(counters, _STEPS),
        epoch=_counter(counters, _EPOCHS),
        has_optimizer=bool(flat.optimizers)
        or _has(root, _OPTIMIZER)
        or any(_is_called_optimizer(_path_of(name, flat)) for name in flat.tensors),
        has_scheduler=_has(root, _SCHEDULER),
        has_rng=_has(root, _RANDOM),
    )


def _counter(counters: list[tuple[int, str, int]], names: tuple[str, ...]) -> int | None:
    found = [(depth, names.index(key), value) for depth, key, value in counters if key in names]
    return min(found)[2] if found else None


def _inside(value: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(value, dict):
        yield from ((key, inner) for key, inner in value.items() if type(key) is str)
    elif isinstance(value, (list, tuple)) and value and isinstance(value[-1], dict):
        yield len(value) - 1, value[-1]  # a history: the last is of now


def _counters(root: Any, flat: Flat) -> Iterator[tuple[int, str, int]]:
    """Depth, key and value of every whole number, but in settings, schedulers and optimizers."""
    optimizers = set(flat.optimizers)
    todo: list[tuple[Path, Any]] = [((), root)]
    seen: set[int] = set()
    while todo:
        path, here = todo.pop()
        if path in optimizers or id(here) in seen:
            continue
        seen.add(id(here))
        for key, value in _inside(here):
            if type(value) is int and type(key) is str:
                yield len(path), key, value
            elif len(path) < _DEEPEST_COUNTER and not _words(key) & (_SETTINGS | _SCHEDULER | _OTHER):
                todo.append(((*path, key), value))


def _has(root: Any, words: frozenset[str]) -> bool:
    """Whether an entry at the top, or one level below, is called so and is filled."""
    for key, value in _inside(root):
        if is_filled(value) and (_words(key) & words or any(_is_called(k, v, words) for k, v in _inside(value))):
            return True
    return False


def _is_called(key: str | int, value: Any, words: frozenset[str]) -> bool:
    # a state dict has a hundred thousand keys, with dots, and none of them is such an entry
    return "." not in str(key) and bool(_words(key) & words) and is_filled(value)
