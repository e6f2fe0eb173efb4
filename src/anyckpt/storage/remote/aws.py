"""How S3 is reached: what the environment and the files of the AWS command line say, and what obstore does not take.

Obstore itself takes ``AWS_ACCESS_KEY_ID`` and its like, ``AWS_REGION``, ``AWS_ENDPOINT_URL``, the credentials of
containers and web identities and those of a machine's role.  It knows no profiles: they are read here, in the order
of the AWS SDKs (https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html).
"""

from __future__ import annotations

import os
import sys
from configparser import Error, RawConfigParser
from datetime import datetime, timedelta, timezone
from functools import cache
from http.client import HTTPException, HTTPSConnection
from importlib import import_module
from typing import Any

from anyckpt.errors import UsageError
from anyckpt.storage.remote.metadata_service import gives_aws_credentials

_CONTAINER = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_BY_OTHERS = ("sso_session", "sso_start_url", "role_arn", "credential_process", "login_session")
_FRESH = timedelta(minutes=15)
_SECONDS = 3.0
ANONYMOUS = "skip_signature"


def settings(bucket: str) -> dict[str, Any]:
    """Arguments of an ``S3Store`` beyond those that it takes from the environment.

    Raises:
        UsageError: a profile is asked for that is not there, or whose credentials need boto3, which is not installed.
    """
    profile = _profile()
    given: dict[str, Any] = {}
    endpoint = _environment("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT") or profile.get("endpoint_url")
    if endpoint:
        given["endpoint"] = endpoint
    given.update(_credentials(profile))
    region = _environment("AWS_REGION", "AWS_DEFAULT_REGION") or profile.get("region")
    if not region and not endpoint:
        region = region_of(bucket)
    if region:
        given["region"] = region
    return given


def _environment(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _credentials(profile: dict[str, str]) -> dict[str, Any]:
    if _environment("AWS_SKIP_SIGNATURE") or _environment("AWS_ACCESS_KEY_ID"):
        return {}
    if {"aws_access_key_id", "aws_secret_access_key"} <= profile.keys():
        token = profile.get("aws_session_token")
        pair = {
            "access_key_id": profile["aws_access_key_id"],
            "secret_access_key": profile["aws_secret_access_key"],
        }
        return {**pair, "session_token": token} if token else pair
    if any(key in profile for key in _BY_OTHERS):
        return {"credential_provider": _of_boto3(_profile_name())}
    if _environment(*_CONTAINER) or gives_aws_credentials():
        return {}
    return {ANONYMOUS: True}


def _profile_name() -> str:
    return _environment("AWS_PROFILE", "AWS_DEFAULT_PROFILE") or "default"


def _profile() -> dict[str, str]:
    """What the files of the AWS command line say of the profile that is asked for.

    Raises:
        UsageError: one is asked for by name, and is in neither file.
    """
    name = _profile_name()
    files = [
        (os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config", "default" if name == "default" else f"profile {name}"),
        (os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials", name),
    ]
    found: dict[str, str] = {}
    is_there = False
    for path, section in files:
        parser = RawConfigParser(strict=False)
        try:
            parser.read(os.path.expanduser(path), encoding="utf-8")
        except (Error, OSError, UnicodeDecodeError):
            raise UsageError("cannot be read as a file of settings", path=path, remedy="mend it") from None
        if parser.has_section(section):
            is_there = True
            found.update({key: value.strip() for key, value in parser.items(section) if value})
    if not is_there and _environment("AWS_PROFILE", "AWS_DEFAULT_PROFILE"):
        raise UsageError(
            f"the AWS profile {name!r} is not known",
            expected=f"a section of it in {' or '.join(path for path, _ in files)}",
            remedy="set AWS_PROFILE to another one, or make it with aws configure",
        )
    return found


class _Boto3Credentials:
    """What boto3 finds, asked again when it may have become stale."""

    def __init__(self, credentials: Any) -> None:
        self._credentials = credentials

    def __call__(self) -> dict[str, Any]:
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(timezone.utc) + _FRESH,
        }


@cache
def _of_boto3(profile: str) -> _Boto3Credentials:
    try:
        boto3 = import_module("boto3")
    except ImportError:
        boto3 = None
    if boto3 is None:
        raise UsageError(
            f"the AWS profile {profile!r} gets its credentials from a role, a login or a program, which boto3 does",
            remedy=f"install it ({sys.executable} -m pip install boto3), or run: "
            f'eval "$(aws configure export-credentials --profile {profile} --format env)"',
        )
    credentials = boto3.Session(profile_name=profile).get_credentials()
    if credentials is None:
        raise UsageError(f"the AWS profile {profile!r} has no credentials", remedy="log in, or choose another one")
    return _Boto3Credentials(credentials)


@cache
def region_of(bucket: str) -> str | None:
    """The region that a bucket of AWS says it is in, to everybody; None if it does not answer."""
    connection = HTTPSConnection("s3.amazonaws.com", timeout=_SECONDS)
    try:
        connection.request("HEAD", f"/{bucket}")
        return connection.getresponse().getheader("x-amz-bucket-region")
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()
