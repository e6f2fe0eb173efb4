"""Checking a checkpoint for damage, and for what it would do to whoever loads it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from anyckpt import models, quantization
from anyckpt.checkpoint import Checkpoint, StoredChecksum
from anyckpt.engine.checksum import crc32
from anyckpt.engine.manifest import check_manifest, manifest_path, read_manifest
from anyckpt.errors import AnyckptError, MappingError
from anyckpt.formats import registry
from anyckpt.models import Model, adapters
from anyckpt.models.complete import some
from anyckpt.models.heads import has_other_head, trunk_of
from anyckpt.operations.steps.full_precision import in_full_precision
from anyckpt.operations.steps.impossible_numbers import check_values
from anyckpt.operations.steps.joining import join_ranks
from anyckpt.operations.steps.loader_calls import asked_of_loaders
from anyckpt.operations.steps.naming import identify
from anyckpt.operations.steps.threads import Advance, Meter, Progress
from anyckpt.pickling import Callee, recording
from anyckpt.pickling.calls import danger
from anyckpt.storage.requests import holding, in_batches
from anyckpt.storage.source import ByteSource

_BLOCK = 4 << 20


@dataclass(frozen=True)
class Problem:
    """Something wrong.

    Attributes:
        where: a file or a tensor.
        problem: what is wrong, in one line.
    """

    where: str
    problem: str


@dataclass
class Checked:
    """How much was looked at.

    Attributes:
        tensors: tensors whose pieces were found inside their files.
        pieces: stored pieces of these.
        digests: runs of bytes that agree with the manifest.
        checksums: CRCs of the container that agree with its bytes.
        model: whether layers and weights were found complete for the model family.
        text: whether these of the text part of a larger model were, of which no more is known.
        scales: of quantized weights and activations, whose numbers were read and looked at.
        values: tensors whose elements were read and looked at.
        pickles: pickles that were looked at for what they call, those within pickles included.
    """

    tensors: int = 0
    pieces: int = 0
    digests: int = 0
    checksums: int = 0
    model: bool = False
    text: bool = False
    scales: int = 0
    values: int = 0
    pickles: int = 0


@dataclass
class Verification:
    """The outcome; true if the checkpoint is sound.

    Attributes:
        path: what was checked.
        format: its format.
        problems: what is wrong; none if the checkpoint is sound.
        warnings: what is odd and may be right.
        checked: how much was looked at.
        unchecked: what was not looked at, and why, one line each.
        calls: names that the pickles in it ask for, those that run code first.
    """

    path: str
    format: str
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    checked: Checked = field(default_factory=Checked)
    unchecked: list[str] = field(default_factory=list)
    calls: tuple[Callee, ...] = ()

    @property
    def sound(self) -> bool:
        return not self.problems

    @property
    def safe(self) -> bool:
        """Whether no pickle names what runs code when other software loads it."""
        return not any(callee.kind == "code" for callee in self.calls)

    def __bool__(self) -> bool:
        return self.sound

    def to_json(self) -> dict[str, Any]:
        """As ``verify --json`` prints it."""
        return {
            "path": self.path,
            "format": self.format,
            "sound": self.sound,
            "safe": self.safe,
            "problems": [asdict(problem) for problem in self.problems],
            "warnings": self.warnings,
            "checked": asdict(self.checked),
            "unchecked": self.unchecked,
            "calls": [callee.to_json() for callee in self.calls],
        }

    def _repr_html_(self) -> str:
        from anyckpt.operations.explorer.notebook import of_verification

        return of_verification(self)


def verify(
    source: str | os.PathLike[str] | Checkpoint, *, deep: bool = False, progress: Progress | None = None
) -> Verification:
    """Check structure, byte ranges, the manifest's digests, the container's CRCs and the model's completeness.

    The manifest answers for every byte that anyckpt wrote, so CRCs are read only where there is no manifest, or where
    it found damage.

    Args:
        source: a path, or a checkpoint that is open.
        deep: also read every tensor (see ``check_values``).
        progress: called with (bytes done, bytes to do) of each pass over the data.

    Raises:
        FormatError: it cannot be opened at all.
    """
    checkpoint = source if isinstance(source, Checkpoint) else registry.read(source)
    result = Verification(checkpoint.path, checkpoint.format, warnings=list(checkpoint.warnings))
    result.problems += [Problem(checkpoint.path, text) for text in checkpoint.unloadable]
    result.warnings = [text for text in result.warnings if text not in checkpoint.unloadable]
    _check_pieces(checkpoint, result)
    if not _check_digests(checkpoint, result, progress):
        _check_checksums(checkpoint, result, progress)
    _check_model(checkpoint, result)
    _check_names(checkpoint, result)
    if deep:
        values = check_values(checkpoint, progress)
        result.checked.values = values.read
        result.problems += [Problem(name, problem) for name, problem in values.problems]
        result.warnings += values.warnings
        if values.unread:
            result.unchecked.append(f"the numbers of {len(values.unread):,} packed tensors: {some(values.unread)}")
    _check_calls(checkpoint, result)
    return result


def _check_calls(checkpoint: Checkpoint, result: Verification) -> None:
    """What loading it with other software would call; last, as other checks read pickles too."""
    calls = asked_of_loaders(checkpoint, states=True)
    code = calls.of_kind("code")
    result.warnings = [text for text in calls.told_with(result.warnings) if text not in calls.warnings()]
    if code:
        where = some(list(dict.fromkeys(file for callee in code for file in callee.files)))
        result.problems.append(Problem(where or checkpoint.path, danger(code)))
    result.warnings += calls.warnings()[1 if code else 0 :]
    result.unchecked += [f"what {name} calls: {why}" for name, why in calls.unread.items()]
    result.checked.pickles = calls.pickles
    result.calls = tuple(calls)


def _check_pieces(checkpoint: Checkpoint, result: Verification) -> None:
    for name, tensor in checkpoint.tensors.items():
        try:
            for piece in tensor.pieces():
                piece.check()
                result.checked.pieces += 1
        except AnyckptError as error:
            result.problems.append(Problem(name, str(error)))
        else:
            result.checked.tensors += 1


def _check_digests(checkpoint: Checkpoint, result: Verification, progress: Progress | None) -> bool:
    """Whether there is a manifest and every byte agrees with it."""
    path, place = checkpoint.path, checkpoint.place
    try:
        manifest = read_manifest(path, place)
    except AnyckptError as error:
        result.problems.append(Problem("manifest", str(error)))
        return False
    if manifest is None:
        return False
    total = sum(entry.nbytes for entry in manifest.entries)
    done = 0
    good = True
    for entry, problem in check_manifest(path, manifest, place):
        if problem:
            where = entry.name or entry.file if entry is not None else "manifest"
            if entry is None:
                problem += f"; if it was replaced on purpose, delete {manifest_path(path, place)}"
            result.problems.append(Problem(where or os.path.basename(path), problem))
            good = False
        else:
            result.checked.digests += 1
        if entry is not None and progress is not None:
            done += entry.nbytes
            progress(done, total)
    return good


def _check_checksums(checkpoint: Checkpoint, result: Verification, progress: Progress | None) -> None:
    meter = Meter(sum(tensor.nbytes for tensor in checkpoint.tensors.values()), progress)
    with recording() as met:
        try:
            for batch in in_batches(checkpoint.checksums(), lambda item: (item.source, 0, item.source.size)):
                with holding((item.source, 0, item.source.size) for item in batch if len(batch) > 1):
                    for item in batch:
                        _check_checksum(item, result, meter)
        except AnyckptError as error:
            result.problems.append(Problem(checkpoint.path, f"{error}; checksums after it were not checked"))
    checkpoint.calls.take(met)


def _check_checksum(item: StoredChecksum, result: Verification, meter: Meter) -> None:
    found = _crc32(item.source, meter.advance)
    if found == item.crc32:
        result.checked.checksums += 1
    else:
        problem = f"the CRC-32 does not fit the bytes (expected {item.crc32:08x}, found {found:08x})"
        result.problems.append(Problem(item.name, problem))


def _crc32(source: ByteSource, advance: Advance) -> int:
    buffer = memoryview(bytearray(min(_BLOCK, source.size)))
    found = 0
    for start in range(0, source.size, _BLOCK):
        part = buffer[: min(_BLOCK, source.size - start)]
        source.read_into(start, part)
        found = crc32(part, found)
        advance(len(part))
    return found


def _check_model(checkpoint: Checkpoint, result: Verification) -> None:
    try:
        whole = join_ranks(checkpoint)
        result.warnings += [text for text in whole.warnings if text not in result.warnings]
        if adapters.settings_of(whole) is not None:
            _check_adapter(whole, result)
            return
        if whole.quantization is not None and not quantization.is_understood(whole.quantization):
            method = quantization.method_of(whole.quantization)
            result.warnings.append(f"whether the model is complete is not known: it is quantized by {method}")
            return
        _check_scales(whole, result)
        whole = in_full_precision(whole, "bfloat16").checkpoint
        model = identify(whole)
        if model is None:
            return
        _check_hub(_check_complete(whole, model, result), result)
    except MappingError as error:
        if error.path == checkpoint.path:
            error.path = None
        result.problems.append(Problem(checkpoint.path, str(error)))


def _check_scales(whole: Checkpoint, result: Verification) -> None:
    """The numbers of a quantized model's scales; whether they fit its weights shows when these are dequantized."""
    if whole.quantization is None:
        return
    try:
        for scale in quantization.scales_checked(whole.weights(), whole.quantization):
            result.checked.scales += 1
            if scale.problem is not None:
                result.problems.append(Problem(scale.name, scale.problem))
    except AnyckptError as error:  # of a file that is cut short, which its pieces show too
        result.problems.append(Problem(whole.path, f"{error}; scales after it were not checked"))


def _check_hub(hub: models.Hub, result: Verification) -> None:
    """What a complete hub says of the model: all, or all of its text."""
    spelling = hub.spelling
    if spelling is None or spelling.part_of is None:
        result.checked.model = True
        return
    result.checked.text = True
    if not spelling.parts:
        result.warnings.append(
            f"the configuration is of a {spelling.part_of} model, and no tensor is of another part of it than its text"
        )
        return
    parts = dict.fromkeys(name.partition(".")[0] for name in spelling.common_parts())
    result.unchecked.append(
        f"whether {', '.join(parts)} of the {spelling.part_of} model are complete: no rule knows their "
        f"{len(spelling.parts)} tensors"
    )


def _check_names(checkpoint: Checkpoint, result: Verification) -> None:
    """Whether weights have the names of transformers' classes in a format that these load."""
    if registry.by_name(checkpoint.format).dialect(registry.WriteOptions()) != "hf":
        return
    try:
        bare = models.bare_names(checkpoint)
    except MappingError as error:
        result.problems.append(Problem(checkpoint.path, str(error)))
        return
    if bare is None and has_other_head(checkpoint):
        return  # their classes call the trunk by other names than its own
    if bare is None or bare.wrappers:
        before = "" if bare is None else f", for {' and '.join(bare.wrappers)} of a wrapper is in them"
        first = next(iter(checkpoint.weights()))
        problem = f"transformers does not find the weights under these names{before}: {first}; convert it with --to hf"
        result.problems.append(Problem(checkpoint.path, problem))


def _check_complete(whole: Checkpoint, model: Model, result: Verification) -> models.Hub:
    """The weights, which are those of the model, or of its trunk if its class has another head or none."""
    if not has_other_head(whole):
        try:
            return models.to_hub(whole, model, widen=True)
        except MappingError:
            if trunk_of(whole, model) is None:
                raise
    trunk = trunk_of(whole, model)
    bare = whole if trunk is None else whole.with_weights(trunk.tensors)
    hub = models.to_hub(bare, model if trunk is None else trunk.model, widen=True)
    if trunk is not None and trunk.beside:
        of = trunk.kind or "the model"
        result.unchecked.append(f"what is beside the trunk of {of}, as no rule covers it: {some(trunk.beside)}")
    return hub


def _check_adapter(checkpoint: Checkpoint, result: Verification) -> None:
    settings = adapters.settings_of(checkpoint)
    if settings is not None and settings.kind not in adapters.KINDS:
        result.warnings.append(f"whether the adapter is complete is not known: it is of kind {settings.kind}")
        return
    result.warnings += adapters.check_adapter(checkpoint)
