"""What paths of object stores and web servers say."""

from __future__ import annotations

import pytest

from anyckpt.errors import UsageError
from anyckpt.storage.remote.addresses import AZURE, GCS, S3, WEB, Address, address_of


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("s3://b/k/m.nemo", Address(S3, "s3", "b", "k/m.nemo")),
        ("s3://b", Address(S3, "s3", "b", "")),
        ("s3://b/a b%20?c#d/", Address(S3, "s3", "b", "a b%20?c#d")),
        ("s3a://b/k/", Address(S3, "s3a", "b", "k")),
        ("gs://b/k", Address(GCS, "gs", "b", "k")),
        ("az://c/k", Address(AZURE, "az", "c", "k")),
        ("abfss://c@acc.dfs.core.windows.net/k", Address(AZURE, "abfss", "c", "k", "acc")),
        ("az://c@acc/k", Address(AZURE, "az", "c", "k", "acc")),
        ("https://h:8/a%20b/m.nemo", Address(WEB, "https", "h:8", "a b/m.nemo")),
        ("https://u:p@h/m?sig=x", Address(WEB, "https", "h", "m", secret=("u:p", "sig=x"))),
    ],
)
def test_says_where(path: str, wanted: Address) -> None:
    assert address_of(path) == wanted


def test_what_is_shown_has_no_secret_and_leads_to_the_same() -> None:
    address = address_of("https://user:token@host/a%20b%25/m.nemo?X-Amz-Signature=secret")
    assert address.public == "https://host/a%20b%25/m.nemo"
    assert address_of(address.public).key == address.key
    assert address_of("s3://b/a%20b").public == "s3://b/a%20b"
    assert address_of("az://c@acc/k").public == "az://c@acc.dfs.core.windows.net/k"


@pytest.mark.parametrize(
    "path", ["s3://", "s3:///k", "gs://", "az://c@/k", "https:///k", "http://h:port/k", "s3://b/\0"]
)
def test_what_is_no_address_is_told(path: str) -> None:
    with pytest.raises(UsageError, match="is not a whole address"):
        address_of(path)


@pytest.mark.parametrize("path", ["s3://b/a//b", "s3://b/a/../b", "gs://b/./a"])
def test_parts_that_no_store_takes_are_refused(path: str) -> None:
    with pytest.raises(UsageError, match="has a part without a name"):
        address_of(path)
