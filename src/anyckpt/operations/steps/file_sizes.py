"""Whether an output's files are as small as was asked, counted as ``save_pretrained`` does: in bytes of tensors."""

from __future__ import annotations

from anyckpt.engine.plan import Plan, TensorData


def above_limit(plan: Plan, limit: int) -> list[str]:
    """What to say of files that hold more bytes of tensors than asked.

    Args:
        plan: of the output.
        limit: bytes of tensors in a file.
    """
    held = [[part for part in file.parts if isinstance(part, TensorData)] for file in plan.files]
    large = [file.nbytes for file, parts in zip(plan.files, held, strict=True) if _is_above(parts, limit)]
    alone = [parts[0] for parts in held if len(parts) == 1 and parts[0].nbytes > limit]
    notes = []
    if large:
        notes.append(
            f"--max-shard-size does not divide a {plan.format} checkpoint; its largest file has {max(large):,} bytes"
        )
    if alone:
        most = max(alone, key=lambda part: part.nbytes)
        count = f"{len(alone)} tensors are" if len(alone) > 1 else "1 tensor is"
        notes.append(
            f"{count} larger than the --max-shard-size of {limit:,} bytes, and alone in a file, such as {most.name} of "
            f"{most.nbytes:,} bytes"
        )
    return notes


def _is_above(parts: list[TensorData], limit: int) -> bool:
    return len(parts) > 1 and sum(part.nbytes for part in parts) > limit
