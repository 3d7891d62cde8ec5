"""trace.py: whatever forwards do with their parts, a network that is folded or given blocks computes the same."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import randomize, relative_error
from folding import EXACT, SMALL, Siblings, outputs, report_of
from forwards import ODD, Keeps, KeptOnItself, RawArgument, UNet, Untraceable, Whole
from torch import Tensor, nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.blocks import repvgg, with_bn
from repvgg.fold.reparameterize import reparameterize
from repvgg.fold.replace import replace_conv
from repvgg.fold.seen import kept
from repvgg.fold.trace import trace


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """In float64 and eval mode, on random statistics, whether its forward calls its batch norms or not."""
    model = make()
    model.train()(torch.randn(SMALL))
    model = randomize(model, SMALL).double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = torch.linspace(-1, 1, norm.num_features).double()
    return model


@pytest.mark.filterwarnings("ignore:.*so nothing was replaced")
@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize("change", [reparameterize, replace_conv])
def test_what_forwards_do_with_their_parts_is_kept(make: type[nn.Module], change: Callable[[nn.Module], nn.Module]) -> None:
    model = built(make)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert relative_error(outputs(change(model), x), outputs(model, x)) <= EXACT


def test_a_u_net_on_our_backbone() -> None:
    model = randomize(built(UNet), (8, 3, 32, 32))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    folded = reparameterize(model)
    assert len(report_of(folded).blocks) == 10
    assert report_of(folded).left.keys() == {"up.bn"}
    assert relative_error(outputs(folded, x), outputs(model, x)) <= EXACT


def test_below_something_untraceable_only_declared_blocks_fold() -> None:
    class Root(Untraceable):
        def __init__(self) -> None:
            super().__init__()
            self.block = repvgg(3, 3)

        def odd(self, x: Tensor) -> Tensor:
            return self.block(self.stem(x)) + self.part(x)  # type: ignore[no-any-return]

    report = report_of(reparameterize(built(Root)))
    assert (report.blocks, report.pairs) == (["block"], [])
    why = "Root cannot be traced (it takes a number out of a value)"
    assert report.left == {"part.bn": why, "stem.1": why}


def test_a_long_reason_ends_at_a_word() -> None:
    class Loops(Untraceable):
        def forward(self, x: Tensor) -> Tensor:
            return self.part(torch.stack(list(self.stem(x))))  # type: ignore[no-any-return]

    (why,) = set(report_of(reparameterize(built(Loops))).left.values())
    assert why == "Loops cannot be traced (Proxy object cannot be iterated. This can be attempted when the Proxy is ...)"


def test_a_block_that_somebody_looks_into_is_left() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = repvgg(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) + self.block.conv_1x1.conv(x)  # type: ignore[no-any-return, operator, union-attr]

    model = built(Looks)
    folded = reparameterize(model)
    assert report_of(folded).blocks == []
    assert report_of(folded).left["block"] == "is not only called as a whole: Looks uses its `conv_1x1`"
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert relative_error(outputs(folded, x), outputs(model, x)) <= EXACT


def test_graphs_are_there_for_each_way_of_calling() -> None:
    traces = trace(RawArgument().eval())
    assert [len(traces.graphs[path]) for path in ("", "part")] == [1, 2]
    assert traces.uses["part"] == 2
    assert traces.uses["part.conv"] == traces.uses["part.bn"] == 1
    assert traces.hidden.keys() == {"stem", "stem.0", "stem.1"}
    assert any(node.target is kept for node in trace(KeptOnItself().eval()).graphs.get("part", [])[0].nodes)


def test_a_trace_leaves_no_trace() -> None:
    model = Keeps().eval()
    before = dict(vars(model))
    trace(model)
    assert vars(model) == before
    assert "__getattribute__" not in vars(nn.Module)


def test_the_mode_of_a_copy_is_that_of_its_original() -> None:
    """torch.fx's deep copy of a feature extractor comes back in train mode."""
    torchvision = pytest.importorskip("torchvision")
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    net = randomize(torchvision.models.resnet18().double(), (4, 3, 64, 64))
    model = extraction.create_feature_extractor(net, {"layer2": "a", "layer4": "b"}).eval()
    folded = reparameterize(model, torch.randn(2, 3, 64, 64))
    assert not any(m.training for m in folded.modules())
    assert len(report_of(folded).pairs) == 20
    assert report_of(folded).whole.ok  # type: ignore[union-attr]


def test_a_wrong_reader_is_found_by_the_whole() -> None:
    """A pre-hook changes the arguments, which no trace sees; the whole does, and bisection names the part."""

    class Hooked(Whole):
        def forward(self, x: Tensor) -> Tensor:
            return self.part(self.stem(x))  # type: ignore[no-any-return]

    model = built(Hooked)
    model.get_submodule("part").register_forward_pre_hook(lambda m, args, kwargs: (args, {"raw": True}), with_kwargs=True)
    with pytest.raises(
        ReparamError, match=r"^part\.conv: the model computes something else once this is folded \(NOT EQUAL in float64"
    ):
        reparameterize(model, torch.randn(2, 3, 8, 8))
    assert report_of(reparameterize(built(Hooked), torch.randn(2, 3, 8, 8))).whole.ok  # type: ignore[union-attr]


def test_the_report_says_whether_the_whole_was_checked() -> None:
    pair = randomize(with_bn(nn.Conv2d(3, 4, 3)), SMALL)
    assert "\nthe whole: not checked, only its parts; pass an example input" in str(report_of(reparameterize(pair)))
    assert "\nthe whole: equal in float32: relative error" in str(report_of(reparameterize(pair, torch.randn(SMALL))))


class MakesAModule(Siblings):
    """Its forward puts its parts into a module that it makes as it runs, and reads of that: no module of the tree."""

    def forward(self, x: Tensor) -> Tensor:
        row = nn.Sequential(self.conv, self.bn)
        out: Tensor = row(x) if len(row) == 2 and not row.training else x
        return out


def test_a_module_that_a_forward_makes_is_no_part_of_the_tree() -> None:
    net, x = built(MakesAModule), torch.randn(SMALL).double()
    assert relative_error(outputs(reparameterize(net), x), outputs(net, x)) <= EXACT


class Routed(nn.Module):
    """Layers that say in lists where their inputs come from, as YOLO's do; `grows`: and a forward that changes them."""

    def __init__(self, grows: bool = False) -> None:
        super().__init__()
        self.layers, self.grows = nn.ModuleList(Siblings(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2)), grows
        for layer in self.layers:
            layer.inputs = [-1]  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer in self.layers:
            inputs: Any = layer.inputs
            if self.grows:
                inputs.append(0)
            seen.append(layer(sum(seen[i] for i in inputs)))
        return seen[-1]


def test_a_list_that_is_read_is_not_one_that_is_changed() -> None:
    net, x = randomize(Routed(), SMALL).double(), torch.randn(SMALL).double()
    folded = reparameterize(net)
    assert len(report_of(folded).pairs) == 2
    assert relative_error(outputs(folded, x), outputs(net, x)) <= EXACT
    assert len(report_of(reparameterize(randomize(Routed(grows=True), SMALL))).pairs) == 0


def test_one_thread_traces_at_a_time() -> None:
    """Tracing changes `nn.Module` and fx for as long as it lasts."""
    order: list[int] = []
    second_is_in = threading.Event()

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if order:
                second_is_in.set()
            order.append(threading.get_ident())
            second_is_in.wait(0.3)  # which is over before the second comes, where it may not
            order.append(threading.get_ident())
            return x + 1

    threads = [threading.Thread(target=trace, args=(Waits(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    turns = [ident for ident, before in zip(order, [None, *order], strict=False) if ident != before]
    assert len(turns) == 2


def test_models_of_other_threads_work_meanwhile() -> None:
    """What tracing changes, it changes in all threads: theirs call modules and read parameters as ever."""
    in_forward, called = threading.Event(), threading.Event()

    class Waits(Siblings):
        def forward(self, x: Tensor) -> Tensor:
            in_forward.set()
            assert called.wait(30)
            return super().forward(x)

    def elsewhere() -> None:
        try:
            in_forward.wait(30)
            found.append(outputs(other, x))
            other.note = "set"  # type: ignore[assignment]
        except Exception as error:  # to be seen below
            found.append(error)
        finally:
            called.set()

    found: list[Any] = []
    other, x = Siblings().eval(), torch.randn(SMALL)
    wanted = outputs(other, x)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    traces = trace(Waits().eval())
    thread.join()
    assert torch.equal(found[0], wanted)
    assert other.note == "set"
    assert [node.op for node in traces.graphs[""][0].nodes] == [
        "placeholder",
        "call_module",
        "call_module",
        "call_method",
        "output",
    ]


class Asked(Siblings):
    """Another call than the one with an input alone does something else."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.inner, self.point = with_bn(nn.Conv2d(3, 3, 1)), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        y: Tensor = self.conv(self.inner(x))
        z: Tensor = y if raw else self.bn(y).relu()
        return self.conv(z).relu() if raw else self.point(z) + self.inner(z)  # type: ignore[no-any-return]


def test_a_forward_folds_as_it_is_called() -> None:
    net, x = randomize(Asked(), SMALL).double(), torch.randn(SMALL, dtype=torch.float64)
    folded = reparameterize(net)
    assert report_of(folded).pairs == [("inner.conv", "inner.bn")]
    why = "the forward that it lies in may do something else, given `raw`: pass an example of how it is called"
    assert report_of(folded).left["bn"].startswith(why)
    for other, calls in [(folded, [False, True]), *((reparameterize(net, (x, raw)), [raw]) for raw in (False, True))]:
        for raw in calls:
            assert relative_error(other(x, raw), net(x, raw)) <= EXACT
        assert report_of(other).left.keys() == ({"bn"} if other is folded or calls == [True] else set())
    assert report_of(reparameterize(net, x)).pairs == [("conv", "bn"), ("inner.conv", "inner.bn")]


def test_blocks_do_not_swallow_what_another_call_asks_for() -> None:
    net, x = randomize(Asked(), SMALL).double(), torch.randn(SMALL, dtype=torch.float64)
    changed = replace_conv(net)
    for raw in (False, True):
        assert relative_error(changed(x, raw), net(x, raw)) <= EXACT


def test_a_rewritten_forward_loses_no_argument() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor, act: bool = True) -> Tensor:
            y: Tensor = self.a(x) + self.b(x)
            return y.relu() if act else y

    net, x = Two().double().eval(), torch.randn(SMALL, dtype=torch.float64)
    for example in (None, x, (x, False)):
        for act in (False, True):
            assert torch.equal(reparameterize(net, example)(x, act=act), net(x, act=act))


def test_an_example_may_be_a_dictionary() -> None:
    class Batch(Siblings):
        def forward(self, x: Any) -> Any:
            return {"out": super().forward(x["image"])}

    batch = {"image": torch.randn(SMALL, dtype=torch.float64), "name": "a"}
    net = randomize(Siblings(), SMALL).double()
    net.__class__ = Batch
    folded = reparameterize(net, batch)
    assert report_of(folded).pairs == [("conv", "bn")]
    assert relative_error(folded(batch)["out"], net(batch)["out"]) <= EXACT
