"""YAML as plain data, read and written as OmegaConf does, which is what NeMo uses.

OmegaConf differs from PyYAML's defaults in ways that change values: ``1e-5`` is a number, ``2024-01-01`` is text,
and a text that looks like a number or a truth value is quoted.  Tags that would make objects are refused, and the
size of what a document expands to is known before anything is built.

Source: OmegaConf 2.4, ``_yaml.py`` (loader) and ``_utils.py`` (dumper).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable
from functools import cache
from typing import TYPE_CHECKING, Any

from anyckpt.errors import FormatError, OutputError, UnsafeError

if TYPE_CHECKING:
    import yaml

_TEXT_LIMIT = 8 << 20
_NODE_LIMIT = 100_000
_DEPTH_LIMIT = 100
_TOO_DEEP = "maximum nesting depth"  # PyYAML's scanner from 6.0.4 on, which stops before our count of events does

_FLOAT = re.compile(
    r"""^(?:
     [-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
    |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_BOOLEANS = frozenset(
    spelling
    for word in ("y", "yes", "n", "no", "true", "false", "on", "off")
    for spelling in (word, word.capitalize(), word.upper())
)
_PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "int", "map", "null", "seq", "str"))
_FLOAT_TAG = "tag:yaml.org,2002:float"
_TIMESTAMP_TAG = "tag:yaml.org,2002:timestamp"


def load_yaml(data: bytes, name: str) -> Any:
    """The one document in ``data``: dicts, lists, strings, numbers, truth values and None, nothing shared.

    Args:
        data: UTF-8 text.
        name: what to call it in messages.

    Raises:
        FormatError: it is not valid YAML, or has a key twice.
        UnsafeError: it is too large, too deep, expands to too much, or names objects to build.
    """
    import yaml

    if len(data) > _TEXT_LIMIT:
        raise UnsafeError("is too large", path=name, expected=f"at most {_TEXT_LIMIT} bytes", found=len(data))
    try:
        text = data.decode("utf-8-sig")
        has_aliases = _check_events(text, name)
        value = yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, OverflowError) as error:
        if _TOO_DEEP in str(error):
            raise _nested_too_deeply(name) from error
        raise FormatError(f"is not valid YAML: {' '.join(str(error).split())}", path=name) from error
    return _unshared(value) if has_aliases else value


def load_yaml_mapping(data: bytes, name: str) -> dict[str, Any]:
    """As ``load_yaml``, for a document that must be a mapping with text keys at its top.

    Raises:
        FormatError: it is something else.
    """
    value = load_yaml(data, name)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise FormatError("is not a configuration", path=name, expected="a YAML mapping", found=type(value).__name__)
    return value


def dump_yaml(value: Any, *, sort_keys: bool = False, ascii_only: bool = False) -> str:
    """Block-style YAML as ``OmegaConf.to_yaml`` writes it.

    Args:
        value: plain data.
        sort_keys: in alphabetical order instead of the given one.
        ascii_only: escape other characters, as PyYAML does by default.

    Raises:
        OutputError: ``value`` is not plain data.
    """
    import yaml

    try:
        return yaml.dump(
            value, Dumper=_dumper(), default_flow_style=False, allow_unicode=not ascii_only, sort_keys=sort_keys
        )
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        raise OutputError(f"the configuration cannot be written as YAML: {error}") from error


def _check_events(text: str, name: str) -> bool:
    """Whether aliases occur; an error if building the document would take too much or make objects.

    The parser's events come one by one without recursion, so depth and expanded size are known before a tree is.
    """
    import yaml

    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    has_aliases = False
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent):
            has_aliases = True
            if event.anchor not in sizes:
                raise UnsafeError(f"the alias *{event.anchor} refers to what it is part of, or to nothing", path=name)
            total += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            tag = event.tag
            if tag is not None and tag not in _PLAIN_TAGS and tag != "!":
                raise UnsafeError(f"the tag {tag!r} asks to build an object", path=name, expected="plain data")
            total += 1
            if isinstance(event, yaml.ScalarEvent):
                if event.anchor is not None:
                    sizes[event.anchor] = 1
            else:
                open_nodes.append((event.anchor, total))
                if event.anchor is not None:
                    sizes.pop(event.anchor, None)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = total - before + 1
        if len(open_nodes) > _DEPTH_LIMIT:
            raise _nested_too_deeply(name)
        if total > _NODE_LIMIT:
            raise UnsafeError("expands to too many values", path=name, expected=f"at most {_NODE_LIMIT}")
    return has_aliases


def _nested_too_deeply(name: str) -> UnsafeError:
    return UnsafeError("is nested too deeply", path=name, expected=f"at most {_DEPTH_LIMIT} levels")


@cache
def _loader() -> type[yaml.CSafeLoader]:
    import yaml

    class Loader(yaml.CSafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice, count = names.most_common(1)[0] if names else ("", 0)
            if count > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {twice!r} is there twice", node.start_mark
                )
            result: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
            return result

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_FLOAT_TAG, _TIMESTAMP_TAG)]
        for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))
    return Loader


@cache
def _dumper() -> type[yaml.SafeDumper]:
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, data: str) -> yaml.ScalarNode:
        quoted = data in _BOOLEANS or _reads_as(int, data) or _reads_as(float, data)
        return dumper.represent_scalar("tag:yaml.org,2002:str", data, style="'" if quoted else None)

    Dumper.add_representer(str, text)
    return Dumper


def _reads_as(kind: type[int] | type[float], text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value
