"""What a name that a pickle asks for does when other software calls it, judged by the name alone.

Four kinds, from bad to good:

- ``code``: runs programs or code of the file's choice, reaches files or the network, or leads to what does;
- ``function``: a function of some package, which may do anything;
- ``class``: a class of some package; making an instance runs that package's own code;
- ``known``: makes data and nothing else, or is a class of a training framework that only holds settings or state.

Of Python's own library whatever is not known to be harmless is ``code``: a list of all that is harmful has never been
complete.  The facts: what ``torch.load(weights_only=True)`` of torch 2.13 allows, what picklers of Python 3.8 to 3.13,
numpy, torch, omegaconf and pandas write, and public reports of what scanners of pickles let pass.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache

KINDS = ("code", "function", "class", "known")

_DANGEROUS = frozenset(
    """
    __builtin__ asyncio bdb code codeop commands ctypes distutils doctest ftplib http httplib imp importlib marshal
    nt os pdb pickle _pickle cPickle dill cloudpickle pip platform popen2 posix profile pty pydoc requests runpy
    shelve shutil smtplib socket _socket ssl subprocess _posixsubprocess sys telnetlib tempfile timeit trace urllib
    urllib2 urllib3 venv webbrowser zipimport joblib setuptools pkg_resources httpx aiohttp paramiko pexpect
    ptyprocess fsspec test
    """.split()
)
"""Packages, with all below them, whose names run programs, load code, or reach files and the network."""

_REACHED = frozenset(
    """
    __builtins__ builtins ctypes importlib marshal os pickle posix pty runpy shutil socket subprocess sys
    """.split()
)
"""Of these, what ordinary modules import, so that a dotted name reaches it through them: ``torch.os.system``."""

_DUNDER = re.compile(r"__\w+__\Z")

_CODE = re.compile(
    r"(torch\.(load|hub|jit(?!\._pickle\.(build_\w+list|restore_type_tag)\Z)|package|compile|classes|ops"
    r"|serialization\.load|fx\.graph_module|fx\._symbolic_trace"
    r"|utils\.(cpp_extension|collect_env|bottleneck|model_zoo|_cpp_extension_versioner)|_inductor|_dynamo|_export"
    r"|distributed\.(rpc|launch|run|elastic)|multiprocessing\.spawn|testing)"
    r"|numpy\.(load|loadtxt|genfromtxt|fromfile|memmap|save\w*|f2py|testing|distutils|ctypeslib|lib\.\w*npyio\w*)"
    r"|pandas\.(read_\w+|io|eval|HDFStore|Excel(File|Writer))|pandas\.core\.computation|hydra\.utils"
    r"|transformers\.(dynamic_module_utils|agents|tools)|(lightning|pytorch_lightning)\.(\w+\.)*(LightningCLI|app)"
    r"|types\.(CodeType|FunctionType|LambdaType|ModuleType)|functools\.(cached_property|singledispatch)"
    r"|operator\.(attrgetter|methodcaller|call)|_operator\.(attrgetter|methodcaller|call)"
    r"|logging\.(config|handlers|FileHandler)|io\.(open|FileIO|open_code|TextIOWrapper)"
    r"|_io\.(open|FileIO|open_code|TextIOWrapper)|copyreg\.(add_extension|pickle)|copyreg\.extension code \d+)"
    r"(\.|\Z)"
)
_NAMES_OF_DOERS = frozenset(
    """
    __import__ call check_call check_output download eval exec execfile execute get_method import_module instantiate
    load load_module loads myeval popen run run_cmd run_command runstring shell spawn system unpickle urlopen
    urlretrieve Popen
    """.split()
)
"""Last parts of names that say what they do, in whatever package."""

_HARMLESS_BUILTINS = frozenset(
    """
    Ellipsis NotImplemented abs all any bool bytearray bytes complex dict enumerate filter float frozenset getattr
    hash id int iter len list map max min object pow print property range repr reversed round set slice sorted str
    sum tuple type zip
    """.split()
)
"""What these are given to call is a name too, and judged by itself."""

_KNOWN = re.compile(
    r"(_codecs\.encode|abc\.(ABC|ABCMeta|abstractmethod)|argparse\.Namespace|array\.(array|_array_reconstructor)"
    r"|ast\.[A-Z]\w*|calendar\.[A-Z]\w*|cmath\.[a-z]\w*|_collections_abc\.[A-Z]\w*"
    r"|_?collections\.(abc\.)?([A-Z]\w*|deque|_deque_iterator|defaultdict|namedtuple)"
    r"|contextlib\.[A-Z]\w*|_?contextvars\.[A-Z]\w*"
    r"|copyreg\.(_reconstructor|__newobj__|__newobj_ex__)|csv\.[A-Z]\w*|dataclasses\._*[A-Z]\w*"
    r"|_?datetime\.(date|datetime|time|timedelta|timezone|tzinfo|UTC)|_?(py)?decimal\.[A-Z]\w*|difflib\.[A-Z]\w*"
    r"|enum\.([A-Z]\w*|auto)|errno\.E\w+|fractions\.[A-Z]\w*|_?functools\.(partial|reduce|_lru_cache_wrapper)"
    r"|graphlib\.[A-Z]\w*|_?io\.(BytesIO|StringIO)|inspect\.(_empty|Parameter|Signature)|ipaddress\.[A-Z]\w*"
    r"|itertools\.[a-z]\w*|json\.(JSONEncoder|JSONDecoder|JSONDecodeError)"
    r"|logging\.(Logger|RootLogger|getLogger|StreamHandler|Formatter|Filter|LogRecord|NullHandler)|_?random\.Random"
    r"|math\.[a-z]\w*|numbers\.[A-Z]\w*|_?operator\.[a-z]\w*|pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path"
    r"|pprint\.[A-Z]\w*|_?queue\.[A-Z]\w*|re\.(_compile|Pattern|RegexFlag)|signal\.Signals|statistics\.[A-Z]\w*"
    r"|string\.[A-Z]\w*|textwrap\.[A-Z]\w*"
    r"|_?thread(ing)?\.(_?R?[Ll]ock(Type)?|Event|Condition|(Bounded)?Semaphore|Barrier)"
    r"|time\.struct_time|traceback\.[A-Z]\w*|types\.(SimpleNamespace|MappingProxyType|GenericAlias|UnionType|NoneType"
    r"|EllipsisType)|typing\.[A-Z]\w*|uuid\.(UUID|SafeUUID)|warnings\.[A-Z]\w*"
    r"|_?weakref\.(ref|proxy|ReferenceType|ProxyType|Weak\w+)|xml\.etree\.ElementTree\.Element"
    r"|zoneinfo\.(_\w+\.)?ZoneInfo(\._unpickle)?"
    r"|torch\._utils\._rebuild_\w+|torch\._?tensor\._rebuild_from_type(_v2)?|torch\.storage\.\w*Storage"
    r"|torch\.storage\._load_from_bytes|torch\.(\w*(Storage|Tensor)|Size|device|dtype|Generator|memory_format|layout)"
    r"|torch\.(float|bfloat|complex|uint|int|quint|qint|bits|double|half|bool|long|short|cfloat|cdouble)\w*"
    r"|torch\.(per_\w+_(affine|symmetric)\w*|strided|sparse_\w+|contiguous_format|channels_last\w*|preserve_format)"
    r"|torch\.(cuda|sparse|xpu|hpu|npu)\.\w*(Storage|Tensor)|torch\.serialization\._get_layout"
    r"|torch\._tensor\.[A-Z]\w*|torch\.nn\.parameter\.[A-Z]\w*|torch\.autograd\.variable\.Variable"
    r"|torch\.distributed\.remote_device\._remote_device|torch\.jit\._pickle\.(build_\w+list|restore_type_tag)"
    r"|numpy\.(_?core\.multiarray\.(_reconstruct|scalar)|_?core\.numeric\._frombuffer|_?core\._internal\.[a-z_]\w*)"
    r"|numpy\.(ndarray|dtype)|numpy\.dtypes\.[A-Z]\w*"
    r"|numpy\.(bool_?|u?int\w*|float\w*|complex\w*|str_|bytes_|object_|void|datetime64|timedelta64|longlong|generic)"
    r"|numpy\.random\._(pickle|generator|mtrand|\w+)\.__\w+_ctor|numpy\.random\.mtrand\.__\w+_ctor"
    r"|numpy\.ma\.(core\.)?(_mareconstruct|MaskedArray)"
    r"|pandas\._libs\.[\w.]*_unpickle_\w+|pandas\.core\.indexes\.base\._new_Index)\Z"
)
_KNOWN_CLASSES = re.compile(
    r"(torch\.distributed\.(_?tensor|_?shard|checkpoint|device_mesh|_functional_collectives)\.[\w.]*[A-Z]\w*"
    r"|torch\.(nn|optim|ao|quantization|amp|distributions)\.([\w]+\.)*_*[A-Z]\w*|numpy\.random\.[\w.]*[A-Z]\w*"
    r"|pandas\.[\w.]*[A-Z]\w*"
    r"|(megatron|nemo|lightning|pytorch_lightning|lightning_fabric|lightning_utilities|omegaconf|transformers|peft"
    r"|accelerate|deepspeed|transformer_engine|apex|trl|datasets|tokenizers|torchmetrics|sentence_transformers|timm"
    r"|fairseq|diffusers|(torchvision|torchaudio)(?!\.datasets\.))\.([\w]+\.)*_*[A-Z]\w*)\Z"
)
"""Classes of frameworks; a name that leads through another package is none of them."""
_CLASS = re.compile(r"_*[A-Z]")


@lru_cache(maxsize=4096)
def kind_of(name: str) -> str:
    """The kind of a dotted name, module and all; names from a hostile file may hold anything."""
    parts = name.split(".")
    top, last = parts[0], parts[-1]
    if top == "__torch__":  # a class of a TorchScript archive's own program, which Python never runs
        return "known"
    if top == "builtins" and len(parts) == 2:
        if last in _HARMLESS_BUILTINS:
            return "known"
        return "class" if _CLASS.match(last) and last.isidentifier() else "code"
    if _CODE.match(name) or top in _DANGEROUS or last.lstrip("_") in _REACHED or last in _NAMES_OF_DOERS:
        return "code"
    if _KNOWN.match(name):
        # What a module has of every object, such as its __builtins__, is none of its names.
        return "code" if _DUNDER.match(last) and top not in ("copyreg", "numpy") else "known"
    if not _REACHED.isdisjoint(part.lstrip("_") for part in parts) or any(map(_DUNDER.match, parts[1:])):
        return "code"
    if len(parts) < 2 or not all(part.isidentifier() for part in parts) or _leads_elsewhere(parts):
        return "code"
    if _KNOWN_CLASSES.match(name):
        return "known"
    if top in sys.stdlib_module_names:
        return "code"
    return "class" if _CLASS.match(last) else "function"


def _leads_elsewhere(parts: list[str]) -> bool:
    """Whether a name reaches code of another package through a module that imports it: ``torch.nn.torch.jit.load``."""
    inner = (place for place, part in enumerate(parts) if place and part in ("numpy", "pandas", "torch"))
    return any(kind_of(".".join(parts[place:])) == "code" for place in inner)
