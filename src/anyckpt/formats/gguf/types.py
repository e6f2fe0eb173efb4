"""Element types of GGUF: numbers as they are, and blocks of codes with scales (ggml's ``ggml_type``)."""

from __future__ import annotations

from anyckpt.data_classes import dataclass


@dataclass(frozen=True)
class ElementType:
    """A type.

    Attributes:
        name: as llama.cpp calls it.
        number: in the file.
        block: elements that lie together.
        nbytes: bytes of a block.
        dtype: our name of it, of plain numbers; "" for blocks.
        file_type: number of the kind of file most of whose matrices are of it (``llama_ftype``); None if nothing here
            writes such.
    """

    name: str
    number: int
    block: int
    nbytes: int
    dtype: str = ""
    file_type: int | None = None


TYPES = {
    kind.name: kind
    for kind in (
        ElementType("F32", 0, 1, 4, "float32", 0),
        ElementType("F16", 1, 1, 2, "float16", 1),
        ElementType("Q4_0", 2, 32, 18, file_type=2),
        ElementType("Q4_1", 3, 32, 20, file_type=3),
        ElementType("Q5_0", 6, 32, 22, file_type=8),
        ElementType("Q5_1", 7, 32, 24, file_type=9),
        ElementType("Q8_0", 8, 32, 34, file_type=7),
        ElementType("Q2_K", 10, 256, 84),
        ElementType("Q3_K", 11, 256, 110),
        ElementType("Q4_K", 12, 256, 144),
        ElementType("Q5_K", 13, 256, 176),
        ElementType("Q6_K", 14, 256, 210),
        ElementType("IQ2_XXS", 16, 256, 66),
        ElementType("IQ2_XS", 17, 256, 74),
        ElementType("IQ3_XXS", 18, 256, 98),
        ElementType("IQ1_S", 19, 256, 50),
        ElementType("IQ4_NL", 20, 32, 18),
        ElementType("IQ3_S", 21, 256, 110),
        ElementType("IQ2_S", 22, 256, 82),
        ElementType("IQ4_XS", 23, 256, 136),
        ElementType("I8", 24, 1, 1, "int8"),
        ElementType("I16", 25, 1, 2, "int16"),
        ElementType("I32", 26, 1, 4, "int32"),
        ElementType("I64", 27, 1, 8, "int64"),
        ElementType("F64", 28, 1, 8, "float64"),
        ElementType("IQ1_M", 29, 256, 56),
        ElementType("BF16", 30, 1, 2, "bfloat16", 32),
        ElementType("TQ1_0", 34, 256, 54),
        ElementType("TQ2_0", 35, 256, 66),
        ElementType("MXFP4", 39, 32, 17),
    )
}
"""By name."""
BY_NUMBER = {kind.number: kind for kind in TYPES.values()}
OF_DTYPE = {kind.dtype: kind for kind in TYPES.values() if kind.dtype}
WRITTEN = tuple(name.lower() for name, kind in TYPES.items() if kind.file_type is not None)
"""What matrices can be written in, as a user says it."""
