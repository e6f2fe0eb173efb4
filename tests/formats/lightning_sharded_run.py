"""Run by ``test_lightning_peer.py`` in a process of its own: Lightning loads a sharded checkpoint and trains on.

Arguments: the checkpoint, and a file for what was found.
"""

import json
import sys

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy


class Model(lightning.LightningModule):
    """As the fixture ``nemo/lightning_fsdp2``."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.register_buffer("scale", torch.zeros(3))
        self.net = torch.nn.Sequential(torch.nn.Linear(dim, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

    def configure_model(self) -> None:
        from torch.distributed._composable.fsdp import fully_shard

        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, index):
        return self.net(batch).pow(2).mean()

    def validation_step(self, batch, index):
        self.log("loss", self.net(batch).pow(2).mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=0.0)

    def on_train_start(self):
        found["fit_start"] = weights(self)
        found["step_at_start"] = self.trainer.global_step
        state = self.optimizers().optimizer.state_dict()["state"]
        found["steps"] = sorted({float(slot["step"]) for slot in state.values()})


def weights(module):
    return {name: getattr(v, "full_tensor", lambda v=v: v)().tolist() for name, v in module.state_dict().items()}


def trainer(**options):
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, process_group_backend="gloo"),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )


found: dict = {}
data = torch.utils.data.DataLoader(torch.ones(8, 8), batch_size=2)
module = Model()
trainer().validate(module, data, ckpt_path=sys.argv[1], verbose=False)
found["validate"] = weights(module)
if sys.argv[3:] == ["fit"]:
    module = Model()
    run = trainer(max_steps=4)
    run.fit(module, data, ckpt_path=sys.argv[1])
    found["step_at_end"] = run.global_step
with open(sys.argv[2], "w") as file:
    json.dump(found, file)
