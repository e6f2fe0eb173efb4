"""How tensor parallelism divides each kind of parameter: one table of names, and what its words mean.

Kinds go by name alone, never by shape or position.  Sources: what Megatron-Core 0.16's layers say of their parameters
(``partition_dim``, ``partition_stride``) and rank files that it wrote, except where the table says otherwise.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError, UsageError
from anyckpt.layout.geometry import Geometry
from anyckpt.tensor import LazyTensor

KINDS: Mapping[str, str] = {
    "column": "along axis 0",
    "row": "along axis 1",
    "halves": "each half of axis 0 separately",
    "gate-up": "as halves if the model's MLP is gated, else as column",
    "qkv": "along axis 0, rows interleaved by query group",
    "vocabulary": "along axis 0 after padding",
    "replicated": "not at all",
    "latent-down": "not at all, or along axis 0: MLA's down projections",
    "mamba-in": "each of z, x, B, C, dt along axis 0",
    "mamba-conv": "each of x, B, C along axis 0",
    "delta-in": "each of query, key, value, z, beta, alpha along axis 0",
    "delta-conv": "each of query, key, value along axis 0",
    "alone": "not at all, nor are there several ranks: its framework cannot divide the module",
    "dropped": "carries no weights",
}
"""What a rule may say; besides, ``blocks:a,b,c`` divides each of the blocks of axis 0 of these global lengths."""

PLACES = ("layer", "first", "last", "all", "norm")
"""Where in the pipeline a tensor is: with its layer; on the first or last chunk; on all; a stack's final norm."""

_NORM = "{weight,bias}"
_COLUMN_BASES = "{linear_qkv,linear_q,linear_kv,linear_q_proj,linear_q_up_proj,linear_kv_up_proj}"
_NEMO_COLUMN = "{lora_kqv_adapter,lora_q_adapter,lora_kv_adapter}"
_NEMO_ROW = "{lora_dense_attention_adapter,lora_4htoh_adapter}"

TABLE: tuple[tuple[str, str], ...] = (
    ("**._extra_state*", "dropped"),
    ("**.inv_freq", "dropped"),
    # embeddings and heads
    ("embedding.word_embeddings.weight", "vocabulary@first"),
    ("embedding.{position_embeddings,tokentype_embeddings}.weight", "replicated@first"),
    ("output_layer.{weight,bias}", "vocabulary@last"),
    ("lm_head.output_layer.{weight,bias}", "vocabulary@last"),
    ("lm_head.bias", "vocabulary@last"),
    ("lm_head.{dense,layer_norm,layernorm,norm}.{weight,bias}", "replicated@last"),
    ("{pooler.dense,binary_head}.{weight,bias}", "replicated@last"),
    ("{encoder,decoder}_relative_pos_emb.relative_attention_bias.weight", "replicated@all"),
    # vision encoders
    ("class_token", "replicated@first"),
    ("{conv1,position_embeddings,ln_pre}.{weight,bias}", "replicated@first"),
    ("ln_post.{weight,bias}", "replicated@last"),
    ("{post_layernorm,layernorm,visual_projection,classifier}.{weight,bias}", "replicated@last"),
    # norms
    ("{encoder,decoder}.{final_layernorm,final_norm}.{weight,bias}", "replicated@norm"),
    ("encoder.initial_layernorm.{weight,bias}", "replicated@first"),
    ("**.{layer_norm_weight,layer_norm_bias}", "replicated"),
    ("**.mixer.norm.{weight,bias}", "column"),
    ("**.*layernorm.{weight,bias}", "replicated"),
    ("**.layers.*.norm.{weight,bias}", "replicated"),
    ("**.{enorm,hnorm}.{weight,bias}", "replicated"),
    # attention
    ("**.linear_qkv.{weight,bias}", "qkv"),
    (f"**.{_COLUMN_BASES}.{_NORM}", "column"),
    ("**.{linear_q_down_proj,linear_kv_down_proj}.weight", "latent-down"),
    ("**.linear_qkv_down_proj.weight", "replicated"),
    ("**.core_attention.softmax_offset", "column"),
    ("**.linear_proj.weight", "row"),
    ("**.linear_proj.bias", "replicated"),
    # MLP and experts
    ("**.linear_fc1.{weight,bias}", "gate-up"),
    ("**.linear_fc2.weight", "row"),
    ("**.linear_fc2.bias", "replicated"),
    # in place of attention or MLP in heterogeneous models
    ("**.layers.*.{self_attention,mlp}.weight", "column"),
    ("**.router.{weight,bias,expert_bias}", "replicated"),
    ("**.shared_experts.gate_weight", "replicated"),
    # multi-token prediction
    ("**.eh_proj.{weight,bias}", "column"),
    # Mamba-2 (the underscored names are Megatron-LM main's)
    ("**.mixer.in_proj.{weight,bias}", "mamba-in"),
    ("**.mixer.{conv1d.weight,conv1d.bias,conv1d_weight,conv1d_bias}", "mamba-conv"),
    ("**.mixer.{A_log,D,dt_bias}", "column"),
    ("**.mixer.out_proj.weight", "row"),
    ("**.mixer.out_proj.bias", "replicated"),
    # the indexer of sparse attention
    ("**.core_attention.indexer.{linear_wq_b,linear_wk,k_norm,linear_weights_proj}.{weight,bias}", "replicated"),
    # gated delta nets
    ("**.self_attention.in_proj.{weight,bias}", "delta-in"),
    ("**.self_attention.conv1d.{weight,bias}", "delta-conv"),
    ("**.self_attention.{A_log,dt_bias}", "column"),
    ("**.self_attention.out_norm.weight", "replicated"),
    ("**.self_attention.out_proj.weight", "row"),
    # Griffin of NeMo 1, whose convolution and gated recurrence are as wide as the model on every rank
    ("**.recurrent_layer.{linear_in,linear_out,conv_1d.conv_1d}.{weight,bias}", "alone"),
    ("**.recurrent_layer.rg_lru.a_param", "alone"),
    ("**.recurrent_layer.rg_lru.{input_gate,a_gate}.{w,b}", "alone"),
    # LoRA and DoRA of Megatron-Bridge and NeMo 2; linear_in of a column layer is divided along the rank
    ("**.linear_fc1.adapter.{linear_out.weight,weight_magnitude}", "gate-up"),
    ("**.{linear_proj,linear_fc2}.adapter.linear_in.weight", "row"),
    ("**.{linear_proj,linear_fc2}.adapter.weight_magnitude", "replicated"),
    ("**.adapter.{linear_in.weight,linear_out.weight,weight_magnitude}", "column"),
    ("**.adapter.*.{linear_in.weight,linear_out.weight}", "column"),
    # LoRA of NeMo 1
    ("**.adapter_layer.lora_hto4h_adapter.linear_out.weight", "gate-up"),
    (f"**.adapter_layer.{_NEMO_ROW}.linear_in.weight", "row"),
    (f"**.adapter_layer.{_NEMO_ROW}.linear_out.weight", "column"),
    (f"**.adapter_layer.{_NEMO_COLUMN}.{{linear_in,linear_out}}.weight", "column"),
    ("**.adapter_layer.lora_hto4h_adapter.linear_in.weight", "column"),
    (
        "**.adapter_layer.{lora_unfused_kqv_adapter,lora_unfused_hto4h_adapter}.*.{linear_in,linear_out}.weight",
        "column",
    ),
)
"""Pattern -> kind, with ``@place`` for what is outside layers; the first match counts.

``**.`` is any number of leading parts, ``*`` stays inside a part, ``{a,b}`` is either.  Only read in the
sources, not observed: Mamba, attention sinks, LoRA and DoRA of Bridge, vision encoders.
"""


class Partition(ABC):
    """A way to divide a tensor that ``KINDS`` has no word for: a family's own, which its rules bring along.

    Attributes:
        place: where in the pipeline a tensor outside layers is: ``first``, ``last`` or ``all``; None is not said, with
            which a model can have one stage only.
    """

    place: str | None = None

    @abstractmethod
    def cut(self, name: str, whole: LazyTensor, ways: int) -> Sequence[LazyTensor]:
        """What each of so many tensor-parallel ranks holds, in rank order: views.

        Args:
            name: the hub's, for messages.
            whole: the tensor.
            ways: how many ranks there are; may be 1.

        Raises:
            MappingError: it cannot be divided so.
        """

    @abstractmethod
    def join(self, name: str, parts: Sequence[LazyTensor]) -> LazyTensor:
        """The inverse of ``cut``.

        Raises:
            MappingError: the parts do not make up a tensor.
        """


@dataclass(frozen=True)
class Kind:
    """What is known of a name.

    Attributes:
        name: one of ``KINDS``, or ``blocks:...``; ``own`` for a way of the family's own.
        place: one of ``PLACES``, None if a rule of a user or a family does not say.
        own: that way.
    """

    name: str
    place: str | None
    own: Partition | None = None


@dataclass(frozen=True)
class Division:
    """How one tensor is divided.

    Attributes:
        axis: None if every rank holds the whole.
        blocks: global lengths of the blocks that are divided separately, or how many equal ones there are.
        vocabulary: padded before it is divided.
        rows: length of axis 0 of the whole tensor where it is known.
        of_layer: that length is the layer's, of which ``Geometry.query_key_value_rows`` knows.
        either: what ranks hold tells whether it is divided; ``axis`` is how to cut it.
        alone: there is one rank.
        own: a family's way to divide it, in place of axis and blocks.
    """

    axis: int | None
    blocks: tuple[int, ...] | int = 1
    vocabulary: bool = False
    rows: int | None = None
    of_layer: bool = False
    either: bool = False
    alone: bool = False
    own: Partition | None = None

    def at(self, layer: int, geometry: Geometry) -> Division:
        """The same of a layer, as the whole model counts."""
        return replace(self, rows=geometry.query_key_value_rows(layer)) if self.of_layer else self


class Rules:
    """What a user says, before what the model's family says, before the table.

    Args:
        extra: the user's rules: pattern -> kind, as in ``TABLE``.
        family: the family's: name of the hub with ``*`` for every number -> kind.

    Raises:
        UsageError: a rule says what no rule can.
    """

    def __init__(
        self, extra: Mapping[str, str] | None = None, family: Mapping[str, str | Partition] | None = None
    ) -> None:
        self._extra = [(_compiled(pattern), _kind(pattern, text, own=False)) for pattern, text in (extra or {}).items()]
        self._family = {_NUMBER.sub("*", hub): _kind(hub, said, own=False) for hub, said in (family or {}).items()}
        self._found: dict[str, Kind | None] = {}

    def kind(self, name: str, of_expert: bool = False) -> Kind | None:
        """What is known of a name of the hub, or None.

        Args:
            name: the name; an expert's without its index.
            of_expert: it is one expert's.  Experts stacked into one tensor are for a user's rule only.
        """
        plain = name.replace(".to_wrap.", ".")  # Megatron-Bridge's name of a layer that has an adapter
        for expression, own in self._extra:
            if expression.fullmatch(plain):
                return own
        key = _NUMBER.sub("*", plain)
        of_family = self._family.get(f"{key}*" if of_expert else key)
        if of_family is not None:
            return of_family
        if key not in self._found:
            self._found[key] = next((kind for test, kind in _builtin() if test.fullmatch(plain)), None)
        kind = self._found[key]
        stacked = ".experts." in plain and not of_expert
        return None if stacked and kind is not None and kind.name != "dropped" else kind


def division(kind: Kind, name: str, geometry: Geometry) -> Division:
    """How a tensor of this kind is divided.

    Raises:
        MappingError: the model's sizes, which this kind needs, are not known.
    """
    if kind.own is not None:
        return Division(0, own=kind.own)
    if kind.name.startswith("blocks:"):
        return Division(0, tuple(int(size) for size in kind.name[7:].split(",")))
    if kind.name.startswith("mamba"):
        if geometry.mamba is None:
            raise MappingError(
                "is a Mamba layer's, but the sizes of the model's Mamba layers are not known",
                tensor=name,
                remedy="give a complete configuration with --config",
            )
        return Division(0, geometry.mamba.in_proj if kind.name == "mamba-in" else geometry.mamba.conv1d)
    if kind.name.startswith("delta"):
        if geometry.delta is None:
            raise MappingError(
                "is a gated delta net's, but the sizes of the model's are not known",
                tensor=name,
                remedy="give a complete configuration with --config",
            )
        return Division(0, geometry.delta.in_proj if kind.name == "delta-in" else geometry.delta.conv1d)
    if kind.name == "latent-down":
        return _latent_down(name, geometry)
    if kind.name == "qkv":
        return Division(0, of_layer=True)
    simple: Mapping[str, Division] = {
        "column": Division(0),
        "row": Division(1),
        "halves": Division(0, 2),
        "gate-up": Division(0, 2 if geometry.gated_linear_unit else 1),
        "vocabulary": Division(0, vocabulary=True),
        "replicated": Division(None),
        "alone": Division(None, alone=True),
    }
    return simple[kind.name]


def _latent_down(name: str, geometry: Geometry) -> Division:
    latent = geometry.latent
    if latent is None:
        return Division(None)
    of_query = ".linear_q_down_proj." in name
    rows = latent.q_lora_rank if of_query else latent.kv_lora_rank + latent.qk_pos_emb_head_dim
    return Division(0 if latent.down_parallel else None, rows=rows, either=True)


def unknown(names: Iterable[str], path: str | None = None) -> MappingError:
    """The error for names that no rule covers."""
    listed = list(names)
    shown = ", ".join(listed[:10]) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")
    return MappingError(
        "no rule says how tensor parallelism divides these tensors",
        path=path,
        found=shown,
        remedy='give a rules file with a line for each, such as "' + _NUMBER.sub("*", listed[0]) + ': column" '
        f"(kinds: {', '.join(KINDS)}; after it @first, @last or @all for what is outside layers)",
    )


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_BLOCKS = re.compile(r"blocks:[1-9]\d{0,11}(,[1-9]\d{0,11})*")


def _kind(pattern: str, text: str | Partition, own: bool) -> Kind:
    if isinstance(text, Partition):
        return Kind("own", text.place, text)
    name, at, place = str(text).replace(" ", "").partition("@")
    if (name not in KINDS and not _BLOCKS.fullmatch(name)) or (at and place not in PLACES):
        raise UsageError(
            f"the partition rule for {pattern!r} is not understood",
            expected=f"one of {', '.join(KINDS)}, or blocks:a,b,...; after it @first, @last or @all where needed",
            found=repr(text)[:80],
        )
    return Kind(name, place if at else "layer" if own else None)


def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern as a regular expression."""
    parts: list[str] = []
    for piece in re.findall(r"\*\*\.|\*|\{[^{}]*\}|[^*{]+|.", pattern):
        if piece == "**.":
            parts.append(r"(?:[^.]+\.)*")
        elif piece == "*":
            parts.append(r"[^.]*")
        elif piece[0] == "{" and len(piece) > 1:
            parts.append("(?:" + "|".join(re.escape(word) for word in piece[1:-1].split(",")) + ")")
        else:
            parts.append(re.escape(piece))
    return re.compile("".join(parts))


def _builtin() -> list[tuple[re.Pattern[str], Kind]]:
    if not _BUILTIN:
        _BUILTIN.extend((_compiled(pattern), _kind(pattern, text, own=True)) for pattern, text in TABLE)
    return _BUILTIN


_BUILTIN: list[tuple[re.Pattern[str], Kind]] = []
