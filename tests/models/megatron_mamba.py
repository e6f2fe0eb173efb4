"""Prints how far a Megatron-Core MambaModel with our weights and arguments is from transformers' logits.

A program of its own, because Megatron-Core keeps process-wide state.  What is replaced is what needs a GPU: the kernels
of mamba_ssm, by the recurrence that they compute, one token after another; which GPU it is; and seeding dropout that is
off.  It also prints what Megatron-Core saves for the model in a distributed checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers

torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]


class GatedNorm(torch.nn.Module):
    """mamba_ssm's ``RMSNorm`` of a value that has been gated: of each group by itself."""

    def __init__(self, size: int, eps: float, group_size: int, **others: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))
        self.eps = eps
        self.group_size = group_size

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        groups = value.unflatten(-1, (-1, self.group_size))
        scale = torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)
        return (groups * scale).flatten(-2) * self.weight


def scan(rows: Any, weight: Any, bias: Any, dt_bias: Any, A: Any, D: Any, headdim: int, ngroups: int, **_: Any) -> Any:  # noqa: N803
    """mamba_ssm's ``mamba_split_conv1d_scan_combined``, as Mamba-2's paper has the recurrence."""
    heads = A.shape[0]
    inner = heads * headdim
    states = (weight.shape[0] - inner) // 2
    z, convolved, dt = rows.split([inner, inner + 2 * states, heads], -1)
    padded = torch.nn.functional.pad(convolved.transpose(1, 2), (weight.shape[1] - 1, 0))
    convolved = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=weight.shape[0])
    x, b, c = torch.nn.functional.silu(convolved).transpose(1, 2).split([inner, states, states], -1)
    x = x.unflatten(-1, (heads, headdim))
    b, c = (part.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, 2) for part in (b, c))
    dt = torch.nn.functional.softplus(dt + dt_bias)
    state = torch.zeros(*x.shape[:1], heads, headdim, b.shape[-1])
    found = []
    for step in range(x.shape[1]):
        now = dt[:, step, :, None, None]
        state = state * torch.exp(now * A[:, None, None]) + now * x[:, step, ..., None] * b[:, step, :, None]
        found.append((state * c[:, step, :, None]).sum(-1) + D[:, None] * x[:, step])
    return torch.stack(found, 1).flatten(2) * torch.nn.functional.silu(z)


REARRANGED = {
    "l b d -> b l d": lambda tensor: tensor.transpose(0, 1),
    "b l d -> l b d": lambda tensor: tensor.transpose(0, 1),
    "d 1 w -> d w": lambda tensor: tensor[:, 0],
}

for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.selective_state_update",
             "mamba_ssm.ops.triton.layernorm_gated", "mamba_ssm.ops.triton.ssd_combined"):  # fmt: skip
    sys.modules[name] = ModuleType(name)
sys.modules["megatron.core.inference.contexts.attention_context.triton.tensor_ops"] = MagicMock()  # not called
sys.modules["einops"] = MagicMock(rearrange=lambda tensor, how: REARRANGED[how](tensor))
sys.modules["mamba_ssm.ops.triton.layernorm_gated"].RMSNorm = GatedNorm  # type: ignore[attr-defined]
sys.modules["mamba_ssm.ops.triton.selective_state_update"].selective_state_update = None  # type: ignore[attr-defined]
sys.modules["mamba_ssm.ops.triton.ssd_combined"].mamba_chunk_scan_combined = None  # type: ignore[attr-defined]
sys.modules["mamba_ssm.ops.triton.ssd_combined"].mamba_split_conv1d_scan_combined = scan  # type: ignore[attr-defined]

from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.models.mamba import MambaModel  # noqa: E402
from megatron.core.ssm import mamba_block  # noqa: E402
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules  # noqa: E402
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules  # noqa: E402
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from tests.models.proofs import samples  # noqa: E402
from tests.models.rolled import differences  # noqa: E402
from tests.support import write_plan  # noqa: E402

from anyckpt import models  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.hf import FORMAT  # noqa: E402

mamba_block.TENorm = WrappedTorchNorm
CudaRNGStatesTracker.fork = lambda self, *names: contextlib.nullcontext()

SAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "normalization",
    "add_bias_linear", "hidden_dropout", "attention_dropout", "mamba_num_heads", "mamba_head_dim", "mamba_num_groups",
    "mamba_state_dim", "is_hybrid_model",
)  # fmt: skip


def build(arguments: dict[str, Any]) -> Any:
    """As Megatron-LM's ``pretrain_mamba.py`` builds it from its arguments, without Transformer Engine."""
    config = TransformerConfig(
        **{name: arguments[name] for name in SAME},
        layernorm_epsilon=arguments["norm_epsilon"],
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
    )
    mixer = ModuleSpec(MambaMixer, submodules=MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear))
    layer = MambaLayerSubmodules(norm=WrappedTorchNorm, mixer=mixer, mamba_bda=get_bias_dropout_add)
    stack = MambaStackSubmodules(mamba_layer=ModuleSpec(MambaLayer, submodules=layer))
    return MambaModel(
        config,
        ModuleSpec(MambaStack, submodules=stack),
        vocab_size=arguments["padded_vocab_size"],
        max_sequence_length=arguments["max_position_embeddings"],
        hybrid_override_pattern=arguments["hybrid_override_pattern"],
        share_embeddings_and_output_weights=not arguments["untie_embeddings_and_output_weights"],
        position_embedding_type=arguments["position_embedding_type"],
    ).eval()


def saved(model: Any) -> dict[str, list[int]]:
    """Keys and global shapes of a distributed checkpoint."""
    found: dict[str, list[int]] = {}
    for value in model.sharded_state_dict().values():
        parts = value.build() if hasattr(value, "build") else value
        for part in parts.values() if isinstance(parts, dict) else parts if isinstance(parts, list) else [parts]:
            if isinstance(part, ShardedTensor):
                found[part.key] = list(part.global_shape)
    return found


def compared(name: str, folder: Path) -> dict[str, Any]:
    checkpoint, model = samples()[name].open()
    assert FORMAT.plan is not None
    path = write_plan(FORMAT.plan(checkpoint, WriteOptions()), folder / name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    ours = build(models.render_config(model, "megatron-args"))
    hub = models.to_hub(checkpoint, model)
    state = {
        key.replace(".mixer.in_proj.layer_norm_weight", ".norm.weight"): torch.from_numpy(tensor.numpy())
        for key, tensor in models.from_hub(hub, "hub").tensors.items()
    }
    report = ours.load_state_dict(state, strict=False)
    assert not report.unexpected_keys, report
    assert all(key.endswith("_extra_state") for key in report.missing_keys), report
    tokens = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(24)[None].expand_as(tokens)

    with torch.no_grad():
        expected = theirs(tokens).logits
    found = differences(ours, lambda: ours(tokens, positions, None), expected)
    stored = {key: list(tensor.shape) for key, tensor in models.from_hub(hub, "megatron-core").tensors.items()}
    return {**found, "saved": saved(ours), "written": stored}


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as file, tempfile.TemporaryDirectory() as folder:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        print(json.dumps({name: compared(name, Path(folder)) for name in sys.argv[1:]}))
