"""A NeMo 1 training file in the words of what has taken NeMo 1's place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from anyckpt.config.migration import Migration, Setting, migrate
from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError
from anyckpt.escaping import printable
from anyckpt.operations.steps.configuration_text import Section, python_text, yaml_text
from anyckpt.operations.steps.text_file import write_text
from anyckpt.plain_yaml import load_yaml, load_yaml_mapping

Target = Literal["nemo2", "megatron-bridge", "anyckpt"]
TARGETS: tuple[Target, ...] = get_args(Target)
Form = Literal["yaml", "python"]

_BRIDGE = "megatron.bridge.training.config.CheckpointConfig"
_LIMIT = 8 << 20
_TOP_K, _USUAL_TOP_K = "exp_manager.checkpoint_callback_params.save_top_k", 3
_WHOLE_FILES = {"model", "trainer", "exp_manager"}
_MODEL_FILES = {"num_layers", "hidden_size", "tensor_model_parallel_size", "micro_batch_size", "enc_num_layers"}
"""Keys that tell a training file from the configuration of a model alone."""


@dataclass(frozen=True)
class MigratedConfig:
    """What became of a NeMo 1 training file.

    Attributes:
        path: of the file.
        to: whose words.
        migration: every setting and its outcome.
        sections: the calls that take the settings' place.
        notes: what to know besides.
    """

    path: str
    to: Target
    migration: Migration
    sections: tuple[Section, ...]
    notes: tuple[str, ...]

    def text(self, form: Form) -> str:
        """The calls as text with a comment for each argument, and below as comments what has none."""
        below = _below(self.migration, self.to)
        return python_text(self.sections, below) if form == "python" else yaml_text(self.sections, below)

    def warnings(self) -> list[str]:
        """What to look at, each with the setting that it is about."""
        found = []
        for item in self.migration.settings:
            told = {
                "nemo2": item.warnings,
                "megatron-bridge": (item.bridge_warning,) if item.bridge else (),
                "anyckpt": (item.saver_warning,),
            }
            found += [f"{item.key}: {warning}" for warning in told[self.to] if warning]
        return found

    def unknown(self) -> list[str]:
        """Settings that the table does not have."""
        return [item.key for item in self.migration.settings if item.outcome == "unknown"]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "path": self.path,
            "to": self.to,
            "calls": {
                section.name: {
                    "_target_": section.target,
                    **{name: value for name, (value, _) in section.arguments.items()},
                }
                for section in self.sections
            },
            "settings": [
                {
                    "key": item.key,
                    "value": item.value,
                    "did": item.did,
                    "outcome": item.outcome,
                    "arguments": {".".join(name): value for name, value in item.arguments.items()},
                    "note": item.note,
                    "warnings": list(item.warnings),
                }
                for item in self.migration.settings
            ],
            "defaults": [
                {"key": item.key, "argument": ".".join(item.argument), "was": item.was, "now": item.now}
                for item in self.migration.defaults
            ],
            "unknown": self.unknown(),
            "notes": list(self.notes),
        }


def migrate_config(path: str | os.PathLike[str], *, to: Target = "nemo2") -> MigratedConfig:
    """Read a NeMo 1 training YAML, or a ``model_config.yaml``, and say what becomes of each setting.

    Args:
        path: the file.  Settings of the model may stand under ``model`` or at the top.
        to: "nemo2"; or "megatron-bridge", of which only the checkpoint section is meant; or "anyckpt", for the options
            of ``anyckpt.torch``.

    Raises:
        UsageError: there is no such file, or it is too large to be a configuration.
        FormatError: it is no YAML mapping.
    """
    if to not in TARGETS:
        raise UsageError("knows no such target", expected=", ".join(TARGETS), found=to)
    name = os.fspath(path)
    try:
        if os.path.getsize(name) > _LIMIT:
            raise UsageError("is too large for a configuration", path=name, expected=f"at most {_LIMIT:,} bytes")
        data = Path(name).read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot be read: {error.strerror or error}", path=name, remedy="give a training file or model_config.yaml"
        ) from error
    config = {} if load_yaml(data, name) is None else load_yaml_mapping(data, name)
    notes = [] if config else ["the file has no settings"]
    if not config.keys() & _WHOLE_FILES and config.keys() & _MODEL_FILES:
        config = {"model": config}
        notes.append("the settings at the top are taken for those of the model")
    migration = migrate(config)
    sections = (_bridge(migration),) if to == "megatron-bridge" else calls(migration, to)
    return MigratedConfig(name, to, migration, sections, tuple(notes))


def write_migrated(done: MigratedConfig, path: str | os.PathLike[str], form: Form, *, overwrite: bool = False) -> None:
    """Write the text; it appears whole or not at all.

    Raises:
        OutputError: the file exists, or cannot be written.
    """
    write_text(os.fspath(path), done.text(form), overwrite=overwrite)


def calls(migration: Migration, to: Target) -> tuple[Section, ...]:
    """The calls of a target other than Megatron-Bridge that take the settings' place."""
    classes = migration.classes if to == "nemo2" else migration.saver_classes
    found: dict[str, dict[str, tuple[Any, str]]] = {name: {} for name in classes}
    for item in migration.settings:
        for (section, argument), value in (item.arguments if to == "nemo2" else item.saver).items():
            found[section].pop(argument, None)
            found[section][argument] = value, item.key
    kept = found.get("retention")
    if kept and "best" not in kept and kept.get("last") != (None, _TOP_K):
        kept["best"] = _USUAL_TOP_K, f"{_TOP_K}, which NeMo 1 takes where nothing is said"
    return tuple(Section(name, classes[name], arguments) for name, arguments in found.items() if arguments)


def _bridge(migration: Migration) -> Section:
    arguments = {
        name: (value, item.key)
        for item in migration.settings
        if item.outcome == "carried"
        for name, value in item.bridge.items()
    }
    return Section("checkpoint", _BRIDGE, arguments)


def _below(migration: Migration, to: Target) -> list[str]:
    """What has no argument, as lines for people."""
    lines: list[str] = []
    groups: Mapping[str, str] = {
        "not given": "must be given where the script is started",
        "unresolved": "what these stand for is not in the file",
        "elsewhere": "has another place, which is no argument",
        "gone": "nothing does this any more",
        "unset": "is null: nothing is passed",
        "unknown": "is not known: look it up in your own code",
    }
    left = [item for item in migration.settings if not _has_argument(item, to)]
    for outcome, title in groups.items():
        chosen = [item for item in left if item.outcome == outcome]
        if chosen:
            lines += ["", f"{title}:"] + [_line(item) for item in chosen]
    if to != "nemo2":
        chosen = [item for item in left if item.outcome == "carried"]
        if chosen:
            lines += ["", "is no matter of saving and loading:"] + [f"  {item.key}" for item in chosen]
    if to == "nemo2" and migration.defaults:
        lines += ["", "the file does not say these; NeMo 1 took -> NeMo 2 takes:"]
        lines += [
            f"  {item.key}: {item.was} -> {item.now} ({item.argument[1]})"
            + (": pass the old value to keep it" if item.was != item.now else "")
            for item in migration.defaults
        ]
    return [printable(line) for line in lines]


def _has_argument(item: Setting, to: Target) -> bool:
    arguments = {"nemo2": item.arguments, "megatron-bridge": item.bridge, "anyckpt": item.saver}[to]
    return item.outcome == "carried" and bool(arguments)


def _line(item: Setting) -> str:
    told = [item.note] if item.note else []
    told += [f"look: {warning}" for warning in item.warnings if warning != item.note]
    did = f" ({item.did})" if item.did else ""
    return f"  {item.key}: {_short(item.value)}{did}" + (f" -> {'; '.join(told)}" if told else "")


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
