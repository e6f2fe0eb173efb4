"""``python -m anyckpt.cli``."""

from anyckpt.cli import main

main()
