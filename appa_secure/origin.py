"""A run that starts from the finished predictor of another: which run may be taken, and what names it.

Members of a sweep that differ in what comes after the predictor are one family: a run with `until=predictor` makes the
private release, pays for it, and trains; the members start from its result. What passes over is what the clients and
the coordinator keep of those stages: noisy histograms, predictions, ledgers, parameters. No keys, noise keys, machines
or answered requests do, so that nothing can be repeated or subtracted across runs by what was handed over.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from appa_secure import records
from appa_secure.config import Config, load
from appa_secure.config_sections import EvaluationConfig, TaskConfig
from appa_secure.errors import ConfigError


@dataclass(frozen=True)
class Origin:
    """A finished run that ended with its predictor. run: its id; transcript: the last hash of its transcript;
    parameters: SHA-256 of the predictor's parameters, hex."""

    root: Path
    config: Config
    run: str
    transcript: str
    parameters: str

    @property
    def digest(self) -> str:
        """What the parties of a run that starts here agree on, hex."""
        return records.digest(self.facts)

    @property
    def facts(self) -> dict[str, str]:
        """For the transcript and the privacy statement of a run that starts here."""
        return {"run": self.run, "transcript": self.transcript, "parameters": self.parameters}


def predictor_part(config: Config) -> Config:
    """The run that ends with the predictor of `config`: all that its stages read, everything else at its default.

    Configurations with equal parts have the same predictor. The reward stays, for what is measured depends on it.
    """
    return Config(
        seed=config.seed,
        until="predictor",
        task=TaskConfig(reward=config.task.reward),
        data=config.data,
        embedder=config.embedder,
        predictor=config.predictor.model_copy(update={"origin": None}),
        privacy=config.privacy,
        secagg=config.secagg,
        federation=config.federation.model_copy(update={"client_root": "client_state"}),
        evaluation=EvaluationConfig(
            truth=config.evaluation.truth, predictor_every=config.evaluation.predictor_every
        ),
    )


def read_origin(config: Config) -> Origin | None:
    """The run that `predictor.origin` names; None where it names none.

    Raises ConfigError for one with another predictor or with none yet, RunError for one that was changed.
    """
    if config.predictor.origin is None:
        return None
    root = Path(config.predictor.origin)
    told = f"predictor.origin={root}"
    if not (root / records.CONFIG).is_file() or not (root / records.SUMMARY).is_file():
        raise ConfigError(f"{told}: is no finished run. Fix: finish it, or leave predictor.origin out")
    origin = load(root / records.CONFIG)
    if origin.until != "predictor":
        raise ConfigError(f"{told}: went on to align a policy. Fix: a run with until=predictor")
    mine, other = (predictor_part(c).to_yaml().splitlines() for c in (config, origin))
    if mine != other:
        here, there = next((a, b) for a, b in zip(mine, other, strict=True) if a != b)
        raise ConfigError(
            f"{told}: trained another predictor ({there.strip()} there, {here.strip()} here). Fix: the same "
            "options for all that comes before alignment, or leave predictor.origin out"
        )
    summary = json.loads((root / records.SUMMARY).read_text("utf-8"))
    records.verify(root / records.TRANSCRIPT, summary["transcript_head"])
    first = records.read_journal(root / records.TRANSCRIPT)[0]
    # Clients compare it with what they were told at the end of that run.
    parameters = np.load(root / records.PREDICTOR / "parameters.npy").astype("<f4").tobytes()
    digest = hashlib.sha256(parameters).hexdigest()
    return Origin(root, origin, first["run_id"], summary["transcript_head"], digest)
