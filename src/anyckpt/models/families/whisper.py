"""Whisper: an encoder of log-mel spectrograms and a decoder of text, in transformers' names.

Of attention the key has no bias, so that query, key and value stay apart.  No framework of NVIDIA has such a model of
its own: NeMo's speech language models wrap transformers' encoder, which keeps its names there (NeMo 2.5, ``speechlm``),
and what Megatron-Bridge has is an example of one model.  OpenAI's names are the format ``whisper``'s.  Checked against
transformers 5.24.
"""

from __future__ import annotations

from anyckpt.config.codecs import Fixed, Implied, Written, same_as
from anyckpt.config.fields import Field
from anyckpt.config.spellings import HuggingFace
from anyckpt.models.families.parts import decoder
from anyckpt.models.families.parts.fields import TIED_AND_TOKENS, VOCABULARY
from anyckpt.models.families.parts.modules import norm
from anyckpt.models.language.family import Family
from anyckpt.models.language.rules import Rule

_WHOLE = "replicated@first"


def _attention(source: str, hub: str, axes: tuple[str, ...]) -> tuple[Rule, ...]:
    """Of which tensor parallelism would divide heads."""
    parts = {"q_proj.weight": "linear_q.weight", "q_proj.bias": "linear_q.bias", "k_proj.weight": "linear_k.weight",
             "v_proj.weight": "linear_v.weight", "v_proj.bias": "linear_v.bias"}  # fmt: skip
    return (
        *(
            Rule((f"{source}.{own}",), f"{hub}.{name}", ("attention", "hidden")[: 1 + own.endswith("weight")],
                 axes=axes, partition=None if name.startswith("linear_q.") else "column")
            for own, name in parts.items()
        ),
        Rule((f"{source}.out_proj.weight",), f"{hub}.linear_proj.weight", ("hidden", "attention"), axes=axes),
        Rule((f"{source}.out_proj.bias",), f"{hub}.linear_proj.bias", ("hidden",), axes=axes),
    )  # fmt: skip


def _norm(source: str, hub: str, axes: tuple[str, ...]) -> tuple[Rule, ...]:
    return tuple(Rule((f"{source}.{part}",), f"{hub}{part}", ("hidden",), axes=axes) for part in ("weight", "bias"))


def _stack(stack: str, axes: tuple[str, ...]) -> tuple[Rule, ...]:
    """The rules of a stack's layers.

    Args:
        stack: ``encoder`` or ``decoder``.
        axes: what counts its layers.
    """
    own, hub = f"model.{stack}.layers.*", f"{stack}.layers.*"
    across = (
        *_norm(f"{own}.encoder_attn_layer_norm", f"{hub}.pre_cross_attn_layernorm.", axes),
        *_attention(f"{own}.encoder_attn", f"{hub}.cross_attention", axes),
    )
    return (
        *_norm(f"{own}.self_attn_layer_norm", f"{hub}.input_layernorm.", axes),
        *_attention(f"{own}.self_attn", f"{hub}.self_attention", axes),
        *(across if stack == "decoder" else ()),
        *_norm(f"{own}.final_layer_norm", f"{hub}.mlp.linear_fc1.layer_norm_", axes),
        *(
            Rule((f"{own}.{source}.{part}",), f"{hub}.mlp.{name}.{part}", shape[: 1 + (part == "weight")], axes=axes)
            for source, name, shape in (
                ("fc1", "linear_fc1", ("fc1", "hidden")), ("fc2", "linear_fc2", ("hidden", "ffn")),
            )
            for part in ("weight", "bias")
        ),
        *norm(f"model.{stack}.layer_norm", f"{stack}.final_layernorm."),
    )  # fmt: skip


def _convolution(name: str, channels: str) -> tuple[Rule, Rule]:
    return (
        Rule((f"model.encoder.{name}.weight",), f"encoder.{name}.weight", ("hidden", channels, "kernel"),
             partition=_WHOLE),
        Rule((f"model.encoder.{name}.bias",), f"encoder.{name}.bias", ("hidden",), partition=_WHOLE),
    )  # fmt: skip


RULES = (
    Rule(("model.decoder.embed_tokens.weight",), "embedding.word_embeddings.weight", ("vocabulary", "hidden")),
    Rule(("model.decoder.embed_positions.weight",), "embedding.position_embeddings.weight", ("positions", "hidden")),
    *_convolution("conv1", "mels"),
    *_convolution("conv2", "hidden"),
    Rule(("model.encoder.embed_positions.weight",), "encoder.position_embeddings.weight",
         ("source-positions", "hidden"), partition=_WHOLE),
    *_stack("encoder", ("encoder",)),
    *_stack("decoder", ("layer",)),
    Rule(("proj_out.weight",), "output_layer.weight", ("vocabulary", "hidden"), when=decoder.untied),
)  # fmt: skip

FAMILY = Family(
    name="whisper",
    title="Whisper",
    rules=RULES,
    traits=decoder.LEARNED_TRAITS,
    recognise=lambda config: False,
    nemo1=False,
    megatron=False,
    axes={"encoder": lambda config: range(config.encoder_num_layers or 0)},
    dimensions={
        "mels": lambda config: config.num_mel_bins or 0,
        "kernel": lambda config: 3,
        "source-positions": lambda config: config.max_source_positions or 0,
    },
    hugging_face=HuggingFace(
        model_types=("whisper",),
        architectures=("WhisperForConditionalGeneration",),
        fields=(
            Field("encoder_num_layers", "encoder_layers"),
            Field("num_layers", "decoder_layers"),
            Field("hidden_size", "d_model"),
            Field("ffn_hidden_size", "encoder_ffn_dim"),
            Field("num_attention_heads", "encoder_attention_heads"),
            VOCABULARY,
            Field("max_position_embeddings", "max_target_positions"),
            Field("max_source_positions", "max_source_positions"),
            Field("num_mel_bins", "num_mel_bins"),
            Field("init_method_std", "init_std", "number", 0.02),
            Field("hidden_dropout", "dropout", "number", 0.0),
            Field("attention_dropout", "attention_dropout", "number", 0.0),
            *TIED_AND_TOKENS,
        ),
        activation_key="activation_function",
        attention_bias=None,
        constants={"is_encoder_decoder": True},
        codecs=(
            Implied({"layernorm_epsilon": 1e-5}, "Whisper has one epsilon"),
            Fixed({"decoder_ffn_dim": same_as("ffn_hidden_size")}, "the encoder's", "integer"),
            Fixed({"decoder_attention_heads": same_as("num_attention_heads")}, "the encoder's", "integer"),
            Fixed({"scale_embedding": False}, "what Whisper's models have"),
            Written({"num_hidden_layers": same_as("encoder_num_layers")}),
        ),
    ),
)
