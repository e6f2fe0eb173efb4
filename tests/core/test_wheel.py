"""What is installed."""

from __future__ import annotations

from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]


def test_data_files_lie_in_the_wheel_beside_the_modules_that_read_them() -> None:
    data = {
        path.relative_to(ROOT / "src").as_posix()
        for pattern in ("*.json", "*.yaml")
        for path in (ROOT / "src").rglob(pattern)
    }
    installed = {file.distribution_path.replace("\\", "/") for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {"anyckpt/config/data/nemo2.json", "anyckpt/config/data/transformers.json"} <= data <= installed
