"""Object stores by their URLs.

Whatever pyarrow opens by itself (s3, gs, hdfs), with the credentials of the environment; in other stores, what fsspec has for them.
"""

from typing import Any

import pyarrow.fs

from repvgg.data import DataError
from repvgg.disk import in_a_line


def is_url(name: str) -> bool:
    """Return whether a name is a URL rather than a kind of data with something after it."""
    scheme, there, _ = name.partition("://")
    return bool(there) and ":" not in scheme


def filesystem(url: str) -> tuple[Any, str]:
    """Return a pyarrow file system and the path in it. Raises `DataError` for a URL that nothing here opens."""
    try:
        store, path = pyarrow.fs.FileSystem.from_uri(url)
        return store, path
    except (pyarrow.ArrowInvalid, OSError) as why:
        try:
            import fsspec  # type: ignore[import-untyped]

            found, path = fsspec.core.url_to_fs(url)
            return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(found)), path
        except Exception as error:  # of whatever protocol
            raise DataError(f"{url}: cannot be opened ({in_a_line(why)}; {in_a_line(error)})") from None
