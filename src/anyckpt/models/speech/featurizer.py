"""What NeMo stores of how it makes features of sound: windows and the bank of mel filters, by their definitions.

NeMo's ``FilterbankFeatures`` takes them from torch (``hann_window``, not periodic) and librosa (``filters.mel``, of
Slaney's scale and norm), and keeps them as buffers; transformers' feature extractor computes them each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from anyckpt.config.model import ModelConfig
from anyckpt.dtypes import dtype, from_numpy
from anyckpt.errors import MappingError
from anyckpt.indexing import Array
from anyckpt.storage.source import MemorySource
from anyckpt.tensor import LazyTensor, Stored

WINDOW, FILTERS = "preprocessor.featurizer.window", "preprocessor.featurizer.fb"
"""NeMo's names of them."""

_LINEAR_STEP = 200.0 / 3  # Hz of a mel below the first of the logarithmic ones
_FIRST_LOGARITHMIC = 1000.0  # Hz
_ROUNDING = 1e-5
_ROUNDING_OF_SHORT = 1e-2


def buffers(config: ModelConfig) -> dict[str, LazyTensor]:
    """Both, by NeMo's names."""
    return {WINDOW: computed(window(config)), FILTERS: computed(filterbank(config))}


def computed(array: Array) -> LazyTensor:
    """A tensor of numbers that follow from a configuration, and so are the same whenever a plan is made."""
    return Stored(MemorySource(array.tobytes()), 0, from_numpy(array.dtype), tuple(array.shape))


def check_buffers(made: Mapping[str, LazyTensor], stored: Mapping[str, LazyTensor], path: str) -> None:
    """Check that what is stored is what transformers computes in its place.

    Args:
        made: what that is, by NeMo's names.
        stored: its tensors, of which few numbers are read.
        path: of the checkpoint, for the message.

    Raises:
        MappingError: it is something else.
    """
    for name, other in made.items():
        found = stored.get(name)
        if found is None:
            continue
        wanted = other.numpy()
        numbers = found.cast(dtype("float32")).numpy() if found.shape == wanted.shape else None
        short = _ROUNDING_OF_SHORT if found.dtype.itemsize < 4 else _ROUNDING
        if numbers is None or not np.allclose(numbers, wanted, rtol=short, atol=short * float(wanted.max(initial=0.0))):
            raise MappingError(
                "is not what transformers computes in its place",
                path=path,
                tensor=name,
                expected=f"what follows from the configuration, of shape {wanted.shape}",
                found=f"shape {found.shape}" if numbers is None else "other numbers",
                remedy="convert to safetensors, torch or dcp, which keep names",
            )


def window(config: ModelConfig) -> Array:
    """Hann's window: float32 of shape (window_length,)."""
    length = config.window_length or 1
    angle = np.arange(length, dtype=np.float32) * np.float32(2 * np.pi / max(1, length - 1))
    cosine = np.cos(angle.astype(np.float64)).astype(np.float32)  # torch's may be another in the last place
    return np.asarray(np.float32(0.5) - np.float32(0.5) * cosine, np.float32)


def filterbank(config: ModelConfig) -> Array:
    """Triangular filters from 0 to half the sampling rate: float32 of shape (1, num_mel_bins, fft_length // 2 + 1)."""
    mels, rate, length = config.num_mel_bins or 0, config.sampling_rate or 0, config.fft_length or 0
    edges = _hertz(np.linspace(0.0, _mel(rate / 2), mels + 2))
    ramps = np.subtract.outer(edges, np.fft.rfftfreq(length, 1.0 / rate))
    widths = np.diff(edges)
    bank = np.zeros((mels, length // 2 + 1), np.float32)
    for channel in range(mels):
        rising, falling = -ramps[channel] / widths[channel], ramps[channel + 2] / widths[channel + 1]
        bank[channel] = np.maximum(0, np.minimum(rising, falling))
    bank *= (2.0 / (edges[2:] - edges[:-2]))[:, np.newaxis]
    return bank[np.newaxis]


@cache
def _logarithmic_step() -> float:
    """In 27 of them the frequency becomes 6.4 times as high."""
    step: float = np.log(6.4) / 27.0
    return step


def _mel(hertz: float) -> float:
    if hertz < _FIRST_LOGARITHMIC:
        return hertz / _LINEAR_STEP
    return float(_FIRST_LOGARITHMIC / _LINEAR_STEP + np.log(hertz / _FIRST_LOGARITHMIC) / _logarithmic_step())


def _hertz(mels: Array) -> Array:
    first = _FIRST_LOGARITHMIC / _LINEAR_STEP
    logarithmic = _FIRST_LOGARITHMIC * np.exp(_logarithmic_step() * (mels - first))
    return np.where(mels >= first, logarithmic, _LINEAR_STEP * mels)
