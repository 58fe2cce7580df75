"""What uploads look like to the coordinator: uniform, and the same for all inputs with the same sum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import binom, chi2

from appa_secure.secagg import Aggregate, Layout, Segment
from tests.adversarial.secagg.view import CLASSIFIERS, hits, record
from tests.secagg.world import World

WIDE = Layout((Segment("reward", 4096, 0.0, 1.0),))


def test_masked_uploads_are_uniform_bytes() -> None:
    """Chi-square over byte values of every upload; the unmasked encoding fails the same test by far."""
    world = World(4, layout=WIDE, rounds=2, seed="chi")
    world.setup()
    assert isinstance(world.round(1), Aggregate)
    bound = chi2.ppf(1 - 1e-6, 255)
    for name in world.names:
        assert _chi_square(world.uploads[name]) < bound
    plain = WIDE.preflight(4).encode(world.vectors["site-00"]).tobytes()
    assert _chi_square(plain) > bound


def test_equal_vectors_in_two_rounds_give_unrelated_uploads() -> None:
    world = World(4, layout=WIDE, rounds=2, seed="two")
    world.setup()
    seen = []
    for r in (1, 2):
        world.round(r)
        seen.append(np.frombuffer(world.uploads["site-00"], "<u8"))
    difference = seen[0] - seen[1]
    assert _chi_square(difference.tobytes()) < chi2.ppf(1 - 1e-6, 255)
    assert len(np.unique(difference)) == WIDE.size


def view(count: int, late: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of `count` transcripts (numbers, octets) and their labels."""
    labels = np.random.default_rng(5).integers(0, 2, count)
    seen = [record(bool(label), late, (late, i)) for i, label in enumerate(labels)]
    return np.array([t.numbers() for t in seen]), np.array([t.octets() for t in seen]), labels


def within_chance(right: int, of: int) -> bool:
    return bool(binom.ppf(1e-5, of, 0.5) <= right <= binom.ppf(1 - 1e-5, of, 0.5))


@pytest.mark.parametrize(
    ("late", "count"),
    [(False, 2_000), (True, 1_000)],
    ids=["everybody in time", "the victim is declared dropped"],
)
def test_a_distinguisher_learns_nothing_from_same_sum_inputs(late: bool, count: int) -> None:
    """Two inputs with one opened sum: classifiers trained on half of the transcripts (bundles, shares, uploads, answers;
    the masks that may be removed, removed) guess the other half at chance."""
    numbers, octets, labels = view(count, late)
    for features, classifier in ((numbers, "linear"), (numbers, "network"), (octets, "linear")):
        right, of = hits(features, labels, classifier)
        assert within_chance(right, of), f"{classifier} guesses {right} of {of}"


@pytest.mark.parametrize("late", [False, True], ids=["no pairwise masks", "no self-mask"])
def test_the_distinguisher_wins_when_a_mask_is_removed(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same classifiers, the same features, 300 transcripts of clients that leave one kind of mask out."""
    from appa_secure.secagg import client

    apply = client.apply_masks

    def careless(vector: np.ndarray, add: Sequence[bytes], subtract: Sequence[bytes]) -> None:
        apply(vector, *((add[1:], subtract) if late else (add[:1], ())))  # the self-mask comes first

    def victim_only(vector: np.ndarray, add: Sequence[bytes], subtract: Sequence[bytes]) -> None:
        # The victim has the smallest name and adds all its masks; the others have to unmask correctly.
        (careless if len(add) == 3 else apply)(vector, add, subtract)

    monkeypatch.setattr(client, "apply_masks", victim_only if late else careless)
    numbers, _, labels = view(300, late)
    for classifier in CLASSIFIERS:
        right, of = hits(numbers, labels, classifier)
        assert not within_chance(right, of), f"{classifier} guesses only {right} of {of}"
        assert right > 0.95 * of


def _chi_square(data: bytes) -> float:
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    return float(((counts - expected) ** 2 / expected).sum())
