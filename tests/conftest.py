"""What holds for the whole run."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

from tests.hub import hub, hub_servers  # noqa: F401 (fixtures)
from tests.servers import moto_server, proxy, s3  # noqa: F401 (fixtures)

settings.register_profile("any machine", deadline=None)  # how long an example takes says nothing about it
settings.load_profile("any machine")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where every peer is installed, a test that did not run has not passed: ANYCKPT_NO_SKIPS=1 makes it a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("ANYCKPT_NO_SKIPS") != "1" or reporter is None:
        return
    skipped = reporter.stats.get("skipped", [])
    for report in skipped:
        reporter.write_line(f"did not run: {report.nodeid}: {report.longrepr}", red=True)
    if skipped and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
