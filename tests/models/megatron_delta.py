"""Prints how far Megatron-Core's gated delta net with our weights is from transformers', and what it saves.

A program of its own, because Megatron-Core keeps process-wide state.  Its kernels, which need a GPU, are left out by
``deterministic_mode``, and flash-linear-attention's norm is written down anew.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from tests.models.proofs import samples
from tests.support import write_plan

from anyckpt import models
from anyckpt.formats.format import WriteOptions
from anyckpt.formats.hf import FORMAT

from megatron.core import parallel_state  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # isort: skip
from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip
from megatron.core.ssm import gated_delta_net  # isort: skip
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip

SAME = (
    "num_layers", "hidden_size", "num_attention_heads", "experimental_attention_variant", "linear_attention_freq",
    "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads",
    "linear_num_value_heads",
)  # fmt: skip
PREFIX = "decoder.layers.0.self_attention."


class ZeroCentred(torch.nn.Module):
    """As Transformer Engine's RMSNorm with ``zero_centered_gamma``."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.weight.shape, 1 + self.weight, self.eps)


def built(arguments: dict[str, Any]) -> torch.nn.Module:
    config = TransformerConfig(
        **{key: arguments[key] for key in SAME},
        layernorm_epsilon=arguments["norm_epsilon"],
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        deterministic_mode=True,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
    layers = gated_delta_net.GatedDeltaNetSubmodules(ColumnParallelLinear, ZeroCentred, RowParallelLinear)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return gated_delta_net.GatedDeltaNet(config, layers, layer_number=1, pg_collection=groups)


def saved(entry: Any) -> dict[str, tuple[int, ...]]:
    if isinstance(entry, ShardedTensorFactory):
        built_of = entry.build()
        inner = built_of.values() if isinstance(built_of, dict) else built_of
        return {key: shape for part in inner for key, shape in saved(part).items()}
    return {entry.key: entry.global_shape} if isinstance(entry, ShardedTensor) else {}


def compared(name: str, folder: Path) -> dict[str, Any]:
    checkpoint, model = samples()[name].open()
    assert FORMAT.plan is not None
    path = write_plan(FORMAT.plan(checkpoint, WriteOptions()), folder / name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    ours = built(models.render_config(model, "megatron-args"))
    hub = models.to_hub(checkpoint, model)
    own = {key.removeprefix(PREFIX): tensor for key, tensor in hub.tensors.items() if key.startswith(PREFIX)}
    own.pop("in_proj.layer_norm_weight")
    ours.load_state_dict({key: torch.from_numpy(tensor.numpy().copy()) for key, tensor in own.items()})
    x = torch.randn(2, 11, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    net = theirs.model.layers[0].linear_attn
    with torch.no_grad():
        found = ours(x.transpose(0, 1), None)[0].transpose(0, 1)
        expected = net(x)
        ours.in_proj.weight.copy_(ours.in_proj.weight.roll(1, 0))
        rolled = ours(x.transpose(0, 1), None)[0].transpose(0, 1)
    shapes = {key: shape for part in ours.sharded_state_dict(PREFIX).values() for key, shape in saved(part).items()}
    stored = models.from_hub(hub, "megatron-core").tensors
    written = {key: tensor.shape for key, tensor in stored.items() if key.startswith(PREFIX)}
    del written[f"{PREFIX}in_proj.layer_norm_weight"]
    return {
        "difference": float((found - expected).abs().max()),
        "rolled": float((rolled - expected).abs().max()),
        "saved": sorted(map(str, shapes.items())),
        "written": sorted(map(str, written.items())),
    }


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as file, tempfile.TemporaryDirectory() as folder:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        gated_delta_net.HAVE_FLA = True
        gated_delta_net.l2norm = lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
        with mock.patch("torch.cuda.current_device", lambda: "cpu"):
            print(json.dumps({name: compared(name, Path(folder)) for name in ("qwen3-next", "qwen3.5")}))
