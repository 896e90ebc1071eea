"""No pickle makes anything happen: nothing runs, nothing is imported, and bad ones end in one clear error."""

from __future__ import annotations

import argparse
import builtins
import enum
import operator
import os
import pathlib
import pickle
import random
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from checkpoint_bytes import Call, foreign_classes, pickled, storage_id, tensor, write_archive

from weightport.checkpoints import Record, Symbol, open_checkpoint, plain
from weightport.checkpoints.pickle.reader import unpickle
from weightport.errors import CheckpointError, UnsafeCheckpointError, WeightportError


def read(data: bytes) -> Any:
    value, at = unpickle(data, "the pickle")
    assert at == len(data)
    return value


class State:
    """An object whose __setstate__ would run."""

    def __getstate__(self) -> list[int]:
        return [1, 2]

    def __setstate__(self, state: Any) -> None:
        raise SystemExit("executed")


def exploits(target: str) -> dict[str, Any]:
    make = f"open({target!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {target}"),
        "builtins.eval": Call(eval, make),
        "builtins.exec": Call(exec, make),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", target]),
        "builtins.open": Call(open, target, "w"),
        "builtins.__import__": Call(builtins.__import__, "antigravity"),
        "operator.methodcaller": Call(operator.methodcaller, "system", f"touch {target}"),
        "torch.load": Call(torch.load, target),
        "torch.storage._load_from_bytes": Call(torch.storage._load_from_bytes, b""),
        "builtins.getattr": Call(getattr, Call(dict), "fromkeys"),
        "inside a list": [1, {"deep": (Call(os.system, f"touch {target}"),)}],
        "as an argument": Call(argparse.Namespace, Call(os.system, f"touch {target}")),
        "result is called": Call(Call, Call(os.system, f"touch {target}")),
    }


@pytest.mark.parametrize("name", exploits("x"))
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_commands_in_a_pickle_are_refused_and_not_run(tmp_path, name, protocol):
    target = tmp_path / "executed"
    data = pickled(exploits(str(target))[name], protocol)
    path = write_archive(tmp_path / "c.pt", data)
    with pytest.raises(UnsafeCheckpointError, match=r"c\.pt.*Nothing was executed"):
        open_checkpoint(path)
    assert not target.exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "builtins.exec", "inside a list"])
def test_the_same_commands_do_run_under_pythons_own_unpickler(tmp_path, name):
    target = tmp_path / "executed"
    pickle.loads(pickled(exploits(str(target))[name]))
    assert target.exists()


def test_the_error_names_the_function_and_cannot_write_to_the_terminal():
    with pytest.raises(UnsafeCheckpointError, match=r"'(posix|nt)\.system'"):
        read(pickled(Call(os.system, "true")))
    with pytest.raises(UnsafeCheckpointError, match=r"asks for 'os\.\\x1b") as caught:
        read(b"cos\n\x1b[2J\x1b[31mfake\n.")
    assert "\x1b" not in str(caught.value)


def test_unknown_classes_and_functions_become_records_and_are_not_imported():
    class Config(dict):
        pass

    def build(*_: Any) -> Any:
        raise SystemExit("executed")

    with foreign_classes(some_project__config={"Config": Config, "build": build}):
        config = Config(lr=0.1)
        config.name = "tiny"
        data = pickled({"config": config, "built": Call(build, 1, "a"), "class": Config})
    before = set(sys.modules)
    found = read(data)
    assert set(sys.modules) == before
    assert found["config"].type_name == "some_project.config.Config"
    assert found["config"]["lr"] == 0.1 and found["config"]["name"] == "tiny" and "lr" in found["config"]
    assert found["config"].get("absent") is None
    assert found["built"].type_name == "some_project.config.build" and found["built"].args == (1, "a")
    assert isinstance(found["class"], Symbol) and found["class"].type_name == "some_project.config.Config"


def test_setstate_is_kept_as_data_not_called():
    data = pickled(State())
    found = read(data)
    assert isinstance(found, Record)
    assert found.state == [1, 2]
    with pytest.raises(SystemExit, match="executed"):
        pickle.loads(data)


def test_records_are_for_reading():
    record = read(pickled(argparse.Namespace(a=1)))
    with pytest.raises(AttributeError, match="a Record is for reading"):
        record.type_name = "other"
    with pytest.raises(TypeError, match="does not support item assignment"):
        record.fields["a"] = 2
    with pytest.raises(KeyError, match="b"):
        record["b"]


def test_slots_tuples_enumerations_and_paths_keep_what_they_hold():
    class Slots:
        __slots__ = ("a", "b")

    class Color(enum.Enum):
        RED = "red"

    with foreign_classes(project={"Slots": Slots, "Color": Color}):
        slots = Slots()
        slots.a, slots.b = 1, 2
        data = pickled([slots, Color.RED, pathlib.PurePosixPath("/a/b"), Call(getattr, Color, "RED")])
    found = read(data)
    assert dict(found[0].fields) == {"a": 1, "b": 2}
    assert found[1].type_name == "project.Color" and found[1].args in (("red",), ("RED",))
    # Its parts, or from Python 3.13 on the whole as one text.
    assert pathlib.PurePosixPath(*found[2].args) == pathlib.PurePosixPath("/a/b")
    assert found[3].type_name == "project.Color" and found[3].args == ("RED",)


def test_cycles_are_read_and_shown_without_end():
    space = argparse.Namespace(name="root")
    space.me, space.list = space, []
    space.list.append(space.list)
    found = read(pickled(space))
    assert found["me"] is found
    assert "name" in repr(found) and len(repr(found)) < 200
    assert plain(found)["me"] == "<cycle>"


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_gives_the_same_values(protocol):
    value = {
        "a": [1, -5, 300, 70000, 2**70, -(2**70), True, None, 1.5],
        "b": (1,),
        "c": ("é\n'\\", b"\x00\xff"),
        "d": {1},
    }
    assert read(pickled(value, protocol)) == value


def test_pickles_of_python_2_are_read():
    data = b"(dp0\nS'it\\'s'\np1\nI1\nsS'\\xe4\\xb8\\xad'\nI01\nsS'o'\n" + (
        b"ccopy_reg\n_reconstructor\n(cm\nC\nc__builtin__\nobject\nNtR(dp3\nS'x'\nL5L\nsbs."
    )
    found = read(data)
    assert found["it's"] == 1 and found["中"] is True
    assert found["o"].type_name == "m.C" and found["o"]["x"] == 5


LONG = b"\x8b" + (1 << 30).to_bytes(4, "little")
MALFORMED = {
    "nothing": (b"", "ends too early, at byte 0"),
    "no stop": (b"N", "ends too early, at byte 1"),
    "empty stack": (b".", "takes more from its stack than there is"),
    "no opcode": (b"\xff.", "byte 0 is no opcode"),
    "mark missing": (b"t.", "a mark that is not there"),
    "pop beyond mark": (b"N(0s.", "takes more from its stack than there is"),
    "below mark": (b"N(\x85.", "takes more from its stack than there is"),
    "memo missing": (b"h\x05.", "refers to object 5"),
    "text too long": (b"X\xff\xff\xff\x7fabc.", "2147483647 bytes are missing"),
    "text far too long": (b"\x8d" + b"\xff" * 8 + b"abc.", "18446744073709551615 bytes are missing"),
    "whole number beyond the file": (LONG + b"ab.", "1073741824 bytes are missing"),
    "whole number of megabytes": (
        b"\x8b" + (1 << 20).to_bytes(4, "little") + b"\x01" * (1 << 20) + b".",
        "a whole number of 1048576 bytes",
    ),
    "negative length": (b"\x8b\xff\xff\xff\xff.", "-1 bytes are missing"),
    "number that is none": (b"Iabc\n.", "'abc' where a number"),
    "number of too many digits": (b"I" + b"9" * 100_000 + b"\n.", "a line without an end"),
    "line without end": (b"I123", "a line without an end"),
    "quotes missing": (b"Sabc\n.", "'abc' where quoted text"),
    "frame beyond the end": (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "a frame of 18446744073709551615 bytes"),
    "protocol unknown": (b"\x80\xffN.", "protocol 255; the newest known is 5"),
    "extension": (b"\x82\x01.", "extension registry"),
    "buffer": (b"\x97.", "a buffer outside the file"),
    "persistent id": (b"NQ.", "data outside itself"),
    "list as key": (b"}]Ns.", "has list for a key"),
    "dict in set": (b"\x8f(}\x90.", "has dict for a key"),
    "append to a number": (b"K\x01K\x02a.", "appends to 1"),
    "items of a list": (b"]K\x01K\x02s.", "sets 2 keys and values of list"),
    "odd items": (b"}(K\x01u.", "sets 1 keys and values of dict"),
    "call of a number": (b"K\x01)R.", "calls 1, which is not"),
    "call without tuple": (b"cm\nf\nK\x01R.", "with 1 instead of a tuple"),
    "build on a number": (b"K\x01}b.", "gives attributes to 1"),
    "build on a class": (b"cm\nC\n}b.", "gives attributes to Symbol"),
    "class named by number": (b"K\x01K\x02\x93.", "names a class by 1 and 2"),
    "numpy type without name": (b"cnumpy\ndtype\nK\x01\x85R.", "a numpy type is named 1"),
    "numpy type unknown": (b"cnumpy\ndtype\nX\x03\x00\x00\x00f99\x85R(K\x03X\x01\x00\x00\x00<tb.", "no type 'f99'"),
    "numpy array without bytes": (
        b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01(K\x05tcnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R\x89C\x01atb.",
        "does not hold its bytes",
    ),
    "sized bytearray": (b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "is made of 2147483647"),
    "too many arguments": (b"ccollections\nOrderedDict\n(]]]]]tR.", "cannot be built from its arguments"),
    "copyreg of copyreg": (
        b"ccopyreg\n__newobj__\n(ccopyreg\n__newobj__\nccopyreg\n__newobj__\ntR.",
        "which is no class",
    ),
    "encoding": (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00rot\x86R.", "encoded as 'rot'"),
    "parameter of nothing": (
        b"ctorch._utils\n_rebuild_parameter\n(NK\x00}tR.",
        "should hold a tensor, but holds None",
    ),
    "tensor of nothing": (
        b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))K\x00}tR.",
        "made of a storage, but is made of None",
    ),
    "tensor of a type": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cm\nf\ncm\nT\n)}tR.",
        "made by 'm.f', which is not known",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_pickles_are_refused(name):
    data, said = MALFORMED[name]
    with pytest.raises(WeightportError, match=f"the pickle .*{said}"):
        read(data)


def bombs() -> dict[str, bytes]:
    doubling = b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
    wide_key = b")" + b"\x85" * 300_000
    return {
        "memo of four billion": b"Nr\xff\xff\xff\xff.",
        "nested lists": b"]" * 200_000 + b"a" * 199_999 + b".",
        "nested tuples": wide_key + b".",
        "nested tuple as key": b"}" + wide_key + b"Ns.",
        "nested tuple in a set": b"\x8f(" + wide_key + b"\x90.",
        "doubling lists": doubling + b".",
        "copies of a long list": b"]("
        + b"N" * 100_000
        + b"eq\x000"
        + b"("
        + b"cbuiltins\nlist\nh\x00\x85R" * 100_000
        + b"t.",
        "ranges": b"cbuiltins\nrange\nJ\xff\xff\xff\x7f\x85R.",
        "nested records": b"cm\nC\n)\x81" * 100_000 + b"a" * 99_999 + b".",
    }


@pytest.mark.parametrize("name", bombs())
def test_bombs_end_quickly(tmp_path, name):
    started = time.perf_counter()
    try:
        checkpoint = open_checkpoint(write_archive(tmp_path / "c.pt", bombs()[name]))
        plain(checkpoint.document)
        repr(checkpoint)
    except CheckpointError as error:
        assert "c.pt" in str(error)
        assert len(str(error)) < 2000
    # Seconds, not minutes; generous, for machines that are busy.
    assert time.perf_counter() - started < 30


def test_a_tensor_of_endless_names_is_refused(tmp_path):
    value: Any = tensor(storage_id(), 0, (12,), (1,))
    for _ in range(60):
        value = [value, value]
    path = write_archive(tmp_path / "c.pt", value, {"0": bytes(48)})
    with pytest.raises(CheckpointError, match="over and over"):
        open_checkpoint(path)


def test_random_programs_never_do_anything_else_than_fail_or_give_data():
    # Opcodes at random reach states that no pickler writes.
    codes = b"(.0120FIJKLMNRSTUVXabcdeghijlopqrstu})]\x80\x81\x85\x86\x87\x88\x89\x8a\x8c\x8f\x90\x91\x92\x93\x94\x95"
    names = (
        b"m C|torch Size|builtins set|builtins slice|copyreg _reconstructor|collections OrderedDict|numpy dtype|"
        b"numpy.core.multiarray _reconstruct|numpy.core.multiarray scalar"
    ).split(b"|")
    pieces = [bytes([code]) for code in codes] + [b"c" + name.replace(b" ", b"\n") + b"\n" for name in names]
    pieces += [b"X\x01\x00\x00\x00a", b"X\x02\x00\x00\x00f4", b"K\x01", b"q\x00", b"h\x00", b"(K\x01K\x02t"]
    generator = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(20_000):
        data = b"".join(generator.choices(pieces, k=generator.randrange(1, 24))) + b"."
        try:
            unpickle(data, "the pickle")
            outcomes["read"] += 1
        except WeightportError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 1000 and outcomes["read"] > 100


def test_damaged_real_pickles_never_raise_anything_else():
    data = pickled({"a": argparse.Namespace(x=1, y=[1.5, "é"]), "s": {1, 2}, "c": 1j, "b": b"\xff", "n": 2**70}, 2)
    generator = random.Random(1)
    for position in range(len(data)):
        for value in (*generator.sample(range(256), 3), 0, 255):
            damaged = data[:position] + bytes([value]) + data[position + 1 :]
            try:
                unpickle(damaged, "the pickle")
            except WeightportError:
                continue
