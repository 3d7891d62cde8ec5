"""The shared library, by ctypes: its C interface is src/repvgg_engine.h."""

import ctypes
import sys
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

ABI_VERSION = 3
CONV, SQUEEZE_EXCITE, POOL, MAX_POOL = 0, 1, 2, 3


class EngineError(ValueError):
    """Bad input: a file, images or an option that cannot be used. One line that names it."""


class LayerStruct(ctypes.Structure):
    _fields_ = [
        ("op", c_int32),
        ("in_channels", c_int32),
        ("out_channels", c_int32),
        ("kernel", c_int32 * 2),
        ("stride", c_int32 * 2),
        ("padding", c_int32 * 2),
        ("dilation", c_int32 * 2),
        ("groups", c_int32),
        ("relu", c_int32),
        ("largest_input", c_float),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("weight2", c_void_p),
        ("bias2", c_void_p),
    ]


class OptionsStruct(ctypes.Structure):
    _fields_ = [("threads", c_int32), ("pin", c_int32), ("precision", c_int32), ("isa", c_char_p)]


class ImagesStruct(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("bytes", c_int32),
        ("n", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("scale", POINTER(c_float)),
        ("shift", POINTER(c_float)),
    ]


class DescriptionStruct(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("layers", POINTER(LayerStruct)),
        ("layer_count", c_int32),
        ("channels", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("resize", c_int32),
        ("interpolation", c_char_p),
        ("mean", POINTER(c_double)),
        ("std", POINTER(c_double)),
        ("scale", POINTER(c_float)),
        ("shift", POINTER(c_float)),
        ("classes", POINTER(c_char_p)),
        ("class_count", c_int32),
    ]


def _open() -> ctypes.CDLL:
    path = Path(__file__).with_name("librepvgg_engine" + (".dylib" if sys.platform == "darwin" else ".so"))
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"repvgg_engine is not built here: pip install ./engine ({error})") from None
    sizes = (c_size_t * 3)()
    ours = [ctypes.sizeof(struct) for struct in (LayerStruct, OptionsStruct, ImagesStruct)]
    if not hasattr(library, "repvgg_abi_version") or library.repvgg_abi_version(sizes) != ABI_VERSION or list(sizes) != ours:
        raise ImportError(f"{path} belongs to another version of repvgg_engine: pip install --force-reinstall ./engine")
    failing: list[Any] = [c_char_p, c_size_t]
    library.repvgg_read.argtypes = [c_char_p, *failing]
    library.repvgg_read.restype = c_void_p
    library.repvgg_free.argtypes = [c_void_p]
    library.repvgg_free.restype = None
    library.repvgg_describe.argtypes = [c_void_p, POINTER(DescriptionStruct)]
    library.repvgg_prepare.argtypes = [POINTER(DescriptionStruct), c_void_p, c_int32, c_int32, c_void_p, *failing]
    library.repvgg_create.argtypes = [POINTER(LayerStruct), c_int32, POINTER(OptionsStruct), *failing]
    library.repvgg_create.restype = c_void_p
    library.repvgg_destroy.argtypes = [c_void_p]
    library.repvgg_destroy.restype = None
    library.repvgg_output_shape.argtypes = [c_void_p, c_int32, c_int32, POINTER(c_int32), *failing]
    library.repvgg_run.argtypes = [c_void_p, POINTER(ImagesStruct), c_void_p, *failing]
    library.repvgg_choose.argtypes = [c_void_p, c_int32, c_char_p, *failing]
    library.repvgg_isa.argtypes = [c_void_p]
    library.repvgg_isa.restype = c_char_p
    library.repvgg_algorithm.argtypes = [c_void_p, c_int32, c_int32]
    library.repvgg_algorithm.restype = c_char_p
    library.repvgg_weight_bytes.argtypes = [c_void_p, c_int32, c_char_p]
    library.repvgg_weight_bytes.restype = c_int64
    library.repvgg_profile.argtypes = [c_void_p, POINTER(c_double)]
    library.repvgg_profile.restype = None
    library.repvgg_available_threads.argtypes = [c_char_p]
    library.repvgg_available_memory.argtypes = [c_char_p]
    library.repvgg_available_memory.restype = c_int64
    library.repvgg_instruction_sets.argtypes = []
    library.repvgg_instruction_sets.restype = c_char_p
    return library


LIBRARY = _open()


def instruction_sets() -> list[str]:
    """Those that this processor has, best first; "bf16" among them where it multiplies bfloat16."""
    names: bytes = LIBRARY.repvgg_instruction_sets()
    return names.decode().split()


class Message:
    """Room for what a failing call says: `check(call(..., *message.room))`."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(500)

    @property
    def room(self) -> tuple[ctypes.Array[ctypes.c_char], int]:
        return self.buffer, len(self.buffer)

    def check(self, status: int | None) -> int:
        """The status. Raises `EngineError` with what the call said if it failed."""
        if status is None or status == -1:
            raise EngineError(self.buffer.value.decode(errors="replace"))
        return status
