"""Low-rank updates of diffusion models: as kohya, diffusers and cloneofsimo name them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.operations.test_merge_in_place import Arrays, random, save

import anyckpt
from anyckpt.errors import FormatError, MappingError, UsageError
from anyckpt.models.adapters.loose import spelling

UNET = {
    "conv_in.weight": (4, 3, 3, 3),
    "down_blocks.0.attentions.0.proj_in.weight": (8, 8, 1, 1),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (8, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight": (8, 6),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.bias": (8,),
    "down_blocks.0.resnets.0.conv1.weight": (4, 8, 3, 3),
}
CHANGED = [name for name in UNET if name.endswith(".weight") and name != "conv_in.weight"]


def unet(prefix: str = "") -> Arrays:
    return {prefix + name: random(*shape) for name, shape in UNET.items()}


def updates() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    result = {}
    for name in CHANGED:
        shape = UNET[name]
        result[name.removesuffix(".weight")] = (
            random(2, *shape[1:], seed=1),
            random(shape[0], 2, *([1] * (len(shape) - 2)), seed=2),
        )
    return result


def kohya(alpha: float | None = 1.0) -> Arrays:
    result: Arrays = {}
    for module, (down, up) in updates().items():
        stem = "lora_unet_" + module.replace(".", "_")
        result |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        if alpha is not None:
            result[f"{stem}.alpha"] = np.array(alpha, "f4")
    return result


def dotted(down: str, up: str) -> Arrays:
    result: Arrays = {}
    for module, (first, second) in updates().items():
        result |= {f"unet.{module}.{down}": first, f"unet.{module}.{up}": second}
    return result


def processors() -> Arrays:
    """As diffusers 0.12 to 0.20 names them."""
    result: Arrays = {}
    for module, (down, up) in updates().items():
        if ".attn1." in module:
            inside = "to_out" if module.endswith("to_out.0") else "to_q"
            stem = f"unet.{module.partition('.attn1.')[0]}.attn1.processor.{inside}_lora"
            result |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return result


def merged(tmp_path: Path, adapter: Arrays, base: Arrays | None = None, **options: object) -> Arrays:
    save(tmp_path / "unet.safetensors", unet() if base is None else base)
    save(tmp_path / "lora.safetensors", adapter)
    anyckpt.merge_lora(tmp_path / "unet.safetensors", tmp_path / "lora.safetensors", tmp_path / "out", **options)  # type: ignore[arg-type]
    return {name: tensor.numpy() for name, tensor in anyckpt.open(tmp_path / "out").tensors.items()}


def check(found: Arrays, scale: float, changed: list[str], prefix: str = "") -> None:
    before = unet()
    assert found.keys() == {prefix + name for name in before}
    for name, array in before.items():
        if name in changed:
            down, up = updates()[name.removesuffix(".weight")]
            product = up.reshape(up.shape[0], 2) @ down.reshape(2, -1)
            assert np.abs(found[prefix + name] - array - scale * product.reshape(array.shape)).max() < 1e-5
        else:
            assert found[prefix + name].tobytes() == array.tobytes()


@pytest.mark.parametrize("prefix", ["", "unet.", "model.diffusion_model."])
def test_kohya(prefix: str, tmp_path: Path) -> None:
    check(merged(tmp_path, kohya(), unet(prefix)), 0.5, CHANGED, prefix)
    facts = anyckpt.inspect(tmp_path / "lora.safetensors").adapter
    assert facts is not None
    assert (facts["kind"], facts["rank"], facts["alpha"], facts["names"]) == ("lora", 2, 1.0, "kohya")
    assert set(facts["targets"]) == {"proj_in", "attn1_to_q", "attn1_to_out_0", "conv1"}


def test_every_module_may_have_an_alpha_of_its_own(tmp_path: Path) -> None:
    adapter = kohya(4.0)
    adapter["lora_unet_down_blocks_0_resnets_0_conv1.alpha"] = np.array([8.0], "f2")
    found = merged(tmp_path, adapter)
    name = "down_blocks.0.resnets.0.conv1.weight"
    check({**found, name: unet()[name] + (found[name] - unet()[name]) / 2}, 2.0, CHANGED)
    (tmp_path / "again").mkdir()
    check(merged(tmp_path / "again", adapter, alpha=6.0), 3.0, CHANGED)


@pytest.mark.parametrize(
    "adapter",
    [
        dotted("lora_A.weight", "lora_B.weight"),
        dotted("lora_A.default.weight", "lora_B.default.weight"),
        dotted("lora.down.weight", "lora.up.weight"),
        dotted("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        processors(),
    ],
)
def test_dotted_names(adapter: Arrays, tmp_path: Path) -> None:
    changed = [name for name in CHANGED if len(adapter) > 4 or ".attn1." in name]
    check(merged(tmp_path, adapter, alpha=4.0), 2.0, changed)
    with pytest.raises(UsageError, match="does not say its alpha.*take the rank, 2"):
        anyckpt.merge_lora(tmp_path / "unet.safetensors", tmp_path / "lora.safetensors", tmp_path / "x")


def test_diffusers_metadata_says_alpha(tmp_path: Path) -> None:
    from tests.support import write_plan

    from anyckpt.containers.safetensors import safetensors_parts
    from anyckpt.engine.plan import OutputFile, Plan
    from anyckpt.tensor import from_array

    tensors = {name: from_array(array) for name, array in dotted("lora_A.weight", "lora_B.weight").items()}
    save(tmp_path / "unet.safetensors", unet())
    for patterns, alpha in (({}, 3.0), ({"to_q": 1}, None)):
        told = {"unet.lora_alpha": 3, "unet.r": 2, "unet.alpha_pattern": patterns, "unet.use_rslora": False}
        parts = safetensors_parts(tensors, {"lora_adapter_metadata": json.dumps(told)})
        (tmp_path / "lora.safetensors").unlink(missing_ok=True)
        write_plan(Plan("x", (OutputFile("lora.safetensors", parts),)), tmp_path)
        facts = anyckpt.inspect(tmp_path / "lora.safetensors").adapter
        assert facts is not None and facts["alpha"] == alpha


def test_other_parts_are_refused_by_name(tmp_path: Path) -> None:
    adapter = kohya()
    for slot, shape in (("lora_down", (2, 4)), ("lora_up", (4, 2))):
        adapter[f"lora_te_text_model_encoder_layers_0_mlp_fc1.{slot}.weight"] = random(*shape)
    with pytest.raises(UsageError, match=r"1 modules of the adapter are none of the base's.*lora_te_text.*--exclude"):
        merged(tmp_path, adapter)
    anyckpt.merge_lora(
        tmp_path / "unet.safetensors", tmp_path / "lora.safetensors", tmp_path / "out", exclude="lora_te_*"
    )


def test_two_places_are_refused(tmp_path: Path) -> None:
    base = {**unet(), "down_blocks_0.resnets.0_conv1.weight": random(4, 8, 3, 3)}
    with pytest.raises(MappingError, match="fits more than one module of the base model"):
        merged(tmp_path, kohya(), base)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"lora_unet_conv_in.lora_down.weight": random(2, 3, 3, 3)}, "has no lora_B"),
        ({"lora_unet_conv_in.dora_scale": random(4)}, "kind that is not understood.*lora with dora_scale"),
        ({"lora_unet_conv_in.hada_w1_a": random(4, 2)}, "kind that is not understood.*loha"),
        ({"lora_unet_conv_in.alpha": random(2)}, "alpha is no number"),
        ({"lora_unet_conv_in.alpha": np.array(np.nan, "f4")}, "alpha is no number"),
        ({f"lora_unet_conv_in.lora_{slot}.weight": random(2, 2) for slot in ("down", "up")}, "another base model"),
    ],
)
def test_what_does_not_fit(change: Arrays, problem: str, tmp_path: Path) -> None:
    with pytest.raises((MappingError, UsageError, FormatError), match=problem):
        merged(tmp_path, {**kohya(), **change})


def test_numbered_updates(tmp_path: Path) -> None:
    adapter = {"unet:0:up": random(8, 2), "unet:0:down": random(2, 8), "<s1>": random(4)}
    with pytest.raises(MappingError, match="numbers its updates by the order"):
        merged(tmp_path, adapter, alpha=1.0)
    source = tmp_path / "lora.safetensors"
    facts = anyckpt.inspect(source).adapter
    assert facts is not None and (facts["names"], facts["rank"], facts["targets"]) == ("numbered", 2, ["unet"])
    assert anyckpt.verify(source)
    del adapter["unet:0:up"]
    save(tmp_path / "broken" / "x.safetensors", adapter)
    assert "has no unet:0:up" in anyckpt.verify(tmp_path / "broken" / "x.safetensors").problems[0].problem


def test_copies_keep_everything(tmp_path: Path) -> None:
    save(tmp_path / "lora.safetensors", kohya())
    done = anyckpt.convert(tmp_path / "lora.safetensors", tmp_path / "out", to="torch")
    assert anyckpt.open(tmp_path / "out").tensors.keys() == kohya().keys()
    assert not any("alpha" in note for note in done.notes)
    with pytest.raises(UsageError, match="is an adapter, and hf holds models"):
        anyckpt.convert(tmp_path / "lora.safetensors", tmp_path / "x", to="hf")


@pytest.mark.parametrize("kind", ["hada_w1_a", "lokr_w1"])
def test_a_copy_of_pefts_file_meets_its_folder(kind: str, tmp_path: Path) -> None:
    adapter = {f"base_model.model.model.layers.{number}.mlp.{kind}": random(4, 2) for number in range(2)}
    save(tmp_path / "folder/adapter_model.safetensors", adapter)
    words = {"peft_type": "LOHA" if kind.startswith("hada") else "LOKR", "r": 4, "alpha": 8}
    (tmp_path / "folder/adapter_config.json").write_text(json.dumps(words))
    anyckpt.convert(tmp_path / "folder", tmp_path / "copy.safetensors", to="safetensors")
    for pair in (("folder", "copy.safetensors"), ("copy.safetensors", "folder")):
        found = anyckpt.diff(*(tmp_path / name for name in pair))
        assert (found.compared, found.only_in_a, found.only_in_b, found.different) == (2, [], [], [])
        assert [setting.name for setting in found.configuration] == ["configuration"]
        assert anyckpt.diff(*(tmp_path / name for name in pair), weights_only=True).equal


@pytest.mark.parametrize(
    "names",
    [
        ["layers.0.mlp.up.weight", "layers.0.mlp.down.weight"],
        ["a.alpha", "b.alpha"],
        ["a.lora_A.weight", "a.lora_B.weight", "b.weight"],
        ["unet:0:up", "b.weight"],
        [],
    ],
)
def test_other_files_are_no_adapters(names: list[str]) -> None:
    assert spelling(names) is None
