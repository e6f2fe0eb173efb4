"""Changing the parallel layout, alone and while converting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support import expected_of, fixture_path, sha256_of

from anyckpt.cli import run
from anyckpt.errors import UsageError
from anyckpt.formats import registry
from anyckpt.operations.convert import convert
from anyckpt.operations.diff import diff
from anyckpt.operations.reshard import reshard
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.operations.steps.layout_request import LayoutRequest

DENSE = [
    "legacy/megatron_gpt_tp2_pp2",
    "legacy/megatron_gpt_tp2_pp2_vpp2",
    "legacy/megatron_gpt_fp32_optim_tp2",
    "legacy/megatron_distopt_tp2_dp2",
]
LAYOUTS = [
    LayoutRequest(tensor_parallel=1, pipeline_parallel=1),
    LayoutRequest(tensor_parallel=4, pipeline_parallel=1),
    LayoutRequest(tensor_parallel=1, pipeline_parallel=2, virtual_pipeline=1),
    LayoutRequest(tensor_parallel=2, pipeline_parallel=2),
]
LLAMA = "families/llama/hf"


def back(source: str, *, virtual: int | None = None) -> LayoutRequest:
    """The layout that a fixture has."""
    layout = registry.read(fixture_path(source)).layout
    return LayoutRequest(
        tensor_parallel=layout.tensor_parallel,
        pipeline_parallel=layout.pipeline_parallel,
        virtual_pipeline=layout.virtual_pipeline,
    )


def digests(path: Path) -> dict[str, dict[str, str]]:
    """Rank file -> stored name -> digest of weights and optimizer state; random states aside."""
    checkpoint = registry.read(path)
    found: dict[str, dict[str, str]] = {}
    for name, tensor in checkpoint.tensors.items():
        folder, _, rest = name.partition(".")
        if "rng_state" not in name:
            found.setdefault(folder, {})[rest] = sha256_of(tensor)
    return found


@pytest.mark.parametrize("fixture", DENSE)
@pytest.mark.parametrize("request_", LAYOUTS, ids=str)
def test_recut_and_back_is_the_identity(fixture: str, request_: LayoutRequest, tmp_path: Path) -> None:
    source = fixture_path(fixture)
    reshard(source, tmp_path / "other", layout=request_)
    found = diff(source, tmp_path / "other")
    assert not found.different + found.only_in_a + found.only_in_b
    assert not found.configuration
    assert {setting.name for setting in found.state} <= {"random states"}  # which are of the source's ranks
    reshard(tmp_path / "other", tmp_path / "back", layout=back(fixture))
    original, returned = open_checkpoint(source), open_checkpoint(tmp_path / "back")
    assert {n: sha256_of(t) for n, t in original.tensors.items()} == {
        n: sha256_of(t) for n, t in returned.tensors.items()
    }
    assert (original.optimizer is not None) == bool(expected_of(fixture)["optimizer"])
    if original.optimizer is None:
        assert returned.optimizer is None
        return
    assert returned.optimizer is not None
    before, after = original.optimizer(), returned.optimizer()
    assert before.slots.keys() == after.slots.keys()
    assert before.step == after.step
    for slot, tensors in before.slots.items():
        assert {n: sha256_of(t) for n, t in tensors.items()} == {n: sha256_of(t) for n, t in after.slots[slot].items()}


def test_rank_files_come_back_tensor_for_tensor(tmp_path: Path) -> None:
    source = fixture_path("legacy/megatron_gpt_tp2_pp2")
    reshard(source, tmp_path / "other", layout=LayoutRequest(tensor_parallel=1, pipeline_parallel=4))
    reshard(tmp_path / "other", tmp_path / "back", layout=LayoutRequest(tensor_parallel=2, pipeline_parallel=2))
    assert digests(source) == digests(tmp_path / "back")


@pytest.mark.parametrize("fixture", ["legacy/megatron_moe_tp2_ep2", "legacy/megatron_moe_pp2_ep2_etp1"])
@pytest.mark.parametrize(
    "request_",
    [
        LayoutRequest(tensor_parallel=1, pipeline_parallel=1, expert_parallel=1, expert_tensor_parallel=1),
        LayoutRequest(tensor_parallel=2, pipeline_parallel=2, expert_parallel=2),
        LayoutRequest(tensor_parallel=1, pipeline_parallel=1, expert_parallel=4, expert_tensor_parallel=1),
    ],
    ids=str,
)
def test_experts_are_dealt_out_anew(fixture: str, request_: LayoutRequest, tmp_path: Path) -> None:
    reshard(fixture_path(fixture), tmp_path / "other", layout=request_)
    assert diff(fixture_path(fixture), tmp_path / "other").equal


@pytest.mark.parametrize(
    "request_",
    [
        LayoutRequest(pipeline_parallel=2, first_stage_layers=1),
        LayoutRequest(pipeline_parallel=2, pipeline_layout="Et|t"),
    ],
    ids=str,
)
def test_hugging_face_to_ranks_and_back(request_: LayoutRequest, tmp_path: Path) -> None:
    source = fixture_path(LLAMA)
    convert(source, tmp_path / "ranks", to="megatron-lm", layout=LayoutRequest(tensor_parallel=2))
    convert(tmp_path / "ranks", tmp_path / "hf", to="hf")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    if request_.pipeline_layout == "Et|t":
        with pytest.raises(UsageError):
            reshard(tmp_path / "ranks", tmp_path / "staged", layout=request_)
        return
    reshard(tmp_path / "ranks", tmp_path / "staged", layout=request_)
    convert(tmp_path / "staged", tmp_path / "hf2", to="hf")
    assert (tmp_path / "hf2/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_nemo_archive_of_ranks_and_back(tmp_path: Path) -> None:
    source = fixture_path(LLAMA)
    convert(source, tmp_path / "a.nemo", to="nemo", layout=LayoutRequest(tensor_parallel=2, pipeline_parallel=2))
    assert registry.read(tmp_path / "a.nemo").layout.tensor_parallel == 2
    convert(tmp_path / "a.nemo", tmp_path / "hf", to="hf")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_ranks_become_a_distributed_checkpoint_and_whole_tensors(tmp_path: Path) -> None:
    source = fixture_path("nemo/nemo1_mp_tp2")
    convert(source / "model.nemo", tmp_path / "distributed", to="megatron-core")
    assert diff(source / "model.nemo", tmp_path / "distributed").equal
    convert(source / "model.nemo", tmp_path / "flat.nemo", to="nemo")
    assert registry.read(tmp_path / "flat.nemo").ranks == ()
    assert diff(source / "model.nemo", tmp_path / "flat.nemo").equal


def test_a_target_without_layout_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hf keeps whole tensors"):
        convert(fixture_path(LLAMA), tmp_path / "out", to="hf", layout=LayoutRequest(tensor_parallel=2))
    done = convert(
        fixture_path(LLAMA), tmp_path / "out", to="megatron-core", layout=LayoutRequest(tensor_parallel=2), dry_run=True
    )
    assert any("any parallel size" in note for note in done.notes)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--tp", "3"], "3"),
        (["--pp", "3"], "layers"),
        (["--vpp", "2", "--pp", "1"], "virtual pipeline"),
        (["--pp", "2", "--pipeline-layout", "Et|tL"], "layout"),
        (["--ep", "2"], "expert"),
        (["--vocab-size", "100000"], "vocabulary"),
    ],
)
def test_an_impossible_layout_is_one_line(
    arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = fixture_path("legacy/megatron_gpt_tp2_pp2")
    assert run(["reshard", str(source), str(tmp_path / "out"), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert len(printed.err.splitlines()) == 1
    assert problem in printed.err
    assert list(tmp_path.iterdir()) == []


def test_rules_for_a_model_that_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("'decoder.layers.*.odd.weight': columns\n")
    source = fixture_path("legacy/megatron_gpt_tp2_pp2")
    command = ["reshard", str(source), str(tmp_path / "out"), "--tp", "1", "--partition-rules", str(rules), "--json"]
    assert run(command) == 2
    assert "columns" in capsys.readouterr().err
    rules.write_text("'decoder.layers.*.odd.weight': column\n")
    assert run(command) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "megatron-lm"


def test_inspect_shows_the_model_and_not_its_copies(capsys: pytest.CaptureFixture[str]) -> None:
    source = fixture_path("legacy/megatron_gpt_tp2_pp2")
    assert run(["inspect", str(source), "--json", "--tensors", "*linear_fc1.weight"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layout"]["tensor_parallel"] == 2
    assert facts["layout"]["pipeline_parallel"] == 2
    fc1 = next(t for t in facts["tensors"] if t["name"] == "decoder.layers.3.mlp.linear_fc1.weight")
    assert fc1["shape"] == [24, 8]
    assert facts["has_optimizer"] is True
    assert facts["step"] == 7


def test_a_sharded_archive_stays_sharded(tmp_path: Path) -> None:
    source = fixture_path("nemo/nemo1_dist_tp2") / "model.nemo"
    reshard(source, tmp_path / "again.nemo", layout=LayoutRequest())
    assert registry.read(tmp_path / "again.nemo").dialect == "nemo-sharded"
    assert diff(source, tmp_path / "again.nemo").equal
