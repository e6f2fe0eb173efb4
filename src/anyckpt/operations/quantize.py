"""Quantizing a model with calibration: run it over texts, and write what the activations say."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from anyckpt.checkpoint import Checkpoint
from anyckpt.errors import MissingLibraryError, UsageError
from anyckpt.formats import registry
from anyckpt.indexing import Array
from anyckpt.operations.convert import Conversion, converted, under_hub_names
from anyckpt.operations.keywords import AgainWords, check_writable, taking
from anyckpt.operations.options import ConvertOptions
from anyckpt.operations.steps.calibrating import linear_weights
from anyckpt.operations.steps.calibration_data import Samples, batches_of, check_positions, cut, read_samples
from anyckpt.operations.steps.layout_request import LayoutRequest
from anyckpt.operations.steps.ptq_settings import read_ptq_settings
from anyckpt.operations.steps.quantizing import DEFAULT_GROUP, check_quantizable
from anyckpt.operations.steps.threads import Progress
from anyckpt.operations.steps.user_files import read_config, read_statistics, read_tokenizer
from anyckpt.quantization.calibrated import groups_do_not_divide
from anyckpt.quantization.forms import layout_of, layouts_of, usual_form
from anyckpt.quantization.statistics import Statistics, check_replaceable
from anyckpt.storage.location import public_path

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SIZE, _BATCH, _LENGTH = 512, 64, 512
"""Samples, sequences of a batch, and tokens of a sequence where nothing is said, as in NeMo 1."""

_DTYPES = {"16": "fp16", "fp16": "fp16", "bf16": "bf16", "32": "fp32", "fp32": "fp32"}
_TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_NOTHING = ("null", "none", "no_quant")


@taking(AgainWords)
def quantize(
    source: str | os.PathLike[str] | Checkpoint,
    destination: str | os.PathLike[str],
    *,
    algorithm: str | None = None,
    to: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    calib_dataset: str | os.PathLike[str] | None = None,
    calib_field: str | None = None,
    num_calib_size: int | None = None,
    calib_batch_size: int | None = None,
    calib_sequence_length: int | None = None,
    calib_dtype: str | None = None,
    statistics: str | os.PathLike[str] | Statistics | None = None,
    save_statistics: str | os.PathLike[str] | None = None,
    awq_block_size: int | None = None,
    sq_alpha: float | None = None,
    enable_kv_cache: bool | None = None,
    decoder_type: str | None = None,
    inference_tensor_parallel: int | None = None,
    inference_pipeline_parallel: int | None = None,
    dtype: str | int | None = None,
    compress: bool | None = None,
    gzip: bool = False,
    quantize_form: str | None = None,
    quantize_exclude: str | Sequence[str] | None = None,
    family: str | None = None,
    model_config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    force: bool = False,
    **others: Unpack[AgainWords],
) -> Conversion:
    """Quantize the model at ``source``, whatever its format, with calibration where the algorithm asks for it.

    Options have NeMo's names.  Those of ``convert`` mean the same here.

    Args:
        source: what to read; its format is detected.  Or a checkpoint that is open.
        destination: what to write.
        algorithm: ``fp8``, ``int8``, ``int8_sq``, ``int4_awq``, ``w4a8_awq``, ``nvfp4``, or any other of
            ``quantization.forms.ALGORITHMS``, which need no calibration; ``null`` to quantize nothing.  ``fp8`` if
            nothing says it.
        to: ``trtllm``, if nothing says it, or ``hf``.
        config: NeMo's settings of post-training quantization (``megatron_gpt_ptq.yaml``, or NeMo 2's), as a file or a
            dictionary; what is given besides goes before it.
        calib_dataset: texts or token ids: a text file, JSON lines or a list in JSON (objects with a text, or lists of
            ids), or ``.npy``.
        calib_field: where an object has its text; ``text`` or ``article`` if None.
        num_calib_size: samples that are used; 512 if None, or as many as there are.
        calib_batch_size: sequences that run together; 64 if None.
        calib_sequence_length: tokens of a sample at most; 512 if None, or as many as the model has positions.
        calib_dtype: ``bf16``, ``fp16`` or ``fp32``: the type in which the model runs; its own if None.
        statistics: what an earlier calibration saw, so that nothing runs.
        save_statistics: a file for what this one saw.
        awq_block_size: columns of a weight with one scale; 128 if None.
        enable_kv_cache: store scales of keys and values in 8 bits; if None, as NeMo decides: not with INT8 weights or a
            ``gpt``.
        decoder_type: NeMo's word for the family; for ``gpt`` no scale of activations is less than 0.01.
        inference_tensor_parallel: tensor-parallel ranks that the output is divided for.
        inference_pipeline_parallel: its pipeline stages.
        dtype: ``16`` (``fp16``) or ``bf16``, of what is not quantized; the model's own if None.
        model_config: the model's configuration, where the source has none.
        progress: called with (bytes done, bytes in all): first of weights that ran, then of what is written.

    Raises:
        UsageError: the options contradict each other, there is no text, or transformers has no such model.
        MissingLibraryError: calibration is asked for and torch or transformers is not installed.
        FormatError: the source or the text is damaged, or what goes into a module is no number.
        OutputError: an output exists or cannot be written.
    """
    given = {name: value for name, value in locals().items() if name in _FROM_FILE and value is not None}
    settings = read_ptq_settings(config)
    said = {**settings.options, **given}
    own: dict[str, Any] = {
        "to": str(said.get("to", "trtllm")),
        "family": family,
        "config": read_config(model_config),
        "tokenizer": said.get("tokenizer"),
        "dtype": _dtype(said.get("dtype")),
        "quantize_form": quantize_form,
        "quantize_exclude": quantize_exclude,
        "report": report,
        "layout": LayoutRequest(
            tensor_parallel=said.get("inference_tensor_parallel"),
            pipeline_parallel=said.get("inference_pipeline_parallel"),
        ),
        "compress": compress if gzip else bool(said.get("compress", False)),
        "gzip": gzip,
        "force": force,
        **others,
    }
    output = os.fspath(destination)
    origins = [source.path if isinstance(source, Checkpoint) else public_path(source)]
    check_writable(output, origins, others)
    if save_statistics is not None:
        _check_saved(os.fspath(save_statistics), output)
    notes = [f"no effect has {key}: {reason}" for key, reason in _together(settings.unused).items()]
    name = said.get("algorithm", None if "algorithm" in said else "fp8")
    name = None if name is None or str(name).lower() in _NOTHING else str(name)
    opened = source if isinstance(source, Checkpoint) else registry.read(source, force=force)
    if name is None:
        own = {key: value for key, value in own.items() if key not in ("quantize_form", "quantize_exclude", "report")}
        return _noted(converted(opened, output, ConvertOptions(**own), sources=origins), notes)
    group = said.get("awq_block_size")
    if quantize_form is None and own["to"] != "trtllm":
        own["quantize_form"] = _form_with_activations(name)
    own |= {"quantize": name, "decoder_type": None, **_of_algorithm(name, said, notes, group)}
    seen = read_statistics(statistics)
    if seen is None and others.get("share") is not None and _sees_activations(name, own):
        raise UsageError(
            f"{name} depends on activations: each of several processes would run the whole model, and find other last "
            "bits, as sums are added in other orders, so that their plans would not be the same",
            remedy="calibrate once, with --dry-run --save-stats FILE, and give all processes --stats FILE, as "
            "the script of --slurm does; or --engine ray, which calibrates once",
        )
    if seen is None and _sees_activations(name, own):
        seen = _calibrated(opened, own, said, notes, calib_field, _TYPES.get(calib_dtype or ""), others.get("progress"))
    if seen is not None:
        if save_statistics is not None:
            seen.save(save_statistics)
        own |= {"statistics": seen, "enable_kv_cache": said.get("enable_kv_cache")}
        own["decoder_type"] = said.get("decoder_type")
    elif calib_dataset is not None:
        notes.append(f"calib_dataset has no effect: nothing of {name}, written so, depends on activations")
    if seen is None and save_statistics is not None:
        raise UsageError(
            f"{name} needs no calibration, so that there is nothing to save", remedy="leave out --save-stats"
        )
    return _noted(converted(opened, output, ConvertOptions(**own), sources=origins), notes)


_FROM_FILE = (
    "algorithm to calib_dataset num_calib_size calib_batch_size calib_sequence_length awq_block_size sq_alpha "
    "enable_kv_cache decoder_type inference_tensor_parallel inference_pipeline_parallel dtype compress tokenizer"
).split()


def _check_saved(path: str, output: str) -> None:
    """Raise unless statistics may be written there, before hours are spent to find them."""
    check_replaceable(path)
    if f"{os.path.realpath(path)}{os.sep}".startswith(f"{os.path.realpath(output)}{os.sep}"):
        raise UsageError(
            "statistics cannot be saved where the model is written", path=path, remedy="choose another path for them"
        )


def _noted(done: Conversion, notes: Sequence[str]) -> Conversion:
    return replace(done, notes=(*done.notes, *notes))


def _together(unused: Mapping[str, str]) -> dict[str, str]:
    """Keys with the same reason as one."""
    several: dict[str, list[str]] = {}
    for key, reason in unused.items():
        several.setdefault(reason, []).append(key)
    return {
        ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else ""): reason
        for reason, keys in several.items()
    }


def _dtype(stated: Any) -> str | None:
    if stated is None:
        return None
    found = _DTYPES.get(str(stated))
    if found is None:
        raise UsageError("no such type for what is not quantized", expected=", ".join(_DTYPES), found=stated)
    return found


def _of_algorithm(name: str, said: Mapping[str, Any], notes: list[str], group: int | None) -> dict[str, Any]:
    """What is said of groups and of SmoothQuant, where the algorithm has it."""
    found: dict[str, Any] = {}
    layouts = layouts_of(name).values()
    if any(layout.algorithm == "int4" for layout in layouts):
        found["group_size"] = group
    elif group is not None:
        notes.append(f"awq_block_size has no effect: {name} has no groups of columns to choose")
    if any(layout.smoothing == "smoothquant" for layout in layouts):
        found["sq_alpha"] = said.get("sq_alpha")
    elif said.get("sq_alpha") is not None:
        notes.append(f"sq_alpha has no effect: it is SmoothQuant's, and {name} has none")
    return found


def _form_with_activations(name: str) -> str | None:
    """The form of a Hugging Face folder that stores what calibration finds, which is the one that NeMo writes."""
    layout = layouts_of(name).get("modelopt")
    return "modelopt" if layout is not None and layout.sees_activations else None


def written_form(name: str, to: str, form: str | None) -> str:
    """The form in which an algorithm's weights are written ``to`` trtllm or hf, where ``form`` is asked for."""
    if form is not None:
        return form
    return "trtllm" if to == "trtllm" else _form_with_activations(name) or usual_form(name)


def _sees_activations(name: str, own: Mapping[str, Any]) -> bool:
    """Whether an algorithm, as it is written, depends on activations; what cannot be written so is refused.

    Raises:
        UsageError: the options are not possible, whatever calibration finds.
    """
    asked = {**own, "statistics": None}
    layout = layouts_of(name).get(written_form(name, own["to"], own.get("quantize_form")))
    if layout is None or not layout.sees_activations:
        ConvertOptions(**asked)
        return False
    group = own.get("group_size") or DEFAULT_GROUP
    request = ConvertOptions(**{**asked, "statistics": Statistics("", "float32", {}, group_size=group)}).quantization
    assert request is not None
    return layout_of(request).sees_activations


def _calibrated(
    opened: Checkpoint,
    own: Mapping[str, Any],
    said: Mapping[str, Any],
    notes: list[str],
    field: str | None,
    kind: str | None,
    progress: Progress | None,
) -> Statistics:
    """Run the model."""
    dataset = said.get("calib_dataset")
    if dataset is None:
        raise UsageError(
            f"{own['quantize']} depends on activations, and there is nothing to calibrate with",
            expected="--calib-dataset FILE, or --stats of an earlier calibration",
            remedy="give some text that is like what the model will read",
        )
    samples = read_samples(dataset, field)
    calibration = _calibration()
    plain = ConvertOptions(**{key: own[key] for key in ("to", "family", "config", "dtype", "force")})
    hub = under_hub_names(opened, plain)
    check_quantizable(hub)
    length = said.get("calib_sequence_length")
    positions = hub.config.get("max_position_embeddings")
    if length is None:
        length = min(_LENGTH, positions) if isinstance(positions, int) and positions > 0 else _LENGTH
    else:
        check_positions(opened.path, positions, length)
    batches = _batches(calibration, samples, hub, own.get("tokenizer"), said, length, notes)
    weights = linear_weights(hub)
    group = own.get("group_size") or DEFAULT_GROUP
    searched = any(layout.smoothing == "awq" for layout in layouts_of(own["quantize"]).values())
    if searched and not own["quantize_exclude"]:
        for name, weight in weights.items():
            if weight.shape[-1] % group:
                raise groups_do_not_divide(name, weight.shape[-1], group)
    facts = {
        "dataset": os.path.basename(samples.path),
        "samples": sum(len(ids) for ids in batches),
        "tokens": sum(ids.size for ids in batches),
        "sequence_length": length,
        "batches": len(batches),
    }
    found: Statistics = calibration.calibrate(
        hub,
        weights,
        batches,
        group_size=group if searched else None,
        computed_in=kind or _own_type(weights),
        facts=facts,
        progress=progress,
    )
    return found


def _batches(
    calibration: Any,
    samples: Samples,
    hub: Checkpoint,
    tokenizer: Any,
    said: Mapping[str, Any],
    length: int,
    notes: list[str],
) -> list[Array]:
    asked = said.get("num_calib_size")
    size = _SIZE if asked is None else asked
    if samples.texts:
        own = read_tokenizer(os.fspath(tokenizer)) if tokenizer is not None else hub.tokenizer
        ids = calibration.token_ids(samples.texts, own, hub.path, length, stream=samples.stream)
    else:
        ids = cut(samples.ids[0], length) if samples.stream else iter(samples.ids)
    used = []
    for sequence in ids:
        if len(sequence):
            used.append(sequence)
        if len(used) == size:
            break
    if asked is not None and len(used) < size:
        raise UsageError(
            "there is less to calibrate with than was asked for",
            path=samples.path,
            expected=f"{size} samples of up to {length} tokens",
            found=len(used),
            remedy=f"give more text, or say --num-calib-size {len(used)}" if used else "give a text",
        )
    if not used:
        raise UsageError("there is no text to calibrate with", path=samples.path, expected="at least one token")
    batches = batches_of(used, length, said.get("calib_batch_size") or _BATCH)
    count = sum(batch.size for batch in batches)
    notes.append(f"calibrated with {len(used):,} samples of {samples.path}, {count:,} tokens")
    return batches


def _own_type(weights: Mapping[str, Any]) -> str:
    kinds = Counter(tensor.dtype.name for tensor in weights.values())
    found = kinds.most_common(1)[0][0] if kinds else "bfloat16"
    return found if found in _TYPES.values() else "float32"


def _calibration() -> Any:
    """The package that runs models: torch is imported when one is run, and by name, for nothing here needs it else.

    Raises:
        MissingLibraryError: it, or transformers, is not installed.
    """
    try:
        return import_module("anyckpt.torch.calibration")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        raise MissingLibraryError(
            "calibration needs torch, which is not installed", remedy="pip install 'anyckpt[quantize]'"
        ) from error
