"""What a GGUF file says of a model besides its sizes: name, licence, origins and how to sample.

llama.cpp's converter takes them from the folder's name, the front matter of the model card, and
``generation_config.json`` (``gguf.Metadata`` of gguf 0.19).  What that concludes from the parts of a name (version,
fine-tune) is not written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import AnyckptError
from anyckpt.formats.gguf.container import INT32, Typed
from anyckpt.formats.shared.hub_folder import read_json
from anyckpt.plain_yaml import load_yaml_mapping
from anyckpt.storage.source import ByteSource

_CARD, _GENERATION = "README.md", "generation_config.json"
_LIMIT = 4 << 20
_HUB = "https://huggingface.co/"
_SAMPLING = {
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "temp": ("temperature", float),
    "penalty_repeat": ("repetition_penalty", float),
}
"""Key -> what transformers calls it."""
_SAID = {"license": "license", "license.name": "license_name", "license.link": "license_link"}
_SIZES = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (0, "K"))


def general(checkpoint: Checkpoint, shapes: Mapping[str, Sequence[int]], notes: list[str]) -> Iterator[tuple[str, Any]]:
    """Keys that begin with ``general.``, but for those that say how the file is made.

    Args:
        checkpoint: what is written.
        shapes: of the file's tensors.
        notes: gets what cannot be read.
    """
    yield from _sampling(checkpoint.artifacts.get(_GENERATION))
    card = _card(checkpoint.artifacts.get(_CARD), notes)
    name = _name(checkpoint, card)
    if name:
        yield "general.name", name
    yield "general.size_label", size_label(shapes)
    for key, own in _SAID.items():
        said = card.get(own)
        if isinstance(said, list):
            said = ",".join(map(str, said))
        if isinstance(said, str) and said:
            yield f"general.{key}", said
    yield from _origins("base_model", _texts(card.get("base_model")))
    yield from _origins("dataset", _texts(card.get("datasets")))
    tags = [*_texts(card.get("tags")), *_texts(card.get("pipeline_tag"))]
    for key, texts in (("tags", tags), ("languages", _texts(card.get("language")))):
        if texts:
            yield f"general.{key}", texts


def _card(source: ByteSource | None, notes: list[str]) -> Mapping[str, Any]:
    """The front matter of a model card."""
    if source is None:
        return {}
    lines = source.read_all(_LIMIT).decode(errors="replace").splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    text = "\n".join(lines[1 : lines.index("---", 1)])
    try:
        return load_yaml_mapping(text.encode(), source.name)
    except AnyckptError as error:
        notes.append(f"what the model card says is not carried, for its front matter cannot be read: {error.problem}")
        return {}


def _texts(said: Any) -> list[str]:
    """A text or a list of texts as a list; YAML takes the language ``no`` for a truth value."""
    listed = said if isinstance(said, list) else [] if said is None else [said]
    return ["no" if one is False else one for one in listed if one is False or (isinstance(one, str) and one)]


def _name(checkpoint: Checkpoint, card: Mapping[str, Any]) -> str:
    stated = checkpoint.details.get("general.name")
    if isinstance(stated, str) and stated:
        return stated
    for said in (card.get("model_name"), checkpoint.config.get("_name_or_path")):
        if isinstance(said, str) and said and said.count("/") <= 1 and not said.startswith((".", "/")):
            return title(said.rpartition("/")[2])
    stem = re.sub(r"\.\w+$", "", checkpoint.path.rstrip("/").rpartition("/")[2])
    return "" if not stem or " " in stem else title(stem)


def title(name: str) -> str:
    """``llama-2-7b-chat`` as ``Llama 2 7b Chat``: words with capitals, versions and sizes as they are."""
    words = name.strip().replace("-", " ").split()
    return " ".join(
        word.title() if word.islower() and not re.fullmatch(r"v\d+(?:\.\d+)*|\d.*", word) else word for word in words
    )


def size_label(shapes: Mapping[str, Sequence[int]]) -> str:
    """``1.2B``, or ``8x7B`` of a model with experts: what all share and one of them."""
    experts = [shape for name, shape in shapes.items() if "_exps." in name and len(shape) > 1]
    total = sum(map(prod, shapes.values()))
    counts = {shape[0] for shape in experts}
    if len(counts) != 1:
        return _rounded(total)
    count = counts.pop()
    return f"{count}x{_rounded(total - sum(map(prod, experts)) * (count - 1) // count)}"


def _rounded(count: int) -> str:
    unit, letter = next((unit, letter) for unit, letter in _SIZES if count > unit)
    scaled = count / (unit or 10**3)
    digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{digits}f}{letter}"


def _origins(what: str, ids: Sequence[str]) -> Iterator[tuple[str, Any]]:
    if ids:
        yield f"general.{what}.count", len(ids)
    for number, said in enumerate(ids):
        key = f"general.{what}.{number}"
        own = said.removeprefix(_HUB)
        if own.startswith(("http://", "https://", "ssh://")):
            yield f"{key}.repo_url", said
            continue
        owner, slash, name = own.rpartition("/")
        yield f"{key}.name", title(name)
        if slash:
            yield f"{key}.organization", title(owner)
            yield f"{key}.repo_url", f"{_HUB}{own}"


def _sampling(source: ByteSource | None) -> Iterator[tuple[str, Any]]:
    said = {} if source is None else read_json(source)
    for key, (own, kind) in _SAMPLING.items():
        value = said.get(own)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"general.sampling.{key}", Typed(INT32, int(value)) if kind is int else float(value)
