"""A part of one model given the weights of another: a speech model's encoder those of a recogniser's ``.nemo``."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MappingError, UsageError
from anyckpt.formats import registry
from anyckpt.operations.steps.joining import check_whole, open_checkpoint
from anyckpt.torch.archive import open_archive
from anyckpt.torch.hub import CONFIG, folder_state
from anyckpt.torch.module_state import Fitted, load_into
from anyckpt.torch.settings import Settings, settings

Renaming = Mapping[str, str | None] | Callable[[str], str | None]


def initialise(
    module: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    rename: Renaming | None = None,
    may_miss: Iterable[str] = (),
    may_be_left: Iterable[str] = (),
) -> Fitted:
    """Give a module the weights of another model; nothing is changed unless all that was asked for fits.

    NeMo's SpeechLM2 does it with ``strict=False``, by which a wrong name leaves an encoder untrained in silence.

    >>> initialise(                                                                        # doctest: +SKIP
    ...     model.perception, "asr.nemo", may_miss=["proj.*"], may_be_left=["decoder.*"]
    ... )

    Args:
        module: where to, ``model.perception``.
        source: a ``.nemo``, any other checkpoint, or a state dict.
        rename: for the source's names: beginning -> what stands there in the module
            (``{"encoder.": "encoder_multilayer.encoder."}``), None to leave such names out; the longest that fits
            counts.  Or a function of the name.
        may_miss: globs of the module's names that keep what they have.
        may_be_left: globs of names (after renaming) that the module has no place for.

    Returns:
        What matched, what was missing, and what was left.

    Raises:
        FormatError: the source is damaged.
        MappingError: names are missing, unexpected or of another shape, or two are renamed to the same.
    """
    path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "the state given"
    state = source if isinstance(source, Mapping) else weights_of(path)
    return load_into(
        module,
        state if rename is None else renamed(state, rename, path),
        path=path,
        may_miss=may_miss,
        may_be_left=tuple(may_be_left),
    )


def perception_settings(
    source: str | os.PathLike[str],
    given: Mapping[str, Any] | None = None,
    *,
    sections: Iterable[str] = ("preprocessor", "encoder"),
) -> Settings:
    """The configuration of a part that ``initialise`` fills, as SpeechLM2 of NeMo 3.0 makes ``cfg.perception``.

    Args:
        source: the ``.nemo`` of the other model.
        given: what is configured already; it wins, key by key.
        sections: which of the other model's sections are taken.

    Raises:
        FormatError: the archive is damaged.
        UsageError: it has no such section.
    """
    archive = open_archive(source)
    result = settings(given)
    for section in sections:
        theirs = archive.config.get(section)
        if not isinstance(theirs, Mapping):
            raise UsageError(
                f"its configuration has no section {section!r}", path=archive.path, found=", ".join(archive.config)
            )
        ours = result.get(section)
        result[section] = {**theirs, **(ours if isinstance(ours, Mapping) else {})}
    return result


def weights_of(path: str) -> Mapping[str, Any]:
    """The weights of a checkpoint as tensors of torch, mapped into memory where its files have them so.

    Raises:
        FormatError: it is damaged.
        MappingError: it is one part of a model.
    """
    checkpoint = registry.read(path)
    check_whole(checkpoint)
    own = weights_as_stored(checkpoint)
    return open_checkpoint(path).state_dict("torch") if own is None else own


def weights_as_stored(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The state dict of one module, with tied weights under all of their names; None where files are of another kind.

    Raises:
        FormatError: it is damaged.
        UsageError: it has objects that only executing a pickle would make.
    """
    if checkpoint.format == "nemo" and checkpoint.details.get("weights") == "flat":
        return open_archive(checkpoint.path).state()
    if checkpoint.format == "hf" and os.path.exists(os.path.join(checkpoint.path, CONFIG)):
        return folder_state(checkpoint.path)
    return None


def renamed(state: Mapping[str, Any], rename: Renaming, path: str) -> dict[str, Any]:
    """A state under other names; see ``initialise``.

    Raises:
        MappingError: two names are renamed to the same.
    """
    changed = rename if callable(rename) else _by_beginning(rename)
    result: OrderedDict[str, Any] = OrderedDict()
    origin: dict[str, str] = {}
    for name, value in state.items():
        new = changed(name)
        if new is None:
            continue
        if new in result:
            raise MappingError(
                "two weights are renamed to the same", path=path, tensor=new, found=f"{origin[new]}, {name}"
            )
        result[new], origin[new] = value, name
    return result


def _by_beginning(table: Mapping[str, str | None]) -> Callable[[str], str | None]:
    longest = sorted(table, key=len, reverse=True)

    def changed(name: str) -> str | None:
        found = next((old for old in longest if name.startswith(old)), None)
        if found is None:
            return name
        new = table[found]
        return None if new is None else new + name[len(found) :]

    return changed
