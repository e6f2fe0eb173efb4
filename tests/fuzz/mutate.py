"""Mutations that keep a file's structure, so that they get past the first check: members, values, opcodes, lines."""

from __future__ import annotations

import io
import json
import pickletools
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from tests.fuzz.seeds import Tree

Item = TypeVar("Item")


class Choices(Protocol):
    """Where decisions come from: hypothesis, atheris, or a random generator."""

    def number(self, low: int, high: int) -> int:
        """One of ``low`` to ``high``, both included."""


def pick(choices: Choices, items: Sequence[Item]) -> Item:
    return items[choices.number(0, len(items) - 1)]


STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 127, 1 << 31, 1 << 63, -(1 << 63), 1 << 70, 0.5, 1e308, "", "x", "float32",
    "F8_E4M3", "llama", "torch.bfloat16", "../../x", "/etc/passwd", "\ud800", "a\0b", "é" * 300, [], [0], [[]], {},
    {"a": 1}, {"__type__": "x"}, [1 << 40, 1 << 40], [None], "model.safetensors", ["LlamaForCausalLM"], "true", "1",
]  # fmt: skip
"""Values that a configuration should not have, or not there."""

_LINES = [
    "- x",
    "x: 1",
    "  x: [",
    "a: &a [*a]",
    "? {",
    "!!python/object:os.system x",
    "x: 1e400",
    "\t",
    "x: !!float .nan",
]
_ROUNDS = (1, 1, 1, 2, 3)


def mutated(tree: Tree, choices: Choices) -> Tree:
    """The tree with up to three changes."""
    result = dict(tree)
    for _ in range(pick(choices, _ROUNDS)):
        if not result:
            break
        path = pick(choices, sorted(result))
        if path.startswith("/") or choices.number(0, 4):
            result[path] = _changed(path, result[path], choices)
        else:
            _rearranged(result, path, choices)
    return result


def _rearranged(tree: Tree, path: str, choices: Choices) -> None:
    """Files lost, emptied, swapped, renamed or doubled."""
    other = pick(choices, sorted(tree))
    kind = choices.number(0, 4)
    if kind == 0:
        del tree[path]
    elif kind == 1:
        tree[path] = b""
    elif kind == 2:
        tree[path], tree[other] = tree[other], tree[path]
    elif kind == 3:
        tree[f"{other}.{path.rpartition('.')[2]}"] = tree.pop(path)
    else:
        tree[path.replace("0", "1").replace("model", "model-00001-of-00002")] = tree[path]


def _changed(path: str, data: bytes, choices: Choices, depth: int = 0) -> bytes:
    """A file's contents, changed as its kind allows; any kind may be cut or get wrong bytes."""
    if not data or not choices.number(0, 5) or depth > 3:
        return _bytes(data, choices)
    for fits, change in _KINDS:
        if fits(path, data):
            try:
                return change(path, data, choices, depth)
            except (ValueError, KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError):
                break
    return _bytes(data, choices)


def _bytes(data: bytes, choices: Choices) -> bytes:
    at = choices.number(0, len(data))
    kind = choices.number(0, 4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([choices.number(0, 255)]) + data[at + 1 :]
    if kind == 2:
        wide = pick(choices, [b"\xff" * 8, b"\0" * 8, (1 << 40).to_bytes(8, "little"), b"\x80\x02", b"PK\x05\x06"])
        return data[:at] + wide + data[at + len(wide) :]
    if kind == 3:
        return data[:at] + data[at + choices.number(1, 64) :]
    end = min(len(data), at + choices.number(1, 64))
    return data[:end] + data[at:end] + data[end:]


# -- kinds of files -------------------------------------------------------------------------------------------


def _json(path: str, data: bytes, choices: Choices, depth: int) -> bytes:
    return json.dumps(_value(json.loads(data), choices)).encode()


def _value(root: Any, choices: Choices) -> Any:
    """Plain data with one value replaced, one key renamed, or one entry gone."""
    if not isinstance(root, (dict, list)) or not root or not choices.number(0, 12):
        return pick(choices, STRANGE)
    changed: Any = root.copy()
    key = pick(choices, sorted(root, key=str) if isinstance(root, dict) else range(len(root)))
    kind = choices.number(0, 7)
    if kind == 0:
        del changed[key]
    elif kind == 1 and isinstance(root, dict):
        changed[pick(choices, [str(key) + "x", "", "\ud800", "__metadata__", "0"])] = changed.pop(key)
    elif kind == 2:
        other = pick(choices, list(root.values()) if isinstance(root, dict) else root)
        changed[key] = other
    elif isinstance(root[key], (int, float)) and choices.number(0, 1):
        changed[key] = pick(choices, [root[key] + 1, root[key] * 2, -root[key], root[key] - 1, float(root[key])])
    else:
        changed[key] = _value(root[key], choices)
    return changed


def _safetensors(path: str, data: bytes, choices: Choices, depth: int) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(_value(json.loads(data[8 : 8 + length]), choices)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _lines(path: str, data: bytes, choices: Choices, depth: int) -> bytes:
    """YAML and plain text by lines: a line gone, doubled, moved, of another value or indentation."""
    lines = data.decode("utf-8").split("\n")
    at = choices.number(0, len(lines) - 1)
    kind = choices.number(0, 5)
    key, colon, _ = lines[at].partition(":")
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, pick(choices, lines))
    elif kind == 2:
        lines.insert(at, pick(choices, _LINES))
    elif kind == 3:
        lines[at] = "  " + lines[at]
    else:
        value = json.dumps(pick(choices, STRANGE))
        lines[at] = f"{key}: {value}" if colon else f"- {value}"
    return "\n".join(lines).encode()


def _zip(path: str, data: bytes, choices: Choices, depth: int) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    members = _members(members, choices, depth)
    out = io.BytesIO()
    warnings.simplefilter("ignore")  # a name twice is meant
    with zipfile.ZipFile(out, "w", pick(choices, [zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED])) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name.replace("\ud800", "?"), (1980, 1, 1, 0, 0, 0)), content)
    return out.getvalue()


def _tar(path: str, data: bytes, choices: Choices, depth: int) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        entries = [(entry, archive.extractfile(entry)) for entry in archive.getmembers()]
        members = [(entry.name, file.read()) for entry, file in entries if file is not None]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in _members(members, choices, depth):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            if not choices.number(0, 30):
                entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, "../../etc/passwd", 0
            archive.addfile(entry, io.BytesIO(content) if entry.size else None)
    return out.getvalue()


def _members(members: list[tuple[str, bytes]], choices: Choices, depth: int) -> list[tuple[str, bytes]]:
    """Members of an archive with one changed, lost, renamed, doubled or with another's contents."""
    if not members:
        return members
    changed = list(members)
    at = choices.number(0, len(members) - 1)
    pickles = [number for number, (name, _) in enumerate(members) if name.endswith((".pkl", ".yaml"))]
    if pickles and choices.number(0, 2):
        at = pick(choices, pickles)
    name, content = members[at]
    kind = choices.number(0, 9)
    if kind == 0:
        del changed[at]
    elif kind == 1:
        changed[at] = (pick(choices, [name + "x", name.rpartition("/")[2], "../" + name, name.upper()]), content)
    elif kind == 2:
        changed.append((name, pick(choices, members)[1]))
    elif kind == 3:
        changed[at] = (name, pick(choices, members)[1])
    else:
        changed[at] = (name, _changed(name, content, choices, depth + 1))
    return changed


def _pickle(path: str, data: bytes, choices: Choices, depth: int) -> bytes:
    """A pickle by opcodes: one gone, doubled, exchanged with another, or of another argument."""
    places = [at for _, _, at in pickletools.genops(data) if at is not None]
    if len(places) < 3:
        raise ValueError("too short")
    ends = [*places[1:], places[-1] + 1]
    codes = [data[begin:end] for begin, end in zip(places, ends, strict=True)]
    at = choices.number(1, len(codes) - 2)
    kind = choices.number(0, 4)
    if kind == 0:
        del codes[at]
    elif kind == 1:
        codes.insert(at, codes[choices.number(1, len(codes) - 2)])
    elif kind == 2:
        codes[at] = pick(choices, _OPCODES)
    elif kind == 3:
        other = choices.number(1, len(codes) - 2)
        codes[at], codes[other] = codes[other], codes[at]
    else:
        codes[at] = codes[at][:1] + _bytes(codes[at][1:], choices) if len(codes[at]) > 1 else pick(choices, _OPCODES)
    return b"".join(codes) + data[ends[-1] :]


_OPCODES = [
    b"N", b"\x88", b"K\x07", b"J\xff\xff\xff\xff", b"\x8a\x09\0\0\0\0\0\0\0\0\1", b"G\x7f\xf0\0\0\0\0\0\0", b"}", b"]",
    b")", b"(", b"0", b"1", b"2", b"t", b"l", b"d", b"a", b"s", b"u", b"R", b"b", b"Q", b"\x81", b"\x85", b"\x86",
    b"\x8f", b"\x90", b"h\0", b"j\xff\0\0\0", b"cos\nsystem\n", b"ctorch\nSize\n", b"ccollections\nOrderedDict\n",
    b"X\x01\0\0\0x", b"X\x03\0\0\0\xed\xa0\x80", b"C\x01x", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", b".", b"\x94",
]  # fmt: skip

_Change = Callable[[str, bytes, Choices, int], bytes]
_KINDS: list[tuple[Callable[[str, bytes], bool], _Change]] = [
    (lambda path, data: path.endswith(".safetensors"), _safetensors),
    (lambda path, data: data[:2] == b"PK", _zip),
    (lambda path, data: data[257:262] == b"ustar", _tar),
    (lambda path, data: data[:1] == b"\x80" or path.endswith((".pkl", ".metadata")), _pickle),
    (lambda path, data: data.lstrip()[:1] in (b"{", b"[") and not path.endswith((".yaml", ".yml")), _json),
    (lambda path, data: path.endswith((".yaml", ".yml", ".txt", ".md")), _lines),
]
