"""Outputs as commits to the Hub: whole, once, over nobody's work, and in bounded memory."""

from __future__ import annotations

import io
import json
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.runner import Result, Runner
from tests.hub import TOKEN, Handler, Hub, answering, blob, breaking, logged_in
from tests.places import files_below
from tests.support import fixture_path

import anyckpt
from anyckpt.errors import OutputError, UsageError
from anyckpt.storage.hub import place

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.peer

LOCAL = fixture_path("families/llama/hf")
LLAMA = files_below(LOCAL)
MCORE = fixture_path("mcore/gpt_opt_plain/ckpt")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capsys)


@pytest.fixture(autouse=True)
def user(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    logged_in(monkeypatch)


def written(done: Result) -> Result:
    assert done.code == 0, done.err
    return done


@pytest.mark.parametrize("part_size", [None, 50_000])
def test_an_output_is_one_commit(hub: Hub, run: Runner, tmp_path: Path, part_size: int | None) -> None:
    hub.part_size = part_size
    written(run("convert", LOCAL, "hf://me/new", "--to", "hf", "--max-shard-size", "100kB"))
    written(run("convert", LOCAL, tmp_path / "out", "--to", "hf", "--max-shard-size", "100kB"))
    repository = hub.repositories["me/new"]
    assert len(repository.commits) == 2, "one that made it, and one of ours"
    found = dict(repository.files)
    assert found.pop(".gitattributes") and found.pop("README.md")
    wanted = files_below(tmp_path / "out")
    assert found == wanted
    assert not repository.private
    assert written(run("verify", "hf://me/new", "--json")).json["checked"]["digests"]
    assert run("diff", "hf://me/new", LOCAL).code == 0


def test_the_card_says_what_is_known(hub: Hub, run: Runner) -> None:
    hub.add("org/base", LLAMA)
    written(run("convert", "hf:org/base", "hf:me/int8", "--to", "hf", "--quantize", "int8", "--private",
                "--commit-message", "In eight bits"))  # fmt: skip
    repository = hub.repositories["me/int8"]
    assert repository.private and repository.messages[-1] == "In eight bits"
    card = repository.files["README.md"].decode()
    assert card.startswith(
        '---\nlibrary_name: transformers\nbase_model:\n- "org/base"\nbase_model_relation: quantized\n'
    )
    (base,) = hub.repositories["org/base"].commits
    assert base in card and "int8" in card and "license" not in card
    rows = dict(re.findall(r"\| `(\S+)` \| [\d,]+ \| `([0-9a-f]{64})` \|", card))
    assert rows["model.safetensors"] and str(LOCAL) not in card


def test_a_card_that_is_there_stays(hub: Hub, run: Runner) -> None:
    hub.add("me/m", {"README.md": b"mine", ".gitattributes": b""})
    written(run("convert", LOCAL, "hf://me/m", "--to", "hf"))
    assert hub.repositories["me/m"].files["README.md"] == b"mine"


@pytest.mark.parametrize("name", ["model.nemo", "sub/model.safetensors", "model.pt", "x.ckpt"])
def test_single_files_are_written(hub: Hub, run: Runner, tmp_path: Path, name: str) -> None:
    local = tmp_path / Path(name).name
    path = f"hf://me/new/{name}"
    config = ["--config", str(LOCAL)] if name.endswith(".nemo") else []
    written(run("convert", LOCAL, path, *config))
    written(run("convert", LOCAL, local, *config))
    files = hub.repositories["me/new"].files
    assert files[name] == local.read_bytes()
    assert written(run("verify", path)).code == 0
    assert "already has files" in run("convert", LOCAL, path, *config).error
    assert "one file is to be written" in run("convert", LOCAL, "hf://me/new", "--to", "safetensors").error


def test_folders_and_branches(hub: Hub, run: Runner) -> None:
    written(run("convert", LOCAL, "hf://me/m@dev/a/b", "--to", "megatron-core"))
    repository = hub.repositories["me/m"]
    assert "a/b/.metadata" in repository.commits[repository.branches["dev"]]
    assert "a/b/.metadata" not in repository.files
    assert "| `a/b/.metadata` |" in repository.commits[repository.branches["dev"]]["README.md"].decode()
    assert run("diff", "hf://me/m@dev/a/b", LOCAL).code == 0
    assert "already has files" in run("convert", LOCAL, "hf://me/m@dev/a", "--to", "hf").error
    hub.add("me/full", LLAMA)
    assert "already has files" in run("convert", LOCAL, "hf://me/full@dev", "--to", "hf").error
    assert list(hub.repositories["me/full"].branches) == ["main"]


def test_what_is_there_is_replaced_if_that_is_asked_for(hub: Hub, run: Runner) -> None:
    written(run("convert", LOCAL, "hf://me/m", "--to", "hf", "--max-shard-size", "100kB"))
    repository = hub.repositories["me/m"]
    other = {**repository.files, "README.md": b"mine", "notes.txt": b"n", "pytorch_model.bin": b"old"}
    before = repository.commit(other)
    place.forget("me/m")
    error = run("convert", LOCAL, "hf://me/m", "--to", "hf").error
    assert "already has files" in error and "--overwrite" in error
    assert repository.branches["main"] == before
    written(run("convert", LOCAL, "hf://me/m", "--to", "hf", "--overwrite"))
    assert sorted(repository.files) == sorted(
        [".anyckpt-manifest.json", ".gitattributes", "README.md", "notes.txt", *LLAMA]
    )
    assert repository.files["README.md"] == b"mine"
    assert run("diff", f"hf://me/m@{before}", LOCAL).code == 0, "history keeps it"


def test_a_commit_of_another_is_not_lost(hub: Hub, run: Runner) -> None:
    repository = hub.add("me/m", {})

    def other(handler: object) -> bool:
        if "/commit/" in handler.note.what and len(repository.commits) == 1:  # type: ignore[attr-defined]
            repository.commit({"theirs.txt": b"x"})
        return False

    hub.faults.append(other)
    error = run("convert", LOCAL, "hf://me/m", "--to", "hf").error
    assert "somebody else has made a commit there meanwhile; run it again" in error
    assert repository.files == {"theirs.txt": b"x"}


@pytest.mark.parametrize("fault", ["busy", "busy long", "reset", "reset long", "lost answer", "busy commit"])
def test_what_passes_is_waited_for(hub: Hub, run: Runner, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add("me/m", {})
    times = 8 if "long" in fault else 2  # huggingface_hub itself tries six times
    if "busy" in fault and "commit" not in fault:
        hub.faults.append(answering(503, times))
    elif "reset" in fault:
        hub.faults.append(breaking(times))
    elif fault == "busy commit":
        hub.faults.append(answering(503, 2, whom="hub", what="/commit/"))
    else:
        hub.faults.append(losing_the_answer())
    written(run("convert", LOCAL, "hf://me/m", "--to", "hf"))
    assert len(hub.repositories["me/m"].commits) == 2
    assert run("diff", "hf://me/m", LOCAL).code == 0


def losing_the_answer() -> object:
    left = [1]

    def fault(handler: object) -> bool:
        if "/commit/" not in handler.note.what or not left[0]:  # type: ignore[attr-defined]
            return False
        left[0] = 0
        real = handler.send  # type: ignore[attr-defined]
        handler.send = lambda *a, **k: None  # type: ignore[attr-defined]
        name, revision = re.findall(r"/api/models/(.+)/commit/(.+)", handler.path)[0]  # type: ignore[attr-defined]
        handler._commit(name, revision)  # type: ignore[attr-defined]
        handler.send = real  # type: ignore[attr-defined]
        handler.close_connection = True  # type: ignore[attr-defined]
        handler.connection.shutdown(2)  # type: ignore[attr-defined]
        return True

    return fault


def test_a_run_that_dies_leaves_nothing_and_sends_little_again(
    hub: Hub, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add("me/m", {})
    hub.faults.append(answering(500, 99, whom="hub", what="/commit/"))
    words = ("convert", LOCAL, "hf://me/m", "--to", "hf", "--max-shard-size", "100kB")
    assert "the Hub answers with HTTP 500; try again later" in run(*words).error
    assert hub.repositories["me/m"].files == {}
    sent = len(hub.of("storage", "PUT"))
    assert sent
    hub.faults.clear()
    written(run(*words, "--resume"))
    assert len(hub.of("storage", "PUT")) == sent, "the Hub has them"
    place.forget("me/m")
    again = written(run(*words, "--resume", "--json"))
    assert again.json["bytes_read"] == 0 and len(hub.repositories["me/m"].commits) == 2


def test_no_file_is_left_out_in_silence(hub: Hub, run: Runner) -> None:
    repository = hub.add("me/m", {".gitignore": b"model.safetensors\n"})
    error = run("convert", LOCAL, "hf://me/m", "--to", "hf").error
    assert "has a .gitignore by which files of the output would be left out (found model.safetensors)" in error
    assert list(repository.files) == [".gitignore"]


def test_refusals(hub: Hub, run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("me/m", {})
    to = ("--to", "hf")
    assert "leave --share out" in run("convert", LOCAL, "hf://me/m", *to, "--share", "1/2").error
    assert "a branch of a model's repository" in run("convert", LOCAL, "hf://datasets/me/m", *to).error
    assert "found a commit" in run("convert", LOCAL, f"hf://me/m@{blob(b'')}", *to).error
    assert "is there and public" in run("convert", LOCAL, "hf://me/m", *to, "--private").error
    assert "are for the Hub" in run("convert", LOCAL, "/nonexistent/x", *to, "--private").error
    hub.may_write = False
    for path in ("hf://me/m", "hf://me/new"):
        error = run("convert", LOCAL, path, *to).error
        assert "does not allow this with the token" in error and TOKEN not in error
    monkeypatch.delenv("HF_TOKEN")
    assert (
        "nobody has logged in to the Hub; log in with `hf auth login`" in run("convert", LOCAL, "hf://me/m", *to).error
    )
    assert list(hub.repositories) == ["me/m"] and hub.repositories["me/m"].files == {}


def test_bytes_that_come_out_otherwise_are_not_sent(hub: Hub) -> None:
    import numpy as np

    array = np.arange(400_000, dtype=np.float32)

    def changing(done: int, total: int) -> None:
        if done >= total // 2:
            array[7] += 1

    with pytest.raises((anyckpt.FormatError, OutputError), match="came out otherwise"):
        anyckpt.save({"w": array}, "hf://me/m/w.safetensors", progress=changing)
    assert list(hub.repositories["me/m"].files) == [".gitattributes"]
    with pytest.raises(UsageError):
        anyckpt.save({"w": array}, "hf://datasets/me/m/w.safetensors")


def test_progress_counts_what_is_sent(hub: Hub, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = anyckpt.convert(LOCAL, "hf://me/m", to="hf", progress=lambda *at: seen.append(at))
    assert max(seen) == (2 * done.bytes_written, 2 * done.bytes_written)
    once = anyckpt.convert(LOCAL, tmp_path / "out", to="hf").bytes_read
    assert done.bytes_read == 2 * once
    assert json.loads(hub.repositories["me/m"].files["config.json"])["model_type"] == "llama"


def unreliable(seed: int) -> Callable[[Handler], bool]:
    """About every fifth answer is none: an error, or a connection that breaks, before or within the body."""
    chance = random.Random(seed)

    def fault(handler: Handler) -> bool:
        if chance.random() > 0.2:
            return False
        kinds = [answering(503, 1, handler.whom), answering(429, 1, handler.whom, Retry_After="0")]
        kinds += [breaking(1, handler.whom)]
        if handler.command == "GET":
            kinds += [breaking(1, handler.whom, after=chance.randrange(1, 500)), answering(403, 1, "storage")]
        return chance.choice(kinds)(handler)

    return fault


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_wrong_whatever_fails(
    hub: Hub, run: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    """From the Hub to the Hub: the same bytes, or an error and no commit."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add("org/base", LLAMA)
    hub.add("me/out", {})
    hub.faults.append(unreliable(seed))
    done = run("convert", "hf://org/base", "hf://me/out/m.safetensors", "--names", "hf")
    hub.faults.clear()
    files = hub.repositories["me/out"].files
    assert TOKEN not in done.err and "SECRET" not in done.err
    if done.code == 0:
        anyckpt.convert(LOCAL, tmp_path / "m.safetensors", to="safetensors", names="hf")
        assert files["m.safetensors"] == (tmp_path / "m.safetensors").read_bytes()
    else:
        assert done.code == 2 and done.err.splitlines()[-1].startswith("error: ") and not files


def test_what_huggingface_hub_logs_has_no_signature(hub: Hub, run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add("me/m", {})
    hub.faults.append(answering(503, 2))
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [handler])
    written(run("convert", LOCAL, "hf://me/m", "--to", "hf"))
    text = stream.getvalue()
    assert "HTTP Error 503 thrown while requesting PUT ..." in text
    assert "SECRET" not in text and "Xet" not in text


def test_nothing_is_written_offline(hub: Hub, run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = run("convert", LOCAL, "hf://me/m", "--to", "hf").error
    assert "cannot be written to while HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE" in error
    assert not hub.asked


def test_transformers_loads_what_was_written(hub: Hub, run: Runner, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    written(run("convert", LOCAL, "hf://me/m", "--to", "hf", "--max-shard-size", "100kB"))
    found = transformers.AutoModelForCausalLM.from_pretrained("me/m", cache_dir=tmp_path)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(LOCAL)
    assert hub.of("hub", "/me/m/resolve/"), "it was read from there"
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
