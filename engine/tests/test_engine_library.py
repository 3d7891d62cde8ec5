"""The C interface, called as a careless program would: an error in words, never a crash."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("repvgg_engine", exc_type=ImportError)

from repvgg_engine import EngineError, library
from repvgg_engine.library import CONV, LIBRARY, LayerStruct, Message, OptionsStruct

FEW = np.zeros(64, np.float32)  # no kernel here is read: what is wrong with it shows in its sizes


def create(**values: Any) -> int:
    struct = LayerStruct(op=CONV, in_channels=1, out_channels=1, groups=1, weight=FEW.ctypes.data, bias=FEW.ctypes.data)
    struct.kernel[:] = struct.stride[:] = struct.dilation[:] = 1, 1
    for name, value in values.items():
        if isinstance(value, tuple):
            getattr(struct, name)[:] = value
        else:
            setattr(struct, name, value)
    message = Message()
    net = LIBRARY.repvgg_create(struct, 1, OptionsStruct(1, 0, 0, None), *message.room)
    return message.check(net)


@pytest.mark.parametrize("side", [46341, 65536])
def test_sizes_that_overflow(side: int) -> None:
    with pytest.raises(EngineError, match="layer 0 has more weights than this engine takes"):
        create(kernel=(side, side))
    with pytest.raises(EngineError, match="layer 0 has more weights than this engine takes"):
        create(in_channels=2**20, out_channels=2**20, kernel=(side // 64, 1))


def test_sizes_at_the_limit() -> None:
    """2^29 weights: their bytes are more than 32 bits can say."""
    net = create(in_channels=2**9, out_channels=1, kernel=(2**10, 2**10))
    try:
        assert LIBRARY.repvgg_weight_bytes(net, 0, b"direct") >= 4 * 2**29
    finally:
        LIBRARY.repvgg_destroy(net)


def test_null_is_an_error() -> None:
    message = Message()
    room = message.room
    for call in (
        lambda: LIBRARY.repvgg_create(None, 1, OptionsStruct(1, 0, 0, None), *room),
        lambda: LIBRARY.repvgg_create(LayerStruct(), 1, None, *room),
        lambda: LIBRARY.repvgg_output_shape(None, 1, 1, (ctypes.c_int32 * 3)(), *room),
        lambda: LIBRARY.repvgg_run(None, None, None, *room),
        lambda: LIBRARY.repvgg_choose(None, 0, b"direct", *room),
    ):
        with pytest.raises(EngineError, match=r"^no "):
            message.check(call())
    assert LIBRARY.repvgg_isa(None) is None
    assert LIBRARY.repvgg_algorithm(None, 0, 0) is None
    assert LIBRARY.repvgg_weight_bytes(None, 0, None) == 0
    LIBRARY.repvgg_profile(None, None)
    LIBRARY.repvgg_destroy(None)


def test_another_version_of_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI_VERSION", library.ABI_VERSION + 1)
    with pytest.raises(ImportError, match="belongs to another version of repvgg_engine: pip install"):
        library._open()
    monkeypatch.undo()
    monkeypatch.setattr(library, "LayerStruct", OptionsStruct)  # of another size
    with pytest.raises(ImportError, match="belongs to another version of repvgg_engine"):
        library._open()


def test_nothing_else_is_exported() -> None:
    if shutil.which("nm") is None or sys.platform != "linux":
        pytest.skip("needs nm, and Linux")
    done = subprocess.run(["nm", "-D", "--defined-only", library.LIBRARY._name], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in done.stdout.splitlines()]
    assert "repvgg_open" in names
    assert [name for name in names if not name.startswith("repvgg_")] == []


def test_it_can_be_unloaded() -> None:
    """After a call on several threads."""
    if sys.platform != "linux":
        pytest.skip("looks into /proc/self/maps")
    script = f"""
import _ctypes, gc, sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parent), str(Path(library.__file__).parent.parent)]}
from nets import images, plain_net
from repvgg_engine import Net, library
path, net = library.LIBRARY._name, Net(plain_net(), threads=3)
net(images(2))
del net
gc.collect()
def loaded():
    return path in Path("/proc/self/maps").read_text()
assert loaded()
_ctypes.dlclose(library.LIBRARY._handle)
print(loaded())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
