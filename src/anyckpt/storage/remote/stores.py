"""Obstore's stores, one for each bucket or web server, with whatever each ecosystem's environment says."""

from __future__ import annotations

import os
import re
import threading
from datetime import timedelta
from importlib import import_module
from typing import Any

from anyckpt.errors import MissingLibraryError, UsageError
from anyckpt.storage.remote import aws, azure, google
from anyckpt.storage.remote.addresses import AZURE, GCS, S3, WEB, Address, address_of

Store = Any
"""A store of obstore, whose types are not there where it is not installed."""

RETRIES = 6
FIRST_WAIT = 0.1
"""Seconds before something is tried again for the first time; later ones are longer."""

_PATIENCE = timedelta(minutes=2)
_CLIENT = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "10m"}
_PREFIXES = {S3: "AWS_", GCS: "GOOGLE_", AZURE: "AZURE_", WEB: "HTTPS_PROXY"}

_stores: dict[tuple[object, ...], Store] = {}
_making = threading.Lock()
os.register_at_fork(after_in_child=_stores.clear)


def store_of(url: str) -> tuple[Store, str]:
    """The store that a path is in, and what the path is called in it.

    A bucket has one store for as long as what the environment says of it stays the same.

    Raises:
        MissingLibraryError: obstore is not installed.
        UsageError: the path names no bucket, or its settings contradict each other.
    """
    address = address_of(url)
    return store_at(address), address.key


def store_at(address: Address) -> Store:
    """The store of an address.

    Raises:
        MissingLibraryError: obstore is not installed.
        UsageError: the settings contradict each other.
    """
    library = _library(address.public)
    given: dict[str, Any]
    if address.kind == S3:
        given = aws.settings(address.holder)
    elif address.kind == GCS:
        given = google.settings()
    elif address.kind == AZURE:
        given = azure.settings(address.account)
    else:
        given = {}
    key = (address.kind, address.root, address.secret, repr(sorted(given.items())), _environment())
    with _making:
        if key not in _stores:
            wrong: str | None = None
            try:
                _stores[key] = _made(library, address, given)
            except Exception as error:  # whose text may quote a setting
                named = re.search(r"source: (\w+),", str(error))
                wrong = named[1] if named else type(error).__name__
            if wrong is not None:
                raise UsageError(
                    "what the environment says of this store is incomplete or wrong",
                    path=address.public,
                    found=wrong,
                    remedy=f"look at the variables that begin with {_PREFIXES[address.kind]}",
                )
        return _stores[key]


def is_anonymous(store: Store) -> bool:
    """Whether requests of a store are not signed, as no credentials were found."""
    return bool(getattr(store, "config", {}).get(aws.ANONYMOUS))


def _library(path: str) -> Any:
    try:
        return import_module("obstore.store")
    except ImportError:
        raise MissingLibraryError(
            "is on no disk, and to reach it needs obstore, which is not installed",
            path=path,
            remedy="pip install 'anyckpt[remote]'",
        ) from None


def _environment() -> tuple[tuple[str, str], ...]:
    """What obstore takes from the environment, which a notebook may set when it has met an error."""
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith(("AWS_", "AZURE_", "GOOGLE_"))))


def _made(library: Any, address: Address, given: dict[str, Any]) -> Store:
    endpoint = str(given.get("endpoint") or given.get("base_url") or address.root)
    client: dict[str, Any] = dict(_CLIENT)
    client["allow_http"] = endpoint.startswith("http://") or bool(given.get("use_emulator"))
    bundle = os.environ.get("AWS_CA_BUNDLE")
    if address.kind == S3 and bundle and os.path.isfile(bundle):
        with open(bundle, "rb") as file:
            client["root_certificate"] = file.read()
    waiting = {"init_backoff": timedelta(seconds=FIRST_WAIT)}
    patience = {"max_retries": RETRIES, "retry_timeout": _PATIENCE, "backoff": waiting}
    options: dict[str, Any] = {"client_options": client, "retry_config": patience}
    if address.kind == S3:
        return library.S3Store(address.holder, **options, **given)
    if address.kind == GCS:
        return library.GCSStore(address.holder, **options, **given)
    if address.kind == AZURE:
        return library.AzureStore(address.holder, **options, **given)
    user, query = address.secret
    at, asking = f"{user}@" if user else "", f"?{query}" if query else ""
    return library.HTTPStore(f"{address.scheme}://{at}{address.holder}/{asking}", **options)
