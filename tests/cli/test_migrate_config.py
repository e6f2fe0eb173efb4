"""``anyckpt migrate-config``: what it prints and writes."""

from __future__ import annotations

from pathlib import Path

from tests.cli.runner import Runner
from tests.cli.test_json_documentation import documented

OLD = "model: {num_layers: 2, dist_ckpt_format: zarr, strange: 1}\ntrainer: {devices: 2}\n"


def test_prints_the_arguments_with_their_origins(anyckpt: Runner, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(OLD)
    done = anyckpt("migrate-config", tmp_path / "old.yaml")
    assert done.code == 0
    assert "  save_ckpt_format: zarr  # model.dist_ckpt_format\n" in done.out
    assert "model.strange" in done.err and "deprecated" in done.err
    assert "MegatronStrategy(" in anyckpt("migrate-config", tmp_path / "old.yaml", "--form", "python").out


def test_writes_a_file_and_leaves_what_is_there(anyckpt: Runner, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(OLD)
    new = tmp_path / "new.py"
    words = ("migrate-config", tmp_path / "old.yaml", "-o", new)
    assert anyckpt(*words).out == "" and new.read_text().startswith("import nemo")
    assert "already exists" in anyckpt(*words).error
    assert anyckpt(*words, "--overwrite").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.py", "old.yaml"]


def test_json_has_every_setting(anyckpt: Runner, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(OLD)
    found = anyckpt("migrate-config", tmp_path / "old.yaml", "--json").json
    assert set(found) == documented("migrate-config")
    assert len(found["settings"]) == 4 and found["unknown"] == ["model.strange"]


def test_errors_are_one_line(anyckpt: Runner, tmp_path: Path) -> None:
    assert "cannot be read" in anyckpt("migrate-config", tmp_path / "none.yaml").error
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "YAML mapping" in anyckpt("migrate-config", tmp_path / "list.yaml").error
