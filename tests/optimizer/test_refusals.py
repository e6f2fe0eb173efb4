"""State of a layout that cannot be proved: a named error with the numbers, nothing written, and a way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anyckpt.containers.torch_file import read_torch, zip_parts
from anyckpt.engine.plan import OutputFile
from anyckpt.errors import AnyckptError
from anyckpt.operations.convert import convert
from anyckpt.operations.steps.joining import open_checkpoint
from anyckpt.storage.local_file import LocalFile
from anyckpt.tensor import from_array
from tests.formats.megatron_lm_files import FILE, change_rank, copy_fixture
from tests.optimizer.rank_files import adam_of, config_of, matrices, ranks_of, wrapped, written
from tests.support import file_bytes, fixture_path


def of_early_2023(tmp_path: Path) -> Path:
    root = copy_fixture("megatron_gpt_fp32_optim_tp2", tmp_path)
    for rank in ("mp_rank_00", "mp_rank_01"):
        folder = root / "iter_0000007" / rank
        change_rank(folder / FILE, lambda contents: contents.pop("optimizer"))
        (folder / FILE).rename(folder / "model_rng.pt")
        for number in range(2):
            (root / "iter_0000007" / f"{rank}_{number:03d}").mkdir()
            (root / "iter_0000007" / f"{rank}_{number:03d}" / "optim.pt").write_bytes(b"never opened")
    return root


def of_other_ranks(tmp_path: Path) -> Path:
    """The optimizer of a run at another pipeline size: stages hold each other's states."""
    root = copy_fixture("megatron_gpt_tp2_pp2", tmp_path)
    folders = sorted(root.glob(f"iter_*/*/{FILE}"))
    originals = sorted(fixture_path("legacy/megatron_gpt_tp2_pp2").glob(f"iter_*/*/{FILE}"))
    held = [read_torch(LocalFile(path)).root["optimizer"] for path in originals]
    for path, other in zip(folders, [held[1], held[0], held[3], held[2]], strict=True):
        change_rank(path, lambda contents, own=other: contents.update(optimizer=own))  # type: ignore[misc]
    return root


def lightning(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A Llama as Lightning saves it, and its optimizer."""
    weights = open_checkpoint(fixture_path("families/llama/hf")).weights()
    kept = [[own for own in weights.values() if (own.ndim > 1) == matrices] for matrices in (True, False)]
    root: dict[str, Any] = {
        "pytorch-lightning_version": "2.6.0", "global_step": 6, "state_dict": dict(weights),
        "optimizer_states": [adam_of(kept)],
    }  # fmt: skip
    change(root["optimizer_states"][0])
    path = tmp_path / "x.ckpt"
    path.write_bytes(file_bytes(OutputFile("", zip_parts(root))))
    return path


def of_another_model(tmp_path: Path) -> Path:
    def change(adam: dict[str, Any]) -> None:
        adam["state"][0], adam["state"][2] = adam["state"][2], adam["state"][0]

    return lightning(tmp_path, change)


def of_a_larger_model(tmp_path: Path) -> Path:
    def change(adam: dict[str, Any]) -> None:
        number = len(adam["state"])
        adam["state"][number] = adam["state"][number - 1]
        adam["param_groups"][1]["params"].append(number)

    return lightning(tmp_path, change)


def not_adam(tmp_path: Path) -> Path:
    def change(adam: dict[str, Any]) -> None:
        adam["state"] = {number: {"momentum_buffer": one["exp_avg"]} for number, one in adam["state"].items()}

    return lightning(tmp_path, change)


def of_no_known_kind(tmp_path: Path) -> Path:
    def change(adam: dict[str, Any]) -> None:
        moment = adam["state"][0]["exp_avg"]
        adam.clear()
        adam["factored"] = {"rows": moment}

    return lightning(tmp_path, change)


def of_data_parallel_ranks(tmp_path: Path) -> Path:
    """Apex's buckets of one data-parallel rank of two."""
    case = "nemo/nemo1_mp_tp2"
    part = read_torch(LocalFile(fixture_path("legacy/apex_distributed_adam/gathered.pt"))).root["gathered_states"][0]
    return written(tmp_path / "c", ranks_of(case), config_of(case), lambda _, state: [{"gathered_states": [part]}])


def with_a_state_too_many(tmp_path: Path) -> Path:
    def optimizer(_: str, state: Any) -> Any:
        own = wrapped([state], matrices)
        own["optimizer"]["param_groups"][0]["params"].append(99)
        own["optimizer"]["state"][99] = {"exp_avg": from_array(own["optimizer"]["state"][0]["exp_avg"].numpy())}
        return [own]

    case = "nemo/nemo1_mp_tp2"
    return written(tmp_path / "c", ranks_of(case), config_of(case), optimizer)


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "other data-parallel ranks": (of_early_2023, "are not those of the run .expected 1 folders.*found mp_rank_00_000,"),
    "of other ranks": (
        of_other_ranks,
        "parameter group 1 of the optimizer does not fit.*expected 6 parameters.*found 7",
    ),
    "of another model": (of_another_model, "does not fit.*entries|nothing tells which parameters.*found groups of"),
    "of a larger model": (of_a_larger_model, "more entries than the model has such parameters.*expected.*found"),
    "not Adam": (not_adam, "the optimizer is not Adam, and megatron-lm has a place for Adam's state only"),
    "of no known kind": (of_no_known_kind, "of a kind that is not understood"),
    "one data-parallel rank of two": (of_data_parallel_ranks, "is not whole.*expected 256 elements, found 128 of 1"),
    "a state too many": (with_a_state_too_many, "do not fit the rank's parameters.*found 12 [+] 5 entries|found"),
}


@pytest.mark.parametrize("case", CASES)
def test_keeping_is_refused_and_dropping_works(case: str, tmp_path: Path) -> None:
    make, words = CASES[case]
    source = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    config = fixture_path("families/llama/hf/config.json") if source.suffix == ".ckpt" else None
    target = "megatron-lm" if config is not None else "dcp"
    with pytest.raises(AnyckptError, match=words) as error:
        convert(source, tmp_path / "out", to=target, optimizer="keep", config=config)
    assert "--optimizer drop" in str(error.value)
    assert sorted(tmp_path.iterdir()) == before
    convert(source, tmp_path / "out", to=target, optimizer="drop", config=config)
