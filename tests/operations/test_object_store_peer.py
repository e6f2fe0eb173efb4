"""Checkpoints written to a bucket of a real server: the files of a disk, through faults of the network, too."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("obstore")
pytest.importorskip("moto")
safetensors = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.peer

from tests.cli.runner import Runner  # noqa: E402
from tests.places import files_below  # noqa: E402
from tests.servers import SECRET, TOKEN, Proxy, S3Server  # noqa: E402
from tests.support import FIXTURES, fixture_path  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt.errors import OutputError  # noqa: E402
from anyckpt.storage import objects  # noqa: E402
from anyckpt.storage.remote import stores  # noqa: E402
from anyckpt.storage.remote.objects import objects_at  # noqa: E402

LLAMA = "families/llama/hf"
LARGE = 13_000_000


@pytest.fixture
def bucket(s3: S3Server) -> S3Server:
    s3.bucket("models")
    return s3


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file of more than two parts."""
    weights = np.random.default_rng(1).integers(0, 256, LARGE, dtype=np.uint8)
    safetensors.save_file({"w": weights, "b": weights[:5]}, tmp_path / "large.safetensors")
    return tmp_path / "large.safetensors"


@pytest.fixture
def runner(capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capsys)


def unfinished_uploads(s3: S3Server) -> int:
    return len(s3.client().list_multipart_uploads(Bucket="models").get("Uploads", []))


@pytest.mark.parametrize("to", ["hf", "megatron-core", "megatron-core-zarr", "megatron-lm", "dcp", "nemo", "torch"])
def test_the_files_are_those_of_a_disk(to: str, bucket: S3Server, tmp_path: Path) -> None:
    source, path = fixture_path(LLAMA), "s3://models/run 1/out"
    anyckpt.convert(source, tmp_path / "out", to=to)
    anyckpt.convert(source, path, to=to)
    assert {f"run 1/{name}": data for name, data in files_below(tmp_path).items()} == bucket.files("models")
    assert anyckpt.verify(path).problems == []
    assert list(anyckpt.open(path)) == list(anyckpt.open(tmp_path / "out"))


def test_a_large_file_goes_up_in_parts(large: Path, bucket: S3Server, proxy: Proxy, tmp_path: Path) -> None:
    anyckpt.convert(large, "s3://models/out.safetensors", to="safetensors")
    parts = [asked for asked in proxy.asked if "partNumber=" in asked.path]
    assert len(parts) == 3, "two, and what is left of so many bytes"
    assert sum("uploads" in asked.path for asked in proxy.asked) == 1
    anyckpt.convert(large, tmp_path / "out.safetensors", to="safetensors")
    (tmp_path / "back.safetensors").write_bytes(bucket.files("models")["out.safetensors"])
    assert files_below(tmp_path)["out.safetensors"] == files_below(tmp_path)["back.safetensors"]
    assert safetensors.load_file(tmp_path / "back.safetensors")["w"].nbytes == LARGE
    assert unfinished_uploads(bucket) == 0


def test_few_requests_are_made(bucket: S3Server, proxy: Proxy) -> None:
    anyckpt.convert(fixture_path(LLAMA), "s3://models/out", to="hf")
    files = len([key for key in bucket.files("models") if "anyckpt" not in key])
    assert len([asked for asked in proxy.asked if asked.method == "PUT"]) == files + 4, "claim, twice; marker; manifest"
    assert len(proxy.asked) <= files + 20


def test_every_command_writes_there_what_it_writes_to_a_disk(bucket: S3Server, tmp_path: Path) -> None:
    """From a bucket to another place in it."""
    llama, lora, ranks = "families/llama/hf", "families/lora_llama/hf_adapter", "legacy/megatron_gpt_tp2_pp2"
    for name in (llama, lora, ranks):
        bucket.put("models", {f"from/{name}/{file}": data for file, data in files_below(fixture_path(name)).items()})
    for here, there in ((str(FIXTURES), str(tmp_path)), ("s3://models/from", "s3://models/to")):
        base, adapter = f"{here}/{llama}", f"{here}/{lora}"
        anyckpt.average([base, base], f"{there}/average", to="hf")
        anyckpt.reshard(f"{here}/{ranks}", f"{there}/reshard", layout=anyckpt.LayoutRequest(tensor_parallel=1))
        anyckpt.merge([base, base], f"{there}/merge", method="slerp")
        anyckpt.merge_lora(base, adapter, f"{there}/merged", to="hf")
        anyckpt.quantize(base, f"{there}/quantized", algorithm="fp8_per_channel", to="hf")
    found = {key.removeprefix("to/"): data for key, data in bucket.files("models").items() if key.startswith("to/")}
    wanted = files_below(tmp_path)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name] and not name.endswith("manifest.json")] == []


@pytest.mark.parametrize("to", ["hf", "dcp", "megatron-core", "torch", "safetensors"])
def test_libraries_load_what_was_written_to_a_bucket(to: str, bucket: S3Server, tmp_path: Path) -> None:
    """From a bucket into a bucket, and from there by boto3 to a disk, where the format's own library reads it."""
    torch = pytest.importorskip("torch")
    source = fixture_path(LLAMA)
    bucket.put("models", {f"llama/{name}": data for name, data in files_below(source).items()})
    name = "out.pt" if to == "torch" else "out.safetensors" if to == "safetensors" else "out"
    anyckpt.convert("s3://models/llama", f"s3://models/{name}", to=to)
    for key in bucket.files("models"):
        if key.startswith(name) and ".anyckpt" not in key:
            (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
            bucket.client().download_file("models", key, str(tmp_path / key))
    path = tmp_path / name
    wanted = {key: tensor.torch() for key, tensor in anyckpt.open(source).tensors.items()}
    if to == "hf":
        transformers = pytest.importorskip("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        found = {key: value for key, value in model.state_dict().items() if key in wanted}
    elif to == "safetensors":
        found = pytest.importorskip("safetensors.torch").load_file(path)
    elif to == "torch":
        found = torch.load(path, weights_only=True)
    elif to == "dcp":
        from torch.distributed.checkpoint import FileSystemReader, load

        found = {key: torch.empty_like(tensor) for key, tensor in wanted.items()}
        load(found, storage_reader=FileSystemReader(path), no_dist=True)
    else:
        anyckpt.convert(source, tmp_path / "right", to=to)
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            wanted, found = plain_tensors(tmp_path / "right"), plain_tensors(path)
        finally:
            torch.distributed.destroy_process_group()
    assert found.keys() == wanted.keys() and wanted
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


def plain_tensors(path: Path) -> dict[str, Any]:
    """What Megatron-Core itself reads of a checkpoint."""
    dist_checkpointing = pytest.importorskip("megatron.core.dist_checkpointing")
    found = dist_checkpointing.load_plain_tensors(str(path)).items()
    return {name: tensor for name, tensor in found if hasattr(tensor, "dtype")}


def test_what_is_there_stays_unless_it_is_to_go(bucket: S3Server, runner: Runner) -> None:
    path, other = str(fixture_path(LLAMA)), "s3://models/notes"
    runner("convert", path, "s3://models/out", "--to", "hf")
    before = bucket.files("models")
    assert "already exists" in runner("convert", path, "s3://models/out", "--to", "dcp").error
    assert bucket.files("models") == before
    again = runner("convert", path, "s3://models/out", "--to", "hf", "--resume", "--json").json
    assert again["resumed_bytes"] == again["bytes_written"]
    runner("convert", path, "s3://models/out", "--to", "dcp", "--overwrite")
    assert not before.keys() & {key for key in bucket.files("models") if "manifest" not in key}
    bucket.put("models", {"out/thesis.tex": b"years of work"})
    assert "thesis" in runner("convert", path, "s3://models/out", "--to", "hf", "--overwrite").error
    bucket.put("models", {"notes/a.txt": b"1"})
    assert "something else" in runner("convert", path, other, "--to", "hf", "--overwrite").error
    assert "holds the source" in runner("convert", "s3://models/out", "s3://models", "--to", "hf").error
    assert "lies inside" in runner("convert", "s3://models/out", "s3://models/out/x", "--to", "hf").error


def test_a_failing_network_is_survived(large: Path, bucket: S3Server, proxy: Proxy, tmp_path: Path) -> None:
    generator = random.Random(3)
    anyckpt.convert(large, tmp_path / "out", to="dcp")
    wanted = {f"out/{name}": data for name, data in files_below(tmp_path / "out").items()}
    for round_number in range(6):
        chosen = {generator.randrange(4, 14) for _ in range(3)}
        fault = generator.choice(["503", "reset", "500"])
        proxy.asked.clear()
        proxy.fault = lambda number, asked, chosen=chosen, fault=fault: fault if number in chosen else None
        anyckpt.convert(large, f"s3://models/{round_number}/out", to="dcp")
        proxy.fault = lambda number, asked: None
        found = {
            key.partition("/")[2]: data for key, data in bucket.files("models").items() if key[0] == str(round_number)
        }
        assert found == wanted


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("fault", ["done reset", "done 500 InternalError", "done 503 SlowDown"])
def test_an_upload_that_was_completed_although_nobody_was_told_so(
    fault: str, replaces: bool, large: Path, bucket: S3Server, proxy: Proxy, tmp_path: Path
) -> None:
    if replaces:
        bucket.put("models", {"out.safetensors": b"another"})
    lost = iter([fault, "404 NoSuchUpload"])
    proxy.fault = lambda number, asked: (
        next(lost, None) if asked.method == "POST" and "uploadId=" in asked.path else None
    )
    anyckpt.convert(large, "s3://models/out.safetensors", to="safetensors", overwrite=replaces)
    assert next(lost, None) is None, "an answer was lost, and the next said that there is no such upload"
    anyckpt.convert(large, tmp_path / "out.safetensors", to="safetensors")
    assert bucket.files("models")["out.safetensors"] == (tmp_path / "out.safetensors").read_bytes()


@pytest.mark.parametrize("there", [None, b"another", bytes(LARGE)])
def test_an_upload_that_is_gone_is_an_error(there: bytes | None, bucket: S3Server, proxy: Proxy) -> None:
    """Of the same size, too, where it is the one that was there before."""
    if there is not None:
        bucket.put("models", {"data.bin": there})
    found, key = objects_at("s3://models/data.bin")
    facts = found.facts(key)
    upload = found.upload(key, LARGE, 2)
    upload.write(bytes(LARGE))
    proxy.fault = lambda number, asked: "404 NoSuchUpload" if asked.method == "POST" else None
    with pytest.raises(OutputError):
        upload.finish("" if facts is None else facts.tag)
    assert bucket.files("models") == ({} if there is None else {"data.bin": there})


@pytest.mark.parametrize("fault", ["403 AccessDenied", "403 ExpiredToken", "404 NoSuchBucket"])
def test_what_may_not_be_written_is_said_without_credentials(
    fault: str, bucket: S3Server, proxy: Proxy, runner: Runner
) -> None:
    proxy.fault = lambda number, asked: fault if asked.method in ("PUT", "POST") else None
    error = runner("convert", str(fixture_path(LLAMA)), "s3://models/out", "--to", "hf").error
    assert {"403 A": "may not be written", "403 E": "expired", "404 N": "does not exist"}[fault[:5]] in error
    assert "s3://models/" in error
    assert SECRET not in error and TOKEN not in error
    assert bucket.files("models") == {}


def test_a_run_that_ends_in_an_error_aborts_its_uploads(
    large: Path, bucket: S3Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)
    proxy.fault = lambda number, asked: "403 AccessDenied" if "partNumber=2" in asked.path else None
    with pytest.raises(OutputError, match="may not be written"):
        anyckpt.convert(large, "s3://models/out.safetensors", to="safetensors")
    assert unfinished_uploads(bucket) == 0
    assert [key for key in bucket.files("models") if "notes" not in key] == []


def test_a_store_without_conditions_is_written_and_that_is_said(bucket: S3Server, proxy: Proxy) -> None:
    tries = stores.RETRIES + 1
    proxy.fault = lambda number, asked: "501" if number < tries else None
    found, key = objects_at("s3://models/a")
    found.put(key, b"1", new=True)
    assert found.weaker and "another writer" in found.weaker[0]
    tries += len(proxy.asked)
    with pytest.raises(objects.ConflictError):
        found.put(key, b"2", new=True)
    assert bucket.files("models") == {"a": b"1"}


def test_unfinished_uploads_of_dead_runs_are_removed(bucket: S3Server, runner: Runner) -> None:
    anyckpt.convert(fixture_path(LLAMA), "s3://models/whole", to="hf")
    whole = bucket.files("models")
    found, _ = objects_at("s3://models/x")
    left = [found.upload(key, LARGE, 1) for key in ("dead/data.bin", "whole/model.safetensors", "elsewhere/data.bin")]
    for upload in left:
        upload.write(bytes(LARGE))
    bucket.put("models", {"dead/.anyckpt-unfinished": b'{"files": ["data.bin"]}', ".dead.anyckpt-partial/claim": b"{}"})
    while unfinished_uploads(bucket) < 3:
        time.sleep(0.05)
    shown = runner("clean", "s3://models", "--dry-run")
    assert "s3://models/dead/data.bin (unfinished upload)" in shown.out
    assert unfinished_uploads(bucket) == 3
    runner("clean", "s3://models", "--yes")
    assert bucket.files("models") == whole
    assert [one["Key"] for one in bucket.client().list_multipart_uploads(Bucket="models")["Uploads"]] == [
        "elsewhere/data.bin"
    ], "of other software, for all that is known"
    left[2].abandon()
