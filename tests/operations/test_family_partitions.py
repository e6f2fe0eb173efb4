"""A family of another package whose layers have tensors that no table names: its rules say how ranks divide them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.support import fixture_path

import anyckpt
import anyckpt.models.families as registry
from anyckpt.checkpoint import Checkpoint, OptimizerState
from anyckpt.errors import MappingError, UsageError
from anyckpt.layout import Geometry, Parallelism, cut, join
from anyckpt.layout.partition import Partition
from anyckpt.models.families import llama
from anyckpt.models.families.parts import decoder
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Rule
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.tensor import LazyTensor, concatenate, from_array

_OURS, _HUB = "model.layers.*.self_attn", "decoder.layers.*.self_attention"


class Dealt(Partition):
    """Rows dealt out one by one: rank r of n has rows r, r + n, r + 2n, ..."""

    def cut(self, name: str, whole: LazyTensor, ways: int) -> Sequence[LazyTensor]:
        if whole.shape[0] % ways:
            raise MappingError("has rows that cannot be dealt out", tensor=name)
        rows = [whole.narrow(0, row, 1) for row in range(whole.shape[0])]
        return [concatenate(rows[rank::ways], 0) for rank in range(ways)]

    def join(self, name: str, parts: Sequence[LazyTensor]) -> LazyTensor:
        return concatenate([part.narrow(0, row, 1) for row in range(parts[0].shape[0]) for part in parts], 0)


MINE = replace(
    llama.FAMILY,
    name="mine",
    rules=(
        *decoder.RULES,
        Rule((f"{_OURS}.gate_mix.weight",), f"{_HUB}.gate_mix.weight", ("hidden", "hidden"), partition="column"),
        Rule((f"{_OURS}.turns.weight",), f"{_HUB}.turns.weight", ("hidden", "hidden"), partition=Dealt()),
        Rule(("model.scale.weight",), "scale.weight", ("hidden",), partition="replicated@last"),
    ),
    hugging_face=replace(llama.FAMILY.hugging_face, model_types=("mine",), architectures=("MineForCausalLM",)),
)


class EntryPoint:
    name, group, value, dist = "mine", "anyckpt.families", "tests:MINE", None

    def load(self) -> Family:
        return MINE


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkpoint]:
    monkeypatch.setattr(registry, "registered", lambda group: {"mine": EntryPoint()})
    registry._registered.cache_clear()
    stored = anyckpt.open(fixture_path("families/llama/hf"))
    config = {**stored.config, "model_type": "mine", "architectures": ["MineForCausalLM"]}
    hidden, rng = config["hidden_size"], np.random.default_rng(3)
    tensors = dict(stored.tensors)

    def add(name: str, *shape: int) -> None:
        kind = stored.tensors["model.norm.weight"].dtype
        tensors[name] = from_array(rng.random(shape, dtype=np.float32)).cast(kind)

    for layer in range(config["num_hidden_layers"]):
        add(f"model.layers.{layer}.self_attn.gate_mix.weight", hidden, hidden)
        add(f"model.layers.{layer}.self_attn.turns.weight", hidden, hidden)
    add("model.scale.weight", hidden)
    yield replace(stored, tensors=tensors, config=config)
    registry._registered.cache_clear()


def _arrays(tensors: dict[str, LazyTensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("layout", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}])
def test_there_and_back(model: Checkpoint, layout: dict[str, int], tmp_path: Path) -> None:
    anyckpt.convert(model, tmp_path / "ranks", to="megatron-lm", layout=anyckpt.LayoutRequest(**layout))
    whole = open_checkpoint(tmp_path / "ranks")
    assert whole.tensors["decoder.layers.1.self_attention.turns.weight"].shape[0] == model.config["hidden_size"]
    anyckpt.convert(tmp_path / "ranks", tmp_path / "hf", to="hf")
    assert _arrays(anyckpt.open(tmp_path / "hf").tensors) == _arrays(model.tensors)


def test_what_each_rank_holds(model: Checkpoint, tmp_path: Path) -> None:
    two = anyckpt.LayoutRequest(tensor_parallel=2)
    anyckpt.convert(model, tmp_path / "ranks", to="megatron-lm", layout=two)
    ranks = {shard.tensor_rank: shard.tensors for shard in anyckpt.formats.registry.read(tmp_path / "ranks").ranks}
    for source, first in (("gate_mix", slice(0, None)), ("turns", slice(0, None, 2))):
        whole = model.tensors[f"model.layers.0.self_attn.{source}.weight"].numpy()
        expected = whole[first][: len(whole) // 2]
        found = ranks[0][f"decoder.layers.0.self_attention.{source}.weight"].numpy()
        assert found.tobytes() == expected.tobytes()
    anyckpt.reshard(tmp_path / "ranks", tmp_path / "one", layout=anyckpt.LayoutRequest(tensor_parallel=1))
    anyckpt.reshard(tmp_path / "one", tmp_path / "again", layout=two)
    assert not anyckpt.diff(tmp_path / "ranks", tmp_path / "again")


def test_the_optimizers_state_is_divided_as_the_weights_are(model: Checkpoint, tmp_path: Path) -> None:
    slots = {
        slot: {name: from_array(np.random.default_rng(seed).random(tensor.shape, dtype=np.float32))
               for seed, (name, tensor) in enumerate(model.tensors.items(), start)}
        for start, slot in ((0, "master"), (100, "exp_avg"), (200, "exp_avg_sq"))
    }  # fmt: skip
    trained = replace(
        model,
        optimizer=lambda: OptimizerState(slots=slots, step=7),
        training=replace(model.training, has_optimizer=True),
    )
    two = anyckpt.LayoutRequest(tensor_parallel=2)
    anyckpt.convert(trained, tmp_path / "ranks", to="megatron-lm", layout=two, optimizer="keep")
    state = open_checkpoint(tmp_path / "ranks").optimizer
    assert state is not None
    found = state().slots["exp_avg"]
    for name in ("gate_mix", "turns"):
        expected = slots["exp_avg"][f"model.layers.1.self_attn.{name}.weight"].numpy()
        assert np.array_equal(found[f"decoder.layers.1.self_attention.{name}.weight"].numpy(), expected), name


def test_a_family_that_the_files_do_not_name(model: Checkpoint, tmp_path: Path) -> None:
    two = anyckpt.LayoutRequest(tensor_parallel=2)
    stranger = replace(model, config={**model.config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    anyckpt.convert(stranger, tmp_path / "ranks", to="megatron-lm", layout=two, family="mine")
    anyckpt.convert(tmp_path / "ranks", tmp_path / "hf", to="hf", family="mine")
    assert _arrays(anyckpt.open(tmp_path / "hf").tensors) == _arrays(model.tensors)


def test_a_users_rules_come_before_a_familys_and_a_familys_before_the_table() -> None:
    numbers = from_array(np.arange(16, dtype=np.float32).reshape(4, 4))
    two, model = Parallelism(tensor_parallel=2), Geometry(num_layers=1, num_experts=2)
    tensors = {
        "decoder.layers.0.self_attention.linear_proj.weight": numbers,
        "decoder.layers.0.mlp.experts.linear_fc3.weight0": numbers,
        "decoder.layers.0.mlp.experts.linear_fc3.weight1": numbers,
    }
    family = {
        "decoder.layers.*.self_attention.linear_proj.weight": Dealt(),
        "decoder.layers.*.mlp.experts.linear_fc3.weight*": "row",
    }
    shards = cut(tensors, two, model, family=family)
    assert shards[0].tensors["decoder.layers.0.self_attention.linear_proj.weight"].numpy()[:, 0].tolist() == [0, 8]
    assert shards[0].tensors["decoder.layers.0.mlp.experts.linear_fc3.weight1"].shape == (4, 2)
    assert _arrays(join(shards, two, model, family=family).tensors) == _arrays(tensors)
    shards = cut(tensors, two, model, family=family, rules={"**.linear_proj.weight": "column"})
    assert shards[0].tensors["decoder.layers.0.self_attention.linear_proj.weight"].numpy()[:, 0].tolist() == [0, 4]
    with pytest.raises(MappingError, match="no rule says how tensor parallelism divides"):  # experts in one tensor
        cut({"decoder.layers.0.mlp.experts.linear_fc3.weight": numbers}, two, model, family=family)


class Halving(Dealt):
    def cut(self, name: str, whole: LazyTensor, ways: int) -> Sequence[LazyTensor]:
        return [whole.narrow(0, 0, 1)] * ways


class Single(Dealt):
    def cut(self, name: str, whole: LazyTensor, ways: int) -> Sequence[LazyTensor]:
        return [whole]


@pytest.mark.parametrize(("way", "found"), [(Halving(), r"\(2, 4\) joined again"), (Single(), "1 parts")])
def test_a_way_that_loses_something_is_refused(way: Partition, found: str) -> None:
    whole, name = from_array(np.zeros((4, 4), np.float32)), "decoder.layers.0.odd.weight"
    with pytest.raises(MappingError, match=rf"{type(way).__name__}.*does not divide this tensor.*{found}"):
        cut({name: whole}, Parallelism(tensor_parallel=2), Geometry(num_layers=1), family={name: way})


def test_a_word_that_there_is_not() -> None:
    with pytest.raises(UsageError, match="partition rule for 'a' is not understood"):
        cut({}, Parallelism(), Geometry(num_layers=1), family={"a": "colum"})


def test_inspecting_and_verifying(model: Checkpoint, tmp_path: Path) -> None:
    anyckpt.convert(model, tmp_path / "ranks", to="megatron-lm", layout=anyckpt.LayoutRequest(tensor_parallel=2))
    assert not [text for text in anyckpt.inspect(tmp_path / "ranks").warnings if "cannot be joined" in text]
    assert anyckpt.verify(tmp_path / "ranks")
