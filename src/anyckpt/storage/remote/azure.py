"""How Azure's blobs are reached, beyond what obstore takes from the environment."""

from __future__ import annotations

import os
from typing import Any

from anyckpt.errors import UsageError
from anyckpt.storage.remote.metadata_service import gives_azure_credentials

_ACCOUNTS = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT")
_SPELLED_OTHERWISE = {"AZURE_STORAGE_KEY": "account_key"}
_OF_CONNECTION = {
    "AccountName": "account_name",
    "AccountKey": "account_key",
    "BlobEndpoint": "endpoint",
    "SharedAccessSignature": "sas_key",
}
_CREDENTIALS = (
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_MASTER_KEY",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_CLIENT_SECRET",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_MSI_ENDPOINT",
    "IDENTITY_ENDPOINT",
    "AZURE_USE_AZURE_CLI",
    "AZURE_SKIP_SIGNATURE",
)


def settings(account: str) -> dict[str, Any]:
    """Arguments of an ``AzureStore``.

    Args:
        account: the storage account that the path names; empty if it names none.

    Raises:
        UsageError: neither the path nor the environment names the account.
    """
    given: dict[str, Any] = {}
    for part in os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";"):
        name, _, value = part.partition("=")
        if value and name in _OF_CONNECTION:
            given[_OF_CONNECTION[name]] = value
    given.update({key: os.environ[name] for name, key in _SPELLED_OTHERWISE.items() if os.environ.get(name)})
    named = account or next((os.environ[name] for name in _ACCOUNTS if os.environ.get(name)), None)
    if named:
        given["account_name"] = named
    if os.environ.get("AZURE_STORAGE_USE_EMULATOR", "").lower() in ("1", "true"):
        return {**given, "use_emulator": True}
    if "account_name" not in given:
        raise UsageError(
            "no storage account is named for a path of Azure",
            remedy="set AZURE_STORAGE_ACCOUNT_NAME, or write abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/FOLDER",
        )
    known = any(os.environ.get(name) for name in _CREDENTIALS) or {"account_key", "sas_key"} & given.keys()
    return given if known or gives_azure_credentials() else {**given, "skip_signature": True}
