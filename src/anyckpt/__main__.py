"""``python -m anyckpt`` is the command line."""

from anyckpt.cli import main

if __name__ == "__main__":
    main()
