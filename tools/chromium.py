"""The browser that pages are tested in: Chromium, from the system's packages if it is not there yet."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def prepare_browser() -> None:
    """Install Chromium with apt, as root or with sudo, unless there is a browser."""
    if any(map(shutil.which, _NAMES)):
        return
    before = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]
    if shutil.which("apt-get") is None or (before and shutil.which("sudo") is None):
        sys.exit("the tests of pages need Chromium: install it, so that `chromium` is found")
    print("installing chromium ...", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
        command = [*before, "apt-get", "--quiet", *words]
        if subprocess.run(command, check=False, env=environment, stdout=subprocess.DEVNULL).returncode:
            sys.exit(f"the tests of pages need Chromium, and `{' '.join(command)}` failed: install it yourself")


if __name__ == "__main__":
    prepare_browser()
