"""Fields of the hub's configuration for models that are not decoders alone: BERT, T5, Whisper, vision transformers.

Names are Megatron-Core's, Megatron-LM's or NeMo's where they have one.  What a model does not have is None, 0 or False.
"""

from __future__ import annotations

from anyckpt.config.possible import LARGEST, check_layers, check_sizes, impossible
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)  # ``ModelConfig`` has its own
class EncoderConfig:
    """What encoders, encoder-decoders and vision transformers have.

    Attributes:
        encoder_num_layers: layers of the encoder of an encoder-decoder, whose ``num_layers`` are the decoder's; None
            for a model with one stack of layers.
        relative_attention_num_buckets: rows of the bias that attention gets for the distance of two tokens.
        relative_attention_max_distance: tokens at which the last of them begins.
        scale_decoder_outputs: transformers multiplies what the output layer gets by hidden_size ** -0.5.  Megatron
            does not, so there it is part of the last norm.
        transformer_block_type: ``pre_ln``, or ``post_ln`` where norms follow each residual connection.
        num_tokentypes: rows of the embedding of token types; 0 if there is none.
        add_pooler: a dense layer behind the first token's output.
        add_lm_head: a dense layer and a norm before the output layer, which has a bias.
        bert_binary_head: a classifier of two classes behind the pooler.
        vision_model_type: Megatron-Core's ``model_subtype``: ``clip`` or ``internvit``; None if the model sees nothing.
        patch_dim: pixels along a patch's side.
        img_h: pixels along an image's height.
        img_w: pixels along its width.
        class_token_len: tokens before those of the patches.
        add_post_layernorm: a norm behind the last layer, for the class token's output.  Megatron-Core's CLIPViTModel
            leaves it to the model around it.
        output_dim: width to which the pooled output is projected; None if it is not.
        num_classes: of a classifier behind the first token's output; None if there is none.
        num_mel_bins: of the spectrogram that an encoder of speech gets.
        max_source_positions: the most that an encoder of speech makes of it, half as many as it has frames.
    """

    encoder_num_layers: int | None = None
    relative_attention_num_buckets: int | None = None
    relative_attention_max_distance: int | None = None
    scale_decoder_outputs: bool = False
    transformer_block_type: str = "pre_ln"
    num_tokentypes: int = 0
    add_pooler: bool = False
    add_lm_head: bool = False
    bert_binary_head: bool = False
    vision_model_type: str | None = None
    patch_dim: int | None = None
    img_h: int | None = None
    img_w: int | None = None
    class_token_len: int | None = None
    add_post_layernorm: bool = False
    output_dim: int | None = None
    num_classes: int | None = None
    num_mel_bins: int | None = None
    max_source_positions: int | None = None

    @property
    def patches(self) -> int:
        """Tokens of an image: its patches and the class tokens."""
        side = self.patch_dim or 1
        return (self.img_h or 0) // side * ((self.img_w or 0) // side) + (self.class_token_len or 0)


_SIZES = tuple(
    """
    encoder_num_layers relative_attention_num_buckets relative_attention_max_distance patch_dim img_h img_w
    class_token_len output_dim num_classes num_mel_bins max_source_positions
    """.split()
)


def check_encoders(config: EncoderConfig) -> None:
    """Check that a model of these sizes can exist.

    Raises:
        MappingError: sizes that are not positive or absurd, images that patches do not cover, or an unknown type.
    """
    check_sizes(config, _SIZES)
    check_layers(config.encoder_num_layers or 0)
    if not 0 <= config.num_tokentypes < LARGEST:
        raise impossible("num_tokentypes", "0 or more", config.num_tokentypes)
    for name in ("img_h", "img_w"):
        pixels = getattr(config, name)
        if pixels is not None and config.patch_dim is not None and pixels % config.patch_dim:
            raise MappingError(
                f"the configuration's {name} is not covered by patches",
                expected=f"a multiple of {config.patch_dim}",
                found=pixels,
            )
