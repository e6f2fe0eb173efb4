"""What the paths of object stores and web servers say: which store, and what is called how in it."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote, urlsplit

from anyckpt.data_classes import dataclass
from anyckpt.errors import UsageError
from anyckpt.storage.place import scheme_of

S3, GCS, AZURE, WEB = "s3", "gs", "az", "web"
KINDS = {
    "s3": S3,
    "s3a": S3,
    "gs": GCS,
    "gcs": GCS,
    "az": AZURE,
    "azure": AZURE,
    "abfs": AZURE,
    "abfss": AZURE,
    "https": WEB,
    "http": WEB,
}
"""What kind of store a path is in, by its scheme."""
_ACCOUNT = re.compile(r"([^@]+)@([a-z0-9]+)(\.(dfs|blob)\.core\.windows\.net)?")
_USER = re.compile(r"^(https?://)[^/@]+@")
_SIGNED = re.compile(r"[?#](?:(?!::).)*", re.DOTALL)
_EXAMPLES = {
    S3: "s3://bucket/folder",
    GCS: "gs://bucket/folder",
    AZURE: "az://container/folder",
    WEB: "https://host/folder/file",
}


@dataclass(frozen=True)
class Address:
    """Where something is in a store.

    Attributes:
        kind: one of the values of ``KINDS``.
        scheme: as it is spelled.
        holder: the bucket, the container, or the web server with its port.
        key: the name in it, ``/`` between folders and at no end; of a web server, with no character escaped.
        account: Azure's storage account, if the path names it.
        secret: what a web address says beside its path, such as ``?signature=...``, and who asks (``user:token@``).
    """

    kind: str
    scheme: str
    holder: str
    key: str
    account: str = ""
    secret: tuple[str, str] = ("", "")

    @property
    def root(self) -> str:
        """The path of all that the store holds, without secrets and a slash at the end."""
        at = f"@{self.account}.dfs.core.windows.net" if self.account else ""
        return f"{self.scheme}://{self.holder}{at}"

    @property
    def public(self) -> str:
        """The path without secrets."""
        return self.path_of(self.key)

    def path_of(self, key: str) -> str:
        """The path of what is called ``key`` in the same store."""
        spelled = quote(key, safe=_PLAIN) if self.kind == WEB else key
        return f"{self.root}/{spelled}" if spelled else self.root


_PLAIN = "/:@!$&'()*+,;=~-._"


def address_of(url: str) -> Address:
    """What a path says.

    A key of an object store is what stands there, whatever characters it has; in a web address ``%20`` is a blank.

    Raises:
        UsageError: it names no bucket, or is no address.
    """
    scheme = scheme_of(url) or ""
    kind = KINDS[scheme]
    if kind == WEB:
        return _web(url, scheme)
    holder, _, key = url[len(scheme) + 3 :].partition("/")
    account = ""
    if kind == AZURE and "@" in holder:
        found = _ACCOUNT.fullmatch(holder)
        if found is None:
            raise _no_address(url, kind)
        holder, account = found[1], found[2]
    key = key.strip("/")
    if not holder or "\0" in url:
        raise _no_address(url, kind)
    if any(part in ("", ".", "..") for part in key.split("/")) and key:
        raise UsageError(
            "has a part without a name, or one of dots, in the path", path=url, remedy="write the path without it"
        )
    return Address(kind, scheme, holder, key, account)


def without_secret(path: str) -> str:
    """A web path without what it is signed with; what follows ``::``, a member of an archive, stays."""
    return _SIGNED.sub("", _USER.sub(r"\1", path))


def _web(url: str, scheme: str) -> Address:
    try:
        split = urlsplit(url)
        _ = split.port
    except ValueError:
        split = None
    if split is None or not split.hostname or "\0" in url:
        raise _no_address(url, WEB)
    user, _, host = split.netloc.rpartition("@")
    return Address(WEB, scheme, host, unquote(split.path).strip("/"), secret=(user, split.query.partition("::")[0]))


def _no_address(url: str, kind: str) -> UsageError:
    return UsageError("is not a whole address", path=url, expected=f"such as {_EXAMPLES[kind]}")
