"""What we write, read by torch and by Megatron-Core; what Megatron-Core's modules register, in which order."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.formats.megatron_lm_files import FILE, open_layout  # noqa: E402
from tests.formats.test_megatron_lm_reader import MCORE  # noqa: E402
from tests.support import fixture_path, write_plan  # noqa: E402

from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.megatron_lm import FORMAT  # noqa: E402
from anyckpt.layout import Parallelism  # noqa: E402
from anyckpt.operations.steps.cutting import cut_for_ranks  # noqa: E402
from anyckpt.operations.steps.joining import open_checkpoint  # noqa: E402
from anyckpt.optimizer.buffers import Rule, starts  # noqa: E402

pytestmark = pytest.mark.peer


def load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)


@pytest.mark.parametrize("name", MCORE)
def test_torch_loads_the_same_structure(name: str, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")  # the fixtures' args hold an enum of it
    source = fixture_path(f"legacy/megatron_{name}")
    assert FORMAT.plan is not None
    output = write_plan(FORMAT.plan(open_layout(source), WriteOptions()), tmp_path / "out")
    for path in sorted(source.glob(f"*/*/{FILE}")):
        old, new = load(path), load(output / path.relative_to(source))
        assert type(new["args"]) is argparse.Namespace
        ours, theirs = vars(new["args"]), vars(old["args"])
        assert ours["params_dtype"] is theirs["params_dtype"]
        assert ours["attention_backend"] is theirs["attention_backend"]
        assert set(theirs) - set(ours) == {"rank"}
        for key in (key for key in old if key.startswith("model")):
            assert type(new[key]) is type(old[key])
            assert list(new[key]) == list(old[key])
            for weight, value in old[key].items():
                assert (value is None) == (new[key][weight] is None)
                assert value is None or torch.equal(value, new[key][weight])
                assert value is None or value.dtype == new[key][weight].dtype


def test_the_safe_loader_takes_it_with_the_namespace_allowed(tmp_path: Path) -> None:
    source = fixture_path("legacy/megatron_oldnames_v1")
    assert FORMAT.plan is not None
    output = write_plan(FORMAT.plan(open_layout(source), WriteOptions()), tmp_path / "out")
    # Not the context manager: leaving it would also undo what importing Megatron-Core allowed.
    torch.serialization.add_safe_globals([argparse.Namespace])
    loaded = torch.load(output / "iter_0000100" / "mp_rank_01" / FILE, weights_only=True)
    assert loaded["checkpoint_version"] == 3.0
    assert loaded["args"].tensor_model_parallel_size == 2


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """Megatron-Core's parallel state of one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parallel_state = pytest.importorskip("megatron.core.parallel_state")
        import torch.distributed as dist

        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel(1, 1)
        yield
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def mcore_model(arguments: dict[str, Any]) -> Any:
    """Megatron-Core's GPT for a fixture's arguments, with its local layers."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=arguments["num_layers"], hidden_size=arguments["hidden_size"],
        ffn_hidden_size=arguments["ffn_hidden_size"], num_attention_heads=arguments["num_attention_heads"],
        num_query_groups=arguments["num_query_groups"], kv_channels=arguments["kv_channels"],
        normalization=arguments["normalization"], gated_linear_unit=arguments["swiglu"],
        add_bias_linear=arguments["add_bias_linear"], add_qkv_bias=arguments["add_qkv_bias"],
        qk_layernorm=arguments["qk_layernorm"], num_moe_experts=arguments["num_experts"],
        moe_shared_expert_intermediate_size=arguments["moe_shared_expert_intermediate_size"],
        activation_func=torch.nn.functional.silu, params_dtype=arguments["params_dtype"],
        use_cpu_initialization=True, perform_initialization=False,
    )  # fmt: skip
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm,
            normalization=config.normalization,
        ),
        vocab_size=arguments["padded_vocab_size"], max_sequence_length=arguments["max_position_embeddings"],
        position_embedding_type=arguments["position_embedding_type"],
        share_embeddings_and_output_weights=not arguments["untie_embeddings_and_output_weights"],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["gpt_tp2_pp2", "gpt_tp2_pp2_vpp2", "gpt_tp1_pp1_release", "moe_tp2_ep2"])
def test_megatron_core_loads_a_merged_model_strictly(name: str, one_process: None, tmp_path: Path) -> None:
    """Merged to one rank and written; every key that its modules ask for is there, and no other."""
    source = fixture_path(f"legacy/megatron_{name}")
    checkpoint = open_checkpoint(source)
    assert FORMAT.plan is not None
    output = write_plan(FORMAT.plan(cut_for_ranks(checkpoint, Parallelism()), WriteOptions()), tmp_path / "out")
    loaded = load(next(output.glob(f"*/mp_rank_00/{FILE}")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = mcore_model(vars(loaded["args"]))
        model.load_state_dict(loaded["model"], strict=True)
    kept = {key: value for key, value in model.state_dict().items() if value is not None}
    assert list(model.state_dict()) == list(loaded["model"])
    for key, value in kept.items():
        assert torch.equal(value, loaded["model"][key])


@pytest.mark.parametrize("bucket", [None, 100, 1000])
@pytest.mark.parametrize("shared", [(), (0,), (5,), (0, 5), (3,)])
def test_buffers_are_filled_as_megatron_core_fills_them(
    bucket: int | None, shared: tuple[int, ...], one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions in the buffer less the padding at the ends of buckets, which files leave out."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer

    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    sizes = [70, 64, 1, 129, 8, 300]
    params = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for number in shared:
        params[number].shared_embedding = True
    buffer = _ParamAndGradBuffer(
        DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True),
        torch.float32, torch.float32, params, torch.distributed.group.WORLD, bucket,
        {param: str(number) for number, param in enumerate(params)}, 1.0, list(range(len(params))), False,
        SimpleNamespace(tp=torch.distributed.group.WORLD, dp_cp=torch.distributed.group.WORLD),
    )  # fmt: skip
    left_out, padding = [], 0
    for one in buffer.buckets:
        left_out.append(padding)
        padding += one.grad_data.numel() - one.numel_unpadded
    theirs = {
        str(n): buffer.param_index_map[p][0] - left_out[buffer.param_index_map[p][2]] for n, p in enumerate(params)
    }
    names = [str(number) for number in reversed(range(len(sizes)))]
    rule = Rule(bucket=bucket, shared=tuple(map(str, shared)))
    found, total = starts([(name, sizes[int(name)]) for name in names], rule)
    assert dict(zip(names, found, strict=True)) == theirs
    assert total == buffer.numel_unpadded
