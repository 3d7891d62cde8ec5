"""Models of other classes, started from trained weights, and the recipe for that."""

from dataclasses import replace
from typing import Any

from torch import nn

from repvgg.data import Source
from repvgg.disk import Log
from repvgg.fold.guards import copied
from repvgg.models import zoo
from repvgg.models.load import is_file, open_model, tell_left_out
from repvgg.models.names import FAMILY, PSPNETS, resolve_name
from repvgg.models.repvgg import RepVGG
from repvgg.train.recipes import RECIPES, Recipe


def finetuning(init: str | nn.Module) -> Recipe:
    """Return the recipe for going on from trained weights: `finetune`, with one learning rate where the stages are not known.

    Those of the RepVGG family are. init: as of `started_from`. Raises what opening a model file raises.
    """
    model = open_model(init) if isinstance(init, str) and is_file(init) else init
    known = isinstance(model, RepVGG) if isinstance(model, nn.Module) else resolve_name(model) in FAMILY
    return RECIPES["finetune"] if known else replace(RECIPES["finetune"], layer_decay=1.0)


def started_from(
    init: str | nn.Module, arch: str, source: Source, allow_deploy: bool = False, log: Log = print
) -> tuple[nn.Module, Source]:
    """Return a trained model with a head for the classes of a source, and the source with the model's own preprocessing.

    init: a model file, a member of the family, which comes with the paper's weights, or a model of ours itself. Of a source with
    masks the sizes stay.

    The classifier starts anew unless the classes are the same. A classifier can be the backbone of the PSPNet that `arch` names.
    Raises ValueError for a model that is not an `arch` (if one is named), takes other channels, or is in deploy form: that is a
    plain VGG without batch norms, which trains badly, so it has to be asked for (`allow_deploy`).
    """
    if isinstance(init, nn.Module):
        model, init = copied(init), "this model"
    else:
        model = open_model(init) if is_file(init) else zoo.create_model(init, pretrained=True)
        tell_left_out(model, log)
    manifest = zoo.manifest_of(model)
    name = manifest.arch["name"] if manifest.arch else "a network without a name"
    plan = PSPNETS.get(resolve_name(arch)) if arch else None
    is_backbone = isinstance(model, RepVGG) and plan is not None and plan.backbone == name
    if arch and not is_backbone and (manifest.arch is None or resolve_name(arch) != name):
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
    if is_backbone:
        model, report = _on_backbone(model, arch, source)
        log(f"{init}: {report}")
    elif manifest.classes != source.classes:
        head: Any = getattr(model, "reset_classifier", None)
        if head is None:
            raise ValueError(f"{init}: this network's classifier cannot be replaced")
        log(f"new head: {len(source.classes)} classes" + (f" instead of {len(manifest.classes)}" if manifest.classes else ""))
        head(len(source.classes))
    preprocessing = manifest.preprocessing
    if source.masks:
        sizes = {name: getattr(source.preprocessing, name) for name in ("input_size", "resize")}
        preprocessing = replace(preprocessing, **sizes)
    zoo.remember(model, replace(zoo.manifest_of(model), classes=source.classes, preprocessing=preprocessing))
    return model.train(), replace(source, preprocessing=preprocessing)


def _on_backbone(classifier: nn.Module, arch: str, source: Source) -> tuple[nn.Module, str]:
    """A new PSPNet with this classifier for a backbone, and what was taken of it."""
    options = zoo.manifest_of(classifier).arch or {}
    model: Any = zoo.create_model(
        arch, num_classes=len(source.classes), in_chans=options["in_chans"], width=options["width"], block=options["block"]
    )
    return model, model.load_backbone(classifier.state_dict())
