"""A tiny GPT of Megatron-Core with an optimizer, on the CPU; imported before ranks are forked.

What is replaced is what needs a GPU only to ask which one it is, or to seed dropout that is off.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import Any

import torch

torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
torch.cuda.synchronize = lambda *args: None  # type: ignore[assignment]
warnings.filterwarnings("ignore")
logging.getLogger("megatron").setLevel(logging.ERROR)

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402, F401
from megatron.core.dist_checkpointing.optimizer import (  # noqa: E402
    get_param_id_to_sharded_param_map,
    optim_state_to_sharding_state,
)
from megatron.core.dist_checkpointing.strategies import torch as _torch_strategies  # noqa: E402, F401
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

CudaRNGStatesTracker.fork = lambda self, *names: contextlib.nullcontext()

NAME = __name__
VOCABULARY, LENGTH = 32, 6


class Trained:
    """The model and its optimizer on this rank, tensor-parallel over all of them."""

    def __init__(self, seed: int = 0, *, tensor_parallel: int | None = None) -> None:
        size = torch.distributed.get_world_size() if tensor_parallel is None else tensor_parallel
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
        torch.manual_seed(seed)
        off = ("bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "apply_rope_fusion")
        config = TransformerConfig(
            num_layers=2,
            hidden_size=8,
            ffn_hidden_size=12,
            num_attention_heads=4,
            num_query_groups=2,
            use_cpu_initialization=True,
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            normalization="RMSNorm",
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tensor_model_parallel_size=size,
            gradient_accumulation_fusion=False,
            **dict.fromkeys((*off, "persist_layer_norm"), False),
        )
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        self.model = GPTModel(
            config,
            spec,
            VOCABULARY,
            LENGTH,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.step = 0

    def train(self, steps: int) -> list[float]:
        return [self._train() for _ in range(steps)]

    def _train(self) -> float:
        generator = torch.Generator().manual_seed(self.step)
        tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
        mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH), 1).bool()
        positions = torch.arange(LENGTH)[None].expand_as(tokens)
        loss = self.model(tokens, positions, mask, labels=tokens.roll(-1, 1)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        """As a trainer of Megatron-Core's hands it to ``dist_checkpointing``."""
        if not self.optimizer.state:  # moments to load into
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            learning_rate, self.optimizer.param_groups[0]["lr"] = self.optimizer.param_groups[0]["lr"], 0.0
            self.optimizer.step()
            self.optimizer.param_groups[0]["lr"] = learning_rate
        model = self.model.sharded_state_dict()
        optimizer = self.optimizer.state_dict()
        parameters = get_param_id_to_sharded_param_map(model, self.model.parameters())
        optim_state_to_sharding_state(optimizer, parameters, exclude_keys=("step",))
        return {"model": model, "optimizer": optimizer, "iteration": self.step, "notes": {"of": ["the run", (1, 2)]}}

    def put(self, state: dict[str, Any]) -> None:
        """Go on from what was loaded."""
        self.model.load_state_dict(state["model"])
        self.step = state["iteration"]
        for moments in state["optimizer"]["state"].values():
            moments["step"] = torch.tensor(float(self.step))
        self.optimizer.load_state_dict(state["optimizer"])


def persistent_loop(*arguments: Any) -> None:
    """What ``PersistentAsyncCaller`` runs in its process, where there is no device to choose."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    torch.cuda.set_device = lambda device: None
    torch.cuda.device_count = lambda: 1
    PersistentAsyncCaller.async_loop(*arguments)
