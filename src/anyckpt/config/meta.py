"""``params.json`` of Meta's and Mistral's releases: what their model classes take, and no more.

Facts: ``ModelArgs`` of Meta's llama and llama-models, ``TransformerArgs`` of mistral_inference, and what transformers'
``convert_llama_weights_to_hf`` and ``convert_mistral_weights_to_hf`` of 4.x conclude where the file does not say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from anyckpt.config.meta_names import EMBEDDING, HEAD, meta_name
from anyckpt.config.model import ModelConfig, check, vocabulary_divisor, whole
from anyckpt.config.reader import Reader
from anyckpt.config.rope_scaling import from_factors, to_factors
from anyckpt.config.spellings import Spellings
from anyckpt.errors import MappingError
from anyckpt.tensor import LazyTensor

_NEEDED = {"dim", "n_layers", "n_heads"}
_LARGEST = 1 << 24
_KNOWN = {
    *_NEEDED,
    "n_kv_heads",
    "head_dim",
    "hidden_dim",
    "multiple_of",
    "ffn_dim_multiplier",
    "vocab_size",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
    "rope_scaling_factor",
    "sliding_window",
    "moe",
    "max_seq_len",
    "max_batch_size",
    "rope_freq_base",
}
_SAY = "if it is another, give a copy of params.json with --config that says"
"""What a guess ends with, before the key by which ``parse`` takes it."""
_MISTRAL = ("sliding_window", "hidden_dim")
_LLAMA_3_VOCABULARY = 128_256


def is_params(config: Mapping[str, Any]) -> bool:
    """Whether a configuration has the keys of Meta's, by itself or as the ``model`` of a training run's."""
    return own_part(config).keys() >= _NEEDED


def own_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What describes the model."""
    inner = config.get("model")
    return inner if isinstance(inner, Mapping) and inner.keys() >= _NEEDED else config


def is_of(family: Spellings, config: Mapping[str, Any]) -> bool:
    """Whether a ``params.json`` is of a family's models; families with keys of their own are to be asked first."""
    if family.meta is None:
        return False
    stated = own_part(config)
    return not family.meta.params or any(stated.get(key) is not None for key in family.meta.params)


def parse(
    family: Spellings, config: Mapping[str, Any], weights: Mapping[str, LazyTensor], notes: list[str]
) -> ModelConfig:
    """The hub's configuration.

    Args:
        family: of which the model is.
        config: the file.
        weights: the stored tensors, which tell what the file leaves to be computed or, by -1, open.
        notes: what had to be concluded is appended.

    Raises:
        MappingError: a key is missing or of the wrong type, or a size is not possible.
    """
    stated = own_part(config)
    reader = Reader(stated, "params.json")
    needed = {key: reader.integer(key) for key in sorted(_NEEDED)}
    for key, value in needed.items():
        if value is None or not 0 < value < _LARGEST:
            raise MappingError(f"params.json's {key} is not possible", expected="a positive size", found=value)
    dim, heads = needed["dim"] or 0, needed["n_heads"] or 0
    experts = Reader(reader.mapping("moe"), "params.json's moe")
    base = reader.number("rope_theta") or reader.number("rope_freq_base") or 10000.0
    vocabulary = reader.integer("vocab_size")
    if vocabulary is None or vocabulary < 1:  # -1 in Llama 1 and 2: the tokenizer's
        vocabulary = _rows(weights, HEAD) or _rows(weights, EMBEDDING)
    width = _feed_forward(reader, dim, weights, notes)
    window = stated.get("sliding_window")
    if isinstance(window, str) and window.isdecimal() and len(window) < 10:
        window = int(window)  # as Mistral 7B's says it
    length = reader.integer("max_seq_len")
    if length is None:
        length = _longest(reader, base, vocabulary)
        notes.append(
            f"params.json does not say the longest sequence: {length} tokens are taken to be it; {_SAY} max_seq_len"
        )
    begin, end = (128_000, 128_001) if vocabulary == _LLAMA_3_VOCABULARY else (1, 2)
    notes.append(
        f"params.json does not say which tokens begin and end a text: {begin} and {end} are taken; if they are others, "
        "give the model's config.json with --config"
    )
    own = {
        "num_moe_experts": experts.integer("num_experts"),
        "moe_router_topk": experts.integer("num_experts_per_tok"),
        "moe_ffn_hidden_size": width,
    }
    return check(
        ModelConfig(
            **{
                **family.traits,
                "family": family.name,
                "num_layers": needed["n_layers"],
                "hidden_size": dim,
                "ffn_hidden_size": width,
                "num_attention_heads": heads,
                "num_query_groups": reader.integer("n_kv_heads") or heads,
                "kv_channels": reader.integer("head_dim") or dim // heads,
                "vocab_size": vocabulary,
                "make_vocab_size_divisible_by": vocabulary_divisor(vocabulary or 1),
                "layernorm_epsilon": reader.number("norm_eps") or 1e-5,
                "rotary_base": base,
                "rope_scaling": _scaling(reader, dim, notes),
                "max_position_embeddings": length,
                "share_embeddings_and_output_weights": False,
                "add_bias_linear": False,
                "window_size": (window - 1, 0) if type(window) is int and window > 0 else None,
                "bos_token_id": begin,
                "eos_token_id": end,
                **(own if experts.values else {}),
                "extra": {"meta": {key: value for key, value in stated.items() if key not in _KNOWN}},
            }
        )
    )


def render(family: Spellings, config: ModelConfig, notes: list[str]) -> dict[str, Any]:
    """A ``params.json`` with which Meta's code, or Mistral's for its families, builds the model.

    Raises:
        MappingError: neither has such models.
    """
    if family.meta is None:
        raise MappingError(
            f"Meta's code has no models of family {family.name}",
            remedy="convert to hf, or to safetensors, torch or dcp, which keep names",
        )
    factors, interpolation = to_factors(config.rope_scaling, "params.json", fixed=True)
    if interpolation is not None:
        raise MappingError("params.json cannot express linear rope scaling", found=interpolation)
    width = config.moe_ffn_hidden_size or config.ffn_hidden_size
    length = config.max_position_embeddings
    if length is not None:
        notes.append(
            f"params.json does not say the longest sequence, {length} tokens: give it to the code that loads it"
        )
    rendered: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_query_groups,
        "vocab_size": config.vocab_size,
        "norm_eps": config.layernorm_epsilon,
        "rope_theta": whole(config.rotary_base),
        **config.extra.get("meta", {}),
    }
    if any(key in family.meta.params for key in (*_MISTRAL, "moe")):
        rendered |= {"head_dim": config.kv_channels, "hidden_dim": width}
        if config.window_size is not None:
            rendered["sliding_window"] = config.window_size[0] + 1
        if config.num_moe_experts is not None:
            rendered["moe"] = {
                "num_experts": config.num_moe_experts,
                "num_experts_per_tok": config.moe_router_topk,
            }
        return rendered
    if config.kv_channels * config.num_attention_heads != config.hidden_size:
        raise MappingError(
            "Meta's code takes the width of a head to be dim over n_heads",
            found=config.kv_channels,
            expected=config.hidden_size / config.num_attention_heads,
            remedy="write torchtitan's names with --to dcp --names torchtitan",
        )
    multiple, multiplier = _as_multiple(config.hidden_size, width)
    rendered["multiple_of"] = multiple
    if multiplier is not None:
        rendered["ffn_dim_multiplier"] = multiplier
    if factors:
        rendered["use_scaled_rope"] = True
        if factors["scale_factor"] != 8.0:
            rendered["rope_scaling_factor"] = factors["scale_factor"]
    return rendered


def surplus(config: ModelConfig) -> list[str]:
    """Keys of the source's ``params.json`` that no other framework's spelling has."""
    return sorted(map(str, config.extra.get("meta", {})))


def _rows(weights: Mapping[str, LazyTensor], wanted: str) -> int | None:
    return next(
        (tensor.shape[0] for name, tensor in weights.items() if tensor.ndim and meta_name(name) == wanted), None
    )


def _feed_forward(reader: Reader, dim: int, weights: Mapping[str, LazyTensor], notes: list[str]) -> int:
    """Width of the feed-forward layers: as said, else as stored, else by Meta's formula."""
    said = reader.integer("hidden_dim")
    if said is not None:
        return said
    multiple, multiplier = reader.integer("multiple_of"), reader.number("ffn_dim_multiplier")
    computed = _rounded(dim, 256 if multiple is None else max(1, multiple), multiplier)
    stored = _rows(weights, "layers.0.feed_forward.w1.weight")
    if stored is None or stored == computed:
        return computed
    notes.append(f"the feed-forward layers have {stored} rows, where params.json's multiple_of gives {computed}")
    return stored


def _rounded(dim: int, multiple: int, multiplier: float | None) -> int:
    width = int(8 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return -(-width // multiple) * multiple


def _as_multiple(dim: int, width: int) -> tuple[int, float | None]:
    """``multiple_of`` and ``ffn_dim_multiplier`` of which Meta's formula makes this width."""
    for multiplier in _multipliers(dim, width):
        for multiple in (256, 1024, 4096, *(1 << power for power in range(7, -1, -1)), width):
            if _rounded(dim, multiple, multiplier) == width:
                return multiple, multiplier
    raise MappingError("no multiple_of and ffn_dim_multiplier give this width", expected=f"of dim {dim}", found=width)


def _multipliers(dim: int, width: int) -> Iterator[float | None]:
    yield None
    for digits in range(1, 17):
        rounded = round(width / max(1, int(8 * dim / 3)), digits)
        if rounded > 0:
            yield rounded


def _scaling(reader: Reader, dim: int, notes: list[str]) -> dict[str, Any] | None:
    """Llama 3.1's factor is 8; that of 3.2, whose two text models are the narrow ones, is 32."""
    if not reader.flag("use_scaled_rope"):
        return None
    factor = reader.number("rope_scaling_factor")
    if factor is None:
        factor = 32.0 if dim < 4096 else 8.0
        notes.append(
            f"params.json does not say the factor of the scaled rope: {factor:g} is taken to be it; {_SAY} "
            "rope_scaling_factor"
        )
    return from_factors({"scale_factor": factor}, None)


def _longest(reader: Reader, base: float, vocabulary: int | None) -> int:
    """As transformers' scripts have it: 131072 of Llama 3.1, 8192 of 3, 16384 of Code Llama, 32768 of Mistral."""
    if reader.flag("use_scaled_rope"):
        return 131_072
    if vocabulary == _LLAMA_3_VOCABULARY:
        return 8192
    if reader.values.get("hidden_dim") is not None:
        return 32_768
    if base > 10000:
        return 16_384
    return 2048 if reader.number("norm_eps") == 1e-6 else 4096
