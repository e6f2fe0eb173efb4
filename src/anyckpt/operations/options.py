"""What a user may ask of whatever writes a checkpoint, each option said once: by its name, its type and its meaning."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from anyckpt.data_classes import dataclass
from anyckpt.engine.destination import Share
from anyckpt.engine.execute import DEFAULT_MEMORY
from anyckpt.errors import UsageError
from anyckpt.formats import registry
from anyckpt.formats.format import Format, WriteOptions
from anyckpt.models.language.variants import EXPERTS
from anyckpt.operations.steps.casts import KEEP_IN_FP32, cast_target
from anyckpt.operations.steps.full_precision import config_in_full_precision
from anyckpt.operations.steps.globs import as_patterns
from anyckpt.operations.steps.layer_request import LayerRequest, parse_layers
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.operations.steps.model_ids import named_configuration
from anyckpt.operations.steps.put_request import Put, parse_puts
from anyckpt.operations.steps.threads import Progress
from anyckpt.operations.steps.user_files import read_config, read_scales, read_statistics
from anyckpt.operations.steps.user_names import Rename, parse_renames
from anyckpt.operations.steps.writing import parse_share, patience
from anyckpt.units import parse_bytes

if TYPE_CHECKING:
    from anyckpt.quantization.statistics import Statistics
    from anyckpt.quantization.stored import Request


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What a user asks of a conversion.

    Attributes:
        to: name of the target format, such as ``hf`` or ``nemo``.
        family: the model family, where the checkpoint does not tell.
        config: the model's configuration (Hugging Face, NeMo or Megatron), as a file, the folder of a model that has
            it, or a dictionary, where the checkpoint has none; of an adapter, its base model's.
        model_id: a model by its name (those that NeMo's migration takes, such as ``meta-llama/Meta-Llama-3-8B``), or a
            folder of NeMo 2, in place of ``config``; the source's own configuration must say the same.
        tokenizer: a sentencepiece model or a folder of Hugging Face tokenizer files to send along.
        tokenizer_library: ``sentencepiece``, ``huggingface`` or ``tiktoken``: what reads the tokenizer, where its file
            does not tell; with ``huggingface`` the tokenizer may also be a name on the hub, which is recorded, and
            fetched where ``anyckpt[hub]`` is installed.
        names: ``hf`` or one of ``models.dialects.DIALECTS``: how to name weights where the target takes any names.
        experts: where weights get Hugging Face's names: ``each``, a tensor for each expert, or ``stacked``, one for all
            of a layer, which transformers 5 reads as well; the form that is usual for the family if None.
        adapter_form: of an adapter: ``canonical``, an update per Hugging Face module, or ``fused``, one per fused
            weight of Megatron, at a higher rank; as the source has it if None.
        alpha: of an adapter: updates are multiplied by it over their rank; what the adapter says if None.
        dtype: ``bf16``, ``fp16`` or ``fp32``: cast floating-point weights, and dequantize quantized ones.
        quantize: one of ``quantization.forms.ALGORITHMS``: quantize the matrices of linear modules, where the target is
            ``hf`` or ``trtllm``.
        quantize_form: one of ``quantization.forms.FORMS``: how they are stored; the algorithm's usual one if None.
        group_size: ``int4``, ``int4_awq``, ``w4a8_awq``: columns of a weight with one scale.
        activation_scale: the scale of every quantized activation, where the form stores it.
        activation_scales: the same by module, under the target's names: a dictionary, a JSON file of one, or a
            quantized model whose ``input_scale`` are taken; ``activation_scale`` is for the others.
        statistics: what calibration saw of the model's activations: the file that ``anyckpt quantize`` saves, or its
            contents; ``int8_sq``, ``int4_awq`` and ``w4a8_awq`` need them, others take scales of activations from them.
        sq_alpha: ``int8_sq``: how much of activations' range moves into weights, from 0 to 1; 1 if None, as NeMo's.
        enable_kv_cache: with statistics: store scales of keys and values in 8 bits; NeMo's choice if None.
        decoder_type: with statistics: NeMo's word for the family; for ``gpt`` the cache stays as it is, and no scale of
            activations is less than 0.01.
        quantize_exclude: glob or globs of modules that are not quantized, besides the output layer and routers.
        report: a file for what quantizing did to every weight: JSON, or a page if its name ends in ``.html``.
        keep_in_fp32: globs of weights that a cast leaves alone.
        module: the name of one module of the model, such as ``llm`` or ``perception.encoder``, to be taken alone: short
            for the ``include`` and ``rename`` that take its tensors without its name, and for the ``config`` and
            ``alpha`` that lie beside the model.
        put: ``MODULE=PATH``, one or several, or a dictionary of such: what is in a module of the model is replaced by
            the same of another model, whatever its format: its weights, which must be of the same names and shapes, and
            its part of the configuration.  NeMo's ``perception`` takes encoder and preprocessor of an ASR model.
        include: glob or globs of the source's weight names; others are left out.  A glob that matches no weight chooses
            what is stored beside them, such as an averaged copy, to be written as the weights.
        exclude: glob or globs of weight names to leave out.
        rename: one or several ``PATTERN=REPLACEMENT`` for the source's weight names, applied in order before the names
            are looked at.  A pattern is a glob of whole names, and a ``*`` of the replacement stands for what the
            pattern's next one matched; after ``re:`` a regular expression that is searched for.
        drop_layers: layers to leave out, such as ``10-20,31`` (from 0 on, both ends included) or a sequence of numbers;
            those behind them are numbered anew, and the configuration and an optimizer's state follow.  Of an
            encoder-decoder, by stack: ``encoder:2-3,decoder:5``.
        keep_layers: the layers to keep alone, in place of ``drop_layers``.
        max_shard_size: bytes per weight file, or a text such as ``5GB``, where the target shards by size.
        sharded: ``nemo``, ``lightning``: write a distributed checkpoint in place of a flat file; ``hf``: files as NeMo
            Automodel writes them by rank.
        backend: ``nemo2``: ``torch_dist`` or ``zarr``, the kind of distributed checkpoint inside.
        optimizer: ``drop``, or ``keep`` to carry training state: as it is stored where weights keep their names
            and the target has the source's form, else by parameter, through the same rules as the weights.
        layout: parallel sizes and vocabulary of the target, where it keeps a file per rank.
        compress: ``trtllm``: pack all in one archive (``.qnemo``), rather than write a directory; if None, where
            ``gzip`` asks for one.
        gzip: ``trtllm``, ``nemo``: compress the archive by gzip while it is written.
        tensor_type: ``gguf``: how matrices are stored, such as ``q8_0`` or ``bf16``; as they are if None.
        keep_layout: take what ``layout`` does not say from the source's files rather than leave tensors whole.
        force: read a source that is marked as unfinished, too.
        overwrite: replace an existing checkpoint at the end.
        resume: continue what an interrupted run of the same work left.
        share: ``I/N``: do the I-th of N parts of the writing, which as many processes do; the last one publishes.
            ``auto``: the one that ``torchrun``, ``srun`` or ``mpirun`` says in the environment.
        wait: with ``share``: the first one waits for the others, until nothing was seen of them for so many seconds,
            and publishes; 600 with ``auto`` if None, else 0.
        engine: ``ray``: the nodes of a Ray cluster, which see source and destination under the same paths, do the
            writing.
        private: on the Hugging Face Hub: make the repository a private one, if there is none.
        commit_message: on the Hugging Face Hub: what the commit says.
        workers: threads.
        memory: bytes for blocks in flight, or a text such as ``512MB``.
        dry_run: plan, and write nothing.
        progress: called with (bytes done, bytes in all) from any thread.

    Raises:
        UsageError: there is no such format, or it cannot be written or have what is asked for.
    """

    to: str
    family: str | None = None
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None
    model_id: str | os.PathLike[str] | None = None
    tokenizer: str | os.PathLike[str] | None = None
    tokenizer_library: str | None = None
    names: str | None = None
    experts: str | None = None
    adapter_form: str | None = None
    alpha: float | None = None
    dtype: str | None = None
    quantize: str | None = None
    quantize_form: str | None = None
    group_size: int | None = None
    activation_scale: float | None = None
    activation_scales: str | os.PathLike[str] | Mapping[str, float] | None = None
    statistics: str | os.PathLike[str] | Statistics | None = None
    sq_alpha: float | None = None
    enable_kv_cache: bool | None = None
    decoder_type: str | None = None
    quantize_exclude: str | Sequence[str] | None = None
    report: str | os.PathLike[str] | None = None
    keep_in_fp32: Sequence[str] = KEEP_IN_FP32
    module: str | None = None
    put: str | Sequence[str] | Mapping[str, str | os.PathLike[str]] | None = None
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    rename: str | Sequence[str] | None = None
    drop_layers: str | Sequence[int] | None = None
    keep_layers: str | Sequence[int] | None = None
    max_shard_size: int | str | None = None
    sharded: bool = False
    optimizer: str = "drop"
    layout: LayoutRequest | None = None
    compress: bool | None = None
    gzip: bool = False
    backend: str | None = None
    tensor_type: str | None = None
    keep_layout: bool = False
    force: bool = False
    overwrite: bool = False
    resume: bool = False
    share: str | None = None
    wait: float | None = None
    engine: str | None = None
    private: bool = False
    commit_message: str | None = None
    workers: int | None = None
    memory: int | str | None = None
    dry_run: bool = False
    progress: Progress | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.target.plan is None:
            raise UsageError(f"{self.to} can be read but not written")
        if self.sharded and not self.target.sharded:
            raise UsageError(
                f"--sharded means nothing for {self.to}", remedy="leave it out, or convert to nemo, lightning or hf"
            )
        if self.backend is not None and self.backend not in self.target.backends:
            raise UsageError(
                f"{self.to} has no such backend",
                expected=", ".join(self.target.backends) or "no --backend: there is no choice",
                found=self.backend,
            )
        if self.tensor_type is not None and self.tensor_type not in self.target.tensor_types:
            raise UsageError(
                f"{self.to} has no such type of tensors",
                expected=", ".join(self.target.tensor_types) or "no --tensor-type: --dtype casts",
                found=self.tensor_type,
            )
        if self.compress and not self.target.archives:
            raise UsageError(
                f"--compress means nothing for {self.to}",
                expected="a format that is written as a directory or as an archive, such as trtllm",
                remedy="leave it out",
            )
        if self.gzip:
            self._check_gzip()
        if self.tokenizer is None and self.tokenizer_library is not None:
            raise UsageError("--tokenizer-library says how to read a tokenizer", remedy="give one with --tokenizer")
        if self.config is not None and self.model_id is not None:
            raise UsageError("--config and --model-id both say what the model is", remedy="give one of them")
        if self.module is not None and self.include:
            raise UsageError("--module and --include both say what is taken", remedy="give one of them")
        if self.experts not in (None, *EXPERTS):
            raise UsageError("unknown value for experts", expected=" or ".join(EXPERTS), found=self.experts)
        if self.optimizer not in ("keep", "drop"):
            raise UsageError("unknown value for optimizer", expected="keep or drop", found=self.optimizer)
        _ = self.writing, self.patience, self.budget, self.renames
        if self.puts and self.keeps_state:
            raise UsageError(
                "--optimizer keep carries the state of weights that --put replaces", remedy="give one of them"
            )
        if self.drop_layers is not None and self.keep_layers is not None:
            raise UsageError("--drop-layers and --keep-layers both say which layers stay", remedy="give one of them")
        if self.layers is not None and self.request.keep_extra_state:
            raise UsageError("--keep-extra-state is of all layers", remedy="leave it out where layers are left out")
        only = {
            "--quantize-form": self.quantize_form,
            "--group-size": self.group_size,
            "--activation-scale": self.activation_scale,
            "--activation-scales": self.activation_scales,
            "--stats": self.statistics,
            "--sq-alpha": self.sq_alpha,
            "--enable-kv-cache": self.enable_kv_cache,
            "--decoder-type": self.decoder_type,
            "--quantize-exclude": self.quantize_exclude,
            "--report": self.report,
        }
        if self.quantize is not None or any(value is not None for value in only.values()):
            from anyckpt.operations.steps.quantizing import check_request

            check_request(self.quantization, self.target, only, keeps_state=self.keeps_state)

    def _check_gzip(self) -> None:
        if not (self.target.archives or self.target.packs):
            raise UsageError(
                f"--gzip means nothing for {self.to}",
                expected="a format that is written as an archive, such as trtllm or nemo",
                remedy="leave it out",
            )
        if self.compress is False and not self.target.packs:
            raise UsageError("--gzip compresses an archive and --no-compress asks for none", remedy="give one of them")
        for name, value in {
            "--resume": self.resume,
            "--share": self.share is not None,
            "--engine": self.engine is not None,
        }.items():
            if value:
                raise UsageError(
                    f"{name} means nothing with --gzip: what is compressed is written at one go, by one process",
                    remedy="leave out one of them",
                )

    @cached_property
    def target(self) -> Format:
        """The format to write."""
        return registry.by_name(self.to)

    @cached_property
    def request(self) -> LayoutRequest:
        """The layout that is asked for, where nothing is said too."""
        return LayoutRequest() if self.layout is None else self.layout

    @cached_property
    def writing(self) -> WriteOptions:
        """What is asked of the format's writer."""
        limit = None if self.max_shard_size is None else parse_bytes(self.max_shard_size, "--max-shard-size")
        return WriteOptions(
            max_shard_size=limit,
            sharded=self.sharded,
            transformer_impl=self.request.transformer_impl,
            compress=bool(self.compress) or (self.gzip and self.target.archives),
            backend=self.backend,
            tensor_type=self.tensor_type,
            megatron_args=self.request.megatron_args,
            megatron_version=self.request.release,
            megatron_model=self.request.megatron_model,
        )

    @cached_property
    def part(self) -> Share | None:
        """Which share of the writing is this process's, None for all of it.

        Raises:
            UsageError: there is no such share, or an engine makes shares of its own.
        """
        if self.share is not None and self.engine is not None:
            raise UsageError(f"--engine {self.engine} makes shares of its own", remedy="leave out --share")
        return parse_share(self.share)

    @cached_property
    def patience(self) -> float:
        """Seconds to wait for a sign of the processes that do the other shares."""
        return patience(self.share, self.part, self.wait)

    @cached_property
    def renames(self) -> tuple[Rename, ...]:
        """Patterns of names and what they become."""
        return parse_renames(self.rename)

    @cached_property
    def puts(self) -> tuple[Put, ...]:
        """What is put where."""
        return parse_puts(self.put)

    @cached_property
    def layers(self) -> LayerRequest | None:
        """The layers to keep or to leave out; None for all."""
        drop = parse_layers(self.drop_layers, drop=True)
        return parse_layers(self.keep_layers, drop=False) if drop is None else drop

    @cached_property
    def budget(self) -> int:
        """Bytes for blocks in flight."""
        return DEFAULT_MEMORY if self.memory is None else parse_bytes(self.memory, "--memory")

    @cached_property
    def cast_to(self) -> str | None:
        """Torch's name of the type that weights are cast to, None for their own."""
        return cast_target(self.dtype)

    @cached_property
    def given(self) -> dict[str, Any] | None:
        """The configuration as plain data."""
        return read_config(self.config) if self.model_id is None else named_configuration(self.model_id)

    @property
    def plain_config(self) -> dict[str, Any] | None:
        """The configuration of the weights that are written: numbers if a type is asked for."""
        return config_in_full_precision(self.given, self.cast_to)

    @cached_property
    def quantization(self) -> Request | None:
        """What is asked of quantizing; None if nothing is quantized."""
        if self.quantize is None:
            return None
        from anyckpt.operations.steps.quantizing import DEFAULT_GROUP
        from anyckpt.quantization.forms import with_usual_cache
        from anyckpt.quantization.stored import Request

        asked = Request(
            self.quantize,
            self.quantize_form or (self.target.quantizes[0] if len(self.target.quantizes) == 1 else None),
            DEFAULT_GROUP if self.group_size is None else self.group_size,
            self.activation_scale,
            as_patterns(self.quantize_exclude),
            read_scales(self.activation_scales),
            read_statistics(self.statistics),
            1.0 if self.sq_alpha is None else self.sq_alpha,
            self.enable_kv_cache,
            self.decoder_type or "",
        )
        return with_usual_cache(asked)

    def for_hub(self, *, quantized: bool) -> ConvertOptions:
        """What is asked of the model where it is seen under Hugging Face's names, before anything is cast.

        Args:
            quantized: the source is, so that it has numbers in the type that is asked for only.
        """
        return ConvertOptions(
            to="hf",
            family=self.family,
            config=self.config,
            model_id=self.model_id,
            module=self.module,
            put=self.put,
            include=self.include,
            exclude=self.exclude,
            rename=self.rename,
            drop_layers=self.drop_layers,
            keep_layers=self.keep_layers,
            dtype=self.dtype if quantized else None,
            layout=LayoutRequest(
                vocab_size=self.request.vocab_size, new_rows=self.request.new_rows, rules=self.request.rules
            ),
            force=self.force,
        )

    def for_numbers(self) -> ConvertOptions:
        """The same for a checkpoint that is in full precision already."""
        return replace(self, config=self.plain_config, model_id=None)

    @property
    def kept_in_fp32(self) -> Sequence[str]:
        """Globs of weights that a cast leaves alone: those asked for, and those of the target's software."""
        return (*self.keep_in_fp32, *self.target.in_fp32)

    @property
    def keeps_state(self) -> bool:
        """Whether training state goes along."""
        return self.optimizer == "keep"
