"""Every name that a pickle calls is recorded, wherever the result goes; the judge is Python's own pickle machine."""

from __future__ import annotations

import importlib
import inspect
import io
import pickle
import struct
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyckpt.errors import AnyckptError, FormatError
from anyckpt.pickling import Calls, Global, Record, dumps, load, recording
from anyckpt.pickling.callees import kind_of
from anyckpt.pickling.reach import GETATTR

_CALL = b"cposix\nsystem\n(Vtrue\ntR"


def _asked(raw: bytes, **options: Any) -> Calls:
    with recording() as calls, suppress(AnyckptError):
        load(raw, name="t", **options)
    return calls


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x02" + _CALL + b"0N.",
        b"\x80\x02" + _CALL + b"N.",
        b"\x80\x02}(Vx\n" + _CALL + b"Vx\nK\x01u.",
        b"\x80\x02}(Vx\n" + _CALL + b"u.",
        b"\x80\x02(" + _CALL + b"1N.",
        b"(Vtrue\niposix\nsystem\n.",
        b"(cposix\nsystem\nVtrue\no.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x04\x8c\x06system\x94\x8c\x05posix\x94h\x01h\x00\x93(Vtrue\ntR0N.",
        b"\x80\x02cposix\nsystem\nq\x000h\x00(Vtrue\ntR0N.",
        b"\x80\x02cposix\nsystem\n(Vtrue\nt\x81.",
        b"\x80\x04cposix\nsystem\n(Vtrue\nt}\x92.",
        b"\x80\x02c__builtin__\ngetattr\nNN\x86R" + _CALL + b".",
        b"\x80\x02" + _CALL + b"\x82\x01.",
        b"\x80\x02\x82\x01" + _CALL + b".",
        b"\x80\x02cargparse\nNamespace\n}b" + _CALL + b".",
        b"\x80\x02]]N" + b"s" + _CALL + b".",
        b"\x80\x02" + _CALL + b"\xfe",
        b"\x80\x02" + _CALL,
        b"\x80\x04\x95\xff\xff\xff\xff\0\0\0\0" + _CALL + b".",
    ],
)
def test_a_call_is_seen_wherever_its_result_goes(raw: bytes) -> None:
    found = {callee.name: callee for callee in _asked(raw)}["posix.system"]
    assert (found.kind, found.times) == ("code", 1)
    assert found.example == "posix.system('true')"


def test_a_name_that_is_only_handed_on_is_seen() -> None:
    (found,) = _asked(b"\x80\x02cos\nsystem\n.").of_kind("code")
    assert (found.name, found.times, found.shown) == ("os.system", 0, "os.system")


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"\x80\x02c__builtin__\ngetattr\nctorch\nos\nVsystem\n\x86R(Vtrue\ntR.", "torch.os.system"),
        (b"\x80\x02cfunctools\npartial\n(cos\nsystem\nVtrue\ntR)R.", "os.system"),
        (b"\x80\x02coperator\nattrgetter\n(Vsystem\ntR(cos\nsystem\ntR.", "operator.attrgetter"),
        (b"\x80\x02c__builtin__\ngetattr\ncpathlib\nPosixPath\n(Vx\ntRVunlink\n\x86R)R.", "pathlib.PosixPath.unlink"),
        (b"\x80\x02cmap\nx\n0c__builtin__\nmap\n(cos\nsystem\n]tR.", "os.system"),
    ],
)
def test_a_call_is_seen_through_attributes_and_bound_arguments(raw: bytes, name: str) -> None:
    assert name in {callee.name for callee in _asked(raw).of_kind("code")}


def test_what_is_left_on_the_stack_does_not_matter_to_other_software_nor_here() -> None:
    assert load(b"\x80\x02K\x01K\x02.", name="t") == pickle.loads(b"\x80\x02K\x01K\x02.") == 2


def test_long_arguments_are_shortened() -> None:
    (found,) = _asked(b"\x80\x02cos\nsystem\n(X" + struct.pack("<I", 5000) + b"a" * 5000 + b"tR.").of_kind("code")
    assert found.example is not None
    assert len(found.example) < 120


def test_calls_are_counted() -> None:
    raw = b"\x80\x04" + b"cnemo.things\nThing\n)\x81" * 5 + b"ctorch\nSize\n(K\x01t\x85R" * 3 + b"N."
    assert {callee.name: callee.times for callee in _asked(raw)} == {"nemo.things.Thing": 5, "torch.Size": 3}


def test_nothing_is_recorded_unless_asked_and_a_big_pickle_is_recorded_once() -> None:
    raw = pickle.dumps([1.5] * 200_000 + [set()], 2) + b"x"
    assert load(raw, name="t")[-1] == set()
    assert {callee.name: callee.times for callee in _asked(raw)} == {"builtins.set": 1}


_JUDGED = {
    "code": """
        os.system nt.system subprocess.Popen builtins.exec builtins.__import__ builtins.compile
        torch.os.system torch.os numpy.testing._private.utils.runstring torch.hub.load cProfile.run
        torch.fx.graph_module.reduce_graph_module idlelib.pyshell.ModifiedInterpreter.runcode
        uuid._get_command_stdout collections._sys.modules enum.sys typing.get_type_hints operator.attrgetter
        io.open _io.FileIO builtins.object.__subclasses__ nemo.Thing.__globals__ pkgutil.resolve_name
        nemo.core.run torch.jit.unsupported_tensor_ops.execWrapper . types.FunctionType
        hydra.utils.instantiate logging.FileHandler pathlib.PosixPath.unlink dataclasses.make_dataclass
        cloudpickle.cloudpickle.x
        enum.bltns enum.bltns.eval operator.__builtins__ queue.__builtins__ math.__loader__ statistics.random
        pathlib.io zipfile.ZipFile gzip.GzipFile sqlite3.Connection mailbox.Maildir dbm.dumb._Database imaplib.IMAP4
        multiprocessing.Pool unittest.TestProgram tkinter.Tk threading.Thread weakref.finalize
        torch.nn.modules.module.torch.jit.CompilationUnit torch.nn.modules.os.PathLike torch._tensor.torch
        torch.distributed.checkpoint.filesystem.pickle.Unpickler numpy.random.mtrand.__builtins__ pandas.HDFStore
        lightning.pytorch.cli.LightningCLI torch.nn.modules.linear.Linear.__call__
    """,
    "function": """
        torch._C._nn.gelu mine.make __main__.make
    """,
    "class": """
        mine.Config __main__.Net builtins.ValueError torchvision.datasets.MNIST
    """,
    "known": """
        __torch__.Net torch.distributed.remote_device._remote_device
        torch._utils._rebuild_tensor_v2 torch.FloatStorage torch.bfloat16 collections.OrderedDict
        numpy.core.multiarray._reconstruct numpy.dtype numpy._core.multiarray.scalar
        numpy.random._pickle.__randomstate_ctor omegaconf.dictconfig.DictConfig argparse.Namespace
        torch.nn.ReLU torch.nn.modules.linear.Linear megatron.core.enums.ModelType pathlib._local.PosixPath
        torch.jit._pickle.restore_type_tag torch.jit._pickle.build_intlist
        csv.Dialect datetime.datetime threading.Lock zoneinfo.ZoneInfo._unpickle weakref.ref _thread.RLock
        megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan numpy.random._pickle.__bit_generator_ctor
        numpy.random.mtrand.RandomState torchvision.models.resnet.ResNet collections.deque
        builtins.getattr torch.optim.adamw.AdamW torch.distributed.tensor.placement_types.Shard
        transformers.training_args.OptimizerNames
    """,
}


@pytest.mark.parametrize(
    ("name", "kind"), [("", "code"), *((name, kind) for kind, names in _JUDGED.items() for name in names.split())]
)
def test_names_are_judged(name: str, kind: str) -> None:
    assert kind_of(name) == kind


_HARMLESS_MODULES = [
    "abc", "array", "ast", "calendar", "cmath", "collections", "collections.abc", "contextlib", "contextvars",
    "copyreg", "csv", "dataclasses", "datetime", "decimal", "difflib", "enum", "errno", "fractions", "functools",
    "graphlib", "inspect", "io", "ipaddress", "itertools", "json", "logging", "math", "numbers", "operator",
    "pathlib", "pprint", "queue", "random", "re", "signal", "statistics", "string", "textwrap", "threading", "time",
    "traceback", "types", "typing", "uuid", "warnings", "weakref",
]  # fmt: skip


@pytest.mark.parametrize("module", _HARMLESS_MODULES)
def test_no_name_of_a_harmless_module_leads_on(module: str) -> None:
    """Nor to another module, nor to what every module has."""
    found = importlib.import_module(module)
    for name in dir(found):
        if inspect.ismodule(getattr(found, name)) or (name.startswith("__") and module not in ("copyreg", "numpy")):
            assert kind_of(f"{module}.{name}") == "code", name


# -- functions that a pickle computes --------------------------------------------------------------------------------

_OWNER = Global("collections", "Counter")  # harmless by its name; here a stand-in that has a function ``run``


def _function(draw: st.DrawFn) -> Any:
    """What gives the owner's function ``run``, by every way that there is."""
    ways: list[Any] = [
        Record(GETATTR, (_OWNER, "run")),
        Global("collections", "Counter.run"),
        Record(Record(Global("functools", "partial"), (GETATTR, _OWNER)), ("run",)),
        Record(Record(Global("functools", "partial"), (GETATTR,)), (_OWNER, "run")),
        Record(Global("functools", "reduce"), (GETATTR, ["run"], _OWNER)),
        _first(Record(Global("builtins", "map"), (GETATTR, [_OWNER], ["run"]))),
        _first(Record(Global("itertools", "starmap"), (GETATTR, [(_OWNER, "run")]))),
        Record(Record(Global("operator", "getitem"), ([GETATTR], 0)), (_OWNER, "run")),
        Record(Record(Global("operator", "getitem"), ({"x": GETATTR}, "x")), (_OWNER, "run")),
        Record(GETATTR, (_OWNER, Record(Global("operator", "concat"), ("ru", "n")))),
    ]
    found = draw(st.sampled_from(ways))
    for _ in range(draw(st.integers(0, 3))):
        wrapped: list[Any] = [
            Record(Global("functools", "partial"), (found,)),
            Record(Global("operator", "getitem"), ({"k": found}, "k")),
            _first([found]),
            Record(Global("functools", "reduce"), (Global("operator", "getitem"), [0], [found])),
        ]
        found = draw(st.sampled_from(wrapped))
    return found


def _first(items: Any) -> Record:
    return Record(Global("operator", "getitem"), (Record(Global("builtins", "list"), (items,)), 0))


@st.composite
def _reaching(draw: st.DrawFn) -> bytes:
    found = _function(draw)
    calls: list[Any] = [
        Record(found, ("x",)),
        _first(Record(Global("builtins", "map"), (found, ["x"]))),
        Record(Global("functools", "reduce"), (found, ["x", "y"])),
        Record(Global("builtins", "list"), (Record(Global("itertools", "accumulate"), (["x", "y"], found)),)),
        Record(Global("operator", "getitem"), (Record(Global("collections", "defaultdict"), (found,)), "x")),
    ]
    raw = dumps(draw(st.sampled_from(calls)), name="t")
    return raw[:-1] + b"0N." if draw(st.booleans()) else raw


@settings(max_examples=300, deadline=None)
@given(_reaching())
def test_a_function_that_is_computed_is_told(raw: bytes) -> None:
    ran: list[Any] = []

    class Owner:
        @staticmethod
        def run(*args: Any) -> Any:
            ran.append(args)
            return args

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name.partition(".")[0]) == ("collections", "Counter"):
                return Owner.run if "." in name else Owner
            return super().find_class(module, name)

    Reader(io.BytesIO(raw)).load()
    assert ran
    assert _asked(raw).of_kind("code")


# -- against Python's own machine ----------------------------------------------------------------------------------


class _Dummy:
    """Stands in for whatever a pickle names: being called is noted, and everything else is allowed."""

    def __init__(self, name: str, called: list[str]) -> None:
        self.name = name
        self.called = called
        self.__dict__["__new__"] = lambda cls, *args, **kwargs: self(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> _Dummy:
        self.called.append(self.name)
        return _Dummy(self.name, self.called)

    def __setstate__(self, state: object) -> None: ...
    def __setitem__(self, key: object, value: object) -> None: ...
    def append(self, value: object) -> None: ...
    def extend(self, values: object) -> None: ...
    def add(self, value: object) -> None: ...


class _Real(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Python's own machine, the one in Python, with dummies for names."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw))
        self.called: list[str] = []

    def find_class(self, module: str, name: str) -> Any:
        return _Dummy(f"{module}.{name}", self.called)

    def get_extension(self, code: int) -> None:
        self.append(_Dummy(f"copyreg.extension code {code}", self.called))

    def persistent_load(self, identifier: object) -> Any:
        return None


_NAMES = ("posix.system", "mine.make", "collections.OrderedDict", "builtins.set", "torch.Size", "mine.Thing")


def _named(name: str) -> bytes:
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


_PUSHES = [
    b"N", b"K\x01", b"\x88", b")", b"}", b"]", b"\x8f", b"(", b"(", b"Va\n", b"\x8c\x05posix", b"\x8c\x06system",
    b"G\0\0\0\0\0\0\0\0", b"I1\n", b"S'b'\n", b"C\x01x", b"\x8a\x01\x05", b"\x82\x07", b"Px\n",
    *map(_named, _NAMES),
]  # fmt: skip
_WHOLE = [_named(name) + call for name in _NAMES for call in (b")R", b"(K\x01tR", b"]\x85R", b"}}\x92", b")\x81")]
_OPERATIONS = [
    b"R", b"\x81", b"\x92", b"o", b"imine\nmake\n", b"b", b"a", b"e", b"s", b"u", b"\x90", b"\x91", b"\x85", b"\x86",
    b"\x87", b"t", b"0", b"0", b"1", b"2", b"l", b"d", b"\x94", b"q\0", b"q\x01", b"h\0", b"h\x01", b"p2\n", b"g2\n",
    b"j\0\0\0\0", b"r\0\0\0\0", b"\x93", b"Q", b"\x97",
]  # fmt: skip


@st.composite
def _programs(draw: st.DrawFn) -> bytes:
    """Programs that mostly keep their stack filled, so that real calls are made all over them."""
    pushes = st.sampled_from(_PUSHES)
    steps = draw(
        st.lists(
            st.one_of(pushes, st.sampled_from(_WHOLE), st.sampled_from(_OPERATIONS), st.sampled_from(_OPERATIONS)),
            min_size=3,
            max_size=25,
        )
    )
    filled = draw(st.lists(pushes, max_size=6))
    protocol = draw(st.sampled_from([b"", b"\x80\x03", b"\x80\x04"]))
    return protocol + b"".join(filled + steps) + draw(st.sampled_from([b".", b"N.", b""]))


@settings(max_examples=500, deadline=None)
@given(_programs())
def test_whatever_python_would_call_is_recorded(raw: bytes) -> None:
    real = _Real(raw)
    with suppress(Exception):
        real.load()
    recorded = {callee.name: callee.times for callee in _asked(raw, persistent_load=lambda _: None)}
    assert set(real.called) <= set(recorded)
    assert all(recorded[name] for name in real.called)


def test_the_judge_sees_a_call() -> None:
    real = _Real(_CALL + b"0N.")
    assert (real.load(), real.called) == (None, ["posix.system"])


def test_refusals_stay_typed_errors() -> None:
    with recording(), pytest.raises(FormatError):
        load(_CALL, name="t")
