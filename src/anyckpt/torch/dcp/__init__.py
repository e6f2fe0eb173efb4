"""Storage for ``torch.distributed.checkpoint``: what its functions write with and read from.

>>> dcp.save(state, storage_writer=anyckpt.torch.dcp.Writer("run/step_100"))                # doctest: +SKIP
>>> dcp.load(state, storage_reader=anyckpt.torch.dcp.Reader("run/step_100"))                # doctest: +SKIP
"""

from anyckpt.torch.dcp.reader import Reader
from anyckpt.torch.dcp.writer import Writer

__all__ = ["Reader", "Writer"]
