"""Our own formats and families through the checks that others' are put to, and the checks on what is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.models.proofs import PROOFS
from tests.support import fixture_path

import anyckpt
from anyckpt import models
from anyckpt.config.hugging_face import surplus
from anyckpt.extend import (
    IDENTITY,
    Checkpoint,
    Constant,
    Family,
    Format,
    LazyTensor,
    Location,
    OutputFile,
    Plan,
    Stored,
    TensorData,
    WriteOptions,
    from_array,
)
from anyckpt.formats import registry
from anyckpt.models.families import llama
from anyckpt.testing import (
    check_damage,
    check_family,
    check_format,
    check_plan,
    check_processes,
    check_reading,
    sample_checkpoint,
)

SAMPLES = {
    "peft": "families/lora_llama/hf_adapter",
    "diffusers": "diffusers/stable_diffusion",
    "whisper": "whisper/tiny.pt",
}
READ_ONLY = {"fsdp": "fsdp/fsdp1_2", "gpt-neox": "gpt_neox/tp2", "deepspeed": "deepspeed/zero1"}
FORMATS = registry.built_in()
ANY_NAMES = [
    name
    for name, known in FORMATS.items()
    if known.plan and known.dialect(WriteOptions()) is None and name not in SAMPLES
]
KINDS = {"nemo": "nemo1", "nemo2": "nemo2", "megatron-core": "megatron-args"}


def test_every_format_is_checked() -> None:
    assert {*ANY_NAMES, *OF_MODELS, *READ_ONLY} == set(FORMATS)


@pytest.mark.parametrize("name", ANY_NAMES)
def test_formats_of_any_names(name: str, tmp_path: Path) -> None:
    check_format(FORMATS[name], tmp_path)


OF_MODELS = [name for name in FORMATS if name not in ANY_NAMES and name not in READ_ONLY]


@pytest.mark.parametrize("name", OF_MODELS)
def test_formats_of_models(name: str, tmp_path: Path) -> None:
    known, made = FORMATS[name], tmp_path / "made"
    anyckpt.convert(fixture_path(SAMPLES.get(name, "families/llama/hf")), made, to=name)
    check_reading(known, made)
    checkpoint = known.read(registry.look_at(made))
    options = WriteOptions(layout=checkpoint.layout if checkpoint.ranks else None)
    check_plan(known, checkpoint, tmp_path / "written", options)
    check_processes(known, made)
    check_damage(known, made, tmp_path / "damaged")


@pytest.mark.parametrize(("name", "path"), READ_ONLY.items())
def test_formats_that_are_only_read(name: str, path: str, tmp_path: Path) -> None:
    check_reading(FORMATS[name], fixture_path(path))
    check_damage(FORMATS[name], fixture_path(path), tmp_path / "damaged")


@pytest.mark.parametrize("name", PROOFS)
def test_families(name: str) -> None:
    sample = PROOFS[name].samples[0]
    checkpoint, model = sample.open()
    values = {stored: checkpoint.tensors[stored] for stored in getattr(sample, "unit_rows", ())}
    cannot = [KINDS[target] for target in sample.refused if target in KINDS]
    check_family(models.by_name(name), checkpoint.config, cannot=cannot, unread=surplus(model.config), values=values)


# -- what the checks find ------------------------------------------------------------------------------------


def plain_plan(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    files = tuple(
        OutputFile(f"{name}.raw", (TensorData(name, tensor),)) for name, tensor in checkpoint.weights().items()
    )
    return Plan("raw", files)


def plain_read(location: Location) -> Checkpoint:
    tensors: dict[str, LazyTensor] = {}
    given = sample_checkpoint().tensors
    for file in location.names:
        if file.endswith(".raw"):
            name = file.removesuffix(".raw")
            tensors[name] = Stored(location.open(file), 0, given[name].dtype, given[name].shape)
            tensors[name].check()  # type: ignore[attr-defined]
    return Checkpoint(location.path, "raw", tensors)


def is_raw(location: Location) -> bool:
    return any(name.endswith(".raw") for name in location.names)


RAW = Format(name="raw", title="raw files", detect=is_raw, read=plain_read, plan=plain_plan)


def eager(location: Location) -> Checkpoint:
    checkpoint = plain_read(location)
    return replace(checkpoint, tensors={name: from_array(t.numpy()) for name, t in checkpoint.tensors.items()})


def misnamed(location: Location) -> Checkpoint:
    return replace(plain_read(location), format="other")


def unchecked(location: Location) -> Checkpoint:
    checkpoint = plain_read(location)
    for tensor in checkpoint.tensors.values():
        if tensor.dtype == "float16":
            raise ValueError("no such type")
    return checkpoint


def holding(location: Location) -> Checkpoint:
    HELD.append(open(location.join(location.names[-1]), "rb"))
    return plain_read(location)


HELD: list[Any] = []


def touching(location: Location) -> Checkpoint:
    os.utime(location.join(location.names[0]), (1, 1))
    return plain_read(location)


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[Path]:
    yield Path(check_plan(RAW, sample_checkpoint(), tmp_path / "raw"))
    for file in HELD:
        file.close()
    HELD.clear()


def test_a_plain_format_passes(raw: Path, tmp_path: Path) -> None:
    check_reading(RAW, raw)
    check_damage(RAW, raw, tmp_path / "damaged")


@pytest.mark.parametrize(
    ("read", "problem"),
    [(eager, "should read none|has no identity"), (misnamed, "is called 'other'"), (unchecked, "no such type"),
     (holding, "stay open"), (touching, "changes it")],
)  # fmt: skip
def test_readers_that_break_the_contract(read: Callable[[Location], Checkpoint], problem: str, raw: Path) -> None:
    with pytest.raises((AssertionError, ValueError), match=problem):
        check_reading(replace(RAW, read=read), raw)


def test_damage_that_goes_unnoticed_or_is_no_error_of_ours(raw: Path, tmp_path: Path) -> None:
    def careless(location: Location) -> Checkpoint:
        if any(not location.open(name).size for name in location.names):
            raise IndexError("nothing there")
        return plain_read(location)

    with pytest.raises(AssertionError, match="IndexError in place of an AnyckptError"):
        check_damage(replace(RAW, read=careless), raw, tmp_path / "damaged")

    def nameless(location: Location) -> Checkpoint:
        try:
            return plain_read(location)
        except anyckpt.AnyckptError:
            raise anyckpt.FormatError("is damaged") from None

    with pytest.raises(AssertionError, match="names neither file nor tensor"):
        check_damage(replace(RAW, read=nameless), raw, tmp_path / "damaged")

    def forgiving(location: Location) -> Checkpoint:
        try:
            return plain_read(location)
        except anyckpt.AnyckptError:
            return Checkpoint(location.path, "raw", {})

    with pytest.raises(AssertionError, match="nothing says so"):
        check_damage(replace(RAW, read=forgiving), raw, tmp_path / "damaged")


def losing(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    plan = plain_plan(checkpoint, options)
    return replace(plan, files=plan.files[1:])


def escaping(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    return Plan("raw", tuple(OutputFile(f"../{f.path}", f.parts) for f in plain_plan(checkpoint, options).files))


def changing(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    plan = plain_plan(checkpoint, options)
    CALLS.append(1)
    return plan if len(CALLS) % 2 else replace(plan, files=plan.files[::-1])


CALLS: list[int] = []


def other_bits(checkpoint: Checkpoint, options: WriteOptions) -> Plan:
    tensors = {name: tensor.cast("float64").cast(tensor.dtype) for name, tensor in checkpoint.tensors.items()}
    tensors["layer.bias"] = tensors["layer.weight"][:, 0]
    return plain_plan(replace(checkpoint, tensors=tensors), options)


@pytest.mark.parametrize(
    ("plan", "problem"),
    [(losing, "neither written nor told"), (escaping, "leads out of the output"), (changing, "two plans"),
     (other_bits, "neither written nor told|read back as something else")],
)  # fmt: skip
def test_plans_that_break_the_contract(
    plan: Callable[[Checkpoint, WriteOptions], Plan], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=problem):
        check_plan(replace(RAW, plan=plan), sample_checkpoint(), tmp_path / "out")


def test_a_format_that_is_not_registered(tmp_path: Path) -> None:
    with pytest.raises(anyckpt.UsageError, match="unknown format 'raw'"):
        check_format(RAW, tmp_path)


CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "num_hidden_layers": 2,
    "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 37,
    "max_position_embeddings": 96, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip


class Emptied(type(IDENTITY)):  # type: ignore[misc]
    """An operation that loses what it is given."""

    def to_hub(self, sources: Any, config: Any) -> LazyTensor:
        return Constant(sources[0].dtype, sources[0].shape)


def without(key: str) -> tuple[Any, ...]:
    return tuple(field for field in llama.FAMILY.hugging_face.fields if field.key != key)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: replace(f, rules=(f.rules[0], *f.rules)), "two rules have the hub's name"),
        (lambda f: replace(f, rules=(replace(f.rules[1], hub="decoder.x"), *f.rules)), "other numbers of stars"),
        (lambda f: replace(f, rules=(replace(f.rules[0], operation=Emptied()), *f.rules[1:])), "a value is lost"),
        (
            lambda f: replace(f, hugging_face=replace(f.hugging_face, fields=without("rms_norm_eps"))),
            "keys of config.json that nothing reads: rms_norm_eps",
        ),
        (
            lambda f: replace(
                f, ignorable=tuple((f"model.layers.*.{rest}", "a wrong reason") for rest in ("*.*", "*.*.*"))
            ),
            "of no rule, and is lost",
        ),
    ],
)
def test_families_that_break_the_contract(
    change: Callable[[Family], Family], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_family(llama.FAMILY, CONFIG)
    with pytest.raises(AssertionError, match="not registered"):
        check_family(change(llama.FAMILY), CONFIG)
    made = change(llama.FAMILY)
    monkeypatch.setattr(llama, "FAMILY", made)
    with pytest.raises((AssertionError, anyckpt.AnyckptError), match=problem):
        check_family(made, CONFIG)
