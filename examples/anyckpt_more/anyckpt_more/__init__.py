"""A model family, a format and a dialect that anyckpt finds through entry points."""
