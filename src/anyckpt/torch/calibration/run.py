"""Running a model over token ids, layer by layer, and gathering its statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import UsageError
from anyckpt.indexing import Array
from anyckpt.operations.steps.calibration_data import check_positions
from anyckpt.quantization.statistics import ALPHAS, Seen, Shared, Statistics, digest_of
from anyckpt.tensor import LazyTensor
from anyckpt.torch.calibration import awq
from anyckpt.torch.calibration.lockstep import Pass, run_in_step
from anyckpt.torch.calibration.model import LazyModel, Rows, give_back
from anyckpt.torch.calibration.seeing import (
    KeysAndValues,
    Linears,
    Noted,
    Observer,
    Sharing,
    every_expert,
    note_inputs,
)

Advance = Callable[[int, int], None]


def calibrate(
    hub: Checkpoint,
    weights: Mapping[str, LazyTensor],
    batches: Sequence[Array],
    *,
    group_size: int | None = None,
    computed_in: str = "bfloat16",
    facts: Mapping[str, Any] | None = None,
    progress: Advance | None = None,
) -> Statistics:
    """What goes into a model's linear modules while it reads.

    Args:
        hub: the model under Hugging Face's names, with its configuration; nothing of it is held in memory.
        weights: those of linear modules that are looked at, by name.
        batches: token ids, int64 ``[sequences, tokens]``.
        group_size: search for AWQ's factors with groups of so many columns; None not to.
        computed_in: torch's name of the type that the model runs in.
        facts: go into the statistics.
        progress: called with (bytes of weights that ran, bytes in all).

    Raises:
        UsageError: transformers has no such model, or ids or sequences do not fit it.
        FormatError: bytes are missing from a file, or what goes into a module is no number.
    """
    model = LazyModel(hub, getattr(torch, computed_in))
    _check_fit(model, batches)
    layers = model.layers(weights)
    run = _Run(model, weights, layers, group_size, progress)
    run.go(batches)
    used = {f"{name}.weight": weights[f"{name}.weight"] for name in run.found}
    return Statistics(
        digest_of(used), computed_in, run.found, tuple(run.shared), run.caches(), group_size, dict(facts or {})
    )


class _Run:
    """One calibration."""

    def __init__(
        self,
        model: LazyModel,
        weights: Mapping[str, LazyTensor],
        layers: Mapping[str, nn.Module],
        group_size: int | None,
        progress: Advance | None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.found: dict[str, Seen] = {}
        self.shared: list[Shared] = []
        self._chosen = {name.removesuffix(".weight") for name in weights}
        self._group = group_size
        self._progress = progress
        self._outside = _outside(model, layers)
        self._kept: dict[int, tuple[float, float]] = {}
        self._attentions: dict[int, str] = {}
        self._sizes = {name: model.bytes_of(name) for name in layers}
        self._done = 0
        self._fault: Exception | None = None

    def go(self, batches: Sequence[Array]) -> None:
        for name, module in self._outside.items():
            module.register_forward_pre_hook(self._ours(partial(self._before, name)))
        forwards = [partial(self._forward, torch.from_numpy(np.ascontiguousarray(ids))) for ids in batches]
        try:
            run_in_step(forwards, self.layers, self._through)
        except RuntimeError as error:
            if not _is_of_memory(error):
                raise
            raise UsageError(
                f"{self.model.path}: there is not enough memory to run a batch through a layer",
                found=f"{max(ids.size for ids in batches):,} tokens in a batch",
                remedy="lower --calib-batch-size",
            ) from error

    def caches(self) -> dict[str, tuple[float, float]]:
        """Largest magnitudes of keys and values by the attention's module in the checkpoint."""
        return {self._attentions[number]: pair for number, pair in self._kept.items() if number in self._attentions}

    def _forward(self, ids: torch.Tensor) -> None:
        cache = KeysAndValues(self._kept)
        with self._told_of_model():
            self.model.module(input_ids=ids, use_cache=True, **{self.model.cache_argument: cache})

    @contextmanager
    def _told_of_model(self) -> Iterator[None]:
        """Whatever the model's own code raises, which may be anything, is told as the model's; not what is ours."""
        try:
            yield
        except Exception as error:
            if error is self._fault or _is_of_memory(error):
                raise
            raise UsageError(
                f"{self.model.path}: transformers' {type(self.model.whole).__name__} does not run here",
                found=f"{type(error).__name__}: {error}".splitlines()[0][:160],
                remedy="look at what it says, or choose an algorithm that needs no activations",
            ) from error

    def _ours(self, call: Callable[..., None]) -> Callable[..., None]:
        """What the model calls of ours: its errors are no fault of the model."""

        def ours(*args: Any) -> None:
            try:
                call(*args)
            except Exception as error:
                self._fault = error
                raise

        return ours

    def _before(self, name: str, module: nn.Module, inputs: Any) -> None:
        if any(one.is_meta for one in module.parameters(recurse=False)):
            self.model.load(name, module, recurse=False)

    def _through(self, name: str, passes: list[Pass]) -> None:
        """Let all batches through a layer: once to look at inputs, and once more for AWQ's search."""
        for outside in self._outside.values():
            self.model.free(outside, recurse=False)
        layer = self.layers[name]
        self.model.load(name, layer)
        looked = _Looked(self.model.path)
        kept = set(self._kept)
        with torch.no_grad():
            for number, one in enumerate(passes):
                with nullcontext() if number else looked.sharing(self.model, layer, name):
                    output = self._run(one, name, looked.look)
                if self._group is None:
                    one.go_on(output)
                del output
            if self._group is not None:
                self._search(name, passes, looked)
            for module in [one for one in looked.noted if one in self._chosen]:
                self.found[module] = looked.result(module, self._group)
        for number in self._kept.keys() - kept:
            self._attentions[number] = self._attention(name, layer, number)
        self.shared += looked.shared
        self.model.free(layer)
        give_back()
        self._done += self._sizes[name]
        if self._progress is not None:
            self._progress(self._done, sum(self._sizes.values()))

    def _run(self, one: Pass, name: str, seen: Observer) -> Any:
        layer = self.layers[name]
        with every_expert(layer), Linears(self.model, layer, name, self._ours(seen)), self._told_of_model():
            return one.call()

    def _search(self, name: str, passes: list[Pass], looked: _Looked) -> None:
        """Let all batches through once more, and on, while the losses of each exponent are summed."""
        assert self._group is not None
        group = self._group
        wanted = {
            module: (looked.noted[module].mean / looked.noted[module].batches, awq.within_groups(weight, group))
            for module, weight in looked.matrices.items()
            if module in self._chosen and weight.shape[1] % group == 0
        }

        def compare(rows: list[Rows], inputs: torch.Tensor, weight: torch.Tensor) -> None:
            for one in rows:
                if one.module in wanted:
                    own = weight[one.start : one.start + one.count]
                    found = awq.losses(inputs, own, *wanted[one.module], group)
                    before = looked.noted[one.module].losses or [0.0] * len(found)
                    looked.noted[one.module].losses = [a + b for a, b in zip(before, found, strict=True)]

        for one in passes:
            one.go_on(self._run(one, name, compare))

    def _attention(self, name: str, layer: nn.Module, number: int) -> str:
        """The name in the checkpoint of the module of a layer that keeps keys and values under a number."""
        for own, module in layer.named_modules():
            if own and getattr(module, "layer_idx", None) == number:
                for parameter, _ in module.named_parameters():
                    rows = self.model.rows(f"{name}.{own}.{parameter}")
                    if rows:
                        return rows[0][0].module.rpartition(".")[0]
        return ""


class _Looked:
    """What was noted of a layer's modules while all batches went through it."""

    def __init__(self, path: str) -> None:
        self.noted: dict[str, Noted] = {}
        self.matrices: dict[str, torch.Tensor] = {}
        self.shared: list[Shared] = []
        self._path = path
        self._sharing: Sharing | None = None

    def look(self, rows: list[Rows], inputs: torch.Tensor, weight: torch.Tensor) -> None:
        if self._sharing is not None:
            self._sharing.note(rows, inputs)
        note_inputs(self.noted, rows, inputs, self._path)
        self.matrices.update({one.module: weight[one.start : one.start + one.count] for one in rows})

    @contextmanager
    def sharing(self, model: LazyModel, layer: nn.Module, name: str) -> Iterator[None]:
        """While it lasts, which modules share their input is noted, too; one batch tells."""
        self._sharing = Sharing()
        with self._sharing.watching(model, layer, name):
            yield
        groups = {tuple(group): self._sharing.norms.get(key, "") for key, group in self._sharing.groups.items()}
        self.shared = [Shared(modules, norm) for modules, norm in groups.items()]
        self._sharing = None

    def result(self, module: str, group: int | None) -> Seen:
        noted, weight = self.noted[module], self.matrices[module]
        losses = scales = None
        if group is not None and noted.losses:
            losses = np.array(noted.losses)
            alpha = ALPHAS[int(losses.argmin())]
            found = awq.scales(noted.mean / noted.batches, awq.within_groups(weight, group), alpha)
            scales = found.numpy().copy()
        columns = weight.abs().amax(0).float().numpy().copy()
        return Seen(noted.inputs.numpy().copy(), columns, noted.tokens, losses, scales)


def _is_of_memory(error: Exception) -> bool:
    """Whether it is what torch raises, which has no type for it, where a processor's memory does not suffice."""
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _outside(model: LazyModel, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules with parameters of their own that are in no layer, by their names in the whole model."""
    within = tuple(f"{name}." for name in layers)
    found = {f"{model.prefix}{own}".rstrip("."): module for own, module in model.module.named_modules()}
    return {
        name: module
        for name, module in found.items()
        if module._parameters and name not in layers and not name.startswith(within)
    }


def _check_fit(model: LazyModel, batches: Sequence[Array]) -> None:
    """Raise UsageError unless the model can read these ids."""
    config = model.whole.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rows, positions = getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None)
    if not batches or not all(ids.size for ids in batches):
        raise UsageError("there is nothing to calibrate with", expected="at least one token")
    check_positions(model.path, positions, max(ids.shape[1] for ids in batches))
    largest = max(int(ids.max()) for ids in batches)
    if min(int(ids.min()) for ids in batches) < 0 or (isinstance(rows, int) and largest >= rows):
        raise UsageError(
            f"{model.path}: token ids are not of the model's vocabulary",
            expected=f"0 to {rows - 1}" if isinstance(rows, int) else "0 and more",
            found=largest,
            remedy="give the ids, or the tokenizer, that the model was trained with",
        )
