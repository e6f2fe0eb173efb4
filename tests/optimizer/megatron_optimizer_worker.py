"""Ranks of real Megatron-Core optimizers that save as Megatron-LM does with ``--ckpt-format torch``, or load.

    python -m tests.optimizer.megatron_optimizer_worker WORLD STORE CASES

CASES is a JSON file, a list of dictionaries: ``world`` has the arguments of ``initialize_model_parallel``, ``model``
options of ``TransformerConfig``, ``distributed`` says whether the optimizer is, ``out`` is the folder of the
iteration.  The tiny GPT is of Megatron-Core's local layers, on the CPU.  No step is taken: each slot is a function of
the parameter's elements (see ``slots``), put where the optimizer keeps it, so that the whole model's slots are the
same function of its weights.  Every optimizer's file is written by the rank that writes it in Megatron-LM.  With
``load`` the folder's files are loaded into the model and the optimizer, which must then hold these slots; with ``core``
a distributed checkpoint is, and with ``nemo2`` the weights of a checkpoint of NeMo 2.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from argparse import Namespace
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

_type, _tensor = torch.Tensor.type, torch.tensor
torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
torch.Tensor.cuda = lambda self, *args, **options: self  # type: ignore[method-assign, assignment]
torch.Tensor.type = lambda self, *args, **options: (  # type: ignore[method-assign, assignment, misc]
    _type(self, *args, **options) if args or options else _type(self).replace("torch.", "torch.cuda.")
)
torch.tensor = lambda *args, **options: _tensor(*args, **{**options, "device": "cpu"})  # type: ignore[assignment]

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.validation import StrictHandling  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

STEP = 5
SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 12}
VOCABULARY, POSITIONS = 64, 8


def slots(values: Any) -> dict[str, Any]:
    """What each slot holds of a parameter with these elements, in fp32."""
    values = values.float()
    return {"master": values + values / 1024, "exp_avg": values * 2 + 0.125, "exp_avg_sq": values * values + 0.25}


def built(case: dict[str, Any]) -> list[Any]:
    """The rank's chunks; every parameter has elements by its name and place in the whole, as training would give."""
    world, options = case["world"], case["model"]
    config = TransformerConfig(
        **{**SIZES, **options}, normalization="RMSNorm", gated_linear_unit=True, add_bias_linear=False,
        activation_func=torch.nn.functional.silu, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16,
        bf16=True, use_cpu_initialization=True,
        **{key: world.get(key, 1) for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size")},
        expert_model_parallel_size=world.get("expert_model_parallel_size", 1),
        virtual_pipeline_model_parallel_size=world.get("virtual_pipeline_model_parallel_size"),
        expert_tensor_parallel_size=world.get("expert_tensor_parallel_size"),
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False, normalization="RMSNorm")
    # The same whole weights everywhere, because CPU initialization cuts them itself; others before they are loaded.
    torch.manual_seed(2 if case.get("core") or case.get("load") else 1)
    virtual = world.get("virtual_pipeline_model_parallel_size")
    chunks = []
    for chunk in range(virtual or 1):
        stage = chunk if virtual else None
        model = GPTModel(
            config, spec, VOCABULARY, POSITIONS, position_embedding_type="rope",
            share_embeddings_and_output_weights=case.get("tied", False),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage), vp_stage=stage,
        )  # fmt: skip
        chunks.append(Float16Module(config, model))
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=case["distributed"], overlap_grad_reduce=case.get("overlap", False),
        bucket_size=case.get("bucket_size"),
    )  # fmt: skip
    return [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)
    ]


def filled(optimizer: Any) -> None:
    """Put the slots where each of the chained optimizers keeps them."""
    for own in optimizer.chained_optimizers:
        if hasattr(own, "gbuf_ranges"):
            _fill_shards(own)
            continue
        for halves, masters in zip(own.float16_groups, own.fp32_from_float16_groups, strict=True):
            for half, master in zip(halves, masters, strict=True):
                _put(own.optimizer, master, slots(half.detach()))


def _fill_shards(own: Any) -> None:
    for groups, sharded in (
        (own.model_float16_groups, own.shard_fp32_from_float16_groups),
        (own.model_fp32_groups, own.shard_fp32_groups),
    ):
        for params, shards in zip(groups, sharded, strict=True):
            for param, shard in zip(params, shards, strict=True):
                found = own._get_model_param_range_map(param)["param"]
                _put(own.optimizer, shard, slots(param.detach().view(-1)[found.start : found.end]))


def _put(adam: Any, master: Any, values: dict[str, Any]) -> None:
    state = {"step": _tensor(float(STEP)), "exp_avg": values["exp_avg"], "exp_avg_sq": values["exp_avg_sq"]}
    master.data.copy_(values["master"])
    adam.state[master] = state


def check_loaded(optimizer: Any) -> int:
    """Compare what every optimizer holds with the slots of the weights; how many parameters there were."""
    count = 0
    for own in optimizer.chained_optimizers:
        if hasattr(own, "gbuf_ranges"):
            count += _check_shards(own)
            continue
        for halves, masters in zip(own.float16_groups, own.fp32_from_float16_groups, strict=True):
            for half, master in zip(halves, masters, strict=True):
                held = {**own.optimizer.state[master], "master": master.data}
                for slot, expected in slots(half.detach()).items():
                    assert torch.equal(held[slot], expected), (slot, tuple(half.shape))
                assert held["step"] == STEP
                count += 1
        for group in own.optimizer.param_groups:
            assert group["lr"] == 1e-3 and group["weight_decay"] == 0.1
    return count


def _check_shards(own: Any) -> int:
    """How many parameters the rank has a part of."""
    count = 0
    for params in (*own.model_float16_groups, *own.model_fp32_groups):
        for param in params:
            found = own._get_model_param_range_map(param)["param"]
            held = own._get_main_param_and_optimizer_states(param)
            for slot, expected in slots(param.detach().view(-1)[found.start : found.end]).items():
                assert torch.equal(held["param" if slot == "master" else slot].data, expected), (slot, param.shape)
            count += 1
    for group in own.optimizer.param_groups:
        assert (group["lr"], group["weight_decay"], group["step"]) == (1e-3, 0.1, STEP)
    return count


def keep_steps() -> None:
    """Let the distributed optimizer leave PyTorch's steps alone when it loads a parameter's state.

    Megatron-Core 0.16 looks for them there, where only Transformer Engine's Adam, which keeps none, needs nothing.
    """
    kind = distrib_optimizer.DistributedOptimizer
    load = kind._set_main_param_and_optimizer_states

    def with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, place = self.model_param_group_index_map[model_param]
        own = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        load(self, model_param, {**tensors, "step": own["step"].clone()})

    kind._set_main_param_and_optimizer_states = with_step


def load_core(path: str, chunks: list[Any], optimizer: Any) -> None:
    """Load a distributed checkpoint, as Megatron-LM does."""
    metadata = dist_checkpointing.load_content_metadata(path)
    state: dict[str, Any] = {
        f"model{n}" if len(chunks) > 1 else "model": chunk.module.module.sharded_state_dict(metadata=metadata)
        for n, chunk in enumerate(chunks)
    }
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=metadata)
    loaded = dist_checkpointing.load(state, path, strict=StrictHandling.RAISE_ALL)
    for number, chunk in enumerate(chunks):
        chunk.module.module.load_state_dict(loaded[f"model{number}" if len(chunks) > 1 else "model"])
    optimizer.load_state_dict(loaded["optimizer"])


def load_nemo2(path: str, chunk: Any, optimizer: Any) -> None:
    """Load the weights of a NeMo 2 checkpoint, as its ``MegatronStrategy`` does: names of a wrapped module, and a list
    of optimizers."""
    metadata = dist_checkpointing.load_content_metadata(path)
    state: dict[str, Any] = dict(chunk.module.module.sharded_state_dict(prefix="module.", metadata=metadata))
    named = {name.removeprefix("module."): value for name, value in state.items()}
    state["optimizer"] = [optimizer.sharded_state_dict({"model": named}, is_loading=True, metadata=metadata)]
    loaded, missing, unexpected = dist_checkpointing.load(state, path, strict=StrictHandling.RETURN_ALL)
    assert not unexpected and all(name.endswith("._extra_state") for name in missing), "those of Transformer Engine"
    weights = {name.removeprefix("module."): value for name, value in loaded.items() if name.startswith("module.")}
    chunk.module.module.load_state_dict(weights)
    optimizer.load_state_dict(loaded["optimizer"][0])


def run(case: dict[str, Any]) -> None:
    world = case["world"]
    parallel_state.initialize_model_parallel(**world)
    chunks = built(case)
    config = OptimizerConfig(
        optimizer="adam", lr=1e-3, weight_decay=0.1, bf16=True, params_dtype=torch.bfloat16, clip_grad=0.0,
        use_distributed_optimizer=case["distributed"],
    )  # fmt: skip
    optimizer = get_megatron_optimizer(config, chunks)
    tensor, pipeline = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    expert = parallel_state.get_expert_model_parallel_rank()
    folder = f"mp_rank_{tensor:02d}"
    folder += f"_{pipeline:03d}" if world.get("pipeline_model_parallel_size", 1) > 1 else ""
    folder += f"_{expert:03d}" if world.get("expert_model_parallel_size", 1) > 1 else ""
    path = os.path.join(case["out"], folder)
    if case.get("core"):
        filled(optimizer)
        load_core(case["core"], chunks, optimizer)
        assert check_loaded(optimizer) > 0
        parallel_state.destroy_model_parallel()
        return
    if case.get("nemo2"):
        filled(optimizer)
        load_nemo2(case["nemo2"], chunks[0], optimizer)
        assert check_loaded(optimizer) > 0
        parallel_state.destroy_model_parallel()
        return
    if case.get("load"):
        contents = torch.load(os.path.join(path, "model_optim_rng.pt"), weights_only=False)
        for number, chunk in enumerate(chunks):
            chunk.load_state_dict(contents[f"model{number}" if len(chunks) > 1 else "model"])
        optimizer.load_state_dict(contents["optimizer"])
        assert check_loaded(optimizer) == sum(1 for chunk in chunks for _ in chunk.parameters())
        parallel_state.destroy_model_parallel()
        return
    filled(optimizer)
    os.makedirs(path, exist_ok=True)
    if case["distributed"]:
        optimizer.save_parameter_state(os.path.join(path, "distrib_optim.pt"))
    first = parallel_state.get_data_parallel_rank() == 0 or parallel_state.get_expert_data_parallel_rank() == 0
    if first:
        states = [chunk.state_dict_for_save_checkpoint() for chunk in chunks]
        models = {f"model{n}" if len(states) > 1 else "model": state for n, state in enumerate(states)}
        contents = {
            "args": arguments(case, world), "checkpoint_version": 3.0, "iteration": STEP, **models,
            "optimizer": optimizer.state_dict(),
        }  # fmt: skip
        torch.save(contents, os.path.join(path, "model_optim_rng.pt"))
    parallel_state.destroy_model_parallel()


def arguments(case: dict[str, Any], world: dict[str, Any]) -> Namespace:
    """Those that say what the model and its layout are."""
    model = case["model"]
    return Namespace(
        **{**SIZES, **{key: model[key] for key in SIZES if key in model}},
        num_query_groups=model.get("num_query_groups"), kv_channels=4, swiglu=True, add_bias_linear=False,
        normalization="RMSNorm", position_embedding_type="rope", max_position_embeddings=POSITIONS,
        group_query_attention=False, num_experts=model.get("num_moe_experts"), transformer_impl="local",
        moe_shared_expert_intermediate_size=model.get("moe_shared_expert_intermediate_size"),
        padded_vocab_size=VOCABULARY, make_vocab_size_divisible_by=8, params_dtype=torch.bfloat16, bf16=True,
        untie_embeddings_and_output_weights=not case.get("tied", False),
        use_distributed_optimizer=case["distributed"], overlap_grad_reduce=case.get("overlap", False),
        ddp_bucket_size=case.get("bucket_size"), iteration=STEP, consumed_train_samples=40, seed=1234,
        **{"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1,
           "virtual_pipeline_model_parallel_size": None, "expert_tensor_parallel_size":
           world.get("tensor_model_parallel_size", 1), **world},
    )  # fmt: skip


def main(rank: int, world: int, store: str, cases: str) -> None:
    torch.set_num_threads(1)
    keep_steps()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    with open(cases, encoding="utf-8") as file:
        for case in json.load(file):
            run(case)
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    size = int(sys.argv[1])
    ranks = [get_context("fork").Process(target=main, args=(rank, size, *sys.argv[2:])) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
