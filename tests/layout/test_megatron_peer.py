"""Where layers and ranks are, as Megatron-Core itself computes it."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("megatron.core")
pytestmark = pytest.mark.peer

from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout  # noqa: E402
from megatron.core.transformer.transformer_block import get_num_layers_to_build  # noqa: E402
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset  # noqa: E402

from anyckpt.errors import UsageError  # noqa: E402
from anyckpt.layout import Geometry, Latent, Parallelism, parse_layout  # noqa: E402
from anyckpt.layout.names import Names  # noqa: E402
from anyckpt.layout.partition import Rules  # noqa: E402
from anyckpt.layout.pipeline import chunks  # noqa: E402


def theirs(parallelism: Parallelism, layers: int) -> list[tuple[int, int, range]] | None:
    """Megatron-Core's layers of each chunk, None where it refuses."""
    virtual = parallelism.virtual_pipeline if parallelism.virtual_pipeline > 1 else None
    config: Any = SimpleNamespace(
        num_layers=layers,
        pipeline_model_parallel_size=parallelism.pipeline_parallel,
        virtual_pipeline_model_parallel_size=virtual,
        num_layers_in_first_pipeline_stage=parallelism.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallelism.num_layers_in_last_pipeline_stage,
        account_for_embedding_in_pipeline_split=parallelism.account_for_embedding,
        account_for_loss_in_pipeline_split=parallelism.account_for_loss,
        pipeline_model_parallel_layout=None,
    )
    found = []
    try:
        for v, p in itertools.product(range(parallelism.virtual_pipeline), range(parallelism.pipeline_parallel)):
            stage = v if virtual else None
            count = get_num_layers_to_build(config, stage, p)
            offset = get_transformer_layer_offset(config, stage, p)
            found.append((p, v, range(offset, offset + count)))
    except (AssertionError, ZeroDivisionError):  # the latter with a virtual pipeline and no stage in the middle
        return None
    return found


def test_layers_are_where_megatron_puts_them() -> None:
    compared = refused = 0
    numbers = [None, 0, 1, 2, 3, 4]
    for layers, stages, virtual, first, last in itertools.product(
        range(1, 13), (1, 2, 3, 4), (1, 2, 3), numbers, numbers
    ):
        for embedding, loss in itertools.product((False, True), (False, True)):
            uneven = first is not None or last is not None
            if (virtual > 1 and stages == 1) or (uneven and (embedding or loss)):
                continue
            parallelism = Parallelism(
                pipeline_parallel=stages, virtual_pipeline=virtual, num_layers_in_first_pipeline_stage=first,
                num_layers_in_last_pipeline_stage=last, account_for_embedding=embedding, account_for_loss=loss,
            )  # fmt: skip
            expected = theirs(parallelism, layers)
            try:
                found = chunks(parallelism, {"decoder": layers})
            except UsageError:
                # Megatron checks less: numbers that leave layers over, or that fit no stage
                assert expected is None or [n for _, _, r in expected for n in r] != list(range(layers)) or stages == 1
                refused += 1
                continue
            if expected is None:
                assert stages == 2 and virtual > 1 and None not in (first, last), parallelism
                continue
            ours = [(chunk.pipeline_rank, chunk.virtual_rank, chunk.layers["decoder"]) for chunk in found]
            assert [(p, v, list(r)) for p, v, r in ours] == [(p, v, list(r)) for p, v, r in expected], parallelism
            compared += 1
    assert compared > 300
    assert refused > 300


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("Et|tt|t|tL", 2),
        ("Ettt|(tt|)*29,m|L", 32),
        ("Et*3|(tt|)*2,t|mL", 5),
        ("E||t|tL", 2),
        ("E|t*2|(t|tt|)*3L", 9),
        ("(E)*1t|t*2,L", 2),
        ("E|*3tL", 4),
    ],
)
def test_layout_strings_mean_what_megatron_reads(text: str, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = PipelineParallelLayerLayout(text, stages)
    virtual = layout.virtual_pipeline_model_parallel_size
    monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: virtual)
    parts = parse_layout(text)
    assert parts == [[part.name for part in layout.layout[i % stages][i // stages]] for i in range(len(parts))]
    count, mtp = (sum(stage.count(part) for stage in parts) for part in ("decoder", "mtp"))
    parallelism = Parallelism(pipeline_parallel=stages, virtual_pipeline=virtual, pipeline_layout=text)
    for chunk in chunks(parallelism, {"decoder": count, "mtp": mtp}):
        expected = layout.get_layer_id_list(vp_stage=chunk.virtual_rank, pp_rank=chunk.pipeline_rank)
        assert list(chunk.layers["decoder"]) == expected


@pytest.mark.parametrize(
    ("tp", "ep", "etp"),
    [
        *[(1, 1, 1), (2, 2, 2), (2, 2, 1), (4, 2, 1), (2, 4, 1), (4, 2, 2), (2, 3, 1), (8, 8, 1), (1, 4, 1)],
        *[(3, 3, 2), (4, 4, 3), (6, 2, 3), (6, 3, 4), (4, 2, 4), (8, 4, 6)],  # ETP need not divide TP
    ],
)
def test_pairs_of_tensor_and_expert_ranks_are_those_of_megatrons_groups(tp: int, ep: int, etp: int) -> None:
    world = tp * ep * etp * 2
    dense = parallel_state.RankGenerator(tp=tp, ep=1, dp=world // tp, pp=1, cp=1, order="tp-cp-ep-dp-pp")
    experts = parallel_state.RankGenerator(tp=etp, ep=ep, dp=world // etp // ep, pp=1, cp=1, order="tp-cp-ep-dp-pp")

    def rank_in(generator: Any, group: str, rank: int) -> int:
        return next(ranks.index(rank) for ranks in generator.get_ranks(group) if rank in ranks)

    read = {(rank_in(dense, "tp", r), rank_in(experts, "ep", r)) for r in range(world)}
    written = {
        (rank_in(dense, "tp", r), rank_in(experts, "ep", r))
        for r in range(world)
        if rank_in(dense, "dp", r) == 0 or rank_in(experts, "dp", r) == 0
    }
    parallelism = Parallelism(tensor_parallel=tp, expert_parallel=ep, expert_tensor_parallel=etp)
    assert set(parallelism.read_pairs) == read
    assert set(parallelism.written_pairs) == written
    parallelism.check()
    for r in range(world):
        pair = (rank_in(dense, "tp", r), rank_in(experts, "ep", r))
        assert parallelism.expert_share(*pair) == rank_in(experts, "tp", r)


def test_a_size_is_refused_just_where_folders_do_not_tell_experts_parts_apart() -> None:
    """By Megatron-Core's own groups: two ranks of one folder's name hold different parts."""
    refused = 0
    for tp, ep, etp in itertools.product(range(1, 7), range(1, 5), range(1, 7)):
        world = math.lcm(tp, ep * etp)
        dense = parallel_state.RankGenerator(tp=tp, ep=1, dp=world // tp, pp=1, cp=1, order="tp-cp-ep-dp-pp")
        experts = parallel_state.RankGenerator(tp=etp, ep=ep, dp=world // etp // ep, pp=1, cp=1, order="tp-cp-ep-dp-pp")
        places = {
            (generator, group): {
                rank: number for ranks in generator.get_ranks(group) for number, rank in enumerate(ranks)
            }
            for generator, group in ((dense, "tp"), (experts, "ep"), (experts, "tp"))
        }
        parts: dict[tuple[int, int], set[int]] = {}
        for rank in range(world):
            pair = places[dense, "tp"][rank], places[experts, "ep"][rank]
            parts.setdefault(pair, set()).add(places[experts, "tp"][rank])
        parallelism = Parallelism(tensor_parallel=tp, expert_parallel=ep, expert_tensor_parallel=etp)
        if all(len(found) == 1 for found in parts.values()):
            parallelism.check()
            assert {pair: {parallelism.expert_share(*pair)} for pair in parts} == parts
        else:
            with pytest.raises(UsageError, match="expert tensor parallel size") as caught:
                parallelism.check()
            other = int(str(caught.value).partition("ranks 0 and ")[2].split()[0])
            of = [(places[dense, "tp"][r], places[experts, "ep"][r], places[experts, "tp"][r]) for r in (0, other)]
            assert of[0][:2] == of[1][:2] and of[0][2] != of[1][2]
            refused += 1
    assert refused > 30


def test_every_parameter_is_divided_as_megatron_divides_it() -> None:
    """GPT gated and not, with experts, multi-token prediction and latent attention; BERT; T5."""
    here = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.layout.megatron_parameters"],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    models = json.loads(done.stdout.splitlines()[-1])
    assert len(models) == 6
    for title, found in models.items():
        gated = title in ("gated", "experts")
        latent = Latent(q_lora_rank=8, kv_lora_rank=8, qk_pos_emb_head_dim=4, down_parallel=True)  # the local kind
        names = Names(Rules(), Geometry(gated_linear_unit=gated, num_experts=2, latent=latent))
        for text, (parallel, axis, stride) in found["parameters"].items():
            division = names.all([text])[0][0].division
            assert division is not None
            theirs = (axis, stride) if parallel else (None, 1)
            assert (division.axis, division.blocks) == theirs, f"{title}: {text}"
        assert {(division.axis) for name, _ in names.all(found["buffers"]) if (division := name.division)} <= {None, 0}
