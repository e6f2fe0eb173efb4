"""Writes what frameworks' configuration classes take where they are told nothing, as data for ``anyckpt.config``.

    python tools/framework_defaults.py transformers           # of the transformers that is installed
    python tools/framework_defaults.py nemo2 CHECKOUT ...     # of checkouts of NeMo, whose sources are only parsed

The files are ``src/anyckpt/config/data/*.json``; a peer test compares that of transformers with what is installed.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import importlib.metadata
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from anyckpt.models import families

DATA = Path(__file__).resolve().parents[1] / "src" / "anyckpt" / "config" / "data"
NEMO = "nemo.collections"
CORE = ("transformer.transformer_config",)
MUST_BE_GIVEN = ("num_layers", "hidden_size", "num_attention_heads")
"""Fields that Megatron-Core has 0 for."""
FUNCTIONS = (
    "torch.nn.functional.", "nemo.collections.llm.fn.", "megatron.core.activations.", "megatron.core.fusions.",
)  # fmt: skip
LAMBDAS = {"lambda x: torch.pow(F.relu(x), 2)": "megatron.core.activations.squared_relu"}
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
FOLDERS = ("llm/gpt/model", "llm/bert/model", "llm/t5/model", "vlm/vision")
"""Of NeMo's collections, where the classes are that describe models which we know."""


# -- NeMo 2 ------------------------------------------------------------------------------------------------------


class Sources:
    """Configuration classes in files of Python, by module and name; those of other packages have no fields."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.nodes: dict[tuple[str, str], ast.ClassDef] = {}
        self.imports: dict[str, dict[str, str]] = {}
        self.types: dict[tuple[str, str], type] = {}
        for module, path in files.items():
            tree = ast.parse(path.read_text())
            self.imports[module] = dict(_imports(tree))
            self.nodes |= {(module, node.name): node for node in tree.body if isinstance(node, ast.ClassDef)}

    def configurations(self) -> Iterator[type]:
        """Those that are dataclasses or children of some, and are called so."""
        for module, name in self.nodes:
            of = self.resolved(module, name)
            if any(one.__name__.endswith("Config") and _is_dataclass(self.nodes[key(one)]) for one in of.__mro__[:-1]):
                yield of

    def resolved(self, module: str, name: str) -> type:
        """An empty class with the bases of the one in the sources, so that Python orders them."""
        found = self._find(module, name)
        if found is None:
            return object
        if found not in self.types:
            bases = [self.resolved(found[0], ast.unparse(base).rpartition(".")[2]) for base in self.nodes[found].bases]
            known = tuple(dict.fromkeys(base for base in bases if base is not object))
            self.types[found] = type(found[1], known, {"key": found})
        return self.types[found]

    def _find(self, module: str, name: str) -> tuple[str, str] | None:
        if (module, name) in self.nodes:
            return module, name
        origin = self.imports.get(module, {}).get(name, "").rpartition(".")[0]
        named = [found for found in self.nodes if found[1] == name] if origin else []
        return next((found for found in named if found[0].startswith(origin) or found[0].endswith(origin)), None)

    def own(self, of: type) -> dict[str, Any]:
        """Fields that a class declares, as plain data; functions by their dotted names."""
        found: dict[str, Any] = {}
        node = self.nodes[key(of)]
        for line in node.body if _is_dataclass(node) else ():
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
                if of.__name__ == "TransformerConfig" and line.target.id in MUST_BE_GIVEN:
                    continue
                try:
                    found[line.target.id] = _value(line.value, self.imports[key(of)[0]])
                except ValueError as error:
                    if line.target.id == "activation_func":
                        raise SystemExit(f"{key(of)}: what is {error}?") from None
                    continue  # objects that only exist at run time; none is about the model
        return found

    def fields(self, of: type) -> dict[str, Any]:
        """A class's fields with those that it inherits."""
        found: dict[str, Any] = {}
        for one in reversed(of.__mro__[:-1]):
            found |= self.own(one)
        return found


def key(of: type) -> tuple[str, str]:
    """Module and name of what ``Sources.resolved`` made."""
    found: tuple[str, str] = vars(of)["key"]
    return found


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any(ast.unparse(decorator).startswith("dataclass") for decorator in node.decorator_list)


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name, alias.name
        elif isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("safe_import_from("):
            arguments = node.value.args if isinstance(node.value, ast.Call) else []
            module, name = (ast.literal_eval(argument) for argument in arguments[:2])
            yield ast.unparse(node.targets[0]).strip("()").partition(",")[0], f"{module}.{name}"


def _value(node: ast.expr, imports: Mapping[str, str]) -> Any:
    """A default as plain data.

    Raises:
        ValueError: it is none.
    """
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("field", "dataclasses.field"):
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        factory = given.get("default_factory")
        if "default" in given:
            return _value(given["default"], imports)
        if isinstance(factory, ast.Lambda):
            return _value(factory.body, imports)
        if factory is not None and ast.unparse(factory) == "list":
            return []
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left, imports), _value(node.right, imports))
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "math.sqrt":
        return math.sqrt(_value(node.args[0], imports))
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, imports) for item in node.elts]
    if isinstance(node, (ast.Name, ast.Attribute)):
        head, _, rest = ast.unparse(node).partition(".")
        dotted = f"{imports.get(head, '')}.{rest}".rstrip(".")
        if dotted.startswith(FUNCTIONS):
            return dotted
        raise ValueError(ast.unparse(node))
    if isinstance(node, ast.Lambda):
        if ast.unparse(node) not in LAMBDAS:
            raise ValueError(ast.unparse(node))
        return LAMBDAS[ast.unparse(node)]
    return ast.literal_eval(node)


def nemo2(checkouts: list[Path]) -> dict[str, Any]:
    """Each class with its base and the fields in which it differs from it; functions are dotted names.

    Args:
        checkouts: the newest first; of an older one count the classes that no newer one has.
    """
    core = Path(importlib.import_module("megatron.core").__file__ or "").parent
    parents = {f"megatron.core.{name}": core / f"{name.replace('.', '/')}.py" for name in CORE}
    classes: dict[str, Any] = {}
    versions = [f"megatron-core {importlib.metadata.version('megatron-core')}"]
    for checkout in checkouts:
        versions.append(f"NeMo {_version(checkout)}")
        sources = Sources({**parents, **dict(_files(checkout))})
        whole: dict[str, dict[str, Any]] = {}
        for of in sorted(sources.configurations(), key=lambda one: len(one.__mro__)):
            whole[of.__name__] = sources.fields(of)
            if of.__name__ in classes:
                continue
            base = next((one.__name__ for one in of.__mro__[1:-1] if one.__name__ in classes), None)
            inherited = {} if base is None else _resolved(classes, base)
            own = {name: value for name, value in whole[of.__name__].items() if inherited.get(name, of) != value}
            classes[of.__name__] = {"base": base, "fields": own}
    return {"source": f"configuration classes of {', '.join(versions)}", "classes": classes}


def _resolved(classes: Mapping[str, Any], name: str) -> dict[str, Any]:
    entry = classes[name]
    return {**(_resolved(classes, entry["base"]) if entry["base"] else {}), **entry["fields"]}


def _files(checkout: Path) -> Iterator[tuple[str, Path]]:
    for folder in FOLDERS:
        for path in sorted((checkout / "nemo" / "collections" / folder).glob("*.py")):
            yield ".".join((NEMO, *folder.split("/"), path.stem)), path


def _version(checkout: Path) -> str:
    tree = ast.parse((checkout / "nemo" / "package_info.py").read_text())
    said = {
        line.targets[0].id: ast.literal_eval(line.value)
        for line in tree.body
        if isinstance(line, ast.Assign)
        and isinstance(line.targets[0], ast.Name)
        and isinstance(line.value, ast.Constant)
    }
    return f"{said['MAJOR']}.{said['MINOR']}.{said['PATCH']}{said['PRE_RELEASE']}"


# -- transformers ------------------------------------------------------------------------------------------------


def of_transformers() -> dict[str, Any]:
    """By ``model_type``, what each class of ours takes where ``config.json`` has no such key, as it declares it."""
    library = importlib.import_module("transformers")
    usual = {field.name for field in dataclasses.fields(library.PretrainedConfig)}
    classes: dict[str, Any] = {}
    for family in families.known_families().values():
        for name in family.hugging_face.model_types[:1]:
            if name in library.CONFIG_MAPPING:
                classes[name] = {"base": None, "fields": declared(library.CONFIG_MAPPING[name], usual)}
    version = importlib.metadata.version("transformers")
    return {"source": f"configuration classes of transformers {version}", "classes": classes}


def declared(of: Any, usual: set[str]) -> dict[str, Any]:
    """Fields of a dataclass that have defaults which JSON can say, but for those that every class has."""
    found = {}
    for field in dataclasses.fields(of):
        value = field.default_factory() if callable(field.default_factory) else field.default
        try:
            plain = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            continue
        if field.name not in usual or field.name in vars(of).get("__annotations__", {}):
            found[field.name] = plain
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="framework", required=True)
    commands.add_parser("transformers")
    commands.add_parser("nemo2").add_argument("checkouts", type=Path, nargs="+")
    asked = parser.parse_args()
    written = of_transformers() if asked.framework == "transformers" else nemo2(asked.checkouts)
    DATA.mkdir(exist_ok=True)
    (DATA / f"{asked.framework}.json").write_text(_text(written))


def _text(value: Mapping[str, Any]) -> str:
    """JSON with a line for each class."""
    entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value["classes"].items())
    return f'{{\n "source": {json.dumps(value["source"])},\n "classes": {{\n{entries}\n }}\n}}\n'


if __name__ == "__main__":
    main()
