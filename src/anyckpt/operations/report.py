"""A page about a checkpoint, in one file that a browser opens and that asks for nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError
from anyckpt.formats import registry
from anyckpt.markup import text
from anyckpt.operations.diff import diff
from anyckpt.operations.difference import Difference
from anyckpt.operations.explorer import changes, depth, sections
from anyckpt.operations.explorer.drawing import Drawings, Picture
from anyckpt.operations.explorer.page import Section, page
from anyckpt.operations.explorer.rows import row_of, stacks_of
from anyckpt.operations.inspect import inspect
from anyckpt.operations.inspection import Inspection
from anyckpt.operations.steps.joining import join_ranks
from anyckpt.operations.steps.text_file import check_text_file, write_text
from anyckpt.operations.steps.threads import Progress
from anyckpt.storage.location import file_of, name_below, public_path, root_of
from anyckpt.storage.place import scheme_of

_FRAME = 'style="width:100%;height:48rem;border:1px solid #8888;border-radius:8px"'


@dataclass(frozen=True)
class Report:
    """A page that was written.

    Attributes:
        output: its path.
        bytes: its size.
        tensors: how many it is about.
        sections: its parts.
        warnings: those of the checkpoint, which the page shows, too.
    """

    output: str
    bytes: int
    tensors: int
    sections: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As ``report --json`` prints it."""
        return {**asdict(self), "sections": list(self.sections), "warnings": list(self.warnings)}

    def _repr_html_(self) -> str:
        """The page itself, in a frame of its own that can reach nothing of the notebook's."""
        with open(self.output, encoding="utf-8") as file:
            page = escape(file.read())
        return f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="{text(self.output)}" {_FRAME}></iframe>'


def report(
    source: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    *,
    stats: bool = False,
    against: str | os.PathLike[str] | Checkpoint | None = None,
    tensors: str | Sequence[str] | None = None,
    names: str = "stored",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write a page about a checkpoint: what it is, what it holds, and where that lies.

    The page appears whole or not at all.  No tensor data is read unless ``stats`` or ``against`` ask for it.

    Args:
        source: a path, or a checkpoint that is open.
        output: the page, ``.html``.
        stats: read the tensors, and show their statistics, magnitudes and outliers over depth.
        against: another checkpoint of the same model, to show how far each tensor is from it.
        tensors: glob or globs of tensors that the page is about; all of them if None.  ``against`` compares those of
            these hub names, and all where names are as stored, since two checkpoints may store others.
        names: ``stored``, or ``hub`` for Megatron-Core names with shards joined and layers un-stacked.
        overwrite: replace a file that is there.
        progress: called with (bytes done, bytes to do) while tensors are read.

    Raises:
        FormatError: the checkpoint is damaged, or none.
        MappingError: hub names are asked for and the model is incomplete.
        MissingLibraryError: the extra ``report`` is not installed.
        OutputError: the file exists, or cannot be written.
        UsageError: as of ``inspect`` and ``diff``, or the page would be written over a source.
    """
    path = os.fspath(output)
    if not path.lower().endswith((".html", ".htm")):
        raise UsageError("a page is written as HTML", path=path, expected="a name that ends in .html")
    read = [
        one.path if isinstance(one, Checkpoint) else public_path(one) for one in (source, against) if one is not None
    ]
    check_text_file(path, [file_of(one) for one in read], overwrite=overwrite)
    drawings = Drawings()
    checkpoint = source if isinstance(source, Checkpoint) else registry.read(source)
    listed = "*" if tensors is None else tensors
    found = inspect(checkpoint, tensors=listed, stats=stats, magnitudes=stats, names=names, progress=progress)
    moved = None
    if against is not None:
        globs = None if names == "stored" else tensors  # of hub names, by which the two meet
        whole = join_ranks(checkpoint) if checkpoint.ranks else checkpoint
        moved = diff(whole, against, tensors=globs, statistics=True, progress=progress)
    other = "" if against is None else against.path if isinstance(against, Checkpoint) else public_path(against)
    parts, html = _page(checkpoint, found, moved, other, drawings, stats)
    write_text(path, html, overwrite=overwrite)
    return Report(
        path,
        os.path.getsize(path),
        len(found.tensors or ()),
        tuple(part.ident for part in parts),
        tuple(found.warnings),
    )


def _page(
    checkpoint: Checkpoint, found: Inspection, moved: Difference | None, other: str, drawings: Drawings, stats: bool
) -> tuple[list[Section], str]:
    rows = [row_of(one) for one in found.tensors or ()]
    stacks, told = stacks_of(rows)
    made: list[tuple[Section, list[Picture]]] = [
        (sections.overview(found, stacks), []),
        (sections.modules(rows, told), []),
        depth.layers(stacks, drawings),
        depth.places(rows, told, stacks, _ranks(checkpoint), drawings),
        (sections.types(found), []),
    ]
    if stats:
        made.append(depth.statistics(rows, stacks, drawings))
    if moved is not None:
        made.append(changes.changes(moved, other, drawings))
    made += [(sections.tensors_table(rows, told), []), (sections.configuration(found), [])]
    parts = [part for part, _ in made if part.html]
    pictures = [picture.drawing for _, several in made for picture in several]
    title = _name(found.path)
    lead = f'<p class="lead">{text(found.path)}{text(f", against {other}") if moved is not None else ""}</p>'
    return parts, page(title, lead, parts, pictures, drawings.library())


def _name(path: str) -> str:
    return os.path.basename(os.path.normpath(path)) or path


def _ranks(checkpoint: Checkpoint) -> dict[str, str]:
    """File -> which ranks it is of, as the inspection calls the file."""
    told: dict[str, list[str]] = {}
    root = root_of(checkpoint.path)
    for shard in checkpoint.ranks:
        layout = checkpoint.layout
        places = (
            ("tensor", shard.tensor_rank, layout.tensor_parallel),
            ("stage", shard.pipeline_rank, layout.pipeline_parallel),
            ("chunk", shard.virtual_rank, layout.virtual_pipeline),
            ("expert", shard.expert_rank, layout.expert_parallel),
        )
        file = name_below(root, shard.source if scheme_of(shard.source) else os.path.abspath(shard.source))
        name = ", ".join(f"{word} {rank}" for word, rank, size in places if size > 1)
        told.setdefault(file, []).append(name)
    return {file: "; ".join(dict.fromkeys(filter(None, names))) for file, names in told.items()}
