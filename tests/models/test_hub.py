"""hub.py: files come and go as the hub's protocol has it; whatever is wrong there is one line."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import READER, WRITER, HubServer, hub_server, point_client_at

from repvgg.disk import FileError
from repvgg.models import hub

pytest.importorskip("huggingface_hub")
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    with hub_server(tmp_path / "cache") as served:
        yield served


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/model.safetensors").write_bytes(b"weights")
    (tmp_path / "folder/README.md").write_text("---\nlicense: mit\n---\n")
    return tmp_path / "folder"


def test_there_and_back(server: HubServer, folder: Path) -> None:
    url = hub.upload(folder, "me/cats", "the first", token=WRITER)
    assert url.startswith(f"{server.url}/me/cats/commit/")
    assert server.revisions["me/cats"]["main"] == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert list(server.large.values()) == [b"weights"]  # as a large file, where the hub wants it so
    assert hub.cached("me/cats") is None
    path = hub.fetch("me/cats")
    assert path.read_bytes() == b"weights"
    assert hub.cached("me/cats") == path
    assert hub.fetch("me/cats", file="README.md").read_text().startswith("---")


def test_a_revision_is_pinned_and_main_is_the_newest(server: HubServer, folder: Path) -> None:
    first = hub.upload(folder, "me/cats", "the first", token=WRITER).rpartition("/")[2]
    assert hub.fetch("me/cats").read_bytes() == b"weights"
    (folder / "model.safetensors").write_bytes(b"better weights")
    hub.upload(folder, "me/cats", "the second", token=WRITER)
    assert hub.fetch("me/cats").read_bytes() == b"better weights"
    assert hub.fetch("me/cats", first).read_bytes() == b"weights"


def test_what_was_fetched_serves_without_a_network(
    server: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.upload(folder, "me/cats", "the first", token=WRITER)
    path = hub.fetch("me/cats")
    point_client_at(monkeypatch, NOWHERE, tmp_path / "cache")
    assert hub.fetch("me/cats") == path
    with pytest.raises(FileError, match=r"me/dogs@main is not in the local cache and cannot be fetched: check the connection"):
        hub.fetch("me/dogs")
    with pytest.raises(FileError, match=r"me/cats: nothing was uploaded: check the connection"):
        hub.upload(folder, "me/cats", "again", token=WRITER)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.fetch("me/cats") == path
    with pytest.raises(FileError, match="check the connection and HF_HUB_OFFLINE"):
        hub.fetch("me/dogs")


def test_what_cannot_be_fetched(server: HubServer, folder: Path) -> None:
    hub.upload(folder, "me/cats", "the first", private=True, token=WRITER)
    assert server.private == {"me/cats"}
    assert hub.fetch("me/cats", token=WRITER)
    absent = r"there is no such repository, or it is private: check the name, or log in \(hf auth login, or HF_TOKEN\)"
    for repo, revision, file, token, reason in (
        ("me/dogs", "main", "model.safetensors", None, rf"{absent} \(401\)"),
        ("me/cats", "main", "model.safetensors", None, rf"{absent} \(401\)"),
        ("me/dogs", "main", "model.safetensors", READER, rf"{absent} \(404\)"),
        ("me/cats", "v2", "model.safetensors", WRITER, r"it has no such revision \(404\)"),
        ("me/cats", "main", "model.onnx", WRITER, r"it holds no model.onnx \(404\)"),
        ("a b", "main", "model.safetensors", None, "that is no repository's name, which is USER/NAME"),
    ):
        with pytest.raises(FileError, match=rf"^{repo}@{revision} is not in the local cache and cannot be fetched: {reason}$"):
            hub.fetch(repo, revision, file, token)


def test_what_cannot_be_uploaded(server: HubServer, folder: Path) -> None:
    with pytest.raises(ValueError, match="there is no token for the hub: log in with one that may write"):
        hub.upload(folder, "me/cats", "no")
    for repo, token, reason in (
        ("me/cats", "hf_nobody", r"the hub does not know this token: log in \(hf auth login, or HF_TOKEN\) \(401\)"),
        ("me/cats", READER, r"this token has not the right to: log in .* with one that has \(403\)"),
        ("a b/c", WRITER, "that is no repository's name, which is USER/NAME"),
    ):
        with pytest.raises(FileError, match=rf"^{repo}: nothing was uploaded: {reason}$"):
            hub.upload(folder, repo, "no", token=token)
    assert not server.revisions
