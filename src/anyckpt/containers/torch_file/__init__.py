"""Files of ``torch.save``, of all generations: ``.pt``, ``.pth``, ``.bin``, ``.ckpt``."""

from anyckpt.containers.torch_file.checksums import stored_checksums
from anyckpt.containers.torch_file.contents import TorchContents
from anyckpt.containers.torch_file.layout import shift_parts
from anyckpt.containers.torch_file.reader import read_torch, read_torch_files
from anyckpt.containers.torch_file.writer import tensor_zip_parts, zip_parts

__all__ = [
    "TorchContents",
    "read_torch",
    "read_torch_files",
    "shift_parts",
    "stored_checksums",
    "tensor_zip_parts",
    "zip_parts",
]
