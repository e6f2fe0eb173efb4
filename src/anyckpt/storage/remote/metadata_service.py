"""Whether this machine is one of a cloud's, which gives it credentials at an address of its own.

Stores ask there when nothing else has credentials.  Elsewhere nothing answers, and they would try for minutes.
"""

from __future__ import annotations

import os
from functools import cache
from http.client import HTTPConnection, HTTPException

_ADDRESS = "169.254.169.254"
_SECONDS = 1.0


@cache
def gives_aws_credentials() -> bool:
    """Whether an EC2 instance has a role (IMDSv2, as the AWS SDKs ask it)."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    if os.environ.get("AWS_METADATA_ENDPOINT"):
        return True
    token = _answer("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    if token is None:
        return False
    header = {"X-aws-ec2-metadata-token": token}
    return bool(_answer("GET", "/latest/meta-data/iam/security-credentials/", header))


@cache
def gives_google_credentials() -> bool:
    """Whether a Google machine has a service account."""
    path = "/computeMetadata/v1/instance/service-accounts/default/email"
    return bool(_answer("GET", path, {"Metadata-Flavor": "Google"}))


@cache
def gives_azure_credentials() -> bool:
    """Whether this is an Azure machine, which may have a managed identity."""
    return bool(_answer("GET", "/metadata/instance/compute?api-version=2021-02-01", {"Metadata": "true"}))


def _answer(method: str, path: str, headers: dict[str, str]) -> str | None:
    connection = HTTPConnection(_ADDRESS, timeout=_SECONDS)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.read(1 << 16).decode("utf-8", "replace") if response.status == 200 else None
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()
