"""Files of web servers are read by ranges, and what an address is signed with is told nowhere."""

from __future__ import annotations

import itertools
import json
import logging
import traceback
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.cli.runner import Runner
from tests.places import files_below
from tests.servers import FAULTS, Proxy, S3Server
from tests.storage.test_place import told
from tests.support import fixture_path

import anyckpt
from anyckpt.errors import AnyckptError, FormatError, UnreachableError, without_secrets
from anyckpt.formats import registry
from anyckpt.storage.location import look_at
from anyckpt.storage.remote.addresses import without_secret

NEMO = "nemo/nemo1_basic_v3_0_0/toy.nemo"
SIGNED = "?X-Amz-Credential=AKIASIGNED&X-Amz-Signature=5ec4e7"
peer = pytest.mark.peer


def put(s3: S3Server, proxy: Proxy, name: str, at: str) -> str:
    """A fixture on a web server; its address."""
    path = fixture_path(name)
    files = {f"{at}/{file}": data for file, data in files_below(path).items()} if path.is_dir() else {}
    s3.bucket("weights", files or {at: path.read_bytes()}, everybody=True)
    return f"{proxy.url}/weights/{at}"


@peer
@pytest.mark.parametrize("name", [NEMO, "families/qwen2_moe/hf/model.safetensors"])
@pytest.mark.parametrize("signed", ["", SIGNED])
def test_a_file_is_read_by_ranges(name: str, signed: str, s3: S3Server, proxy: Proxy, tmp_path: Path) -> None:
    path = put(s3, proxy, name, "a b/" + name.rpartition("/")[2]).replace(" ", "%20")
    here = tmp_path / name.rpartition("/")[2]  # alone, as nothing lies beside it there
    here.write_bytes(fixture_path(name).read_bytes())
    proxy.asked.clear()
    found = registry.read(path + signed)
    assert told(found, path) == told(registry.read(here), str(here))
    assert all(asked.range for asked in proxy.asked if asked.path.startswith(f"/weights/a%20b/{here.name}"))
    assert found.path == path
    anyckpt.inspect(path)  # a signed address is remembered, so that it can be opened by the name that is shown


@peer
def test_a_folder_of_hugging_faces_files_is_found_by_its_index(s3: S3Server, proxy: Proxy) -> None:
    from tests.storage.remote.test_bucket import sharded

    s3.bucket("weights", {f"hf/{name}": data for name, data in sharded(40).items()}, everybody=True)
    checkpoint = registry.read(f"{proxy.url}/weights/hf")
    assert checkpoint.format == "hf"
    assert sorted(checkpoint.tensors) == sorted(f"w{number}" for number in range(40))
    assert len(proxy.asked) <= 40 * 3 + 24
    assert look_at(f"{proxy.url}/weights/hf/").names[0] == "config.json"


@peer
def test_other_folders_are_told_to_have_no_list(s3: S3Server, proxy: Proxy) -> None:
    path = put(s3, proxy, "mcore/gpt_opt_plain/ckpt", "dcp")
    with pytest.raises(
        FormatError, match=rf"^{path}: does not exist, and is no folder of Hugging Face's .*index\.json"
    ):
        registry.read(path)


@peer
def test_a_server_without_ranges_is_told(s3: S3Server, proxy: Proxy) -> None:
    path = put(s3, proxy, NEMO, "toy.nemo")
    proxy.fault = lambda number, asked: "all"
    with pytest.raises(UnreachableError, match=f"^{path}: the server does not send parts of files.*download it"):
        registry.read(path)


@peer
def test_an_archive_on_a_web_server_is_looked_into(s3: S3Server, proxy: Proxy) -> None:
    path = put(s3, proxy, NEMO, "toy.nemo")
    location = look_at(f"{path}{SIGNED}::model_config.yaml")
    assert location.path == f"{path}::model_config.yaml"
    assert location.open().size > 100


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://h/a.nemo?X=1&Y=2: cannot be read", "https://h/a.nemo cannot be read"),
        ("https://u:t@h/a?sig=x::m.ckpt", "https://h/a::m.ckpt"),
        ("see https://h/a, or s3://b/k?v", "see https://h/a, or s3://b/k?v"),
        ("which? 'https://h/?a=1'", "which? 'https://h/'"),
    ],
)
def test_secrets_are_taken_out_of_texts(text: str, left: str) -> None:
    assert without_secrets(text) == left
    assert str(FormatError(text)) == left


@given(st.text("abc%20/.-_~"), st.text("abcXYZ019%&=+-._/"), st.sampled_from(["", "user:pass@", "token@"]))
def test_no_shown_path_has_a_secret(name: str, query: str, user: str) -> None:
    secret = f"SECRET{query}"
    for member in ("", "::member.ckpt"):
        shown = without_secret(f"https://{user}host/{name}?{secret}{member}")
        assert shown == f"https://host/{name}{member}"


FAILING = [*FAULTS, "all", "403 AccessDenied", "404", "401", "301", "500", "400 ExpiredToken", "416", "429"]


@peer
@given(
    faults=st.lists(st.sampled_from([None, *FAILING]), min_size=1, max_size=4),
    member=st.sampled_from(["", "::x", "::model_config.yaml"]),
)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_message_traceback_or_log_tells_what_an_address_is_signed_with(
    faults: list[str | None],
    member: str,
    proxy: Proxy,
    s3: S3Server,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from anyckpt.storage.remote import stores

    monkeypatch.setattr(stores, "RETRIES", 1)
    caplog.set_level(logging.DEBUG)
    turns = itertools.cycle(faults)
    s3.put(s3.bucket("weights").removeprefix("s3://"), {"toy.nemo": fixture_path(NEMO).read_bytes()})
    proxy.fault = lambda number, asked: next(turns)
    path = f"http://user:t0ken@{proxy.url.removeprefix('http://')}/weights/toy.nemo{SIGNED}{member}"
    texts = [
        json.dumps(vars(Runner(capsys)("inspect", path, "--json"))),
        json.dumps(vars(Runner(capsys)("inspect", path))),
    ]
    try:
        texts.append(repr(registry.read(path)))
    except AnyckptError:
        texts.append(traceback.format_exc())
    texts.append(caplog.text)
    for text in texts:
        assert "5ec4e7" not in text
        assert "AKIASIGNED" not in text
        assert "t0ken" not in text


@peer
def test_no_output_tells_what_an_address_is_signed_with(
    s3: S3Server, proxy: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = put(s3, proxy, "families/qwen2_moe/hf/model.safetensors", "model.safetensors") + SIGNED
    run, out = Runner(capsys), tmp_path
    commands = [
        ("inspect", path, "--json"),
        ("inspect", path, "--tensors", "*", "--stats"),
        ("convert", path, out / "one", "--to", "safetensors"),
        ("convert", path, out / "two", "--to", "safetensors", "--json"),
        ("verify", path),
        ("verify", path, "--deep", "--json"),
        ("report", path, "-o", out / "page.html"),
        ("report", out / "one", "--against", path, "-o", out / "against.html"),
        ("diff", path, out / "one"),
        ("diff", path, path, "--json"),
        ("average", path, path, "-o", out / "mean"),
        ("average", path, path, "-o", out / "mean.2", "--json"),
        ("merge", path, path, "-o", out / "merged", "--method", "linear", "--json"),
    ]
    refused = [
        ("convert", path, path),
        ("convert", path, out / "one"),
        ("convert", path, out / "three", "--to", "nemo"),
        ("merge-lora", path, path, out / "four"),
        ("inspect", f"{path}::x"),
        ("reshard", path, out / "five", "--tp", "2"),
        ("inspect", path, "--tensors", "nothing"),
        ("diff", path, path.replace("model", "other")),
        ("pack", path, out / "six"),
        ("unpack", path, out / "seven"),
        ("quantize", path, out / "eight", "--to", "fp8"),
    ]
    recipe = tmp_path.parent / "recipe.yaml"  # which says it itself, and is the user's
    recipe.write_text(
        f"models:\n- model: {path}\n- model: {out / 'one'}\nmerge_method: linear\nparameters: {{weight: 0.5}}\n"
    )
    commands.append(("merge", "--recipe", recipe, "-o", out / "by_recipe"))
    results = [run(*words) for words in commands]
    assert [result.err for result in results if result.code] == []
    results += [run(*words) for words in refused]
    assert {result.code for result in results[len(commands) :]} <= {1, 2}
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    for text in [*written, *(f"{result.out}{result.err}".encode() for result in results)]:
        assert b"5ec4e7" not in text
        assert b"AKIASIGNED" not in text


@peer
@pytest.mark.parametrize(
    ("page", "path"),
    [
        ("https://huggingface.co/org/model", "hf://org/model"),
        ("https://huggingface.co/org/model/tree/main/", "hf://org/model"),
        ("https://huggingface.co/org/model/blob/v1/a/model.nemo", "hf://org/model@v1/a/model.nemo"),
    ],
)
def test_a_page_of_the_hub_is_no_file(page: str, path: str) -> None:
    with pytest.raises(FormatError, match=f"^{page}: is a page of the Hugging Face Hub, not a file; give {path}$"):
        look_at(page)
