"""What the names in a pickle mean: a few are built as plain data, dangerous ones are refused, all others stay names.

These tables are the whole of what a pickle can make happen. A builder takes plain data and returns plain data; it
imports nothing and calls nothing that the file chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from weightport.checkpoints.dtypes import torch_dtype
from weightport.checkpoints.pickle.numpy_arrays import ARRAY_BUILDERS
from weightport.checkpoints.pickle.records import Record, Symbol
from weightport.checkpoints.pickle.torch_tensors import TENSOR_BUILDERS
from weightport.checkpoints.pickle_budget import Budget
from weightport.checkpoints.shown import shown
from weightport.errors import CheckpointError, UnsafeCheckpointError

# What a tensor or Record takes, in plain containers.
_OBJECTS_IN_ONE = 4
_PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "cPickle": "pickle"}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Top-level modules that only an attack names: commands, files, processes, network, and loaders that would execute.
_DENIED_MODULES = _words(
    """
    _ctypes _imp _io _osx_support _pickle _posixsubprocess _socket _thread asyncio bdb cProfile cloudpickle codeop
    commands concurrent ctypes dill distutils doctest ensurepip fileinput ftplib glob http httpx idlelib imp importlib
    inspect joblib linecache marshal mmap multiprocessing nt ntpath os pdb pickle pip pkgutil popen2 posix posixpath
    pty pydoc requests runpy setuptools shelve shutil signal smtplib socket socketserver sqlite3 ssl subprocess sys
    tarfile telnetlib tempfile threading timeit unittest urllib urllib2 venv webbrowser winreg xmlrpc zipfile zipimport
    """
)
_DENIED_PREFIXES = (
    "numpy.distutils.",
    "numpy.f2py.",
    "numpy.testing.",
    "torch._dynamo.",
    "torch._inductor.",
    "torch.fx.",
    "torch.hub.",
    "torch.jit.",
    "torch.multiprocessing.",
    "torch.ops.",
    "torch.package.",
    "torch.serialization.",
    "torch.utils.cpp_extension.",
)
_DENIED_NAMES = _words(
    """
    builtins.__import__ builtins.apply builtins.breakpoint builtins.compile builtins.delattr builtins.eval
    builtins.exec builtins.execfile builtins.exit builtins.file builtins.globals builtins.help builtins.input
    builtins.locals builtins.open builtins.quit builtins.reload builtins.setattr builtins.vars
    code.InteractiveConsole code.InteractiveInterpreter code.interact
    functools.reduce io.FileIO io.open io.open_code
    numpy.fromfile numpy.genfromtxt numpy.load numpy.loadtxt numpy.memmap numpy.save
    operator.attrgetter operator.call operator.methodcaller
    platform.popen profile.run profile.runctx trace.Trace types.CodeType types.FunctionType types.LambdaType
    torch._load torch.compile torch.load torch.save torch.storage._load_from_bytes
    """
)


def find_symbol(module: str, name: str) -> Any:
    """What the pickle's global `module.name` is here: a Symbol, or an element type such as torch.float32.

    Raises UnsafeCheckpointError for a global whose only use in a pickle is to execute, open or import something.
    """
    module = _PYTHON_2_MODULES.get(module, module)
    type_name = f"{module}.{name}"
    denied = module.split(".")[0] in _DENIED_MODULES or type_name in _DENIED_NAMES
    known = type_name in BUILDERS or type_name in _KEYED_BUILDERS
    if (denied or type_name.startswith(_DENIED_PREFIXES)) and not known:
        raise unsafe(type_name)
    dtype = torch_dtype(name) if module == "torch" else None
    return Symbol(type_name) if dtype is None else dtype


def unsafe(type_name: str) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        f"asks for {shown(type_name)} to be called, which no plain checkpoint needs: unpickling this file could run "
        "commands of whoever wrote it. Nothing was executed. Get the weights from a source you trust, as safetensors "
        "if there is one."
    )


def call(function: Any, args: Any, budget: Budget) -> Any:
    """What calling `function`, a global of the pickle, with `args` gives: a builder's plain data, or a Record.

    A builder may copy what it is given, which `budget` limits; a Record only refers to it.
    """
    if not isinstance(function, Symbol):
        raise UnsafeCheckpointError(
            f"calls {shown(function)}, which is not a class or function that the pickle names. Nothing was executed."
        )
    if not isinstance(args, tuple):
        raise CheckpointError(f"calls {shown(function.type_name)} with {shown(args)} instead of a tuple of arguments.")
    budget.make(_OBJECTS_IN_ONE)
    builder, keyed = BUILDERS.get(function.type_name), _KEYED_BUILDERS.get(function.type_name)
    if builder is None and keyed is None:
        return Record(function.type_name, args)
    budget.copy(args, *args)
    try:
        return builder(*args) if builder is not None else keyed(budget, *args) if keyed is not None else None
    except (TypeError, ValueError, OverflowError, IndexError, SystemError) as error:
        raise CheckpointError(f"{function.type_name} cannot be built from its arguments ({error}).") from error


def _mapping(budget: Budget, items: Any = ()) -> dict[Any, Any]:
    pairs = items.items() if isinstance(items, dict) else _plain_items(items)
    return {budget.key(key): value for key, value in pairs}


def _default_mapping(budget: Budget, factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    return _mapping(budget, items)


def _set(budget: Budget, values: Any = ()) -> set[Any]:
    return set(map(budget.key, _plain_items(values)))


def _frozenset(budget: Budget, values: Any = ()) -> frozenset[Any]:
    return frozenset(_set(budget, values))


def _plain_items(values: Any = ()) -> Iterable[Any]:
    if not isinstance(values, (list, tuple, set, frozenset, dict, bytes, bytearray)):
        raise CheckpointError(f"a collection should be made of a list or tuple, but is made of {shown(values)}.")
    return values


def _reconstructor(budget: Budget, kind: Any, base: Any = None, state: Any = None) -> Any:
    """copyreg._reconstructor: an object of `kind`, which derives from the plain type `base`."""
    return _instance(budget, kind, () if state is None else (state,))


def _new_object(budget: Budget, kind: Any, *args: Any) -> Any:
    return _instance(budget, kind, args)


def _new_object_ex(budget: Budget, kind: Any, args: Any, options: Any) -> Any:
    budget.copy(args)
    return _instance(budget, kind, (*args, options) if options else args)


def _instance(budget: Budget, kind: Any, args: tuple[Any, ...]) -> Any:
    if isinstance(kind, Symbol) and kind.type_name.startswith("copyreg."):
        raise UnsafeCheckpointError(f"makes an object of {shown(kind.type_name)}, which is no class.")
    return call(kind, args, budget)


def _getattr(owner: Any, name: Any) -> Record:
    """Python 3.11 pickles a member of an enumeration as getattr(Class, "member"); nothing else needs getattr."""
    if isinstance(owner, Symbol) and isinstance(name, str) and name.isidentifier() and not name.startswith("_"):
        return Record(owner.type_name, (name,))
    raise unsafe("builtins.getattr")


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise CheckpointError(f"text is to be encoded as {shown(encoding)}.")
    return text.encode(encoding)


def _slice(*limits: Any) -> slice:
    if not all(limit is None or isinstance(limit, int) for limit in limits):
        raise CheckpointError(f"a slice has the limits {shown(limits)}.")
    return slice(*limits)


def _device(kind: Any = "cpu", index: Any = None) -> str:
    if not isinstance(kind, str) or not (index is None or type(index) is int):
        raise CheckpointError(f"a device is called {shown(kind)} and {shown(index)}.")
    return kind if index is None else f"{kind}:{index}"


def _layout(name: Any) -> str:
    """torch.serialization._get_layout: torch.strided and its like, by name."""
    if not isinstance(name, str):
        raise CheckpointError(f"a memory layout is called {shown(name)}.")
    return name


def _bytes(values: Any = b"", encoding: Any = None) -> bytes:
    return _encoded(values, encoding) if isinstance(values, str) else bytes(_plain_items(values))


BUILDERS: dict[str, Callable[..., Any]] = {
    **TENSOR_BUILDERS,
    **ARRAY_BUILDERS,
    "_codecs.encode": _encoded,
    "builtins.bytearray": _bytes,
    "builtins.bytes": _bytes,
    "builtins.complex": lambda real=0.0, imag=0.0: complex(real, imag),
    "builtins.getattr": _getattr,
    "builtins.list": lambda values=(): list(_plain_items(values)),
    "builtins.range": lambda *limits: range(*limits),
    "builtins.slice": _slice,
    "builtins.tuple": lambda values=(): tuple(_plain_items(values)),
    "builtins.xrange": lambda *limits: range(*limits),
    "collections.deque": lambda values=(), _=None: list(_plain_items(values)),
    "torch.Size": lambda values=(): tuple(_plain_items(values)),
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
}

# Builders of what is looked up by keys, and of whatever class the pickle names: these take the budget first.
_KEYED_BUILDERS: dict[str, Callable[..., Any]] = {
    "builtins.dict": _mapping,
    "builtins.frozenset": _frozenset,
    "builtins.set": _set,
    "collections.Counter": _mapping,
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _default_mapping,
    "copyreg.__newobj__": _new_object,
    "copyreg.__newobj_ex__": _new_object_ex,
    "copyreg._reconstructor": _reconstructor,
}
