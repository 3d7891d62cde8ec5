"""Tables of models in the terminal: the family, one model layer by layer, an exported file's operators, recipes; or JSON."""

from collections.abc import Iterable
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg.deploy.example import preparation
from repvgg.models.header import Geometry, Header, Row, costs_of, read_header
from repvgg.models.manifest import Manifest
from repvgg.models.names import EMBEDDED, embedded, in_run_folder, resolve_name
from repvgg.models.pretrained import RELEASED
from repvgg.terminal import billions, millions, print_json, print_table, printable
from repvgg.train.recipes import RECIPES, get_recipe

if TYPE_CHECKING:
    from torch import nn


def show(name_or_file: str, as_json: bool) -> None:
    """Show the family, or a model by its name or file."""
    if not name_or_file:
        _show_family(as_json)
        return
    path = embedded(name_or_file) or in_run_folder(name_or_file)
    header = read_header(path)
    if header and (rows := costs_of(header)):  # at once, as PyTorch is not needed
        _show_file(name_or_file, header, rows, as_json)
        return
    if not path.exists() and not path.suffix and ":" not in name_or_file:
        resolve_name(name_or_file)  # a mistyped name is told before PyTorch is imported
    import torch

    from repvgg.models import zoo
    from repvgg.models.load import is_file, open_model

    if is_file(name_or_file):
        _show_model(name_or_file, open_model(name_or_file), as_json)
        return
    name = resolve_name(name_or_file)
    if zoo.is_built_folded(name):
        with torch.device("meta"):  # shapes are enough
            model = zoo.create_model(name, deploy=True)
    else:
        model = zoo.create_model(name, deploy=True)
    _show_model(name, model.eval(), as_json)


def show_graph(path: Path, as_json: bool) -> None:
    """Show the operators of an exported file in order, and whether they are a plain stack."""
    from repvgg.deploy.operators import read, summary

    operators = read(path)
    if as_json:
        print_json({"operators": [asdict(operator) for operator in operators], "summary": summary(operators)})
        return
    rows = [
        (
            number,
            operator.name,
            "x".join(map(str, operator.kernel)),
            "x".join(map(str, operator.stride)),
            operator.groups if operator.groups > 1 else "",
            operator.note,
        )
        for number, operator in enumerate(operators, 1)
    ]
    print_table(("", "operator", "kernel", "stride", "groups", ""), rows, title=str(path))
    print(printable(summary(operators)))


def _show_family(as_json: bool) -> None:
    import torch

    from repvgg.measure.costs import cost
    from repvgg.models import zoo
    from repvgg.models.names import FAMILY, PSPNETS, list_models

    rows: list[dict[str, Any]] = []
    for name, member in FAMILY.items():
        with torch.device("meta"):
            training, deploy = (zoo.create_model(name, deploy=form) for form in (False, True))
        c = cost(deploy, zoo.manifest_of(deploy).preprocessing.input_size)
        rows.append(
            {
                "model": name,
                "depths": [1, *member.depths],
                "widths": list(member.widths()),
                "groups": member.groups,
                "squeeze_excite": member.squeeze_excite,
                "input": zoo.manifest_of(deploy).preprocessing.input_size[-1],
                "training_params": sum(p.numel() for p in training.parameters()),
                "params": c.params,
                "macs": c.macs,
                "winograd_muls": c.winograd_muls,
                "imagenet_top1": RELEASED.get(name),
                "weights": name in RELEASED,
            }
        )
    if as_json:
        print_json(rows)
        return
    header = ("model", "depths", "widths", "groups", "input", "params, training", "deploy", "MACs", "Winograd MULs", "top-1, %")
    table = [
        (
            r["model"] + (" +SE" if r["squeeze_excite"] else ""),
            " ".join(map(str, r["depths"])),
            " ".join(map(str, r["widths"])),
            r["groups"],
            r["input"],
            millions(r["training_params"]),
            millions(r["params"]),
            billions(r["macs"]),
            billions(r["winograd_muls"]),
            "" if r["imagenet_top1"] is None else f"{r['imagenet_top1']:.2f}",
        )
        for r in rows
    ]
    print_table(header, table, title="The RepVGG family (deploy form, 1000 classes)")
    print("top-1: on ImageNet, of the weights that the authors released; --init NAME and predict NAME fetch them from the hub.")
    print("No figure: not on the hub; a checkpoint of the authors is read as a file (--init FILE), or train with repvgg train.")
    print(f"PSPNets: pspnet_NAME and pspnet_NAME_fast of each, and {', '.join(n for n in PSPNETS if 'resnet' in n)}")
    print("Comparators: " + ", ".join(name for name in list_models() if name not in FAMILY and name not in PSPNETS))
    print(f"Trained, in the package: {', '.join(EMBEDDED)}")


def _show_file(name: str, header: Header, rows: list[Row], as_json: bool) -> None:
    params, macs, muls = (sum(numbers) for numbers in zip(*((r.params, r.macs, r.winograd_muls) for r in rows), strict=True))
    if as_json:
        print_json({**asdict(header.manifest), "params": params, "macs": macs, "winograd_muls": muls, "cost": [*map(asdict, rows)]})
        return
    _print_layers(name, header.manifest, map(astuple, rows))
    print(f"parameters        {params / 1e6:10.2f} M\nMACs              {macs / 1e9:10.2f} G   multiply-adds counted once")
    print(f"Winograd MULs     {muls / 1e9:10.2f} G   F(2x2, 3x3)")
    _print_origin(header.manifest)


def _show_model(name: str, model: "nn.Module", as_json: bool) -> None:
    from repvgg.measure.costs import cost
    from repvgg.models import zoo

    manifest = zoo.manifest_of(model)
    c = cost(model, manifest.preprocessing.input_size)
    if as_json:
        summary = {"params": c.params, "macs": c.macs, "winograd_muls": c.winograd_muls, "bytes_moved": c.bytes_moved}
        print_json({**asdict(manifest), **summary, "cost": [asdict(layer) for layer in c.layers]})
        return
    modules = dict(model.named_modules())
    rows = [(x.path, x.operator, _geometry(modules[x.path]), x.output_shape, x.params, x.macs, x.winograd_muls) for x in c.layers]
    _print_layers(name, manifest, rows)
    print(c)
    _print_origin(manifest)


def _print_layers(name: str, manifest: Manifest, rows: Iterable[tuple[Any, ...]]) -> None:
    table = [
        (
            path or "(model)",
            operator,
            geometry,
            "x".join(map(str, output_shape[1:])),
            f"{params:,}" if params else "",
            f"{macs / 1e6:,.1f}" if macs else "",
            f"{muls / 1e6:,.1f}" if macs else "",
        )
        for path, operator, geometry, output_shape, params, macs, muls in rows
    ]
    size = " x ".join(map(str, manifest.preprocessing.input_size))
    header = ("layer", "operator", "geometry", "output", "params", "MACs (M)", "Winograd MULs (M)")
    print_table(header, table, title=printable(f"{name}, {manifest.form} form, input {size}"))


def _print_origin(manifest: Manifest) -> None:
    """Print how images are prepared, the classes, and how it was trained."""
    print(printable("images            " + "; ".join(preparation(manifest.preprocessing, pixels=False, resized=False))))
    if manifest.classes:
        shown = ", ".join(manifest.classes[:8]) + (" ..." if len(manifest.classes) > 8 else "")
        print(printable(f"classes           {len(manifest.classes)}: {shown}"))
    if manifest.training:
        facts = ", ".join(f"{k} {v}" for k, v in manifest.training.items() if not isinstance(v, dict))
        print(printable(f"trained           {facts}"))


def _geometry(module: Any) -> str:
    """Return a convolution's geometry in words, and nothing of any other module."""
    if not isinstance(getattr(module, "kernel_size", None), tuple):
        return ""
    return str(Geometry(module.kernel_size, module.stride, module.dilation, module.groups))


def show_recipes(as_json: bool) -> None:
    if as_json:
        print_json({name: asdict(recipe) for name, recipe in RECIPES.items()})
        return
    names = [f.name for f in fields(RECIPES["light"])]
    print_table(
        ("", *RECIPES), [(n.replace("_", "-"), *(str(getattr(r, n)) for r in RECIPES.values())) for n in names], title="Recipes"
    )


def show_recipe(name: str, as_json: bool) -> None:
    recipe = get_recipe(name)
    if as_json:
        print_json(asdict(recipe))
        return
    print_table(
        ("flag", "value"), [(f"--{key.replace('_', '-')}", value) for key, value in asdict(recipe).items()], title=f"Recipe {name}"
    )


def show_engines(as_json: bool) -> None:
    """Print the engines of this machine."""
    from repvgg.deploy.here import engines_here

    found, measured = engines_here()
    if as_json:
        print_json({"engines": [asdict(engine) for engine in found], "measured": measured})
        return
    rows = [
        (
            engine.name,
            engine.version or "missing",
            " ".join(engine.on_cpu),
            " ".join(engine.on_cuda),
            "" if engine.images_per_second is None else f"{engine.images_per_second:,.1f}",
            engine.remedy,
        )
        for engine in found
    ]
    print_table(("engine", "version", "on the CPU", "on CUDA", "images/s", ""), rows)
    if measured:
        size = " x ".join(map(str, measured["input_size"]))
        print(f"images/s: of the model that --engine auto measured last, {size}, batches of {measured['batch_size']}")
    else:
        print("no speeds yet: --engine auto measures them, or repvgg bench NAME --engines all")
