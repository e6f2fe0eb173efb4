"""A tokenizer by its name on the hub: fetched where huggingface_hub is installed, recorded otherwise."""

from __future__ import annotations

from anyckpt.checkpoint import Tokenizer
from anyckpt.errors import UsageError
from anyckpt.formats.shared import hub_folder
from anyckpt.storage.hub.library import explained, failures
from anyckpt.storage.location import look_at

_FILES = ("tokenizer*", "*.model", "*.tiktoken", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
NOT_FETCHED = "the tokenizer is recorded by its name, {name}, and its files are not there: {reason}"


def hub_tokenizer(name: str) -> tuple[Tokenizer, str | None]:
    """The tokenizer of this name, and a note where its files are not there.

    Nothing but a tokenizer's files is fetched, into huggingface_hub's own cache, with its own token.

    Args:
        name: of a repository, ``org/name``.

    Raises:
        UsageError: there is no such repository, it is gated or private, or it has no tokenizer.
    """
    recorded = Tokenizer("huggingface", {}, hub_name=name)
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        return recorded, NOT_FETCHED.format(name=name, reason="install anyckpt[hub] to fetch them")
    try:
        folder = snapshot_download(name, allow_patterns=list(_FILES))
    except errors.RepositoryNotFoundError as error:  # a gated one, too
        raise explained(error, name).told_as(UsageError) from None
    except failures() as error:
        return recorded, NOT_FETCHED.format(name=name, reason=explained(error, name).problem)
    found = hub_folder.read_tokenizer(look_at(folder))
    if found is None:
        raise UsageError("has no tokenizer", path=name, remedy="give the repository or folder that AutoTokenizer loads")
    return Tokenizer("huggingface", found.files, found.model_file, found.settings, name), None
