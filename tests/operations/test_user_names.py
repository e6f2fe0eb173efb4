"""Weights renamed by patterns: what is matched, what collides, and that adapters and optimizer state follow."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.models.cases import facts
from tests.operations.test_average import saved
from tests.support import fixture_path, sha256_of

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import UsageError
from anyckpt.formats.registry import read
from anyckpt.operations.steps.user_names import called, parse_renames
from anyckpt.optimizer.read import with_optimizer
from anyckpt.tensor import from_array

LLAMA = fixture_path("families/llama/hf")
LORA = fixture_path("families/lora_llama/hf_adapter")
ADAMW = fixture_path("legacy/ptl_adamw") / "model--val_loss=0.5-epoch=3.ckpt"


def named(*names: str, prefix: str = "") -> Checkpoint:
    tensors = {prefix + name: from_array(np.full(2, number, np.float32)) for number, name in enumerate(names)}
    return Checkpoint("x.pt", "torch", tensors, model_prefix=prefix)


@pytest.mark.parametrize(
    ("renames", "expected"),
    [
        ("module.*=*", ["h.0.w", "h.1.w", "head"]),
        ("module.h.?.w=layers.?.weight", ["layers.0.weight", "layers.1.weight", "head"]),
        ("module.h.[!0].w=last", ["module.h.0.w", "last", "head"]),
        (r"re:h\.(\d)=block.\1", ["module.block.0.w", "module.block.1.w", "head"]),
        (["module.*=*", "re:^=net."], ["net.h.0.w", "net.h.1.w", "net.head"]),
        ("*.h.*.w=*[*].w", ["module[0].w", "module[1].w", "head"]),
        (r"re:(?=head)=out.", ["module.h.0.w", "module.h.1.w", "out.head"]),
    ],
)
def test_patterns(renames: str | list[str], expected: list[str]) -> None:
    source = named("module.h.0.w", "module.h.1.w", "head")
    given = called(source, parse_renames(renames)).checkpoint
    assert list(given.weights()) == expected
    assert [sha256_of(t) for t in given.tensors.values()] == [sha256_of(t) for t in source.tensors.values()]


def test_names_are_met_with_and_without_what_they_all_have() -> None:
    source = named("model.a", "model.b", prefix="state_dict.")
    for pattern in ("model.*=*", "state_dict.model.*=*"):
        assert list(called(source, parse_renames(pattern)).checkpoint.tensors) == ["state_dict.a", "state_dict.b"]


@given(
    st.lists(st.text("ab.01", min_size=1, max_size=6), min_size=1, max_size=6, unique=True), st.text("xy.", max_size=3)
)
@settings(max_examples=60, deadline=None)
def test_a_prefix_goes_on_and_comes_off(names: list[str], prefix: str) -> None:
    source = named(*names)
    there = called(source, parse_renames(f"*={prefix}*")).checkpoint
    assert list(there.weights()) == [prefix + name for name in names]
    back = called(there, parse_renames(f"{prefix}*=*")).checkpoint
    assert list(back.weights()) == names


@example("[^a]", "^").via("a circumflex is no negation")
@example("[!]]", "a").via("a bracket first in a class")
@given(st.text("ab]![^-\\*?", max_size=6), st.text("ab]![^-\\", max_size=4))
@settings(max_examples=400, deadline=None)
def test_a_glob_matches_as_the_others_of_the_command_line_do(pattern: str, name: str) -> None:
    try:
        expected = re.fullmatch(fnmatch.translate(pattern), name) is not None
    except re.error:
        return  # a range that is none
    if pattern and "-" not in pattern:
        assert (parse_renames(f"{pattern}=x")[0](name) == "x") == expected


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ("a*", "cannot be understood"),
        ("=x", "cannot be understood"),
        ("re:(=x", "no regular expression"),
        (r"re:a=\2", "no regular expression"),
        ("a*=*.*", "more wildcards than the pattern"),
    ],
)
def test_what_cannot_be_understood(rename: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_renames(rename)


@pytest.mark.parametrize(
    ("rename", "message"),
    [("*=same", "2 weights the same name"), ("a=b", "2 weights the same name"), ("a=", "no name")],
)
def test_collisions(rename: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        called(named("a", "b"), parse_renames(rename))


def test_what_matches_nothing_is_said(tmp_path: Path) -> None:
    done = anyckpt.convert(LLAMA, tmp_path / "x.safetensors", to="safetensors", rename=["nothing.*=*", "model.*=*"])
    assert "--rename 'nothing.*=*' matches no weight" in done.notes
    assert any(note.startswith("--rename 'model.*=*' renames 20 weights, such as model.embed") for note in done.notes)


def test_a_family_is_known_by_the_new_names(tmp_path: Path) -> None:
    anyckpt.convert(LLAMA, tmp_path / "own", to="safetensors", rename=["model.*=*", r"re:layers\.=blocks."])
    back = ["re:^(?!lm_head)=model.", r"re:blocks\.=layers."]
    anyckpt.convert(tmp_path / "own", tmp_path / "core", to="megatron-core", config=LLAMA, rename=back)
    assert not anyckpt.diff(LLAMA, tmp_path / "core")


def test_only_chosen_weights_under_other_names(tmp_path: Path) -> None:
    """What is left out is named as the source names it."""
    anyckpt.convert(LLAMA, tmp_path / "own", to="safetensors", rename="*=net.*")
    done = anyckpt.convert(
        tmp_path / "own",
        tmp_path / "x",
        to="safetensors",
        rename="net.*=*",
        names="hub",
        config=LLAMA,
        include="net.model.layers.0.mlp.*",
    )
    assert set(read(tmp_path / "x").tensors) == {
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc2.weight",
    }
    assert all(name.startswith("net.") for name in done.ignored if "layers" in name)


@pytest.mark.parametrize("target", ["lightning", "dcp"])
def test_an_optimizer_follows(target: str, tmp_path: Path) -> None:
    anyckpt.convert(ADAMW, tmp_path / "out", to=target, rename="*=net.*", optimizer="keep")
    found, source = with_optimizer(read(tmp_path / "out")), with_optimizer(read(ADAMW))
    assert found.optimizer is not None and source.optimizer is not None
    assert facts(found.weights()) == {f"net.{name}": fact for name, fact in facts(source.weights()).items()}
    after, before = found.optimizer().slots, source.optimizer().slots
    for slot in ("exp_avg", "exp_avg_sq"):
        assert facts(after[slot]) == {f"net.{name}": fact for name, fact in facts(before[slot]).items()}


def test_state_that_names_no_weight_stays_as_it_is_stored(tmp_path: Path) -> None:
    anyckpt.convert(ADAMW, tmp_path / "x.pt", to="torch", rename="*=net.*", optimizer="keep")
    found, source = read(tmp_path / "x.pt"), read(ADAMW)
    state = {name: fact for name, fact in facts(source.tensors).items() if name.startswith("optimizer_states")}
    assert state and state.items() <= facts(found.tensors).items()
    assert {f"state_dict.net.{name}" for name in source.weights()} <= found.tensors.keys()


@pytest.mark.parametrize("optimizer", ["keep", "drop"])
@pytest.mark.parametrize("ending", ["pt", "ckpt"])
def test_objects_among_the_weights_are_renamed_as_these_are(ending: str, optimizer: Any, tmp_path: Path) -> None:
    """An extra state of a scale and a tensor stays one, in the module that it is of."""
    extra = {"scale": 3, "amax": from_array(np.ones(1, np.float32))}
    state = {"m.h.w": from_array(np.ones(2, np.float32)), "m.h._extra_state": extra, "m.h.version": 7}
    root = {"state_dict": state, "pytorch-lightning_version": "2.0.0", "epoch": 1, "global_step": 1}
    saved(tmp_path / f"a.{ending}", **(root if ending == "ckpt" else state))
    anyckpt.convert(tmp_path / f"a.{ending}", tmp_path / f"b.{ending}", rename="m.h.*=net.*", optimizer=optimizer)
    found, prefix = read(tmp_path / f"b.{ending}"), "state_dict." if ending == "ckpt" else ""
    assert found.objects[f"{prefix}net.version"] == 7
    assert found.key_paths[f"{prefix}net._extra_state.amax"][-2:] == ("net._extra_state", "amax")
    assert optimizer == "drop" or found.objects[f"{prefix}net._extra_state.scale"] == 3
    assert not [name for name in (*found.tensors, *found.objects) if "m.h" in name]


def test_an_adapter(tmp_path: Path) -> None:
    source = read(LORA)
    anyckpt.convert(LORA, tmp_path / "own", to="safetensors", rename="base_model.model.*=lora.*")
    assert all(name.startswith("lora.") for name in read(tmp_path / "own").tensors)
    back = "lora.*=base_model.model.*"
    anyckpt.convert(tmp_path / "own", tmp_path / "peft", to="peft", rename=back, config=LLAMA, alpha=16)
    assert facts(read(tmp_path / "peft").tensors) == facts(source.tensors)


def test_what_an_adapter_says_of_its_modules_follows(tmp_path: Path) -> None:
    """Also where another rank is said by a pattern: updates keep their scales."""
    folder = tmp_path / "lora"
    shutil.copytree(LORA, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    ranks = {"alpha_pattern": {r"layers\.0\..*q_proj": 24, "v_proj": 6}, "rank_pattern": {"v_proj": 4}}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **ranks}))
    renames = [r"re:q_proj=wq", r"re:model\.layers=lm.blocks"]
    anyckpt.convert(folder, tmp_path / "out", to="peft", rename=renames)
    found = read(tmp_path / "out")
    assert set(found.config["target_modules"]) == {*config["target_modules"], "wq"} - {"q_proj"}
    assert found.config["alpha_pattern"]["lm.blocks.0.self_attn.wq"] == 24
    back = [r"re:\.wq=.q_proj", r"re:lm\.blocks=model.layers"]
    anyckpt.convert(tmp_path / "out", tmp_path / "back", to="peft", rename=back)
    anyckpt.merge_lora(LLAMA, folder, tmp_path / "a")
    anyckpt.merge_lora(LLAMA, tmp_path / "back", tmp_path / "b")
    assert anyckpt.diff(tmp_path / "a", tmp_path / "b").equal
