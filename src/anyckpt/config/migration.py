"""The settings of a NeMo 1 training file under their names in NeMo 2, and what became of those that have none.

The table is ``data/nemo1_settings.yaml``; values that change on the way are in ``migration_values``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import field, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

from anyckpt.config.defaults import of_class
from anyckpt.config.interpolation import resolve
from anyckpt.config.migration_values import CHANGES
from anyckpt.data_classes import dataclass
from anyckpt.plain_yaml import load_yaml_mapping

Outcome = Literal["carried", "unset", "elsewhere", "gone", "not given", "unresolved", "unknown"]
MISSING = "???"
"""What OmegaConf takes for a value that must be given on the command line."""

_EACH_SCHEDULER = ("max_steps", "min_lr", "interval", "frequency", "monitor")
_USUAL_SCHEDULER = "CosineAnnealing"
_OUR_FORMATS = {"torch_dist": "megatron-core", "zarr": "megatron-core-zarr", "fsdp_dtensor": "dcp"}
_BRIDGE_FORMATS = ("torch", "torch_dist", "torch_dcp", "fsdp_dtensor")
_ON_TOP = "model.mcore_customization_config."
_LAST = ("retention", "last")
_STATE_SPACE = ("hybrid_override_pattern", "mamba_num_groups")


@dataclass(frozen=True)
class Setting:
    """One setting of a NeMo 1 file and what becomes of it.

    Attributes:
        key: its dotted name.
        value: as written, interpolations resolved.
        did: what it does in NeMo 1; empty if that is not known.
        outcome: "carried" to ``arguments``; "unset": null there, so that nothing is passed; "elsewhere" or "gone"
            with the reason in ``note``; "not given": it must be given where the script is started; "unresolved": what
            it stands for is not in the file; "unknown" to this table.
        arguments: (section, argument) -> value in NeMo 2.
        note: what has taken its place, or why nothing does it.
        warnings: what to look at.
        bridge: argument of Megatron-Bridge's ``CheckpointConfig`` -> value.
        bridge_warning: what to look at there.
        saver: section and argument of ``anyckpt.torch`` -> value.
        saver_warning: what to look at there.
    """

    key: str
    value: Any
    did: str = ""
    outcome: Outcome = "unknown"
    arguments: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    note: str = ""
    warnings: tuple[str, ...] = ()
    bridge: Mapping[str, Any] = field(default_factory=dict)
    bridge_warning: str = ""
    saver: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    saver_warning: str = ""


@dataclass(frozen=True)
class Default:
    """A setting that the file does not have and whose default is worth a look.

    Attributes:
        key: its dotted name in NeMo 1.
        argument: section and argument in NeMo 2.
        was: what NeMo 1 took.
        now: what NeMo 2 takes.
    """

    key: str
    argument: tuple[str, str]
    was: Any
    now: Any


@dataclass(frozen=True)
class Migration:
    """A NeMo 1 training file in NeMo 2's words.

    Attributes:
        settings: every setting of the file, in its order; what overrides others comes last.
        classes: section -> the class whose arguments it has.
        saver_classes: the same for ``Setting.saver``.
        defaults: what the file does not say of checkpoints, and of a cosine schedule.
    """

    settings: tuple[Setting, ...]
    classes: Mapping[str, str]
    saver_classes: Mapping[str, str]
    defaults: tuple[Default, ...]


def migrate(config: Mapping[str, Any]) -> Migration:
    """What becomes of every setting of a NeMo 1 training file.

    Args:
        config: the file as plain data, interpolations as they are written, the model's settings under ``model``.
    """
    resolved, troubles = resolve(config)
    table = _table()
    classes = dict(table["classes"])
    settings = []
    for key, value in _leaves(resolved, ()):
        if key in troubles:
            known = _row(key)
            settings.append(Setting(key, value, known.get("did", ""), "unresolved", note=troubles[key]))
        else:
            settings.append(_migrated(key, value, resolved))
    if any(item.saver.get(_LAST, 1) is None for item in settings):  # all are kept: nothing else may say how many
        settings = [
            replace(item, saver={k: v for k, v in item.saver.items() if k != _LAST or v is None}) for item in settings
        ]
    on_top = [item for item in settings if item.key.startswith(_ON_TOP)]
    settings = [item for item in settings if not item.key.startswith(_ON_TOP)] + on_top
    scheduler = _found(resolved, "model.optim.sched.name")
    if not isinstance(scheduler, str) or scheduler not in table["schedulers"]:
        scheduler = _USUAL_SCHEDULER
    classes["scheduler"] = f"nemo.lightning.pytorch.optim.{scheduler}Scheduler"
    settings = [_for_scheduler(item, scheduler, resolved) for item in settings]
    if any(name in _STATE_SPACE for item in settings for _, name in item.arguments):
        classes["model"] = "nemo.collections.llm.SSMConfig"
    said = {item.key for item in settings}
    passed = {name for item in settings for name in item.arguments}
    scheduled = scheduler == _USUAL_SCHEDULER and any(section == "scheduler" for section, _ in passed)
    defaults = [
        Default(key, name, row["was"], row["now"])
        for key, row in table["settings"].items()
        if "now" in row and key not in said
        for name in [_name(row["to"])]
        if name not in passed and (scheduled or name[0] != "scheduler")
    ]
    return Migration(tuple(settings), classes, table["saver_classes"], tuple(defaults))


def _name(to: str) -> tuple[str, str]:
    section, _, argument = to.partition(".")
    return section, argument


def _for_scheduler(item: Setting, scheduler: str, config: Mapping[str, Any]) -> Setting:
    """A setting of a scheduler as its class takes it: a part of all steps in steps, if it must be; or not at all."""
    takes = (*_EACH_SCHEDULER, *_table()["schedulers"][scheduler].split())
    for (section, argument), value in item.arguments.items():
        if section != "scheduler" or argument in takes:
            continue
        steps = argument.removesuffix("_ratio") + "_steps"
        whole = _found(config, "model.optim.sched.max_steps") or _found(config, "trainer.max_steps")
        if steps in takes and argument != steps and _is_number(value) and _is_number(whole) and whole > 0:
            count = int(value * whole)
            warning = f"{scheduler}Scheduler takes {steps}: {value} of {whole} steps are {count}"
            return replace(item, arguments={(section, steps): count}, warnings=(*item.warnings, warning))
        remedy = f": give {steps}" if steps in takes else ""
        note = f"{scheduler}Scheduler takes no {argument}{remedy}"
        return replace(item, outcome="gone", arguments={}, note=note, warnings=(*item.warnings, note))
    return item


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@cache
def _table() -> dict[str, Any]:
    path = Path(__file__).parent / "data" / "nemo1_settings.yaml"
    return load_yaml_mapping(path.read_bytes(), str(path))


def _leaves(value: Mapping[str, Any], at: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        path = (*at, str(name))
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, path)
        else:
            yield ".".join(path), None if isinstance(item, Mapping) else item


def _row(key: str) -> Mapping[str, Any]:
    """What the table says of a name: by itself, else by the first pattern that it has."""
    # Scripts that only run a model have its parallel sizes at the top.
    return _matched(key) or ({} if "." in key else _matched(f"model.{key}"))


def _matched(key: str) -> Mapping[str, Any]:
    rows: Mapping[str, Mapping[str, Any]] = _table()["settings"]
    if key in rows:
        return rows[key]
    parts = key.split(".")
    for pattern, row in rows.items():
        wanted = pattern.split(".")
        if wanted[-1] == "**" and len(parts) >= len(wanted):
            wanted, shown = wanted[:-1], parts[: len(wanted) - 1]
        else:
            shown = parts
        if len(shown) == len(wanted) and all(map(fnmatchcase, shown, wanted)):
            return row
    return {}


def _migrated(key: str, value: Any, config: Mapping[str, Any]) -> Setting:
    row = _row(key)
    setting = Setting(key, value, row.get("did", ""))
    if not row:
        return setting
    warnings = [row["warn"]] if "warn" in row and _is_meant(row, value) else []
    note = "; ".join(row[word] for word in ("gone", "elsewhere") if word in row)
    if value == MISSING:
        return replace(setting, outcome="not given", note="to be given where the script is started")
    if "to" not in row:
        outcome: Outcome = "gone" if "gone" in row else "elsewhere"
        return replace(setting, outcome=outcome, note=note, warnings=tuple(warnings) if _says_something(value) else ())
    if value is None or ("needs" in row and not _found(config, row["needs"])):
        return replace(setting, outcome="unset")
    section, _, argument = row["to"].partition(".")
    if argument.endswith("*"):
        argument = key.rpartition(".")[2]
    takes = _table()["takes"].get(section)
    if takes is not None and argument not in takes.split():
        note = f"{_table()['classes'][section]} has no argument {argument}"
        return replace(setting, outcome="gone", note=note, warnings=(note,))
    change = CHANGES.get(row.get("as", ""))
    arguments = {(section, argument): value}
    if change is not None:
        arguments, more = change((section, argument), value, config)
        warnings += more
    if (
        section == "model"
        and row["to"].endswith("*")
        and argument not in {**of_class("nemo2", "GPTConfig"), **_model_arguments()}
    ):
        warnings.append(f"GPTConfig has no field {argument}: a class of its own may have")
    plain = next(iter(arguments.values()), None)
    saved, saver_warning = _for_saver(row.get("saver", ""), plain)
    bridged, bridge_warning = _bridged(row, value, plain)
    return replace(
        setting,
        outcome="carried" if arguments else "unset",
        arguments=arguments,
        warnings=tuple(warnings),
        bridge={row["bridge"]: bridged} if "bridge" in row and arguments else {},
        bridge_warning=bridge_warning,
        saver=saved,
        saver_warning=saver_warning,
    )


def _bridged(row: Mapping[str, Any], value: Any, plain: Any) -> tuple[Any, str]:
    """The value in Megatron-Bridge's checkpoint section, and what to look at there."""
    warning = row.get("bridge_warn", "")
    kind = row.get("bridge_as")
    if kind == "negated":
        return not value, warning
    if kind == "torch_dist" and value not in _BRIDGE_FORMATS:
        return "torch_dist", f"Megatron-Bridge does not write {value}"
    return (value if kind == "value" else plain), warning


def _for_saver(where: str, value: Any) -> tuple[dict[tuple[str, str], Any], str]:
    """The value for our own saver, and what to look at there."""
    section, _, argument = where.partition(".")
    if not where or value is None:
        return {}, ""
    if argument == "format":
        return {(section, argument): _OUR_FORMATS.get(value, value)}, ""
    if argument == "within":
        return {}, "Options takes the data-parallel group itself: within=group" if value else ""
    if argument == "last":
        return ({(section, argument): 1} if value else {}), ""
    if argument == "best" and isinstance(value, int) and value < 0:
        return {_LAST: None}, ""
    return {(section, argument): value}, ""


def _is_meant(row: Mapping[str, Any], value: Any) -> bool:
    if "when" in row:
        return bool(value == row["when"])
    return "unless" not in row or bool(value != row["unless"])


def _found(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


@cache
def _model_arguments() -> dict[str, str]:
    """Arguments of the model's configuration that the table has, some of which have no default."""
    targets = [row["to"].partition(".") for row in _table()["settings"].values() if "to" in row]
    return {argument: section for section, _, argument in targets if section == "model"}


def _says_something(value: Any) -> bool:
    return value not in (None, False, "", [])
