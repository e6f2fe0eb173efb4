"""A tiny training run with Lightning, whose losses are compared bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

STEPS = 6


class Numbers(Dataset):  # type: ignore[type-arg]
    """Rows that say nothing: what a step learns from depends on its number alone."""

    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(1)


def batch_of(step: int, dim: int = 4) -> Any:
    """The rows of a step, the same in every process and after every restart."""
    return torch.randn(4, dim, generator=torch.Generator().manual_seed(step))


class Net(pl.LightningModule):
    """Two layers, AdamW, a schedule; ``losses`` has what each step's loss was."""

    def __init__(self, dim: int = 4, objects: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(dim, 8), nn.Tanh(), nn.Linear(8, dim))
        self.losses: dict[int, float] = {}

    def setup(self, stage: str) -> None:
        torch.manual_seed(5)
        for value in self.net.parameters():
            nn.init.uniform_(value)

    def training_step(self, batch: Any, index: int) -> Any:
        rows = batch_of(self.trainer.global_step, self.net[0].in_features)
        loss = ((self.net(rows) - rows) ** 2).mean()
        self.losses[self.trainer.global_step] = loss.item()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}]

    def train_dataloader(self) -> Any:
        return DataLoader(Numbers(), batch_size=4, num_workers=0)


def trainer(folder: Path | str, steps: int = STEPS, **options: Any) -> pl.Trainer:
    """A quiet trainer on one CPU."""
    fixed: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(default_root_dir=folder, max_steps=steps, **{**fixed, **options})


def run(folder: Path | str, steps: int = STEPS, *, resume: Any = None, model: Any = None, **options: Any) -> Any:
    """Train, and give the model and its trainer."""
    model = Net() if model is None else model
    made = trainer(folder, steps, **options)
    made.fit(model, ckpt_path=resume)
    return model, made


def sharded_net(strategy: str) -> Any:
    """A ``Net`` that is divided over the ranks, with FSDP2 or tensor parallelism."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    class Sharded(Net):
        def configure_model(self) -> None:
            if strategy == "tp":
                plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
                parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
            else:
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def setup(self, stage: str) -> None:
            super().setup(stage)

    return Sharded()
