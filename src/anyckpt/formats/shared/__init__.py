"""What several formats have in common: files that lie beside weights, ranks' files, and what trainers record alike.

Formats import these and never one another, but for another's payload (see the import contract in ``pyproject.toml``).
"""
