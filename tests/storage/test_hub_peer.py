"""Repositories of the Hub as places: what is asked of it, and what comes of its faults."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from tests.cli.runner import Runner
from tests.hub import TOKEN, Fault, Handler, Hub, answering, breaking, logged_in, sha256
from tests.places import files_below
from tests.support import fixture_path

import anyckpt
from anyckpt.errors import FormatError, UnreachableError, UnsafeError
from anyckpt.storage.hub import library, place
from anyckpt.storage.location import look_at
from anyckpt.storage.requests import holding

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.peer

DATA = np.random.default_rng(7).integers(0, 256, 3_000_000, np.uint8).tobytes()
LLAMA = files_below(fixture_path("families/llama/hf"))


def test_a_repository_lists_itself_by_one_question(hub: Hub) -> None:
    hub.add("org/m", {"config.json": b"{}", "sub/model.safetensors": DATA})
    found = look_at("hf://org/m")
    assert found.is_directory and found.names == ("config.json", "sub")
    assert look_at("hf://org/m/sub/model.safetensors").open().size == len(DATA)
    assert look_at("hf:org/m").names == found.names
    assert len(hub.of("hub", "/api/models")) == 2, "one for each spelling"


@pytest.mark.parametrize("direct", [False, True])
def test_ranges_are_read_and_the_storage_is_found_once(hub: Hub, direct: bool) -> None:
    hub.add("org/m", {"model.bin": DATA})
    hub.direct = direct
    source = look_at("hf://org/m").open("model.bin")
    with holding((source, start, 1000) for start in range(0, 3_000_000, 250_000)):
        for start in range(0, 3_000_000, 250_000):
            assert source.read(start, 1000) == DATA[start : start + 1000]
    assert len(hub.of("hub", "resolve")) == (12 if direct else 1)
    assert sum(one.nbytes for one in hub.asked) == 12_000


def test_small_files_come_from_the_hub_itself(hub: Hub) -> None:
    hub.add("org/m", {"config.json": b'{"a": 1}'})
    assert look_at("hf://org/m").open("config.json").read(1, 3) == b'"a"'
    assert not hub.of("storage")


def test_the_token_goes_to_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/m", {"model.bin": DATA, "config.json": b"{}"}, private=True)
    logged_in(monkeypatch)
    found = look_at("hf://org/m")
    assert found.open("model.bin").read(5, 10) == DATA[5:15]
    assert found.open("config.json").read(0, 2) == b"{}"
    assert all(one.authorized for one in hub.of("hub"))
    assert not any(one.authorized for one in hub.of("storage"))


def test_what_is_read_is_one_commit(hub: Hub) -> None:
    repository = hub.add("org/m", {"model.bin": DATA})
    source = look_at("hf://org/m").open("model.bin")
    first = source.identity()
    repository.commit({"model.bin": DATA[::-1]})
    assert source.read(0, 100) == DATA[:100]
    place.forget("org/m")
    newer = look_at("hf://org/m").open("model.bin")
    assert newer.read(0, 100) == DATA[::-1][:100]
    assert newer.identity() != first
    old = next(iter(repository.commits))
    assert look_at(f"hf://org/m@{old}").open("model.bin").identity() == first
    assert pickle.loads(pickle.dumps(source)).read(7, 9) == DATA[7:16]


FAULTS = {
    "busy": lambda: answering(503, 2),
    "busy hub": lambda: answering(500, 2, whom="hub"),
    "too often": lambda: answering(429, 2, Retry_After="0"),
    "reset": lambda: breaking(2),
    "reset hub": lambda: breaking(2, whom="hub"),
    "cut": lambda: breaking(3, after=700),
    "expired": lambda: answering(403, 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_waited_for(hub: Hub, fault: str) -> None:
    hub.add("org/m", {"model.bin": DATA})
    source = look_at("hf://org/m").open("model.bin")
    assert source.read(0, 4) == DATA[:4]
    hub.faults.append(FAULTS[fault]())
    place.forget("org/m")
    if "hub" in fault:
        source = look_at("hf://org/m").open("model.bin")
    assert source.read(100, 2000) == DATA[100:2100]


def test_an_address_that_expires_is_asked_for_again(hub: Hub) -> None:
    hub.add("org/m", {"model.bin": DATA})
    source = look_at("hf://org/m").open("model.bin")
    for start in range(0, 9000, 3000):
        hub.expire()
        with holding([(source, start, 100), (source, start + 200_000, 100)]):
            assert source.read(start, 100) == DATA[start : start + 100]
    assert len(hub.of("hub", "resolve")) == 3


def test_what_does_not_pass_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/m", {"model.bin": DATA})
    source = look_at("hf://org/m").open("model.bin")
    hub.faults.append(answering(503, 99))
    with pytest.raises(UnreachableError, match="model.bin: the Hub's storage answers with HTTP 503; try again later"):
        source.read(0, 10)
    hub.faults[:] = [answering(429, 99, whom="hub", Retry_After="300")]
    place.forget("org/m")
    with pytest.raises(UnreachableError, match="asked too often; try again in 300 seconds"):
        look_at("hf://org/m")
    assert len(hub.of("hub", "/api/models")) == 2, "nobody waits so long"


def messages(run: Runner, *paths: str) -> list[str]:
    return [run("inspect", path).error for path in paths]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capsys)


def test_what_keeps_a_repository_from_being_read_is_named(
    hub: Hub, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/gated", LLAMA, gated=True)
    hub.add("org/private", LLAMA, private=True)
    hub.add("org/m", LLAMA)
    gated, private, none, revision, file, spelled = messages(
        run, "hf://org/gated", "hf://org/private", "hf://org/none", "hf://org/m@v9", "hf://org/m/x.nemo", "hf://a//b"
    )
    assert f"is gated on the Hub; ask for access on {hub.url}/org/gated, and log in with `hf auth login`" in gated
    assert private == (
        "hf://org/private: is not on the Hub, or is private; check the name, or log in with `hf auth login` or set "
        "HF_TOKEN"
    )
    assert none == private.replace("private:", "none:")
    assert revision.startswith("hf://org/m@v9: has no such revision on the Hub, or has it no more; name a branch")
    assert file.startswith("hf://org/m/x.nemo: is not in the repository at the head of its main branch; check the name")
    assert "expected hf://org/name" in spelled
    monkeypatch.setenv("HF_TOKEN", "hf_wrongWrongWrong")
    (wrong,) = messages(run, "hf://org/m")
    assert "does not accept the token" in wrong and "wrongWrong" not in wrong
    logged_in(monkeypatch)
    assert run("inspect", "hf://org/private").code == run("inspect", "hf://org/gated").code == 0


def test_without_a_network_that_is_said(hub: Hub, run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    (text,) = messages(run, "hf://org/m")
    assert "the Hub cannot be reached" in text and "HF_HUB_OFFLINE=1" in text


def test_secrets_are_never_told(hub: Hub, run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/m", {**LLAMA, "model.safetensors": LLAMA["model.safetensors"]})
    logged_in(monkeypatch)
    for fault in (answering(503, 99), answering(404, 99), breaking(99), breaking(99, after=3)):
        hub.faults[:] = [fault]
        place.forget("org/m")
        told = run("convert", "hf://org/m", "/nonexistent/x", "--to", "hf")
        assert told.code == 2
        for secret in (TOKEN, "SECRET", "signature"):
            assert secret not in told.err + told.out
    assert library.plain(OSError(f"GET https://x/y?signature=SECRET1 with Bearer {TOKEN}")) == "GET ... with ..."


def test_no_log_has_a_signature(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.add("org/m", {"model.bin": DATA})
    caplog.set_level(logging.INFO)
    look_at("hf://org/m").open("model.bin").read(0, 10)
    assert f"GET {hub.storage}/objects/" in caplog.text
    assert "SECRET" not in caplog.text and "signature" not in caplog.text
    spoken = type(library.session()).__module__.partition(".")[0]
    assert not logging.getLogger(spoken).filters, "what others log is theirs"


def test_files_in_the_cache_are_read_from_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, hf_hub_download

    repository = hub.add("org/m", {"model.bin": DATA, "config.json": b"{}"})
    kept = Path(hf_hub_download("org/m", "model.bin"))
    hub.asked.clear()
    found = look_at("hf://org/m")
    assert found.open("model.bin").read(10, 90) == DATA[10:100]
    assert found.open("model.bin").at_once == 1 and found.open("config.json").at_once > 1
    assert not hub.of("storage") and not hub.of("hub", "resolve")
    identity = found.open("model.bin").identity()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    offline = look_at("hf://org/m")
    assert offline.names == ("model.bin",)
    assert offline.open("model.bin").read(10, 90) == DATA[10:100]
    assert offline.open("model.bin").identity() == identity
    with pytest.raises(FormatError, match=r"config.json: is not in the local cache, .* unset HF_HUB_OFFLINE"):
        look_at("hf://org/m/config.json")
    with pytest.raises(FormatError, match="is not in the local cache"):
        look_at("hf://org/other")
    assert not hub.asked

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    repository.commit({"model.bin": DATA[::-1]})  # what is in the cache is of another commit
    place.forget("org/m")
    assert look_at("hf://org/m").open("model.bin").read(0, 9) == DATA[::-1][:9]
    kept.resolve().write_bytes(b"damaged")
    old = next(iter(repository.commits))
    assert look_at(f"hf://org/m@{old}").open("model.bin").read(0, 9) == DATA[:9]


def test_a_large_model_is_inspected_by_few_requests(hub: Hub, run: Runner) -> None:
    """191 shards, as Llama 3.1 405B has them."""
    shards = 191
    files = {"config.json": LLAMA["config.json"]}
    index = {}
    for number in range(1, shards + 1):
        name, shard = f"model.layers.{number}.weight", f"model-{number:05}-of-{shards:05}.safetensors"
        header = json.dumps({name: {"dtype": "U8", "shape": [100_000], "data_offsets": [0, 100_000]}}).encode()
        files[shard] = len(header).to_bytes(8, "little") + header + DATA[number : 100_000 + number]
        index[name] = shard
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": index}).encode()
    hub.add("org/big", files)
    done = run("inspect", "hf://org/big", "--json")
    assert done.code == 0, done.err
    assert done.json["tensor_count"] == shards
    assert len(hub.asked) <= 4 + 2 * len(files)
    assert hub.connections <= 64
    assert sum(one.nbytes for one in hub.asked) <= len(files) * (64 << 10)


def test_damage_is_found_by_what_the_hub_says_of_files(hub: Hub, run: Runner) -> None:
    hub.add("org/m", LLAMA)
    done = run("verify", "hf://org/m", "--json")
    assert done.code == 0 and done.json["checked"]["published"] == len(LLAMA), done.out
    assert "hf" not in str(done.json["problems"])
    weights = bytearray(LLAMA["model.safetensors"])
    weights[-1] ^= 1
    hub.faults.append(giving({"model.safetensors": bytes(weights), "config.json": LLAMA["config.json"] + b" "}))
    place.forget("org/m")
    done = run("verify", "hf://org/m")
    assert done.code == 1
    assert "model.safetensors: its SHA256 is not the one of the Hub's list of files" in done.out


def giving(instead: dict[str, bytes]) -> Fault:
    """The storage has other bytes of the same size than it should."""

    def fault(handler: Handler) -> bool:
        for name, data in instead.items():
            known = sha256(LLAMA[name])
            if known in handler.path:
                handler.ranged(data, {})
                return True
        return False

    return fault


def test_a_tokenizer_travels_from_a_repository(hub: Hub, run: Runner, tmp_path: Path) -> None:
    hub.add("org/m", LLAMA)
    source = fixture_path("nemo/nemo1_dist_tp1/model.nemo")
    done = run("convert", source, tmp_path / "out", "--to", "nemo2", "--tokenizer", "hf://org/m", "--json")
    assert done.code == 0, done.err
    written = tmp_path / "out" / "context" / "nemo_tokenizer" / "tokenizer.json"
    assert written.read_bytes() == LLAMA["tokenizer.json"]
    assert not hub.of("storage"), "weights are not read"


@pytest.mark.parametrize("kind", ["datasets", "spaces"])
def test_data_sets_and_spaces_are_read(hub: Hub, kind: str) -> None:
    hub.add("org/other", {"sub/model.bin": DATA, "config.json": b"{}"})
    found = look_at(f"hf://{kind}/org/other/sub")
    assert found.names == ("model.bin",) and found.open("model.bin").read(9, 99) == DATA[9:108]
    assert any(f"/{kind}/org/other/resolve/" in one.what for one in hub.of("hub"))


def test_a_name_that_leads_out_is_refused(hub: Hub) -> None:
    hub.add("org/m", {"../model.bin": DATA})
    with pytest.raises(UnsafeError, match="hf://org/m: a file is named that is not inside"):
        look_at("hf://org/m")


def test_members_of_archives_in_repositories(hub: Hub, run: Runner) -> None:
    path = fixture_path("nemo/nemo1_dist_tp1/model.nemo")
    hub.add("org/m", {"a b/model.nemo": path.read_bytes()})
    assert list(anyckpt.open("hf://org/m/a b/model.nemo")) == list(anyckpt.open(path))
    assert run("inspect", "hf://org/m/a b/model.nemo::model_weights").code == 0


def test_paths_are_spelled_as_huggingface_hub_spells_them() -> None:
    from huggingface_hub.utils import parse_hf_uri

    from anyckpt.storage.hub.paths import parse

    for text in (
        "hf://org/name",
        "hf://org/name@main/a/b.bin",
        "hf://datasets/org/name@refs/pr/3/x.json",
        "hf://spaces/org/name/file@1.txt",
        "hf://org/name@refs/convert/parquet-v2",
        "hf://org/name@a%2Fb/c",
        "hf://models/org/Name.x_y-1.5",
    ):
        theirs, ours = parse_hf_uri(text), parse(text)
        assert (ours.kind, ours.repository, ours.revision, ours.inner) == (
            theirs.type,
            theirs.id,
            theirs.revision,
            theirs.path_in_repo,
        ), text


COMMANDS = {
    "inspect": ["inspect", "HUB", "--stats"],
    "verify": ["verify", "HUB", "--deep"],
    "diff": ["diff", "hf:org/m", "LOCAL"],
    "convert": ["convert", "HUB", "OUT", "--to", "megatron-core"],
    "quantize": ["convert", "HUB", "OUT", "--to", "hf", "--quantize", "int8"],
    "average": ["average", "HUB", "hf:org/m", "-o", "OUT"],
    "merge": ["merge", "HUB", "LOCAL", "-o", "OUT"],
    "report": ["report", "HUB", "-o", "OUT.html"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_repositories(hub: Hub, run: Runner, command: str, tmp_path: Path) -> None:
    hub.add("org/m", LLAMA)
    local = str(fixture_path("families/llama/hf"))

    def words(path: str, out: str) -> list[str]:
        known = {"HUB": path, "hf:org/m": path if path == local else "hf:org/m", "LOCAL": local}
        return [known.get(word, word).replace("OUT", str(tmp_path / out)) for word in COMMANDS[command]]

    done, wanted = run(*words("hf://org/m", "a")), run(*words(local, "b"))
    assert done.code == wanted.code == 0, (done.out, done.err, wanted.err)
    if (tmp_path / "b").is_dir():
        assert files_below(tmp_path / "a").keys() == files_below(tmp_path / "b").keys()
        assert run("diff", tmp_path / "a", tmp_path / "b").code == 0


def test_adapters_are_merged_from_repositories(hub: Hub, run: Runner, tmp_path: Path) -> None:
    base, adapter = fixture_path("families/llama/hf"), fixture_path("families/lora_llama/hf_adapter")
    hub.add("org/base", LLAMA)
    hub.add("org/adapter", files_below(adapter))
    done = run("merge-lora", "hf:org/base", "hf:org/adapter", tmp_path / "a")
    assert done.code == 0, done.err
    assert run("merge-lora", base, adapter, tmp_path / "b").code == 0
    assert run("diff", tmp_path / "a", tmp_path / "b").code == 0


def test_python_takes_repositories(hub: Hub) -> None:
    hub.add("org/m", LLAMA)
    local = fixture_path("families/llama/hf")
    assert list(anyckpt.open("hf://org/m")) == list(anyckpt.open(local))
    live = pytest.importorskip("anyckpt.torch")
    ours, theirs = live.load("hf://org/m"), live.load(local)
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)
