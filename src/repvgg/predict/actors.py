"""The actors of a cluster that predict a whole data set. Imports nothing, so that the command line can show it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cluster:
    """The cluster that predicts a whole data set, and its actors; without one this process does it, in a loop."""

    ray: str = ""
    """auto: the cluster that this machine belongs to, or else this machine alone; or a cluster's address."""
    concurrency: str = ""
    """With --ray: how many actors run the model, MIN,MAX; by default at most one a processor."""
    gpus: float = 0.0
    """With --ray: GPUs an actor."""

    def actors(self, processors: int) -> tuple[int, int]:
        """Return the least and the largest number of actors. Raises ValueError for something else than MIN,MAX."""
        if not self.concurrency:
            return 1, max(1, processors)
        words = self.concurrency.split(",")
        if len(words) > 2 or not all(word.strip().isdigit() for word in words) or not 1 <= int(words[0]) <= int(words[-1]):
            raise ValueError(f"--concurrency {self.concurrency}: MIN,MAX, such as 1,8")
        return int(words[0]), int(words[-1])
