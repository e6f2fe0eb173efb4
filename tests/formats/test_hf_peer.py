"""transformers loads our folders, and we read ``pytorch_model*.bin`` as torch writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

from safetensors.torch import load_file  # noqa: E402
from tests.support import fixture_path, sha256_of, write_plan  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt.checkpoint import Checkpoint  # noqa: E402
from anyckpt.formats.format import WriteOptions  # noqa: E402
from anyckpt.formats.hf import FORMAT  # noqa: E402
from anyckpt.formats.registry import look_at  # noqa: E402


def read(path: Path) -> Checkpoint:
    return FORMAT.read(look_at(path))


def written(checkpoint: Checkpoint, path: Path, **options: Any) -> Path:
    assert FORMAT.plan is not None
    return write_plan(FORMAT.plan(checkpoint, WriteOptions(**options)), path)


@pytest.mark.parametrize("legacy", [False, True])
def test_bin_files(tmp_path: Path, legacy: bool) -> None:
    path = fixture_path("families/llama/hf")
    state = load_file(path / "model.safetensors")
    shutil.copy(path / "config.json", tmp_path)
    expected = {name: sha256_of(tensor) for name, tensor in read(path).tensors.items()}
    names = list(state)
    whole, first, second = state, {n: state[n] for n in names[:9]}, {n: state[n] for n in names[9:]}

    def save(value: dict[str, torch.Tensor], name: str) -> None:
        torch.save(value, tmp_path / name, _use_new_zipfile_serialization=not legacy)

    save(whole, "pytorch_model.bin")
    assert {name: sha256_of(tensor) for name, tensor in read(tmp_path).tensors.items()} == expected
    (tmp_path / "pytorch_model.bin").unlink()
    files = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    save(first, files[0])
    save(second, files[1])
    index = {"metadata": {}, "weight_map": {**dict.fromkeys(first, files[0]), **dict.fromkeys(second, files[1])}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert {name: sha256_of(tensor) for name, tensor in read(tmp_path).tensors.items()} == expected


def test_transformers_loads_our_shards_and_we_its(tmp_path: Path) -> None:
    source = read(fixture_path("families/llama/hf"))
    ours = written(source, tmp_path / "ours", max_shard_size=100_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(ours)
    state = load_file(fixture_path("families/llama/hf") / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    model.save_pretrained(tmp_path / "theirs", max_shard_size=100_000)
    names = {path.name for path in (tmp_path / "theirs").iterdir() if path.name.startswith("model")}
    assert names == {path.name for path in ours.iterdir() if path.name.startswith("model")}
    theirs = json.loads((tmp_path / "theirs/model.safetensors.index.json").read_text())
    assert theirs["metadata"] == json.loads((ours / "model.safetensors.index.json").read_text())["metadata"]
    again = read(tmp_path / "theirs")
    assert {n: sha256_of(t) for n, t in again.tensors.items()} == {n: sha256_of(t) for n, t in source.tensors.items()}


def test_tokenizer_loads(tmp_path: Path) -> None:
    ours = written(read(fixture_path("families/llama/hf")), tmp_path / "ours")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ours)
    original = transformers.AutoTokenizer.from_pretrained(fixture_path("families/llama/hf"))
    assert tokenizer.get_vocab() == original.get_vocab()


def test_transformers_loads_the_tokenizer_of_a_nemo(tmp_path: Path) -> None:
    """A sentencepiece model of NeMo's becomes a tokenizer of transformers that gives the same ids."""
    sentencepiece = pytest.importorskip("sentencepiece")
    ours = tmp_path / "llama"
    anyckpt.convert(fixture_path("nemo/nemo1_dist_tp1/model.nemo"), ours, to="hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ours)
    original = sentencepiece.SentencePieceProcessor(model_file=str(ours / "tokenizer.model"))
    assert len(tokenizer) == original.vocab_size()
    for text in ("hello world", "the cat sat on the mat", "a b c"):
        assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (original.bos_id(), original.eos_id())
