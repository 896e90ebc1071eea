"""Pickles grown from a grammar: programs that torch.save, fairseq, numpy or an attacker could have written.

Every value is an expression that leaves one object on the stack, so that programs are mostly well-formed; one in a
few is spoiled afterwards.
"""

from __future__ import annotations

import struct
from random import Random

from fuzzing.mutation import GLOBALS, of_pickle, some_number

STORAGES = {"0": 48, "1": 16, "2": 0}
"""Bytes of the storages that the programs may refer to."""
_KINDS = ((b"FloatStorage", 4), (b"HalfStorage", 2), (b"LongStorage", 8), (b"ByteStorage", 1), (b"BoolStorage", 1))
_TEXTS = (
    b"model",
    b"weight",
    b"args",
    b"cfg",
    b"a.b",
    b"",
    b"encoder.embed_tokens.weight",
    b"\xff",
    b"a\nb",
    b"version",
)


class Grower:
    """One program. `depth` bounds nesting, `left` the number of values."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.left = rng.choice((5, 20, 60, 200))
        self.memo = 0

    def program(self) -> bytes:
        rng = self.rng
        made = b"\x80" + bytes([rng.choice((2, 2, 2, 3, 4, 5))]) + self.document() + b"."
        return of_pickle(rng, made) if rng.random() < 0.3 else made

    def document(self) -> bytes:
        """A dictionary that holds tensors most of the time, as checkpoints do."""
        if self.rng.random() < 0.25:
            return self.value(0)
        items = b"".join(
            self.text(b"t%d" % number) + (self.tensor(1) if self.rng.random() < 0.7 else self.value(1))
            for number in range(self.rng.randint(1, 4))
        )
        return self.ordered(items) if self.rng.random() < 0.5 else b"}" + b"(" + items + b"u"

    def ordered(self, items: bytes) -> bytes:
        return b"ccollections\nOrderedDict\n)R(" + items + b"u"

    def value(self, depth: int) -> bytes:
        self.left -= 1
        if depth > 6 or self.left < 0:
            return self.scalar()
        kinds = (self.scalar, self.scalar, self.nested, self.nested, self.nested, self.tensor, self.called, self.kept)
        chosen = self.rng.choice(kinds)
        return chosen() if chosen == self.scalar else chosen(depth + 1)  # type: ignore[call-arg]

    def scalar(self) -> bytes:
        rng = self.rng
        choice = rng.randrange(8)
        if choice == 0:
            return rng.choice((b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f"))
        if choice == 1:
            return b"G" + struct.pack(">d", rng.choice((0.0, 1.5, -1e300, float("nan"), float("inf"))))
        if choice == 2:
            return b"c" + rng.choice(GLOBALS).replace(b" ", b"\n") + b"\n"
        if choice == 3:
            data = rng.randbytes(rng.choice((0, 1, 4, 8, 40)))
            return rng.choice((b"C", b"U")) + bytes([len(data)]) + data
        return self.integer() if choice < 6 else self.text(rng.choice(_TEXTS))

    def integer(self, value: int | None = None) -> bytes:
        value = some_number(self.rng) if value is None else value
        if 0 <= value < 256:
            return b"K" + bytes([value])
        length = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)

    def text(self, text: bytes) -> bytes:
        return b"X" + struct.pack("<I", len(text)) + text

    def nested(self, depth: int) -> bytes:
        rng = self.rng
        values = [self.value(depth) for _ in range(rng.choice((0, 1, 2, 3, 5)))]
        choice = rng.randrange(5)
        if choice == 0:
            return b"(" + b"".join(values) + b"t"
        if choice == 1:
            return b"](" + b"".join(values) + b"e"
        if choice == 2:
            return b"\x8f(" + b"".join(values) + b"\x90"
        items = b"".join(
            (self.text(b"k%d" % n) if rng.random() < 0.8 else self.scalar()) + v for n, v in enumerate(values)
        )
        return b"}(" + items + b"u"

    def kept(self, depth: int) -> bytes:
        """A value that is remembered, or one from before again."""
        if self.memo and self.rng.random() < 0.6:
            return b"h" + bytes([self.rng.randrange(self.memo)])
        made = self.value(depth)
        number, self.memo = self.memo, min(self.memo + 1, 255)
        return made + b"q" + bytes([number])

    def called(self, depth: int) -> bytes:
        rng = self.rng
        arguments = b"(" + b"".join(self.value(depth) for _ in range(rng.randrange(4))) + b"t"
        made = b"c" + rng.choice(GLOBALS).replace(b" ", b"\n") + b"\n" + arguments + rng.choice((b"R", b"R", b"\x81"))
        if rng.random() < 0.3:
            made += self.value(depth) + b"b"
        return made

    def storage(self) -> bytes:
        rng = self.rng
        key = rng.choice(tuple(STORAGES))
        kind, width = rng.choice(_KINDS)
        count = STORAGES[key] // width if rng.random() < 0.95 else some_number(rng)
        return (
            b"(" + self.text(b"storage") + b"ctorch\n" + kind + b"\n" + self.text(key.encode()) + self.text(b"cpu")
            + self.integer(count) + b"tQ"
        )  # fmt: skip

    def tensor(self, depth: int = 0) -> bytes:
        rng = self.rng
        shape = rng.choice(((), (1,), (2, 2), (4,), (1, 4), (2, 3), (0,), (3, 0, 2), (2, 1, 2)))
        stride, step = [], 1
        for length in reversed(shape):
            stride.insert(0, step)
            step *= max(length, 1)
        offset = rng.choice((0, 0, 0, 1, 3))
        if rng.random() < 0.3 and stride:
            at = rng.randrange(len(stride))
            stride[at] = rng.choice((0, 1, 2, -1, some_number(rng)))
        if rng.random() < 0.1 and shape:
            shape = tuple(some_number(rng) if rng.random() < 0.5 else length for length in shape)
        numbers = [
            self.integer(offset),
            *(b"(" + b"".join(map(self.integer, each)) + b"t" for each in (shape, stride)),
        ]
        rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + self.storage() + b"".join(numbers) + b"\x89"
        made = rebuilt + b"ccollections\nOrderedDict\n)R" + b"tR"
        if rng.random() < 0.2:
            made = b"ctorch._utils\n_rebuild_parameter\n(" + made + b"\x88ccollections\nOrderedDict\n)RtR"
        return made
