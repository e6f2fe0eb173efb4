"""Layers left out of a model: names, configuration and optimizer state of those that stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.cases import facts, open_case
from tests.operations.test_average import saved
from tests.support import fixture_path, sha256_of

import anyckpt
from anyckpt import models
from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import UsageError
from anyckpt.formats.registry import read
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.operations.steps.layer_request import parse_layers
from anyckpt.operations.steps.layer_settings import with_layers, with_stack_layers
from anyckpt.operations.steps.layer_stack import find_stack
from anyckpt.optimizer.read import with_optimizer
from anyckpt.tensor import from_array

LLAMA = fixture_path("families/llama/hf")
CASES = [
    ("llama", "0"),
    ("gpt2", "1"),
    ("gemma3", "2,4"),
    ("deepseek_v3", "0"),
    ("deepseek_v3", "1"),
    ("nemotron_h", "0"),
    ("nemotron_h", "2-3"),
    ("qwen2_moe", "1"),
    ("gpt_oss", "0"),
    ("clip_vision", "1"),
]


def layers_of(checkpoint: Checkpoint, kept: list[int]) -> dict[str, str]:
    """Digests of the hub's tensors with these layers, as they are to be called."""
    model = models.identify(checkpoint)
    assert model is not None
    hub = models.to_hub(checkpoint, model).tensors
    stack = find_stack(hub, model.config.num_layers, "")
    return {name: sha256_of(tensor) for name, tensor in stack.chosen(hub, kept).items()}


@pytest.mark.parametrize(("family", "dropped"), CASES)
def test_what_is_left_is_a_model(family: str, dropped: str, tmp_path: Path) -> None:
    """Dense layers first, windows and hybrids by pattern, buffers: all that is said of layers is of those kept."""
    source = fixture_path(f"families/{family}/hf")
    anyckpt.convert(source, tmp_path / "out", to="hf", drop_layers=dropped)
    before, after = open_case(family).checkpoint, read(tmp_path / "out")
    whole, model = models.identify(before), models.identify(after)
    assert whole is not None and model is not None
    request = parse_layers(dropped, drop=True)
    assert request is not None
    kept = request.kept(whole.config.num_layers, "")
    assert model.config.num_layers == len(kept)
    assert layers_of(before, kept) == {n: sha256_of(t) for n, t in models.to_hub(after, model).tensors.items()}
    assert [model.config.is_sparse(n) for n in range(len(kept))] == [whole.config.is_sparse(layer) for layer in kept]
    assert anyckpt.verify(tmp_path / "out").sound


@pytest.mark.parametrize("target", ["nemo", "megatron-core", "nemo2", "megatron-bridge", "meta", "torch"])
def test_any_format_on_the_way(target: str, tmp_path: Path) -> None:
    """Whether layers are numbered or lie in one tensor."""
    anyckpt.convert(LLAMA, tmp_path / "expected", to="hf", keep_layers=[1])
    anyckpt.convert(LLAMA, tmp_path / "whole", to=target)
    config = LLAMA if target == "torch" else None
    anyckpt.convert(tmp_path / "whole", tmp_path / "less", to=target, drop_layers="0")
    anyckpt.convert(tmp_path / "whole", tmp_path / "out", to="hf", drop_layers="0", config=config)
    assert anyckpt.diff(tmp_path / "expected", tmp_path / "out", weights_only=True).equal
    if config is None:
        assert anyckpt.diff(tmp_path / "expected", tmp_path / "less", weights_only=True).equal


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("legacy/megatron_gpt_fp32_optim_tp2", "megatron-lm"),
        ("legacy/megatron_distopt_tp2_dp2", "megatron-core"),
        ("legacy/megatron_distopt_tp2_dp2", "dcp"),
    ],
)
def test_the_optimizer_goes_with_the_layers_that_stay(source: str, target: str, tmp_path: Path) -> None:
    path = fixture_path(source)
    anyckpt.convert(path, tmp_path / "whole", to=target, optimizer="keep")
    anyckpt.convert(path, tmp_path / "less", to=target, optimizer="keep", drop_layers="0")
    before, after = (with_optimizer(open_checkpoint(tmp_path / name)) for name in ("whole", "less"))
    assert before.optimizer is not None and after.optimizer is not None
    old, new = before.optimizer(), after.optimizer()
    stack = find_stack(before.weights(), 2, "")
    assert new.slots.keys() == old.slots.keys() and new.step == old.step
    for slot, tensors in old.slots.items():
        assert facts(new.slots[slot]) == facts(stack.chosen(tensors, [1])), slot


@pytest.mark.parametrize("optimizer", ["keep", "drop"])
@pytest.mark.parametrize("ending", ["pt", "ckpt"])
def test_objects_among_the_weights_go_with_their_layers(ending: str, optimizer: Any, tmp_path: Path) -> None:
    """Under the numbers that their layers have now, and what says how many layers there are says it of those."""
    sizes = {"num_layers": 3}
    state: dict[str, Any] = {"net.norm": from_array(np.ones(2, np.float32))}
    for layer in range(3):
        state[f"net.layers.{layer}.w"] = from_array(np.full(2, layer, np.float32))
        state[f"net.layers.{layer}._extra_state"] = {"scale": layer, "amax": from_array(np.full(1, layer, np.float32))}
        state[f"net.layers.{layer}.version"] = layer
    lightning = {"state_dict": state, "pytorch-lightning_version": "2.0.0", "hyper_parameters": sizes}
    saved(tmp_path / f"whole.{ending}", **(lightning if ending == "ckpt" else state))
    done = anyckpt.convert(
        tmp_path / f"whole.{ending}", tmp_path / f"less.{ending}", drop_layers="0", optimizer=optimizer
    )
    found = read(tmp_path / f"less.{ending}")
    prefix = "state_dict." if ending == "ckpt" else ""
    for place, layer in enumerate((1, 2)):
        assert found.objects[f"{prefix}net.layers.{place}.version"] == layer
        if optimizer == "keep":
            assert found.objects[f"{prefix}net.layers.{place}._extra_state.scale"] == layer
        assert found.tensors[f"{prefix}net.layers.{place}._extra_state.amax"].numpy() == layer
    assert f"{prefix}net.layers.2.version" not in found.objects
    assert done.ignored[f"{prefix}net.layers.0.version"] == "of a layer that is left out"
    assert found.objects.get("hyper_parameters", {"num_layers": 2}) == {"num_layers": 2}


def test_uneven_stages_are_no_longer_said(tmp_path: Path) -> None:
    path = fixture_path("legacy/megatron_gpt_pp3_uneven")
    done = anyckpt.convert(path, tmp_path / "out", to="megatron-core", keep_layers="0-1,5")
    assert sum("is taken out: it is of the layers that were there" in note for note in done.notes) == 2
    assert read(tmp_path / "out").config["num_layers"] == 3


def test_an_adapter_of_fewer_layers(tmp_path: Path) -> None:
    """It is that of the model without them, with its own scales."""
    folder = tmp_path / "lora"
    shutil.copytree(fixture_path("families/lora_llama/hf_adapter"), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    said = {"alpha_pattern": {r"layers\.1\..*q_proj": 24}, "layers_to_transform": [0, 1]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **said}))
    anyckpt.convert(folder, tmp_path / "less", to="peft", drop_layers="0")
    assert read(tmp_path / "less").config["layers_to_transform"] == [0]
    anyckpt.convert(LLAMA, tmp_path / "base", to="hf", drop_layers="0")
    anyckpt.merge_lora(tmp_path / "base", tmp_path / "less", tmp_path / "a")
    anyckpt.merge_lora(LLAMA, folder, tmp_path / "whole")
    anyckpt.convert(tmp_path / "whole", tmp_path / "b", to="hf", drop_layers="0")
    assert anyckpt.diff(tmp_path / "a", tmp_path / "b").equal


def test_what_is_said_of_a_choice_is_said_by_stored_names(tmp_path: Path) -> None:
    done = anyckpt.convert(LLAMA, tmp_path / "out.pt", to="torch", drop_layers="0", exclude="lm_head.weight")
    assert done.ignored["model.layers.0.mlp.up_proj.weight"] == "of a layer that is left out"
    assert "lm_head.weight" in done.ignored and "model.norm.weight" not in done.ignored
    assert done.notes[0] == "1 of 2 layers are left out, and 1 numbered from 0 on"
    source = read(LLAMA).tensors["model.layers.1.mlp.up_proj.weight"]
    assert sha256_of(read(tmp_path / "out.pt")["model.layers.0.mlp.up_proj.weight"]) == sha256_of(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_layers": "2"}, "layers that the model has not .expected 0 to 1, found 2"),
        ({"drop_layers": "0-1"}, "leaves no layer"),
        ({"drop_layers": "1-0"}, "no list of layers"),
        ({"drop_layers": "a"}, "no list of layers"),
        ({"keep_layers": "0,"}, "no list of layers"),
        ({"drop_layers": "0", "keep_layers": "1"}, "both say"),
        ({"drop_layers": "0", "layout": anyckpt.LayoutRequest(keep_extra_state=True)}, "--keep-extra-state"),
    ],
)
def test_what_cannot_be_done(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        anyckpt.convert(LLAMA, tmp_path / "out", to="hf", **options)


@pytest.mark.parametrize("own", [False, True])
def test_codes_that_are_told_of_by_layer_become_numbers_before_layers_get_others(own: bool, tmp_path: Path) -> None:
    anyckpt.convert(LLAMA, tmp_path / "codes", to="hf", quantize="fp8", quantize_exclude="*layers.0*")
    with pytest.raises(UsageError, match=r"names layers by their numbers; make it numbers with --dtype bf16"):
        anyckpt.convert(tmp_path / "codes", tmp_path / "out", to="hf", drop_layers="0")
    config = tmp_path / "codes" if own else None
    anyckpt.convert(tmp_path / "codes", tmp_path / "out", to="hf", drop_layers="0", dtype="bf16", config=config)
    anyckpt.convert(tmp_path / "codes", tmp_path / "numbers", to="hf", dtype="bf16")
    anyckpt.convert(tmp_path / "numbers", tmp_path / "expected", to="hf", drop_layers="0")
    assert facts(read(tmp_path / "out").tensors) == facts(read(tmp_path / "expected").tensors)
    assert read(tmp_path / "out").config == read(tmp_path / "expected").config


def test_codes_of_which_nothing_is_told_by_layer_stay(tmp_path: Path) -> None:
    anyckpt.convert(LLAMA, tmp_path / "codes", to="hf", quantize="fp8")
    anyckpt.convert(tmp_path / "codes", tmp_path / "out", to="hf", drop_layers="0")
    before, after = read(tmp_path / "codes").tensors, read(tmp_path / "out").tensors
    assert after["model.layers.0.mlp.up_proj.weight"].dtype.name == "float8_e4m3fn"
    assert sha256_of(after["model.layers.0.mlp.up_proj.weight"]) == sha256_of(
        before["model.layers.1.mlp.up_proj.weight"]
    )


def test_a_part_of_fewer_layers_under_other_names(tmp_path: Path) -> None:
    """What is not wanted has fewer layers, too: names are found for the whole model."""
    anyckpt.convert(LLAMA, tmp_path / "less", to="torch", names="hub", drop_layers="0")
    anyckpt.convert(LLAMA, tmp_path / "part", to="torch", names="hub", drop_layers="0", include="*mlp*")
    whole, part = read(tmp_path / "less").tensors, read(tmp_path / "part").tensors
    assert facts(part) == {name: fact for name, fact in facts(whole).items() if name in part}
    assert part.keys() == {name for name in whole if ".mlp." in name and "norm" not in name}


def test_a_part_of_two_stacks_with_fewer_layers_under_other_names(tmp_path: Path) -> None:
    said = "encoder:0,decoder:1"
    anyckpt.convert(T5, tmp_path / "less", to="torch", names="hub", drop_layers=said)
    anyckpt.convert(T5, tmp_path / "part", to="torch", names="hub", drop_layers=said, include="*DenseReluDense*")
    whole, part = read(tmp_path / "less").tensors, read(tmp_path / "part").tensors
    assert facts(part) == {name: fact for name, fact in facts(whole).items() if name in part}
    assert {name.split(".")[0] for name in part} == {"encoder", "decoder"}


T5 = fixture_path("families/t5_v1_1/hf")
BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"


@pytest.mark.parametrize(
    ("options", "encoder", "decoder"),
    [
        ({"drop_layers": "encoder:0"}, [1], [0, 1]),
        ({"drop_layers": "encoder:1,decoder:0"}, [0], [1]),
        ({"keep_layers": "decoder:1"}, [0, 1], [1]),
    ],
)
def test_layers_of_two_stacks(options: Any, encoder: list[int], decoder: list[int], tmp_path: Path) -> None:
    """Each is numbered by itself, and relative positions stay with the first layer."""
    done = anyckpt.convert(T5, tmp_path / "out", to="hf", **options)
    before, after = read(T5), read(tmp_path / "out")
    assert (after.config["num_layers"], after.config["num_decoder_layers"]) == (len(encoder), len(decoder))
    expected = {n: t for n, t in before.tensors.items() if ".block." not in n or n.endswith(f".0.{BIAS}")}
    for stack, kept in (("encoder", encoder), ("decoder", decoder)):
        for place, layer in enumerate(kept):
            start = f"{stack}.block.{layer}."
            own = {n.removeprefix(start): t for n, t in before.tensors.items() if n.startswith(start)}
            expected |= {f"{stack}.block.{place}.{end}": tensor for end, tensor in own.items()}
    assert facts(after.tensors) == facts(expected)
    assert anyckpt.verify(tmp_path / "out").sound
    assert any("relative positions" in note for note in done.notes) == (bool(encoder[0]) or bool(decoder[0]))


def test_a_decoder_whose_layers_the_encoder_counts(tmp_path: Path) -> None:
    """T5's ``num_decoder_layers`` may be left out."""
    config = {key: value for key, value in read(T5).config.items() if key != "num_decoder_layers"}
    anyckpt.convert(T5, tmp_path / "out", to="hf", drop_layers="encoder:0", config=config)
    assert (read(tmp_path / "out").config["num_layers"], read(tmp_path / "out").config["num_decoder_layers"]) == (1, 2)


@pytest.mark.parametrize("said", ["tower:0", "encoder:0,encoder:1", "0,encoder:1", "encoder:"])
def test_what_is_no_stack(said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names no stack|no list of layers"):
        anyckpt.convert(T5, tmp_path / "out", to="hf", drop_layers=said)
    with pytest.raises(UsageError, match="without two numbered stacks"):
        anyckpt.convert(LLAMA, tmp_path / "out", to="hf", drop_layers="encoder:0")


def test_numbers_alone_mean_no_stack_of_two_even_of_different_lengths(tmp_path: Path) -> None:
    anyckpt.convert(T5, tmp_path / "uneven", to="hf", drop_layers="encoder:0")
    with pytest.raises(UsageError, match=r"several stacks.*--drop-layers encoder:0"):
        anyckpt.convert(tmp_path / "uneven", tmp_path / "out", to="hf", drop_layers="0")


@pytest.mark.parametrize("said", ["0", "encoder:0"])
@pytest.mark.parametrize("layers", [None, "decoder:0"])
def test_two_stacks_of_one_tensor_each_are_not_guessed_between(layers: str | None, said: str, tmp_path: Path) -> None:
    """The configuration's number of layers is the encoder's, which says nothing of whose layer is meant."""
    anyckpt.convert(T5, tmp_path / "hf", to="hf", drop_layers=layers)
    anyckpt.convert(tmp_path / "hf", tmp_path / "stacked", to="megatron-core")
    with pytest.raises(UsageError, match=r"decoder\.layers, encoder\.layers\); convert it to hf first"):
        anyckpt.convert(tmp_path / "stacked", tmp_path / "out", to="hf", drop_layers=said)


def test_two_stacks_are_not_guessed_between(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"several stacks.*decoder.block .0 to 1., encoder.block"):
        anyckpt.convert(fixture_path("families/t5_v1_1/hf"), tmp_path / "out", to="hf", drop_layers="0")


def test_a_tower_beside_the_text_is_left_alone() -> None:
    shapes = {"model.vision_tower.layers": 2, "model.language_model.layers": 2, "visual.blocks": 4}
    tensors = {f"{name}.{n}.w": from_array(np.zeros(1)) for name, count in shapes.items() for n in range(count)}
    assert find_stack(tensors, 2, "").name == "model.language_model.layers"


@given(st.integers(1, 6), st.integers(0, 2), st.data())
@settings(max_examples=60, deadline=None)
def test_renumbering(count: int, behind: int, data: st.DataObject) -> None:
    """In order, without gaps, and layers for further predictions stay behind the last."""
    kept = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    tensors = {f"h.{n}.w": from_array(np.array([n], np.int64)) for n in range(count + behind)}
    stack = find_stack({**tensors, "norm": from_array(np.zeros(1))}, count, "")
    found = {name: int(tensor.numpy()[0]) for name, tensor in stack.chosen(tensors, kept).items()}
    numbers = [*kept, *range(count, count + behind)]
    assert found == {f"h.{place}.w": layer for place, layer in enumerate(numbers)}
    stacked = {"layers.w": from_array(np.arange(count))}
    assert find_stack(stacked, count, "").chosen(stacked, kept)["layers.w"].numpy().tolist() == kept


def test_numbers_with_zeros_before_them_are_other_names() -> None:
    tensors = {f"layers.{n}.w": from_array(np.zeros(1)) for n in ("0", "1", "00", "01")}
    stack = find_stack(tensors, 2, "")
    assert [*stack.chosen(tensors, [1])] == ["layers.0.w", "layers.00.w", "layers.01.w"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"first_k_dense_replace": 2}, {"first_k_dense_replace": 1}),
        ({"layer_types": ["a", "b", "c", "d"]}, {"layer_types": ["a", "c", "d"]}),
        ({"mlp_only_layers": [1, 3]}, {"mlp_only_layers": [2]}),
        ({"hybrid_override_pattern": "M*|-E/M"}, {"hybrid_override_pattern": "M-E/M"}),
        ({"moe_layer_freq": 2}, {"moe_layer_freq": [1, 1, 0]}),
        ({"window_attn_skip_freq": 2}, {"window_attn_skip_freq": [1, 1, 0]}),
        ({"sliding_window_pattern": 2, "layer_types": list("abcd")}, {"layer_types": list("acd")}),
        ({"_sliding_window_pattern": 4}, {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
        ({"decoder_sparse_step": 2}, {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1]}),
        ({"interleave_moe_layer_step": 2}, {"moe_layers": [2]}),
        ({"no_rope_layer_interval": 4}, {"no_rope_layers": [1, 1, 0]}),
        ({"eos_token_id": [1, 2, 3, 4]}, {"eos_token_id": [1, 2, 3, 4]}),
        ({"pipeline_model_parallel_layout": "Et|ttt|L"}, {"pipeline_model_parallel_layout": None}),
        ({"num_kv_shared_layers": 3}, {"num_kv_shared_layers": 2}),
        (
            {"moe_layer_end_index": 2, "moe_layer_start_index": 1},
            {"moe_layer_end_index": 1, "moe_layer_start_index": 1},
        ),
        ({"moe_layer_end_index": -1}, {"moe_layer_end_index": -1}),
        (
            {"moe_topk": [1, 2, 3, 4], "layer_rope_theta": [5, 6, 7, 8]},
            {"moe_topk": [1, 3, 4], "layer_rope_theta": [5, 7, 8]},
        ),
        (
            {"linear_attn_config": {"full_attn_layers": [2, 4], "kda_layers": [1, 3], "num_heads": 4}},
            {"linear_attn_config": {"full_attn_layers": [3], "kda_layers": [1, 2], "num_heads": 4}},
        ),
        (
            {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
            {"attention_types": [[["global"], 1], [["global"], 1], [["local"], 1]]},
        ),
        ({"text_config": {"n_layers": 4, "layer_types": list("abcd")}}, {}),
    ],
)
def test_settings_of_each_layer(said: dict[str, Any], expected: dict[str, Any]) -> None:
    """Of four layers the second is left out."""
    found, _ = with_layers({"num_hidden_layers": 4, **said}, [0, 2, 3], "")
    assert found["num_hidden_layers"] == 3
    assert expected.items() <= found.items()
    if "text_config" in said:
        assert found["text_config"] == {"n_layers": 3, "layer_types": list("acd")}


@pytest.mark.parametrize(
    ("said", "noted"),
    [
        ({"unheard_of": ["a", "b", "c", "d"]}, True),
        ({"unheard_of_layers": [1, 3]}, True),
        ({"unheard_of_layer_interval": 2}, True),
        ({"sliding_window_pattern": "LLLG"}, True),
        ({"moe_layer_freq": "([0]*1+[1]*3)"}, True),
        ({"eos_token_id": [1, 2, 3, 4], "architectures": ["X"], "hidden_size": 4, "layer_norm_eps": 1e-5}, False),
        ({"layer_types": list("abcd"), "sliding_window_pattern": "LLLG"}, False),
    ],
)
def test_what_may_be_of_layers_and_is_not_known_is_told(said: dict[str, Any], noted: bool) -> None:
    found, notes = with_layers({"num_hidden_layers": 4, **said}, [0, 2, 3], "")
    assert bool(notes) == noted
    assert not noted or (found.items() >= said.items() and next(iter(said)) in notes[0])


def test_layers_that_come_twice() -> None:
    said = {"mlp_only_layers": [1], "max_window_layers": 2, "first_k_dense_replace": 1, "num_kv_shared_layers": 1}
    found, _ = with_layers({"num_hidden_layers": 4, **said}, [0, 1, 1, 2, 1, 3, 3], "")
    expected = {"mlp_only_layers": [1, 2, 4], "first_k_dense_replace": 1, "num_kv_shared_layers": 2}
    assert expected.items() <= found.items()
    for key in ("first_k_dense_replace", "num_kv_shared_layers", "moe_layer_end_index"):
        with pytest.raises(UsageError, match=f"{key}.*at an end of the model"):
            with_layers({"num_hidden_layers": 4, key: 1}, [0, 3, 0, 1], "")


def test_columns_of_all_layers_in_one_tensor_are_refused() -> None:
    with pytest.raises(UsageError, match=r"hidden_size_per_layer_input.*side by side"):
        with_layers({"num_hidden_layers": 4, "hidden_size_per_layer_input": 256}, [0, 1], "")


def test_a_period_that_holds_stays_and_one_that_does_not_is_named() -> None:
    config = {"num_hidden_layers": 8, "attn_layer_period": 2}
    assert with_layers(config, [0, 1, 4, 5], "")[0]["attn_layer_period"] == 2
    with pytest.raises(UsageError, match=r"attn_layer_period.*leave out 2 layers together"):
        with_layers(config, [0, 2, 3], "")


def test_what_bart_says_of_its_stacks() -> None:
    said = {"encoder_layers": 4, "decoder_layers": 2, "num_hidden_layers": 4, "d_model": 4}
    found, notes = with_stack_layers(said, "encoder", [0, 2], 4, "")
    assert found == {**said, "encoder_layers": 2, "num_hidden_layers": 2} and not notes
    assert with_stack_layers(said, "decoder", [1], 2, "")[0] == {**said, "decoder_layers": 1}
    with pytest.raises(UsageError, match=r"decoder has 3 layers .expected decoder_layers 3, found 2"):
        with_stack_layers(said, "decoder", [1], 3, "")
    with pytest.raises(UsageError, match=r"encoder_sparse_step says by a rule"):
        with_stack_layers({**said, "encoder_sparse_step": 2}, "encoder", [1], 4, "")
