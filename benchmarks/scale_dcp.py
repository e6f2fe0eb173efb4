"""Open and plan a simulated distributed checkpoint of 2,000 files and 1,000,000 chunks.

    python benchmarks/scale_dcp.py                      # both kinds of index
    python benchmarks/scale_dcp.py --chunks 100000      # smaller

The files are sparse and hold no archives at all, so any read of a chunk while opening or planning would fail.
The index is what torch's pickler makes of its classes, here stand-ins of the same names, once as DCP writes it and
once with the cached plans that Megatron-Core adds.
"""

from __future__ import annotations

import argparse
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

_ROWS, _COLUMNS = 64, 4096
_LAYERS, _FRAGMENTS = 125, 200
_ITEM = _ROWS * _COLUMNS * 2 + 1600


def _stand_ins() -> types.SimpleNamespace:
    """Classes with the names of torch's; pickled, nothing tells them from the real ones."""
    made = types.SimpleNamespace()

    def module(name: str) -> types.ModuleType:
        return sys.modules.setdefault(name, types.ModuleType(name))

    def add(module_name: str, name: str, **methods: Any) -> None:
        cls = type(name, (), {"__module__": module_name, **methods})
        setattr(module(module_name), name, cls)
        setattr(made, name, cls)

    def fill(self: Any, **fields: Any) -> None:
        self.__dict__.update(fields)

    base = "torch.distributed.checkpoint"
    for name in ("ChunkStorageMetadata", "MetadataIndex", "TensorStorageMetadata", "StorageMeta", "Metadata"):
        add(f"{base}.metadata", name, __init__=fill)
    add(f"{base}.metadata", "TensorProperties", __init__=fill, __getstate__=lambda self: self.state)
    add(f"{base}.filesystem", "_StorageInfo", __init__=fill)
    for name in ("SavePlan", "WriteItem", "TensorWriteData"):
        add(f"{base}.planner", name, __init__=fill)
    add("torch", "Size", __init__=fill, __reduce__=lambda self: (made.Size, (self.numbers,)))
    dtype = type("dtype", (), {"__module__": "torch", "__reduce__": lambda self: "bfloat16"})()
    sys.modules["torch"].bfloat16 = dtype  # type: ignore[attr-defined]
    made.bfloat16 = dtype
    return made


def generate(folder: Path, files: int, chunks: int, plans: bool) -> None:
    """Write the index and the sparse files."""
    made = _stand_ins()
    per_tensor = _LAYERS * _FRAGMENTS
    tensors: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    ends = [0] * files
    items: list[Any] = []
    for number in range(-(-chunks // per_tensor)):
        name = f"decoder.layers.self_attention.linear_{number}.weight"
        pieces = []
        for position in range(per_tensor):
            layer, fragment = divmod(position, _FRAGMENTS)
            offsets = (layer, fragment * _ROWS, 0)

            def size(*numbers: int) -> Any:
                return made.Size(numbers=numbers)

            pieces.append(made.ChunkStorageMetadata(offsets=size(*offsets), sizes=size(1, _ROWS, _COLUMNS)))
            file = (number * per_tensor + position) % files
            place = made._StorageInfo(relative_path=f"__{file}_0.distcp", offset=ends[file], length=_ITEM)
            ends[file] += _ITEM
            storage[made.MetadataIndex(fqn=name, offset=size(*offsets), index=None)] = place
            if plans:
                data = made.TensorWriteData(
                    chunk=made.ChunkStorageMetadata(offsets=size(*offsets), sizes=size(1, _ROWS, _COLUMNS)),
                    properties=made.TensorProperties(state=(made.bfloat16, None, False, None, False)),
                    size=size(_LAYERS, _FRAGMENTS * _ROWS, _COLUMNS),
                )
                index = made.MetadataIndex(fqn=name, offset=size(*offsets), index=None)
                items.append(made.WriteItem(index=index, type=None, bytes_io_data=None, tensor_data=data))
        properties = made.TensorProperties(state=(made.bfloat16, None, False, None, False))
        whole = made.Size(numbers=(_LAYERS, _FRAGMENTS * _ROWS, _COLUMNS))
        tensors[name] = made.TensorStorageMetadata(properties=properties, size=whole, chunks=pieces)
    root = made.Metadata(
        state_dict_metadata=tensors, planner_data=None, storage_data=storage, storage_meta=None, version="1.0.0"
    )
    if plans:
        root.all_local_plans = [made.SavePlan(items=items, storage_data=None, planner_data={}, usable=True)]
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(root, file, protocol=4)
    for number, end in enumerate(ends):
        with (folder / f"__{number}_0.distcp").open("wb") as file:
            file.truncate(end)


def measure(folder: Path) -> None:
    """Open and plan in this process; print the figures as JSON."""
    import anyckpt.formats.dcp as dcp
    from anyckpt.formats.format import WriteOptions
    from anyckpt.formats.megatron_core.writer import plan
    from anyckpt.formats.registry import look_at

    start = time.perf_counter()
    checkpoint = dcp.FORMAT.read(look_at(folder))
    opened = time.perf_counter()
    open_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    planned = plan(checkpoint, WriteOptions())
    end = time.perf_counter()
    print(
        json.dumps(
            {
                "chunks": sum(checkpoint.details["chunks"].values()),
                "files": checkpoint.details["files"],
                "bytes": planned.nbytes,
                "output_files": len(planned.files),
                "open_seconds": round(opened - start, 2),
                "plan_seconds": round(end - opened, 2),
                "open_peak_rss_mb": round(open_memory / 1e6),
                "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--generate", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plans", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.generate:
        generate(options.generate, options.files, options.chunks, options.plans)
        return
    if options.measure:
        measure(options.measure)
        return
    me = [sys.executable, __file__, "--files", str(options.files), "--chunks", str(options.chunks)]
    for plans in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*me, "--generate", folder, *(["--plans"] if plans else [])], check=True)
            result = subprocess.run([*me, "--measure", folder], check=True, capture_output=True, text=True)
            figures = {"cached_plans": plans, "metadata_bytes": (Path(folder) / ".metadata").stat().st_size}
            print(json.dumps({**figures, **json.loads(result.stdout)}), flush=True)


if __name__ == "__main__":
    main()
