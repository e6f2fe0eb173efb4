"""What the layout needs to know of a model, and how a model is spread over ranks."""

from __future__ import annotations

import math
from typing import Any

from anyckpt.config.layer_blocks import LayerBlock
from anyckpt.data_classes import dataclass
from anyckpt.errors import MappingError, UsageError

_LARGEST = 1 << 20  # of a parallel size; beyond it, arithmetic on a hostile file is the attack


@dataclass(frozen=True)
class Mamba:
    """Sizes of a Mamba-2 mixer, in Megatron-Core's words (``mamba_num_heads`` and so on)."""

    num_heads: int
    head_dim: int
    num_groups: int
    state_dim: int

    @property
    def inner(self) -> int:
        """Width of z and of x."""
        return self.num_heads * self.head_dim

    @property
    def in_proj(self) -> tuple[int, ...]:
        """Rows of ``in_proj``: z, x, B, C, dt."""
        states = self.num_groups * self.state_dim
        return (self.inner, self.inner, states, states, self.num_heads)

    @property
    def conv1d(self) -> tuple[int, ...]:
        """Rows of ``conv1d``: x, B, C."""
        return self.in_proj[1:4]


@dataclass(frozen=True)
class Delta:
    """Sizes of a gated delta net, in Megatron-Core's words (``linear_num_key_heads`` and so on)."""

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int

    @property
    def in_proj(self) -> tuple[int, ...]:
        """Rows of ``in_proj``: query, key, value, z, beta, alpha."""
        keys, values = self.num_key_heads * self.key_head_dim, self.num_value_heads * self.value_head_dim
        return (keys, keys, values, values, self.num_value_heads, self.num_value_heads)

    @property
    def conv1d(self) -> tuple[int, ...]:
        """Rows of ``conv1d``: query, key, value."""
        return self.in_proj[:3]


@dataclass(frozen=True)
class Latent:
    """Sizes of multi-head latent attention, in Megatron-Core's words.

    Attributes:
        q_lora_rank: width of the query's latent, None if queries have none.
        kv_lora_rank: width of the keys' and values' latent.
        qk_pos_emb_head_dim: width of the rotary part of a key.
        down_parallel: when cutting, divide the down projections along axis 0, as Megatron-Core's local implementation
            does and, up to 0.11, that of Transformer Engine; later every rank has the whole.  When joining, their
            rows tell, by which Megatron itself goes at run time.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_pos_emb_head_dim: int
    down_parallel: bool = False


@dataclass(frozen=True)
class Geometry:
    """What partition rules need to know of a model.

    A size that is None is not checked; ``num_layers`` may be None only without pipeline parallelism.

    Attributes:
        num_layers: layers of the one stack, or of the decoder of an encoder-decoder.
        encoder_num_layers: layers of the encoder of an encoder-decoder; ``num_layers`` if None.
        mtp_num_layers: multi-token-prediction layers; as many as there are names if None.
        num_attention_heads: query heads.
        num_query_groups: key and value heads.
        kv_channels: width of one head.
        attention_output_gate: the fused QKV has a gate as wide as the query.
        gated_linear_unit: ``linear_fc1`` is gate and up, one after the other.
        num_experts: experts per MoE layer, None if the model is dense.
        share_embeddings_and_output_weights: the output layer is the embedding.
        vocab_size: true vocabulary; joining trims to it, None keeps rows as stored.
        padded_vocab_size: rows with padding: checked when joining, aimed at when cutting; None for what
            ``make_vocab_size_divisible_by`` says.
        make_vocab_size_divisible_by: rows are padded to a multiple of this times the tensor-parallel size.
        mamba: sizes of its Mamba-2 mixers, None if it has none.
        delta: sizes of its gated delta nets, None if it has none.
        blocks: what each layer of the stack is where they differ; None if they do not.
        latent: sizes of its multi-head latent attention, None if it has none or they are not known.
    """

    num_layers: int | None = None
    encoder_num_layers: int | None = None
    mtp_num_layers: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    attention_output_gate: bool = False
    gated_linear_unit: bool = False
    num_experts: int | None = None
    share_embeddings_and_output_weights: bool = False
    vocab_size: int | None = None
    padded_vocab_size: int | None = None
    make_vocab_size_divisible_by: int = 128
    mamba: Mamba | None = None
    delta: Delta | None = None
    latent: Latent | None = None
    blocks: tuple[LayerBlock, ...] | None = None

    def query_key_value_rows(self, layer: int) -> int | None:
        """Rows of a layer's global ``linear_qkv``, None if a size is unknown.

        Args:
            layer: index of the layer, as the whole model counts.
        """
        groups = self.num_query_groups
        if self.blocks is not None:
            groups = self.blocks[layer].num_query_groups if layer < len(self.blocks) else None
        if self.num_attention_heads is None or groups is None or self.kv_channels is None:
            return None
        queries = self.num_attention_heads * (2 if self.attention_output_gate else 1)
        return (queries + 2 * groups) * self.kv_channels

    def filled(self, layers: range) -> set[int]:
        """Those of so many layers, counted from the first of them, that have parameters."""
        blocks = self.blocks or ()
        return {layer - layers.start for layer in layers if layer >= len(blocks) or not blocks[layer].empty}

    @property
    def query_groups(self) -> set[int]:
        """How many query groups there are, in any layer."""
        if self.blocks is not None:
            return {block.num_query_groups for block in self.blocks if block.num_query_groups is not None}
        return set() if self.num_query_groups is None else {self.num_query_groups}

    def rows(self, stored: int, tensor_parallel: int) -> int:
        """Rows of a padded vocabulary tensor of which ``stored`` are given.

        Raises:
            MappingError: the padded size is below the vocabulary, or is no multiple of the ranks.
        """
        true = stored if self.vocab_size is None else self.vocab_size
        if self.padded_vocab_size is None:
            multiple = self.make_vocab_size_divisible_by * tensor_parallel
            return -(-true // multiple) * multiple
        if self.padded_vocab_size < true or self.padded_vocab_size % tensor_parallel:
            raise MappingError(
                "the padded vocabulary does not fit",
                expected=f"at least {true} rows, a multiple of tensor parallel size {tensor_parallel}",
                found=self.padded_vocab_size,
                remedy="choose another --make-vocab-size-divisible-by",
            )
        return self.padded_vocab_size


@dataclass(frozen=True)
class Parallelism:
    """How a model is spread over ranks, in the words of Megatron-Core's arguments.

    Attributes:
        tensor_parallel: ranks that share each layer.
        pipeline_parallel: stages.
        virtual_pipeline: chunks per stage; 1 is none.
        expert_parallel: ranks that share the experts.
        expert_tensor_parallel: ranks that share each expert; ``tensor_parallel`` if None.  It need not divide
            ``tensor_parallel`` as long as folders' names tell experts' parts apart.
        num_layers_in_first_pipeline_stage: where the first stage differs from the others.
        num_layers_in_last_pipeline_stage: where the last stage differs from the others.
        account_for_embedding: the embedding takes the place of a layer when layers are dealt out.
        account_for_loss: the output layer does.
        pipeline_layout: ``pipeline_model_parallel_layout``: a string, a list of stages, or the object that Megatron
            keeps in ``args``; see ``pipeline.parse_layout``.
        pipeline_split_rank: first decoder stage of an encoder-decoder.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int | None = None
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    account_for_embedding: bool = False
    account_for_loss: bool = False
    pipeline_layout: Any = None
    pipeline_split_rank: int | None = None

    @property
    def expert_ways(self) -> int:
        """Ranks that share each expert."""
        return self.tensor_parallel if self.expert_tensor_parallel is None else self.expert_tensor_parallel

    def check(self) -> None:
        """Raise UsageError unless ranks can be laid out so."""
        sizes = {
            "tensor parallel size": self.tensor_parallel,
            "pipeline parallel size": self.pipeline_parallel,
            "virtual pipeline size": self.virtual_pipeline,
            "expert parallel size": self.expert_parallel,
            "expert tensor parallel size": self.expert_ways,
        }
        for name, size in sizes.items():
            if type(size) is not int or not 0 < size <= _LARGEST:
                raise UsageError(f"the {name} is not possible", expected="a positive whole number", found=size)
        if self._period < self.expert_ways:
            raise UsageError(
                "per-rank files cannot hold this expert tensor parallel size: a folder's name tells the tensor and the "
                f"expert rank, and ranks 0 and {self._collision} have the same with different parts of the experts",
                expected=f"a divisor of tensor parallel size {self.tensor_parallel}",
                found=self.expert_ways,
                remedy="choose another --etp, or write megatron-core, which loads at any",
            )
        if self.virtual_pipeline > 1 and self.pipeline_parallel == 1:
            raise UsageError(
                "virtual pipeline needs a pipeline",
                expected="--pp of at least 2",
                found=f"--vpp {self.virtual_pipeline}",
            )

    @property
    def _period(self) -> int:
        return math.gcd(self.tensor_parallel, self.expert_ways * self.expert_parallel)

    @property
    def _collision(self) -> int:
        """A rank with the tensor and expert ranks of rank 0 and another expert-tensor rank."""
        experts, period = self.expert_ways * self.expert_parallel, self._period
        return self.tensor_parallel * pow(self.tensor_parallel // period, -1, experts // period)

    def expert_share(self, tensor_rank: int, expert_rank: int) -> int:
        """Expert-tensor rank of the ranks with these two, all of which have the same one.

        Rank ``r`` is tensor rank ``r % TP`` and place ``r % (ETP * EP)`` among the experts', the expert-tensor rank the
        faster; the two agree modulo their greatest common divisor, which is no smaller than ETP (see ``check``).
        """
        return (tensor_rank - expert_rank * self.expert_ways) % self._period

    def pairs(self, ranks: int) -> list[tuple[int, int]]:
        """(tensor rank, expert rank) of the first so many ranks of a stage, each once, sorted.

        Megatron-Core numbers both from the same rank, the faster one first: ``parallel_state`` builds one generator
        of order tensor-data for dense layers and another of order expert-tensor, expert, data for experts.
        """
        count = min(ranks, math.lcm(self.tensor_parallel, self.expert_ways * self.expert_parallel))
        return sorted({(r % self.tensor_parallel, r // self.expert_ways % self.expert_parallel) for r in range(count)})

    @property
    def written_pairs(self) -> list[tuple[int, int]]:
        """(tensor rank, expert rank) of the folders that Megatron writes: data rank or expert-data rank is 0."""
        return self.pairs(max(self.tensor_parallel, self.expert_ways * self.expert_parallel))

    @property
    def read_pairs(self) -> list[tuple[int, int]]:
        """(tensor rank, expert rank) of the folders that Megatron may read, at any world size."""
        return self.pairs(1 << 62)
