"""Fields of the hub's configuration for models that hear: FastConformer encoders and what decodes them.

Megatron-Core has no such models, so that most words are transformers' (``parakeet``), where these say what NeMo's do.
What a model does not have is None, 0 or False.
"""

from __future__ import annotations

from anyckpt.config.possible import LARGEST, check_layers, check_sizes, impossible
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError

_MOST_HALVINGS = 16
_MOST_NUMBERS, _MOST_POSITIONS = 1 << 24, 1 << 16  # of tables that are computed, each a few hundred times what is known


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)  # ``ModelConfig`` has its own
class SpeechConfig:
    """What speech models have; ``num_layers`` and the other sizes are the encoder's, but for an encoder-decoder.

    Attributes:
        sampling_rate: samples in a second.
        window_length: samples of a window.
        hop_length: samples from one window to the next.
        fft_length: samples of a transform, of which a window is the middle.
        preemphasis: share of the sample before that is taken off each; None for none.
        audio_padding_value: what fills features behind the end of the shorter ones of a batch.
        subsampling_factor: features that become one step of the encoder: a power of two.
        subsampling_conv_channels: of the convolutions that do it.
        conv_kernel_size: steps that a layer's convolution sees.
        left_context: steps before its own that attention sees; None for all.
        lookaheads: steps behind it, one number for each way in which the model was trained, first the usual one; None
            for all.
        num_prompts: languages that a model can be told, of which one is joined to every step; None for none.
        prompts: names of languages with their numbers, of which several may have one.
        usual_prompt: the number that is taken where none is given.
        scale_input: what goes into the first layer is multiplied by the root of the width.
        activation_dropout: of the MLP's activations, during training.
        position_dropout: of the encodings of positions, during training.
        layer_dropout: share of layers that are left out, during training.
        prediction_hidden_size: width of the LSTM that predicts a transducer's next token, and of its joint network.
        prediction_num_layers: its layers.
        max_symbols_per_step: tokens that a transducer gives for one step at most.
        joint_dropout: of the joint network, during training; NeMo numbers its modules by whether there is any.
        durations: steps that a transducer may go on by after a token; None if it has no such head.
        blank_token_id: the token that means none.
        text_num_layers: layers of the decoder of text beside the encoder, which is as wide.
        text_ffn_hidden_size: width of its MLPs.
        text_num_attention_heads: heads of its attention, which share the width.
        text_max_positions: tokens that it has encodings of positions for.
        text_attention_dropout: of its attention, during training.
        first_token_id: the token that it begins with.
    """

    sampling_rate: int | None = None
    window_length: int | None = None
    hop_length: int | None = None
    fft_length: int | None = None
    preemphasis: float | None = None
    audio_padding_value: float = 0.0
    subsampling_factor: int | None = None
    subsampling_conv_channels: int | None = None
    conv_kernel_size: int | None = None
    left_context: int | None = None
    lookaheads: tuple[int, ...] | None = None
    num_prompts: int | None = None
    prompts: tuple[tuple[str, int], ...] = ()
    usual_prompt: int | None = None
    scale_input: bool = False
    activation_dropout: float = 0.0
    position_dropout: float = 0.0
    layer_dropout: float = 0.0
    prediction_hidden_size: int | None = None
    prediction_num_layers: int | None = None
    max_symbols_per_step: int | None = None
    joint_dropout: float = 0.0
    durations: tuple[int, ...] | None = None
    blank_token_id: int | None = None
    text_num_layers: int | None = None
    text_ffn_hidden_size: int | None = None
    text_num_attention_heads: int | None = None
    text_max_positions: int | None = None
    text_attention_dropout: float = 0.0
    first_token_id: int | None = None

    @property
    def halvings(self) -> int:
        """Convolutions that halve the steps."""
        return (self.subsampling_factor or 1).bit_length() - 1


_SIZES = tuple(
    """
    sampling_rate window_length hop_length fft_length subsampling_factor subsampling_conv_channels
    conv_kernel_size num_prompts prediction_hidden_size prediction_num_layers max_symbols_per_step text_num_layers
    text_ffn_hidden_size text_num_attention_heads text_max_positions
    """.split()
)


def check_speech(config: SpeechConfig, channels: int | None) -> None:
    """Check that a model of these sizes can exist.

    Args:
        config: of the model.
        channels: of the spectrogram that it hears; None if it hears nothing.

    Raises:
        MappingError: sizes that are not positive or absurd, or that do not go into one another.
    """
    if channels is None:
        return
    check_sizes(config, _SIZES)
    check_layers(config.prediction_num_layers or 0)
    check_layers(config.text_num_layers or 0)
    factor = config.subsampling_factor or 1
    if factor & (factor - 1) or config.halvings > _MOST_HALVINGS:
        raise impossible("subsampling_factor", "a power of two", factor)
    if channels % factor:
        raise MappingError(
            "the spectrogram's channels are not halved evenly, which transformers takes them to be",
            expected=f"num_mel_bins to be a multiple of {factor}",
            found=channels,
        )
    if config.window_length is not None and config.fft_length is not None and config.window_length > config.fft_length:
        raise impossible("window_length", f"at most fft_length {config.fft_length}", config.window_length)
    if channels * (config.fft_length or 1) > _MOST_NUMBERS:
        raise impossible(
            "fft_length", f"at most {_MOST_NUMBERS // channels} for {channels} channels", config.fft_length
        )
    if (config.text_max_positions or 0) > _MOST_POSITIONS:
        raise impossible("text_max_positions", f"at most {_MOST_POSITIONS}", config.text_max_positions)
    if config.lookaheads is not None:
        _check_contexts(config.left_context, config.lookaheads)
    count = config.num_prompts or 0
    far = next((number for _, number in config.prompts if not 0 <= number < count), None)
    if far is not None:
        raise impossible("prompts", f"numbers below {count}", far)
    if config.durations is not None and not all(0 <= steps < LARGEST for steps in config.durations):
        raise impossible("durations", "numbers of steps", config.durations)


def _check_contexts(left: int | None, lookaheads: tuple[int, ...]) -> None:
    """Check that steps before a chunk are whole chunks, as NeMo has it."""
    if left is None or not 0 <= left < LARGEST:
        raise impossible("left_context", "a number of steps", left)
    if not lookaheads or not all(0 <= steps < LARGEST for steps in lookaheads):
        raise impossible("lookaheads", "numbers of steps", lookaheads)
    odd = next((steps for steps in lookaheads if left % (steps + 1)), None)
    if odd is not None:
        raise impossible("left_context", f"a multiple of {odd + 1}, which a lookahead of {odd} needs", left)
