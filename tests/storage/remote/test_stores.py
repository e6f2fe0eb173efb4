"""Which store a path is in, by what the environment and the files of settings say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.servers import KEY, SECRET, TOKEN, S3Server, nowhere

from anyckpt.errors import MissingLibraryError, UsageError
from anyckpt.storage.remote import aws, azure, google, metadata_service
from anyckpt.storage.remote.stores import is_anonymous, store_of


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of a user who has set nothing."""
    nowhere(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(metadata_service, "_answer", lambda *request: None)
    for ask in (metadata_service.gives_google_credentials, metadata_service.gives_azure_credentials):
        ask.cache_clear()
    monkeypatch.setattr(aws, "region_of", lambda bucket: "eu-west-1")
    return tmp_path


def profile(home: Path, monkeypatch: pytest.MonkeyPatch, config: str, credentials: str = "") -> None:
    (home / "config").write_text(config)
    (home / "credentials").write_text(credentials)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "credentials"))


def test_without_credentials_public_buckets_are_read_unsigned(home: Path) -> None:
    assert aws.settings("b") == {"skip_signature": True, "region": "eu-west-1"}
    assert google.settings() == {"skip_signature": True}
    assert azure.settings("acc") == {"account_name": "acc", "skip_signature": True}


def test_the_environment_comes_before_the_files(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile(
        home, monkeypatch, "[default]\nregion=eu-north-1\n", "[default]\naws_access_key_id=a\naws_secret_access_key=b\n"
    )
    assert aws.settings("b") == {"access_key_id": "a", "secret_access_key": "b", "region": "eu-north-1"}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9000")
    assert aws.settings("b") == {"endpoint": "http://localhost:9000", "region": "us-west-2"}


def test_a_profile_is_taken_from_both_files(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = "[default]\nregion=x\n[profile lab]\nregion = us-east-2\nendpoint_url = https://minio.lab\n"
    profile(home, monkeypatch, config, "[lab]\naws_access_key_id=a\naws_secret_access_key=b\naws_session_token=t\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    wanted = {"endpoint": "https://minio.lab", "region": "us-east-2"}
    wanted |= {"access_key_id": "a", "secret_access_key": "b", "session_token": "t"}
    assert aws.settings("b") == wanted
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(UsageError, match=r"AWS profile 'other' is not known .*aws configure"):
        aws.settings("b")


def test_a_profile_with_a_login_needs_boto3(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile(home, monkeypatch, "[default]\nsso_session=corp\nregion=x\n")
    monkeypatch.setitem(sys.modules, "boto3", None)
    aws._of_boto3.cache_clear()
    with pytest.raises(UsageError, match=r"which boto3 does; install it .* pip install boto3.*export-credentials"):
        aws.settings("b")


def test_azure_is_found_as_its_tools_find_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        azure.settings("")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=a;AccountKey=k==;BlobEndpoint=http://x")
    assert azure.settings("") == {"account_name": "a", "account_key": "k==", "endpoint": "http://x"}
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "b")
    monkeypatch.setenv("AZURE_STORAGE_KEY", "q")
    assert azure.settings("")["account_name"] == "b"
    assert azure.settings("c") == {"account_name": "c", "account_key": "q", "endpoint": "http://x"}


def test_without_the_extra_a_path_says_what_to_install(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(MissingLibraryError, match=r"s3://b/k: .*pip install 'anyckpt\[remote\]'"):
        store_of("s3://b/k")


@pytest.mark.peer
def test_a_bucket_has_one_store_until_the_environment_changes(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    path = s3.bucket("weights", {"a/b c%20d": b"123", "a/": b""})
    store, key = store_of(f"{path}/a/b c%20d")
    assert bytes(store.get(key).bytes()) == b"123"
    assert store_of(f"{path}/x")[0] is store
    assert not is_anonymous(store)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(UsageError, match=r"^s3://weights: .*found MissingAccessKeyId"):
        store_of(path)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_SESSION_TOKEN")
    assert is_anonymous(store_of(path)[0])


@pytest.mark.peer
def test_credentials_of_a_profile_that_boto3_finds_are_used(
    s3: S3Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = f'{{"Version": 1, "AccessKeyId": "{KEY}", "SecretAccessKey": "{SECRET}", "SessionToken": "{TOKEN}"}}'
    (home / "given.json").write_text(given)
    profile(home, monkeypatch, f"[default]\ncredential_process=cat {home}/given.json\nregion=us-east-1\n")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    aws._of_boto3.cache_clear()
    store, key = store_of(s3.bucket("weights", {"a": b"1"}) + "/a")
    assert not is_anonymous(store)
    assert bytes(store.get(key).bytes()) == b"1"


@pytest.mark.peer
@pytest.mark.parametrize(
    "path", ["gs://b/k", "az://c@acc/k", "abfss://c@acc.dfs.core.windows.net/k", "https://h/k?s=x"]
)
def test_every_kind_of_path_has_a_store(path: str, home: Path) -> None:
    store, key = store_of(path)
    assert key == "k"
    assert "Store" in repr(store)


def test_a_bucket_of_amazon_is_asked_for_its_region(monkeypatch: pytest.MonkeyPatch) -> None:
    class Connection:
        def __init__(self, host: str, timeout: float) -> None:
            assert host == "s3.amazonaws.com"

        def request(self, method: str, path: str) -> None:
            assert (method, path) == ("HEAD", "/some.bucket")

        def getresponse(self) -> Connection:
            return self

        def getheader(self, name: str) -> str | None:
            return {"x-amz-bucket-region": "ap-south-1"}.get(name)

        def close(self) -> None:
            pass

    monkeypatch.setattr(aws, "HTTPSConnection", Connection)
    aws.region_of.cache_clear()
    assert aws.region_of("some.bucket") == "ap-south-1"
    aws.region_of.cache_clear()


def test_who_has_no_cloud_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def answer(method: str, path: str, headers: dict[str, str]) -> str:
        asked.append((method, path))
        return "role" if path.startswith("/latest/meta-data") else "token"

    for name in ("AWS_EC2_METADATA_DISABLED", "AWS_METADATA_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(metadata_service, "_answer", answer)
    metadata_service.gives_aws_credentials.cache_clear()
    assert metadata_service.gives_aws_credentials()
    assert metadata_service.gives_aws_credentials()
    assert [method for method, _ in asked] == ["PUT", "GET"]
    metadata_service.gives_aws_credentials.cache_clear()


def test_local_paths_need_nothing_of_this(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("no checkpoint")
    code = (
        "import sys, anyckpt\n"
        f"try: anyckpt.inspect({str(tmp_path / 'x.txt')!r})\n"
        "except anyckpt.FormatError: pass\n"
        "print([name for name in sys.modules if name.startswith(('obstore', 'anyckpt.storage.remote', 'boto'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
