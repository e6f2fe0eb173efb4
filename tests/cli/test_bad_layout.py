"""Bad rank files and impossible layouts: a named error in one line, and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.runner import Runner
from tests.formats.megatron_lm_files import FILE, change_rank, copy_fixture, root_of
from tests.support import fixture_path

from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.tensor import from_array

DENSE, VIRTUAL, STAGES = "megatron_gpt_tp2_pp2", "megatron_gpt_tp2_pp2_vpp2", "megatron_gpt_pp3_uneven"
EXPERTS = "megatron_moe_tp2_ep2"
Damage = Callable[[Path], None]

DAMAGE: dict[str, tuple[str, Damage, list[str]]] = {}
"""Name -> the fixture, what is done to it, and what the line must say."""


def damage(fixture: str, *says: str) -> Callable[[Damage], Damage]:
    def register(change: Damage) -> Damage:
        DAMAGE[change.__name__] = (fixture, change, list(says))
        return change

    return register


def rank(root: Path, folder: str) -> Path:
    return next(root.glob(f"iter_*/{folder}")) / FILE


@damage(DENSE, "mp_rank_01_000", "missing")
def missing_rank_folder(root: Path) -> None:
    shutil.rmtree(rank(root, "mp_rank_01_000").parent)


@damage(DENSE, "mp_rank_01_001", "holds no model", "model_optim_rng.pt")
def missing_file_of_a_rank(root: Path) -> None:
    rank(root, "mp_rank_01_001").unlink()


@damage(EXPERTS, "mp_rank_01_001", "missing")
def missing_folder_of_an_expert_rank(root: Path) -> None:
    shutil.rmtree(rank(root, "mp_rank_01_001").parent)


@damage(DENSE, "mp_rank_00_001", "iteration", "7", "9")
def ranks_of_different_iterations(root: Path) -> None:
    change_rank(rank(root, "mp_rank_00_001"), lambda contents: contents.update(iteration=9))


@damage(DENSE, "mp_rank_01_001")
def truncated_rank(root: Path) -> None:
    path = rank(root, "mp_rank_01_001")
    path.write_bytes(path.read_bytes()[:-2000])


def _model(change: Callable[[dict[str, Any]], None], key: str = "model") -> Callable[[dict[Any, Any]], None]:
    return lambda contents: change(contents[key])


def _each(root: Path, folders: list[str], change: Callable[[dict[str, Any]], None], key: str = "model") -> None:
    for folder in folders:
        change_rank(rank(root, folder), _model(change, key))


def _without_layer(number: int) -> Callable[[dict[str, Any]], None]:
    def change(model: dict[str, Any]) -> None:
        for name in [name for name in model if f".layers.{number}." in name]:
            del model[name]

    return change


@damage(DENSE, "decoder layers of pipeline rank 1", "expected 2 layers", "found 1 layers", "mp_rank_00_001")
def missing_layer(root: Path) -> None:
    _each(root, ["mp_rank_00_001", "mp_rank_01_001"], _without_layer(1))


@damage(VIRTUAL, "decoder layers of pipeline rank 0, chunk 1", "expected 2 layers", "found 1 layers")
def missing_layer_of_a_chunk(root: Path) -> None:
    _each(root, ["mp_rank_00_000", "mp_rank_01_000"], _without_layer(0), "model1")


@damage(DENSE, "decoder layers of pipeline rank 0", "expected 2 layers", "found 3 layers")
def layer_too_many(root: Path) -> None:
    def change(model: dict[str, Any]) -> None:
        for name in [name for name in model if ".layers.1." in name]:
            model[name.replace(".layers.1.", ".layers.2.")] = model[name]

    _each(root, ["mp_rank_00_000", "mp_rank_01_000"], change)


@damage(DENSE, "under two names", "mp_rank_00_000", "layers.0.self_attention.linear_qkv.layer_norm_weight")
def layer_twice(root: Path) -> None:
    """Under the spelling of local layers and under Transformer Engine's."""

    def change(model: dict[str, Any]) -> None:
        norm = model["decoder.layers.0.input_layernorm.weight"]
        model["decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"] = norm

    _each(root, ["mp_rank_00_000", "mp_rank_01_000"], change)


@damage(DENSE, "decoder.layers.0.mlp.linear_fc2.weight", "in one rank's file", "mp_rank_01_000")
def tensor_of_one_rank_alone(root: Path) -> None:
    _each(root, ["mp_rank_01_000"], lambda model: model.pop("decoder.layers.0.mlp.linear_fc2.weight"))


@damage(EXPERTS, "experts", "expected 2 experts", "found 1", "decoder.layers.1.mlp.experts.linear_fc1.weight")
def missing_expert(root: Path) -> None:
    def change(model: dict[str, Any]) -> None:
        del model["decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight"]

    _each(root, ["mp_rank_00_000", "mp_rank_01_000", "mp_rank_00_001", "mp_rank_01_001"], change)


@damage(DENSE, "different types or shapes", "linear_fc2.weight", "on rank 1")
def part_of_another_shape(root: Path) -> None:
    def change(model: dict[str, Any]) -> None:
        name = "decoder.layers.0.mlp.linear_fc2.weight"
        model[name] = model[name].narrow(1, 0, 3)

    _each(root, ["mp_rank_01_000"], change)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_ranks(name: str, anyckpt: Runner, tmp_path: Path) -> None:
    fixture, change, says = DAMAGE[name]
    root = copy_fixture(fixture, tmp_path)
    change(root)
    before = sorted(tmp_path.rglob("*"))
    for command in (
        ["reshard", root, tmp_path / "out", "--tp", "1"],
        ["convert", root, tmp_path / "out", "--to", "megatron-core"],
    ):
        error = anyckpt(*command).error
        assert str(root) in error or "mp_rank" in error
        for text in says:
            assert text in error, error
        assert sorted(tmp_path.rglob("*")) == before


LAYOUTS: list[tuple[str, list[str], list[str]]] = [
    (DENSE, ["--tp", "3"], ["cannot be", "--tp"]),
    (DENSE, ["--pp", "3"], ["evenly", "multiple of 3", "found 4", "--pp"]),
    (DENSE, ["--pp", "2", "--vpp", "4"], ["virtual chunks", "--vpp"]),
    (DENSE, ["--pp", "1", "--vpp", "2"], ["needs a pipeline"]),
    (DENSE, ["--ep", "2"], ["experts"]),
    (DENSE, ["--pp", "2", "--pipeline-layout", "Ett|tL"], ["4 decoder layers", "found 3"]),
    (DENSE, ["--pp", "2", "--pipeline-layout", "Ett|t|tL"], ["--pipeline-layout and --pp", "found 3 stages", "--pp 2"]),
    (DENSE, ["--pp", "1", "--pipeline-layout", "Ett|ttL"], ["--pipeline-layout and --pp", "found 2 stages", "--pp 1"]),
    (DENSE, ["--pp", "2", "--vpp", "2", "--pipeline-layout", "Ett|ttL"], ["found 2 stages", "--pp 2 --vpp 2"]),
    (DENSE, ["--pp", "2", "--pipeline-layout", "Ett|ttL", "--first-stage-layers", "2"], ["give one of the two"]),
    (DENSE, ["--pp", "2", "--pipeline-layout", "ttE|ttL"], ["begin with the embedding"]),
    (DENSE, ["--pp", "2", "--pipeline-layout", "Ett|ttx"], ["not understood"]),
    (DENSE, ["--pp", "2", "--pipeline-layout", "E" + "t*99999" * 9 + "|L"], ["too many layers"]),
    (DENSE, ["--pp", "2", "--first-stage-layers", "5"], ["first and last pipeline stage"]),
    (DENSE, ["--pp", "2", "--account-for-embedding"], ["found 5 (layers and embedding)"]),
    (DENSE, ["--vocab-size", "100"], ["100", "64", "--vocab-size"]),
    (EXPERTS, ["--ep", "3"], ["experts cannot be spread"]),
    (EXPERTS, ["--tp", "2", "--etp", "3"], ["expert tensor parallel size", "--etp"]),
]


@pytest.mark.parametrize(("fixture", "options", "says"), LAYOUTS, ids=[" ".join(case[1])[:40] for case in LAYOUTS])
def test_layouts_that_do_not_fit(
    fixture: str, options: list[str], says: list[str], anyckpt: Runner, tmp_path: Path
) -> None:
    error = anyckpt("reshard", fixture_path(f"legacy/{fixture}"), tmp_path / "out", *options).error
    for text in says:
        assert text in error, error
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_layout_of_virtual_stages(anyckpt: Runner, tmp_path: Path) -> None:
    """Megatron-LM takes as many chunks as there are stages for each of ``--pp``."""
    words = ("--pp", "2", "--pipeline-layout", "Et|t|t|tL")
    source = fixture_path(f"legacy/{DENSE}")
    assert anyckpt("reshard", source, tmp_path / "out", *words).code == 0
    assert open_checkpoint(tmp_path / "out").layout.virtual_pipeline == 2
    assert anyckpt("diff", source, tmp_path / "out").code == 0


def test_replicated_tensors_that_differ_are_named_and_rank_0_is_taken(anyckpt: Runner, tmp_path: Path) -> None:
    root = copy_fixture(DENSE, tmp_path)
    name = "decoder.layers.1.input_layernorm.weight"

    def change(model: dict[str, Any]) -> None:
        values = model[name].numpy().copy()
        values.view(np.uint16)[3] ^= 1
        model[name] = from_array(values)

    kept = root_of(rank(root, "mp_rank_00_000"))["model"][name].numpy().tobytes()
    _each(root, ["mp_rank_01_000"], change)
    done = anyckpt("reshard", root, tmp_path / "out", "--tp", "1", "--optimizer", "drop")
    assert done.code == 0
    assert (
        "note: decoder.layers.1.self_attention.linear_qkv.layer_norm_weight differs between ranks: "
        f"{rank(root, 'mp_rank_01_000')} in 1 of 8 elements; took that of {rank(root, 'mp_rank_00_000')}" in done.err
    )
    found = open_checkpoint(tmp_path / "out").weights()["decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"]
    assert found.numpy().tobytes() == kept


def _other_optimizer(contents: dict[Any, Any]) -> None:
    """The state that a rank of tensor parallel size 1 would have."""
    masters = contents["optimizer"]["fp32_from_fp16_params"]
    masters[0] = [from_array(np.zeros((m.shape[0] * 2, *m.shape[1:]), np.float32)) for m in masters[0]]


def _fewer_parameters(contents: dict[Any, Any]) -> None:
    contents["optimizer"]["fp32_from_fp16_params"][0].pop()


@pytest.mark.parametrize("change", [_other_optimizer, _fewer_parameters], ids=["shapes", "counts"])
def test_an_optimizer_of_another_layout(
    change: Callable[[dict[Any, Any]], None], anyckpt: Runner, tmp_path: Path
) -> None:
    root = copy_fixture(DENSE, tmp_path)
    change_rank(rank(root, "mp_rank_01_000"), change)
    before = sorted(tmp_path.rglob("*"))
    error = anyckpt("reshard", root, tmp_path / "out", "--tp", "1").error
    assert "mp_rank_01_000" in error and "--optimizer drop" in error
    assert "expected" in error and "found" in error
    assert sorted(tmp_path.rglob("*")) == before
    assert anyckpt("reshard", root, tmp_path / "out", "--tp", "1", "--optimizer", "drop").code == 0
