"""What each opcode of a pickle does to the machine: protocols 0 to 5, as in Lib/pickle.py, over plain containers."""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Callable
from typing import Any

from weightport.checkpoints.pickle.machine import Machine
from weightport.checkpoints.pickle.numpy_arrays import Pending
from weightport.checkpoints.pickle.records import Record
from weightport.checkpoints.pickle.symbols import unsafe
from weightport.checkpoints.shown import shown
from weightport.checkpoints.types import TensorRef
from weightport.errors import CheckpointError

# Whole numbers of at most this many bytes: random generators' states need 16; Python prints no more than 4,300 digits.
_MAX_INTEGER = 1024

Handler = Callable[[Machine], None]
HANDLERS: dict[int, Handler] = {}


def _opcode(*codes: bytes) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update({code[0]: handler for code in codes})
        return handler

    return register


def _constant(code: bytes, make: Callable[[], Any]) -> None:
    HANDLERS[code[0]] = lambda machine: machine.push(make())


def _counted(code: bytes, form: str, convert: Callable[[bytes], Any]) -> None:
    """An opcode that is followed by a length in `form` and that many bytes."""
    HANDLERS[code[0]] = lambda machine: machine.push(convert(machine.take(machine.number(form))))


def _integer(data: bytes) -> int:
    if len(data) > _MAX_INTEGER:
        raise CheckpointError(f"holds a whole number of {len(data)} bytes.")
    return int.from_bytes(data, "little", signed=True)


def _text(data: bytes) -> str:
    # Text that is not UTF-8 (file names of other encodings) stays printable instead of failing later.
    return data.decode("utf-8", "backslashreplace")


def _python_2_text(data: bytes) -> str | bytes:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def _parsed(convert: Callable[[bytes], Any], text: bytes) -> Any:
    try:
        return convert(text)
    except (ValueError, SyntaxError) as error:
        raise CheckpointError(f"holds {shown(text)} where a number or quoted text should be.") from error


for _code, _value in ((pickle.NONE, None), (pickle.NEWTRUE, True), (pickle.NEWFALSE, False), (pickle.EMPTY_TUPLE, ())):
    _constant(_code, lambda value=_value: value)  # type: ignore[misc]
for _code, _make in ((pickle.EMPTY_LIST, list), (pickle.EMPTY_DICT, dict), (pickle.EMPTY_SET, set)):
    HANDLERS[_code[0]] = lambda machine, make=_make: machine.make(make())  # type: ignore[misc]
for _code, _form, _convert in (
    (pickle.LONG1, "<B", _integer),
    (pickle.LONG4, "<i", _integer),
    (pickle.BINSTRING, "<i", _python_2_text),
    (pickle.SHORT_BINSTRING, "<B", _python_2_text),
    (pickle.SHORT_BINUNICODE, "<B", _text),
    (pickle.BINUNICODE, "<I", _text),
    (pickle.BINUNICODE8, "<Q", _text),
    (pickle.SHORT_BINBYTES, "<B", bytes),
    (pickle.BINBYTES, "<I", bytes),
    (pickle.BINBYTES8, "<Q", bytes),
    (pickle.BYTEARRAY8, "<Q", bytearray),
):
    _counted(_code, _form, _convert)


@_opcode(pickle.PROTO)
def _proto(machine: Machine) -> None:
    version = machine.number("<B")
    if version > pickle.HIGHEST_PROTOCOL:
        raise CheckpointError(f"is a pickle of protocol {version}; the newest known is {pickle.HIGHEST_PROTOCOL}.")


@_opcode(pickle.FRAME)
def _frame(machine: Machine) -> None:
    length = machine.number("<Q")
    if machine.position + length > machine.size:
        raise CheckpointError(f"ends too early: a frame of {length} bytes does not fit.")


@_opcode(pickle.MARK)
def _mark(machine: Machine) -> None:
    machine.marks.append(len(machine.stack))


@_opcode(pickle.POP)
def _pop(machine: Machine) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.pop()


@_opcode(pickle.POP_MARK)
def _pop_to_mark(machine: Machine) -> None:
    machine.pop_mark()


@_opcode(pickle.DUP)
def _duplicate(machine: Machine) -> None:
    machine.push(machine.top())


@_opcode(pickle.INT)
def _int(machine: Machine) -> None:
    text = machine.line()
    truth = {b"00": False, b"01": True}.get(text)
    machine.push(_parsed(int, text) if truth is None else truth)


@_opcode(pickle.LONG)
def _long(machine: Machine) -> None:
    machine.push(_parsed(int, machine.line().removesuffix(b"L")))


@_opcode(pickle.FLOAT)
def _float(machine: Machine) -> None:
    machine.push(_parsed(float, machine.line()))


@_opcode(pickle.BINFLOAT)
def _binary_float(machine: Machine) -> None:
    machine.push(machine.number(">d"))


@_opcode(pickle.BININT)
def _binary_int(machine: Machine) -> None:
    machine.push(machine.number("<i"))


@_opcode(pickle.BININT1)
def _binary_int1(machine: Machine) -> None:
    machine.push(machine.number("<B"))


@_opcode(pickle.BININT2)
def _binary_int2(machine: Machine) -> None:
    machine.push(machine.number("<H"))


@_opcode(pickle.STRING)
def _string(machine: Machine) -> None:
    text = machine.line()
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        raise CheckpointError(f"holds {shown(text)} where quoted text should be.")
    machine.push(_python_2_text(_parsed(lambda quoted: codecs.escape_decode(quoted)[0], text[1:-1])))


@_opcode(pickle.UNICODE)
def _unicode(machine: Machine) -> None:
    text = _parsed(lambda line: line.decode("raw-unicode-escape"), machine.line())
    machine.push(_text(text.encode("utf-8", "surrogatepass")))


@_opcode(pickle.TUPLE)
def _tuple(machine: Machine) -> None:
    machine.make(tuple(machine.pop_mark()))


@_opcode(pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
def _short_tuple(machine: Machine) -> None:
    length = machine.data[machine.at - 1] - pickle.TUPLE1[0] + 1
    machine.make(tuple([machine.pop() for _ in range(length)][::-1]))


@_opcode(pickle.LIST)
def _list(machine: Machine) -> None:
    machine.make(machine.pop_mark())


@_opcode(pickle.DICT)
def _dict(machine: Machine) -> None:
    items = machine.pop_mark()
    machine.make({})
    _set_items(machine, items)


@_opcode(pickle.FROZENSET)
def _frozenset(machine: Machine) -> None:
    machine.make(frozenset(map(machine.budget.key, machine.pop_mark())))


@_opcode(pickle.APPEND)
def _append(machine: Machine) -> None:
    value = machine.pop()
    _extend(machine, [value])


@_opcode(pickle.APPENDS)
def _appends(machine: Machine) -> None:
    _extend(machine, machine.pop_mark())


def _extend(machine: Machine, items: list[Any]) -> None:
    target = machine.top()
    if isinstance(target, Record):
        target._elements.extend(items)
    elif isinstance(target, list):
        target.extend(items)
    else:
        raise CheckpointError(f"appends to {shown(target)}, which is no list.")


@_opcode(pickle.ADDITEMS)
def _add_items(machine: Machine) -> None:
    items = machine.pop_mark()
    target = machine.top()
    if isinstance(target, Record):
        target._elements.extend(items)
    elif isinstance(target, set):
        target.update(map(machine.budget.key, items))
    else:
        raise CheckpointError(f"adds items to {shown(target)}, which is no set.")


@_opcode(pickle.SETITEM)
def _set_item(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    _set_items(machine, [key, value])


@_opcode(pickle.SETITEMS)
def _set_many_items(machine: Machine) -> None:
    _set_items(machine, machine.pop_mark())


def _set_items(machine: Machine, items: list[Any]) -> None:
    target = machine.top()
    entries = target._entries if isinstance(target, Record) else target
    if not isinstance(entries, dict) or len(items) % 2:
        raise CheckpointError(f"sets {len(items)} keys and values of {shown(target)}, at byte {machine.position}.")
    for key, value in zip(items[::2], items[1::2]):
        entries[machine.budget.key(key)] = value


@_opcode(pickle.PUT)
def _put(machine: Machine) -> None:
    machine.put(_parsed(int, machine.line()))


@_opcode(pickle.BINPUT)
def _binary_put(machine: Machine) -> None:
    machine.put(machine.number("<B"))


@_opcode(pickle.LONG_BINPUT)
def _long_binary_put(machine: Machine) -> None:
    machine.put(machine.number("<I"))


@_opcode(pickle.MEMOIZE)
def _memoize(machine: Machine) -> None:
    machine.put(len(machine.memo))


@_opcode(pickle.GET)
def _get(machine: Machine) -> None:
    machine.get(_parsed(int, machine.line()))


@_opcode(pickle.BINGET)
def _binary_get(machine: Machine) -> None:
    machine.get(machine.number("<B"))


@_opcode(pickle.LONG_BINGET)
def _long_binary_get(machine: Machine) -> None:
    machine.get(machine.number("<I"))


@_opcode(pickle.GLOBAL)
def _global(machine: Machine) -> None:
    module, name = _text(machine.line()), _text(machine.line())
    machine.push(machine.find(module, name))


@_opcode(pickle.STACK_GLOBAL)
def _stack_global(machine: Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push(machine.find(module, name))


@_opcode(pickle.INST)
def _instance(machine: Machine) -> None:
    module, name = _text(machine.line()), _text(machine.line())
    machine.push(machine.call(machine.find(module, name), tuple(machine.pop_mark())))


@_opcode(pickle.OBJ)
def _object(machine: Machine) -> None:
    kind, *args = machine.pop_mark() or [None]
    machine.push(machine.call(kind, tuple(args)))


@_opcode(pickle.REDUCE, pickle.NEWOBJ)
def _reduce(machine: Machine) -> None:
    args, function = machine.pop(), machine.pop()
    machine.push(machine.call(function, args))


@_opcode(pickle.NEWOBJ_EX)
def _new_object_ex(machine: Machine) -> None:
    options, args, kind = machine.pop(), machine.pop(), machine.pop()
    if not isinstance(args, tuple) or not isinstance(options, dict):
        raise CheckpointError(f"makes an object from {shown(args)} and {shown(options)}.")
    machine.budget.copy(args)
    machine.push(machine.call(kind, (*args, options) if options else args))


@_opcode(pickle.BUILD)
def _build(machine: Machine) -> None:
    state, target = machine.pop(), machine.pop()
    if isinstance(target, Record):
        _restore(machine, target, state)
    elif isinstance(target, Pending):
        if isinstance(state, tuple):
            machine.budget.copy(*state[:8])
        value = target.finish(state)
        for key in target.memo_keys:
            machine.memo[key] = value
        target = value
    elif not isinstance(target, (dict, list, set, TensorRef)):
        raise CheckpointError(f"gives attributes to {shown(target)}, which has none.")
    # Attributes of plain containers and of tensors are left: they are torch's own notes (a state_dict's _metadata).
    machine.push(target)


def _restore(machine: Machine, record: Record, state: Any) -> None:
    """What __setstate__ or the default restoring would do with `state`: attributes, or (attributes, slots)."""
    parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    if all(part is None or isinstance(part, dict) for part in parts):
        machine.budget.copy(*parts)
        attributes = [item for part in parts if part for item in part.items()]
        record._fields.update({name if isinstance(name, str) else shown(name): value for name, value in attributes})
    else:
        object.__setattr__(record, "state", state)


@_opcode(pickle.PERSID)
def _persistent_line(machine: Machine) -> None:
    machine.push(machine.resolve(_text(machine.line())))


@_opcode(pickle.BINPERSID)
def _persistent_object(machine: Machine) -> None:
    machine.push(machine.resolve(machine.pop()))


@_opcode(pickle.EXT1, pickle.EXT2, pickle.EXT4)
def _extension(machine: Machine) -> None:
    raise unsafe("copyreg's extension registry")


@_opcode(pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)
def _buffer(machine: Machine) -> None:
    raise CheckpointError("refers to a buffer outside the file.")
