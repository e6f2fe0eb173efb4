"""What a model's tensors say of it: their type, the vocabulary and ties, which a configuration may leave out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anyckpt.checkpoint import Checkpoint, storage_key
from anyckpt.config import meta_names, own_part
from anyckpt.config.hub_names import EMBEDDING
from anyckpt.config.model import PART_OF, WHOLE, WHOLE_NAMES, WHOLE_NORMS, ModelConfig
from anyckpt.indexing import Shape
from anyckpt.models.dialects import spellings, trtllm
from anyckpt.models.dialects.before_core import core_names
from anyckpt.models.dialects.wrappers import unwrapped
from anyckpt.models.hub import Model, head_and_embedding
from anyckpt.models.language.family import unrefined
from anyckpt.models.language.variants import family_names
from anyckpt.models.tokens import TokenFacts, token_facts
from anyckpt.models.vocabulary import misfit, true_vocabulary
from anyckpt.models.wholes import published, stored_names_of
from anyckpt.tensor import LazyTensor


def with_facts_from_tensors(model: Model, checkpoint: Checkpoint, kind: str, values: Mapping[str, Any]) -> Model:
    """Element type, rows of the embedding and ties are what the tensors say; a configuration may leave them out."""
    weights = checkpoint.weights()
    config = model.config
    notes = list(model.notes)
    sizes: dict[str, int] = {}
    for tensor in weights.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.nbytes
    if sizes:
        config = replace(config, dtype=max(sizes, key=lambda name: sizes[name]))
    if config.mtp_num_layers and weights and not any(".eh_proj." in name or "mtp.fc." in name for name in weights):
        config = replace(config, mtp_num_layers=None)
        notes.append("the configuration's layers of multi-token prediction are not in the checkpoint")
    config = model.definition.refine(config, _outside_layers(model, checkpoint))
    if model.definition.companions is not None:
        config = model.definition.companions.read(config, checkpoint)
    head, embedding = head_and_embedding(model)
    dialect = checkpoint.dialect or spellings.detect(weights)
    if dialect == "hf":
        found = unwrapped(weights, model.definition.rules, PART_OF in config.extra)
        named = found.tensors
        if found.others and WHOLE in config.extra and published(config) is None:
            names = stored_names_of(found.wrapper, found.others)
            config = replace(config, extra={**config.extra, WHOLE_NAMES: names})
        said = kind != "hf" or "tie_word_embeddings" in own_part.own_part(model.definition, values)
        tied = config.share_embeddings_and_output_weights
        if not (said or tied) and embedding in named and head not in named:
            config = replace(config, share_embeddings_and_output_weights=True)
            notes.append(f"there is no {head} and config.json says nothing: the embedding is taken to be tied")
    elif dialect in meta_names.SPELLINGS:
        if not (kind == "hf" or config.share_embeddings_and_output_weights) and _is_tied(weights):
            config = replace(config, share_embeddings_and_output_weights=True)
    elif dialect is not None:
        facts = token_facts(checkpoint.tokenizer)
        missing: dict[str, Any] = {
            name: token for name, token in facts.special.items() if getattr(config, name) is None
        }
        config = _with_stored_vocabulary(replace(config, **missing), facts, weights, notes)
    if dialect == trtllm.NAME and config.layernorm_zero_centered_gamma:
        config = replace(config, extra={**config.extra, WHOLE_NORMS: True})
    says = model.config.vocab_size is not None
    return replace(model, config=config, notes=tuple(notes), says_vocabulary=says)


def megatron_names(weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors without their wrapper's prefix, layers as they are stored; nothing if the names are not Megatron's."""
    prefix = spellings.find_prefix(weights)
    if prefix is None:
        return {}
    return core_names({name.removeprefix(prefix): tensor for name, tensor in weights.items()})


def _is_tied(weights: Mapping[str, LazyTensor]) -> bool:
    """Whether a model under Meta's names has no output layer, or one that is stored as its embedding."""
    named = {meta_names.meta_name(name): tensor for name, tensor in weights.items()}
    head, embedding = (named.get(name) for name in (meta_names.HEAD, meta_names.EMBEDDING))
    if embedding is None or head is None:
        return embedding is not None
    key = storage_key(head)
    return key is not None and key == storage_key(embedding)


def _outside_layers(model: Model, checkpoint: Checkpoint) -> dict[str, Shape]:
    """Shapes of what is stored outside layers, by the hub's names; nothing for a family that does not ask."""
    definition, weights = model.definition, checkpoint.weights()
    if definition.refine is unrefined:
        return {}
    if (checkpoint.dialect or spellings.detect(weights)) != "hf":
        return {name: tensor.shape for name, tensor in megatron_names(weights).items()}
    named = unwrapped(weights, definition.rules, PART_OF in model.config.extra).tensors
    named = family_names(named, definition.hugging_face.variants)
    rules = (rule for rule in definition.rules if "*" not in rule.hub)
    return {rule.hub: named[name].shape for rule in rules for name in rule.source[:1] if name in named}


def _with_stored_vocabulary(
    config: ModelConfig, facts: TokenFacts, weights: Mapping[str, LazyTensor], notes: list[str]
) -> ModelConfig:
    stored = next((tensor for name, tensor in weights.items() if name.endswith(EMBEDDING)), None)
    if stored is None or not stored.ndim:
        return config
    rows = stored.shape[0]
    wrong = misfit(rows, config, facts.count)
    notes += [] if wrong is None else [wrong]
    if config.vocab_size is None and rows:
        true, note = true_vocabulary(rows, config, facts.count)
        notes += [] if note is None else [note]
        config = replace(config, vocab_size=true)
    return replace(config, padded_vocab_size=rows or None)
