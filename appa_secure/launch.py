"""Where the parties of a run are put together: the only module that knows both clients and coordinator.

In `local` federation everything lives in one process and still talks in bytes through the real protocol; in
`simulation` Flower's engine carries the same bytes between the same machines. In a deployment each side starts its
own part, and nothing here is used.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from appa_secure import data as surveys
from appa_secure.agreement import Agreement, make_agreement
from appa_secure.config import Config
from appa_secure.data import GroupData, split_members
from appa_secure.embedder import build_embedder, embed_points
from appa_secure.errors import ConfigError
from appa_secure.progress import Progress
from appa_secure.records import RunDir
from appa_secure.secagg.keys import Directory, IdentityKey

if TYPE_CHECKING:
    from clients.client import Client


@dataclass(frozen=True)
class Parts:
    """Everything a federation in one place needs; `holdings` is what each client alone would hold."""

    agreement: Agreement
    heldout: tuple[str, ...]
    nominal: bool
    holdings: Mapping[str, GroupData]
    embeddings: Mapping[str, np.ndarray]
    client_root: Path
    seeds: Mapping[str, bytes]

    def client(self, client_id: str) -> Client:
        """The client with its store; state of an earlier process is picked up from there."""
        from clients.client import Client
        from clients.store import ClientStore

        secret = self.seeds[client_id]
        return Client(
            client_id,
            self.holdings[client_id],
            self.agreement,
            self.embeddings,
            ClientStore(self.store_of(client_id)),
            _identity(secret),
            noise_key=_noise_key(secret) if self.noise_from_seed else None,
        )

    def store_of(self, client_id: str) -> Path:
        """The folder of a client's own state."""
        return self.client_root / _folder(client_id)

    @property
    def noise_from_seed(self) -> bool:
        """Whether noise is reproducible from the run's seed (simulations) or from a secret of each client."""
        return not self.agreement.secure_rng


def run(config: Config, resume: Path | None = None) -> Path:
    """Do (or finish) one run; returns its directory. Raises AppaError subclasses for everything expected."""
    root = resume if resume is not None else Path(config.output_root) / (config.name or _name(config))
    directory = RunDir.open(root) if resume is not None else RunDir.create(root)
    with directory, Progress() as progress:
        directory.write_config(config.to_yaml())
        directory.write_environment()
        if config.federation.kind == "simulation":
            from appa_secure.simulation import simulate

            simulate(config, directory, progress)
        else:
            parts = prepare(config, directory.root, progress)
            clients = {c: parts.client(c) for c in parts.agreement.clients}
            align(
                config,
                parts,
                LocalFederation({c: client.handle for c, client in clients.items()}),
                directory,
                progress,
            )
    from appa_secure.report import render

    render(root)
    return root


def align(config: Config, parts: Parts, federation: object, directory: RunDir, progress: Progress) -> None:
    """The coordinator's part of a run over any federation."""
    from coordinator.pipeline import Pipeline

    Pipeline(
        config, parts.agreement, parts.heldout, federation, directory, progress, parts.nominal,  # type: ignore[arg-type]
    ).run()  # fmt: skip


def prepare(config: Config, root: Path, progress: Progress | None = None) -> Parts:
    """Load the survey, split it, embed its public texts, and derive what all parties agree on."""
    survey = surveys.load(config.data, config.seed)
    for reason, count in survey.dropped.items():
        if progress is not None:
            progress.note(f"data: dropped {count} ({reason})")
    split = surveys.split_questions(
        survey.questions, config.data.context, config.data.heldout_fraction, config.seed
    )
    holdings, groups = {}, {}
    for group in survey.groups:
        for member in split_members(group, config.federation.members_per_group, config.seed):
            holdings[member.name], groups[member.name] = member, group.name
    if config.secagg.mode == "blind" and len(holdings) < config.secagg.min_cohort:
        raise ConfigError(
            f"data.groups: {len(holdings)} groups, secagg.min_cohort={config.secagg.min_cohort}: sums over so few groups "
            "reveal them. Fix: take more groups, or secagg=cohort with members"
        )
    if progress is not None:
        progress.note(f"data: {survey.name}, {len(survey.questions)} questions, {len(survey.groups)} groups")
    embedder = build_embedder(config.embedder)
    # MiniLM vectors have length 1; the network expects inputs of unit variance.
    points = embed_points(embedder, survey.questions)
    scale = np.float32(np.sqrt(next(iter(points.values())).shape[1]))
    embeddings = {q: e * scale for q, e in points.items()}
    run_id = hashlib.sha256(f"{root.name}/{config.seed}".encode()).hexdigest()[:16]
    # In one process the provisioned directory is made here; in a deployment each site brings its own key.
    seeds = {c: hashlib.sha256(f"{run_id}/{config.seed}/{c}".encode()).digest() for c in holdings}
    directory = Directory({c: _identity(seed).public_bytes() for c, seed in seeds.items()})
    agreement = make_agreement(
        config, run_id, survey.questions, split, groups, directory, next(iter(embeddings.values())).shape[1],
        config.embedder.kind,
    )  # fmt: skip
    return Parts(
        agreement=agreement,
        heldout=split.heldout,
        nominal=any(group.nominal for group in survey.groups),
        holdings=holdings,
        embeddings=embeddings,
        client_root=Path(config.federation.client_root) / f"{root.name}-{run_id[:8]}",
        seeds=seeds,
    )


class LocalFederation:
    """All clients in this process; every request and reply still crosses the boundary as bytes.

    Clients work side by side, one thread each: their arithmetic does not depend on how many cores there are.
    """

    def __init__(self, handlers: Mapping[str, Callable[[bytes], bytes | None]]) -> None:
        self.handlers = dict(handlers)
        self.clients = tuple(sorted(handlers))
        self._pool = ThreadPoolExecutor(
            os.cpu_count(), "client", initializer=torch.set_num_threads, initargs=(1,)
        )

    def exchange(self, requests: Mapping[str, bytes]) -> dict[str, bytes]:
        """Ask the clients; a handler that returns None has dropped out."""
        running = {client: self._pool.submit(self.handlers[client], raw) for client, raw in requests.items()}
        replies = {client: future.result() for client, future in running.items()}
        return {client: reply for client, reply in replies.items() if reply is not None}


def _identity(secret: bytes) -> IdentityKey:
    return IdentityKey.from_seed(hashlib.sha256(b"identity" + secret).digest())


def _noise_key(secret: bytes) -> bytes:
    return hashlib.sha256(b"noise" + secret).digest()


def _folder(client_id: str) -> str:
    """A directory name for a client id, which may hold any characters."""
    safe = "".join(c if c.isalnum() else "_" for c in client_id)
    return f"{safe}-{hashlib.sha256(client_id.encode()).hexdigest()[:8]}"


def _name(config: Config) -> str:
    return f"{config.experiment}-{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
