"""Any set of names: what only looks at names says something of them or nothing, and loses none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.models.cases import open_case
from tests.support import write_plan

import anyckpt
from anyckpt.checkpoint import Checkpoint
from anyckpt.dtypes import BY_NAME
from anyckpt.errors import AnyckptError, UsageError
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.safetensors import FORMAT
from anyckpt.models.dialects import spellings
from anyckpt.models.dialects.wrappers import unwrapped
from anyckpt.models.families import each_family
from anyckpt.models.recognise import resemblance
from anyckpt.models.to_hub import to_hub
from anyckpt.tensor import Constant, LazyTensor

FAMILIES = list(each_family())
PATTERNS = sorted({p for family in FAMILIES for rule in family.rules for p in (*rule.source, rule.hub)})
WORDS = sorted({word for pattern in PATTERNS for word in pattern.split(".")} - {"*"})
WRAPPERS = (
    "model", "module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module", "base_model", "pretrained_model",
    "language_model", "llm", "enc_dec_model", "bert", "transformer", "shared", "optimizer", "lm_head", "loss_fn",
)  # fmt: skip
TAILS = ("_extra_state", "lora_A.weight", "lora_B.default.weight", "qweight", "weight_scale", "weight_w", "bias_v",
         "weight0", "rotary_pos_emb.inv_freq")  # fmt: skip

indices = st.one_of(st.integers(0, 3).map(str), st.sampled_from(["007", "99999999999999999999", "٣", "9" * 5000, "-1"]))


@st.composite
def filled(draw: st.DrawFn) -> str:
    """A name of some family's or of the hub's, wrapped or not, or its end alone."""
    pieces = draw(st.sampled_from(PATTERNS)).split("*")
    name = pieces[0] + "".join(draw(indices) + piece for piece in pieces[1:])
    parts = name.split(".")
    start = draw(st.integers(0, min(2, len(parts) - 1)))
    return ".".join([*draw(st.lists(st.sampled_from(WRAPPERS), max_size=2)), *parts[start:]])


put_together = st.lists(st.sampled_from([*WORDS, *WRAPPERS, *TAILS, "", "0", "1"]), min_size=1, max_size=6).map(
    ".".join
)
names = st.one_of(filled(), filled(), put_together, st.text(max_size=8))
shapes = st.lists(st.sampled_from([0, 1, 2, 4]), max_size=3).map(tuple)
models = st.dictionaries(names, shapes, max_size=12)


def tensors_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    return {name: Constant(BY_NAME["float32"], shape) for name, shape in shapes.items()}


@given(models, st.booleans())
@settings(max_examples=300)
@example({"model.norm.weight": (1,), "module.model.norm.weight": (1,), "module.model.embed_tokens.weight": (1,)}, False)
@example({"_orig_mod.lm_head.weight": (1,), "lm_head.weight": (1,), "lm_head._orig_mod.weight": (2,)}, False)
@example({"mymodel.embed_tokens.weight": (1,), "lm_head.weight": (1,), "my.weight": (1,)}, False)
@example({"model.bert.embeddings.word_embeddings.weight": (1,), "loss.weight": (2,)}, False)
def test_every_tensor_is_unwrapped_and_found_again(model: dict[str, tuple[int, ...]], is_part: bool) -> None:
    tensors = tensors_of(model)
    for family in FAMILIES:
        found = unwrapped(tensors, family.rules, is_part)
        assert len(found.tensors) + len(found.others) == len(tensors)
        assert {found.stored(name) for name in found.tensors} | set(found.others) == set(tensors)
        assert all(tensors[found.stored(name)] is tensor for name, tensor in found.tensors.items())


@given(models)
@settings(max_examples=200)
def test_a_guess_by_names_does_not_fail(model: dict[str, tuple[int, ...]]) -> None:
    tensors = tensors_of(model)
    nearest = resemblance(tensors)
    known = spellings.detect(tensors)
    if nearest is not None and not spellings.is_megatron(known):
        assert set(nearest.strange) <= set(tensors)


@given(models)
@settings(max_examples=100)
def test_inspect_takes_any_names(model: dict[str, tuple[int, ...]]) -> None:
    found = anyckpt.inspect(Checkpoint("any", "safetensors", tensors_of(model)), tensors="*" if model else None)
    assert found.tensor_count == len(model)


@given(models, st.sampled_from([*spellings.DIALECTS]))
@settings(max_examples=100)
def test_renaming_between_dialects_takes_any_names(model: dict[str, tuple[int, ...]], wanted: str) -> None:
    tensors = tensors_of(model)
    try:
        named, ignored = spellings.to_hub_names(tensors)
        spellings.from_hub_names(named, wanted)
    except AnyckptError:
        return
    assert sum(tensor.size for tensor in named.values()) <= sum(tensor.size for tensor in tensors.values())
    assert set(ignored) <= set(tensors)


@given(models, st.sampled_from(["llama", "gpt2", "mixtral", "gpt_oss"]), st.booleans())
@settings(max_examples=100)
def test_a_model_of_other_names_is_incomplete(model: dict[str, tuple[int, ...]], name: str, wrapped: bool) -> None:
    case = open_case(name)
    prefix = "module." if wrapped else ""
    own = {prefix + key: tensor for key, tensor in case.checkpoint.tensors.items()}
    others = {key: tensor for key, tensor in tensors_of(model).items() if key not in own}
    try:
        hub = to_hub(replace(case.checkpoint, tensors={**others, **own}), case.model)
    except AnyckptError:
        return
    assert set(others) == set(hub.ignored)


CRASHED = {
    "Whisper": ["model.decoder.embed_tokens.weight", "model.encoder.conv1.weight"],
    "DistilBERT": ["distilbert.embeddings.word_embeddings.weight", "qa_outputs.weight"],
    "a Lightning module with a loss": ["model.model.embed_tokens.weight", "model.lm_head.weight", "loss.weight"],
    "a value head": ["pretrained_model.model.embed_tokens.weight", "v_head.summary.weight"],
    "LLaVA": ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight", "vision_tower.patch"],
    "a prefix that ends as another": ["mymodel.embed_tokens.weight", "lm_head.weight"],
}


@pytest.mark.parametrize("whose", CRASHED)
def test_names_beside_the_prefix(whose: str, tmp_path: Path) -> None:
    tensors = tensors_of(dict.fromkeys(CRASHED[whose], (2, 2)))
    assert FORMAT.plan is not None
    source = write_plan(FORMAT.plan(Checkpoint("any", "hf", tensors), WriteOptions()), tmp_path / "x.safetensors")
    found = anyckpt.inspect(source, tensors="*")
    assert found.family is None
    assert {tensor.name for tensor in found.tensors or ()} == set(tensors)
    with pytest.raises(UsageError, match="there is no configuration"):
        anyckpt.convert(source, tmp_path / "out", to="megatron-core")


@pytest.mark.parametrize("shape", [(1 << 60, 0), (10**9, 1)])
def test_too_many_experts_are_refused_at_once(shape: tuple[int, ...]) -> None:
    name = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
    tensors = {name: Constant(BY_NAME["float32"], shape)}
    assert resemblance(tensors) is None
    with pytest.raises(AnyckptError, match="too many experts"):
        spellings.to_hub_names(tensors)
