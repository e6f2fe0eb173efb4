"""Canary, a FastConformer and a decoder of text: NeMo's ``EncDecMultiTaskModel``, transformers' classes of that name.

Sines and cosines of positions alternate in NeMo and lie in two halves in transformers, so that channels of the
decoder's residual stream are in another order there: even ones first.  The decoder hears the encoder as it is, so both
are equally wide.  Names and settings are those of transformers 5.24's classes, whose outputs are NeMo 3.0's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from anyckpt.checkpoint import Checkpoint
from anyckpt.config.codecs import Fixed, Implied, Written, same_as
from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.sections import Only, Section
from anyckpt.config.spellings import HuggingFace, NeMoSpeech
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError
from anyckpt.models.families.parts import fastconformer
from anyckpt.models.language.family import Family
from anyckpt.models.language.rule_operations import IDENTITY, Operation
from anyckpt.models.language.rules import Rule
from anyckpt.models.sentencepiece import USER_DEFINED
from anyckpt.models.speech.companions import Companions, pieces_of
from anyckpt.models.speech.featurizer import buffers, computed
from anyckpt.tensor import LazyTensor

_OWN, _HUB = "model.decoder.layers.*", "transf_decoder._decoder.layers.*"
_EMBEDDING, _HEAD = "transf_decoder._embedding.token_embedding.weight", "log_softmax.mlp.layer0.weight"
_POSITIONS = "transf_decoder._embedding.position_embedding.pos_enc"
_TOKENIZERS = "nemo.collections.common.tokenizers.canary_tokenizer"
_TOKENS = {
    "pad_token_id": "<pad>",
    "bos_token_id": "<|startoftranscript|>",
    "eos_token_id": "<|endoftext|>",
    "first_token_id": "<|startofcontext|>",
}


@dataclass(eq=False, repr=False, match_args=False)
class _EvenFirst(Operation):
    """Channels of the residual stream: alternating in the hub, even ones first in transformers.

    Attributes:
        axis: along which they are.
    """

    axis: int

    def to_hub(self, sources: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        return self._swapped(sources[0], 2)

    def from_hub(self, tensor: LazyTensor, config: ModelConfig) -> Sequence[LazyTensor]:
        return [self._swapped(tensor, tensor.shape[self.axis] // 2)]

    def _swapped(self, tensor: LazyTensor, first: int) -> LazyTensor:
        shape, at = tensor.shape, self.axis
        cut = tensor.reshape((*shape[:at], first, shape[at] // first, *shape[at + 1 :]))
        axes = [*range(at), at + 1, at, *range(at + 2, cut.ndim)]
        return cut.permute(axes).reshape(shape)


_ROWS, _COLUMNS = _EvenFirst(0), _EvenFirst(1)


def _module(
    source: str, hub: str, shape: tuple[str, ...], operation: Operation, axes: tuple[str, ...] = ("text-layer",)
) -> Iterable[Rule]:
    """Weight and bias, whose channels of the residual stream are rows or columns, or of neither."""
    yield Rule((f"{source}.weight",), f"{hub}.weight", shape, operation, axes=axes)
    of_bias = operation if operation is _ROWS else IDENTITY
    yield Rule((f"{source}.bias",), f"{hub}.bias", shape[:1], of_bias, axes=axes)


def _decoder() -> Iterable[Rule]:
    square = ("hidden", "hidden")
    norms = {"input_layernorm": 1, "post_attention_layernorm": 2, "final_layernorm": 3}
    for name, number in norms.items():
        yield from _module(f"{_OWN}.{name}", f"{_HUB}.layer_norm_{number}", ("hidden",), _ROWS)
    nets = {"q_proj": "query_net", "k_proj": "key_net", "v_proj": "value_net"}
    for own, block in (("self_attn", "first_sub_layer"), ("encoder_attn", "second_sub_layer")):
        for name, net in nets.items():
            hears = own == "encoder_attn" and name != "q_proj"
            yield from _module(f"{_OWN}.{own}.{name}", f"{_HUB}.{block}.{net}", square, IDENTITY if hears else _COLUMNS)
        yield from _module(f"{_OWN}.{own}.o_proj", f"{_HUB}.{block}.out_projection", square, _ROWS)
    block = f"{_HUB}.third_sub_layer"
    yield from _module(f"{_OWN}.mlp.fc1", f"{block}.dense_in", ("text-ffn", "hidden"), _COLUMNS)
    yield from _module(f"{_OWN}.mlp.fc2", f"{block}.dense_out", ("hidden", "text-ffn"), _ROWS)


RULES = (
    *fastconformer.encoder("model.encoder"),
    Rule(("model.decoder.embed_tokens.weight",), _EMBEDDING, ("labels", "hidden"), _COLUMNS),
    *_module("model.decoder.embedding_layernorm", "transf_decoder._embedding.layer_norm", ("hidden",), _ROWS),
    *_decoder(),
    *_module("model.decoder.norm", "transf_decoder._decoder.final_layer_norm", ("hidden",), _ROWS),
    Rule(("proj_out.bias",), "log_softmax.mlp.layer0.bias", ("labels",)),
)


class _Tokenizer(Codec):
    """The tokenizer's class; of several in one, files and class are ``Companions``'."""

    keys = ("tokenizer",)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        reader.mapping("tokenizer")
        return {}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        kind = f"{_TOKENIZERS}.CanaryBPETokenizer"
        return {"tokenizer": {"dir": "", "type": "bpe", "custom_tokenizer": {"_target_": kind, "tokenizers": None}}}


def _prompt_format(config: Mapping[str, Any]) -> str:
    """NeMo's name of the prompt: that of Canary 1B begins with the transcript."""
    first = config.get("first_token_id")
    return "canary" if first is not None and first == config.get("bos_token_id") else "canary2"


_NEMO_DECODER = Section(
    "transf_decoder",
    (
        Only("_target_", "nemo.collections.asr.modules.transformer.get_nemo_transformer"),
        Only("pre_ln_final_layer_norm", True),
        Only("model_name", None),
        Section(
            "config_dict",
            (
                Field("text_max_positions", "max_sequence_length", default=512),
                Only("num_token_types", 0, absent=2),
                Only("learn_positional_encodings", False),
                Only("hidden_size", same_as("hidden_size")),
                Field("text_ffn_hidden_size", "inner_size"),
                Field("text_num_layers", "num_layers"),
                Field("text_num_attention_heads", "num_attention_heads"),
                Field("text_attention_dropout", "attn_score_dropout", "number", 0.0),
                Only("hidden_act", "relu"),
                Only("pre_ln", True, absent=False),
            ),
            constants={"embedding_dropout": 0.1, "ffn_dropout": 0.1, "attn_layer_dropout": 0.1, "vocab_size": None},
        ),
    ),
    constants={"pretrained": False, "encoder": None},
)

_NEMO: tuple[Codec, ...] = (
    Only("prompt_format", _prompt_format, also=lambda value, found: value in ("canary", "canary2")),
    _Tokenizer(),
    fastconformer.PREPROCESSOR,
    fastconformer.NEMO_ENCODER,
    Section(
        "model_defaults",
        (Only("asr_enc_hidden", same_as("hidden_size")), Only("lm_dec_hidden", same_as("hidden_size"))),
        constants={"lm_enc_hidden": 0},
        closed=False,
    ),
    Section("transf_encoder", (Only("num_layers", 0),), closed=False),
    _NEMO_DECODER,
    Section(
        "head",
        (
            Only("_target_", "nemo.collections.asr.parts.submodules.token_classifier.TokenClassifier"),
            Only("num_layers", 1),
            Only("hidden_size", same_as("hidden_size")),
            Field("vocab_size", "num_classes"),
        ),
        constants={"activation": "relu", "log_softmax": True, "dropout": 0.0, "use_transformer_init": True},
    ),
    Field("pad_token_id", "pad_token_id", "tokens", 2),
    Field("bos_token_id", "bos_token_id", "tokens", 4),
    Field("eos_token_id", "eos_token_id", "tokens", 3),
    Field("first_token_id", "decoder_start_token_id", default=7),
    Written(
        {
            "decoding": {"strategy": "beam", "return_best_hypothesis": True,
                         "beam": {"beam_size": 1, "len_pen": 0.0, "max_generation_delta": 50}},
            "loss": {"_target_": "nemo.collections.common.losses.smoothed_cross_entropy.SmoothedCrossEntropyLoss",
                     "label_smoothing": 0.0, "pad_id": None},
        }
    ),
)  # fmt: skip

_DECODER = Section(
    "decoder_config",
    (
        Written({"vocab_size": same_as("vocab_size")}),
        Only("hidden_size", same_as("hidden_size")),
        Field("text_ffn_hidden_size", "intermediate_size", default=4096),
        Field("text_num_layers", "num_hidden_layers", default=8),
        Field("text_num_attention_heads", "num_attention_heads", default=8),
        Only("num_key_value_heads", same_as("text_num_attention_heads"), absent=8),
        Only("head_dim", lambda found: (found["hidden_size"] or 0) // max(1, found["text_num_attention_heads"] or 1),
             absent=128),
        Only("hidden_act", "relu"),
        Field("text_max_positions", "max_position_embeddings", default=1024),
        Only("attention_bias", True),
        Field("text_attention_dropout", "attention_dropout", "number", 0.0),
        Written({key: same_as(key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}),
        Written({"initializer_range": same_as("init_method_std"), "use_cache": True}),
    ),
    idle=fastconformer.IDLE | {"decoder_start_token_id"},
    constants={"model_type": "canary_decoder"},
)  # fmt: skip

_TEMPLATE = (
    "{%- set start = '<|startofcontext|><|startoftranscript|><|emo:undefined|>' -%}"
    "{%- set rest = '<|noitn|><|notimestamp|><|nodiarize|>' -%}"
    "{{- start -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}{{- message.content ~ '<|endoftext|>' -}}{%- endif -%}"
    "{%- if message.role == 'user' -%}"
    "{%- for part in message.content if part.type == 'text' -%}"
    "{%- set languages = '<|' ~ part.source_language ~ '|><|' ~ part.target_language ~ '|>' -%}"
    "{{- languages ~ ('<|pnc|>' if part.punctuation else '<|nopnc|>') ~ rest -}}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
"""The prompt of NeMo's format ``canary2`` as transformers' processor fills it in."""

_FIRST_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}{{- message.content ~ '<|endoftext|>' -}}{%- endif -%}"
    "{%- if message.role == 'user' -%}"
    "{%- for part in message.content if part.type == 'text' -%}"
    "{%- set task = '<|transcribe|>' if part.source_language == part.target_language else '<|translate|>' -%}"
    "{%- set languages = '<|' ~ part.source_language ~ '|>' ~ task ~ '<|' ~ part.target_language ~ '|>' -%}"
    "{{- '<|startoftranscript|>' ~ languages ~ ('<|pnc|>' if part.punctuation else '<|nopnc|>') -}}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
"""That of its older format ``canary``."""


def _positions(config: ModelConfig) -> LazyTensor:
    """Alternating sines and cosines over the root of the width: float32 of shape (text_max_positions, hidden_size)."""
    width, length = config.hidden_size, config.text_max_positions or 0
    rate = np.exp(np.arange(0, width, 2) * (-np.log(10000.0) / width)).astype(np.float32)
    angle = np.arange(length, dtype=np.float32)[:, np.newaxis] * rate
    table = np.stack([np.sin(angle), np.cos(angle)], axis=2).reshape(length, 2 * rate.size)[:, :width]
    return computed((table / np.float32(np.sqrt(width))).astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class _Companions(Companions):
    """Also the tokens that NeMo knows by their names."""

    def read(self, config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
        if checkpoint.config_kind != "nemo1":
            return super().read(config, checkpoint)
        try:
            tokens = pieces_of(checkpoint)
        except FormatError:  # of which whoever makes a tokenizer of it tells
            return config
        names = dict(_TOKENS)
        if checkpoint.config.get("prompt_format") == "canary":
            names["first_token_id"] = names["bos_token_id"]
        found: dict[str, Any] = {field: tokens.index(token) for field, token in names.items() if token in tokens}
        return replace(config, **found) if tokens else config


def _count(config: ModelConfig, tokens: int) -> int:
    """As many as there are, if rows for them are a multiple of eight, as NeMo makes them."""
    return tokens if -(-tokens // 8) * 8 == config.vocab_size else config.vocab_size or 0


def _ids(config: ModelConfig) -> dict[str, Any]:
    return {
        "bos_token_id": config.bos_token_id,
        "decoder_start_token_id": config.first_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


FAMILY = Family(
    name="canary",
    title="Canary (FastConformer)",
    rules=fastconformer.undivided(RULES),
    ignorable=(*fastconformer.IGNORABLE, (_POSITIONS, "encodings of positions, which follow from the configuration")),
    traits={**fastconformer.TRAITS, "share_embeddings_and_output_weights": True},
    recognise=lambda config: False,
    megatron=False,
    axes={**fastconformer.AXES, "text-layer": lambda config: range(config.text_num_layers or 0)},
    dimensions={**fastconformer.DIMENSIONS, "text-ffn": lambda config: config.text_ffn_hidden_size or 0},
    prefixes={"nemo-flat": ""},
    twins=((_HEAD, _EMBEDDING),),
    hugging_face=HuggingFace(
        model_types=("canary",),
        architectures=("CanaryForConditionalGeneration",),
        fields=(
            Field("vocab_size", "vocab_size", default=16384),
            Field("pad_token_id", "pad_token_id", "tokens", 2),
            Field("bos_token_id", "bos_token_id", "tokens", 4),
            Field("eos_token_id", "eos_token_id", "tokens", 3),
            Field("first_token_id", "decoder_start_token_id", default=7),
        ),
        codecs=(
            fastconformer.hugging_face(num_hidden_layers=32, num_mel_bins=128, scale_input=False, layerdrop=0.0),
            _DECODER,
            fastconformer.EPSILON,
            Implied(fastconformer.AUDIO),
            Fixed({"tie_word_embeddings": True}, "that of NeMo's model, whose output layer is its embedding"),
            Written({"initializer_range": same_as("init_method_std"), "is_encoder_decoder": True}),
            Written({"use_cache": True}, kept=True),
        ),
        activation_key=None,
        attention_bias=None,
        copies=(("proj_out.weight", "model.decoder.embed_tokens.weight"),),
    ),
    nemo_speech=NeMoSpeech("nemo.collections.asr.models.aed_multitask_models.EncDecMultiTaskModel", _NEMO),
    companions=_Companions(
        pieces=_count,
        more=(),
        marked=("<unk>",),
        tokenizer={
            "bos_token": "<|startoftranscript|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<pad>",
            "processor_class": "CanaryProcessor",
            "tokenizer_class": "TokenizersBackend",
            "unk_token": "<unk>",
        },
        processor=lambda config: {"processor_class": "CanaryProcessor"},
        generation=lambda config: {**_ids(config), "use_cache": True},
        special=lambda piece, kind: kind != USER_DEFINED or (piece.startswith("<|") and piece.endswith("|>")),
        template=lambda config: _FIRST_TEMPLATE if _prompt_format(vars(config)) == "canary" else _TEMPLATE,
        aggregate_class=f"{_TOKENIZERS}.CanaryTokenizer",
        made=lambda config: {**buffers(config), _POSITIONS: _positions(config)},
        twice={_HEAD: _EMBEDDING},
    ),
)
