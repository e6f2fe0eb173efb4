"""Which tensors of a torch file are weights: layouts of well-known trainers, and any other of the same form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import expected_of, fixture_path

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.torch_file.contents import TorchContents
from anyckpt.containers.torch_file.flatten import flatten
from anyckpt.formats import registry
from anyckpt.formats.torch import torch_checkpoint
from anyckpt.tensor import LazyTensor, from_array

LAYOUTS = expected_of("legacy/layouts")
STATE_DICT = {
    "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked",
    "2.weight", "2.bias",
}  # fmt: skip
WRAPPED = {"imagenet_example": "module.", "open_clip": "module.", "nanogpt": "_orig_mod."}
SEVERAL = {
    "hifigan_do": ("mpd", "msd"),
    "basicsr": ("params", "params_ema"),
    "dino": ("student", "teacher"),
    "gan_two": ("netG", "netD"),
    "rlalgo": ("actor", "critic"),
    "opennmt": ("model",),
}
MORE = {"dino": {"dino_loss.center"}, "opennmt": {"generator.0.weight"}}
COUNTERS = {
    "resemblyzer_rtvc": (7, None),
    "hifigan_do": (10, 1),
    "composer": (1, None),
    "fairseq": (5, 1),
    "opennmt": (5, None),
    "nnunet": (None, 5),
    "mmengine": (None, 1),
    "nanogpt": (5, None),
    "coqui": (5, 1),
}


def opened(layout: str) -> Checkpoint:
    return registry.read(fixture_path(f"legacy/layouts/{layout}.pt"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trainers_weights_have_the_names_of_its_model(layout: str) -> None:
    checkpoint = opened(layout)
    assert checkpoint.parameters == LAYOUTS[layout]
    networks = SEVERAL.get(layout)
    expected = {WRAPPED.get(layout, "") + name for name in STATE_DICT}
    if networks is not None:
        expected = {f"{network}.{name}" for network in networks for name in STATE_DICT} | MORE.get(layout, set())
    assert set(checkpoint.weights()) == (expected if LAYOUTS[layout] else set())


@pytest.mark.parametrize("layout", COUNTERS)
def test_counters_are_found_where_trainers_put_them(layout: str) -> None:
    training = opened(layout).training
    assert (training.step, training.epoch) == COUNTERS[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_optimizer_is_seen_wherever_it_is(layout: str) -> None:
    without = {"kuangliu_net", "hifigan_g", "basicsr", "deepspeed_model_states", "whisper", "espnet_averaged"}
    assert opened(layout).training.has_optimizer == (layout not in without | {"weights_key"})


def test_what_is_no_weight_is_told(tmp_path: Path) -> None:
    done = anyckpt.convert(fixture_path("legacy/layouts/yolo_like_ema.pt"), tmp_path / "x.pt", to="torch")
    assert "ema.0.weight" in done.ignored and "optimizer.state.0.exp_avg" in done.ignored
    assert any("averaged copy" in note for note in done.notes)


def test_files_without_weights_are_called_what_they_are() -> None:
    assert "holds the state of an optimizer and no weights" in opened("optimizer_bin").warnings
    assert "holds no tensors" in registry.read(fixture_path("legacy/modules/no_tensors.pt")).warnings


# -- any file of the form -------------------------------------------------------------------------------------


def array(*shape: int) -> LazyTensor:
    return from_array(np.zeros(shape, np.float32))


def network() -> dict[str, Any]:
    return {"body.0.weight": array(2, 3), "body.0.bias": array(2), "head": {"weight": array(1, 2)}, "count": array()}


NETWORK = {"body.0.weight", "body.0.bias", "head.weight", "count"}


def optimizer() -> dict[str, Any]:
    return {
        "state": {0: {"step": array(), "exp_avg": array(2, 3)}, 1: {"exp_avg": array(2)}},
        "param_groups": [{"lr": 0.1, "params": [0, 1]}],
    }


def checkpoint_of(root: Any) -> Checkpoint:
    return torch_checkpoint("x", TorchContents(root, "zip"), flatten(root, "x"))


def nested(value: Any, keys: list[str | None]) -> Any:
    """A value inside dictionaries with these keys; None is a list."""
    for key in keys:
        value = [value] if key is None else {key: value}
    return value


KEYS = st.text("abcXYZ_", min_size=1, max_size=6)
PLACES = st.lists(st.one_of(KEYS, st.none()), max_size=3)
SCALARS = st.dictionaries(KEYS.map(lambda key: f"n_{key}"), st.one_of(st.integers(), st.text(), st.none()), max_size=3)


@given(PLACES, KEYS, KEYS, SCALARS)
@settings(max_examples=200, deadline=None)
def test_names_of_entries_do_not_matter(places: list[str | None], model: str, optim: str, scalars: Any) -> None:
    if model == optim:
        optim += "o"
    value = {model: network(), optim: optimizer(), "best": array(), **scalars}
    checkpoint = checkpoint_of(nested(value, places))
    assert set(checkpoint.weights()) == NETWORK
    assert checkpoint.training.has_optimizer


@given(PLACES, st.permutations(["a", "b", "c", "d"]))
@settings(max_examples=50, deadline=None)
def test_two_networks_keep_their_entries_names(places: list[str | None], keys: list[str]) -> None:
    first, second, one, two = keys
    value = {first: network(), second: network(), one: optimizer(), two: optimizer()}
    weights = checkpoint_of(nested(value, places)).weights()
    assert set(weights) == {f"{key}.{name}" for key in (first, second) for name in NETWORK}


LEAVES = st.builds(array) | st.builds(lambda: array(2)) | st.integers() | st.none()
TREES = st.recursive(
    LEAVES | st.builds(network) | st.builds(optimizer),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "model",
                    "a",
                    "a.b",
                    "b",
                    "optimizer",
                    "optim",
                    "ema",
                    "model_ema",
                    "rng",
                    "weight",
                    "x.weight",
                    "scaler",
                    "0",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(TREES)
@settings(max_examples=400, deadline=None)
def test_every_tensor_is_a_weight_or_a_state(root: Any) -> None:
    """Whatever the file: no two weights have one name, and no element of an optimizer is a weight."""
    checkpoint = checkpoint_of(root)
    weights = checkpoint.weights()
    assert all(checkpoint.tensors[checkpoint.model_prefix + name] is tensor for name, tensor in weights.items())
    assert all("exp_avg" not in name for name in weights)
    if checkpoint.tensors and not checkpoint.training.has_optimizer:
        assert weights


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ({"w": array(2), "b": array(2)}, {"w", "b"}),
        ([array(2), array(3)], {"0", "1"}),
        ({"params": {"dense": {"kernel": array(2)}, "norm": {"bias": array(2)}}}, {"dense.kernel", "norm.bias"}),
        ({"encoder": network(), "head": {"weight": array(2)}}, None),
        ({"state_dict": network(), "mean": array(3)}, NETWORK),
        ({**network(), "optimizer": optimizer()}, NETWORK),
        ({"embedding": array(4), "optimizer": optimizer()}, {"embedding"}),
        ({"model": [array(2), array(2)], "optimizer": optimizer()}, {"model.0", "model.1"}),
        ({"model": {"encoder": network(), "decoder": network()}, "optim": optimizer()}, None),
        ({"ema": network(), "optim": optimizer()}, NETWORK),
        ({"model": network(), "rng_state": from_array(np.zeros(5056, np.uint8))}, NETWORK),
        ({"model": network(), "grad_scaler": {"scale": array()}, "opt": optimizer()}, NETWORK),
        ({"random_projection": network(), "opt": optimizer()}, NETWORK),
    ],
)
def test_forms_that_are_rarer(root: Any, expected: set[str] | None) -> None:
    if expected is None:
        entry = root.get("model", root)
        expected = {".".join((key, name)) for key, value in entry.items() for name in names_in(value)}
    assert set(checkpoint_of(root).weights()) == expected


def names_in(value: dict[str, Any]) -> set[str]:
    return NETWORK if "count" in value else set(value)


def test_an_average_is_a_state_only_where_training_can_go_on() -> None:
    ema: Callable[[], dict[str, Any]] = lambda: {f"module.{key}": value for key, value in network().items()}  # noqa: E731
    training = checkpoint_of({"model": network(), "model_ema": ema(), "opt": optimizer()})
    assert set(training.weights()) == NETWORK
    release = checkpoint_of({"model": network(), "model_ema": ema()})
    assert len(release.weights()) == 2 * len(NETWORK)
    other = checkpoint_of({"model": network(), "ema": {"x.weight": array(7)}, "opt": optimizer()})
    assert len(other.weights()) == len(NETWORK) + 1
