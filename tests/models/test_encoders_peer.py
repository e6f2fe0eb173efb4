"""Models that are no decoders: transformers and Megatron-Core compute the same outputs with what we write."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from tests.models.cases import facts, open_case  # noqa: E402
from tests.support import fixture_path, write_plan  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt.checkpoint import Checkpoint  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.hf import FORMAT  # noqa: E402
from anyckpt.models import by_name, render_config  # noqa: E402
from anyckpt.operations.steps.layout_request import LayoutRequest  # noqa: E402
from anyckpt.tensor import from_array  # noqa: E402

ROOT = Path(__file__).parents[2]
LIMITS = {"megatron_bert": 1e-5, "t5_v1_1": 2e-6, "clip_vision": 2e-6, "vit": 4e-6}
"""The largest difference of any output: of the order of what the fixtures' author saw."""
TARGETS = {
    "megatron_bert": ("megatron-core", "megatron-lm", "nemo", "nemo2"),
    "t5_v1_1": ("megatron-core", "megatron-lm", "nemo", "nemo2"),
    "clip_vision": ("megatron-core", "megatron-lm", "nemo2"),
    "vit": ("megatron-core", "megatron-lm"),
}


def outputs(path: Path, data: Any) -> dict[str, np.ndarray]:
    """What transformers computes of what the fixture expects."""
    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(path, dtype=torch.float32).eval()
    inputs = {key: torch.as_tensor(data[key]) for key in data if key.endswith(("_ids", "_values"))}
    seen: dict[str, Any] = {}
    if hasattr(model, "layernorm"):  # ViT's, behind the layers, where CLIPViTModel ends
        model.layernorm.register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0].numpy()))
    with torch.no_grad():
        found = model(**inputs)
    names = {"logits": ("logits", "prediction_logits"), "seq_relationship": ("seq_relationship_logits",),
             "hidden": ("last_hidden_state",)}  # fmt: skip
    return {
        key: seen.get(key, next((getattr(found, name).numpy() for name in names[key] if hasattr(found, name)), None))
        for key in data
        if key in names
    }


@pytest.mark.parametrize(
    ("name", "target"), [(name, target) for name, targets in TARGETS.items() for target in targets]
)
def test_transformers_computes_the_fixtures_outputs(name: str, target: str, tmp_path: Path) -> None:
    layout = LayoutRequest(tensor_parallel=2) if target == "megatron-lm" else None
    there = tmp_path / ("there.nemo" if target == "nemo" else "there")
    anyckpt.convert(fixture_path(f"families/{name}/hf"), there, to=target, layout=layout)
    anyckpt.convert(there, tmp_path / "back", to="hf")
    with np.load(fixture_path(f"families/{name}/expected.npz")) as file:
        data = {key: file[key] for key in file.files}
    for key, found in outputs(tmp_path / "back", data).items():
        assert np.abs(found - data[key]).max() < LIMITS[name], key


# -- Megatron-Core's own models ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model and what it computes."""

    name: str
    source: Path
    expected: Path
    limit: float


def run(cases: list[Case], world: int, folder: Path) -> dict[str, list[float]]:
    """How far Megatron-Core's models with what we write are from what is expected, by name."""
    listed = []
    for case in cases:
        entry = {"name": case.name, "expected": str(case.expected), "ranks": str(folder / f"{case.name}-ranks")}
        layout = LayoutRequest(tensor_parallel=world, transformer_impl="local")
        anyckpt.convert(case.source, entry["ranks"], to="megatron-lm", dtype="fp32", layout=layout)
        if world == 1:
            entry["whole"] = str(folder / f"{case.name}-whole")
            layout = LayoutRequest(transformer_impl="local")
            anyckpt.convert(case.source, entry["whole"], to="megatron-core", dtype="fp32", layout=layout)
        listed.append(entry)
    (folder / "cases.json").write_text(json.dumps(listed))
    command = [sys.executable, "-W", "ignore", "-m", "tests.models.megatron_encoders"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder / "store"), str(folder / "cases.json")],
            cwd=ROOT, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    done = [process.communicate(timeout=180) for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(text[1][-1500:] for text in done)
    found: dict[str, list[float]] = json.loads(done[0][0].strip().splitlines()[-1])
    return found


def of_fixtures() -> list[Case]:
    root = {name: fixture_path(f"families/{name}") for name in LIMITS}
    return [Case(name, root[name] / "hf", root[name] / "expected.npz", limit) for name, limit in LIMITS.items()]


def original_t5(folder: Path) -> Case:
    """Tied and scaled, without gate; widths whose roots are no powers of two."""
    config = transformers.T5Config(
        d_model=48, d_kv=12, d_ff=40, num_layers=2, num_heads=4, vocab_size=96, relative_attention_num_buckets=16,
        relative_attention_max_distance=20, dropout_rate=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder / "original")
    tokens = torch.randint(2, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=tokens, decoder_input_ids=tokens[:, :10]).logits
    np.savez(folder / "original.npz", input_ids=tokens, decoder_input_ids=tokens[:, :10], logits=logits)
    return Case("original_t5", folder / "original", folder / "original.npz", 2e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_megatron_core_computes_the_same(world: int, tmp_path: Path) -> None:
    """Strictly loaded, from rank files and, at one rank, from a distributed checkpoint."""
    pytest.importorskip("megatron.core")
    cases = [*of_fixtures(), original_t5(tmp_path)]
    changed = rolled(fixture_path("families/t5_v1_1/hf"), tmp_path / "rolled")
    control = Case("rolled", changed, fixture_path("families/t5_v1_1/expected.npz"), 0.0)
    found = run([*cases, control], world, tmp_path)
    limits = {case.name: case.limit for case in cases}
    assert {name: found[name] for name, limit in limits.items() if not max(found[name]) < limit} == {}, found
    assert all(len(found[name]) == (2 if world == 1 else 1) for name in limits)
    assert min(found["rolled"]) > 0.01, "the comparison can fail"


def rolled(source: Path, folder: Path) -> Path:
    """The model with the rows of one relative bias moved by one."""
    checkpoint = anyckpt.open(source)
    name = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    other = from_array(np.roll(checkpoint.tensors[name].cast("float32").numpy(), 1, axis=0)).cast("bfloat16")
    return written(replace(checkpoint, tensors={**checkpoint.tensors, name: other}), folder)


def written(checkpoint: Checkpoint, folder: Path) -> Path:
    assert FORMAT.plan is not None
    return write_plan(FORMAT.plan(checkpoint, WriteOptions()), folder)


# -- T5 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["megatron-core", "nemo", "nemo2"])
def test_original_t5_there_and_back(target: str, tmp_path: Path) -> None:
    """Its scale is rounded into a norm; through NeMo 2, which cannot say so, it stays there."""
    case = original_t5(tmp_path)
    there = tmp_path / ("there.nemo" if target == "nemo" else "there")
    done = anyckpt.convert(case.source, there, to=target)
    assert any("decoder.final_layernorm.weight: Megatron's values are" in note for note in done.notes)
    anyckpt.convert(there, tmp_path / "back", to="hf")
    before, after = anyckpt.open(case.source), anyckpt.open(tmp_path / "back")
    assert after.config["scale_decoder_outputs"] == (target != "nemo2")
    same = {name for name, fact in facts(before.tensors).items() if facts(after.tensors)[name] == fact}
    assert before.tensors.keys() - same <= {"decoder.final_layer_norm.weight"}, "queries are not scaled"
    with np.load(case.expected) as file:
        data = {key: file[key] for key in file.files}
    assert np.abs(outputs(tmp_path / "back", data)["logits"] - data["logits"]).max() < case.limit


def test_an_untied_t5_keeps_its_output_layer(tmp_path: Path) -> None:
    """transformers 5 says of each T5 that it is tied, and leaves apart what is different in the file."""
    source = original_t5(tmp_path).source
    checkpoint = anyckpt.open(source)
    head = from_array(np.random.default_rng(0).standard_normal((96, 48)).astype("<f4"))
    config = {**checkpoint.config, "tie_word_embeddings": False}
    del config["scale_decoder_outputs"]
    untied = written(
        replace(checkpoint, tensors={**checkpoint.tensors, "lm_head.weight": head}, config=config), tmp_path / "u"
    )
    anyckpt.convert(untied, tmp_path / "there", to="megatron-lm", layout=LayoutRequest(tensor_parallel=2))
    anyckpt.convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert facts(anyckpt.open(tmp_path / "back").tensors) == facts(anyckpt.open(untied).tensors)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert np.array_equal(model.lm_head.weight.detach().numpy(), head.numpy())
    assert not model.config.scale_decoder_outputs
    model.save_pretrained(tmp_path / "again")
    assert anyckpt.open(tmp_path / "again").config["tie_word_embeddings"], "of transformers 5"
    anyckpt.convert(tmp_path / "again", tmp_path / "core", to="megatron-core")
    assert "lm_head.output_layer.weight" in anyckpt.open(tmp_path / "core").tensors


@pytest.mark.parametrize("name", ["bert", "megatron-bert", "t5", "clip-vision", "vit"])
def test_classes_are_those_of_transformers(name: str) -> None:
    known = by_name(name).hugging_face
    assert all(hasattr(transformers, architecture) for architecture in known.architectures)


FIELDS = {
    "megatron_bert": {
        "share_embeddings_and_output_weights", "position_embedding_type", "rotary_base", "rotary_percent",
        "seq_len_interpolation_factor", "seq_length", "make_vocab_size_divisible_by", "bert_type", "add_pooler",
        "bert_binary_head", "add_lm_head", "num_tokentypes",
    },
    "t5_v1_1": {
        "encoder_num_layers", "share_embeddings_and_output_weights", "make_vocab_size_divisible_by",
        "position_embedding_type", "max_position_embeddings", "relative_attention_num_buckets",
        "relative_attention_max_distance", "rotary_percent", "seq_len_interpolation_factor", "seq_length", "vocab_size",
    },
    "clip_vision": {"add_class_token", "class_token_len", "patch_dim", "img_h", "img_w", "vision_model_type"},
}  # fmt: skip
"""What NeMo 2.5's ``BertConfig``, ``T5Config`` and ``CLIPViTConfig`` add to ``TransformerConfig``."""


@pytest.mark.parametrize("name", FIELDS)
def test_nemo_2s_classes_have_the_fields(name: str) -> None:
    transformer_config = pytest.importorskip("megatron.core.transformer.transformer_config").TransformerConfig
    known = {field.name for field in dataclasses.fields(transformer_config)} | FIELDS[name] | {"_target_"}
    rendered = render_config(open_case(name).model, "nemo2")["config"]
    assert rendered.keys() <= known
    assert FIELDS[name] <= rendered.keys()
