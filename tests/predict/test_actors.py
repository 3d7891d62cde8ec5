"""actors.py: how many actors there are."""

import pytest

from repvgg.predict.actors import Cluster


def test_actors() -> None:
    assert [Cluster().actors(n) for n in (1, 2, 4, 64)] == [(1, 1), (1, 2), (1, 4), (1, 64)]
    assert Cluster(concurrency="3").actors(8) == (3, 3)
    assert Cluster(concurrency="2,9").actors(1) == (2, 9)
    for wrong in ("0", "a", "4,2", "1,2,3", "-1"):
        with pytest.raises(ValueError, match=f"--concurrency {wrong}: MIN,MAX, such as 1,8"):
            Cluster(concurrency=wrong).actors(8)
