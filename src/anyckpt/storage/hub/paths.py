"""Paths on the Hub: ``hf://[datasets/|spaces/]org/name[@revision][/file or folder]``, or ``hf:`` for short.

With one slash, as ``pathlib`` makes it, they mean the same.

The spelling is that of huggingface_hub's ``parse_hf_uri``: a revision of pull requests and of converted data sets has
slashes (``refs/pr/3``), and any other is written with ``%2F`` for them.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from anyckpt.data_classes import dataclass
from anyckpt.errors import FormatError

SCHEME = "hf"
MAIN = "main"
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_PATH = re.compile(
    r"(?P<root>hf:/{0,2}(?:(?P<kind>model|dataset|space)s/)?"
    rf"(?:(?P<long>{_NAME}/{_NAME})|(?P<short>{_NAME})(?=@|/*\Z))"
    r"(?:@(?P<revision>refs/(?:pr/[0-9]+|convert/[\w.-]+)|[^/]+))?)"
    r"(?P<inner>/.*)?",
    re.DOTALL,
)
_OTHER = ("buckets", "kernels")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubPath:
    """A path on the Hub, taken apart.

    Attributes:
        root: the repository and revision as they were spelled.
        kind: ``model``, ``dataset`` or ``space``.
        repository: ``org/name``, or ``name`` of an old model without an owner.
        revision: a branch, a tag or a commit; None where the path says none.
        inner: what is named in the repository; empty for all of it.
    """

    root: str
    kind: str
    repository: str
    revision: str | None
    inner: str

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a commit, which always means the same."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def title(self) -> str:
        """The repository for messages, as the Hub's pages call it."""
        return self.repository if self.kind == "model" else f"{self.kind}s/{self.repository}"


def parse(path: str) -> HubPath:
    """Take a path apart.

    Raises:
        FormatError: it is not spelled as one.
    """
    found = _PATH.fullmatch(path)
    if found is not None and (found["long"] or "").startswith(tuple(f"{kind}/" for kind in _OTHER)):
        raise FormatError(
            "is of a kind that is not read here",
            path=path,
            expected="a model, datasets/org/name or spaces/org/name",
            found=f"one of {found['long'].partition('/')[0]}",
        )
    if found is None:
        raise FormatError(
            "is not a path on the Hugging Face Hub",
            path=path,
            expected="hf://org/name, hf://org/name@revision or hf://org/name/file",
            remedy="check the spelling",
        )
    revision = None if found["revision"] is None else unquote(found["revision"])
    inner = "/".join(filter(None, (found["inner"] or "").split("/")))
    return HubPath(found["root"], found["kind"] or "model", found["long"] or found["short"], revision, inner)
