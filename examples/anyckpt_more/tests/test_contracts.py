"""What anyckpt expects of a family and a format, tried on ours: run pytest where the package is installed."""

from pathlib import Path

from anyckpt_more.heron import FAMILY
from anyckpt_more.npy import FORMAT

from anyckpt.testing import check_family, check_format

HERON = {
    "model_type": "heron",
    "architectures": ["HeronForCausalLM"],
    "bias": False,
    "hidden_act": "silu",
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 37,
    "max_position_embeddings": 96,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def test_the_family() -> None:
    check_family(FAMILY, HERON)


def test_the_format(tmp_path: Path) -> None:
    check_format(FORMAT, tmp_path)
