"""Files of ``torch.save``, of all generations: ``.pt``, ``.pth``, ``.bin``, ``.ckpt``."""

from anyckpt.formats.torch_file.contents import TorchContents
from anyckpt.formats.torch_file.format import FORMAT
from anyckpt.formats.torch_file.layout import shift_parts
from anyckpt.formats.torch_file.reader import read_torch
from anyckpt.formats.torch_file.writer import tensor_zip_parts, zip_parts
from anyckpt.storage.zip import ZipRecord

__all__ = ["FORMAT", "TorchContents", "ZipRecord", "read_torch", "shift_parts", "tensor_zip_parts", "zip_parts"]
