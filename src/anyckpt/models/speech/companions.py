"""The files beside a speech model: its feature extractor's and its tokenizer's, in transformers' and NeMo's words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from typing import Any

from anyckpt.checkpoint import Checkpoint, Tokenizer
from anyckpt.config.model import ModelConfig
from anyckpt.config.reader import Reader
from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError, MappingError
from anyckpt.models.sentencepiece import Vocabulary, read_model
from anyckpt.models.speech.aggregate import Part, from_parts, is_aggregate, is_marked, leading, parts_of, tokens_of
from anyckpt.models.speech.featurizer import buffers, check_buffers
from anyckpt.models.speech.tokenizer_json import Special, as_bytes, from_sentencepiece, is_control, to_sentencepiece
from anyckpt.models.tokens import token_facts
from anyckpt.storage.source import ByteSource, MemorySource
from anyckpt.tensor import LazyTensor

_PROCESSOR, _FEATURES = "processor_config.json", "preprocessor_config.json"
_GENERATION, _TOKENIZER, _TOKENS = "generation_config.json", "tokenizer.json", "tokenizer_config.json"
_CHATS = "chat_template.jinja"
_MODEL, _VOCABULARY, _SCORES = "tokenizer.model", "vocab.txt", "tokenizer.vocab"
_LARGEST = 64 << 20
_OF_GENERATION = {"_from_model_config": True, "output_attentions": False, "output_hidden_states": False}
_UNLIMITED = 1000000000000000019884624838656
"""What transformers writes where a tokenizer has no longest text."""

_SPELLED = {
    "feature_size": "num_mel_bins",
    "sampling_rate": "sampling_rate",
    "win_length": "window_length",
    "hop_length": "hop_length",
    "n_fft": "fft_length",
    "preemphasis": "preemphasis",
    "padding_value": "audio_padding_value",
}


@dataclass(frozen=True, kw_only=True)
class Companions:
    """What is beside the weights and the configuration.

    Attributes:
        pieces: how many tokens are pieces of the sentencepiece model, of so many.
        more: tokens behind them, unless they are among them.
        marked: tokens that are special.
        unread: names of embeddings, in NeMo's and transformers' words, of whose blank only transformers reads the row.
        template: of chats, for transformers' processor; "" for none.
        aggregate_class: NeMo's class of tokenizers that are several in one; "" for its usual one.
        made: buffers of NeMo's model, which follow from the configuration.
        twice: NeMo's names of tensors that are there a second time, each with the other one.
        tags: pieces that are special in transformers, which lists them; None for none.
        special: which tokens that texts are cut at first are no text; those of type ``CONTROL`` if None.
        tokenizer: keys of ``tokenizer_config.json``.
        processor: keys of ``processor_config.json`` besides the feature extractor's.
        extractor: the feature extractor's class.
        extractor_settings: what it takes besides, of which each has one value in every model that can be converted.
        generation: keys of ``generation_config.json``.
    """

    pieces: Callable[[ModelConfig, int], int]
    more: tuple[str, ...]
    marked: tuple[str, ...]
    tokenizer: Mapping[str, Any]
    processor: Callable[[ModelConfig], Mapping[str, Any]]
    generation: Callable[[ModelConfig], Mapping[str, Any]]
    extractor: str = "ParakeetFeatureExtractor"
    extractor_settings: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    tags: re.Pattern[str] | None = None
    special: Special | None = None
    template: Callable[[ModelConfig], str] = field(default=lambda config: "")
    aggregate_class: str = ""
    made: Callable[[ModelConfig], dict[str, LazyTensor]] = buffers
    twice: Mapping[str, str] = field(default_factory=dict)

    def read(self, config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
        """The configuration with what the feature extractor's file says.

        Raises:
            MappingError: it is of another kind, or says what a model cannot be.
        """
        if checkpoint.config_kind != "hf":
            return config
        try:
            name, said = _feature_extractor(checkpoint.artifacts)
        except FormatError as error:
            raise MappingError(error.problem, path=error.path, remedy=error.remedy) from error
        if said is None:
            return config
        reader = Reader(said, name)
        kind = reader.text("feature_extractor_type") or self.extractor
        channels = reader.integer("feature_size")
        if kind != self.extractor or channels not in (None, config.num_mel_bins):
            raise MappingError(
                f"{name} is of another feature extractor than the model's",
                path=checkpoint.path,
                expected=f"{self.extractor} of {config.num_mel_bins} channels",
                found=f"{kind} of {channels}",
            )
        for key, only in self.extractor_settings.items():
            if said.get(key, only) != only:
                raise MappingError(
                    f"{name}'s {key} is one that NeMo's features have not",
                    path=checkpoint.path,
                    expected=only,
                    found=f"{said[key]!r:.80}",
                    remedy="convert to safetensors, torch or dcp, which keep names",
                )
        found: dict[str, Any] = {}
        for key, hub in _SPELLED.items():
            if key in said:
                read = reader.number if key in ("preemphasis", "padding_value") else reader.integer
                found[hub] = read(key)
        if found.get("preemphasis", 1.0) is None:
            found["preemphasis"] = 0.0
        return replace(config, **{hub: value for hub, value in found.items() if value is not None})

    def write(
        self, config: ModelConfig, source: Checkpoint, checkpoint: Checkpoint, kind: str, notes: list[str]
    ) -> Checkpoint:
        """A checkpoint with these files, and with the buffers of features, as a kind of configuration has them.

        Args:
            config: of the model.
            source: as it was.
            checkpoint: under the target's names, with its configuration.
            kind: of that.
            notes: what a user should know is appended.

        Raises:
            FormatError: a file of the tokenizer is damaged.
            MappingError: the tokenizer is of another kind, or the source makes features that transformers does not.
        """
        spelled = source.config_kind == kind
        for name in self.unread if not spelled else ():
            if name in source.weights() and bool(source.weights()[name][-1].numpy().any()):
                notes.append(
                    f"{name}: the blank's row is not zero: NeMo begins with zeros and transformers with that row, so "
                    "that outputs will differ"
                )
        if kind == "hf":
            if not spelled:
                check_buffers(self.made(config), source.weights(), source.path)
            return checkpoint if spelled else self._for_transformers(config, source, checkpoint, notes)
        if kind == "nemo1":
            stored = source.weights()
            made = {name: stored.get(name, tensor) for name, tensor in self.made(config).items()}
            whole = checkpoint if spelled else self._for_nemo(config, source, checkpoint, notes)
            twice = {name: whole.tensors[other] for name, other in self.twice.items()}
            return replace(whole, tensors={**made, **whole.tensors, **twice})
        return checkpoint

    def _for_transformers(
        self, config: ModelConfig, source: Checkpoint, checkpoint: Checkpoint, notes: list[str]
    ) -> Checkpoint:
        extractor = {
            "feature_extractor_type": self.extractor,
            "padding_side": "right",
            "return_attention_mask": True,
            **self.extractor_settings,
            **{key: getattr(config, hub) for key, hub in _SPELLED.items()},
        }
        processor = {"feature_extractor": extractor, **self.processor(config)}
        artifacts = {_PROCESSOR: _json(_PROCESSOR, processor)}
        template = self.template(config)
        if template:
            artifacts[_CHATS] = MemorySource(template.encode(), _CHATS)
        generation = self.generation(config)
        if generation:
            artifacts[_GENERATION] = _json(_GENERATION, {**_OF_GENERATION, **generation})
        parts = parts_of(source) if is_aggregate(source.config) else ()
        model = leading(parts).model if parts else _sentencepiece(checkpoint.tokenizer)
        if model is None:
            notes.append(
                "there is no sentencepiece model to make a tokenizer.json of: transformers' processor needs one"
            )
            return replace(checkpoint, artifacts=artifacts, tokenizer=None)
        special = self.special or is_control
        tokens = tokens_of(parts) if parts else read_model(model.read_all(_LARGEST), model.name).tokens
        tags = sorted(token for token in tokens if self._is_tag(token))
        marked = (*self.marked, *tags)
        made = (
            from_parts(parts, self.more, marked, special)
            if parts
            else from_sentencepiece(model, self.more, marked, special)
        )
        settings = {
            "backend": "tokenizers",
            "clean_up_tokenization_spaces": False,
            "model_max_length": _UNLIMITED,
            **({"extra_special_tokens": tags} if tags else {}),
            **self.tokenizer,
        }
        files: dict[str, ByteSource] = {
            _TOKENIZER: MemorySource(as_bytes(made), _TOKENIZER),
            _TOKENS: _json(_TOKENS, settings),
        }
        if not parts:
            files[_MODEL] = model
            return replace(checkpoint, artifacts=artifacts, tokenizer=Tokenizer("huggingface", files, _MODEL))
        languages = ", ".join(part.language for part in parts)
        notes.append(
            f"the tokenizer is {len(parts)} in one ({languages}): ids of all become text, and text becomes ids of "
            f"{leading(parts).language} alone, as transformers is not told a text's language"
        )
        artifacts |= {part.file(number): part.model for number, part in enumerate(parts)}
        return replace(checkpoint, artifacts=artifacts, tokenizer=Tokenizer("huggingface", files))

    def _for_nemo(
        self, config: ModelConfig, source: Checkpoint, checkpoint: Checkpoint, notes: list[str]
    ) -> Checkpoint:
        tokenizer, parts = checkpoint.tokenizer, parts_of(source)
        if parts:
            return self._with_several(config, checkpoint, parts)
        held = {} if tokenizer is None else {name.rpartition("/")[2]: file for name, file in tokenizer.files.items()}
        model: ByteSource
        if _MODEL in held:
            model = held[_MODEL]
        elif _TOKENIZER in held:
            content = _read_json(held[_TOKENIZER])
            if is_marked(content):
                raise MappingError(
                    "is of several sentencepiece models, which NeMo needs",
                    path=held[_TOKENIZER].name,
                    expected="them beside it, as tokenizer.0.LANGUAGE.model and so on",
                    remedy="copy them from where it was written",
                )
            data = to_sentencepiece(
                content, self.pieces(config, token_facts(tokenizer).count or 0), held[_TOKENIZER].name, self._is_control
            )
            model = MemorySource(data, _MODEL)
            notes.append("the tokenizer's sentencepiece model is made of tokenizer.json")
        else:
            notes.append("there is no tokenizer, without which NeMo restores no such model: give it with --tokenizer")
            return replace(checkpoint, artifacts={}, tokenizer=None)
        pieces = read_model(model.read_all(_LARGEST), model.name)
        count = self.pieces(config, len(pieces.tokens))
        if len(pieces.tokens) != count:
            raise MappingError(
                "the tokenizer is of another model",
                path=model.name,
                expected=f"{count} pieces",
                found=len(pieces.tokens),
            )
        files: dict[str, ByteSource] = {_MODEL: model, **_lists(pieces, _VOCABULARY, _SCORES)}
        described = with_labels(checkpoint.config, pieces.tokens)
        return replace(checkpoint, config=described, artifacts={}, tokenizer=Tokenizer("sentencepiece", files, _MODEL))

    def _with_several(self, config: ModelConfig, checkpoint: Checkpoint, parts: Sequence[Part]) -> Checkpoint:
        """With an aggregate tokenizer of NeMo's, whose models are files of their own."""
        tokens = tokens_of(parts)
        if len(tokens) != self.pieces(config, len(tokens)):
            raise MappingError(
                "the tokenizers are of another model",
                path=parts[0].model.name,
                expected=f"{self.pieces(config, len(tokens))} pieces",
                found=len(tokens),
            )
        files: dict[str, ByteSource] = {}
        for number, part in enumerate(parts):
            named = [part.file(number, kind) for kind in ("vocab.{}.txt", "tokenizer.{}.vocab")]
            files |= {part.file(number): part.model, **_lists(part.vocabulary, *named)}
        custom = {"custom_tokenizer": {"_target_": self.aggregate_class, "tokenizers": None}}
        section = {"type": "agg", "dir": None, **(custom if self.aggregate_class else {})}
        described = {**with_labels(checkpoint.config, tokens), "tokenizer": section}
        return replace(checkpoint, config=described, artifacts={}, tokenizer=Tokenizer("sentencepiece", files))

    def _is_control(self, token: str) -> bool:
        """Whether a special token is so as a piece, and not because transformers marks it."""
        return self.special is None and token not in self.marked and not self._is_tag(token)

    def _is_tag(self, token: str) -> bool:
        return self.tags is not None and self.tags.fullmatch(token) is not None


def with_labels(config: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """A ``model_config.yaml`` with the tokens wherever its class lists them."""
    listed = list(tokens)
    changed = dict(config)
    for section in ("decoder", "joint"):
        if isinstance(changed.get(section), Mapping) and "vocabulary" in changed[section]:
            changed[section] = {**changed[section], "vocabulary": listed}
    if "labels" in changed:
        changed["labels"] = listed
    return changed


def _word_piece(token: str) -> str:
    """A token as NeMo's ``vocab.txt`` has it, in which what goes on with a word is marked and not what begins one."""
    return token[1:] if token.startswith("\N{LOWER ONE EIGHTH BLOCK}") else f"##{token}"


def _lists(pieces: Vocabulary, words: str, scores: str) -> dict[str, ByteSource]:
    """The files of a model's pieces that NeMo has beside it, under these names."""
    listed = "".join(f"{_word_piece(token)}\n" for token in pieces.tokens if token != "<unk>")
    scored = "".join(f"{token}\t{score:g}\n" for token, score in zip(pieces.tokens, pieces.scores, strict=True))
    return {words: MemorySource(listed.encode(), words), scores: MemorySource(scored.encode(), scores)}


def pieces_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The pieces of a checkpoint's sentencepiece model, or of several, by their ids; none if it has none."""
    if is_aggregate(checkpoint.config):
        return tokens_of(parts_of(checkpoint))
    model = _sentencepiece(checkpoint.tokenizer)
    return () if model is None else read_model(model.read_all(_LARGEST), model.name).tokens


def _sentencepiece(tokenizer: Tokenizer | None) -> ByteSource | None:
    if tokenizer is None:
        return None
    named = tokenizer.model_file or next((name for name in tokenizer.files if name.endswith(".model")), None)
    return None if named is None else tokenizer.files.get(named)


def processor_settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What a processor's file says; nothing of none, or of a damaged one, of which reading its features tells."""
    source = checkpoint.artifacts.get(_PROCESSOR)
    try:
        return {} if source is None else _read_json(source)
    except FormatError:
        return {}


def _feature_extractor(artifacts: Mapping[str, ByteSource]) -> tuple[str, Mapping[str, Any] | None]:
    """What transformers reads: a section of the processor's file, or, of older releases, a file of its own."""
    if _PROCESSOR in artifacts:
        section = _read_json(artifacts[_PROCESSOR]).get("feature_extractor")
        if isinstance(section, Mapping):
            return _PROCESSOR, section
    return _FEATURES, _read_json(artifacts[_FEATURES]) if _FEATURES in artifacts else None


def _read_json(source: ByteSource) -> dict[str, Any]:
    try:
        value = json.loads(source.read_all(_LARGEST).decode())
    except (ValueError, RecursionError) as error:
        raise FormatError("is not JSON", path=source.name, remedy="copy it again from its origin") from error
    if not isinstance(value, dict):
        raise FormatError("is not a JSON object", path=source.name, found=type(value).__name__)
    return value


def _json(name: str, value: Mapping[str, Any]) -> ByteSource:
    return MemorySource((json.dumps(value, indent=2, sort_keys=True) + "\n").encode(), name)
