"""Mutations: of bytes, of text, and of what a format's structure is (JSON, zip members, pickle opcodes, messages).

A mutation takes the random source and the bytes, and returns other bytes. Those that know a structure return what is
well-formed outside (checksums, lengths), so that the deeper checks are reached; where the bytes have no such
structure they fall back to bytes.
"""

from __future__ import annotations

import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[Random, bytes], bytes]

LIMIT = 1 << 17
"""Bytes that no mutated file exceeds by much."""
NUMBERS = (
    *(0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 100, 127, 128, 255, 256, 257, 1000, 1023, 1024, 4095, 4096, 4097),
    *(32767, 32768, 65535, 65536, (1 << 24) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 40) + 1),
    *((1 << 53) + 1, (1 << 61) - 1, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**30),
)
WORDS = (
    *(
        b"",
        b"\0",
        b"\n",
        b"\r\n",
        b"\t",
        b" ",
        b".",
        b"..",
        b"../",
        b"/",
        b"\\",
        b"-",
        b"~",
        b"%s",
        b"{}",
        b"[]",
        b"()",
    ),
    *(
        b"null",
        b"true",
        b"NaN",
        b"Infinity",
        b"-1",
        b"1e400",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\\ud800",
        b"\xed\xa0\x80",
    ),
    *(b"\xe2\x80\xa8", b"\x1b[2J", b"\x7f", b"weight", b"F32", b"BF16", b"__metadata__", b"<s>", b"torch", b"cpu"),
)


def some_number(rng: Random) -> int:
    value = rng.choice(NUMBERS)
    return rng.choice((value, value, -value, value + rng.randint(-2, 2)))


def of_bytes(rng: Random, data: bytes) -> bytes:
    """One to four small changes anywhere."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_BYTE_CHANGES)(rng, data)
    return data[: 2 * LIMIT]


def _place(rng: Random, data: bytes) -> int:
    return rng.randrange(len(data) + 1) if data else 0


def _flip(rng: Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if at < len(data) else data


def _put(rng: Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + bytes([rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))]) + data[at + 1 :]


def _insert(rng: Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.choice((rng.choice(WORDS), rng.randbytes(rng.randint(1, 8)))) + data[at:]


def _delete(rng: Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + data[at + rng.choice((1, 1, 2, 4, 8, 64)) :]


def _copy(rng: Random, data: bytes) -> bytes:
    start, at = _place(rng, data), _place(rng, data)
    return data[:at] + data[start : start + rng.choice((1, 4, 16, 64, 512))] + data[at:]


def _repeat(rng: Random, data: bytes) -> bytes:
    start = _place(rng, data)
    part = data[start : start + rng.choice((1, 2, 8, 32))]
    return data[:start] + part * rng.choice((2, 3, 16, 256, 2000)) + data[start:] if len(data) < LIMIT else data


def _cut(rng: Random, data: bytes) -> bytes:
    return data[: _place(rng, data)]


def _write_number(rng: Random, data: bytes) -> bytes:
    at, (form, bits) = _place(rng, data), rng.choice((("<B", 8), ("<H", 16), ("<I", 32), ("<Q", 64), (">I", 32)))
    number = struct.pack(form, some_number(rng) % (1 << bits))
    return data[:at] + number + data[at + len(number) :]


def _add_to_number(rng: Random, data: bytes) -> bytes:
    form, bits = rng.choice((("<H", 16), ("<I", 32), ("<Q", 64)))
    length = bits // 8
    if len(data) < length:
        return data
    at = rng.randrange(len(data) - length + 1)
    (value,) = struct.unpack_from(form, data, at)
    return (
        data[:at] + struct.pack(form, (value + rng.choice((-8, -4, -1, 1, 4, 8))) % (1 << bits)) + data[at + length :]
    )


_BYTE_CHANGES = (_flip, _put, _insert, _delete, _copy, _repeat, _cut, _write_number, _add_to_number, _flip, _put)


def of_text(rng: Random, data: bytes) -> bytes:
    """Changes of lines and fields, with numbers and words that readers trip over."""
    choice = rng.randrange(6)
    if choice < 2:
        return of_bytes(rng, data)
    for separator in rng.sample((b"\n", b" ", b"\t", b",", b":", b'"'), 3):
        parts = data.split(separator)
        if len(parts) > 1:
            break
    at = rng.randrange(len(parts))
    if choice == 2:
        parts[at] = rng.choice((rng.choice(WORDS), str(some_number(rng)).encode()))
    elif choice == 3:
        parts.insert(at, rng.choice(parts))
    elif choice == 4 and len(parts) > 1:
        del parts[at]
    else:
        other = rng.randrange(len(parts))
        parts[at], parts[other] = parts[other], parts[at]
    return separator.join(parts)[: 2 * LIMIT]


def some_value(rng: Random, near: Any = None) -> Any:
    """A JSON value of any kind; `near` is what stands there, which it may be close to."""
    if isinstance(near, (int, float)) and rng.random() < 0.3:
        return near + rng.choice((-1, 1, 0.5, 1e300))
    if isinstance(near, str) and rng.random() < 0.3:
        return near + rng.choice(("", " ", "\0", "\ud800", ".", "x" * 5000, near))
    if near is not None and rng.random() < 0.1:
        return [near, near]
    return rng.choice(
        (
            *(None, True, False, 0, -1, 1.5, "", "x", "\ud800", "\x1b[2J", [], {}, [[]], {"": {}}, [None], ["a", 1]),
            *(float("nan"), float("inf"), -0.0, 1e400, "../x", "/etc/passwd", "x" * 300, "0", "none", "true"),
            some_number(rng),
            [some_number(rng)] * rng.choice((1, 2, 4, 40)),
            {str(number): number for number in range(rng.choice((1, 3, 30)))},
        )
    )


def of_tree(rng: Random, value: Any) -> Any:
    """A JSON value with one place in it changed."""
    places: list[tuple[Any, Any]] = []
    stack = [value]
    while stack and len(places) < 4000:
        each = stack.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        for key in keys:
            places.append((each, key))
            stack.append(each[key])
    if not places or rng.random() < 0.02:
        return some_value(rng, value)
    holder, key = rng.choice(places)
    choice = rng.randrange(8)
    if choice < 4:
        holder[key] = some_value(rng, holder[key])
    elif choice == 4:
        del holder[key]
    elif choice == 5:
        other_holder, other = rng.choice(places)
        holder[key] = other_holder.get(other) if isinstance(other_holder, dict) else None
        if _deep(holder):
            holder[key] = None
    elif isinstance(holder, dict):
        name = rng.choice((str(key) + "x", "", str(some_number(rng)), "\ud800", str(key).upper()))
        holder[name] = holder[key] if choice == 6 else holder.pop(key)
    else:
        holder.insert(rng.randrange(len(holder) + 1), holder[key])
    return value


def _deep(value: Any) -> bool:
    try:
        return len(json.dumps(value)) > LIMIT
    except (ValueError, RecursionError, TypeError):
        return True


def of_json(rng: Random, data: bytes) -> bytes:
    """One to three changes of a JSON text's tree; now and then a key twice, or only bytes."""
    try:
        value = json.loads(data) if rng.random() < 0.85 else None
        if value is None:
            return of_text(rng, data)
        for _ in range(rng.choice((1, 1, 2, 3))):
            value = of_tree(rng, value)
        made = json.dumps(value, ensure_ascii=rng.random() < 0.8)
        if rng.random() < 0.05 and made.startswith('{"'):
            made = made[:-1] + "," + made[1 : made.find(":")] + ":0}"
        return made.encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, TypeError, AttributeError, OverflowError):
        return of_text(rng, data)


def of_json_lines(rng: Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = of_json(rng, lines[at])
    return b"\n".join(lines)


def of_safetensors(rng: Random, data: bytes) -> bytes:
    """A change of the header with its length written anew, or of bytes."""
    if len(data) < 10 or rng.random() < 0.25:
        return of_bytes(rng, data)
    (length,) = struct.unpack_from("<Q", data)
    header = of_json(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def of_zip(rng: Random, data: bytes, of_member: Callable[[str], Mutation]) -> bytes:
    """A change of one member's content or entry, packed again with right checksums; or of the archive's bytes."""
    if rng.random() < 0.3:
        return of_bytes(rng, data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info), info.compress_type) for info in archive.infolist()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, RuntimeError, OSError, zipfile.zlib.error):
        return of_bytes(rng, data)
    if not members:
        return of_bytes(rng, data)
    at = rng.randrange(len(members))
    name, content, method = members[at]
    choice = rng.randrange(12)
    if choice < 8:
        members[at] = (name, of_member(name)(rng, content), method)
    elif choice == 8:
        members[at] = (of_text(rng, name.encode()).decode("utf-8", "replace")[:300], content, method)
    elif choice == 9:
        del members[at]
    elif choice == 10:
        members.insert(rng.randrange(len(members) + 1), members[at])
    else:
        members[at] = (name, content, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    return packed(members)


def packed(members: list[tuple[str, bytes, int]]) -> bytes:
    """A zip archive of (name, content, method)."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive._didModify = True
        for name, content, method in members:
            info = zipfile.ZipInfo(name or "_")
            info.compress_type = method
            archive.NameToInfo.pop(info.filename, None)  # a second member of one name is wanted
            archive.writestr(info, content)
    return stream.getvalue()


def opcodes(data: bytes) -> list[bytes]:
    """The pickle at the beginning of `data`, an opcode with its argument each; what follows it is the last."""
    places = [place for _, _, place in pickletools.genops(data)]
    found = [data[start:stop] for start, stop in zip(places, [*places[1:], places[-1] + 1])]
    return [*found, data[places[-1] + 1 :]]


_OPCODES = (
    *(b"(", b".", b"0", b"1", b"2", b"}", b"]", b")", b"N", b"\x88", b"\x89", b"t", b"\x85", b"\x86", b"\x87", b"R"),
    *(b"Q", b"b", b"s", b"u", b"a", b"e", b"d", b"l", b"\x81", b"\x92", b"\x93", b"\x94", b"\x8f", b"\x90", b"\x91"),
)


def of_pickle(rng: Random, data: bytes) -> bytes:
    """Opcodes left out, doubled, exchanged, put in, or with another argument."""
    if rng.random() < 0.25:
        return of_bytes(rng, data)
    try:
        parts = opcodes(data)
    except (ValueError, KeyError, IndexError, struct.error, OverflowError, MemoryError):
        return of_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(parts))
        choice = rng.randrange(7)
        if choice == 0:
            parts[at] = b""
        elif choice == 1:
            parts.insert(at, rng.choice(parts[:-1]))
        elif choice == 2:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif choice == 3:
            parts.insert(at, rng.choice(_OPCODES))
        elif choice == 4:
            parts[at] = rng.choice(_OPCODES)
        else:
            parts[at] = _with_argument(rng, parts[at])
    return b"".join(parts)


def _with_argument(rng: Random, opcode: bytes) -> bytes:
    if opcode[:1] in b"KMJ\x8a" and opcode:
        number = some_number(rng)
        length = max((number.bit_length() + 8) // 8, 1)
        return rng.choice(
            (
                b"\x8a" + bytes([length]) + number.to_bytes(length, "little", signed=True),
                b"K" + bytes([number & 0xFF]),
                b"J" + struct.pack("<I", number & 0xFFFFFFFF),
                b"G" + struct.pack(">d", float(number)),
            )
        )
    if opcode[:1] == b"X":
        text = of_text(rng, opcode[5:])[:5000]
        return b"X" + struct.pack("<I", len(text)) + text
    if opcode[:1] == b"\x8c":
        text = of_text(rng, opcode[2:])[:255]
        return b"\x8c" + bytes([len(text)]) + text
    if opcode[:1] in b"qh" and len(opcode) == 2:
        return opcode[:1] + bytes([max(opcode[1] + rng.randint(-3, 3), 0) & 0xFF])
    if opcode[:1] == b"c":
        return opcode if rng.random() < 0.3 else b"c" + rng.choice(GLOBALS).replace(b" ", b"\n") + b"\n"
    return of_bytes(rng, opcode)


GLOBALS = (
    *(b"torch._utils _rebuild_tensor", b"torch._utils _rebuild_tensor_v2", b"torch._utils _rebuild_tensor_v3"),
    *(b"torch._utils _rebuild_parameter", b"torch._utils _rebuild_parameter_with_state"),
    *(b"torch._tensor _rebuild_from_type_v2", b"torch._tensor _rebuild_from_type"),
    *(b"torch._utils _rebuild_sparse_tensor", b"torch._utils _rebuild_qtensor", b"torch.nn.parameter Parameter"),
    *(b"torch._utils _rebuild_meta_tensor_no_storage", b"torch._utils _rebuild_device_tensor_from_numpy"),
    *(b"torch FloatStorage", b"torch HalfStorage", b"torch LongStorage", b"torch BoolStorage", b"torch ByteStorage"),
    *(b"torch BFloat16Storage", b"torch DoubleStorage", b"torch ComplexFloatStorage", b"torch QInt8Storage"),
    *(b"torch.storage UntypedStorage", b"torch.storage TypedStorage", b"torch.cuda FloatStorage", b"torch Tensor"),
    *(b"torch float32", b"torch bfloat16", b"torch int64", b"torch device", b"torch Size", b"torch strided"),
    *(b"torch.serialization _get_layout", b"collections OrderedDict", b"collections Counter", b"collections deque"),
    *(b"collections defaultdict", b"builtins dict", b"builtins list", b"builtins set", b"builtins frozenset"),
    *(b"builtins bytearray", b"builtins bytes", b"builtins complex", b"builtins range", b"builtins slice"),
    *(b"builtins getattr", b"builtins tuple", b"builtins int", b"builtins print", b"builtins eval", b"os system"),
    *(b"_codecs encode", b"copyreg _reconstructor", b"copyreg __newobj__", b"copyreg __newobj_ex__"),
    *(b"argparse Namespace", b"omegaconf.dictconfig DictConfig", b"omegaconf.base Metadata", b"enum Enum"),
    *(b"numpy.core.multiarray _reconstruct", b"numpy._core.multiarray scalar", b"numpy dtype", b"numpy ndarray"),
    *(b"numpy.core.multiarray scalar", b"numpy._core.numeric _frombuffer", b"numpy.core.numeric _frombuffer"),
    *(b"datetime datetime", b"pathlib PosixPath", b"decimal Decimal", b"functools partial", b"types SimpleNamespace"),
)


def of_npy(rng: Random, data: bytes) -> bytes:
    """A change of the text in an .npy header, its length written anew; or of bytes."""
    if len(data) < 12 or rng.random() < 0.3:
        return of_bytes(rng, data)
    (length,) = struct.unpack_from("<H", data, 8)
    header = of_text(rng, data[10 : 10 + length])
    if rng.random() < 0.4:
        kinds = (
            b"<f4",
            b">f4",
            b"<f2",
            b"|b1",
            b"<i8",
            b"|u1",
            b"<U3",
            b"|S4",
            b"|O",
            b"<c8",
            b"<M8[s]",
            b"|V2",
            b"<f16",
        )
        start = data[10 : 10 + length].find(b"'descr': ")
        rest = data[10 : 10 + length]
        header = rest[: start + 9] + b"'" + rng.choice(kinds) + b"'" + rest[rest.find(b",", start) :]
    return data[:8] + struct.pack("<H", len(header) & 0xFFFF) + header + data[10 + length :]


def of_message(rng: Random, data: bytes, depth: int = 0) -> bytes:
    """A change of one field of a protocol-buffers message, lengths around it written anew; or of bytes."""
    fields = _fields(data)
    if not fields or rng.random() < 0.2:
        return of_bytes(rng, data)
    at = rng.randrange(len(fields))
    key, value = fields[at]
    choice = rng.randrange(8)
    if choice == 0:
        del fields[at]
    elif choice == 1:
        fields.insert(rng.randrange(len(fields) + 1), fields[at])
    elif choice == 2:
        fields[at] = (rng.choice((key ^ 1, key + 8, key - 8 if key > 8 else key, some_number(rng) & 0xFFFF)), value)
    elif isinstance(value, int):
        fields[at] = (key, some_number(rng) % (1 << 64))
    else:
        inner = of_message if depth < 3 and rng.random() < 0.7 else of_text
        fields[at] = (key, inner(rng, value, depth + 1) if inner is of_message else of_text(rng, value))
    return b"".join(_field(key, value) for key, value in fields)


def _fields(data: bytes) -> list[tuple[int, int | bytes]]:
    found: list[tuple[int, int | bytes]] = []
    at = 0
    try:
        while at < len(data):
            key, at = _varint(data, at)
            if key & 7 == 0:
                value, at = _varint(data, at)
                found.append((key, value))
                continue
            if key & 7 == 2:
                length, at = _varint(data, at)
            elif key & 7 in (1, 5):
                length = 8 if key & 7 == 1 else 4
            else:
                return []
            if at + length > len(data):
                return []
            found.append((key, data[at : at + length]))
            at += length
    except IndexError:
        return []
    return found


def _field(key: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _as_varint(key & ~7) + _as_varint(value)
    return _as_varint(key) + (_as_varint(len(value)) if key & 7 == 2 else b"") + value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80 or shift > 63:
            return value, at
        shift += 7


def _as_varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])
