# ruff: noqa: RUF001
import io
import re
from collections import Counter

import pytest
import torch
from matplotlib.figure import Figure
from rounding import REPORTED
from torch import nn

from repvgg.fold.blocks import BLOCKS
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.names import FAMILY, Member
from repvgg.models.repvgg import RepVGG
from repvgg.paper import figure2
from repvgg.paper.result import PaperSettings

SMALL = Member((1, 2, 5, 1), 0.25, 0.25)


def both_forms(member: Member = SMALL, **arguments: object) -> tuple[RepVGG, RepVGG]:
    model = RepVGG(member, 10, **arguments).eval()  # type: ignore[arg-type]
    deploy = reparameterize(model)
    assert isinstance(deploy, RepVGG)
    return model, deploy


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_boxes_are_the_modules_of_the_first_four_layers_of_the_deepest_stage() -> None:
    model, deploy = both_forms()
    shown = [layer for form in (model, deploy) for layer in list(form.stages[2].children())[:4]]
    modules = [m for layer in shown for m in layer.modules()]
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]
    kernels = Counter(f"{m.kernel_size[0]}×{m.kernel_size[1]}" for m in convolutions)
    found = Counter(words(figure2.draw(model, deploy)))
    assert {name: found[name] for name in kernels} == kernels == {"3×3": 8, "1×1": 4}
    assert found["BN"] == sum(isinstance(m, nn.BatchNorm2d) for m in modules) == 11
    assert (
        found["identity"] == sum(type(m) is nn.BatchNorm2d for layer in shown for m in layer.get_submodule("block").children()) == 3
    )
    assert found["ReLU"] == 8
    assert found["stride 2"] == sum(m.stride == (2, 2) for m in convolutions) == 3


@pytest.mark.parametrize(
    ("member", "arguments", "present", "absent"),
    [
        (SMALL, {"block": "plain"}, "BN", "1×1"),
        (SMALL, {"block": "no_identity"}, "1×1", "identity"),
        (SMALL, {"block": "no_1x1"}, "identity", "1×1"),
        (SMALL, {"output_stride": 8}, "dilation 2", "stride 2"),
        (Member((1, 2, 4, 1), 0.25, 0.25, groups=4), {}, "groups 4", "groups 2"),
        (Member((1, 2, 4, 1), 0.25, 0.25, groups=4), {"output_stride": 8}, "d2 g4", "s2"),
        (Member((1, 1, 2, 1), 0.25, 0.25, squeeze_excite=True), {}, "SE", "layer 3"),
    ],
)
def test_draws_what_the_modules_have(member: Member, arguments: dict[str, object], present: str, absent: str) -> None:
    found = words(figure2.draw(*both_forms(member, **arguments)))
    assert present in found
    assert absent not in found


def test_states_the_parameters_of_both_forms() -> None:
    model, deploy = both_forms(FAMILY["repvgg_micro"], width=0.5)
    numbers = re.findall(r"([\d,]+) parameters", " ".join(words(figure2.draw(model, deploy))))
    assert [int(n.replace(",", "")) for n in numbers] == [sum(p.numel() for p in m.parameters()) for m in (model, deploy)]


def test_refuses_models_in_the_wrong_form() -> None:
    model, deploy = both_forms()
    for pair in ((model, model), (deploy, deploy), (deploy, model)):
        with pytest.raises(ValueError, match=r"^[^\n]*figure 2[^\n]*$"):
            figure2.draw(*pair)
    with pytest.raises(ValueError, match="not the first in deploy form"):
        figure2.draw(model, both_forms(Member((1, 2, 4, 1), 0.25, 0.25))[1])


def test_leaves_the_models_as_they_were_and_saves_as_svg_and_png() -> None:
    model, deploy = both_forms()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    figure = figure2.draw(model, deploy)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for kind in ("svg", "png"):
        file = io.BytesIO()
        figure.savefig(file, format=kind)
        assert file.getvalue()


def test_run_draws_a_network_of_the_family_and_states_its_fold() -> None:
    result = figure2.run(PaperSettings())
    assert result.data["parameters"] == {"training": 9_108_968, "deploy": 8_309_384}
    assert 0 < result.data["max_rel_err"] < REPORTED
    assert "9,108,968 parameters" in " ".join(words(result.figures["figure2"]))


@pytest.mark.parametrize(
    ("name", "boxes"),
    [
        ("repvgg", ["3×3", "BN", "1×1", "BN", "identity", "BN", "folds into", "3×3"]),
        ("plain", ["3×3", "BN", "folds into", "3×3"]),
        ("qarepvgg", ["3×3", "BN", "1×1", "identity", "BN", "folds into", "3×3"]),
        ("dirac", ["3×3", "aI + bW/|W|", "BN", "folds into", "3×3"]),
        (
            "relu_in_branch",
            [
                *["3×3", "BN", "ReLU", "1×1", "BN", "ReLU", "identity", "BN", "ReLU"],
                "cannot be folded: ReLU is not known to be linear",
            ],
        ),
        (
            "dbb",
            [
                *["3×3", "BN", "1×1", "BN", "1×1", "I + W", "BN", "3×3", "BN", "1×1", "BN", "average", "3×3", "BN"],
                "folds into",
                "3×3",
            ],
        ),
    ],
)
def test_one_block_alone(name: str, boxes: list[str]) -> None:
    figure = figure2.draw_block(BLOCKS[name](4, 4))
    assert sorted(words(figure)) == sorted(boxes)
    width, height = figure.get_size_inches() * figure.dpi
    for text in figure.axes[0].texts:
        x, y = text.get_position()
        assert 0 < x < width
        assert 0 < y < height


def test_what_a_block_folds_into_is_drawn_from_it() -> None:
    found = words(figure2.draw_block(BLOCKS["acb"](4, 8, stride=2)))
    assert found.count("stride 2") == 4
    assert {"1×3", "3×1"} < set(found)


def test_operators_of_a_block_are_as_many_as_the_paper_says() -> None:
    pytest.importorskip("timm")
    _, deploy = both_forms()
    rows = {network: (paper, here) for network, paper, here in figure2._fragments(deploy).rows}
    assert rows == {"NASNet-A": (13, None), "ResNet-18": (2, 2), "ResNet-50": (3, 3), "RepVGG, deploy form": (1, 1)}
