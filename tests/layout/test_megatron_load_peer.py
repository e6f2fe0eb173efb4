"""Real Megatron-Core models, built at the target's size, load what we write with the strictest handling.

Each world is a few processes on the CPU (gloo).  What a rank's model holds afterwards is compared with the rank file
that ``megatron-lm`` output of the same layout has, which other tests compare with Megatron's own files.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from anyckpt.formats.megatron_lm.ranks import folder_name  # noqa: E402
from anyckpt.operations.convert import convert  # noqa: E402
from anyckpt.operations.steps.layout_request import LayoutRequest  # noqa: E402
from tests.support import fixture_path  # noqa: E402

pytestmark = pytest.mark.peer

_HERE = Path(__file__).parents[2]
_WORLD = {
    "tensor_parallel": "tensor_model_parallel_size",
    "pipeline_parallel": "pipeline_model_parallel_size",
    "virtual_pipeline": "virtual_pipeline_model_parallel_size",
    "expert_parallel": "expert_model_parallel_size",
    "expert_tensor_parallel": "expert_tensor_parallel_size",
}
_MODEL = {
    "first_stage_layers": "num_layers_in_first_pipeline_stage",
    "last_stage_layers": "num_layers_in_last_pipeline_stage",
    "account_for_embedding": "account_for_embedding_in_pipeline_split",
    "account_for_loss": "account_for_loss_in_pipeline_split",
    "pipeline_layout": "pipeline_model_parallel_layout",
}


@dataclass(frozen=True, eq=False)
class Case:
    """A source and the layout of the models that load it."""

    source: str
    layout: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.source} " + " ".join(f"{key}={value}" for key, value in self.layout.items())


def case(source: str, tp: int = 1, pp: int = 1, vpp: int = 1, ep: int = 1, etp: int | None = None, **more: Any) -> Case:
    sizes: dict[str, Any] = {"tensor_parallel": tp, "pipeline_parallel": pp, **more}
    if vpp > 1:
        sizes["virtual_pipeline"] = vpp
    if ep > 1 or etp:
        sizes |= {"expert_parallel": ep, "expert_tensor_parallel": etp or tp}
    return Case(source, sizes)


DENSE, VIRTUAL, SMALL = "megatron_gpt_tp2_pp2", "megatron_gpt_tp2_pp2_vpp2", "megatron_gpt_tp1_pp1_release"
UNEVEN, LAYOUT = "megatron_gpt_pp3_uneven", "megatron_gpt_pp2_vpp2_layout"
ACCOUNT, MOE, MOE_ETP = "megatron_gpt_pp2_account_emb_loss", "megatron_moe_tp2_ep2", "megatron_moe_pp2_ep2_etp1"

FOUR = [
    *(case(DENSE, tp, pp) for tp, pp in ((1, 1), (4, 1), (1, 4))),
    case(DENSE, 2, 2, vpp=2),
    case(VIRTUAL, 2, 2, vpp=4),
    case(SMALL, 2, 2),
    case(UNEVEN, 1, 4, first_stage_layers=1, last_stage_layers=1),
    case(UNEVEN, 2, 2, first_stage_layers=4),
    case(LAYOUT, 2, 2, vpp=2, pipeline_layout="E|ttt|t*2|L"),
    case(ACCOUNT, 1, 2, account_for_embedding=True, account_for_loss=True),
    case(MOE, 2, 1, ep=2, etp=2),
    case(MOE, 1, 2, ep=2, etp=1),
    case(MOE, 4, 1, ep=4, etp=1),
    case(MOE, 2, 2, ep=2, etp=1),
    case(MOE_ETP, 1, 1, ep=4, etp=1),
    case(MOE_ETP, 2, 1, ep=2, etp=1),
]
THREE = [
    case(UNEVEN, 1, 3, first_stage_layers=1, last_stage_layers=2),
    case(DENSE, 1, 3, pipeline_layout="Ett|t|tL"),
]


def run(world: int, entries: list[dict[str, Any]], folder: Path) -> list[list[tuple[tuple[int, int, int], Any]]]:
    """What each rank says of each entry: its place, and its chunks' states or the error."""
    (folder / "cases.json").write_text(json.dumps(entries))
    outs = [folder / f"rank{rank}.pt" for rank in range(world)]
    fixed = [str(world), str(folder / "store"), str(folder / "cases.json")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.layout.megatron_load_worker", str(rank), *fixed, str(out)],
            cwd=_HERE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(out) for out in outs]


def entry(
    checkpoint: Path,
    layout: dict[str, Any],
    strict: str = "raise_all",
    engine: bool = False,
    args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "checkpoint": str(checkpoint),
        "world": {_WORLD[key]: value for key, value in layout.items() if key in _WORLD},
        "model": {_MODEL[key]: value for key, value in layout.items() if key in _MODEL},
        "strict": strict,
        "transformer_engine": engine,
        "args": args or {},
    }


def run_cases(world: int, cases: list[Case], folder: Path) -> dict[Case, list[Any]]:
    for source in {case.source for case in cases}:
        convert(fixture_path(f"legacy/{source}"), folder / source, to="megatron-core")
    results = run(world, [entry(folder / case.source, case.layout) for case in cases], folder)
    return {case: [rank[number] for rank in results] for number, case in enumerate(cases)}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, list[Any]]:
    folders = [tmp_path_factory.mktemp(name) for name in ("four", "three")]
    return {**run_cases(4, FOUR, folders[0]), **run_cases(3, THREE, folders[1])}


@pytest.mark.parametrize("case", [*FOUR, *THREE], ids=str)
def test_models_at_the_targets_size_load_it_with_raise_all(
    case: Case, loaded: dict[Case, list[Any]], tmp_path: Path
) -> None:
    convert(
        fixture_path(f"legacy/{case.source}"), tmp_path / "m", to="megatron-lm", layout=LayoutRequest(**case.layout)
    )
    (iteration,) = (path for path in (tmp_path / "m").iterdir() if path.is_dir())
    stages, experts = case.layout["pipeline_parallel"], case.layout.get("expert_parallel", 1)
    for (tensor, pipeline, expert), states in loaded[case]:
        assert isinstance(states, dict), states
        folder = folder_name(tensor, pipeline if stages > 1 else None, expert if experts > 1 else None)
        file = torch.load(iteration / folder / "model_optim_rng.pt", weights_only=False)
        assert set(states) >= {key for key in file if key.startswith("model")}
        for chunk, state in states.items():
            due = {name: value for name, value in file.get(chunk, {}).items() if value is not None}
            assert state.keys() == due.keys()
            for name, value in due.items():
                assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name


def test_every_rank_file_is_loaded_by_some_rank(loaded: dict[Case, list[Any]]) -> None:
    for case, ranks in loaded.items():
        assert len(ranks) == (3 if case in THREE else 4)
        pairs = {place for place, _ in ranks}
        sizes = [case.layout.get(key, 1) for key in ("tensor_parallel", "pipeline_parallel", "expert_parallel")]
        for axis, size in enumerate(sizes):
            assert {place[axis] for place in pairs} == set(range(size)), case


_SAID: dict[str, Any] = {
    "ffn_hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2, "normalization": "RMSNorm", "swiglu": True,
    "add_bias_linear": False, "position_embedding_type": "rope", "max_position_embeddings": 16,
    "params_dtype": "bfloat16", "untie_embeddings_and_output_weights": True,
}  # fmt: skip
"""What the arguments of distributed fixtures leave out."""


def test_a_distributed_checkpoint_that_is_written_again_loads_as_its_source_did(tmp_path: Path) -> None:
    """Its arguments do not say what it was built of; its own states do."""
    facts = {
        "gpt_dense_tp2pp2": {**_SAID, "kv_channels": 4, "padded_vocab_size": 32},
        "gpt_moe_ep2_seq_shared": {
            **_SAID, "kv_channels": 2, "padded_vocab_size": 16, "num_experts": 4,
            "moe_shared_expert_intermediate_size": 8, "ffn_hidden_size": 8,
        },
    }  # fmt: skip
    layouts = [{"tensor_parallel": 2}, {"expert_parallel": 2, "expert_tensor_parallel": 1}]
    entries = []
    for (name, args), layout in zip(facts.items(), layouts, strict=True):
        source = fixture_path(f"mcore/{name}/ckpt")
        convert(source, tmp_path / name, to="megatron-core")
        entries.append(entry(tmp_path / name, layout, args=args))
        # the source also has random states, which the model alone does not ask for
        entries.append(entry(source, layout, strict="assume_ok_unexpected", args=args))
    for rank in run(2, entries, tmp_path):
        for (_, ours), (_, theirs) in zip(rank[::2], rank[1::2], strict=True):
            assert isinstance(ours, dict), ours
            assert isinstance(theirs, dict), theirs
            assert ours["model"].keys() == theirs["model"].keys()
            assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())


def test_each_strictness_and_kind_of_layers(tmp_path: Path) -> None:
    """No one set of ``_extra_state`` objects satisfies all: what is known of the source, or said, decides."""
    sources = {DENSE: f"legacy/{DENSE}", MOE: f"legacy/{MOE}", "llama": "families/llama/hf"}
    asked: list[str | None] = [None, "local", "transformer_engine"]
    keys = [
        (name, impl, engine, strict)
        for name in sources for impl in asked for engine in (False, True)
        for strict in ("assume_ok_unexpected", "raise_all")
    ]  # fmt: skip
    for name, path in sources.items():
        for impl in asked:
            layout = LayoutRequest(transformer_impl=impl)
            convert(fixture_path(path), tmp_path / f"{name}-{impl}", to="megatron-core", layout=layout)
    entries = [entry(tmp_path / f"{name}-{impl}", {}, strict, engine) for name, impl, engine, strict in keys]
    (results,) = run(1, entries, tmp_path)
    loads = {key for key, (_, result) in zip(keys, results, strict=True) if isinstance(result, dict)}
    default, strict = "assume_ok_unexpected", "raise_all"
    expected = set()
    for name in sources:
        expected |= {(name, "local", False, default), (name, "local", False, strict)}
        expected |= {(name, "transformer_engine", True, default), (name, "transformer_engine", True, strict)}
    for name in (DENSE, MOE):  # their arguments say that they were built of local layers
        expected |= {(name, None, False, default), (name, None, False, strict)}
    for name in (DENSE, "llama"):  # local models without experts ask for less
        expected.add((name, "transformer_engine", False, default))
    expected |= {("llama", None, False, default), ("llama", None, True, default)}  # either may load it
    assert loads == expected
