"""Models restored from what NeMo wrote and written as NeMo writes them; what is hostile does nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support import expected_of, fixture_path
from tests.training.ranks import on_ranks

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import anyckpt  # noqa: E402
from anyckpt.torch import (  # noqa: E402
    Fitted,
    Restorable,
    Settings,
    StateMismatchError,
    initialise,
    perception_settings,
    register_class,
)
from anyckpt.torch.archive import open_archive  # noqa: E402
from anyckpt.torch.settings import resolved  # noqa: E402

pytestmark = pytest.mark.peer

TOYS = ("nemo1_basic_v2_5_3", "nemo1_basic_v3_0_0")


@register_class
class ToyChild(Restorable, nn.Module):
    """As the model that the fixtures were made with."""

    def __init__(self, cfg: Any, trainer: Any = None) -> None:
        super().__init__(cfg, trainer)
        self.lin = nn.Linear(self.cfg.dim, self.cfg.dim)
        self.vocab_file = self.register_artifact("vocab_file", self.cfg.get("vocab_file"))


class ToyParent(Restorable, nn.Module):
    """As the model that the fixtures were made with."""

    def __init__(self, cfg: Any, trainer: Any = None) -> None:
        super().__init__(cfg, trainer)
        dim, vocab = self.cfg.dim, self.cfg.vocab
        self.emb = nn.Embedding(vocab, dim)
        self.enc = nn.Linear(dim, dim)
        self.bn = nn.BatchNorm1d(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.emb.weight
        self.bf16_param = nn.Parameter(torch.zeros(3, dim, dtype=torch.bfloat16))
        self.tokenizer = self.register_artifact("tokenizer.model", self.cfg.tokenizer.model)
        self.vocab = self.register_artifact("tokenizer.vocab", self.cfg.tokenizer.vocab)
        self.register_artifact("extra.optional", self.cfg.extra.optional)
        self.register_nemo_submodule("child_model", "child", ToyChild(self.cfg.child))


register_class(ToyParent, "tests.core.toy_models.ToyParent")
register_class(ToyChild, "tests.core.toy_models.ToyChild")


class Small(Restorable, nn.Module):
    """The smallest that has a configuration."""

    def __init__(self, cfg: Any, trainer: Any = None) -> None:
        super().__init__(cfg, trainer)
        self.lin = nn.Linear(self.cfg.dim, 2)
        self.trainer_given = trainer


class Tree(Restorable, nn.Module):
    """Parameters of whatever names and shapes its configuration lists."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        for name, (shape, kind) in self.shapes().items():
            *modules, last = name.split(".")
            at: nn.Module = self
            for module in modules:
                if not hasattr(at, module):
                    at.add_module(module, nn.Module())
                at = getattr(at, module)
            at.register_buffer(last, torch.zeros(shape, dtype=getattr(torch, kind)))

    def shapes(self) -> dict[str, tuple[list[int], str]]:
        return {name: (facts["shape"], facts["dtype"]) for name, facts in self.cfg.tensors.items()}


class Recogniser(Tree):
    """Of the names of the fixture of a NeMo's CTC model."""

    def shapes(self) -> dict[str, tuple[list[int], str]]:
        table = expected_of("nemo/asr_ctc_conformer_v3_0_0")["tensors"]
        return {name: (facts["shape"], facts["dtype"]) for name, facts in table.items()}


register_class(Recogniser, "nemo.collections.asr.models.ctc_models.EncDecCTCModel")


class SpeechModel(Tree):
    """As the module that the SpeechLM2 fixture was made with."""

    hub_settings = {"model_type": "nemo_speechlm", "architectures": ["NeMoSpeechLMForConditionalGeneration"]}  # noqa: RUF012

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.embed_tokens = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed_tokens.weight
        self.perception = nn.Linear(4, self.cfg.perception.output_dim)

    def shapes(self) -> dict[str, tuple[list[int], str]]:
        return {}


def toy(name: str = TOYS[1]) -> Path:
    return fixture_path(f"nemo/{name}/toy.nemo")


def shown(folder: Any) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def config_of(path: Path) -> dict[str, Any]:
    with tarfile.open(path) as archive:
        member = archive.extractfile("./model_config.yaml")
        assert member is not None
        return dict(yaml.safe_load(member))


def weights_of(path: Path) -> Any:
    with tarfile.open(path) as archive:
        member = archive.extractfile("./model_weights.ckpt")
        assert member is not None
        return torch.load(io.BytesIO(member.read()), weights_only=True)


def digest(tensor: Any) -> str:
    import hashlib

    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def packed(path: Path, members: dict[str, bytes]) -> Path:
    """A ``.nemo`` of these files."""
    with tarfile.open(path, "w") as archive:
        for name, contents in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return path


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


# -- what NeMo wrote ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_restores_what_nemo_wrote(name: str) -> None:
    model = ToyParent.restore_from(toy(name), map_location="cpu")
    table = expected_of(f"nemo/{name}")["tensors"]
    state = model.state_dict()
    assert sorted(state) == sorted(table)
    assert {key: digest(value) for key, value in state.items()} == {k: facts["sha256"] for k, facts in table.items()}
    assert model.head.weight is model.emb.weight
    assert isinstance(model.child_model, ToyChild)
    assert model.restored.missing == model.restored.unexpected == ()


@pytest.mark.parametrize("name", TOYS)
def test_saving_again_gives_the_same_members_and_objects(name: str, tmp_path: Path) -> None:
    """Also where the archive that it was restored from is gone."""
    source = Path(shutil.copy(toy(name), tmp_path / "gone.nemo"))
    model = ToyParent.restore_from(source)
    source.unlink()
    model.save_to(tmp_path / "made" / "again.nemo")
    expected, config = config_of(toy(name)), config_of(tmp_path / "made" / "again.nemo")
    expected["child"]["target"] = config["child"]["target"]  # the fixture's name of it has no more than one class here
    assert config == expected
    assert list(config) == list(expected)
    with tarfile.open(toy(name)) as theirs, tarfile.open(tmp_path / "made" / "again.nemo") as ours:
        assert sorted(ours.getnames()) == sorted(theirs.getnames())
        for member in theirs.getmembers():
            if member.isfile() and "model_" not in member.name:
                left, right = theirs.extractfile(member), ours.extractfile(member.name)
                assert left is not None and right is not None
                assert left.read() == right.read()
    before, after = weights_of(toy(name)), weights_of(tmp_path / "made" / "again.nemo")
    assert type(after) is OrderedDict
    assert list(after) == list(before)
    assert after._metadata == before._metadata
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    assert after["head.weight"].data_ptr() == after["emb.weight"].data_ptr()


def test_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    ToyParent.restore_from(toy()).save_to(tmp_path / "a.nemo")
    ToyParent.restore_from(tmp_path / "a.nemo").save_to(tmp_path / "b.nemo")
    assert (tmp_path / "a.nemo").read_bytes() == (tmp_path / "b.nemo").read_bytes()


def test_a_recogniser_of_nemo_is_restored_and_saved_for_it(tmp_path: Path) -> None:
    path = fixture_path("nemo/asr_ctc_conformer_v3_0_0/ctc.nemo")
    model = Recogniser.restore_from(path)
    model.save_to(tmp_path / "ctc.nemo")
    assert config_of(tmp_path / "ctc.nemo") == config_of(path)
    before, after = weights_of(path), weights_of(tmp_path / "ctc.nemo")
    assert sorted(after) == sorted(before)
    assert all(
        torch.equal(after[key].view(torch.uint8), value.view(torch.uint8))
        for key, value in before.items()
        if value.ndim
    )


def test_artifacts_are_there_after_restoring_and_until_the_process_ends(tmp_path: Path) -> None:
    model = ToyParent.restore_from(toy(), artifacts_dir=tmp_path / "kept")
    assert Path(model.tokenizer).read_bytes() and Path(model.tokenizer).parent == tmp_path / "kept"
    assert model.cfg.tokenizer.model == model.tokenizer == model.cfg["tokenizer"]["model"]
    script = (
        f"import os, sys; sys.path[:0] = {sys.path!r}; from anyckpt.torch.archive import open_archive, put_artifacts;"
        f"files = put_artifacts(open_archive({str(toy())!r}), None); assert len(files) == 3, files;"
        "print(*files.values(), sep='\\n'); assert all(map(os.path.getsize, files.values()))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout and not any(os.path.exists(path) for path in run.stdout.split())


def test_a_new_model_takes_its_files_along(tmp_path: Path) -> None:
    (tmp_path / "my vocab.txt").write_text("a\nb\n")
    made = ToyChild({"dim": 2, "vocab_file": str(tmp_path / "my vocab.txt")})
    made.save_to(tmp_path / "child.nemo")
    named = config_of(tmp_path / "child.nemo")
    assert named["vocab_file"].startswith("nemo:") and named["vocab_file"].endswith("_my vocab.txt")
    assert list(named)[-2:] == ["target", "nemo_version"]
    (tmp_path / "my vocab.txt").unlink()
    with pytest.raises(anyckpt.OutputError, match="artifact vocab_file is no longer there"):
        made.save_to(tmp_path / "child.nemo")
    again = ToyChild.restore_from(tmp_path / "child.nemo")
    assert Path(again.vocab_file).read_text() == "a\nb\n"
    with pytest.raises(anyckpt.FormatError, match="vocab_file does not exist"):
        ToyChild({"dim": 2, "vocab_file": "nowhere.txt"})
    with pytest.raises(anyckpt.UsageError, match="register_nemo_submodule"):
        ToyChild({"dim": 2, "vocab_file": "other.nemo"})
    with pytest.warns(UserWarning, match="does not exist"):
        assert again.register_artifact("other", "nowhere.txt", verify_src_exists=False) is None


def test_what_no_constructor_asks_for_travels_along(tmp_path: Path) -> None:
    weights = saved({f"lin.{key}": value for key, value in nn.Linear(3, 2).state_dict().items()})
    members = {"model_config.yaml": b"dim: 3\nnotes: nemo:0123_n.txt\n", "model_weights.ckpt": weights}
    path = packed(tmp_path / "a.nemo", {**members, "0123_n.txt": b"note", "more.bin": b"more"})
    Small.restore_from(path).save_to(tmp_path / "b.nemo")
    with tarfile.open(tmp_path / "b.nemo") as archive:
        assert {"./0123_n.txt", "./more.bin"} <= set(archive.getnames())


def test_old_names_of_artifacts_mean_the_archive_s_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Archives of NeMo 1.0 have plain names and paths of the machine that wrote them."""
    (tmp_path / "vocab.txt").write_text("of the working directory")
    monkeypatch.chdir(tmp_path)
    weights = saved({f"lin.{key}": value for key, value in nn.Linear(2, 2).state_dict().items()})
    for value in ("vocab.txt", "/their/machine/vocab.txt"):
        text = f"dim: 2\nvocab_file: {value}\n".encode()
        members = {"model_config.yaml": text, "model_weights.ckpt": weights, "vocab.txt": b"mine"}
        assert Path(ToyChild.restore_from(packed(tmp_path / "o.nemo", members)).vocab_file).read_bytes() == b"mine"


def test_a_stored_path_is_no_file_of_this_machine(tmp_path: Path) -> None:
    """Or whatever a hostile archive names would travel in what is saved from then on."""
    (tmp_path / "secret").write_text("secret")
    weights = saved({f"lin.{key}": value for key, value in nn.Linear(2, 2).state_dict().items()})
    text = f"dim: 2\nvocab_file: {tmp_path / 'secret'}\n".encode()
    path = packed(tmp_path / "h.nemo", {"model_config.yaml": text, "model_weights.ckpt": weights})
    with pytest.raises(anyckpt.FormatError, match=r"not in the archive.*override_config_path"):
        ToyChild.restore_from(path)
    config = ToyChild.restore_from(path, return_config=True)
    with pytest.raises(anyckpt.FormatError, match="not in the archive"):
        ToyChild.restore_from(path, config)
    (tmp_path / "mine.txt").write_text("mine")
    config.vocab_file = str(tmp_path / "mine.txt")
    assert ToyChild.restore_from(path, config).vocab_file == str(tmp_path / "mine.txt")
    assert ToyChild.from_pretrained(path, vocab_file=str(tmp_path / "mine.txt")).cfg.vocab_file.endswith("mine.txt")


# -- which class --------------------------------------------------------------------------------------------------


def test_the_class_is_one_that_was_named(tmp_path: Path) -> None:
    assert type(Restorable.restore_from(toy())) is ToyParent
    with pytest.raises(anyckpt.MappingError, match=r"another class.*expected .*ToyChild, found .*ToyParent"):
        ToyChild.restore_from(toy())
    Small({"dim": 3}).save_to(tmp_path / "s.nemo")
    with pytest.raises(anyckpt.UsageError, match="not among those that may be built"):
        Restorable.restore_from(tmp_path / "s.nemo")
    assert type(Restorable.restore_from(tmp_path / "s.nemo", classes=[Small])) is Small
    with pytest.raises(anyckpt.UsageError, match="registered for another class"):
        register_class(Small, "tests.core.toy_models.ToyParent")

    class Finer(Small):
        pass

    assert type(Finer.restore_from(tmp_path / "s.nemo", classes=[Small])) is Finer
    with pytest.warns(UserWarning, match=r"holds a .*Small, which is not registered: it is built as .*Finer"):
        assert type(Finer.restore_from(tmp_path / "s.nemo")) is Finer


def test_a_target_is_never_imported(tmp_path: Path) -> None:
    (tmp_path / "harmful.py").write_text("raise SystemExit('imported')\n")
    sys.path.insert(0, str(tmp_path))
    try:
        weights = saved({f"lin.{key}": value for key, value in nn.Linear(3, 2).state_dict().items()})
        text = b"dim: 3\ntarget: harmful.Model\n_target_: harmful.Model\n"
        path = packed(tmp_path / "h.nemo", {"model_config.yaml": text, "model_weights.ckpt": weights})
        with pytest.raises(anyckpt.UsageError, match="found harmful"):
            Restorable.restore_from(path)
        with pytest.warns(UserWarning, match=r"harmful\.Model"):
            Small.restore_from(path)
    finally:
        sys.path.remove(str(tmp_path))
    assert "harmful" not in sys.modules


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    good = {f"lin.{key}": value for key, value in nn.Linear(3, 2).state_dict().items()}
    config = b"dim: 3\n"
    states: list[bytes] = [saved({**good, "lin._extra_state": Evil(mark)}), pickle.dumps(Evil(mark))]
    inside = io.BytesIO()
    with zipfile.ZipFile(inside, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Evil(mark)))
        file.writestr("archive/version", "3\n")
    for contents in (*states, inside.getvalue()):
        path = packed(tmp_path / "e.nemo", {"model_config.yaml": config, "model_weights.ckpt": contents})
        with pytest.raises(anyckpt.AnyckptError):
            Small.restore_from(path)
    for hostile in (b"!!python/object/apply:os.system ['touch executed']", b"a: &x [*x]"):
        path = packed(tmp_path / "y.nemo", {"model_config.yaml": hostile, "model_weights.ckpt": saved(good)})
        with pytest.raises(anyckpt.AnyckptError):
            Small.restore_from(path)
    assert not mark.exists()


def test_members_that_lead_out_are_refused(tmp_path: Path) -> None:
    good = saved({f"lin.{key}": value for key, value in nn.Linear(3, 2).state_dict().items()})
    path = packed(
        tmp_path / "o.nemo", {"model_config.yaml": b"dim: 3\n", "model_weights.ckpt": good, "../../out.txt": b"out"}
    )
    with pytest.raises(anyckpt.UnsafeError):
        Small.restore_from(path)
    packed(
        tmp_path / "n.nemo",
        {"model_config.yaml": b"dim: 3\n", "model_weights.ckpt": saved({"/tmp/x.y": torch.ones(1)})},
    )
    with pytest.raises(anyckpt.UnsafeError):
        Restorable.extract_state_dict_from(tmp_path / "n.nemo", tmp_path / "parts", split_by_module=True)


# -- the weights --------------------------------------------------------------------------------------------------


def test_every_name_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    model = ToyParent.restore_from(toy())
    state = dict(model.state_dict())
    state["enc2.weight"] = state.pop("enc.weight")
    state["odd"] = torch.ones(1)
    state["bn.bias"] = torch.ones(7)
    state["child_model.lin.bias"] = torch.ones(5)
    members = {"model_config.yaml": yaml.safe_dump(config_of(toy())).encode(), "model_weights.ckpt": saved(state)}
    with tarfile.open(toy()) as archive:
        for member in archive.getmembers():
            if member.isfile() and "model_" not in member.name:
                found = archive.extractfile(member)
                assert found is not None
                members[member.name.removeprefix("./")] = found.read()
    with pytest.raises(StateMismatchError, match=r"enc\.weight.*enc2\.weight.*bn\.bias \[7\] for \[4\]") as caught:
        ToyParent.restore_from(packed(tmp_path / "w.nemo", members))
    fitted = caught.value.fitted
    assert fitted.missing == ("enc.weight",)
    assert set(fitted.unexpected) == {"enc2.weight", "odd"}
    assert dict(fitted.misshaped) == {"bn.bias": ((7,), (4,)), "child_model.lin.bias": ((5,), (4,))}
    with pytest.raises(StateMismatchError, match="another shape"):
        ToyParent.restore_from(tmp_path / "w.nemo", strict=False)
    state["bn.bias"], state["child_model.lin.bias"] = torch.ones(4), torch.ones(4)
    members["model_weights.ckpt"] = saved(state)
    loose = ToyParent.restore_from(packed(tmp_path / "w.nemo", members), strict=False)
    assert loose.restored.missing == ("enc.weight",)
    assert torch.equal(loose.bn.bias, torch.ones(4))


def test_hooks_that_rename_keys_have_their_say(tmp_path: Path) -> None:
    class Hooked(Small):
        def __init__(self, cfg: Any, trainer: Any = None) -> None:
            super().__init__(cfg, trainer)
            self.register_load_state_dict_pre_hook(self.renamed)

        @staticmethod
        def renamed(module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
            for name in [name for name in state if name.startswith(f"{prefix}old.")]:
                state[name.replace("old.", "lin.")] = state.pop(name)

    old = {f"old.{key}": torch.full_like(value, 2) for key, value in nn.Linear(3, 2).state_dict().items()}
    path = packed(tmp_path / "h.nemo", {"model_config.yaml": b"dim: 3\n", "model_weights.ckpt": saved(old)})
    assert Hooked.restore_from(path).lin.bias.tolist() == [2, 2]
    path = packed(
        tmp_path / "i.nemo", {"model_config.yaml": b"dim: 3\n", "model_weights.ckpt": saved({"odd.x": old["old.bias"]})}
    )
    with pytest.raises(StateMismatchError, match=r"lin\.bias.*odd\.x"):
        Hooked.restore_from(path)


def test_weights_are_mapped_and_a_model_of_the_meta_device_is_them(tmp_path: Path) -> None:
    model = Small({"dim": 1 << 16})
    model.save_to(tmp_path / "s.nemo")
    size = (tmp_path / "s.nemo").stat().st_size
    state = open_archive(tmp_path / "s.nemo").state()
    assert state["lin.weight"].untyped_storage().nbytes() == size
    with torch.device("meta"):
        mapped = Small.restore_from(tmp_path / "s.nemo")
    assert mapped.lin.weight.untyped_storage().nbytes() == size
    assert isinstance(mapped.lin.weight, nn.Parameter)
    assert torch.equal(mapped.lin.weight, model.lin.weight)
    before = (tmp_path / "s.nemo").read_bytes()
    with torch.no_grad():
        mapped.lin.weight.add_(1)
    assert (tmp_path / "s.nemo").read_bytes() == before
    mapped.save_to(tmp_path / "s.nemo")  # onto the file that it is
    assert torch.equal(Small.restore_from(tmp_path / "s.nemo").lin.weight, model.lin.weight + 1)


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    model = Small({"dim": 2})
    model.save_to(tmp_path / "s.nemo")
    before = (tmp_path / "s.nemo").read_bytes()
    model.cfg.odd = object()
    with pytest.raises(anyckpt.OutputError):
        model.save_to(tmp_path / "s.nemo")
    assert (tmp_path / "s.nemo").read_bytes() == before
    with pytest.raises(anyckpt.OutputError, match="is a folder"):
        Small({"dim": 2}).save_to(tmp_path)
    assert shown(tmp_path) == ["s.nemo"]


def test_other_layouts_of_weights_are_named() -> None:
    with pytest.raises(anyckpt.UsageError, match="flat"):
        Tree.restore_from(
            fixture_path("nemo/nemo1_dist_tp1")
            / next(name for name in os.listdir(fixture_path("nemo/nemo1_dist_tp1")) if name.endswith(".nemo")),
            override_config_path={"tensors": {}},
        )


def test_the_state_dict_alone_is_extracted(tmp_path: Path) -> None:
    expected = weights_of(toy())
    found = Restorable.extract_state_dict_from(toy(), tmp_path / "whole")
    whole = torch.load(tmp_path / "whole" / "model_weights.ckpt", weights_only=True)
    assert list(found) == list(whole) == list(expected)
    assert all(torch.equal(whole[key], value) for key, value in expected.items())
    Restorable.extract_state_dict_from(toy(), tmp_path / "parts", split_by_module=True)
    assert shown(tmp_path / "parts") == [
        f"{name}.ckpt" for name in ("bf16_param", "bn", "child_model", "emb", "enc", "head")
    ]
    part = torch.load(tmp_path / "parts" / "child_model.ckpt", weights_only=True)
    assert sorted(part) == ["lin.bias", "lin.weight"]


# -- the configuration --------------------------------------------------------------------------------------------


def test_the_configuration_can_be_had_and_replaced(tmp_path: Path) -> None:
    config = ToyParent.restore_from(toy(), return_config=True)
    assert config.tokenizer.model.startswith("nemo:") and config.child.dim == 4
    config.optim.lr = 5.0
    assert ToyParent.restore_from(toy(), config).cfg.optim.lr == 5.0
    config.optim.lr = "${model.extra.rate}"
    config.extra = {"rate": 6, "optional": None}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": json.loads(json.dumps(config))}))
    model = ToyParent.restore_from(toy(), override_config_path=tmp_path / "c.yaml")
    assert model.cfg.optim.lr == 6
    omegaconf = pytest.importorskip("omegaconf")
    model = ToyParent(omegaconf.OmegaConf.create(json.loads(json.dumps(model.cfg))))
    assert isinstance(model.cfg.child, Settings)
    model.cfg.extra.copied = "${optim.lr}"
    model.save_to(tmp_path / "r.nemo")
    assert config_of(tmp_path / "r.nemo")["extra"]["copied"] == 6


@pytest.mark.parametrize(
    ("text", "value"),
    [("${a.b}", 3), ("${.c}", 4), ("${..a.b}", 3), ("x${a.b}y", "x3y"), ("${a}", {"b": 3}), ("plain $x", "plain $x")],
)
def test_references_are_followed_as_omegaconf_does(text: str, value: Any) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    config = {"a": {"b": 3}, "s": {"c": 4, "r": text}}
    assert resolved(config, "it")["s"]["r"] == value
    theirs = omegaconf.OmegaConf.create(config)
    assert omegaconf.OmegaConf.to_container(theirs, resolve=True)["s"]["r"] == value


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "${nothing}", "${s.r}", "${a[0]}"])
def test_references_that_call_or_lead_nowhere_are_refused(text: str) -> None:
    with pytest.raises(anyckpt.UsageError, match=r"s\.r"):
        resolved({"a": {"b": 3}, "s": {"r": text}}, "it")


def test_a_module_of_lightning_gets_its_trainer(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(Restorable, lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, cfg: Any, trainer: Any = None) -> None:
            super().__init__(cfg, trainer)
            self.lin = nn.Linear(self.cfg.dim, 2)

    trainer = lightning.Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    Module({"dim": 2}).save_to(tmp_path / "m.nemo")
    model = Module.restore_from(tmp_path / "m.nemo", trainer=trainer, map_location="cpu")
    assert model.trainer is trainer
    Small({"dim": 2}).save_to(tmp_path / "m.nemo")
    model = Small.restore_from(tmp_path / "m.nemo", trainer=trainer)
    assert model.trainer_given is trainer


def saved_on_ranks(folder: str) -> Any:
    model = Small({"dim": 2})
    with torch.no_grad():
        model.lin.weight.fill_(torch.distributed.get_rank() + 1)
    model.save_to(f"{folder}/s.nemo")
    model.save_pretrained(f"{folder}/hub")
    found = Small.restore_from(f"{folder}/s.nemo").lin.weight[0, 0].item()
    try:
        model.save_to(f"{folder}/file/s.nemo")
    except anyckpt.AnyckptError as error:
        return found, str(error)
    return found, ""


def test_the_first_rank_writes_and_all_learn_of_its_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    found = on_ranks(2, saved_on_ranks, str(tmp_path))
    assert [value for value, _ in found] == [1, 1]
    assert all("s.nemo" in told for _, told in found)


def test_names_stay_what_they_are_whatever_is_imported() -> None:
    """A module of the same name would hide them."""
    import importlib
    import pkgutil

    import anyckpt.torch

    for inner in pkgutil.walk_packages(anyckpt.torch.__path__, "anyckpt.torch."):
        if not inner.name.startswith("anyckpt.torch.megatron"):
            importlib.import_module(inner.name)
    for package in (anyckpt.torch, anyckpt.torch.lightning):
        assert all(callable(getattr(package, name)) for name in package.__all__ if name not in ("dcp", "megatron"))


# -- folders for the hub ------------------------------------------------------------------------------------------


def test_speech_models_of_nemo_are_opened_and_written(tmp_path: Path) -> None:
    theirs = fixture_path("nemo/speechlm2_v3_0_0/model")
    expected = expected_of("nemo/speechlm2_v3_0_0")
    model = SpeechModel.from_pretrained(theirs)
    assert model.cfg.pretrained_weights is False and not model.training
    assert model.head.weight is model.embed_tokens.weight
    assert {name: digest(model.state_dict()[name]) for name in expected["tensors"]} == {
        name: facts["sha256"] for name, facts in expected["tensors"].items()
    }
    del model.cfg["pretrained_weights"]
    model.save_pretrained(tmp_path / "ours")
    assert set(shown(tmp_path / "ours")) == {entry["path"] for entry in expected["tree"]}
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == expected["config"]
    from safetensors import safe_open
    from safetensors.torch import load_model

    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(expected["tensors"])
        assert file.metadata().items() >= expected["safetensors_metadata"].items()
    fresh = SpeechModel(model.cfg)
    assert load_model(fresh, str(tmp_path / "ours" / "model.safetensors")) == (set(), [])
    assert torch.equal(fresh.perception.weight, model.perception.weight)


def test_what_lies_in_a_speech_model_s_folder_is_used(tmp_path: Path) -> None:
    """As NeMo 3.0 does: the tokenizer, and the configuration of the language model."""
    folder = Path(shutil.copytree(fixture_path("nemo/speechlm2_v3_0_0/model"), tmp_path / "model"))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "llm_backbone").mkdir()
    (folder / "llm_backbone" / "config.json").write_text("{}")
    model = SpeechModel.from_pretrained(folder)
    assert model.cfg.tokenizer_path == str(folder)
    assert model.cfg.pretrained_llm == str(folder / "llm_backbone")


def test_a_folder_takes_artifacts_along_and_is_written_over(tmp_path: Path) -> None:
    model = ToyParent.restore_from(toy())
    model.save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "README.md").write_text("mine")
    with torch.no_grad():
        model.enc.bias.fill_(3)
    model.save_pretrained(tmp_path / "hub")
    assert (tmp_path / "hub" / "README.md").read_text() == "mine"
    moved = (tmp_path / "hub").rename(tmp_path / "moved")
    again = ToyParent.from_pretrained(moved, extra={"optional": None, "more": 1})
    assert again.enc.bias.tolist() == [3, 3, 3, 3] and again.cfg.extra.more == 1
    assert Path(again.child_model.vocab_file).parent == moved
    assert again.head.weight is again.emb.weight
    again.save_to(tmp_path / "m.nemo")
    assert ToyParent.from_pretrained(tmp_path / "m.nemo").enc.bias.tolist() == [3, 3, 3, 3]


def test_the_hub_s_own_mixin_opens_a_folder(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Theirs(nn.Module, hub.PyTorchModelHubMixin):  # type: ignore[misc, name-defined]
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.lin = nn.Linear(dim, 2)

    model = Small({"dim": 3})
    model.save_pretrained(tmp_path / "ours")
    theirs = Theirs.from_pretrained(str(tmp_path / "ours"), strict=True)
    assert torch.equal(theirs.lin.weight, model.lin.weight)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(Small.from_pretrained(tmp_path / "theirs").lin.weight, model.lin.weight)


class FakeHub:
    """What is asked of huggingface_hub."""

    def __init__(self, answer: str = "") -> None:
        self.asked: list[tuple[str, Any]] = []
        self.answer = answer

    def HfApi(self, token: Any = None) -> FakeHub:
        self.asked.append(("token", token))
        return self

    def create_repo(self, repo_id: str, private: Any, exist_ok: bool) -> Any:
        self.asked.append(("repo", (repo_id, private, exist_ok)))
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id: str, folder_path: str, **options: Any) -> str:
        self.asked.append(("files", shown(folder_path)))
        self.asked.append(("options", options))
        return "commit"

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.asked.append((repo_id, options["revision"]))
        if not self.answer:
            raise OSError("no network")
        return self.answer


def test_models_go_to_the_hub_and_come_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub: Any = FakeHub(str(tmp_path / "cache"))
    library = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(library, "HfApi", hub.HfApi)
    monkeypatch.setattr(library, "snapshot_download", hub.snapshot_download)
    model = Small({"dim": 2})
    assert model.push_to_hub("me/it", private=True, token="t", commit_message="first") == "commit"
    assert hub.asked == [
        ("token", "t"),
        ("repo", ("me/it", True, True)),
        ("files", ["README.md", "config.json", "model.safetensors"]),
        ("options", {"commit_message": "first"}),
    ]
    (tmp_path / "cache").mkdir()
    model.save_to(tmp_path / "cache" / "it.nemo")
    register_class(Small)
    try:
        assert torch.equal(Small.from_pretrained("me/it", revision="main").lin.weight, model.lin.weight)
        assert torch.equal(Small.from_pretrained("hf://me/it@v1").lin.weight, model.lin.weight)
        assert hub.asked[-2:] == [("me/it", "main"), ("me/it", "v1")]
    finally:
        from anyckpt.torch import classes

        del classes._registered[classes.class_path(Small)]
    with pytest.raises(anyckpt.FormatError, match="is not the repository of a model"):
        Small.from_pretrained("hf://me/it/model.nemo")
    hub.answer = ""
    with pytest.raises(anyckpt.FormatError, match="me/it.*no network"):
        Small.from_pretrained("me/it")
    with pytest.raises(anyckpt.FormatError, match="does not exist"):
        Small.from_pretrained("/no/such/place")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(anyckpt.MissingLibraryError, match=r"pip install 'anyckpt\[hub\]'"):
        Small.from_pretrained("me/it")
    with pytest.raises(anyckpt.MissingLibraryError, match=r"anyckpt\[hub\]"):
        model.push_to_hub("me/it")


# -- a part of a model from another model -------------------------------------------------------------------------


def perception(adjust: Callable[[dict[str, Any]], None] = lambda table: None) -> Tree:
    table = expected_of("nemo/asr_ctc_conformer_v3_0_0")["tensors"]
    kept = {name: facts for name, facts in table.items() if not name.startswith("decoder.")}
    kept["proj.weight"] = {"shape": [4, 16], "dtype": "float32"}
    adjust(kept)
    return Tree({"tensors": kept})


def test_an_encoder_is_initialised_from_another_model() -> None:
    path = fixture_path("nemo/asr_ctc_conformer_v3_0_0/ctc.nemo")
    theirs = weights_of(path)
    module = perception()
    report = initialise(module, path, may_miss=["proj.*"], may_be_left=["decoder.*"])
    assert report.missing == ("proj.weight",)
    assert all(name.startswith("decoder.") for name in report.unexpected) and report.unexpected
    assert len(report.matched) == len(theirs) - len(report.unexpected)
    for name, value in module.state_dict().items():
        if name != "proj.weight":
            assert digest(value) == digest(theirs[name]), name
    config = perception_settings(path, {"encoder": {"dropout": 0.5}, "output_dim": 8})
    assert config.encoder.dropout == 0.5 and config.encoder.d_model == 16 and config.output_dim == 8
    assert config.preprocessor.features == 16


def test_names_are_changed_by_their_beginnings() -> None:
    def nested(table: dict[str, Any]) -> None:
        for name in [name for name in table if name.startswith("encoder.")]:
            table[f"encoder_multilayer.{name}"] = table.pop(name)

    path = fixture_path("nemo/asr_ctc_conformer_v3_0_0/ctc.nemo")
    module = perception(nested)
    names = {"encoder.": "encoder_multilayer.encoder.", "decoder.": None}
    report = initialise(module, path, rename=names, may_miss=["proj.*"])
    assert report.unexpected == () and any(name.startswith("encoder_multilayer.") for name in report.matched)
    with pytest.raises(anyckpt.MappingError, match="renamed to the same"):
        initialise(module, path, rename=lambda name: "one")


def test_weights_come_from_any_checkpoint(tmp_path: Path) -> None:
    model = Small({"dim": 2})
    for to in ("safetensors", "torch", "dcp"):
        anyckpt.save(model.state_dict(), tmp_path / to, to=to)
        fresh = Small({"dim": 2})
        assert initialise(fresh, tmp_path / to).matched == ("lin.weight", "lin.bias")
        assert torch.equal(fresh.lin.weight, model.lin.weight)
    tied = SpeechModel({"perception": {"output_dim": 4}})
    assert initialise(tied, fixture_path("nemo/speechlm2_v3_0_0/model")).missing == ()
    assert initialise(Small({"dim": 2}), model.state_dict()).unexpected == ()


def test_an_encoder_that_does_not_fit_is_told_and_left_alone() -> None:
    def other(table: dict[str, Any]) -> None:
        name = next(name for name in table if name.startswith("encoder.") and name.endswith("weight"))
        table["encoder.renamed.weight"] = table.pop(name)

    module = perception(other)
    with pytest.raises(StateMismatchError, match=r"encoder\.renamed\.weight") as caught:
        initialise(
            module,
            fixture_path("nemo/asr_ctc_conformer_v3_0_0/ctc.nemo"),
            may_miss=["proj.*"],
            may_be_left=["decoder.*"],
        )
    assert isinstance(caught.value.fitted, Fitted)
    assert not any(value.any() for value in module.state_dict().values())
