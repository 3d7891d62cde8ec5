"""A copy of a run folder in an object store, from which another machine goes on.

mirror = Mirror("s3://bucket/run", Path("runs/digits"))
mirror.fetch()             # what is there and not here
mirror.send()              # what has changed here
"""

import re
import secrets
import shutil
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from repvgg.disk import FileError, Log, atomically, in_a_line, write_text

STATES = "state"
STATE = re.compile(r"\d{9}\.safetensors")  # the name of one
RUN = "run_id"  # a file that tells the copy of this run from that of another


class Mirror:
    """A run folder and its copy at a URL; without one nothing is copied. Raises `DataError` for one that nothing here opens."""

    def __init__(self, url: str, out: Path, log: Log = print) -> None:
        self.url, self.out, self.log = url, out, log
        self.sent = dict[str, Any]()
        if url:
            from repvgg.data.stores import filesystem

            self.store, self.root = filesystem(url)

    def fetch(self) -> None:
        """Copy all that is there if its state is later than the one here, else only what is missing but states.

        What was not sent because the store could not be reached is later here. Raises `FileError` where nothing can be copied, and
        where another run than the one here would be mixed with it.
        """
        if not self.url:
            return
        try:
            there = self._names()
            states = [name for name in there if name.startswith(STATES)]
            here = [str(path.relative_to(self.out)) for path in (self.out / STATES).glob("*")]
            if here or (self.out / RUN).exists():
                self._refuse_another(there)
            later = max(states, default="") > max(here, default="")
            wanted = there if later else [n for n in there if n not in states and not (self.out / n).exists()]
            for name in wanted:
                (self.out / name).parent.mkdir(parents=True, exist_ok=True)
                atomically(self.out / name, partial(self._copy, name))
        except OSError as error:
            raise FileError(f"{self.url}: cannot be read ({in_a_line(error)})") from None
        if wanted:
            self.log(f"{self.out}: goes on from {self.url}")

    def begin(self) -> None:
        """Raise `FileError` where the copy is of another run than the one that begins here, or cannot be read."""
        if self.url:
            try:
                self._refuse_another(self._names())
            except OSError as error:
                raise FileError(f"{self.url}: cannot be read ({in_a_line(error)})") from None

    def _refuse_another(self, there: list[str]) -> None:
        if RUN in there:
            with self.store.open_input_stream(f"{self.root}/{RUN}") as file:
                name = bytes(file.read(64))
            if not (self.out / RUN).exists() or (self.out / RUN).read_bytes() != name:
                raise FileError(f"{self.url}: holds another run than {self.out}: name another --mirror")

    def send(self) -> None:
        """Copy what has changed since it was sent, and let go of states that are no more. Training goes on where that cannot be."""
        if not self.url:
            return
        try:
            if not (self.out / RUN).exists():
                write_text(self.out / RUN, secrets.token_hex(8))
            here = {}
            for path in sorted(p for p in self.out.rglob("*") if p.is_file() and not p.name.startswith(".")):
                name, facts = str(path.relative_to(self.out)), (path.stat().st_size, path.stat().st_mtime_ns)
                here[name] = facts
                if self.sent.get(name) != facts:
                    self.store.create_dir(str(Path(self.root, name).parent), recursive=True)
                    with path.open("rb") as source, self.store.open_output_stream(f"{self.root}/{name}") as copy:
                        shutil.copyfileobj(source, copy)
                    self.sent[name] = facts
            for name in self._names():
                if name not in here and PurePosixPath(name).parent == PurePosixPath(STATES) and STATE.fullmatch(Path(name).name):
                    self.store.delete_file(f"{self.root}/{name}")
        except Exception as error:  # clients of object stores raise kinds of their own
            self.log(f"{self.url}: cannot be written ({in_a_line(error)}); training goes on")

    def _names(self) -> list[str]:
        """Return the paths of the files there. Raises `FileError` for one that leads out of a folder."""
        import pyarrow.fs

        found = self.store.get_file_info(pyarrow.fs.FileSelector(self.root, recursive=True, allow_not_found=True))
        names = [f.path[len(self.root) :].lstrip("/") for f in found if f.type == pyarrow.fs.FileType.File]
        if outside := next((name for name in names if ".." in PurePosixPath(name).parts), None):
            raise FileError(f"{self.url}: holds the name {outside}, which leads out of a run folder: remove it there")
        return names

    def _copy(self, name: str, path: Path) -> None:
        with self.store.open_input_stream(f"{self.root}/{name}") as source, path.open("wb") as copy:
            shutil.copyfileobj(source, copy)
