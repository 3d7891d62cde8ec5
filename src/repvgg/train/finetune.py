"""From trained weights to a model of other classes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from repvgg import zoo
from repvgg.data import Source


def started_from(
    init: str, arch: str, source: Source, allow_deploy: bool = False, log: Callable[[str], object] = print
) -> tuple[nn.Module, Source]:
    """The model of a file, or a member of the family with the paper's weights, for the classes of a source; and the source with the
    model's own input size, mean and deviation.

    The classifier starts anew unless the classes are the same. Raises ValueError for a model that is not an `arch` (if one is
    named), takes other channels, or is in deploy form: that is a plain VGG without batch norms, which trains badly, so it has to be
    asked for (`allow_deploy`).
    """
    is_file = Path(init).exists() or Path(init).suffix in {".safetensors", ".pth", ".pt"}
    model = zoo.load(init) if is_file else zoo.create_model(init, pretrained=True)
    manifest = zoo.manifest_of(model)
    name = manifest.arch["name"] if manifest.arch else "a network without a name"
    if arch and (manifest.arch is None or zoo.resolve_name(arch) != name):
        raise ValueError(f"{init} holds {name}, not {arch}")
    if manifest.form == "deploy" and not allow_deploy:
        raise ValueError(
            f"{init}: is in deploy form, a plain network without batch norms, which trains badly: "
            "start from its training form, or say --allow-deploy"
        )
    channels = manifest.preprocessing.input_size[0]
    if channels != source.preprocessing.input_size[0]:
        raise ValueError(
            f"{init} takes images of {channels} channels, those of {source.name} have {source.preprocessing.input_size[0]}"
        )
    if manifest.classes != source.classes:
        head: Any = getattr(model, "reset_classifier", None)
        if head is None:
            raise ValueError(f"{init}: this network's classifier cannot be replaced")
        log(f"new head: {len(source.classes)} classes" + (f" instead of {len(manifest.classes)}" if manifest.classes else ""))
        head(len(source.classes))
    zoo.remember(model, replace(zoo.manifest_of(model), classes=source.classes))
    return model.train(), replace(source, preprocessing=manifest.preprocessing)
