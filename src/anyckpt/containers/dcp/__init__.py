"""PyTorch's distributed container: ``.distcp`` files of tensors and objects, and the ``.metadata`` that finds them."""

from anyckpt.containers.dcp.reader import METADATA, DcpContents, read_dcp
from anyckpt.containers.dcp.writer import dcp_files

__all__ = ["METADATA", "DcpContents", "dcp_files", "read_dcp"]
