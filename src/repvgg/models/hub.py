"""The Hugging Face hub, through its own client; what goes wrong is one line.

path = fetch("timm/repvgg_a0.rvgg_in1k")             # the local copy of its model.safetensors
url = upload(folder, "me/cats", "Upload model")      # all files of a folder, in one commit
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from repvgg.disk import FileError, describe
from repvgg.version import __version__

MODEL_FILE = "model.safetensors"
LOG_IN = "log in (hf auth login, or HF_TOKEN)"


def cached(repo: str, revision: str = "main", file: str = MODEL_FILE) -> Path | None:
    """Return what was fetched before; None where nothing was."""
    from_hub = _client()
    with suppress(from_hub.errors.LocalEntryNotFoundError):
        return Path(from_hub.hf_hub_download(repo, file, revision=revision, local_files_only=True))
    return None


class MissingError(FileError):
    """A repository or a file that the hub says is not there."""


def fetch(repo: str, revision: str = "main", file: str = MODEL_FILE, token: str | None = None) -> Path:
    """Return the local copy of a file, as it is on the hub now; where the hub cannot be reached, as it was fetched last.

    HF_HUB_OFFLINE, HF_HOME and HF_ENDPOINT are honoured. Raises `MissingError` if there is none, `FileError` if it cannot be had.
    """
    from_hub = _client()
    try:
        url = from_hub.hf_hub_url(repo, file, revision=revision)
        from_hub.get_hf_file_metadata(url, token=token)  # fails at once where the next line retries for long
        return Path(from_hub.hf_hub_download(repo, file, revision=revision, token=token))
    except Exception as error:  # whatever the hub's client, and its client's client, raise
        if _status(error) is None and not isinstance(error, ValueError) and (kept := cached(repo, revision, file)):
            return kept
        missing = isinstance(error, (from_hub.errors.RepositoryNotFoundError, from_hub.errors.EntryNotFoundError))
        gated = isinstance(error, from_hub.errors.GatedRepoError)
        what = MissingError if missing and not gated and _status(error) is not None else FileError
        raise what(f"{repo}@{revision} is not in the local cache and cannot be fetched: {_reason(error, file)}") from None


def upload(folder: Path, repo: str, message: str, private: bool = False, token: str | None = None) -> str:
    """Upload all files of a folder in one commit, to a repository that is made if need be, and return the commit's address.

    Raises `FileError` if nothing was uploaded, ValueError without a token.
    """
    from_hub = _client()
    if not (token or from_hub.get_token()):
        raise ValueError("there is no token for the hub: log in with one that may write (hf auth login, or HF_TOKEN)")
    api = from_hub.HfApi(token=token, library_name="repvgg", library_version=__version__)
    files = [from_hub.CommitOperationAdd(path.name, str(path)) for path in sorted(folder.iterdir())]
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        return str(api.create_commit(repo, files, commit_message=message).commit_url)
    except Exception as error:  # as above
        raise FileError(f"{repo}: nothing was uploaded: {_reason(error)}") from None


def _client() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise ValueError("the hub needs huggingface_hub: pip install huggingface_hub") from None
    return huggingface_hub


def _status(error: BaseException) -> int | None:
    """Return the status of the hub's answer; None where there was none."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return int(status) if status is not None else None


def _reason(error: BaseException, file: str = "") -> str:
    from huggingface_hub import errors

    status = _status(error)
    if isinstance(error, errors.HFValidationError):
        return "that is no repository's name, which is USER/NAME"
    if status is None:
        return f"check the connection and HF_HUB_OFFLINE ({describe(error)})"
    reasons: list[tuple[Any, str]] = [  # of several that fit, the first
        (errors.GatedRepoError, f"it is gated: accept its terms on its page, and {LOG_IN}"),
        (errors.RepositoryNotFoundError, f"there is no such repository, or it is private: check the name, or {LOG_IN}"),
        (errors.RevisionNotFoundError, "it has no such revision"),
        (errors.EntryNotFoundError, f"it holds no {file}"),
    ]
    by_status = {
        401: f"the hub does not know this token: {LOG_IN}",
        403: f"this token has not the right to: {LOG_IN} with one that has",
    }
    known = next((reason for kind, reason in reasons if isinstance(error, kind)), by_status.get(status))
    return f"{known} ({status})" if known else f"the hub answers {status} ({describe(error)})"
