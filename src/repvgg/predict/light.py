"""Labels of a few photos without PyTorch, whose import takes seconds: a deploy form in the native engine, an .onnx file in its own.

Only the usual is done here. Whatever is not (a training form, many images, a palette image, a damaged one, an output that is not
finite) is left to labels.py, which gives the same answers, or says what is wrong.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from repvgg.models.names import embedded
from repvgg.predict.paths import expand
from repvgg.predict.prediction import Prediction

MOST_IMAGES = 32  # for more, the native engine is better opened by its algorithms' measured choice
MOST_PIXELS = 25_000_000
NVIDIA = Path("/proc/driver/nvidia/version")  # there with its driver
LONGEST = 32  # times the short side, as data/transforms.py trims
FILTERS = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers

# (images uint8 [N, H, W, C]) -> logits [N, classes], the manifest's preprocessing and classes, the engine's name
Opened = tuple[Callable[[Any], Any], Any, "list[str] | None", str]


def predict_lightly(model: str, images: Sequence[str], top: int = 5, engine: str = "", device: str = "") -> list[Prediction] | None:
    """Return predictions for files, folders and globs; None for whatever is not done here."""
    if top < 1 or device not in ("", "cpu") or (not device and NVIDIA.exists()):  # a GPU is the default device where there is one
        return None
    try:
        paths = expand(images)
        if not 0 < len(paths) <= MOST_IMAGES:
            return None
        run, preprocessing, classes, name = _opened(embedded(model) or Path(model), engine)
        import numpy as np

        logits = run(np.stack([_prepared(Path(path), preprocessing) for path in paths])).astype("f8")
        if not np.isfinite(logits).all():
            return None
    except Exception:  # of Pillow or an engine, on whatever is damaged: labels.py says it well
        return None
    powers = np.exp(logits - logits.max(1, keepdims=True))
    names = classes or [str(i) for i in range(logits.shape[1])]
    answers = []
    for path, row in zip(paths, powers / powers.sum(1, keepdims=True), strict=True):
        best = np.argsort(-row, kind="stable")[:top]
        answers.append(Prediction(path, [(names[i], float(row[i])) for i in best], engine=name))
    return answers


def _opened(model: Path, engine: str) -> Opened:
    """Open a file. Raises anything for one that is not run here."""
    if model.suffix == ".safetensors" and engine in ("", "native") and find_spec("repvgg_engine"):
        return _native(model)
    if model.suffix == ".onnx" and engine in ("", "onnxruntime"):
        return _onnx(model)
    raise ValueError("of another kind")


def _native(model: Path) -> Opened:
    from repvgg_engine import load
    from repvgg_engine.layers import Pool

    # Every convolution computed directly: nothing is measured first, which takes longer than a few images do.
    net = load(model, accuracy="exact")
    p = net.preprocessing
    if p is None or not any(isinstance(layer, Pool) for layer in net.layers[:-1]):
        raise ValueError("a backbone has no labels")
    if any(getattr(layer, "largest_input", 0) for layer in net.layers):
        raise ValueError("calibrated: it is to be said which precision is meant")

    def run(images: Any) -> Any:
        return net.run(images)

    return run, (p.height, p.width, p.resize, p.interpolation, len(p.mean)), net.classes, "native"


def _onnx(model: Path) -> Opened:
    import numpy as np
    import onnxruntime

    from repvgg.models.manifest import Manifest

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    manifest = Manifest.from_json(session.get_modelmeta().custom_metadata_map["repvgg"])
    images = session.get_inputs()[0]
    p = manifest.preprocessing
    if images.type != "tensor(float)" or isinstance(images.shape[0], int) or manifest.task != "labels" or not manifest.outputs:
        raise ValueError("takes something else than a batch of normalised images")
    mean, std = (np.array([255 * x for x in values], np.float32) for values in (p.mean, p.std))

    def run(pixels: Any) -> Any:
        x = ((pixels - mean) / std).transpose(0, 3, 1, 2)
        return session.run(None, {images.name: np.ascontiguousarray(x, np.float32)})[0]

    channels, height, width = p.input_size
    return run, (height, width, p.resize, p.interpolation, channels), manifest.classes, "onnxruntime"


def _prepared(path: Path, preprocessing: tuple[int, int, int, str, int]) -> Any:
    """Return a photo as uint8 [H, W, C], resized and cropped as data/transforms.py does. Raises anything for an unusual one."""
    import numpy as np
    from PIL import Image, ImageOps

    height, width, resize, interpolation, channels = preprocessing
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("unusual")
    with Image.open(path, formats=("JPEG", "PNG")) as opened:
        if opened.mode not in ("L", "RGB") or "transparency" in opened.info or opened.width * opened.height > MOST_PIXELS:
            raise ValueError("unusual")
        image = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
    short, long = sorted(image.size)
    if long > LONGEST * short:
        raise ValueError("unusual")
    other = int(resize * long / short)
    size = (resize, other) if image.width <= image.height else (other, resize)
    if size[0] < width or size[1] < height:
        raise ValueError("unusual")
    if size != image.size:
        image = image.resize(size, FILTERS[interpolation])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height)), np.uint8).reshape(height, width, channels)
