"""Parakeet with a CTC head: NeMo's ``EncDecCTCModelBPE`` of a FastConformer, transformers' ``ParakeetForCTC``.

Megatron has no such models.  Configuration, names and files are those that transformers' converter of ``.nemo`` writes,
which takes every model for one of 1,024 tokens and of MLPs of 4,096; here they are what the model has.
"""

from __future__ import annotations

from anyckpt.config.codecs import Implied, Written, same_as
from anyckpt.config.fields import Field
from anyckpt.config.sections import Only, Section, Sum
from anyckpt.config.spellings import HuggingFace, NeMoSpeech
from anyckpt.models.families.parts import fastconformer
from anyckpt.models.families.parts.fastconformer import target
from anyckpt.models.families.parts.modules import linear
from anyckpt.models.language.family import Family
from anyckpt.models.speech.companions import Companions

RULES = (
    *fastconformer.encoder(),
    *linear("ctc_head", "decoder.decoder_layers.0", ("labels", "hidden", "one")),
)

_HEAD = Section(
    "decoder",
    (
        target("ConvASRDecoder"),
        Only("feat_in", lambda found: found["hidden_size"]),
        Sum("vocab_size", "num_classes", 1),
        Only("add_blank", True, written=False),
    ),
    idle=frozenset({"init_mode"}),
    constants={"vocabulary": []},
)

FAMILY = Family(
    name="parakeet-ctc",
    title="Parakeet CTC (FastConformer)",
    rules=fastconformer.undivided(RULES),
    ignorable=fastconformer.IGNORABLE,
    traits=fastconformer.TRAITS,
    recognise=lambda config: False,
    megatron=False,
    axes=fastconformer.AXES,
    dimensions=fastconformer.DIMENSIONS,
    prefixes={"nemo-flat": ""},
    hugging_face=HuggingFace(
        model_types=("parakeet_ctc",),
        architectures=("ParakeetForCTC",),
        fields=(
            Field("vocab_size", "vocab_size", default=1025),
            Field("pad_token_id", "pad_token_id", "tokens", 1024),
        ),
        codecs=(
            fastconformer.hugging_face(),
            fastconformer.EPSILON,
            Implied(fastconformer.AUDIO),
            Written({"initializer_range": same_as("init_method_std")}),
            Written({"ctc_loss_reduction": "mean", "ctc_zero_infinity": True}, kept=True),
        ),
        activation_key=None,
        attention_bias=None,
    ),
    nemo_speech=NeMoSpeech(
        "nemo.collections.asr.models.ctc_bpe_models.EncDecCTCModelBPE",
        (
            fastconformer.PREPROCESSOR,
            fastconformer.NEMO_ENCODER,
            _HEAD,
            Implied(
                {"pad_token_id": lambda found: (found["vocab_size"] or 1) - 1},
                "NeMo's last label is the blank, by which it pads",
            ),
        ),
    ),
    companions=Companions(
        pieces=lambda config, tokens: (config.vocab_size or 1) - 1,
        more=("<unk>", "<pad>"),
        marked=("<pad>", "<unk>"),
        tokenizer=fastconformer.tokenizer_words("<pad>"),
        processor=lambda config: fastconformer.processor_words("ctc"),
        generation=lambda config: {"pad_token_id": config.pad_token_id},
    ),
)
