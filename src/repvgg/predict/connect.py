"""Ray, as predictions of whole data sets and grids of trainings meet it: a cluster that is there, or one of this machine."""

import os
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from repvgg.disk import Log, in_a_line

STORE = 250_000_000  # bytes a processor, of a cluster of this machine alone; Ray would take a third of the memory


def refuse_without_ray() -> None:
    """Raise ValueError where Ray, or what its data sets need, is not installed."""
    if lacking := [name for name in ("ray", "pandas") if find_spec(name) is None]:
        raise ValueError(f"--ray needs {', '.join(lacking)}: pip install 'ray[data]' pyarrow")


def connect(address: str, log: Log) -> None:
    """Join the cluster at an address; for "auto" the one of this machine, which is started where there is none.

    Raises ValueError where no cluster answers.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # before it is imported; what goes wrong is said in one line
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a cluster started here: Ray's 15 starves beside any other work
    import ray

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address == "auto" and _gone():
            raise ConnectionError
        ray.init(address=address, **quiet)
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        if address != "auto":
            reason = f"no cluster answers there ({in_a_line(error)}); one with a token wants RAY_AUTH_MODE=token"
            raise ValueError(f"--ray {address}: {reason}") from None
        os.environ.setdefault("MALLOC_ARENA_MAX", "2")  # threads of workers keep no heaps of their own
        os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # and what Arrow frees is free
        processors = max(2, os.cpu_count() or 1)
        ray.init(address="local", include_dashboard=False, num_cpus=processors, object_store_memory=STORE * processors, **quiet)
    log(f"Ray {ray.__version__}: {ray.cluster_resources().get('CPU', 0):.0f} processors, {len(ray.nodes())} nodes")


def _gone() -> bool:
    """Return whether the cluster that was started here last does not answer; Ray itself would wait minutes for it."""
    try:
        address = (Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray/ray_current_cluster").read_text()  # noqa: S108 - Ray's own
        host, _, port = address.strip().rpartition(":")
        socket.create_connection((host, int(port)), timeout=3).close()
        return False
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return "RAY_ADDRESS" not in os.environ


def reason_of(error: BaseException) -> str:
    """Return the first line of what a task raised, from within Ray's wrappings."""
    while inner := getattr(error, "cause", None) or error.__cause__:
        error = inner
    return in_a_line(error)


def absolute(spec: str) -> str:
    """Return a path, or KIND:PATH, that means the same in whatever folder a worker runs; other names as they are."""
    kind, colon, path = spec.rpartition(":")
    return f"{kind}{colon}{Path(path).resolve()}" if path and Path(path).exists() else spec
