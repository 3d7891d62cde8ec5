"""train/segmentation.py: figures against NumPy, photo and mask moved alike, the loss by hand; training as a user starts it."""

import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomize
from roads import make_camvid
from torch import Tensor, nn
from torchvision.tv_tensors import Mask

from repvgg.data import Source, open_source
from repvgg.data.masks import open_camvid
from repvgg.data.transforms import BadImages
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import zoo
from repvgg.models.load import load, save
from repvgg.models.manifest import Preprocessing
from repvgg.models.views import Views
from repvgg.train.loop import Run, train
from repvgg.train.recipes import Keeping, Recipe, get_recipe
from repvgg.train.segmentation import Overlap, Segmentation
from repvgg.train.session import Session
from repvgg.train.tasks import CLASSIFICATION, task_of

TASK = Segmentation()
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
RECIPE = replace(get_recipe("camvid"), epochs=2, batch_size=4, crop_size=0, warmup_epochs=0, precision="fp32")


@pytest.fixture(scope="module")
def roads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_camvid(tmp_path_factory.mktemp("roads") / "camvid")


@pytest.fixture(scope="module")
def source(roads: Path) -> Source:
    return open_camvid(roads)


# ------------------------------------------------------------------------------------------------------------------ figures


def counted(scores: np.ndarray, masks: np.ndarray) -> tuple[list[float], float, float, float]:
    """IoU of each class, their mean, pixel accuracy and loss, class by class over sets of pixels."""
    classes = scores.shape[1]
    predicted, labelled = scores.argmax(1), masks != 255
    ious = []
    for c in range(classes):
        a, b = (predicted == c) & labelled, (masks == c) & labelled
        union = (a | b).sum()
        ious.append((a & b).sum() / union if union else math.nan)
    x = np.moveaxis(scores, 1, -1)[labelled]
    y = masks[labelled]
    loss = (np.log(np.exp(x).sum(1)) - x[np.arange(len(y)), y]).mean()
    return ious, float(np.nanmean(ious)), float((predicted == masks)[labelled].mean()), float(loss)


@pytest.mark.parametrize("classes", [2, 5, 19])
def test_figures_against_numpy_with_pixels_that_are_ignored(classes: int) -> None:
    random = np.random.default_rng(classes)
    masks = random.integers(0, classes, (6, 13, 17))
    masks[masks == classes - 1] = 0  # a class that is only predicted
    masks[random.random(masks.shape) < 0.3] = 255
    scores = random.normal(size=(6, classes, 13, 17))
    scores[:, 1 % classes] -= 100 * (classes > 2)  # one that is never predicted
    data = [(torch.from_numpy(scores[i : i + 1]), torch.from_numpy(masks[i : i + 1].astype(np.uint8))) for i in range(6)]
    got = TASK.evaluate(lambda x: x, data, classes)
    ious, mean, accuracy, loss = counted(scores, masks)
    assert got.per_class == pytest.approx(ious, abs=1e-12, nan_ok=True)
    assert got.score == pytest.approx(mean, abs=1e-12)
    assert got.pixel_accuracy == pytest.approx(accuracy, abs=1e-12)
    assert got.loss == pytest.approx(loss, rel=1e-9)
    assert (got.images, int(got.confusion.sum())) == (6, int((masks != 255).sum()))


def test_counts_are_exact_beyond_what_float32_holds() -> None:
    confusion = torch.tensor([[2**40 + 1, 1], [2, 2**33]])
    overlap = Overlap(1, 0.0, confusion)
    assert overlap.per_class[0] == (2**40 + 1) / (2**40 + 4)
    assert overlap.pixel_accuracy == (2**40 + 1 + 2**33) / (2**40 + 4 + 2**33)


def test_a_class_that_is_nowhere_does_not_count() -> None:
    overlap = Overlap(1, 0.0, torch.tensor([[6, 2, 0], [0, 4, 0], [0, 0, 0]]))
    assert overlap.per_class[:2] == [6 / 8, 4 / 6]
    assert math.isnan(overlap.per_class[2])
    assert overlap.score == pytest.approx((6 / 8 + 4 / 6) / 2)
    assert str(overlap) == "mean IoU 70.83%, pixel accuracy 83.33% (1 images)"


def test_nothing_to_evaluate_on() -> None:
    with pytest.raises(ValueError, match="no images to evaluate on"):
        TASK.evaluate(lambda x: x, [], 3)
    blank = (torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), 255, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no pixel of them has a label"):
        TASK.evaluate(lambda x: x, [blank], 3)
    with pytest.raises(ValueError, match="the model has 3 classes, the data 4"):
        TASK.evaluate(lambda x: x, [blank], 4)


# --------------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_by_hand() -> None:
    logits, auxiliary = torch.randn(2, 5, 4, 6, dtype=torch.float64), torch.randn(2, 5, 4, 6, dtype=torch.float64)
    mask = torch.randint(5, (2, 4, 6)).to(torch.uint8)
    mask[0, :2] = 255
    means = []
    for x in (logits, auxiliary):
        p = x.log_softmax(1).gather(1, mask.long().clamp(max=4)[:, None])[:, 0]
        means.append(float(-p[mask != 255].mean()))
    recipe = Recipe(auxiliary=0.3)
    assert float(TASK.loss((logits, auxiliary), mask, recipe)) == pytest.approx(means[0] + 0.3 * means[1], rel=1e-12)
    assert float(TASK.loss(logits, mask, recipe)) == pytest.approx(means[0], rel=1e-12)
    right = (logits.argmax(1) == mask)[mask != 255]
    assert float(TASK.right((logits, auxiliary), mask)) == pytest.approx(float(right.double().mean()))


def test_a_crop_without_labels_is_no_loss_and_no_gradient() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    mask = torch.full((1, 4, 4), 255, dtype=torch.uint8)
    loss = TASK.loss((logits, logits), mask, Recipe())
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) == 0
    assert float(TASK.right(logits, mask)) == 0


# --------------------------------------------------------------------------------------------------------------- transforms


def test_photo_and_mask_are_moved_alike() -> None:
    """A photo that is its own mask, in grey levels far apart: after scale, crop and flip it still is, and outside it nothing is."""
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[8:30, 5:25] = 1
    mask[20:36, 30:58] = 2
    photo = (mask * 80).expand(3, -1, -1).contiguous()
    p = Preprocessing((3, 40, 60), 40, mean=(0.9, 0.9, 0.9))
    transform = TASK.train_transform(replace(RECIPE, jitter=0.0), p)
    sizes = set()
    for seed in range(40):
        torch.manual_seed(seed)
        image, moved = transform(photo, Mask(mask))
        assert type(image) is type(moved) is Tensor
        assert (image.shape, moved.shape, moved.dtype) == ((3, 40, 60), (40, 60), torch.uint8)
        assert set(moved.unique().tolist()) <= {0, 1, 2, 255}
        outside = moved == 255
        assert image[:, outside].eq(230).all()
        inside = (image[0].float() / 80).round().clamp(0, 2) == moved
        assert inside[~outside].float().mean() > 0.93  # all but edges, which are blurred
        sizes.add(int((~outside).sum()))
    assert len(sizes) > 6  # of many scales: those below 1 leave a border


def test_jitter_leaves_the_mask_alone_and_the_crop_may_be_smaller() -> None:
    source = Source("", [], [], [], Preprocessing((3, 40, 60), 40))  # type: ignore[arg-type]
    source = TASK.prepared(source, replace(RECIPE, crop_size=32, resize=20))
    assert source.preprocessing.input_size == (3, 20, 30)
    assert source.preprocessing.resize == 20
    transform = TASK.train_transform(replace(RECIPE, jitter=0.9, flip=False), source.preprocessing)
    photo, mask = torch.full((3, 40, 60), 100, dtype=torch.uint8), torch.ones(40, 60, dtype=torch.uint8)
    seen = {int(transform(photo, Mask(mask))[0].max()) for _ in range(10)}
    assert len(seen) > 3


@pytest.mark.parametrize(
    ("recipe", "complaint"),
    [
        ({"crop": "random_resized"}, "--crop random_resized is for labels, .* has masks: --recipe pspnet or camvid"),
        ({"mixup": 0.2}, "--mixup is for labels"),
        ({"auto_augment": True}, "--auto-augment is for labels"),
    ],
)
def test_recipes_for_labels_are_refused(source: Source, recipe: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        train("pspnet_repvgg_micro", source, replace(RECIPE, **recipe), tmp_path / "run", log=print)
    assert not (tmp_path / "run").exists()


def test_labels_and_masks_are_not_mixed_up(source: Source, tmp_path: Path) -> None:
    digits = open_source("digits")
    cases: list[tuple[str, Source, Recipe, str]] = [
        ("repvgg_micro", source, RECIPE, "has masks, which RepVGG does not give: --arch pspnet_repvgg_a0, say"),
        ("pspnet_repvgg_micro", digits, get_recipe("demo"), "digits has labels, and a PSPNet gives masks"),
        ("repvgg_micro", digits, RECIPE, "--crop-size|--jitter is for masks, digits has labels"),
        ("repvgg_micro", digits, replace(get_recipe("demo"), crop="scale"), "--crop scale is for masks"),
    ]
    for arch, data, recipe, complaint in cases:
        with pytest.raises(ValueError, match=complaint):
            train(arch, data, recipe, tmp_path / "run", log=print)
    assert not (tmp_path / "run").exists()
    assert task_of(digits) is CLASSIFICATION
    assert isinstance(task_of(source), Segmentation)


# ----------------------------------------------------------------------------------------------------------------- training


def quick(source: Source, out: Path, **options: Any) -> Run:
    recipe = options.pop("recipe", RECIPE)
    return train("pspnet_repvgg_micro_fast", source, recipe, out, log=lambda line: None, **{"width": 0.25, **options})


@pytest.fixture(scope="module")
def trained(source: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    out = tmp_path_factory.mktemp("masks") / "run"
    return quick(source, out, recipe=replace(RECIPE, epochs=20)), out


def test_it_learns(trained: tuple[Run, Path]) -> None:
    """Sky, road and cars that are told apart by their colour."""
    run, out = trained
    assert run.best.score > 0.6
    assert run.best.score >= run.last.score
    assert run.last.images == 4
    line = [line for line in run.history if "val_mean_iou" in line][-1]
    assert (line["val_mean_iou"], line["val_pixel_accuracy"]) == (run.last.score, run.last.pixel_accuracy)
    steps = [line for line in run.history if "loss" in line]
    assert all(0 <= line["pixel_accuracy"] <= 1 for line in steps)
    assert (out / "curve.png").exists()


def test_files_are_as_good_as_they_say_in_both_forms(trained: tuple[Run, Path], source: Source) -> None:
    run, out = trained
    model = load(out / "last.safetensors")
    manifest = zoo.manifest_of(model)
    assert manifest.classes == source.classes
    assert manifest.preprocessing == TASK.prepared(source, RECIPE).preprocessing
    assert manifest.training["val_mean_iou"] == run.last.score
    deploy = reparameterize(model)
    for form in (model, deploy):
        measured = TASK.evaluate_model(form, source)
        assert measured.score == pytest.approx(run.last.score, abs=2e-3)
    best = TASK.evaluate_model(deploy, source, "test", views=Views(slide=True, scales=(0.75, 1.0), flip=True))
    assert best.images == 3
    assert best.score > 0.4


def test_it_goes_on_where_it_was(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    whole = quick(source, tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "_evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quick(source, tmp_path / "b", keeping=Keeping(save_steps=1))
    again, other = quick(source, tmp_path / "b"), quick(source, tmp_path / "c", workers=1)
    resumed = [line["resumed_from"] for line in again.history if "resumed_from" in line]
    assert resumed
    assert min(resumed) > 0
    for run in (again, other):
        assert len([line for line in run.history if "val_mean_iou" in line]) == 2
        assert same(whole, run)
    finished = quick(source, tmp_path / "a")
    assert torch.equal(finished.last.confusion, whole.last.confusion)
    assert finished.best.score == whole.best.score


def same(a: Run, b: Run) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))


def test_a_photo_that_cannot_be_read_is_skipped_when_asked(tmp_path: Path) -> None:
    root = make_camvid(tmp_path / "camvid")
    source = open_camvid(root)
    for split in ("train", "val"):
        (root / split / f"{split}_002.png").write_bytes(b"damaged since")
    run = quick(source, tmp_path / "run", keeping=Keeping(on_bad_image="skip"))
    assert run.last.images == 3
    assert len((tmp_path / "run/bad_images.txt").read_text().splitlines()) >= 2
    assert TASK.evaluate_model(run.model, source, bad=BadImages(tmp_path / "bad.txt", replace=False)).images == 3


def test_from_a_classifiers_weights_and_from_masks_to_other_masks(
    source: Source, trained: tuple[Run, Path], tmp_path: Path
) -> None:
    classifier = randomize(zoo.create_model("repvgg_micro", num_classes=7, width=0.25))
    save(classifier, tmp_path / "classifier.safetensors")
    said: list[str] = []
    one = replace(RECIPE, epochs=1, lr=1e-30, weight_decay=0.0)  # nothing moves but statistics
    arch = "pspnet_repvgg_micro_fast"
    train(arch, source, one, tmp_path / "a", init=str(tmp_path / "classifier.safetensors"), log=said.append)
    assert any("tensors in the backbone; left out: head.bias, head.weight" in line for line in said)
    model = load(tmp_path / "a/last.safetensors")
    assert zoo.manifest_of(model).arch["width"] == 0.25  # type: ignore[index]
    given = classifier.state_dict()
    for name, tensor in model.get_submodule("backbone").state_dict().items():
        assert name.endswith(STATISTICS) or torch.equal(tensor, given[name]), name
    fewer = replace(source, classes=[*source.classes, "another"])
    train(arch, fewer, one, tmp_path / "b", init=str(trained[1] / "best.safetensors"), log=said.append)
    assert "new head: 12 classes instead of 11" in said
    first, second = (load(file).state_dict() for file in (trained[1] / "best.safetensors", tmp_path / "b/last.safetensors"))
    kept = [name for name in first if not name.endswith(STATISTICS) and "classifier" not in name]
    assert {name.partition(".")[0] for name in kept} >= {"backbone", "pyramid", "head"}
    assert all(torch.equal(first[name], second[name]) for name in kept)
    with pytest.raises(ValueError, match="holds repvgg_micro, not pspnet_repvgg_a0"):
        train("pspnet_repvgg_a0", source, one, tmp_path / "c", init=str(tmp_path / "classifier.safetensors"), log=said.append)


def test_the_head_learns_faster_where_asked(source: Source) -> None:
    from repvgg.train.optimizer import parameter_groups

    model = zoo.create_model("pspnet_repvgg_micro", num_classes=3, width=0.125)
    names = {p: name for name, p in model.named_parameters()}
    groups = parameter_groups(model, Recipe(head_lr=10))
    scale = {names[p]: g["lr_scale"] for g in groups for p in g["params"]}
    assert {s for name, s in scale.items() if name.startswith("backbone.")} == {1}
    assert {s for name, s in scale.items() if not name.startswith("backbone.")} == {10}
    with pytest.raises(ValueError, match="--head-lr"):
        parameter_groups(nn.Linear(2, 2), Recipe(head_lr=10))


SCRIPT = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from repvgg.models import zoo
from repvgg.data.masks import open_camvid
from repvgg.train.distributed import joined
from repvgg.train.segmentation import Segmentation
with joined("cpu") as world:
    task, source = Segmentation(), open_camvid(Path(sys.argv[1]))
    torch.manual_seed(0)
    model = zoo.create_model("pspnet_repvgg_micro", num_classes=11, width=0.125).eval()
    found = task.evaluate(model, task.batches(source.split("test"), source.preprocessing, world=world), 11, world)
    figures = {"score": found.score, "loss": found.loss, "images": found.images}
    found = {"confusion": found.confusion, **{name: torch.tensor(x, dtype=torch.float64) for name, x in figures.items()}}
    save_file(found, Path(sys.argv[2]) / f"{world.rank}-of-{world.size}.safetensors")
"""


@pytest.mark.slow  # test_distributed.py: test_two_processes_equal_one proves the point on labels
def test_one_and_two_processes_agree_exactly(roads: Path, source: Source, tmp_path: Path) -> None:
    """Three photos, which two processes do not divide."""
    from safetensors.torch import load_file

    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = f"--nproc-per-node 2 --master-addr 127.0.0.1 --master-port {port}"
    command = [sys.executable, "-m", "torch.distributed.run", *where.split(), str(script), str(roads), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    model = zoo.create_model("pspnet_repvgg_micro", num_classes=11, width=0.125).eval()
    alone = TASK.evaluate(model, TASK.batches(source.split("test"), source.preprocessing), 11)
    assert alone.images == 3
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}-of-2.safetensors")
        assert torch.equal(found["confusion"], alone.confusion)
        assert (float(found["score"]), int(found["images"])) == (alone.score, 3)
        assert float(found["loss"]) == pytest.approx(alone.loss, rel=1e-9)  # which any photo beside another's mask moves
