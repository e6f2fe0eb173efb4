"""mergekit's YAML as a request: every key is used, or refused by name.

Source of the keys and of what they mean: mergekit 0.1.5, ``config.py``, ``plan.py`` and ``merge_methods/``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from anyckpt.errors import UsageError
from anyckpt.operations.steps.merge_request import (
    METHODS,
    OVER_BASE,
    MergeRequest,
    ModelSource,
    Settings,
    Stretch,
    check_setting,
)
from anyckpt.operations.steps.user_files import read_config
from anyckpt.storage.location import public_path

_TOP = {
    "models",
    "slices",
    "merge_method",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "modules",
    "chat_template",
}
_NUMBERS = {
    "linear": {"weight", "normalize"},
    "slerp": {"t"},
    "passthrough": {"scale"},
    "task_arithmetic": {"weight", "normalize", "lambda"},
    "ties": {"weight", "density", "normalize", "rescale", "lambda"},
    "dare_linear": {"weight", "density", "normalize", "rescale", "lambda"},
    "dare_ties": {"weight", "density", "normalize", "rescale", "lambda"},
}
"""What each method reads of ``parameters``."""

_WITHOUT_EFFECT = {"int8_mask"}
"""How much memory mergekit takes, which is bounded here."""

_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def read_recipe(path: str, seed: int = 0) -> tuple[MergeRequest, list[str]]:
    """What a recipe asks for, and notes.

    Raises:
        FormatError: the file is no YAML.
        UsageError: it is no recipe, or asks for something that is not done here; the key is named.
    """
    given = read_config(path) or {}
    if "merge_method" not in given:
        raise UsageError("is no recipe of mergekit", path=path, expected="merge_method, and models or slices")
    return _Reader(given, path).request(seed)


class _Reader:
    def __init__(self, given: Mapping[str, Any], path: str) -> None:
        self.given = given
        self.path = path
        self.models: list[ModelSource] = []
        self.notes: list[str] = []
        self.method = str(given["merge_method"])

    def request(self, seed: int) -> tuple[MergeRequest, list[str]]:
        given = self.given
        self._check_keys(given, _TOP, "the recipe")
        if self.method not in METHODS:
            raise self._refused(f"merge_method {self.method}", expected=", ".join(METHODS))
        for key, instead in (
            ("modules", "merge the model's parts one by one, with --include"),
            ("chat_template", "set it in the tokenizer's files"),
        ):
            if given.get(key) is not None:
                raise self._refused(key, remedy=instead)
        if ("models" in given) == ("slices" in given):
            raise UsageError("the recipe has models or slices, one of the two", path=self.path)
        base = self._number(given["base_model"]) if given.get("base_model") is not None else None
        stretches = self._of_slices(base) if "slices" in given else (self._of_models(base),)
        tokenizer, same = self._tokenizer(base)
        request = MergeRequest(
            tuple(self.models),
            self.method,
            stretches,
            self._settings(given.get("parameters"), "parameters"),
            base=base if self.method in (*OVER_BASE, "slerp") else None,
            dtype=self._dtype(),
            tokenizer=tokenizer,
            one_tokenizer=same,
            seed=seed,
            required=True,
        )
        return request, self.notes

    def _of_models(self, base: int | None) -> Stretch:
        entries = self._entries(self.given["models"], {"model", "parameters"}, "models")
        found = [(self._number(entry["model"]), entry) for entry in entries]
        if base is not None and base not in [number for number, _ in found]:
            found.append((base, {}))
        return self._stretch(found, base, {}, "models")

    def _of_slices(self, base: int | None) -> tuple[Stretch, ...]:
        keys = {"sources", "base_model", "parameters", "residual_weight"}
        stretches = []
        for place, part in enumerate(self._entries(self.given["slices"], keys, "slices", needed="sources")):
            where = f"slices[{place}]"
            if part.get("residual_weight") is not None:
                raise self._refused(f"{where}.residual_weight")
            if part.get("base_model") is not None and self._number(part["base_model"]) != base:
                raise self._refused(f"{where}.base_model", remedy="say one base_model for all slices")
            sources = self._entries(part["sources"], {"model", "layer_range", "parameters"}, f"{where}.sources")
            found = [(self._number(entry["model"]), entry) for entry in sources]
            stretches.append(self._stretch(found, base, self._settings(part.get("parameters"), where), where))
        if len({len(stretch.models) for stretch in stretches}) > 1:
            raise self._refused("slices of different numbers of sources")
        return tuple(stretches)

    def _stretch(
        self, found: list[tuple[int, Mapping[str, Any]]], base: int | None, shared: Settings, where: str
    ) -> Stretch:
        numbers = [number for number, _ in found]
        if len(set(numbers)) < len(numbers):
            raise UsageError(f"the recipe names a model twice in {where}", path=self.path)
        if base is not None and self.method in (*OVER_BASE, "slerp"):
            if base not in numbers:
                raise UsageError(f"the recipe's {where} lack the base_model", path=self.path)
            found = sorted(found, key=lambda entry: entry[0] != base)
        elif self.method == "slerp":
            raise UsageError("slerp goes from base_model to the other model", path=self.path, expected="base_model")
        ranges = [entry.get("layer_range") for _, entry in found]
        layers = None
        if "layer_range" in found[0][1] or "slices" in self.given:
            layers = tuple(self._range(value, where) for value in ranges)
            if len({stop - start for start, stop in layers}) > 1:
                raise UsageError(f"the recipe's {where} have different numbers of layers", path=self.path, found=ranges)
        settings = tuple(self._settings(entry.get("parameters"), where) for _, entry in found)
        return Stretch(tuple(number for number, _ in found), layers, settings, shared)

    def _range(self, value: Any, where: str) -> tuple[int, int]:
        if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)):
            raise UsageError(
                f"the recipe's {where} has no layer_range", path=self.path, expected="[first, end]", found=value
            )
        if not 0 <= value[0] < value[1]:
            raise UsageError(f"the recipe's {where} has an empty layer_range", path=self.path, found=value)
        return value[0], value[1]

    def _number(self, said: Any) -> int:
        """The number of a model, ``PATH`` or ``PATH+ADAPTER``, or a mapping of these."""
        if isinstance(said, Mapping):
            self._check_keys(said, {"model", "lora"}, "model")
            parts = [self._path(said.get("model")), None if said.get("lora") is None else self._path(said["lora"])]
        else:
            parts = [*str(said).split("+", 1), None][:2]
        for path in parts:
            if path is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not os.path.exists(path):
                raise UsageError(
                    f"the recipe names the model {path}, which is not here",
                    path=self.path,
                    remedy=f"write hf:{path} in the recipe to read it from the Hub, or the folder of a copy",
                )
        adapter = None if parts[1] is None else public_path(parts[1])
        model = ModelSource(public_path(str(parts[0])), adapter)
        if model not in self.models:
            self.models.append(model)
        return self.models.index(model)

    def _path(self, said: Any) -> str:
        if isinstance(said, Mapping):
            self._check_keys(said, {"path"}, "model")
            said = said.get("path")
        if not isinstance(said, str):
            raise UsageError("the recipe has a model without a path", path=self.path, found=said)
        return said

    def _settings(self, given: Any, where: str) -> Settings:
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            raise UsageError(f"the recipe's parameters of {where} are no mapping", path=self.path, found=given)
        known = _NUMBERS[self.method]
        result = {}
        for key, value in given.items():
            if key in _WITHOUT_EFFECT:
                self.notes.append(f"the recipe's {key} is about mergekit's memory and changes nothing here")
            elif key not in known:
                raise self._refused(
                    f"the parameter {key} of {where}", expected=f"{', '.join(sorted(known))} for {self.method}"
                )
            else:
                check_setting(key, value, f"the recipe's {where}")
                result[key] = value
        return result

    def _tokenizer(self, base: int | None) -> tuple[int | None, bool]:
        said = self.given.get("tokenizer_source")
        block = self.given.get("tokenizer")
        if block is not None:
            if not isinstance(block, Mapping) or block.keys() - {"source"} or said is not None:
                raise self._refused("tokenizer with more than a source", remedy="give tokenizer_source")
            said = block.get("source")
        if said is None or (said == "base" and base is None):
            return None, False
        if said == "union":
            return None, True
        if said == "base":
            return base, False
        models = [*self.models]
        number = self._number(said)
        if number >= len(models):
            raise self._refused(f"tokenizer_source {said}, which is none of the models", remedy="give --tokenizer")
        return number, False

    def _dtype(self) -> str | None:
        said = self.given.get("out_dtype") or self.given.get("dtype")
        if said is None:
            return None
        if said not in _DTYPES:
            raise self._refused(f"dtype {said}", expected=", ".join(_DTYPES))
        return _DTYPES[said]

    def _entries(self, given: Any, keys: set[str], where: str, needed: str = "model") -> list[Mapping[str, Any]]:
        if not isinstance(given, list) or not given or not all(isinstance(e, Mapping) and needed in e for e in given):
            raise UsageError(f"the recipe's {where} are no list of entries with {needed!r}", path=self.path)
        for entry in given:
            self._check_keys(entry, keys, where)
        return given

    def _check_keys(self, given: Mapping[str, Any], known: set[str], where: str) -> None:
        unknown = next((key for key in given if key not in known), None)
        if unknown is not None:
            raise self._refused(f"the key {unknown} of {where}", expected=", ".join(sorted(known)))

    def _refused(self, what: str, expected: str | None = None, remedy: str | None = None) -> UsageError:
        return UsageError(
            f"the recipe has {what}, which is not done here", path=self.path, expected=expected, remedy=remedy
        )
