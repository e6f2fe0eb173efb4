"""Tensors chosen by name: every one that inspect lists, alone and under other names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.cases import facts, open_case
from tests.support import fixture_path, sha256_of

import anyckpt
from anyckpt.checkpoint import Checkpoint, TrainingState
from anyckpt.errors import AnyckptError, IncompleteError, UsageError
from anyckpt.formats.registry import read
from anyckpt.operations.steps.choosing import choose, renumbered
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.optimizer.read import with_optimizer
from anyckpt.tensor import LazyTensor, from_array

LLAMA = fixture_path("families/llama/hf")
ADAMW = fixture_path("legacy/ptl_adamw") / "model--val_loss=0.5-epoch=3.ckpt"


def trained(copy: str) -> tuple[Checkpoint, dict[str, LazyTensor]]:
    """A trainer's checkpoint with an averaged copy of the model beside it, and that copy."""
    own = dict(open_case("llama").checkpoint.tensors)
    averaged = {name: from_array(tensor.numpy() * np.float32(2)) for name, tensor in own.items()}
    held = {f"state_dict.{name}": tensor for name, tensor in own.items()}
    beside = {f"{copy}{name}": tensor for name, tensor in averaged.items()}
    steps = {"optimizer.state.0.exp_avg": own["model.norm.weight"]}
    paths = {name: tuple(name.split(".", copy.count(".") if name in beside else 1)) for name in {**held, **beside}}
    tensors = {**held, **beside, **steps}
    return Checkpoint(str(LLAMA), "torch", tensors, model_prefix="state_dict.", state_prefixes=("optimizer.",),
                      key_paths=paths), averaged  # fmt: skip


@pytest.mark.parametrize("copy", ["ema_state_dict.", "callbacks.ema.", "ema_model."])
def test_an_averaged_copy_becomes_the_model(copy: str, tmp_path: Path) -> None:
    source, averaged = trained(copy)
    config = open_case("llama").checkpoint.config
    done = anyckpt.convert(source, tmp_path / "out", to="hf", config=config, include=f"{copy}*")
    assert facts(read(tmp_path / "out").tensors) == facts(averaged)
    assert {name for name in source.tensors if name.startswith("state_dict.")} <= set(done.ignored)
    assert any(f"tensors that are stored beside the weights, such as {copy}" in note for note in done.notes)
    anyckpt.convert(source, tmp_path / "core", to="megatron-core", config=config, include=f"{copy}*")
    with pytest.raises(UsageError, match="leave --optimizer keep out"):
        anyckpt.convert(source, tmp_path / "x.pt", to="torch", include=f"{copy}*", optimizer="keep")


def test_an_optimizer_of_more_than_the_chosen_weights_is_told(tmp_path: Path) -> None:
    source, _ = trained("ema_state_dict.")
    source.training = TrainingState(has_optimizer=True)
    done = anyckpt.convert(source, tmp_path / "x.pt", to="torch", exclude="model.norm.*", optimizer="keep")
    assert any(note.startswith("1 weights are left out, and the optimizer's state is kept") for note in done.notes)
    whole = anyckpt.convert(source, tmp_path / "y.pt", to="torch", optimizer="keep")
    assert not any("optimizer" in note for note in whole.notes)


def test_weights_and_what_is_beside_them_keep_whole_names(tmp_path: Path) -> None:
    source, _ = trained("ema_state_dict.")
    globs = ["state_dict.model.norm.*", "ema_state_dict.model.norm.*", "optimizer.state.*"]
    anyckpt.convert(source, tmp_path / "x.safetensors", to="safetensors", include=globs)
    expected = {"state_dict.model.norm.weight", "ema_state_dict.model.norm.weight", "optimizer.state.0.exp_avg"}
    assert facts(read(tmp_path / "x.safetensors").tensors) == facts({name: source.tensors[name] for name in expected})


def test_a_glob_that_matches_weights_means_these() -> None:
    source, averaged = trained("ema_state_dict.")
    step = choose(source, ("*embed*",), ())
    chosen, left_out = step.checkpoint, step.ignored
    assert list(chosen.weights()) == ["model.embed_tokens.weight"]
    assert len(left_out) == len(averaged) - 1
    with pytest.raises(UsageError, match=r"no tensor matches --include 'nothing\*'"):
        choose(source, ("nothing*",), ())


def test_slots_of_a_real_optimizer(tmp_path: Path) -> None:
    source = read(ADAMW)
    slots = [name for name in source.tensors if name.endswith("exp_avg")]
    anyckpt.convert(ADAMW, tmp_path / "x.safetensors", to="safetensors", include="*.exp_avg")
    assert sorted(sha256_of(t) for t in read(tmp_path / "x.safetensors").tensors.values()) == sorted(
        sha256_of(source.tensors[name]) for name in slots
    )


@given(st.data())
@settings(max_examples=50)
def test_every_tensor_that_is_listed_can_be_chosen(data: st.DataObject) -> None:
    for source in (trained("ema_state_dict.")[0], read(ADAMW)):
        name = data.draw(st.sampled_from(sorted(source.tensors)))
        step = choose(source, (name,), ())
        chosen, left_out = step.checkpoint, step.ignored
        assert [sha256_of(tensor) for tensor in chosen.weights().values()] == [sha256_of(source.tensors[name])]
        assert name not in left_out


# -- parts under other names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["hub", "nemo-flat", "megatron-core"])
def test_a_part_of_a_model_under_other_names(names: str, tmp_path: Path) -> None:
    anyckpt.convert(LLAMA, tmp_path / "whole.safetensors", to="safetensors", names=names)
    whole = read(tmp_path / "whole.safetensors").tensors
    globs = {"include": ["model.layers.*.mlp.*", "model.norm.weight"]}
    done = anyckpt.convert(LLAMA, tmp_path / "part.safetensors", to="safetensors", names=names, **globs)
    part = read(tmp_path / "part.safetensors").tensors
    assert 0 < len(part) < len(whole)
    assert facts(part) == {name: fact for name, fact in facts(whole).items() if name in part}
    assert {name for name in whole if "mlp" in name and "norm" not in name} <= set(part)
    assert any(f"{len(part)} of {len(whole)} tensors" in note for note in done.notes)
    anyckpt.convert(tmp_path / "whole.safetensors", tmp_path / "back.safetensors", to="safetensors", names="hf",
                    config=LLAMA, exclude="*self_attention*")  # fmt: skip
    back = read(tmp_path / "back.safetensors").tensors
    assert facts(back) == {n: f for n, f in facts(open_case("llama").checkpoint.tensors).items() if n in back}
    assert not any("self_attn" in name for name in back)


def test_what_no_rule_knows_may_be_left_out_of_a_part(tmp_path: Path) -> None:
    tensors = {**open_case("llama").checkpoint.tensors, "v_head.weight": from_array(np.ones(3, "<f4"))}
    source = Checkpoint(str(LLAMA), "hf", tensors, config=open_case("llama").checkpoint.config, config_kind="hf")
    anyckpt.convert(source, tmp_path / "x.safetensors", to="safetensors", names="hub", include="model.layers.1.*")
    assert all(name.startswith("decoder.layers.1.") for name in read(tmp_path / "x.safetensors").tensors)


def test_a_fused_tensor_is_chosen_whole(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"linear_qkv.weight.*choose all of them or none"):
        anyckpt.convert(LLAMA, tmp_path / "x.safetensors", to="safetensors", names="hub", exclude="*.q_proj.*")


def test_a_format_of_whole_models_says_that_the_choice_is_none(tmp_path: Path) -> None:
    for to in ("megatron-core", "nemo"):
        with pytest.raises(UsageError, match=rf"{to} holds whole models, and .*leave parts of this one out: 1 tensors"):
            anyckpt.convert(LLAMA, tmp_path / "x", to=to, exclude="lm_head.*")


def test_damage_is_not_taken_for_a_choice(tmp_path: Path) -> None:
    tensors = dict(open_case("llama").checkpoint.tensors)
    del tensors["model.layers.0.mlp.down_proj.weight"]
    source = Checkpoint(str(LLAMA), "hf", tensors, config=open_case("llama").checkpoint.config, config_kind="hf")
    with pytest.raises(IncompleteError, match="copy the missing files"):
        anyckpt.convert(source, tmp_path / "x.safetensors", to="safetensors", names="hub", exclude="lm_head.*")
    with pytest.raises(AnyckptError, match="down_proj"):
        anyckpt.convert(source, tmp_path / "x", to="megatron-core", exclude="lm_head.*")


@pytest.mark.parametrize("to", ["hf", "megatron-core"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_layers_in_the_middle_are_dropped_and_the_rest_is_numbered_anew(name: str, to: str, tmp_path: Path) -> None:
    case = open_case(name)
    stack = {"gpt2": "transformer.h"}.get(name, "model.layers")
    own = {n: t for n, t in case.checkpoint.tensors.items() if not n.startswith(f"{stack}.0.")}
    key = "n_layer" if name == "gpt2" else "num_hidden_layers"
    config = {**case.checkpoint.config, key: case.checkpoint.config[key] - 1}
    done = anyckpt.convert(case.checkpoint, tmp_path / "out", to=to, config=config, exclude=f"{stack}.0.*")
    assert any(f"of {stack} are numbered 0 to" in note for note in done.notes)
    anyckpt.convert(tmp_path / "out", tmp_path / "back", to="hf")
    shifted = {
        ".".join(
            str(int(part) - 1) if at == 2 and part.isdecimal() else part for at, part in enumerate(n.split("."))
        ): t
        for n, t in own.items()
    }
    found = facts(read(tmp_path / "back").tensors)
    assert found == {n: fact for n, fact in facts(shifted).items() if n in found}
    assert {n for n in shifted if n.startswith(stack)} <= set(found)


def test_layers_that_have_their_places_or_only_parts_are_not_numbered_anew() -> None:
    source = open_case("llama").checkpoint
    own = source.weights()
    last = [name for name in own if name.startswith("model.layers.1.")]

    def without(names: list[str]) -> Checkpoint:
        return source.with_weights({name: tensor for name, tensor in own.items() if name not in names})

    one = {**source.config, "num_hidden_layers": 1}
    assert not renumbered(without(last), last, one).notes
    first = [name for name in own if name.startswith("model.layers.0.")]
    assert renumbered(without(first), first, one).notes
    assert not renumbered(without([*first, last[0]]), [*first, last[0]], one).notes


def test_layers_keep_their_numbers_where_no_configuration_counts_them(tmp_path: Path) -> None:
    anyckpt.convert(LLAMA, tmp_path / "x.safetensors", to="safetensors", exclude="model.layers.0.*")
    assert any(name.startswith("model.layers.1.") for name in read(tmp_path / "x.safetensors").tensors)
    config = {**open_case("llama").checkpoint.config, "num_hidden_layers": 1}
    with pytest.raises(AnyckptError):
        anyckpt.convert(LLAMA, tmp_path / "x", to="hf", exclude="model.layers.0.mlp.*", config=config)


def with_state(target: str, folder: Path) -> tuple[Path, Path]:
    """A trained model of a known family in a format, and its configuration."""
    source = fixture_path("legacy/megatron_distopt_tp2_dp2")
    anyckpt.convert(source, folder / "trained", to=target, optimizer="keep")
    anyckpt.convert(source, folder / "hf", to="hf")
    return folder / "trained", folder / "hf"


@pytest.mark.parametrize(
    ("target", "glob"),
    [
        ("megatron-core", "optimizer.state.exp_avg.*"),
        ("dcp", "optim.state.*.exp_avg"),
        ("lightning", "optimizer_states.*.exp_avg"),
    ],
)
def test_slots_get_the_names_of_their_weights(target: str, glob: str, tmp_path: Path) -> None:
    """Whether a container keeps them by name or by number; a part of them, too."""
    trained, config = with_state(target, tmp_path)
    anyckpt.convert(trained, tmp_path / "x", to="safetensors", include=glob, names="hf", config=config)
    found = read(tmp_path / "x").tensors
    assert found.keys() == read(config).tensors.keys()
    optimizer = with_optimizer(open_checkpoint(trained)).optimizer
    assert optimizer is not None
    norm = next(t for name, t in optimizer().slots["exp_avg"].items() if name.endswith("final_layernorm.weight"))
    assert sha256_of(found["model.norm.weight"]) == sha256_of(norm)


def test_a_part_of_the_slots_and_of_a_copy(tmp_path: Path) -> None:
    trained_model, _ = with_state("megatron-core", tmp_path)
    done = anyckpt.convert(trained_model, tmp_path / "x", to="safetensors", include="*.exp_avg.*mlp*", names="hf")
    names = set(read(tmp_path / "x").tensors)
    assert {name for name in names if ".mlp." in name} == {
        f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in (0, 1) for part in ("gate", "up", "down")
    }
    assert any(
        note.startswith(f"a part of the model, as --include and --exclude say: {len(names)} of") for note in done.notes
    )
    source, averaged = trained("ema_state_dict.")
    config = open_case("llama").checkpoint.config
    anyckpt.convert(source, tmp_path / "y", to="safetensors", include="ema*.layers.0.mlp*", names="hub", config=config)
    mlp = read(tmp_path / "y").tensors["decoder.layers.0.mlp.linear_fc2.weight"]
    assert sha256_of(mlp) == sha256_of(averaged["model.layers.0.mlp.down_proj.weight"])


def test_two_slots_cannot_have_one_name(tmp_path: Path) -> None:
    trained_model, _ = with_state("megatron-core", tmp_path)
    with pytest.raises(UsageError, match="2 tensors of one weight"):
        anyckpt.convert(trained_model, tmp_path / "x", to="safetensors", include="*.exp_avg*", names="hf")
    anyckpt.convert(trained_model, tmp_path / "x", to="safetensors", include="*.exp_avg*")
    assert all("exp_avg" in name for name in read(tmp_path / "x").tensors)
