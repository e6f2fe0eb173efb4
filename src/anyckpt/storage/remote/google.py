"""How Google Cloud Storage is reached, beyond what obstore takes from the environment."""

from __future__ import annotations

import os
from typing import Any

from anyckpt.storage.remote.metadata_service import gives_google_credentials

_CREDENTIALS = (
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_BEARER_TOKEN",
    "GOOGLE_SKIP_SIGNATURE",
)
_OF_GCLOUD = "~/.config/gcloud/application_default_credentials.json"


def settings() -> dict[str, Any]:
    """Arguments of a ``GCSStore``: an emulator, as Google's libraries find it, and whether requests go unsigned."""
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if emulator:
        return {"base_url": emulator if "://" in emulator else f"http://{emulator}", "skip_signature": True}
    known = any(os.environ.get(name) for name in _CREDENTIALS) or os.path.exists(os.path.expanduser(_OF_GCLOUD))
    return {} if known or gives_google_credentials() else {"skip_signature": True}
