"""Training where one trusted party holds all groups' answers: what the federated predictor is compared with.

A simulation, possible only where the data are simulated or published anyway (config_checks) and stamped "not private".
Neither masks nor the coordinator's blindness mean anything here; differential privacy still holds towards everybody
but the curator:

pooled     each step looks at all groups. With c_g the clipped gradients' sum of group g and s_g its scale, the step is
           mean_g s_g c_g + N(0, (z C max_g s_g / G)^2): noise once, where G federated clients add it G times.
           Without noise this is the federated step itself (one local step per round), and a test says so.
one_group  each step looks at one group, in an order drawn anew for every G steps: the training loop of GPO (Zhao et
           al., ICLR 2024), which is PluralLLM's centralised baseline (arXiv 2503.09925). A unit takes part in every G-th
           step at most, and the noise is calibrated to that.

The private contexts and the ledgers are those of the clients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from appa_secure.errors import PrivacyError
from appa_secure.predictor import PreferencePredictor
from appa_secure.privacy import sensitivity
from appa_secure.privacy.noise import gaussian
from clients.client import Client
from clients.training import LocalTrainer, Trainer


class CentralClient(Client):
    """A client whose answers the curator of the same simulation may use; nothing else builds one."""

    def charge(self, index: int) -> list[dict[str, Any]]:
        """Pay for the release of round `index` (0-based); returns the ledger's new rows."""
        plan = self.agreement.plan
        if self._ledger is None or not plan.noisy_rounds:
            return []
        return [self._ledger.charge(f"predictor/{index + 1}", plan.event(index))]

    @property
    def trainer(self) -> Trainer:
        """Training on this client's answers and private context."""
        return self._local_trainer()

    @property
    def noise_key(self) -> bytes:
        """The client's own key of noise."""
        return bytes(self._state["noise_key"])


class Curator:
    """The trusted party: a gradient per round from everybody's answers."""

    def __init__(self, clients: Mapping[str, CentralClient]) -> None:
        """clients: all of one run, past their `context` stage by the first round."""
        agreement = next(iter(clients.values())).agreement
        if agreement.plan.training == "federated":
            raise PrivacyError("predictor.training=federated: nobody's answers leave their client")
        self.plan, self.clients = agreement.plan, dict(sorted(clients.items()))
        self._model = PreferencePredictor(agreement.predictor)
        self._quiet: dict[str, Trainer] = {}

    def round(self, start: np.ndarray, index: int) -> tuple[np.ndarray, dict[str, list[dict[str, Any]]]]:
        """The gradient (P,) of round `index` (0-based) at the parameters `start` (P,), and each client's ledger rows."""
        if self.plan.training == "one_group":
            name = self.turn(index)
            paid = {name: self.clients[name].charge(index)}  # before the release exists
            return self.clients[name].trainer.round(start, index, self._model), paid
        rows = {name: client.charge(index) for name, client in self.clients.items()}
        trainers = [self._quiet_trainer(name) for name in self.clients]
        gradient = np.mean([trainer.round(start, index, self._model) for trainer in trainers], axis=0)
        if self.plan.noisy_rounds:
            gradient = gradient + self._noise(trainers, start, index)
        return gradient, rows

    def turn(self, index: int) -> str:
        """The client whose turn round `index` (0-based) is; public, from the seed."""
        cycle, place = divmod(index, len(self.clients))
        order = np.random.default_rng([self.plan.seed, 0x7A2B5, cycle]).permutation(len(self.clients))
        return list(self.clients)[order[place]]

    def _noise(self, trainers: list[Trainer], start: np.ndarray, index: int) -> np.ndarray:
        """Once for the mean over groups: one unit of group g moves it by s_g C / G at most."""
        (questions,) = self.plan.steps(index)
        scales = [t.scale(len(questions)) for t in trainers if isinstance(t, LocalTrainer)]
        spread = sensitivity.gradient_sum(self.plan.clip) * max(scales) / len(trainers)
        key = hashlib.sha256(b"curator" + b"".join(c.noise_key for c in self.clients.values())).digest()
        label = f"curator/{self.plan.run}/{index}/{hashlib.sha256(start.tobytes()).hexdigest()}"
        return gaussian(key, label, len(start), self.plan.noise_multiplier * spread)

    def _quiet_trainer(self, name: str) -> Trainer:
        """A client's trainer without noise of its own: the curator adds it to the sum."""
        if name not in self._quiet:
            trainer = self.clients[name].trainer
            trainer.plan = replace(trainer.plan, noise_multiplier=0.0)
            self._quiet[name] = trainer
        return self._quiet[name]
