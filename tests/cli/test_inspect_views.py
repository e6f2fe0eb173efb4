"""What ``anyckpt inspect`` shows people first, and what it shows when it is asked for more."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli.runner import Runner, shown_on
from tests.support import fixture_path

import anyckpt as api
from anyckpt.cli.stages import stages_line, stages_picture
from anyckpt.formats.shared.no_weights import EXTRA_STATE_REASON, PLACEHOLDER_REASON, some_hold_something
from anyckpt.operations.steps.training_facts import learning_rates, loss_scale

LLAMA = fixture_path("families/llama/hf")
LIGHTNING = fixture_path("legacy/ptl_adamw/model--val_loss=0.5-epoch=3.ckpt")
UNEVEN = fixture_path("legacy/megatron_gpt_pp3_uneven")
INTERLEAVED = fixture_path("legacy/megatron_gpt_pp2_vpp2_layout")
DISTRIBUTED = fixture_path("mcore/gpt_opt_plain/ckpt")


TIMES = "\N{MULTIPLICATION SIGN}"


def on_a_terminal(columns: int, *words: str | Path, cwd: Path | None = None, **environment: str) -> list[str]:
    """The lines that a terminal of so many columns gets, without colours."""
    parent, child = pty.openpty()
    known = {name: value for name, value in os.environ.items() if name not in ("LC_ALL", "LC_CTYPE", "LANG")}
    told = {"TERM": "xterm", "NO_COLOR": "1", "LC_ALL": "C.UTF-8", "COLUMNS": str(columns), **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "anyckpt", *map(str, words)],
        stdout=child,
        stderr=subprocess.DEVNULL,
        cwd=cwd,
        env={**known, **told},
    )
    os.close(child)
    return shown_on(parent, process).splitlines()


STATS_AT_60 = """\
name
    type     shape        size  shards  files
        min     max      mean      std  zeros  nan  inf
    sha256
model.layers.0.mlp.down_proj.weight
    float32  [64, 80]  20.5 kB       1  model.safetensors
    -0.2773   0.365  0.001097  0.08056      0    0    0
    1668a9c2eccfd7d7aec7524a0e2829a76d365081e53b33e82d794b5ac4917028
model.layers.1.mlp.down_proj.weight
    float32  [64, 80]  20.5 kB       1  model.safetensors"""

GROUPS_AT_80 = """\
name                                        type     shape            size
lm_head.weight                              float32  [151, 64]     38.7 kB
model.embed_tokens.weight                   float32  [151, 64]     38.7 kB
model.layers.{0-1}.input_layernorm.weight   float32  [64] x 2        512 B
model.layers.{0-1}.mlp.down_proj.weight     float32  [64, 80] x 2  41.0 kB
model.layers.{0-1}.mlp.gate_proj.weight     float32  [80, 64] x 2  41.0 kB
model.layers.{0-1}.mlp.up_proj.weight       float32  [80, 64] x 2  41.0 kB
model.layers.{0-1}.post_attention_layernorm.weight
                                            float32  [64] x 2        512 B
model.layers.{0-1}.self_attn.k_proj.weight  float32  [32, 64] x 2  16.4 kB
model.layers.{0-1}.self_attn.o_proj.weight  float32  [64, 64] x 2  32.8 kB
model.layers.{0-1}.self_attn.q_proj.weight  float32  [64, 64] x 2  32.8 kB
model.layers.{0-1}.self_attn.v_proj.weight  float32  [32, 64] x 2  16.4 kB
model.norm.weight                           float32  [64]            256 B
(no room for shards, files: model.safetensors in all rows)"""

GROUPS_AT_100 = """\
model.layers.{0-1}.post_attention_layernorm.weight  float32  [64] x 2        512 B       2
model.layers.{0-1}.self_attn.k_proj.weight          float32  [32, 64] x 2  16.4 kB       2
model.layers.{0-1}.self_attn.o_proj.weight          float32  [64, 64] x 2  32.8 kB       2
model.layers.{0-1}.self_attn.q_proj.weight          float32  [64, 64] x 2  32.8 kB       2
model.layers.{0-1}.self_attn.v_proj.weight          float32  [32, 64] x 2  16.4 kB       2
model.norm.weight                                   float32  [64]            256 B       1
(no room for files: model.safetensors in all rows)"""

STATS_AT_200 = (
    "model.layers.0.mlp.down_proj.weight  float32  [64, 80]  20.5 kB       1  -0.2773   0.365  0.001097  0.08056"
    "      0    0    0  1668a9c2eccfd7d7aec7524a0e2829a76d365081e53b33e82d794b5ac4917028"
)


@pytest.mark.parametrize(
    ("columns", "words", "expected"),
    [
        (60, ("--tensors", "*down_proj*", "--stats", "--digest"), STATS_AT_60),
        (80, ("--tensors", "*"), GROUPS_AT_80),
        (100, ("--tensors", "*"), GROUPS_AT_100),
        (200, ("--tensors", "*down_proj*", "--stats", "--digest"), STATS_AT_200),
    ],
)
def test_tensors_at_the_widths_that_people_have(columns: int, words: tuple[str, ...], expected: str) -> None:
    lines = on_a_terminal(columns, "inspect", LLAMA, *words)
    assert expected.replace("] x 2", f"] {TIMES} 2") in "\n".join(lines)
    digest = 64 + 4
    assert all(len(line) <= max(columns, digest) for line in lines if not line.startswith("path "))


SUMMARY_AT_60 = """\
path           .
format         megatron-lm checkpoint_version 3
family         qwen2 (hub names)
model          6 layers of width 8, MLP 12, 4 heads of 4 in
               2 groups, 61 tokens padded to 64 rows, tied
               embeddings
parameters     4,840 (4.8K)
tensors        44, 19.4 kB
types          44 float32 (19.4 kB)
training       step 7, consumed samples 56
parallel       pipeline 3
configuration  megatron-args, 70 settings (--config prints
               them)
other state    args, checkpoint_version, iteration,
               num_floating_point_operations_so_far
               (--objects GLOB prints them)"""

SUMMARY_AT_100 = """\
path           .
format         megatron-lm checkpoint_version 3
family         qwen2 (hub names)
model          6 layers of width 8, MLP 12, 4 heads of 4 in 2 groups, 61 tokens padded to 64 rows,
               tied embeddings
parameters     4,840 (4.8K)
tensors        44, 19.4 kB
types          44 float32 (19.4 kB)
training       step 7, consumed samples 56
parallel       pipeline 3
configuration  megatron-args, 70 settings (--config prints them)
other state    args, checkpoint_version, iteration, num_floating_point_operations_so_far (--objects
               GLOB prints them)"""


@pytest.mark.parametrize(("columns", "expected"), [(60, SUMMARY_AT_60), (100, SUMMARY_AT_100)])
def test_a_summary_is_wrapped_at_words(columns: int, expected: str) -> None:
    assert "\n".join(on_a_terminal(columns, "inspect", ".", cwd=UNEVEN)).startswith(expected)


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
@pytest.mark.parametrize("path", [LLAMA, LIGHTNING, UNEVEN, DISTRIBUTED], ids=lambda path: path.parent.name)
def test_no_line_is_longer_than_the_terminal_unless_a_word_is(columns: int, path: Path) -> None:
    for line in on_a_terminal(columns, "inspect", path, "--tensors", "*"):
        longest = max(map(len, line.split()), default=0)
        assert len(line) <= columns or longest > columns - 40, line


def test_without_utf_8_signs_are_ascii() -> None:
    plain = on_a_terminal(80, "inspect", LLAMA, "--tensors", "*", LC_ALL="C")
    assert any("[64, 80] x 2" in line for line in plain)
    assert any("0  #.....  embedding, layer 0" in line for line in on_a_terminal(80, "inspect", UNEVEN, LC_ALL="C"))


def test_no_colour_means_no_escapes_at_all() -> None:
    assert not any("\x1b" in line for line in on_a_terminal(80, "inspect", LLAMA, "--stats"))
    assert any("\x1b[1m" in line for line in on_a_terminal(80, "inspect", LLAMA, "--stats", NO_COLOR=""))
    assert not any("\x1b" in line for line in on_a_terminal(80, "inspect", LLAMA, NO_COLOR="", TERM="dumb"))


def test_what_is_piped_is_whole(anyckpt: Runner) -> None:
    lines = anyckpt("inspect", LLAMA, "--digest").out.splitlines()
    listed = [line for line in lines if line.startswith("model.layers.")]
    assert len(listed) == 18
    assert all(len(line.split()[-1]) == 64 and "model.safetensors" in line for line in listed)


def test_alike_layers_are_one_line_and_all_of_them_on_request(anyckpt: Runner) -> None:
    def listed(*words: str) -> list[str]:
        return [line.split()[0] for line in anyckpt("inspect", LLAMA, *words).out.splitlines() if "float32  [" in line]

    assert len(listed("--tensors", "*")) == 12
    assert "model.layers.{0-1}.mlp.up_proj.weight" in listed("--tensors", "*")
    assert len(listed("--all")) == len(listed("--stats")) == len(listed("--digest")) == 21
    assert listed("--all", "--tensors", "*.1.mlp.up*") == ["model.layers.1.mlp.up_proj.weight"]


def test_rows_with_tabs_are_numbers_as_they_are(anyckpt: Runner) -> None:
    listed = anyckpt("inspect", LLAMA, "--stats", "--digest", "--json").json["tensors"]
    header, *rows = [
        line.split("\t") for line in anyckpt("inspect", LLAMA, "--stats", "--digest", "--tsv").out.splitlines()
    ]
    assert header == "name dtype shape nbytes shards files min max mean std zeros nan inf sha256".split()
    for row, tensor in zip(rows, listed, strict=True):
        told = dict(zip(header, row, strict=True))
        assert (told["name"], int(told["nbytes"]), told["sha256"]) == (
            tensor["name"],
            tensor["nbytes"],
            tensor["sha256"],
        )
        assert float(told["mean"]) == tensor["stats"]["mean"]
        assert told["shape"] == str(tensor["shape"])


def test_a_file_without_tensors_has_none_to_list(anyckpt: Runner, tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    path.write_bytes(b"\2\0\0\0\0\0\0\0{}")
    for words in (("--tensors", "*"), ("--tree",), ("--all",), ("--stats",)):
        assert anyckpt("inspect", path, *words).code == 0
    assert anyckpt("inspect", path, "--tsv").out == "name\tdtype\tshape\tnbytes\tshards\tfiles\n"


def test_a_tree_says_what_each_module_takes(anyckpt: Runner) -> None:
    found = anyckpt("inspect", LLAMA, "--tree", "--json").json
    tree = found["tree"]
    assert (tree["bytes"], tree["tensors"], tree["parameters"]) == (found["bytes"], 21, found["parameters"])

    def check(module: dict[str, Any]) -> None:
        inside = module["modules"]
        if inside:
            for key in ("bytes", "parameters", "tensors"):
                assert sum(each[key] for each in inside) == module[key]
        for each in inside:
            check(each)

    check(tree)
    text = anyckpt("inspect", LLAMA, "--tree", "--depth", "2").out
    assert text.endswith(
        "   size  parameters  tensors  module\n"
        f" 300 kB       74.9K       21  {LLAMA}\n"
        "38.7 kB        9.7K        1    lm_head.weight  float32 [151, 64]\n"
        " 261 kB       65.3K       20    model\n"
        "38.7 kB        9.7K        1      embed_tokens.weight  float32 [151, 64]\n"
        f" 222 kB       55.6K       18      layers.{{0-1}} {TIMES} 2\n"
        "  256 B          64        1      norm.weight  float32 [64]\n"
    )
    rows = [line.split("\t") for line in anyckpt("inspect", LLAMA, "--tree", "--tsv").out.splitlines()]
    assert rows[0] == ["nbytes", "parameters", "tensors", "count", "module"]
    assert ["40960", "10240", "2", "1", "model.layers.{0-1}.mlp.up_proj.weight"] in rows


def test_what_is_stored_once_counts_once_in_a_tree(anyckpt: Runner) -> None:
    path = fixture_path("nemo/nemo1_basic_v3_0_0/toy.nemo")
    found = anyckpt("inspect", path, "--tree", "--json").json
    assert found["tree"]["bytes"] == found["bytes"] < sum(tensor["nbytes"] for tensor in found["tensors"])
    tied = {tensor["name"]: tensor["same_as"] for tensor in found["tensors"] if "same_as" in tensor}
    assert tied and set(tied.values()) <= {tensor["name"] for tensor in found["tensors"]}
    name, other = next(iter(tied.items()))
    assert f"{name} is the same as {other} in the file" in anyckpt("inspect", path, "--tensors", "*").out


def test_layers_of_two_kinds_stay_apart_in_a_tree() -> None:
    tree = api.inspect(fixture_path("families/deepseek_v3/hf"), tree=True).tree
    assert tree is not None
    layers = next(module for module in tree.modules[1].modules if module.name == "layers")
    assert [(module.name, module.count) for module in layers.modules] == [("0", 1), ("1", 1)]
    experts = next(module for module in layers.modules[1].modules[1].modules if module.name.startswith("experts"))
    assert (experts.name, experts.count, experts.tensors) == ("experts.{0-15}", 16, 48)


def test_what_people_ask_first_is_said_first(anyckpt: Runner) -> None:
    text = anyckpt("inspect", LIGHTNING).out
    assert "training       step 5, epoch 3, learning rate 0.001\n" in text
    assert "configuration  of unknown kind, 2 settings (--config prints them)\n" in text
    assert "other state    epoch, global_step, " in text and "callbacks.*" in text
    assert len(text.splitlines()) < 16
    megatron = anyckpt("inspect", DISTRIBUTED).out
    assert "training       step 10, learning rate 0.001\n" in megatron
    assert "num_layers" not in megatron
    assert "model          1 layer, width 8, MLP 32, by its configuration\n" in megatron


def test_the_whole_configuration_is_yaml(anyckpt: Runner) -> None:
    for path in (LLAMA, UNEVEN, fixture_path("nemo/nemo1_dist_tp1/model.nemo")):
        printed = anyckpt("inspect", path, "--config").out
        assert yaml.safe_load(printed) == anyckpt("inspect", path, "--json").json["config"]
    assert "has no configuration" in anyckpt("inspect", LLAMA / "model.safetensors", "--config").error


def test_other_state_is_printed_by_name_or_by_path_in_it(anyckpt: Runner) -> None:
    values = anyckpt("inspect", LIGHTNING, "--json").json["values"]
    assert yaml.safe_load(anyckpt("inspect", LIGHTNING, "--objects", "*").out) == values
    found = yaml.safe_load(anyckpt("inspect", LIGHTNING, "--objects", "lr_schedulers").out)
    assert found == {"lr_schedulers": values["lr_schedulers"]}
    found = yaml.safe_load(anyckpt("inspect", LIGHTNING, "--objects", "*param_groups.1.weight_decay").out)
    assert found == {"optimizer_states.0.param_groups.1.weight_decay": 0.0}
    assert "list all with --objects '*'" in anyckpt("inspect", LIGHTNING, "--objects", "nothing").error


def test_uneven_stages_are_a_picture(anyckpt: Runner) -> None:
    text = anyckpt("inspect", UNEVEN).out
    assert text.endswith(
        "pipeline ranks and their layers\n"
        "0  █·····  embedding, layer 0\n"
        "1  ·███··  layers 1-3\n"
        "2  ····██  layers 4-5, output layer\n"
    )
    assert (
        "0  █··█·  embedding, layers 0, 3\n1  ·██·█  layers 1-2, 4, output layer\n"
        in anyckpt("inspect", INTERLEAVED).out
    )


def test_even_stages_are_a_few_words(anyckpt: Runner) -> None:
    text = anyckpt("inspect", fixture_path("legacy/megatron_gpt_tp2_pp2")).out
    assert "parallel       tensor 2, pipeline 2, 2 stages of 2 layers\n" in text
    assert "pipeline ranks" not in text


@pytest.mark.parametrize("path", [UNEVEN, INTERLEAVED, fixture_path("legacy/megatron_gpt_pp2_account_emb_loss")])
def test_stages_in_the_files_are_those_that_the_run_was_told(path: Path) -> None:
    from anyckpt.formats import registry
    from anyckpt.layout.pipeline import chunks
    from anyckpt.operations.steps.joining import geometry_of, parallelism_of
    from anyckpt.operations.steps.stages import held_by

    stored = registry.read(path)
    held = held_by(stored.ranks)
    geometry = geometry_of(stored)
    told = chunks(parallelism_of(stored), {"decoder": geometry.num_layers or 0})
    assert [(c.pipeline_rank, c.virtual_rank, c.layers["decoder"]) for c in held] == [
        (c.pipeline_rank, c.virtual_rank, c.layers["decoder"]) for c in told if not c.empty
    ]


def stage(rank: int, layers: range, **more: Any) -> dict[str, Any]:
    return {
        "pipeline_rank": rank,
        "virtual_rank": 0,
        "layers": {"decoder": list(layers)},
        "embedding": False,
        "output": False,
        **more,
    }


def test_a_picture_of_many_layers_has_room_on_a_narrow_terminal() -> None:
    stages = [stage(0, range(61), embedding=True), stage(1, range(61, 126), output=True)]
    for room in (40, 60, 80, 200, None):
        lines = stages_picture(stages, room)
        assert lines[0].endswith("embedding, layers 0-60") and lines[1].endswith("layers 61-125, output layer")
        assert room is None or all(len(line) <= room for line in lines)
    assert stages_line(stages) == ""


@pytest.mark.parametrize(
    ("objects", "scale"),
    [
        ({"scaler": {"scale": 65536.0, "growth_factor": 2.0, "growth_interval": 2000}}, 65536.0),
        ({"optimizer": {"grad_scaler": {"scale": 1024.0, "growth_tracker": 3, "hysteresis_tracker": 2}}}, 1024.0),
        ({"optimizer_state_dict.loss_scaler": {"cur_scale": 4096, "cur_iter": 7}}, 4096.0),
        ({"amp": {"loss_scaler0": {"loss_scale": 32768.0, "unskipped": 11}}}, 32768.0),
        ({"hparams": {"scale": 2.0, "loss_scale": 1.0}}, None),
        ({"scaler": {"scale": "text", "growth_factor": float("nan")}}, None),
    ],
)
def test_the_loss_scale_of_each_library_is_found(objects: dict[str, Any], scale: float | None) -> None:
    assert loss_scale(objects) == scale


def test_learning_rates_are_those_of_groups_and_else_of_schedulers() -> None:
    groups = [{"lr": 0.1, "params": list(range(100_000))}, {"lr": 0.01, "params": [1]}, {"lr": 0.1, "params": []}]
    assert learning_rates({"a": {"param_groups": groups}, "s": [{"_last_lr": [7.0]}]}) == [0.1, 0.01]
    assert learning_rates({"optimizer_0.param_groups.0.lr": 0.5, "optimizer_0.param_groups.0.betas": (0.9, 1)}) == [0.5]
    assert learning_rates({"lr_schedulers": [{"_last_lr": [7.0, 7.0]}]}) == [7.0]
    assert learning_rates({"lr": 1.0, "config": {"lr": 2.0}}) == []


def test_a_rate_that_is_a_tensor_is_read() -> None:
    found = api.inspect(fixture_path("nemo/lightning_fsdp2/m-step=2.ckpt"))
    assert found.learning_rates == [0.0001]


@pytest.mark.parametrize(
    "relative",
    [
        "legacy/megatron_gpt_tp2_pp2",
        "mcore/gpt_opt_plain/ckpt",
        "nemo/nemo1_dist_tp1/model.nemo",
        "nemo/nemo1_mp_tp2/model.nemo",
        "nemo/nemo2_llama_spm/model",
    ],
)
def test_placeholders_of_extra_state_are_no_news(anyckpt: Runner, tmp_path: Path, relative: str) -> None:
    path = fixture_path(relative)
    found = anyckpt("inspect", path, "--json").json
    assert PLACEHOLDER_REASON in found["ignored"].values()
    assert "_extra_state" not in anyckpt("inspect", path).out
    done = anyckpt("convert", path, tmp_path / "out.safetensors")
    assert done.code == 0
    assert "_extra_state" not in done.out + done.err


def test_a_state_that_is_lost_is_said_once(anyckpt: Runner, tmp_path: Path) -> None:
    path = fixture_path("mcore/torchdist_plain_w1/ckpt")
    assert anyckpt("inspect", path).out.count("_extra_state") == 1
    assert anyckpt("convert", path, tmp_path / "out.safetensors").out.count("_extra_state") == 1
    assert anyckpt("inspect", path, "--json").json["ignored"] == {"mod._extra_state": EXTRA_STATE_REASON}


def test_of_many_states_a_few_of_each_kind_are_read() -> None:
    read = []

    class States(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            read.append(name)
            return super().__getitem__(name)

    names = [f"layers.{i}.{kind}._extra_state" for i in range(500) for kind in ("norm", "fc1", "fc2")]
    assert not some_hold_something(States(dict.fromkeys(names)), names)
    assert len(read) == 9
    fp8 = States({name: b"scales" if "fc1" in name and 2 < int(name.split(".")[1]) < 497 else None for name in names})
    assert some_hold_something(fp8, names)
