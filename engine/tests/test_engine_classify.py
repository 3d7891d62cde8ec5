"""The example in C on a model file, beside Python on the same; and what strangers and careless programs may try."""

import ctypes
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("repvgg_engine", exc_type=ImportError)
pytest.importorskip("PIL")

import repvgg_engine
from nets import PREPROCESSING, OpenOptionsStruct, model_file, plain_net
from PIL import Image
from repvgg_engine import EngineError, Plan, load
from repvgg_engine.__main__ import main
from repvgg_engine.files import Preprocessing
from repvgg_engine.images import prepare, read_image
from repvgg_engine.layers import Layer
from repvgg_engine.library import LIBRARY, DescriptionStruct, Message

EXAMPLE = Path(__file__).parent.parent / "examples/classify.c"
CLASSES = [f"class number {i}" for i in range(10)]


def photo(seed: int, height: int = 41, width: int = 57) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def classify(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    program, package = tmp_path_factory.mktemp("example") / "classify", Path(repvgg_engine.__file__).parent
    where: list[str | Path] = ["-I", package, f"-L{package}", "-lrepvgg_engine", f"-Wl,-rpath,{package}"]
    subprocess.run([compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", EXAMPLE, *where, "-o", program], check=True)
    return program


def said(classify: Path, *words: Path) -> tuple[int, str]:
    done = subprocess.run([classify, *words], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_photos_in_c_and_in_python(classify: Path, tmp_path: Path) -> None:
    model, file = model_file(tmp_path / "net.safetensors", plain_net(), classes=CLASSES), tmp_path / "photo.ppm"
    net, found = load(model, accuracy="exact", threads=1), set()
    plan = Plan(net.isa, "fp32", tuple(names[-1] if names else "" for names in net.known))
    (tmp_path / "plan.json").write_text(plan.to_json())
    for seed in range(6):
        photo(seed).save(file)
        assert net.preprocessing is not None
        best = CLASSES[int(net(read_image(file, net.preprocessing)[None]).argmax())]
        labels = net.classify(file, top=len(CLASSES))
        assert labels[0][0] == best
        assert sum(share for _, share in labels) == pytest.approx(1)
        assert net.classify(file.read_bytes(), 1) == labels[:1]
        assert said(classify, model, file) == (0, f"{best}\n")
        assert said(classify, model, file, tmp_path / "plan.json") == (0, f"{best}\n")
        file.write_bytes(file.read_bytes().replace(b"P6\n57 41\n", b"P6\n# GIMP writes one\n#\n57 #7 8 9\n41\n", 1))
        assert said(classify, model, file) == (0, f"{best}\n")
        found.add(best)
    assert len(found) > 1


def test_what_the_example_refuses(classify: Path, tmp_path: Path) -> None:
    model, file = model_file(tmp_path / "net.safetensors", plain_net()), tmp_path / "photo.ppm"
    photo(0).save(file)
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "short.json").write_text(Plan("portable", "fp32", ("direct",)).to_json())
    for words, reason in (
        ((tmp_path / "none", file), "No such file"),
        ((file, file), "is not a safetensors file"),
        ((model, model), "no photo that can be read"),
        ((model, file, tmp_path / "plan.json"), "plan.json: lacks 'repvgg_engine_plan'"),
        ((model, file, tmp_path / "short.json"), "the plan is of 1 layers, the net has 8"),
    ):
        code, text = said(classify, *words)
        assert code == 2
        assert reason in text
        assert text.count("\n") == 1


def test_names_of_strangers_do_not_steer_the_terminal(
    classify: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_file(tmp_path / "net.safetensors", plain_net(), classes=[f"\x1b[2Jcaf\xe9 {i}" for i in range(10)])
    image, bad = (tmp_path / os.fsdecode(name) for name in (b"\x1b]0;a\xff.ppm", b"\x1b[2J.ppm"))
    photo(0).save(image, "ppm")
    plan = Plan("portable", "fp32", ("",) * 8).to_json()
    (tmp_path / "plan.json").write_text(plan.replace("portable", "\\u001b[2J"))
    main(["predict", str(model), str(image), "--accuracy", "exact"])
    assert "?[2Jcaf\xe9 " in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(out := io.BytesIO(), "ascii"))
        main(["predict", str(model), str(image), "--accuracy", "exact"])
        assert rb"?[2Jcaf\xe9 " in out.getvalue()
    for words in ([str(bad)], [str(image), "--plan", str(tmp_path / "plan.json")]):
        with pytest.raises(SystemExit, match="2"):
            main(["predict", str(model), *words, "--accuracy", "exact"])
        shown = capsys.readouterr()
        assert shown.out + shown.err == shown.err.replace("\x1b", "?")
    image.rename(tmp_path / "photo.ppm")
    code, text = said(classify, model, tmp_path / "photo.ppm")
    assert (code, text[:9]) == (0, "?[2Jcaf\xe9 ")


def test_a_reader_that_has_left_is_no_error(tmp_path: Path) -> None:
    model, file = model_file(tmp_path / "net.safetensors", plain_net()), tmp_path / "photo.png"
    photo(0).save(file)
    words: list[str | Path] = [sys.executable, "-m", "repvgg_engine", "predict", model, file, "--accuracy", "exact"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("layers", [plain_net()[:-1], plain_net()[:-2]])  # features, pooled or as a map
def test_a_backbone_has_no_labels(classify: Path, layers: list[Layer], tmp_path: Path, capsys: Any) -> None:
    model, file = model_file(tmp_path / "net.safetensors", layers), tmp_path / "photo.ppm"
    photo(0).save(file)
    reason = "a backbone, which gives no labels: train a head on it first\n"
    with pytest.raises(SystemExit, match="2"):
        main(["predict", str(model), str(file), "--accuracy", "exact"])
    assert capsys.readouterr() == ("", f"repvgg_engine: {reason}")
    assert said(classify, model, file) == (2, f"classify: {reason}")


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(41, 57), (20, 31), (700, 20), (9, 400), (32, 32), (33, 55), (36, 41)])
def test_an_image_is_resized_as_torchvision_does_it(interpolation: str, size: tuple[int, int]) -> None:
    """To a shorter side of 36, and cropped to 32 x 44: larger than the resized image in one direction. Pillow does that for
    torchvision too, so it is the same to the bit."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    image, longest = photo(1, *size), 32 * min(size)
    trimmed = v2.CenterCrop([min(side, longest) for side in size])(image)
    wanted = v2.CenterCrop((32, 44))(v2.Resize(36, interpolation=v2.InterpolationMode(interpolation))(trimmed))
    p = Preprocessing(32, 44, 36, interpolation, PREPROCESSING.mean, PREPROCESSING.std)
    assert np.array_equal(prepare(np.asarray(image), p), np.asarray(wanted))


def test_images_that_cannot_be_prepared() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    for p in (
        Preprocessing(32, 32, 32, "lanczos", (0.5,), (0.5,)),
        Preprocessing(0, 32, 32, "bilinear", (0.5,), (0.5,)),
        Preprocessing(32, 32, 2**30, "bilinear", (0.5,), (0.5,)),
    ):
        with pytest.raises(EngineError):
            prepare(image, p)


def test_an_image_that_takes_too_much_memory() -> None:
    with pytest.raises(EngineError, match="more than 2 GiB while it is resized"):
        prepare(np.zeros((1, 1, 33), np.uint8), Preprocessing(8192, 8192, 8192, "nearest", (0.5,), (0.5,)))


def pictures() -> dict[str, Image.Image]:
    """One of each kind that is no plain RGB."""
    random = np.random.default_rng(0)
    colours, alpha = (random.integers(0, 256, (32, 32, n), np.uint8) for n in (3, 1))
    deep = random.integers(0, 65536, (32, 32), np.uint16)
    palette = Image.fromarray(colours).quantize(16)
    palette.info["transparency"] = 3
    return {
        "RGBA": Image.fromarray(np.concatenate([colours, alpha], 2)),
        "LA": Image.fromarray(np.concatenate([colours[..., :1], alpha], 2)),
        "P": palette,
        "I;16": Image.fromarray(deep),
        "F": Image.fromarray(deep.astype(np.float32) / 65535),
        "1": Image.fromarray(colours[..., 0]).convert("1"),
        "CMYK": Image.fromarray(colours).convert("CMYK"),
    }


@pytest.mark.parametrize("mode", list(pictures()))
def test_pictures_of_other_kinds(mode: str, tmp_path: Path) -> None:
    """On white where they are transparent; 16 bits and floats from black to white."""
    image, file = pictures()[mode], tmp_path / "picture.tiff" if mode in ("F", "CMYK") else tmp_path / "picture.png"
    assert image.mode == mode
    image.save(file)
    wanted = np.asarray(image.convert("RGBA"), np.float64)
    if mode in ("I;16", "F"):
        grey = np.asarray(image, np.float64)
        wanted = np.repeat(grey[..., None] * (255 / 65535 if mode == "I;16" else 255), 4, 2)
        wanted[..., 3] = 255
    share = wanted[..., 3:] / 255
    got = read_image(file, PREPROCESSING)
    assert np.abs(got - (wanted[..., :3] * share + 255 * (1 - share))).max() <= 1
    repvgg_images = pytest.importorskip("repvgg.data.images")
    assert np.array_equal(got, repvgg_images.decode(file).permute(1, 2, 0).numpy())


def test_a_description_of_an_older_program() -> None:
    """Without what it does not use."""
    pixels, out, message = np.zeros((4, 4, 3), np.uint8), np.ones((2, 2, 3), np.uint8), Message()
    about = DescriptionStruct(channels=3, height=2, width=2, resize=2, interpolation=b"nearest")
    for size in (DescriptionStruct.classes.offset, ctypes.sizeof(DescriptionStruct)):
        about.size = size
        message.check(LIBRARY.repvgg_prepare(about, pixels.ctypes.data, 4, 4, out.ctypes.data, *message.room))
        assert not out.any()
        out[:] = 1
    for size, reason in ((0, "a description without its size"), (5000, "a description that this version"), (16, "no description")):
        about.size = size
        with pytest.raises(EngineError, match=reason):
            message.check(LIBRARY.repvgg_prepare(about, pixels.ctypes.data, 4, 4, out.ctypes.data, *message.room))


class LaterOptions(OpenOptionsStruct):
    _fields_ = [("of_a_later_version", ctypes.c_int64)]


def opened(path: Path | None, **options: object) -> int | None:
    """Open a model by the C interface and close it; what it says if it refuses."""
    message, given = Message(), LaterOptions(**{"size": ctypes.sizeof(LaterOptions), **options})  # type: ignore[arg-type]
    net = LIBRARY.repvgg_open(str(path).encode() if path else None, given, *message.room)
    message.check(net)
    shape = (ctypes.c_int32 * 3)()
    message.check(LIBRARY.repvgg_output_shape(net, 32, 32, shape, *message.room))
    LIBRARY.repvgg_destroy(net)
    return int(shape[0])


def test_options_of_other_versions(tmp_path: Path) -> None:
    path = model_file(tmp_path / "net.safetensors", plain_net())
    assert opened(path) == 10
    assert opened(path, threads=2, features=1) == 48
    assert opened(path, size=OpenOptionsStruct.threads.offset, threads=-1) == 10  # an older program's, without threads
    for options, reason in (
        ({"of_a_later_version": 1}, "options that this version of the library does not know"),
        ({"size": 0}, "a struct of options without its size"),
        ({"threads": -1}, "threads is -1"),
        ({"isa": b"none"}, "none"),
        ({"plan": str(tmp_path).encode()}, "is a folder"),
        ({"plan_text": b"[]"}, "lacks 'repvgg_engine_plan'"),
        ({"plan_text": json.dumps({"repvgg_engine_plan": 2}).encode()}, "another version"),
    ):
        with pytest.raises(EngineError, match=reason):
            opened(path, **options)
    with pytest.raises(EngineError, match="no path"):
        opened(None)


def test_null_is_an_error() -> None:
    message = Message()
    LIBRARY.repvgg_free(None)
    assert LIBRARY.repvgg_describe(None, None) == -1
    for call in (
        lambda: LIBRARY.repvgg_read(None, *message.room),
        lambda: LIBRARY.repvgg_prepare(None, None, 1, 1, None, *message.room),
    ):
        with pytest.raises(EngineError, match="no "):
            message.check(call())
