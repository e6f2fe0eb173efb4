"""One tensor-parallel rank of a real Megatron-Core model whose layers differ, loaded from our file of that rank.

    python -m tests.models.heterogeneous_rank RANK WORLD FOLDER

FOLDER has our checkpoint in ``ranks`` and gets the logits in ``logits_<RANK>.npy``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import tests.models.megatron_forward as forward
import torch
from megatron.core import parallel_state
from tests.models.remote_code_forward import built
from tests.models.remote_code_references import inputs

import anyckpt

LOCAL = {**forward.LOCAL, "self_attention.layer_norm_": "input_layernorm.", "mlp.layer_norm_": "pre_mlp_layernorm."}


def main(rank: int, world: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    model = built(anyckpt.open(folder / "ranks").config, tensor_model_parallel_size=world)
    file = next((folder / "ranks").rglob(f"mp_rank_{rank:02d}*/model_optim_rng.pt"))
    state = {}
    for key, value in torch.load(file, weights_only=False)["model"].items():
        for fused, module in LOCAL.items():
            key = key.replace(fused, module)
        state[key] = value
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        np.save(folder / f"logits_{rank}.npy", model(*inputs()).numpy())
    torch.distributed.barrier()
    # Megatron-Core keeps groups of its own: those that live until the interpreter ends may meet their threads there,
    # which ends the process by std::terminate.
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    sys.stderr.flush()
    os._exit(0)  # nothing is left to be said, and no thread of a library is waited for
