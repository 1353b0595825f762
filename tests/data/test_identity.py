"""The fingerprint by which a resumed run notices that its data have changed."""

import numpy as np

from trainer.data import ArraySource
from trainer.data.identity import fingerprint
from trainer.data.mixture import Mixture


def source(identity: str = "", change: int = 0) -> ArraySource:
    made = ArraySource({"x": np.arange(100) + change})
    made.identity = identity
    return made


def test_the_fingerprint_follows_from_the_examples_and_the_identity():
    prints = {fingerprint(one) for one in (source(), source("a"), source("b"), source(change=1), source("a", 1))}
    assert len(prints) == 5
    assert fingerprint(source("a")) == fingerprint(source("a"))


def test_the_identity_of_a_mixture_is_made_of_those_of_its_sources():
    def mixed(first: str, second: str) -> Mixture:
        return Mixture({"one": (source(first), 1), "other": (source(second), 1)})

    assert mixed("", "").identity == ""
    assert len({fingerprint(mixed(*names)) for names in (("", ""), ("a", ""), ("a", "b"), ("b", "a"))}) == 4
