"""Adapters whose base has the same names: no family has to be known, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import fixture_path, write_plan

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.containers.safetensors import safetensors_parts
from anyckpt.engine.plan import OutputFile, Plan
from anyckpt.errors import AnyckptError, MappingError, UsageError
from anyckpt.models.adapters import KINDS, check_adapter, merged_by_name, place_by_name, settings_of
from anyckpt.models.adapters.by_name import Names
from anyckpt.tensor import from_array

Arrays = dict[str, np.ndarray]
PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
UNKNOWN = {"model_type": "nobody_knows", "architectures": ["Nobody"], "vocab_size": 10, "tie_word_embeddings": False}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype("f4")


def save(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = safetensors_parts({name: from_array(np.ascontiguousarray(array)) for name, array in tensors.items()})
    write_plan(Plan("x", (OutputFile(path.name, parts),)), path.parent)


def base_of(path: Path, tensors: Arrays, config: Mapping[str, Any] = UNKNOWN) -> Path:
    save(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(config))
    return path


def adapter_of(path: Path, tensors: Arrays, **config: Any) -> Path:
    save(path / "adapter_model.safetensors", tensors)
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return path


def factors(module: str, rows: int, columns: int, rank: int = 2, prefix: str = PREFIX) -> Arrays:
    stem = prefix + module
    return {f"{stem}.lora_A.weight": random(rank, columns), f"{stem}.lora_B.weight": random(rows, rank, seed=1)}


def delta(module: str, tensors: Arrays, scale: float) -> np.ndarray:
    stem = PREFIX + module
    return scale * (tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"])  # type: ignore[no-any-return]


def model() -> Arrays:
    return {
        "model.embed_tokens.weight": random(10, 4),
        "model.layers.0.attn.q.weight": random(6, 4),
        "model.layers.0.attn.q.bias": random(6),
        "model.layers.0.conv.weight": random(3, 4, 2, 2),
        "model.norm.weight": random(4),
        "tower.blocks.0.fc.weight": random(5, 3),
        "tower.position": random(7, 3),
        "lm_head.weight": random(10, 4, seed=9),
    }


def merge(tmp_path: Path, base: Arrays, adapter: Arrays, *, config: Any = UNKNOWN, **settings: Any) -> Arrays:
    """What ``merge-lora`` writes; it is checked that everything that is not returned as changed is the same."""
    first = base_of(tmp_path / "base", base, config)
    second = adapter_of(tmp_path / "adapter", adapter, **settings)
    done = anyckpt.merge_lora(first, second, tmp_path / "out")
    assert done.ignored == {}
    found = {name: tensor.numpy() for name, tensor in anyckpt.open(tmp_path / "out").tensors.items()}
    assert found.keys() == base.keys()
    return {n: a for n, a in found.items() if a.shape != base[n].shape or a.tobytes() != base[n].tobytes()}


def test_an_unknown_model_with_a_tower(tmp_path: Path) -> None:
    adapter = {**factors("model.layers.0.attn.q", 6, 4), **factors("tower.blocks.0.fc", 5, 3)}
    changed = merge(tmp_path, model(), adapter)
    assert changed.keys() == {"model.layers.0.attn.q.weight", "tower.blocks.0.fc.weight"}
    for name, array in changed.items():
        expected = model()[name] + delta(name.removesuffix(".weight"), adapter, 3.0)
        assert np.abs(array - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("named", "stored"),
    [
        ("model.language_model.layers.0.q", "model.layers.0.q"),
        ("model.visual.blocks.0.fc", "visual.blocks.0.fc"),
        ("language_model.model.layers.0.q", "model.language_model.layers.0.q"),
        ("transformer.h.0.c", "h.0.c"),
        ("h.0.c", "transformer.h.0.c"),
    ],
)
def test_names_that_differ_in_what_wraps(named: str, stored: str, tmp_path: Path) -> None:
    base = {f"{stored}.weight": random(6, 4), "other.weight": random(2)}
    changed = merge(tmp_path, base, factors(named, 6, 4))
    assert changed.keys() == {f"{stored}.weight"}


@given(
    st.sets(st.lists(st.sampled_from(["model", "language_model", "a", "b", "0"]), min_size=1, max_size=4).map(".".join))
)
def test_every_name_finds_itself(names: set[str]) -> None:
    known = Names(names)
    assert all(known.find(name) == name for name in names)


def test_several_places_are_refused(tmp_path: Path) -> None:
    base = {"model.layers.0.q.weight": random(6, 4), "language_model.layers.0.q.weight": random(6, 4)}
    with pytest.raises(MappingError, match="fits more than one tensor of the base model"):
        merge(tmp_path, base, factors("layers.0.q", 6, 4))


def test_convolutions(tmp_path: Path) -> None:
    stem = f"{PREFIX}model.layers.0.conv"
    adapter = {f"{stem}.lora_A.weight": random(2, 4, 2, 2), f"{stem}.lora_B.weight": random(3, 2, 1, 1)}
    changed = merge(tmp_path, model(), adapter)
    expected = np.einsum(
        "or,rikl->oikl", adapter[f"{stem}.lora_B.weight"][:, :, 0, 0], adapter[f"{stem}.lora_A.weight"]
    )
    before = model()["model.layers.0.conv.weight"]
    assert np.abs(changed["model.layers.0.conv.weight"] - before - 3 * expected).max() < 1e-5


@pytest.mark.parametrize("stated", [True, False])
def test_square_weights_are_as_the_others_of_their_layer(stated: bool, tmp_path: Path) -> None:
    base = {
        "h.0.c_attn.weight": random(4, 12), "h.0.c_attn.bias": random(12), "h.0.c_proj.weight": random(4, 4),
        "lm_head.weight": random(9, 4),
    }  # fmt: skip
    adapter = {**factors("h.0.c_proj", 4, 4), **factors("lm_head", 9, 4), **factors("h.0.c_attn", 12, 4)}
    changed = merge(tmp_path, base, adapter, fan_in_fan_out=stated)
    for name in ("h.0.c_proj", "h.0.c_attn"):
        difference = changed[f"{name}.weight"] - base[f"{name}.weight"] - delta(name, adapter, 3.0).T
        assert np.abs(difference).max() < 1e-6
    assert np.abs(changed["lm_head.weight"] - base["lm_head.weight"] - delta("lm_head", adapter, 3.0)).max() < 1e-6


@pytest.mark.parametrize("stated", [True, False])
def test_square_weights_alone_are_as_the_settings_say(stated: bool, tmp_path: Path) -> None:
    base = {"h.0.c_proj.weight": random(4, 4)}
    adapter = factors("h.0.c_proj", 4, 4)
    changed = merge(tmp_path, base, adapter, fan_in_fan_out=stated)["h.0.c_proj.weight"]
    own = delta("h.0.c_proj", adapter, 3.0)
    assert np.abs(changed - base["h.0.c_proj.weight"] - (own.T if stated else own)).max() < 1e-6


def test_a_tensor_with_two_names_changes_under_both(tmp_path: Path) -> None:
    base = {**model(), "lm_head.weight": model()["model.embed_tokens.weight"]}
    stem = f"{PREFIX}model.embed_tokens"
    adapter = {f"{stem}.lora_embedding_A": random(2, 10), f"{stem}.lora_embedding_B": random(4, 2)}
    changed = merge(tmp_path, base, adapter, config={**UNKNOWN, "tie_word_embeddings": True})
    assert changed.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert np.array_equal(*changed.values())


# -- vocabularies --------------------------------------------------------------------------------------------


def saved(name: str, value: np.ndarray) -> Arrays:
    """The three copies that peft 0.21 stores of a module of ``modules_to_save``."""
    stem = PREFIX + name
    return {
        f"{stem}.modules_to_save.weight": value,
        f"{stem}.original_module.weight": value + 1,
        f"{stem}.weight": value,
    }


def test_a_vocabulary_that_was_resized(tmp_path: Path) -> None:
    rows, head = random(13, 4, seed=2), random(13, 4, seed=3)
    adapter = {**saved("model.embed_tokens", rows), **saved("lm_head", head), **factors("lm_head", 13, 4)}
    config = {**UNKNOWN, "text_config": {"vocab_size": 10}, "vision_config": {"vocab_size": 10}}
    changed = merge(tmp_path, model(), adapter, config=config)
    assert np.array_equal(changed["model.embed_tokens.weight"], rows)
    assert np.abs(changed["lm_head.weight"] - head - delta("lm_head", adapter, 3.0)).max() < 1e-6
    found = anyckpt.open(tmp_path / "out").config
    assert (found["vocab_size"], found["text_config"], found["vision_config"]["vocab_size"]) == (
        13,
        {"vocab_size": 13},
        10,
    )


def test_a_known_family_keeps_its_configuration_and_gets_the_tokenizer(tmp_path: Path) -> None:
    base = fixture_path("families/llama/hf")
    rows, width = anyckpt.open(base).tensors["lm_head.weight"].shape
    adapter = {**saved("model.embed_tokens", random(rows + 8, width)), **saved("lm_head", random(rows + 8, width))}
    folder = adapter_of(tmp_path / "a", adapter)
    (folder / "tokenizer.json").write_text("{}")
    done = anyckpt.merge_lora(base, folder, tmp_path / "out")
    assert f"the vocabulary has {rows + 8} rows, as the adapter has it, where the base had {rows}" in done.notes
    assert any("the tokenizer is the adapter's" in note for note in done.notes)
    assert anyckpt.open(tmp_path / "out").config["vocab_size"] == rows + 8
    anyckpt.merge_lora(base, folder, tmp_path / "core", to="megatron-core")
    anyckpt.convert(tmp_path / "core", tmp_path / "back", to="hf")
    assert not anyckpt.diff(tmp_path / "back", tmp_path / "out")


@pytest.mark.parametrize(("container", "target"), [("nemo", "nemo"), ("megatron-lm", "hf"), ("megatron-core", "hf")])
def test_a_base_of_other_names_grows_for_an_adapter(container: str, target: str, tmp_path: Path) -> None:
    """The adapter's own rows are what its base model's vocabulary grows by."""
    base = fixture_path("families/llama/hf")
    rows, width = anyckpt.open(base).tensors["lm_head.weight"].shape
    adapter = {**saved("model.embed_tokens", random(rows + 8, width)), **saved("lm_head", random(rows + 8, width))}
    folder = adapter_of(tmp_path / "a", adapter)
    anyckpt.merge_lora(base, folder, tmp_path / "expected")
    anyckpt.convert(base, tmp_path / "base", to=container)
    with pytest.raises(MappingError, match="of another shape.*let the base's vocabulary grow"):
        anyckpt.merge_lora(tmp_path / "base", folder, tmp_path / "out", to=target)
    layout = anyckpt.LayoutRequest(vocab_size=rows + 8, new_rows="zeros")
    anyckpt.merge_lora(tmp_path / "base", folder, tmp_path / "out", to=target, layout=layout)
    assert anyckpt.diff(tmp_path / "expected", tmp_path / "out", weights_only=True).equal


TIED = {**UNKNOWN, "tie_word_embeddings": True}


@pytest.mark.parametrize("kept", [True, False])
def test_a_tied_vocabulary_that_was_resized(kept: bool, tmp_path: Path) -> None:
    """peft stores the embedding of a tied model twice, whether or not the base does."""
    base = {**model(), "lm_head.weight": model()["model.embed_tokens.weight"]}
    if not kept:
        del base["lm_head.weight"]
    rows = random(13, 4, seed=2)
    adapter = {f"{PREFIX}model.embed_tokens.weight": rows, f"{PREFIX}lm_head.weight": rows}
    changed = merge(tmp_path, base, {**adapter, **factors("tower.blocks.0.fc", 5, 3)}, config=TIED)
    assert np.array_equal(changed["model.embed_tokens.weight"], rows)
    assert np.array_equal(changed.get("lm_head.weight", rows), rows)


def test_a_head_of_its_own_for_a_tied_model_is_refused(tmp_path: Path) -> None:
    base = {**model(), "lm_head.weight": model()["model.embed_tokens.weight"]}
    with pytest.raises(MappingError, match="an output layer of its own, and the base model's is tied"):
        merge(tmp_path, base, saved("lm_head", random(10, 4, seed=4)), config=TIED)
    del base["lm_head.weight"]
    with pytest.raises(UsageError, match="none of the base's by name"):
        merge(tmp_path, base, saved("lm_head", random(10, 4, seed=4)), config=TIED)


def test_a_part_of_a_resized_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="resizes only a part of what has the vocabulary's rows.*lm_head.weight"):
        merge(tmp_path, model(), saved("model.embed_tokens", random(13, 4)))


def test_an_update_of_more_rows_than_the_base_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="of another base model.*resize the base model's vocabulary"):
        merge(tmp_path, model(), factors("lm_head", 13, 4))


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    adapter = {**saved("lm_head", random(10, 4)), f"{PREFIX}lm_head.weight": random(10, 4, seed=5)}
    with pytest.raises(MappingError, match="the same one of the adapter, and they differ"):
        merge(tmp_path, model(), adapter)


@pytest.mark.parametrize("indices", [[7, 2, 0], {"embed_tokens": [7, 2, 0]}])
def test_trained_rows(indices: Any, tmp_path: Path) -> None:
    name = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    adapter = {name: random(3, 4, seed=7), **factors("model.layers.0.attn.q", 6, 4)}
    changed = merge(tmp_path, model(), adapter, trainable_token_indices=indices)
    expected = model()["model.embed_tokens.weight"]
    expected[[7, 2, 0]] = adapter[name]
    assert np.array_equal(changed["model.embed_tokens.weight"], expected)


def test_trained_rows_through_the_hub(tmp_path: Path) -> None:
    base = fixture_path("families/llama/hf")
    width = anyckpt.open(base).tensors["lm_head.weight"].shape[1]
    name = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    folder = adapter_of(tmp_path / "a", {name: random(2, width)}, trainable_token_indices=[5, 1])
    anyckpt.merge_lora(base, folder, tmp_path / "out")
    anyckpt.convert(base, tmp_path / "core", to="megatron-core")
    anyckpt.merge_lora(tmp_path / "core", folder, tmp_path / "merged")
    anyckpt.convert(tmp_path / "merged", tmp_path / "back", to="hf")
    assert not anyckpt.diff(tmp_path / "back", tmp_path / "out")
    with pytest.raises(UsageError, match="replaces rows of single tokens.*merge-lora"):
        anyckpt.convert(folder, tmp_path / "x", to="nemo2", config=base)


@pytest.mark.parametrize(
    ("indices", "problem"),
    [([1, 2, 10], "tokens that the base model does not have"), ([1, 1, 2], "contradict each other"),
     ([1, 2], "contradict each other"), (None, "does not say which tokens"), ([-1, 2, 3], "does not have")],
)  # fmt: skip
def test_trained_rows_that_do_not_fit(indices: Any, problem: str, tmp_path: Path) -> None:
    name = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    with pytest.raises((MappingError, UsageError), match=problem):
        merge(tmp_path, model(), {name: random(3, 4)}, trainable_token_indices=indices)


# -- what does not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (factors("model.layers.0.attn.q", 5, 4), "of another base model"),
        (factors("model.layers.0.attn.q", 6, 4, rank=3), "contradict each other on the rank"),
        (dict(list(factors("model.layers.0.attn.q", 6, 4).items())[:1]), "has no lora_B"),
        (factors("model.layers.7.attn.q", 6, 4), "1 modules of the adapter are none of the base's by name.*layers.7"),
        ({f"{PREFIX}model.norm.weight": random(5)}, "by one of another shape"),
        ({f"{PREFIX}model.layers.0.attn.q.bias": random(5)}, "a weight by one of another shape"),
    ],
)
def test_what_does_not_fit(change: Arrays, problem: str, tmp_path: Path) -> None:
    adapter = {**factors("tower.blocks.0.fc", 5, 3), **change}
    with pytest.raises((MappingError, UsageError), match=problem):
        merge(tmp_path, model(), adapter)


def test_a_missing_alpha(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not say its alpha.*--alpha"):
        merge(tmp_path, model(), factors("tower.blocks.0.fc", 5, 3), lora_alpha=None)


def test_numbers_that_nothing_is_added_to(tmp_path: Path) -> None:
    base = {**model(), "tower.blocks.0.fc.weight": np.ones((5, 3), "i4")}
    with pytest.raises(MappingError, match="of a type that no update can be added to"):
        merge(tmp_path, base, factors("tower.blocks.0.fc", 5, 3))


MODULES = (
    "model.layers.0.attn.q",
    "model.embed_tokens",
    "lm_head",
    "tower.position",
    "lora_unet_lm_head",
    "model.norm",
    "0",
)
ENDS = (
    "lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_B.other.weight", "lora_embedding_A",
    "lora_embedding_B", "lora_magnitude_vector", "lora_B.bias", "weight", "modules_to_save.weight", "bias", "alpha",
    "original_module.weight", "base_layer.weight", "token_adapter.trainable_tokens_delta", "lora_down.weight",
    "lora_up.weight", "lora.down.weight", "dora_scale", "hada_w1_a",
)  # fmt: skip
SHAPES = st.lists(st.integers(0, 10), max_size=4).map(tuple)


@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["", PREFIX, "unet."]), st.sampled_from(MODULES), st.sampled_from(ENDS)),
        st.tuples(SHAPES, st.sampled_from(["f4", "f2", "i8", "?"])),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([None, "peft"]),
    st.booleans(),
)
def test_whatever_an_adapter_holds_errors_are_ours(
    held: dict[tuple[str, str, str], tuple[tuple[int, ...], str]], dialect: str | None, tied: bool
) -> None:
    tensors = {
        f"{prefix}{module}.{end}": from_array(np.ones(shape, kind))
        for (prefix, module, end), (shape, kind) in held.items()
    }
    checkpoint = Checkpoint("x", "safetensors", tensors, dialect=dialect)
    base = {name: from_array(array) for name, array in model().items()}
    try:
        told = settings_of(checkpoint)
        check_adapter(checkpoint)
        if told is None or told.kind not in KINDS:
            return
        given = replace(told, alpha=told.alpha or 1.0, token_indices={"": (1, 3)})
        found, _ = place_by_name(checkpoint, given, base, tied=tied)
        if found is None:
            return
        merged = merged_by_name(base, found, scale=1.0, cast=lambda name, weight: weight.dtype)
    except AnyckptError:
        return
    assert merged.keys() == base.keys()
    assert all(tensor.numpy().shape == tensor.shape for tensor in merged.values())
