"""data/stores.py: which names are URLs; what opens them is proved by test_remote.py and test_mirror.py."""

from repvgg.data.stores import is_url


def test_what_is_a_url() -> None:
    names = ("s3://b/x", "gs://b", "wds:s3://b/x", "photos", "hf:a/b")
    assert [is_url(name) for name in names] == [True, True, False, False, False]
