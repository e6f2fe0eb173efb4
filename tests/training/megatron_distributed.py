"""The tiny GPT of ``megatron_gpt`` with Megatron-Core's distributed optimizer, which asks for GPUs wherever it can."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from tests.training.megatron_gpt import LENGTH, VOCABULARY, Trained

NAME = __name__


def without_gpu() -> None:
    """Let this process do without: the optimizer makes tensors there, and takes only those that say to be there."""
    for name in ("tensor", "zeros", "empty", "ones", "full"):
        setattr(torch, name, _on_the_host(getattr(torch, name)))
    kind = torch.Tensor.type
    torch.Tensor.type = (  # type: ignore[method-assign]
        lambda self, *args, **settings: (
            kind(self, *args, **settings) if args or settings else kind(self).replace("torch.", "torch.cuda.")
        )
    )
    torch.Tensor.cuda = lambda self, *args: self  # type: ignore[method-assign, assignment]
    for module in (optimizer, distrib_optimizer):
        for name, value in {
            "Adam": GroupAdam,
            "HAVE_APEX_OR_TE": True,
            "USING_APEX_OPTIMIZER": True,
            "USING_PYTORCH_OPTIMIZER": False,
        }.items():
            setattr(module, name, value)


class GroupAdam(torch.optim.Optimizer):
    """Adam as Apex and Transformer Engine have it, which are not here: the step is a group's."""

    def __init__(self, params: Any, lr: float, weight_decay: float, betas: Any, eps: float, adam_w_mode: bool) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            first, second = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                for slot in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(slot, torch.zeros_like(parameter))
                state["exp_avg"].lerp_(parameter.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                scale = (state["exp_avg_sq"] / (1 - second**step)).sqrt_().add_(group["eps"])
                parameter.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - first**step))


def _on_the_host(make: Any) -> Any:
    return lambda *args, **given: make(*args, **{k: "cpu" if v == "cuda" else v for k, v in given.items()})


class DistributedTrained(Trained):
    """The model, data-parallel over what ranks are left, and its optimizer."""

    def __init__(self, seed: int = 0, *, tensor_parallel: int = 1) -> None:
        super().__init__(seed, tensor_parallel=tensor_parallel)
        wanted = DistributedDataParallelConfig(use_distributed_optimizer=True)
        self.parallel = DistributedDataParallel(self.model.config, wanted, self.model)
        chosen = OptimizerConfig(optimizer="adam", lr=0.01, use_distributed_optimizer=True, clip_grad=0.0)
        self.sharded: Any = get_megatron_optimizer(chosen, [self.parallel])

    def _train(self) -> float:
        generator = torch.Generator().manual_seed(self.step)
        tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
        mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH), 1).bool()
        positions = torch.arange(LENGTH)[None].expand_as(tokens)
        self.parallel.zero_grad_buffer()
        self.sharded.zero_grad()
        loss = self.parallel(tokens, positions, mask, labels=tokens.roll(-1, 1)).mean()
        loss.backward()
        self.parallel.finish_grad_sync()
        self.sharded.step()
        self.step += 1
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        return {"model": self.model.sharded_state_dict(), "optimizer": self.sharded, "iteration": self.step}

    def put(self, state: dict[str, Any]) -> None:
        assert state["optimizer"] is self.sharded
        self.model.load_state_dict(state["model"])
        self.step = state["iteration"]
