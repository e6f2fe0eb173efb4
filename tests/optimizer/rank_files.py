"""Lightning checkpoints of one file per rank with optimizer state, as NeMo 1 saves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anyckpt.containers.torch_file import read_torch, zip_parts
from anyckpt.engine.plan import OutputFile
from anyckpt.storage.local_file import LocalFile
from anyckpt.storage.tar import read_tar
from anyckpt.tensor import LazyTensor, from_array
from tests.support import expected_of, file_bytes, fixture_path

NAME = "m--step=6-last.ckpt"
SLOTS = ("master", "exp_avg", "exp_avg_sq")
Groups = Callable[[str, LazyTensor], int]


def matrices(name: str, weight: LazyTensor) -> int:
    """Megatron-Core's rule."""
    return int(weight.ndim == 1 or name.endswith(".bias"))


def biases(name: str, weight: LazyTensor) -> int:
    """NeMo's rule where it does not know the classes of the norms."""
    return int(name.endswith("bias"))


def of_slot(slot: str, weight: LazyTensor) -> LazyTensor:
    """What a slot holds here: a function of the weight's elements, so that it is cut as the weight is."""
    values = weight.numpy().astype(np.float32)
    number = SLOTS.index(slot)
    return from_array(np.ascontiguousarray(values * (number + 1) + np.float32(number) / 7))


def ranks_of(case: str) -> dict[str, dict[str, Any]]:
    """The state dicts that NeMo 2.5.3 wrote for each rank."""
    members = read_tar(LocalFile(fixture_path(f"{case}/model.nemo"))).values()
    ranks = [member for member in members if member.name.endswith("/model_weights.ckpt")]
    return {member.name.partition("/")[0]: dict(read_torch(member.source).root) for member in ranks}


def divided(states: Sequence[Mapping[str, Any]], group_of: Groups) -> list[list[LazyTensor]]:
    """The parameters of each group, chunk after chunk."""
    found: dict[int, list[LazyTensor]] = {}
    for state in states:
        for name, weight in state.items():
            if isinstance(weight, LazyTensor) and not name.endswith("inv_freq"):
                found.setdefault(group_of(name, weight), []).append(weight)
    return [found[number] for number in sorted(found)]


def adam_of(groups: Sequence[Sequence[LazyTensor]], *slots: str) -> dict[str, Any]:
    """PyTorch's form, as Apex's ``FusedAdam`` fills it: steps are the groups'."""
    state: dict[int, dict[str, LazyTensor]] = {}
    listed: list[dict[str, Any]] = []
    for number, own in enumerate(groups):
        first = len(state)
        for weight in own:
            state[len(state)] = {slot: of_slot(slot, weight) for slot in ("exp_avg", "exp_avg_sq")}
        decay = {"weight_decay": 0.0} if number else {"weight_decay": 0.1}
        listed.append({"lr": 1e-3, **decay, "betas": (0.9, 0.98), "step": 6, "params": [*range(first, len(state))]})
    return {"state": state, "param_groups": listed}


def wrapped(states: Sequence[Mapping[str, Any]], group_of: Groups) -> dict[str, Any]:
    """As ``MainParamsOptimizerWrapper`` saves it."""
    groups = divided(states, group_of)
    masters = [[of_slot("master", weight) for weight in own] for own in groups]
    return {"optimizer": adam_of(groups), "fp32_from_fp16_params": masters}


def bare(states: Sequence[Mapping[str, Any]], group_of: Groups) -> dict[str, Any]:
    """The optimizer of weights in fp32."""
    return adam_of(divided(states, group_of))


def apex_whole(states: Sequence[Mapping[str, Any]], group_of: Groups) -> dict[str, Any]:
    """The second format of Apex's ``DistributedFusedAdam``."""
    groups = divided(states, group_of)
    adam = adam_of(groups)
    for index, weight in enumerate(weight for own in groups for weight in own):
        adam["state"][index]["param"] = of_slot("master", weight)
    for group in adam["param_groups"]:
        group.pop("step")
    adam["state"]["step"] = 6
    return {**adam, "format": 2}


def written(
    root: Path,
    ranks: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any],
    optimizer: Callable[[str, Mapping[str, Any]], Any],
) -> Path:
    """A folder ``checkpoints``.

    Args:
        root: where.
        ranks: folder -> state dict, or with virtual pipeline ``model0`` and following.
        config: NeMo's.
        optimizer: ``optimizer_states`` of a rank.
    """
    for folder, state in ranks.items():
        weights = dict(state) if "model0" in state else {"state_dict": dict(state)}
        contents: dict[str, Any] = {
            "epoch": 1, "global_step": 6, "pytorch-lightning_version": "2.4.0", "state_dict": {}, **weights,
            "optimizer_states": optimizer(folder, state), "lr_schedulers": [{"last_epoch": 6}],
            "hyper_parameters": {"cfg": dict(config)},
        }  # fmt: skip
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / NAME).write_bytes(file_bytes(OutputFile("", zip_parts(contents))))
    return root


def config_of(case: str) -> dict[str, Any]:
    """The configuration that the fixture was saved with."""
    config = expected_of(case)["config"]
    assert isinstance(config, dict)
    return config
