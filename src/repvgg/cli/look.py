"""Commands to look around with: demo, info, engines, recipe, report, web."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from repvgg.cli.flags import Images, OnDevice, Output, Printed, Where, say


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run every step on embedded data in under two minutes: train, fold, verify, time, predict, and write a page.

    Example: repvgg demo --out demo
    """

    out: Path = Path("demo")
    """Folder for the model files and the page (index.html)."""
    seed: int = 0
    """Seed of the run."""
    web: bool = False
    """Then run the trained model in the browser, both forms side by side, as repvgg web does with any model."""

    def run(self) -> None:
        from repvgg.demo import refuse_another, run

        if self.web and (self.out / "index.html").exists():
            refuse_another(self.out, self.seed)
        else:
            run(self.out, self.seed)
        if self.web:
            trained, scans = self.out / "run" / "last.safetensors", self.out / "scans"
            Web(model=str(trained), images=(str(scans),), out=self.out / "web").run()


@dataclass(frozen=True, kw_only=True)
class Engines:
    """List the engines that run a model here, with versions, precisions and the speeds measured last.

    Example: repvgg engines
    """

    output: Printed = field(default_factory=Output)

    def run(self) -> None:
        from repvgg.cli.show_models import show_engines

        show_engines(self.output.json)


@dataclass(frozen=True, kw_only=True)
class Web:
    """Make a page that runs a model in the browser on the visitor's images, both its forms side by side.

    Example: repvgg web runs/cats/best.safetensors photos/
    """

    model: Annotated[str, Positional, arg(metavar="MODEL", help="A model file in training form, or its run folder.")]
    images: Images = ()
    out: Path = Path("web")
    """Folder for the page and all that it needs; any static web server will do."""
    runtime: Path | None = None
    """Folder with onnxruntime-web's files; by default npm fetches them, once."""
    port: int = 8000
    """Port of the local server."""
    serve: bool = True
    """Serve the page to this machine, until Ctrl-C."""

    def run(self) -> None:
        from repvgg.models.load import load
        from repvgg.web.app import build, serve

        build(load(self.model), self.out, self.images, self.runtime, say)
        if self.serve:
            serve(self.out, self.port, say)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a page about a run: curves, confusion, worst mistakes, what the network saw, costs; or compare several runs.

    Example: repvgg report runs/photos
    """

    runs: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN", help="Run folders; run.html goes into a single one.")]
    data: str = ""
    """For one run: where its images are now, if they moved."""
    out: Path | None = None
    """For several runs: page to write; by default compare.html."""
    where: OnDevice = field(default_factory=Where)

    def run(self) -> None:
        from repvgg.cli.show_results import show_runs
        from repvgg.web.report import write_comparison, write_report

        if not self.runs:
            raise ValueError("which run? repvgg report RUN, a folder that repvgg train made")
        if len(self.runs) > 1 and self.data:
            raise ValueError("--data is for the page of one run: name one")
        if len(self.runs) > 1 and self.where != Where():
            raise ValueError("--device is for the page of one run: name one")
        if len(self.runs) == 1:
            if self.out is not None:
                raise ValueError(f"--out is for several runs: the page of one is written to {self.runs[0] / 'run.html'}")
            print(write_report(self.runs[0], data=self.data, device=self.where.chosen(), log=say))
            return
        out = self.out or Path("compare.html")
        show_runs(write_comparison(self.runs, out))
        print(out)


@dataclass(frozen=True, kw_only=True)
class Info:
    """Show the model family, one model layer by layer, or an exported file's operators.

    Example: repvgg info repvgg_a0
    """

    model: Annotated[
        str,
        Positional,
        arg(metavar="MODEL", help="A model's name, a model file, a run folder or hf:USER/NAME; left out: the family."),
    ] = ""
    graph: Path | None = None
    """An exported file (.onnx, OpenVINO's .xml, ncnn's .param), to list its operators."""
    output: Printed = field(default_factory=Output)

    def run(self) -> None:
        from repvgg.cli.show_models import show, show_graph

        if self.graph and self.model:
            raise ValueError(f"--graph {self.graph} lists that file alone: leave out {self.model}")
        if self.graph:
            show_graph(self.graph, self.output.json)
        else:
            show(self.model, self.output.json)


@dataclass(frozen=True, kw_only=True)
class ShowRecipe:
    """Show all recipes, or every field of one.

    Example: repvgg recipe light
    """

    name: Annotated[str, Positional, arg(metavar="NAME", help="A recipe; left out: all of them.")] = ""
    output: Printed = field(default_factory=Output)

    def run(self) -> None:
        from repvgg.cli.show_models import show_recipe, show_recipes

        if self.name:
            show_recipe(self.name, self.output.json)
        else:
            show_recipes(self.output.json)
