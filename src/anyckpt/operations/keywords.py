"""The keyword arguments that functions which write checkpoints have in common, by what they are about.

``ConvertOptions`` says what each is and what holds where it is not given; type checkers compare the two, since every
function hands its words on to it.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

from anyckpt.operations.options import ConvertOptions
from anyckpt.operations.steps.destination import check_destination

if TYPE_CHECKING:
    from anyckpt.operations.steps.layout_request import LayoutRequest
    from anyckpt.operations.steps.threads import Progress
    from anyckpt.quantization.statistics import Statistics

Function = TypeVar("Function", bound=Callable[..., Any])


class RunWords(TypedDict, total=False):
    """How it is done."""

    overwrite: bool
    private: bool
    commit_message: str | None
    workers: int | None
    memory: int | str | None
    dry_run: bool
    progress: Progress | None


class AgainWords(RunWords, total=False):
    """The same of what can be continued, and divided between processes."""

    resume: bool
    share: str | None
    wait: float | None
    engine: str | None


class OutputWords(TypedDict, total=False):
    """What is written."""

    tokenizer: str | os.PathLike[str] | None
    dtype: str | None
    keep_in_fp32: Sequence[str]
    max_shard_size: int | str | None
    sharded: bool


class SourceWords(TypedDict, total=False):
    """What is read, and which of it."""

    family: str | None
    config: str | os.PathLike[str] | Mapping[str, Any] | None
    names: str | None
    include: str | Sequence[str] | None
    exclude: str | Sequence[str] | None


class MergeWords(AgainWords, OutputWords, total=False):
    """Of what makes one model of several."""


class SaveWords(RunWords, OutputWords, SourceWords, total=False):
    """Of what writes tensors in memory."""

    layout: LayoutRequest | None


class ReshardWords(AgainWords, OutputWords, SourceWords, total=False):
    """Of what writes a checkpoint that is read."""

    adapter_form: str | None
    alpha: float | None
    force: bool


class ConvertWords(ReshardWords, total=False):
    """Of what writes one in any other format."""

    model_id: str | os.PathLike[str] | None
    tokenizer_library: str | None
    experts: str | None
    module: str | None
    put: str | Sequence[str] | Mapping[str, str | os.PathLike[str]] | None
    quantize: str | None
    quantize_form: str | None
    group_size: int | None
    activation_scale: float | None
    activation_scales: str | os.PathLike[str] | Mapping[str, float] | None
    statistics: str | os.PathLike[str] | Statistics | None
    sq_alpha: float | None
    enable_kv_cache: bool | None
    decoder_type: str | None
    quantize_exclude: str | Sequence[str] | None
    report: str | os.PathLike[str] | None
    rename: str | Sequence[str] | None
    drop_layers: str | Sequence[int] | None
    keep_layers: str | Sequence[int] | None
    optimizer: str
    layout: LayoutRequest | None
    gzip: bool
    backend: str | None
    tensor_type: str | None
    keep_layout: bool


def check_writable(destination: str | os.PathLike[str], origins: Sequence[str], words: AgainWords) -> None:
    """Raise unless what is asked for may be written there, which holds none of what it is made of.

    Raises:
        UsageError, OutputError: see ``check_destination``.
    """
    check_destination(
        os.fspath(destination),
        origins,
        overwrite=words.get("overwrite", False),
        resume=words.get("resume", False) or words.get("share") is not None or words.get("engine") is not None,
        anywhere=True,
    )


def taking(words: type) -> Callable[[Function], Function]:
    """Have a function say what it takes, in its signature and docstring, where that is keyword arguments of one kind.

    Args:
        words: the kind, which its ``**others`` are of.
    """
    known = {each.name: each for each in fields(ConvertOptions)}

    def told(function: Function) -> Function:
        own = inspect.signature(function)
        others = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=known[name].default, annotation=known[name].type
            )
            for name in words.__annotations__
        ]
        taken = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        whole = own.replace(parameters=[*taken, *others])

        @wraps(function)
        def checked(*arguments: Any, **keywords: Any) -> Any:
            for name in keywords:
                if name not in whole.parameters:
                    raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")
            return function(*arguments, **keywords)

        checked.__signature__ = whole  # type: ignore[attr-defined]
        checked.__doc__ = _documented(function, whole)
        return cast(Function, checked)

    return told


def _documented(function: Callable[..., Any], taken: inspect.Signature) -> str | None:
    """Its docstring, with what ``ConvertOptions`` says of those of its options that this does not name."""
    text = inspect.getdoc(function)
    if text is None:  # python -OO
        return None
    said = re.findall(r"^    (\w+): (.+?)(?=^    \w|\Z|^\n)", _ATTRIBUTES, re.MULTILINE | re.DOTALL)
    more = "".join(
        f"    {name}: {what}" for name, what in said if name in taken.parameters and f"    {name}: " not in text
    )
    return text.replace("\n\nRaises:", f"\n{more.rstrip()}\n\nRaises:", 1)


_ATTRIBUTES = (inspect.getdoc(ConvertOptions) or "").partition("Attributes:\n")[2].partition("\n\n")[0] + "\n"
