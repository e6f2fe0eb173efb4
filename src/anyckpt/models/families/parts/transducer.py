"""What NeMo's configurations of transducers have around the modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.fields import Codec
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader


class Wrappers(Codec):
    """Sections that only a transducer of one kind has, written as NeMo's own configurations have them."""

    hubs: tuple[str, ...] = ("max_symbols_per_step",)
    keys: tuple[str, ...] = ("decoding", "loss", "model_defaults")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        greedy = Reader(reader.mapping("decoding"), "model_config.yaml's decoding").mapping("greedy")
        stated = Reader(greedy, "model_config.yaml's decoding.greedy").integer("max_symbols")
        return {"max_symbols_per_step": stated or 10}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        width = config.prediction_hidden_size
        durations = None if config.durations is None else list(config.durations)
        kwargs = {"fastemit_lambda": 0.0, "clamp": -1.0}
        widths = {"enc_hidden": config.hidden_size, "pred_hidden": width, "joint_hidden": width}
        decoding = {"strategy": "greedy_batch", "greedy": {"max_symbols": config.max_symbols_per_step or 10}}
        if durations is None:
            loss = {"loss_name": "default", "warprnnt_numba_kwargs": kwargs}
            return {"model_defaults": widths, "decoding": decoding, "loss": loss}
        tdt = {**kwargs, "durations": durations, "sigma": 0.02, "omega": 0.1}
        return {
            "model_defaults": {**widths, "num_tdt_durations": len(durations), "tdt_durations": durations},
            "decoding": {**decoding, "model_type": "tdt", "durations": durations},
            "loss": {"loss_name": "tdt", "tdt_kwargs": tdt},
        }
