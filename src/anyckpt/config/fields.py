"""Tables of rows that are read one way and written the other: which keys of a framework say which fields of the hub.

A row is a ``Codec``.  Most are a ``Field``, one key for one field; ``codecs`` has those that are more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from anyckpt.config.model import ModelConfig, whole
from anyckpt.config.reader import Reader
from anyckpt.data_classes import dataclass


class _Required:
    """Marks a field that a configuration must have."""


REQUIRED = _Required()


class Codec:
    """Hub fields and the keys of a framework's configuration that say them: what ``write`` writes, ``read`` reads.

    Nobody compares or prints rows, and the code for it is most of what it takes to make a dataclass; so those that are
    used at every start are without.
    """

    @property
    def hubs(self) -> tuple[str, ...]:
        """Fields of ``ModelConfig`` that are read."""
        return ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that the row looks after: no other row's, and no user's."""
        return ()

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        """The hub fields.

        Args:
            reader: the configuration.
            defaults: by key, what its absence means in this model's class.
            found: hub fields that have been read, those of the rows before.

        Raises:
            MappingError: a value is not of its type, or not one that the model can have.
        """
        return {}

    def missing(self, found: Mapping[str, Any]) -> str | None:
        """The key without which a configuration is incomplete, where what was found has not what it says."""
        return None

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        """The keys; what a user should know is appended to ``notes``.

        Raises:
            MappingError: they cannot say the model.
        """
        return {}


class OfKey(Codec):
    """What one key says.

    Attributes:
        key: the framework's key.
    """

    key: str

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)


class OneKey(OfKey):
    """A hub field and the one key that says it.

    Attributes:
        hub: field of ``ModelConfig``.
    """

    hub: str

    @property
    def hubs(self) -> tuple[str, ...]:
        return (self.hub,)


@dataclass(frozen=True)
class Field(OneKey):
    """A hub field that is what a key of a framework's configuration says.

    Attributes:
        hub: field of ``ModelConfig``.
        key: the framework's key; written under it.
        reader: from ``Reader``'s methods: ``integer``, ``number``, ``flag``, ``text`` or ``tokens``.
        default: what it means that the key is absent or null; ``REQUIRED``, a value, or a function of the fields
            parsed so far (tables are read in order), of which required ones may be None.
        aliases: further spellings that are read.
        unset: what is written where the hub has None; a value, or a function of the configuration.
        null: null is written, for it means something else than that the key is absent.
        terse: neither None nor the default is written.
        whole: a number is written as an integer where it is one.
    """

    hub: str
    key: str
    reader: str = "integer"
    default: Any = REQUIRED
    aliases: tuple[str, ...] = ()
    unset: Any = None
    null: bool = False
    terse: bool = False
    whole: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key, *self.aliases)

    def read(self, reader: Reader, defaults: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
        values = reader.values
        for key in (self.key, *self.aliases):
            if values.get(key) is not None:
                value = getattr(reader, self.reader)(key)
                break
        else:
            value = defaults.get(self.key)
            if value is not None and self.default is None and self.key in values:
                value = None  # an explicit null, where null means something
        if value is None and self.default is not REQUIRED:
            value = self.default(found) if callable(self.default) else self.default
        return {self.hub: value}

    def missing(self, found: Mapping[str, Any]) -> str | None:
        return self.key if self.default is REQUIRED and found[self.hub] is None else None

    def write(self, config: ModelConfig, notes: list[str]) -> Mapping[str, Any]:
        value = getattr(config, self.hub)
        if self.terse and value in (None, self.default(vars(config)) if callable(self.default) else self.default):
            return {}
        if value is None:
            value = self.unset(config) if callable(self.unset) else self.unset
        if isinstance(value, tuple):
            value = list(value)
        elif self.whole and value is not None:
            value = whole(value)
        return {self.key: value}


def render_fields(table: Iterable[Codec], config: ModelConfig) -> dict[str, Any]:
    """A framework's keys and values from a table; tuples become lists."""
    rendered: dict[str, Any] = {}
    for row in table:
        rendered.update(row.write(config, []))
    return rendered


# -- what several tables have --------------------------------------------------------------------------------


def four_widths(found: Mapping[str, Any]) -> int | None:
    """Megatron's default of ``ffn_hidden_size``."""
    hidden: int | None = found["hidden_size"]
    return None if hidden is None else 4 * hidden


def share_of_a_head(found: Mapping[str, Any]) -> int | None:
    """Megatron's default of ``kv_channels``."""
    hidden, heads = found["hidden_size"], found["num_attention_heads"]
    return None if hidden is None or heads is None else hidden // max(1, heads)


def as_many_as_heads(found: Mapping[str, Any]) -> int | None:
    """Megatron's default of ``num_query_groups``."""
    heads: int | None = found["num_attention_heads"]
    return heads


OPTIONAL = (
    Field("window_attn_skip_freq", "window_attn_skip_freq", "frequency", None),
    Field("rotary_base_local", "rotary_base_local", "number", None),
    Field("query_pre_attn_scalar", "query_pre_attn_scalar", "number", None),
    Field("attn_logit_softcapping", "attn_logit_softcapping", "number", None),
    Field("final_logit_softcapping", "final_logit_softcapping", "number", None),
    Field("parallel_residual", "parallel_residual", "flag", False),
    Field("shared_layernorm", "shared_layernorm", "flag", False),
)
"""Fields that few families have, which Megatron's arguments and NeMo 1 are told only where they say something.

They are ours there: Megatron-LM and NeMo 1 ignore them, and a family's ``caveats`` say so.
"""


def render_changed(table: Iterable[Field], config: ModelConfig) -> dict[str, Any]:
    """The same of those rows alone whose fields are not as ``ModelConfig`` has them by default."""
    return render_fields([row for row in table if getattr(config, row.hub) != getattr(_BLANK, row.hub)], config)


_BLANK = ModelConfig("", 1, 1, 1, 1, 1, 1)
