"""Checkpoints in a bucket are found and read as those on a disk are, in few requests."""

from __future__ import annotations

import pickle
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from tests.cli.runner import Runner
from tests.places import files_below
from tests.servers import FAULTS, SECRET, TOKEN, Proxy, S3Server
from tests.storage.test_place import FOLDERS, told
from tests.support import fixture_path

import anyckpt
from anyckpt.errors import FormatError, UnreachableError
from anyckpt.formats import registry
from anyckpt.storage.location import look_at
from anyckpt.storage.remote import bucket, stores
from anyckpt.storage.requests import at_once

pytestmark = pytest.mark.peer
NEMO = "nemo/nemo1_basic_v3_0_0/toy.nemo"


def put(s3: S3Server, name: str, at: str) -> str:
    """A fixture in a bucket; its path."""
    path = fixture_path(name)
    files = {f"{at}/{file}": data for file, data in files_below(path).items()} if path.is_dir() else {}
    return s3.bucket("weights", files or {at: path.read_bytes()}) + f"/{at}"


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_read_in_a_bucket_as_on_a_disk(name: str, s3: S3Server) -> None:
    wanted = told(registry.read(fixture_path(name)), str(fixture_path(name)))
    path = put(s3, name, name)  # under the names of all folders: some are told by them
    assert told(registry.read(path), path) == wanted
    assert told(registry.read(f"{path}/"), f"{path}/") == wanted


def test_an_archive_is_read_in_a_bucket_as_on_a_disk(s3: S3Server) -> None:
    path = put(s3, NEMO, "some models/a toy%20.nemo")
    assert told(registry.read(path), path) == told(registry.read(fixture_path(NEMO)), str(fixture_path(NEMO)))
    assert look_at(f"{path}::model_config.yaml").open().read(0, 5) == look_at(
        f"{fixture_path(NEMO)}::model_config.yaml"
    ).open().read(0, 5)


def test_folders_are_listed_one_by_one_where_there_are_too_many_objects(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "mcore/zarr_v012_w2_flat/ckpt"
    wanted = told(registry.read(fixture_path(name)), str(fixture_path(name)))
    monkeypatch.setattr(bucket, "MOST_FLAT", 3)
    path = put(s3, name, "run/ckpt")
    assert told(registry.read(path), path) == wanted


def test_what_consoles_put_for_a_folder_is_no_file(s3: S3Server) -> None:
    files = {"a/": b"", "a/empty/": b"", "a/b/": b"", "a/b/x": b"1", "a/c": b"", "ab": b"2"}
    location = look_at(s3.bucket("weights", files) + "/a")
    assert location.names == ("b", "c", "empty")
    assert location.folder().names() == ["b/x", "c", "empty"]
    assert location.is_folder("b")
    assert location.is_file("b", "x")
    assert not location.is_file("b")
    assert location.place.kind("s3://weights/ab") == "file"
    assert location.place.kind("s3://weights/abc") is None
    assert location.parent == "s3://weights"


def test_what_is_not_there_is_told_with_what_is(s3: S3Server) -> None:
    put(s3, NEMO, "models/toy.nemo")
    with pytest.raises(FormatError) as raised:
        look_at("s3://weights/models/tou.nemo")
    assert str(raised.value) == (
        "s3://weights/models/tou.nemo: does not exist (found toy.nemo in s3://weights/models); did you mean toy.nemo?"
    )
    with pytest.raises(FormatError, match="the bucket 'other' does not exist .*NoSuchBucket.*check its name"):
        look_at("s3://other/models")
    with pytest.raises(anyckpt.FormatError, match="s3://weights/models"):
        registry.read("s3://weights/models")


def sharded(shards: int) -> dict[str, bytes]:
    """A folder of Hugging Face's with so many files of weights."""
    import json
    import struct

    files = {"config.json": (fixture_path("families/qwen2_moe/hf") / "config.json").read_bytes()}
    names = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        entry = {f"w{number}": {"dtype": "F32", "shape": [40_000], "data_offsets": [0, 160_000]}}
        head = json.dumps(entry).encode()
        files[file] = struct.pack("<Q", len(head)) + head + bytes(160_000)
        names[f"w{number}"] = file
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": names}).encode()
    return files


def test_inspecting_asks_little(s3: S3Server, proxy: Proxy) -> None:
    path = s3.bucket("weights", {f"hf/{name}": data for name, data in sharded(12).items()})
    s3.put("weights", {"toy.nemo": fixture_path(NEMO).read_bytes()})
    dcp = fixture_path("mcore/gpt_opt_plain/ckpt")
    s3.put("weights", {f"dcp/{name}": data for name, data in files_below(dcp).items()})
    for name, most_requests, most_bytes in (("hf", 12 + 6, 13 * 66_000), ("toy.nemo", 6, 25_000), ("dcp", 12, 350_000)):
        proxy.asked.clear()
        anyckpt.inspect(f"{path}/{name}")
        assert len(proxy.asked) <= most_requests, (name, proxy.asked)
        assert proxy.nbytes <= most_bytes, name


def test_every_command_takes_paths_of_a_bucket(
    s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = put(s3, "families/qwen2_moe/hf", "hf")
    run, out = Runner(capsys), tmp_path / "out"
    here = fixture_path("families/qwen2_moe/hf")
    assert run("inspect", path).out == run("inspect", here).out.replace(str(here), path)
    assert run("verify", "--deep", path).code == 0
    assert run("diff", path, here).code == 0
    assert run("report", path, "-o", tmp_path / "page.html").code == 0
    assert run("average", path, path, "-o", out).code == 0
    assert run("diff", out, path).code == 0
    assert run("convert", path, tmp_path / "again", "--to", "hf").code == 0
    assert run("diff", tmp_path / "again", path).code == 0
    assert run("merge", path, path, "-o", tmp_path / "merged", "--method", "linear").code == 0


def test_an_object_that_another_is_put_in_the_place_of_is_told(s3: S3Server) -> None:
    put(s3, NEMO, "toy.nemo")
    tensors = list(registry.read("s3://weights/toy.nemo").tensors.values())
    data = fixture_path(NEMO).read_bytes()
    s3.put("weights", {"toy.nemo": data[:-1] + b"\1"})
    with pytest.raises(
        UnreachableError, match="^s3://weights/toy.nemo.*changed while it was being read .*expected 20,480 b"
    ):
        next(tensors[0].chunks(10))
    s3.put("weights", {"toy.nemo": data[:100]})
    with pytest.raises((FormatError, UnreachableError), match=r"changed while|has become shorter"):
        next(tensors[0].chunks(10))


def test_another_process_gets_sources_without_credentials(s3: S3Server) -> None:
    source = look_at(put(s3, NEMO, "toy.nemo")).open()
    travelling = pickle.dumps(source)
    assert SECRET.encode() not in travelling
    assert TOKEN.encode() not in travelling
    again = pickle.loads(travelling)
    assert again.read(100, 900) == source.read(100, 900)
    assert again.identity() == source.identity()


@pytest.mark.parametrize("seed", range(20))
def test_networks_may_fail_as_they_do(seed: int, s3: S3Server, proxy: Proxy, tmp_path: Path) -> None:
    chance = random.Random(seed)
    name = ("families/qwen2_moe/hf", NEMO, "mcore/gpt_opt_plain/ckpt")[seed % 3]
    path = put(s3, name, "a/toy.nemo" if name == NEMO else "a/ckpt")
    rows = [chance.choice(FAULTS) if chance.random() < 0.4 else None for _ in range(5000)]
    for start in range(0, len(rows), 3):  # so that no request fails more often than it is tried
        rows[start] = None
    proxy.fault = lambda number, asked: rows[number % len(rows)] if asked.method == "GET" else None
    wanted = registry.read(fixture_path(name))
    found = registry.read(path)
    assert list(found.tensors) == list(wanted.tensors)
    assert found.config == wanted.config
    for one in list(wanted.tensors)[:: max(1, len(wanted.tensors) // 8)]:
        assert b"".join(part.tobytes() for part in found.tensors[one].chunks(999)) == b"".join(
            part.tobytes() for part in wanted.tensors[one].chunks(999)
        )


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "slow"])
def test_a_server_that_always_fails_is_told_in_time(fault: str, s3: S3Server, proxy: Proxy) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "RETRIES", 2)
        patch.setenv("AWS_PATIENCE", fault)  # a store of its own
        source = look_at(put(s3, NEMO, "toy.nemo")).open()
        proxy.fault = lambda number, asked: fault if asked.range else None
        with pytest.raises(UnreachableError, match="^s3://weights/toy.nemo: cannot be rea"):
            source.read(600, 1000)


def forbid(proxy: Proxy, answer: str, what: str = "") -> None:
    proxy.fault = lambda number, asked: answer if what in asked.path else None


@pytest.mark.parametrize(
    ("answer", "told_so"),
    [
        ("403 AccessDenied", "these credentials may not read it, .*403 AccessDenied.*set AWS_PROFILE"),
        ("403 InvalidAccessKeyId", "the credentials are not valid there .*set AWS_PROFILE"),
        ("403 SignatureDoesNotMatch", "the credentials are not valid there"),
        ("400 ExpiredToken", "the credentials have expired .*log in again"),
        ("403 RequestTimeTooSkewed", "clock is off; set the clock"),
        ("301 PermanentRedirect", "is in another region than the one asked .*set AWS_REGION"),
        ("400 AuthorizationHeaderMalformed", "is in another region than the one asked .*set AWS_REGION"),
    ],
)
def test_what_a_server_refuses_is_told_with_what_to_do(answer: str, told_so: str, s3: S3Server, proxy: Proxy) -> None:
    path = put(s3, "families/qwen2_moe/hf", "hf")
    forbid(proxy, answer)
    with pytest.raises((FormatError, UnreachableError), match=rf"^{path}: .*{told_so}") as raised:
        registry.read(path)
    assert raised.value.__cause__ is raised.value.__context__ is None  # obstore's text is in no traceback


def test_files_are_read_where_folders_may_not_be_listed(s3: S3Server, proxy: Proxy) -> None:
    path = put(s3, NEMO, "toy.nemo")
    forbid(proxy, "403 AccessDenied", "list-type")
    assert registry.read(path).format == "nemo"


def test_without_credentials_it_is_said_that_none_were_found(
    s3: S3Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    forbid(proxy, "403 AccessDenied")
    with pytest.raises(FormatError, match="may not be read by everybody, and no credentials were found"):
        look_at("s3://weights/hf")


def test_a_file_that_cannot_be_read_now_is_not_taken_for_missing(s3: S3Server, proxy: Proxy) -> None:
    path = put(s3, "families/qwen2_moe/hf", "hf")
    forbid(proxy, "403 AccessDenied", "generation_config.json")
    with pytest.raises(UnreachableError, match=f"^{path}/generation_config.json: these credentials may not read it"):
        checkpoint = registry.read(path)
        checkpoint.artifacts["generation_config.json"].read(0, 1)


def test_small_tensors_are_asked_for_together(s3: S3Server, proxy: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    path = put(s3, "families/qwen2_moe/hf", "hf")
    here = fixture_path("families/qwen2_moe/hf")
    run = Runner(capsys)
    for words, most in (
        (("diff", path, here), 12),
        (("inspect", "--stats", "--digest", path), 12),
        (("verify", "--deep", path), 14),
    ):
        proxy.asked.clear()
        found = run(*words)
        assert found.code == 0
        assert len(proxy.asked) <= most, words
        assert found.out == run(*(here if word == path else word for word in words)).out.replace(str(here), path)


def test_what_cannot_be_reached_is_no_damage(s3: S3Server, proxy: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    path = put(s3, NEMO, "toy.nemo")
    asked = iter(range(10_000))
    proxy.fault = lambda number, request: "403 ExpiredToken" if request.range and next(asked) > 2 else None
    assert f"{path}: the credentials have expired" in Runner(capsys)("verify", "--deep", path).error


def test_an_answer_that_stands_still_is_asked_for_again(
    s3: S3Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stores._CLIENT, "read_timeout", "200ms")
    source = look_at(put(s3, NEMO, "toy.nemo")).open()
    proxy.asked.clear()
    proxy.fault = lambda number, asked: "stall" if number < 2 else None
    assert source.read(100, 5000) == fixture_path(NEMO).read_bytes()[100:5100]
    assert len(proxy.asked) == 3


def test_who_is_interrupted_does_not_wait_for_answers(s3: S3Server, proxy: Proxy) -> None:
    source = look_at(put(s3, NEMO, "toy.nemo")).open()
    proxy.latency = 3.0
    started = time.monotonic()

    def interrupt() -> None:
        time.sleep(0.2)
        raise KeyboardInterrupt

    def read() -> None:
        source.read(0, 5000)

    with pytest.raises(KeyboardInterrupt):
        at_once([interrupt, read, read], 3)
    assert time.monotonic() - started < 2.0


def test_work_goes_on_only_with_the_same_objects(s3: S3Server) -> None:
    path = put(s3, NEMO, "toy.nemo")
    before = look_at(path).open().identity()
    assert look_at(path).open().identity() == before
    s3.put("weights", {"toy.nemo": fixture_path(NEMO).read_bytes()[:-1] + b"x"})
    assert look_at(path).open().identity() != before


def test_training_loads_from_a_bucket(s3: S3Server, tmp_path: Path) -> None:
    import torch

    import anyckpt.torch

    torch.save({"w": torch.arange(5.0)}, tmp_path / "a.pt")
    s3.bucket("weights", {"run/a.pt": (tmp_path / "a.pt").read_bytes()})
    state = {"w": torch.zeros(5)}
    anyckpt.torch.load(state, "s3://weights/run/a.pt")
    assert state["w"].tolist() == [0, 1, 2, 3, 4]
    assert anyckpt.open("s3://weights/run/a.pt")["w"].numpy().tolist() == [0, 1, 2, 3, 4]


def test_google_is_asked_in_its_own_words(s3: S3Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Google's XML interface is S3's, but for its signatures, which an emulator does not look at."""
    name = "families/qwen2_moe/hf"
    put(s3, name, "hf")
    s3.put("weights", {f"hf/{file}": data for file, data in files_below(fixture_path(name)).items()}, everybody=True)
    s3.client().put_bucket_acl(Bucket="weights", ACL="public-read")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    path = "gs://weights/hf"
    assert told(registry.read(path), path) == told(registry.read(fixture_path(name)), str(fixture_path(name)))
    with pytest.raises(FormatError, match="the bucket 'other' does not exist"):
        look_at("gs://other/x")


def test_a_conversion_goes_on_after_its_credentials_expired(
    s3: S3Server, proxy: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = s3.bucket("weights", {f"hf/{name}": data for name, data in sharded(6).items()}) + "/hf"
    run, words = Runner(capsys), ("convert", path, tmp_path / "out", "--to", "safetensors")
    count = iter(range(1000))
    proxy.fault = lambda number, asked: "400 ExpiredToken" if asked.range and next(count) > 10 else None
    assert "the credentials have expired" in run(*words).error
    proxy.fault = lambda number, asked: None
    assert run(*words, "--resume").code == 0
    assert run("diff", "--weights-only", path, tmp_path / "out").code == 0


def test_a_conversion_that_is_interrupted_does_not_wait_for_answers(
    s3: S3Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with Ctrl-C on a connection over which nothing comes any more."""
    path = s3.bucket("weights", {f"hf/{name}": data for name, data in sharded(6).items()}) + "/hf"
    checkpoint = anyckpt.open(path)
    proxy.latency = 20.0
    interrupted = threading.Timer(1.0, signal.raise_signal, (signal.SIGINT,))
    started = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs tests beside others
    try:
        interrupted.start()
        with pytest.raises(KeyboardInterrupt):
            anyckpt.convert(checkpoint, tmp_path / "out", to="safetensors")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 10.0
