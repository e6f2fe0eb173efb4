"""Modules' own states (``_extra_state``): dropped by default, kept on request, each with its module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.formats.megatron_lm_files import FILE, change_rank, copy_fixture, root_of

from anyckpt.cli import run
from anyckpt.formats import registry
from anyckpt.operations.convert import convert
from anyckpt.operations.reshard import reshard
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.tensor import LazyTensor, from_array

DENSE, VIRTUAL, EXPERTS = "megatron_gpt_tp2_pp2", "megatron_gpt_tp2_pp2_vpp2", "megatron_moe_tp2_ep2"
KEEP = LayoutRequest(keep_extra_state=True)


def state_of(*words: object) -> LazyTensor:
    """A state that tells whose it is."""
    return from_array(np.frombuffer("/".join(map(str, words)).encode(), np.uint8))


def text_of(state: Any) -> str | None:
    return None if state is None else state.numpy().tobytes().decode()


def with_states(fixture: str, folder: Path) -> Path:
    """A copy of a fixture in which every state says which rank's and which module's it is."""
    root = copy_fixture(fixture, folder)
    for path in root.glob(f"*/*/{FILE}"):

        def change(contents: dict[Any, Any], rank: str = path.parent.name) -> None:
            for key in [key for key in contents if str(key).startswith("model")]:
                names = [name for name in contents[key] if name.endswith("_extra_state")]
                contents[key].update({name: state_of(rank, key, name) for name in names})

        change_rank(path, change)
    return root


def states(root: Path) -> dict[tuple[str, str, str], str | None]:
    """(rank folder, model's key, name) -> whose state it is."""
    found = {}
    for path in root.glob(f"*/*/{FILE}"):
        for key, model in root_of(path).items():
            if str(key).startswith("model"):
                for name in model:
                    if name.endswith("_extra_state"):
                        found[path.parent.name, key, name] = text_of(model[name])
    return found


def test_states_are_dropped_unless_asked_for(tmp_path: Path) -> None:
    root = with_states(DENSE, tmp_path)
    assert None not in states(root).values()
    done = reshard(root, tmp_path / "out", layout=LayoutRequest(), optimizer="drop")
    assert set(states(tmp_path / "out").values()) == {None}
    assert any(name.endswith("_extra_state") for name in done.ignored)


def test_states_go_with_their_modules(tmp_path: Path) -> None:
    root = with_states(DENSE, tmp_path)
    layout = LayoutRequest(tensor_parallel=1, pipeline_parallel=4, keep_extra_state=True)
    done = reshard(root, tmp_path / "out", layout=layout, optimizer="drop")
    assert not any(name.endswith("_extra_state") for name in done.ignored)
    assert any("that of rank 0 is kept" in note for note in done.notes)
    found = states(tmp_path / "out")
    assert len(found) == 4 * 4 + 1
    for (folder, key, name), whose in found.items():
        stage = int(folder.rpartition("_")[2])
        old = name.replace("layers.0.", f"layers.{stage % 2}.")
        assert key == "model" and whose == f"mp_rank_00_00{stage // 2}/model/{old}"


@pytest.mark.parametrize("fixture", [DENSE, VIRTUAL, EXPERTS])
def test_through_a_distributed_checkpoint_and_back(fixture: str, tmp_path: Path) -> None:
    root = with_states(fixture, tmp_path)
    convert(root, tmp_path / "core", to="megatron-core", layout=KEEP)
    objects = registry.read(tmp_path / "core")
    assert objects.extra_states is not None
    whole = objects.extra_states()
    assert len(set(map(text_of, whole.values()))) == len(whole)
    if fixture == EXPERTS:
        assert text_of(whole["decoder.layers.1.mlp.experts.linear_fc2._extra_state3"]) == (
            "mp_rank_00_001/model/decoder.layers.1.mlp.experts.local_experts.1.linear_fc2._extra_state"
        )
    present = registry.read(root).layout
    sizes = LayoutRequest(
        tensor_parallel=present.tensor_parallel,
        pipeline_parallel=present.pipeline_parallel,
        virtual_pipeline=present.virtual_pipeline if present.virtual_pipeline > 1 else None,
        expert_parallel=present.expert_parallel,
        keep_extra_state=True,
    )
    convert(tmp_path / "core", tmp_path / "back", to="megatron-lm", layout=sizes)
    found, before = states(tmp_path / "back"), states(root)
    assert found.keys() == before.keys()
    for (folder, key, name), whose in found.items():
        source = folder.replace("mp_rank_01", "mp_rank_00")
        if fixture == EXPERTS and ".local_experts." not in name:
            source = "mp_rank_00_000"
        if name == "output_layer._extra_state":  # Megatron-Core's distributed checkpoints have none of it
            assert whose is None
        else:
            assert whose == before[source, key, name]


def test_experts_states_are_dealt_out_anew(tmp_path: Path) -> None:
    root = with_states(EXPERTS, tmp_path)
    layout = LayoutRequest(tensor_parallel=4, expert_parallel=4, expert_tensor_parallel=1, keep_extra_state=True)
    reshard(root, tmp_path / "out", layout=layout, optimizer="drop")
    for (folder, _, name), whose in states(tmp_path / "out").items():
        rank = int(folder.rpartition("_")[2])
        if ".local_experts." in name:
            assert ".local_experts.0." in name
            old = name.replace(".local_experts.0.", f".local_experts.{rank % 2}.")
            assert whose == f"mp_rank_00_00{rank // 2}/model/{old}"
        else:
            assert whose == f"mp_rank_00_000/model/{name}"


def test_a_state_of_all_experts_of_a_rank_is_left_out(tmp_path: Path) -> None:
    """Only ranks with as many experts could take it."""
    root = copy_fixture(EXPERTS, tmp_path)
    name = "decoder.layers.0.mlp.experts.linear_fc1._extra_state"
    for path in root.glob(f"*/*/{FILE}"):
        change_rank(path, lambda contents: contents["model"].update({name: state_of("x")}))
    done = reshard(root, tmp_path / "out", layout=LayoutRequest(keep_extra_state=True), optimizer="drop")
    assert name in done.ignored
    assert set(states(tmp_path / "out").values()) == {None}


def test_where_there_is_none_or_no_place_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copy_fixture(DENSE, tmp_path)
    assert run(["reshard", str(root), str(tmp_path / "out"), "--keep-extra-state", "--optimizer", "drop"]) == 0
    assert "there is no extra state in the source to keep" in capsys.readouterr().err
    assert run(["convert", str(root), str(tmp_path / "x"), "--to", "torch", "--keep-extra-state"]) == 2
    assert "--keep-extra-state means nothing for torch" in capsys.readouterr().err
