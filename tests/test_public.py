"""The surface that other people build on, and the order of the house: what must not change by accident."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from rounding import rounding

import repvgg

SOURCE = Path(repvgg.__file__).parent
OLD = Path(__file__).parent / "models" / "files" / "version1.safetensors"
LONGEST = 350  # lines of a file
# Rooms from the top of the house down; a room imports only from rooms above it.
ROOMS = (
    *(
        "version",
        "disk",
        "terminal",
        "numerics",
        "fold",
        "measure",
        "models",
        "data",
        "train",
        "deploy",
        "predict",
        "bench",
        "web",
        "paper",
    ),
    *("api", "demo", "cli", "__init__", "__main__"),
)
PUBLIC = {  # DESIGN, section 4: names, and the arguments that are promised
    "list_models": [],
    "create_model": [
        *("name", "num_classes", "in_chans", "deploy", "pretrained", "output_stride", "width", "small_input", "block"),
    ],
    "reparameterize": ["model"],
    "verify": ["input_size"],
    "cost": ["model", "input_size"],
    "save": ["model", "path"],
    "load": ["path"],
    "replace_conv": ["block"],
    "load_engine": ["model", "engine", "precision"],
    "from_pretrained": ["repo_id"],
    "push_to_hub": ["model", "repo_id"],
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there_with_its_arguments(name: str) -> None:
    there = list(inspect.signature(getattr(repvgg, name)).parameters)
    assert [argument for argument in PUBLIC[name] if argument not in there] == []
    assert name in repvgg.__all__
    assert name in dir(repvgg)


def test_the_errors_are_value_errors() -> None:
    assert issubclass(repvgg.ReparamError, ValueError)
    assert issubclass(repvgg.FileError, ValueError)


def test_the_names_of_models() -> None:
    names = repvgg.list_models()
    assert len(names) == len(set(names))
    for name in ("repvgg_a0", "repvgg_b3g4", "repvgg_d2se", "repvgg_b0_residual", "pspnet_repvgg_b1g2_fast", "resnet18", "vgg16"):
        assert name in names
    model = repvgg.create_model("RepVGG-A0", num_classes=2, width=0.0625).eval()
    last, features = model.forward_intermediates(torch.zeros(1, 3, 32, 32))
    assert len(features) == 5
    assert torch.equal(features[-1], last)
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).ndim == 4
    assert "folded" in str(repvgg.reparameterize(model).fold_report)  # all of which mypy and an editor know


def test_a_model_file_of_the_first_version_opens() -> None:
    """Written by the code of commit e8bc8bf, with what it computed for this image."""
    model = repvgg.load(OLD)
    image = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)
    wanted = torch.tensor([[1.7943967580795288, -0.5932219624519348, -0.07142850756645203]])
    assert relative_error(model(image), wanted) <= rounding(model, image)
    manifest = model.manifest
    assert manifest.classes == ["cat", "dog", "owl"]  # type: ignore[union-attr]
    assert manifest.form == "deploy"  # type: ignore[union-attr]
    assert manifest.training == {"val_top1": 0.5}  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------------------------------- the house


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Return the rooms that a file imports from, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "repvgg":
            modules = [node.module] if "." in node.module else [f"repvgg.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.startswith("repvgg.")]
        found |= {module.split(".")[1] for module in modules}
    return found


def test_no_import_runs_up() -> None:
    graph: dict[str, set[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        graph.setdefault(room_of(path), set()).update(imports(path) - {room_of(path)})
    for room in ROOMS:
        if room in graph:
            print(f"{room:10} <- {' '.join(sorted(graph[room], key=ROOMS.index))}")
    assert set(graph) <= set(ROOMS)
    above = {room: set(ROOMS[: ROOMS.index(room)]) for room in graph}
    up = {room: sorted(graph[room] - above[room]) for room in graph if graph[room] - above[room] and room != "__init__"}
    assert up == {}


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(SOURCE)): len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}
