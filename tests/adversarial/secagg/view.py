"""The coordinator's whole view of an epoch with one round, as numbers a classifier can be trained on.

Two secrets lie behind a client's upload: the self-mask, which the coordinator may remove from survivors, and the
pairwise masks, which it may remove from dropped parties. `Transcript` removes what it may, as a curious coordinator
would, so that what is left is protected by the other kind alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from appa_secure.secagg import Aggregate, EpochReady, Layout, Segment, opening
from appa_secure.secagg.masks import apply_masks, ring_dtype
from appa_secure.secagg.wire import Envelope
from tests.secagg.world import World

ENTRIES = 4
LAYOUT = Layout((Segment("reward", ENTRIES, 0.0, 1.0),))
LOW, HIGH, MIDDLE = (np.full(ENTRIES, value) for value in (0.1, 0.9, 0.5))
VICTIM = "site-00"


@dataclass
class Transcript:
    """Everything the clients sent in one epoch, by (type, sender), what a sum was opened to, and the keys of the masks
    that the coordinator added and subtracted to open it."""

    world: World
    sent: dict[tuple[str, str], Envelope] = field(default_factory=dict)
    opened: Aggregate | None = None
    added: Sequence[bytes] = ()
    subtracted: Sequence[bytes] = ()

    def words(self, name: str) -> np.ndarray:
        """A copy of a masked upload."""
        return np.frombuffer(self.sent["upload", name].body["vector"], ring_dtype(64)).copy()

    def peeled(self) -> dict[str, np.ndarray]:
        """Uploads without the masks that the coordinator is able to remove."""
        assert self.opened is not None
        left = {name: self.words(name) for name in self.world.names}
        alive = len(self.opened.contributors)
        for name, key in zip(
            self.opened.contributors, self.subtracted, strict=False
        ):  # self-masks come first
            apply_masks(left[name], [], [key])
        for name in self.opened.dropped:
            # What the survivors' uploads hold of masks with the dropped party, its own upload holds with the other sign.
            apply_masks(left[name], self.subtracted[alive:], self.added)
        return left

    def numbers(self) -> np.ndarray:
        """Uploads before and after peeling, and their differences: as fractions of the ring and as bits."""
        left = self.peeled()
        words = [self.words(name) for name in self.world.names] + [left[name] for name in self.world.names]
        words += [a - b for i, a in enumerate(words[3:]) for b in words[3 + i + 1 :]]
        joined = np.concatenate(words)
        bits = np.unpackbits(joined.view(np.uint8), bitorder="little")
        return np.concatenate([joined / 2.0**63 - 1, 2.0 * bits - 1])

    def octets(self) -> np.ndarray:
        """Every byte of every message, whatever it means."""
        raw = b"".join(self.sent[key].raw for key in sorted(self.sent) if key[0] != "refusal")
        return np.frombuffer(raw, np.uint8) / 127.5 - 1


@contextmanager
def mask_keys_seen(seen: Transcript) -> Iterator[None]:
    """Write down which keys the coordinator removes masks with."""
    original = opening.apply_masks

    def noting(vector: np.ndarray, add: Sequence[bytes], subtract: Sequence[bytes]) -> None:
        seen.added, seen.subtracted = list(add), list(subtract)
        original(vector, add, subtract)

    opening.apply_masks = noting
    try:
        yield
    finally:
        opening.apply_masks = original


def record(label: bool, late: bool, seed: object) -> Transcript:
    """One epoch. `label` decides which of two inputs with one opened sum is used; if `late`, the victim's upload
    reaches the coordinator after it declared the victim dropped."""
    world = World(3, layout=LAYOUT, rounds=1, seed=seed)
    first, second = (LOW, HIGH) if label else (HIGH, LOW)
    inputs = (first, MIDDLE, MIDDLE) if late else (first, second, MIDDLE)
    world.vectors = dict(zip(world.names, inputs, strict=True))
    seen = Transcript(world)

    def inbound(name: str, envelope: Envelope) -> bytes | None:
        seen.sent[envelope.type, name] = envelope
        return None if late and (envelope.type, name) == ("upload", VICTIM) else envelope.raw

    world.inbound = inbound
    ready = world.setup()
    with mask_keys_seen(seen):
        outcome = world.round(1)
    assert isinstance(ready, EpochReady)
    assert isinstance(outcome, Aggregate), outcome
    np.testing.assert_allclose(outcome.sum, 1.0 if late else 1.5, atol=1e-9)
    seen.opened = outcome
    return seen


def linear(x: np.ndarray, y: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """Ridge regression on +-1 labels, in its dual form for many features."""
    centre = x.mean(axis=0)
    gram = (x - centre) @ (x - centre).T
    weights = np.linalg.solve(gram + 0.05 * np.trace(gram) / len(x) * np.eye(len(x)), y - y.mean())
    return (unseen - centre) @ ((x - centre).T @ weights) + y.mean() > 0


def network(x: np.ndarray, y: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """A small multilayer perceptron with weight decay."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    inputs = torch.tensor(x, dtype=torch.float32)
    labels = torch.tensor((y + 1) / 2, dtype=torch.float32)
    for _ in range(60):
        optimiser.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(inputs)[:, 0], labels).backward()
        optimiser.step()
    with torch.no_grad():
        return model(torch.tensor(unseen, dtype=torch.float32))[:, 0].numpy() > 0


CLASSIFIERS = {"linear": linear, "network": network}


def hits(features: np.ndarray, labels: np.ndarray, classifier: str) -> tuple[int, int]:
    """Trained on the first half, guessing the second: (right, of)."""
    half = len(labels) // 2
    guesses = CLASSIFIERS[classifier](features[:half], 2.0 * labels[:half] - 1, features[half:])
    return int((guesses == labels[half:].astype(bool)).sum()), len(labels) - half
