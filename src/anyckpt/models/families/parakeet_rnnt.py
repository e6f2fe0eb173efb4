"""Parakeet with a transducer: NeMo's ``EncDecRNNTBPEModel`` of a FastConformer, transformers' ``ParakeetForRNNT``.

An LSTM predicts the next token, and a joint network hears and predicts together.  NeMo's of other widths or functions,
with norms, or without a row for the blank, transformers' class cannot be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anyckpt.config.codecs import Fixed, Implied, Written, same_as
from anyckpt.config.fields import Codec, Field
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.config.sections import Only, Section, Sum
from anyckpt.config.spellings import HuggingFace, NeMoSpeech
from anyckpt.models.families.parts import fastconformer
from anyckpt.models.families.parts.fastconformer import target
from anyckpt.models.families.parts.modules import linear
from anyckpt.models.families.parts.transducer import Wrappers
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Rule, has, lacks
from anyckpt.models.speech.companions import Companions

_LSTM = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

TRANSDUCER = (
    Rule(("decoder.embedding.weight",), "decoder.prediction.embed.weight", ("labels", "prediction")),
    *(
        Rule((f"decoder.lstm.{name}_l*",), f"decoder.prediction.dec_rnn.lstm.{name}_l*",
             ("gates", "prediction") if name.startswith("weight") else ("gates",), axes=("prediction",))
        for name in _LSTM
    ),
    *linear("decoder.decoder_projector", "joint.pred", ("prediction", "prediction")),
    *linear("encoder_projector", "joint.enc", ("prediction", "hidden")),
    *linear("joint.head", "joint.joint_net.2", ("outputs", "prediction"), when=has("joint_dropout")),
    *linear("joint.head", "joint.joint_net.1", ("outputs", "prediction"), when=lacks("joint_dropout")),
)  # fmt: skip
"""What predicts and joins."""

RULES = (*fastconformer.encoder(), *TRANSDUCER)


class Pad(Codec):
    """The token that pads, by its place in ``labels``.

    NeMo has no key for it, and does not look at ours, which says it where no token is called so.
    """

    hubs = ("pad_token_id",)
    keys = ("labels", "pad_token_id")

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        labels = reader.values.get("labels") or reader.mapping("joint").get("vocabulary")
        if isinstance(labels, list) and "<pad>" in labels:
            return {"pad_token_id": labels.index("<pad>")}
        return {"pad_token_id": reader.integer("pad_token_id")}

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        return {"labels": [], "pad_token_id": config.pad_token_id}


class _First(Codec):
    """The token that pads where none is called so: transformers' converter takes the first."""

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"pad_token_id": 0} if found["pad_token_id"] is None else {}


def durations_of(config: Mapping[str, Any]) -> list[Any] | None:
    """The durations that a ``model_config.yaml`` lists, wherever; None if it lists none."""
    loss, decoding = config.get("loss"), config.get("decoding")
    inner = loss.get("tdt_kwargs") if isinstance(loss, Mapping) else None
    for section in (decoding, inner):
        listed = section.get("durations") if isinstance(section, Mapping) else None
        if isinstance(listed, list) and listed:
            return listed
    return None


_NETWORK = Section(
    "prednet",
    (
        Field("prediction_hidden_size", "pred_hidden"),
        Field("prediction_num_layers", "pred_rnn_layers"),
        Only("rnn_hidden_size", -1, written=False,
             also=lambda value, found: type(value) is int and (value < 1 or value == found["prediction_hidden_size"])),
    ),
    idle=frozenset("forget_gate_bias weights_init_scale hidden_hidden_bias_scale".split()),
    constants={"t_max": None, "dropout": 0.2},
)  # fmt: skip

_PREDICTION = Section(
    "decoder",
    (
        target("RNNTDecoder"),
        Only("normalization_mode", None),
        Only("random_state_sampling", False),
        Only("blank_as_pad", True),
        Sum("vocab_size", "vocab_size", 1),
        _NETWORK,
    ),
)

_JOINT_NETWORK = Section(
    "jointnet",
    (
        Only("joint_hidden", lambda found: found["prediction_hidden_size"]),
        Only("activation", "relu"),
        Field("joint_dropout", "dropout", "number", 0.0),
        Only("encoder_hidden", lambda found: found["hidden_size"]),
        Only("pred_hidden", lambda found: found["prediction_hidden_size"]),
    ),
)


def _outputs(found: Mapping[str, Any]) -> int:
    return len(found.get("durations") or ())


_JOINT = Section(
    "joint",
    (
        target("RNNTJoint"),
        _JOINT_NETWORK,
        Only("num_classes", lambda found: (found["vocab_size"] or 1) - 1),
        Only("num_extra_outputs", _outputs, absent=0),
    ),
    idle=frozenset("experimental_fuse_loss_wer masking_prob".split()),
    constants={"log_softmax": None, "preserve_memory": False, "fuse_loss_wer": False, "fused_batch_size": 4,
               "vocabulary": []},
)  # fmt: skip

BEHIND_ENCODER: tuple[Codec, ...] = (
    _PREDICTION,
    Wrappers(),
    _JOINT,
    Pad(),
    _First(),
    Implied({"blank_token_id": lambda found: (found["vocab_size"] or 1) - 1}, "NeMo's last label is the blank"),
)

NEMO: tuple[Codec, ...] = (fastconformer.PREPROCESSOR, fastconformer.NEMO_ENCODER, *BEHIND_ENCODER)

TRANSDUCER_FIELDS = (
    Field("prediction_hidden_size", "decoder_hidden_size", default=640),
    Field("prediction_num_layers", "num_decoder_layers", default=2),
    Field("max_symbols_per_step", "max_symbols_per_step", default=10),
)
"""Keys of transformers' classes of transducers that say how large the prediction network is."""

BESIDE_ENCODER: tuple[Codec, ...] = (
    fastconformer.EPSILON,
    Implied({**fastconformer.AUDIO, "joint_dropout": 0.2}),
    Fixed({"hidden_act": "relu"}, "that of NeMo's joint network"),
    Written({"initializer_range": same_as("init_method_std"), "is_encoder_decoder": True}),
)
"""What all these classes have in common besides."""

FAMILY = Family(
    name="parakeet-rnnt",
    title="Parakeet RNNT (FastConformer)",
    rules=fastconformer.undivided(RULES),
    ignorable=fastconformer.IGNORABLE,
    traits=fastconformer.TRAITS,
    recognise=lambda config: False,
    megatron=False,
    axes={**fastconformer.AXES, "prediction": lambda config: range(config.prediction_num_layers or 0)},
    dimensions={
        **fastconformer.DIMENSIONS,
        "prediction": lambda config: config.prediction_hidden_size or 0,
        "gates": lambda config: 4 * (config.prediction_hidden_size or 0),
        "outputs": lambda config: (config.vocab_size or 0) + len(config.durations or ()),
    },
    prefixes={"nemo-flat": ""},
    hugging_face=HuggingFace(
        model_types=("parakeet_rnnt",),
        architectures=("ParakeetForRNNT",),
        fields=(
            Field("vocab_size", "vocab_size", default=8193),
            Field("pad_token_id", "pad_token_id", "tokens", 2),
            Field("blank_token_id", "blank_token_id", default=8192),
            *TRANSDUCER_FIELDS,
        ),
        codecs=(
            fastconformer.hugging_face(),
            *BESIDE_ENCODER,
        ),
        activation_key=None,
        attention_bias=None,
    ),
    nemo_speech=NeMoSpeech(
        "nemo.collections.asr.models.rnnt_bpe_models.EncDecRNNTBPEModel",
        NEMO,
        fits=lambda config: durations_of(config) is None and not fastconformer.streams(config),
    ),
    companions=Companions(
        pieces=lambda config, tokens: (config.vocab_size or 1) - 1,
        more=("<unk>", "<blank>"),
        marked=("<blank>", "<unk>"),
        tokenizer=fastconformer.tokenizer_words("<blank>"),
        processor=lambda config: fastconformer.processor_words("rnnt"),
        unread=("decoder.prediction.embed.weight", "decoder.embedding.weight"),
        generation=lambda config: {
            "decoder_start_token_id": config.blank_token_id,
            "pad_token_id": config.pad_token_id,
        },
    ),
)
