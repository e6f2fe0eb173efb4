"""Servers in the tests' process, for what is read and written far away."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

KEY, SECRET, TOKEN = "AKIAKEYOFTHETESTS", "secret/of+the+tests", "token-of-the-tests"
"""Credentials of the server below, which nothing may tell."""


@dataclass
class S3Server:
    """An S3 server and what it was asked.

    Attributes:
        url: where it is.
        requests: method and path with query of each request, in their order.
    """

    url: str
    requests: list[str] = field(default_factory=list)

    def client(self) -> Any:
        """Boto3's client of it."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            aws_session_token=TOKEN,
        )

    def bucket(self, name: str, files: Mapping[str, bytes] | None = None) -> str:
        """Make a bucket that holds files; its path."""
        self.client().create_bucket(Bucket=name)
        self.put(name, files or {})
        return f"s3://{name}"

    def put(self, bucket: str, files: Mapping[str, bytes]) -> None:
        """Put files into a bucket."""
        client = self.client()
        for key, data in files.items():
            client.put_object(Bucket=bucket, Key=key, Body=data)

    def files(self, bucket: str) -> dict[str, bytes]:
        """What a bucket holds."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [found["Key"] for page in pages for found in page.get("Contents", [])]
        return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3Server]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield S3Server(f"http://{host}:{port}")
    server.stop()


@pytest.fixture
def s3(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An empty S3 server, which this process's environment leads to."""
    from moto.core.model_instances import reset_model_data

    reset_model_data()
    nowhere(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return moto_server


def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take from the environment all that says how any cloud is reached."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_", "STORAGE_")):
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent/aws")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
