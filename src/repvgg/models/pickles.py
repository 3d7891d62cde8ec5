"""PyTorch checkpoints read without executing anything: tensors and plain containers are built, all else is left as a blank.

    loaded = read_pickle("checkpoint.pth")          # e.g. {"model": {"stage0...": Tensor}, "config": BLANK, "epoch": 119}

A pickle is a program for a small stack machine. This one knows every instruction, but of the functions that a program may call only
those that rebuild a tensor or an ordered dictionary; what any other would have returned is a `BLANK`. So nothing of the file runs,
what it takes is bounded by its size, and checkpoints that hold settings or optimizers open too. Sources: pickletools, and
torch/serialization.py for the two containers (a zip archive; before PyTorch 1.6 several pickles and the numbers in a row).
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repvgg.disk import FileError

ZIP = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LONGEST = 2_000_000  # instructions: a training checkpoint has some hundred thousand
DIMENSIONS = 16
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Blank:
    """Stands for what is not built."""

    def __repr__(self) -> str:
        return "BLANK"


BLANK = Blank()
MARK = object()


class Dict(dict[Any, Any]):
    """A dictionary, and the attributes that it was saved with."""

    attributes: dict[Any, Any]


@dataclass(frozen=True)
class Global:
    """The name of a function or class. It is never imported."""

    name: str


@dataclass
class Storage:
    """A run of numbers in the file. read: fetches them, once."""

    dtype: torch.dtype
    count: int
    read: Callable[[], bytearray]
    numbers: Tensor | None = None

    def tensor(self) -> Tensor:
        if self.numbers is None:
            data = self.read()
            if len(data) != self.count * self.dtype.itemsize:
                raise FileError("holds fewer numbers than it claims: copy or download it again")
            self.numbers = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        return self.numbers


def read_pickle(path: Path) -> Any:
    """Return what a checkpoint holds. Raises `FileError` for a file that is damaged, or no checkpoint of PyTorch's."""
    with path.open("rb") as file:
        try:
            return _read_zip(path) if file.read(4) == ZIP else _read_legacy(path)
        except (FileError, MemoryError):
            raise
        except (Exception, RecursionError) as error:  # a hostile program may break the machine anywhere
            raise FileError(f"not a checkpoint of PyTorch, or a damaged one ({type(error).__name__})") from None


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()) or sum(e.file_size for e in entries.values()) > path.stat().st_size:
            raise FileError("unpacks to more than its own size, which no checkpoint of PyTorch does")
        program = next((name for name in entries if name.rpartition("/")[2] == "data.pkl"), None)
        if program is None or any(e.compress_type != zipfile.ZIP_STORED for e in entries.values()):
            raise FileError("a zip archive, but no checkpoint of PyTorch: save model.state_dict()")
        folder = program.removesuffix("data.pkl")
        if f"{folder}constants.pkl" in entries:
            raise FileError("is refused: it is a TorchScript program; save model.state_dict() of the network it was made from")
        order = entries.get(f"{folder}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise FileError("was written on a big-endian machine: save it again on another")

        storages: dict[str, Storage] = {}

        def storage(pid: tuple[Any, ...]) -> Storage:
            _, kind, key, _, count = pid[:5]
            name = f"{folder}data/{key}"
            return storages.setdefault(name, Storage(_dtype(kind), count, lambda: bytearray(archive.read(name))))

        return _built(Machine(storage).run(io.BytesIO(archive.read(program))))


def _read_legacy(path: Path) -> Any:
    data = path.read_bytes()
    file = io.BytesIO(data)
    storages: dict[str, Storage] = {}

    def storage(pid: tuple[Any, ...]) -> Storage:
        _, kind, key, _, count, *view = pid
        if view and view[0] is not None:
            raise FileError("holds views of storages, as PyTorch before 0.4 wrote: save it again")
        return storages.setdefault(key, Storage(_dtype(kind), count, bytearray))

    run = partial(Machine(storage).run, file)
    first = run()
    if first != LEGACY_MAGIC:
        return _built(first)  # a bare pickle, which holds no tensors
    run()  # protocol version
    run()  # sizes of types
    loaded, keys = run(), run()
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        kept = storages.get(key) if isinstance(key, str) else None
        if kept is None or count != kept.count:
            raise FileError("holds other numbers than it claims: copy or download it again")
        kept.read = partial(bytearray, file.read(count * kept.dtype.itemsize))
    return _built(loaded)


def _is_storage(pid: Any) -> bool:
    """Tell a storage by its five parts. Its name is a string: to write out a tuple of tuples of tuples would take for ever."""
    five = isinstance(pid, tuple) and len(pid) >= 5
    return five and pid[0] == "storage" and isinstance(pid[2], str) and type(pid[4]) is int


def _dtype(kind: Any) -> torch.dtype:
    name = kind.name.rpartition(".")[2] if isinstance(kind, Global) else ""
    if name not in STORAGES:
        raise FileError(f"holds numbers of a kind that is not read ({name or 'unnamed'}): save it as float32")
    return STORAGES[name]


# ------------------------------------------------------------------------------------------------------------- the machine


@dataclass(frozen=True)
class View:
    """A tensor to be: where it lies in its storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """Return the tensor. Raises `FileError` if it reaches beyond its storage."""
        numbers = (self.offset, *self.size, *self.stride)
        sensible = all(type(n) is int and 0 <= n < 2**48 for n in numbers) and len(self.size) == len(self.stride) <= DIMENSIONS
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True)) if sensible else -1
        if not sensible or math.prod(self.size) > self.storage.count or (0 not in self.size and last >= self.storage.count):
            raise FileError("claims more numbers than the file holds")
        return self.storage.tensor().as_strided(self.size, self.stride, self.offset)


@dataclass
class Machine:
    """Runs the instructions of one pickle. storage: makes a `Storage` of a persistent id."""

    storage: Callable[[tuple[Any, ...]], Storage]
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, program: io.BytesIO) -> Any:
        self.stack, self.memo = [], {}
        for count, (instruction, argument, _) in enumerate(pickletools.genops(program)):
            if count > LONGEST:
                raise FileError("is too long a program for a checkpoint: save model.state_dict()")
            self.step(instruction.name, argument)
        return self.stack.pop()

    def step(self, name: str, argument: Any) -> None:
        stack, memo = self.stack, self.memo
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name == "GLOBAL":
            stack.append(Global(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(Global(f"{module}.{attribute}" if isinstance(module, str) and isinstance(attribute, str) else ""))
        elif name in ("BINPERSID", "PERSID"):
            pid = stack.pop() if name == "BINPERSID" else argument
            stack.append(self.storage(pid) if _is_storage(pid) else BLANK)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in CONTAINERS:
            stack.append(CONTAINERS[name](self.since_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self.since_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _put(stack[-1], items)
        elif name == "ADDITEMS":
            self.since_mark()
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(_called(function, arguments))
        elif name == "NEWOBJ_EX":
            stack[-3:] = [BLANK]
        elif name in ("INST", "OBJ"):
            self.since_mark()
            stack.append(BLANK)
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Dict) and isinstance(state, dict):
                stack[-1].attributes = state
        elif name == "MARK":
            stack.append(MARK)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self.since_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name not in ("PROTO", "FRAME", "STOP"):  # extensions, buffers outside the file
            raise FileError(f"holds an instruction that no checkpoint of PyTorch has ({name})")

    def since_mark(self) -> list[Any]:
        """Take everything off the stack down to the last mark."""
        place = len(self.stack) - 1
        while self.stack[place] is not MARK:
            place -= 1
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items


LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": Dict,
    "EMPTY_SET": lambda: BLANK,
}


def _put(target: Any, items: list[Any]) -> None:
    """Enter keys and values by turns. A key that is no name or small number is left out: to hash it could take for ever."""
    if isinstance(target, Dict):
        pairs = zip(items[::2], items[1::2], strict=True)
        kinds = (str, bytes, float, bool)
        target.update((k, v) for k, v in pairs if type(k) in kinds or (type(k) is int and k.bit_length() <= 64))


def _dictionary(items: list[Any]) -> Dict:
    made = Dict()
    _put(made, items)
    return made


CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple,
    "LIST": list,
    "DICT": _dictionary,
    "FROZENSET": lambda items: BLANK,
}


def _called(function: Any, arguments: Any) -> Any:
    """Return what a function of these few makes; of any other, a blank."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        return BLANK
    match function.name.removeprefix("torch._utils."), arguments:
        case "collections.OrderedDict", (list() as pairs,):
            if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
                return BLANK  # longer ones would multiply what a few bytes name
            made = _dictionary([part for pair in pairs for part in pair])
            pairs.clear()  # a list is used once: again and again it would multiply what a few bytes name
            return made
        case "collections.OrderedDict", _:
            return Dict()
        case "_rebuild_tensor_v2" | "_rebuild_tensor", (
            Storage() as s,
            offset,
            tuple() as size,
            stride,
            *_,
        ):
            return View(s, offset, size, stride) if isinstance(stride, tuple) else BLANK
        case "_rebuild_parameter" | "_rebuild_parameter_with_state", (data, *_):
            return data
        case "torch.Size", (tuple() as size,):
            return size
    return BLANK


def _built(loaded: Any) -> Any:
    """Return the dictionaries in what was loaded, with their tensors made; what lies deeper in anything else stays as it is."""
    for _, holder in dictionaries(loaded):
        for key, value in holder.items():
            if isinstance(value, View):
                holder[key] = value.tensor()
    return loaded.tensor() if isinstance(loaded, View) else loaded


def dictionaries(loaded: Any, depth: int = 4) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield every dictionary in a dictionary under its name ("state.model"), the outermost first, each once."""
    level, seen = [("", loaded)], set[int]()
    for _ in range(depth):
        fresh = {id(one): (name, one) for name, one in level if isinstance(one, dict) and id(one) not in seen}
        seen |= fresh.keys()
        yield from fresh.values()
        level = [(f"{name}.{str(key)[:50]}", value) for name, one in fresh.values() for key, value in one.items()]
