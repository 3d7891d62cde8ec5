"""convert.py: training form to deploy form as files, and other implementations' checkpoints in and out."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import randomize, relative_error
from foreign import FORMS, NUM_CLASSES, SCHEMES, state, timm_net
from rounding import rounding
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import repvgg
from repvgg.cli import main
from repvgg.disk import FileError
from repvgg.fold.algebra import ReparamError
from repvgg.fold.proof import Verification
from repvgg.fold.rounding import Error
from repvgg.models import convert as module
from repvgg.models import zoo
from repvgg.models.convert import convert, proof_size
from repvgg.models.manifest import Preprocessing


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A file in training form, on random statistics."""
    path = tmp_path / "trained.safetensors"
    model = randomize(zoo.create_model("repvgg_micro", num_classes=3, width=1 / 4))
    repvgg.save(model, path, classes=["a", "b", "c"], training={"epochs": 2})
    return path


D2SE = pytest.param("repvgg_d2se", marks=pytest.mark.slow)  # its keys are proved by test_keys_in_and_out_through_the_command
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IMAGES.to(next(model.parameters()).dtype))  # type: ignore[no-any-return]


def test_it_folds_verifies_and_remembers(trained: Path, tmp_path: Path) -> None:
    said: list[str] = []
    convert(trained, tmp_path / "deploy.safetensors", log=said.append)
    before, after = repvgg.load(trained), repvgg.load(tmp_path / "deploy.safetensors")
    assert relative_error(logits(after), logits(before)) <= rounding(before, IMAGES)
    old, new = zoo.manifest_of(before), zoo.manifest_of(after)
    assert (old.form, new.form) == ("training", "deploy")
    assert (new.arch, new.classes, new.preprocessing, new.training) == (old.arch, old.classes, old.preprocessing, old.training)
    assert new.layers is not None
    assert len(new.layers) == 10 + 2
    assert [line.partition(" ")[0] for line in said] == ["folded", "equal", f"{tmp_path / 'deploy.safetensors'}:"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_it_folds_in_any_precision(dtype: torch.dtype, trained: Path, tmp_path: Path) -> None:
    model = repvgg.load(trained)
    repvgg.save(model.to(dtype), tmp_path / "other.safetensors")
    convert(tmp_path / "other.safetensors", tmp_path / "deploy.pth", log=lambda _: None)
    deploy = repvgg.load(tmp_path / "deploy.pth")
    assert {p.dtype for p in deploy.parameters()} == {dtype}
    allowed = rounding(model, IMAGES.to(dtype))
    assert relative_error(logits(deploy), logits(model.double())) <= allowed


def test_it_does_not_replace_its_source(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which may be the only training form."""
    before = trained.read_bytes()
    (best := tmp_path / "best.safetensors").write_bytes(before)
    (link := tmp_path / "link.safetensors").symlink_to(best)
    (onnx := tmp_path / "net.onnx").write_bytes(b"no matter")
    pairs: list[tuple[Path | str, Path, list[str]]] = [(best, best, []), (tmp_path, best, []), (best, link, [])]
    pairs += [(best, best, ["--to-keys", "timm"]), (onnx, onnx, []), ("timm:resnet18", best, ["--checkpoint", str(best)])]
    for source, target, words in pairs:
        with pytest.raises(SystemExit) as stopped:
            main(["convert", str(source), str(target), *words])
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines == [f"repvgg: {target}: is what is converted, and would be lost: name another file"]
    assert (best.read_bytes(), onnx.read_bytes()) == (before, b"no matter")


def test_what_is_folded_already(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deploy, again = tmp_path / "deploy.safetensors", tmp_path / "again.safetensors"
    main(["convert", str(trained), str(deploy)])
    assert capsys.readouterr().err.splitlines()[-1] == f"{deploy}: deploy form"
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(deploy), str(again)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        f"repvgg: {deploy}: is in deploy form already, there is nothing to fold (--to-keys re-spells its keys)"
    ]
    assert not again.exists()


def test_what_is_not_proved_is_not_written(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Verification(Error(1e-3, 1e-1), Error(1e-7, 1e-5), torch.float32)
    monkeypatch.setattr(module, "verify", lambda *_: wrong)
    with pytest.raises(ReparamError, match="differs, so it was not written"):
        convert(trained, tmp_path / "deploy.safetensors", log=lambda _: None)
    assert not (tmp_path / "deploy.safetensors").exists()


def test_a_target_that_cannot_be_written(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no folder"):
        convert(trained, tmp_path / "nowhere" / "deploy.safetensors", log=lambda _: None)


@pytest.mark.parametrize("name", ["repvgg_b1g4", pytest.param("repvgg_a1", marks=pytest.mark.slow), D2SE])
def test_timms_checkpoint_folds_to_timms_own_deploy_form(name: str, tmp_path: Path) -> None:
    """timm -> ours -> folded -> timm's deploy network, strictly, and its training network likewise; in float64."""
    source, folded, back = (tmp_path / f"{name}.safetensors" for name in ("source", "folded", "back"))
    original = copy.deepcopy(timm_net(name)).double()
    save_file(original.state_dict(), source)
    convert(source, folded, log=lambda _: None)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for form, file in (("training", source), ("deploy", folded)):
        convert(file, back, to_keys="timm", log=lambda _: None)
        theirs = copy.deepcopy(timm_net(name, form)).double()
        for tensor in theirs.state_dict().values():
            tensor.zero_()
        theirs.load_state_dict(load_file(back), strict=True)
        with torch.no_grad():
            assert relative_error(theirs(x), original(x)) <= rounding(original, x)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("form", FORMS)
def test_keys_in_and_out_through_the_command(form: str, scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = state("repvgg_d2se", form, scheme)
    source = tmp_path / "source.pth"
    torch.save({"state_dict": theirs}, source)
    for suffix in (".safetensors", ".pth"):
        ours, back = tmp_path / f"ours{suffix}", tmp_path / f"back{suffix}"
        main(["convert", str(source), str(ours), "--to-keys", "repvgg"])
        main(["convert", str(ours), str(back), "--to-keys", scheme])
        assert f"{form} form, {len(theirs)} tensors in {scheme} keys" in capsys.readouterr().err
        tensors = load_file(back) if suffix == ".safetensors" else torch.load(back, weights_only=True)
        assert tensors.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert tensors[key].dtype == tensor.dtype
            assert torch.equal(tensors[key], tensor)
    model = repvgg.load(tmp_path / "back.safetensors")
    assert zoo.manifest_of(model).form == form
    assert logits(model).shape == (2, NUM_CLASSES)


def test_a_key_scheme_that_is_none(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no key scheme 'keras': repvgg, official, repvggplus, timm, mmpretrain"):
        convert(trained, tmp_path / "out.safetensors", to_keys="keras")
    assert not (tmp_path / "out.safetensors").exists()


def test_large_inputs_are_proved_on_smaller_ones() -> None:
    assert proof_size(Preprocessing((3, 713, 1024), 713)) == (3, 320, 320)
    assert proof_size(Preprocessing((3, 28, 28), 28)) == (3, 28, 28)
