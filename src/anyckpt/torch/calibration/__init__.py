"""Calibration: a model runs over texts, one decoder layer at a time, and what goes into its linear modules is noted.

Needs transformers besides torch (``pip install anyckpt[quantize]``).  The model is transformers' own, made without
memory for its weights; a layer gets its weights, from whatever checkpoint they are in, when all batches stand before
it, and gives them back when they have passed.  So no more is in memory than a layer and the hidden states.
"""

from __future__ import annotations

from anyckpt.errors import MissingLibraryError

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "transformers":
        raise
    raise MissingLibraryError(
        "calibration needs transformers, which is not installed", remedy="pip install 'anyckpt[quantize]'"
    ) from error

from anyckpt.torch.calibration.run import calibrate
from anyckpt.torch.calibration.texts import token_ids

__all__ = ["calibrate", "token_ids"]
