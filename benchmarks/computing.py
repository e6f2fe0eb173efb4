"""CPU seconds and page faults per gigabyte of what computes: casts, means, products, quantizing, comparisons, counts.

    OPENBLAS_NUM_THREADS=1 python benchmarks/computing.py

Arrays lie in memory and results are thrown away, in one thread, so that no disk and no other process is in the figures:
CPU seconds of this process (user and system), which stay the same on a busy machine, and minor page faults, which show
memory that is taken and given back for each block.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np

from anyckpt.blockwise import Tiles, keeping
from anyckpt.dtypes import dtype
from anyckpt.models.adapters.low_rank import LowRankSum
from anyckpt.operations.steps.compare import compare
from anyckpt.operations.steps.movement import Sums
from anyckpt.operations.steps.statistics import counts, scan
from anyckpt.operations.steps.tolerances import Tolerance
from anyckpt.operations.steps.weighted_mean import Mean
from anyckpt.quantization.nodes import Halved, product, scaled
from anyckpt.quantization.numbers import e2m1, values_of
from anyckpt.quantization.quantizing import ALGORITHMS, quantized
from anyckpt.tensor import LazyTensor, Stored, from_array

ELEMENTS = 32 << 20
COLUMNS = 4096
BLOCK_BYTES = 4 << 20


def drained(tensor: LazyTensor) -> None:
    """Read a tensor as the engine does, block by block into the same memory."""
    step = BLOCK_BYTES // tensor.dtype.itemsize
    buffer = np.empty(step, tensor.dtype.raw)
    for start in range(0, tensor.size, step):
        tensor.read_flat(start, buffer[: min(step, tensor.size - start)])


def quantized_and_drained(weight: LazyTensor, algorithm: str) -> None:
    """Quantize a weight as the engine does, codes first and then the scales that came with them."""
    with keeping(Tiles(BLOCK_BYTES * 16)):
        for tensor in quantized(weight, algorithm).values():
            drained(tensor)


def measured(name: str, work: Callable[[], object], nbytes: int) -> None:
    """Print what one run costs after one that is not counted."""
    work()
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    faults = after.ru_minflt - before.ru_minflt
    print(f"| {name} | {seconds / (nbytes / 1e9):.2f} | {faults / (nbytes / 1e9) / 1000:.1f} |", flush=True)


def how_far(a: LazyTensor, b: LazyTensor) -> None:
    compare(a, b, Tolerance(), sums=Sums())


def main() -> None:
    random = np.random.default_rng(0)
    numbers = random.standard_normal(ELEMENTS).astype(np.float32).reshape(-1, COLUMNS)
    full = from_array(numbers)
    half, second, third = (from_array((numbers * by).astype(ml_dtypes.bfloat16)) for by in (1.0, 1.01, 0.99))
    rows = half.shape[0]
    bytes_ = random.integers(0, 255, (rows // 2, COLUMNS), dtype=np.uint8)
    packed = from_array(bytes_)
    e4m3, to = dtype("float8_e4m3fn"), dtype("bfloat16")
    codes = Stored(packed.source, 0, e4m3, packed.shape)
    blocks = from_array(random.random((rows // 2 // 128, COLUMNS // 128), dtype=np.float32))
    exponents = from_array(random.integers(100, 140, (rows // 2, 2 * COLUMNS // 32), dtype=np.uint8))
    small = from_array(random.integers(40, 100, (rows // 2, 2 * COLUMNS // 16), dtype=np.uint8))
    scales = product(Stored(small.source, 0, e4m3, small.shape), from_array(np.ones(1, np.float32)))
    fours = Halved(packed, 1)
    up = from_array(random.random((rows, 16), dtype=np.float32))
    down = from_array(random.random((16, COLUMNS), dtype=np.float32))
    fp8 = scaled(codes, values_of(e4m3), blocks, (128, 128), to)
    mxfp4, nvfp4 = scaled(fours, e2m1(), exponents, (1, 32), to), scaled(fours, e2m1(), scales, (1, 16), to)
    print("| work | CPU s per GB | thousand page faults per GB |\n|---|---|---|")
    measured("fp32 → bf16, of input", lambda: drained(full.cast(to)), full.nbytes)
    measured("bf16 → fp32, of input", lambda: drained(half.cast("float32")), half.nbytes)
    measured("mean of three, bf16, of output", lambda: drained(Mean((half, second, third), (1.0,) * 3)), half.nbytes)
    measured("fp8 in blocks of 128 by 128 → bf16, of output", lambda: drained(fp8), fp8.nbytes)
    measured("MXFP4 → bf16, of output", lambda: drained(mxfp4), mxfp4.nbytes)
    measured("NVFP4 → bf16, of output", lambda: drained(nvfp4), nvfp4.nbytes)
    for algorithm in ALGORITHMS:
        measured(f"bf16 → {algorithm}, of input", partial(quantized_and_drained, half, algorithm), half.nbytes)
    measured("bf16 with LoRA of rank 16", lambda: drained(LowRankSum(half, up, down, 2.0)), half.nbytes)
    measured("compare, equal, bf16, of one", lambda: compare(half, half, Tolerance()), half.nbytes)
    measured("compare, all different, bf16, of one", lambda: compare(half, second, Tolerance()), half.nbytes)
    measured("compare and tell how far, bf16, of one", partial(how_far, half, second), half.nbytes)
    measured("statistics, bf16", lambda: scan(half, statistics=True, digest=False), half.nbytes)
    measured("what verify --deep counts, bf16", lambda: counts(half), half.nbytes)
    measured("SHA-256", lambda: scan(half, statistics=False, digest=True), half.nbytes)


if __name__ == "__main__":
    main()
