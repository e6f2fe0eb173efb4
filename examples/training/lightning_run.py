"""A run of Lightning's trainer that is interrupted and resumed, with its model as one file at the end."""

import logging
import os

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

import anyckpt.torch
from anyckpt.torch.lightning import EMA, CheckpointIO, ModelCheckpoint

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Model(anyckpt.torch.Restorable, pl.LightningModule):
    """A few weights; the mixin exports them as a .nemo."""

    def __init__(self, cfg, trainer=None):
        super().__init__(cfg, trainer)
        self.net = nn.Sequential(nn.Linear(self.cfg.dim, 16), nn.Tanh(), nn.Linear(16, self.cfg.dim))
        self.losses = {}

    def training_step(self, batch, index):
        step = self.trainer.global_step
        rows = torch.randn(4, self.cfg.dim, generator=torch.Generator().manual_seed(step))
        loss = ((self.net(rows) - rows) ** 2).mean()
        self.losses[step] = loss.item()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def fit(folder, steps, **options):
    torch.manual_seed(1)
    model = Model({"dim": 8})
    checkpoints = ModelCheckpoint(
        folder,
        "run--{step}-{consumed_samples}",  # as NeMo names them; the last ends with -last
        monitor="loss",
        every_n_train_steps=2,
        save_top_k=2,
        save_last=True,
        prefix="run",
    )
    trainer = pl.Trainer(
        max_steps=steps,
        plugins=[CheckpointIO(in_flight=1)],  # any checkpoint is resumed; files are written while training goes on
        callbacks=[checkpoints, EMA(0.9)],  # a second file has the averaged weights
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(torch.zeros(64, 1), batch_size=4), **options)
    return model.losses


def main():
    whole = fit("whole", 6)
    first = fit("parts", 4)
    second = fit("parts", 6, ckpt_path="last")
    print("the same losses, bit for bit:", {**first, **second} == whole)

    print(*sorted(name for name in os.listdir("parts") if not name.startswith(".")), sep="\n")
    model = Model.restore_from("parts/run.nemo")  # the averaged weights
    print(model.restored)


if __name__ == "__main__":
    main()
