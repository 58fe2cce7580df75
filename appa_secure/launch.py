"""Where the parties of a run are put together: the only module that knows both clients and coordinator.

In `local` federation everything lives in one process and still talks in bytes through the real protocol; in
`simulation` Flower's engine carries the same bytes between the same machines. In a deployment each side starts its
own part, and nothing here is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from appa_secure import data as surveys
from appa_secure.agreement import Agreement, make_agreement
from appa_secure.config import Config, load
from appa_secure.data import GroupData, split_members
from appa_secure.embedder import build_embedder, embed_points
from appa_secure.errors import ConfigError
from appa_secure.journal import atomic_write
from appa_secure.membership import FILE, Membership, membership_of, next_membership, renewed
from appa_secure.origin import Origin, read_origin
from appa_secure.privacy.output import std_of_mean
from appa_secure.progress import Progress
from appa_secure.records import CONFIG, RunDir
from appa_secure.secagg.keys import Directory, IdentityKey

if TYPE_CHECKING:
    from clients.client import Client
    from coordinator.rounds import Summed


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
    origin: Origin | None

    def client(self, client_id: str) -> Client:
        """The client with its store; state of an earlier process is picked up from there."""
        from clients.centralised import CentralClient
        from clients.client import Client
        from clients.store import ClientStore

        secret, store = self.seeds[client_id], ClientStore(self.site(client_id))
        if (o := self.origin) is not None:
            there = ClientStore(_client_root(o.config, o.root, o.run) / _folder(client_id))
            store.adopt(there, o.run, o.parameters, self.agreement.questions)
        kind = Client if self.agreement.plan.training == "federated" else CentralClient
        return kind(
            client_id,
            self.holdings[client_id],
            self.agreement,
            self.embeddings,
            store,
            _identity(secret),
            noise_key=_noise_key(secret) if self.noise_from_seed else None,
        )

    def site(self, client_id: str) -> Path:
        """Folder of a client's store, where its operator also leaves the membership."""
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
                _CuratorSums(clients) if config.predictor.training != "federated" else None,
            )
    from appa_secure.report import render

    render(root)
    return root


def align(
    config: Config, parts: Parts, federation: object, directory: RunDir, progress: Progress,
    curator: _CuratorSums | None = None,
) -> None:  # fmt: skip
    """The coordinator's part of a run over any federation; `curator` trains the predictor in the clients' place."""
    from coordinator.pipeline import Pipeline

    Pipeline(
        config, parts.agreement, parts.heldout, federation, directory, progress, parts.nominal,  # type: ignore[arg-type]
        parts.embeddings, curator, parts.origin,
    ).run()  # fmt: skip


def prepare(config: Config, root: Path, progress: Progress | None = None) -> Parts:
    """Load the survey, split it, embed its public texts, and derive what all parties agree on."""
    origin = read_origin(config)
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
        config.embedder.kind, "" if origin is None else origin.digest,
    )  # fmt: skip
    if progress is not None and agreement.output is not None:
        layout = agreement.reward_layout(config.ppo.prompts_per_step * config.ppo.generations)
        std = std_of_mean(layout.preflight(agreement.summed_together), agreement.summed_together)
        progress.note(
            f"output noise: standard deviation {std:.3g} on every mean reward over {agreement.summed_together} clients"
            + (": nothing can be learnt from such rewards" if std > 0.5 else "")
        )
    return Parts(
        agreement=agreement,
        heldout=split.heldout,
        nominal=any(group.nominal for group in survey.groups),
        holdings=holdings,
        embeddings=embeddings,
        client_root=_client_root(config, root, run_id),
        seeds=seeds,
        origin=origin,
    )


def change_members(
    root: Path, *, leave: Sequence[str] = (), join: Sequence[str] = (), rotate: Sequence[str] = ()
) -> Membership:
    """Act as the operators of all sites of the run in `root`: agree on other members and tell every machine.

    leave: members that go. join: founding members that come back. rotate: members, or such as come back, that get a new
    signing key. May be called while the run goes on: the sites are told first, the coordinator last, and follows before
    its next alignment step. Raises ConfigError, and writes nothing, for a change that no site should follow.
    """
    from clients.store import IDENTITY

    parts = prepare(load(root / CONFIG), root)
    known = parts.agreement.groups
    if strange := sorted({*leave, *join, *rotate} - set(known)):
        raise ConfigError(f"{', '.join(strange)}: not among this run's clients, {', '.join(sorted(known))}")
    if absent := sorted(c for c in known if not parts.site(c).is_dir()):
        raise ConfigError(
            f"{', '.join(absent)}: no state yet. Fix: change members once the run has set its clients up"
        )
    told = {c: _told(parts.site(c)) for c in known}
    current = _told(root) or membership_of(parts.agreement)
    latest = max([current.version, *(m.version for m in told.values() if m is not None)])
    fresh = {c: os.urandom(32) for c in rotate}

    def public(client: str) -> bytes:
        stored = parts.site(client) / IDENTITY
        seed = fresh.get(client) or (stored.read_bytes() if stored.exists() else None)
        key = _identity(parts.seeds[client]) if seed is None else IdentityKey.from_seed(seed)
        return key.public_bytes()

    news = next_membership(
        current, latest, leave=leave, join={c: (known[c], public(c)) for c in join},
        rotate={c: public(c) for c in rotate if c not in join},
    )  # fmt: skip
    agreement = parts.agreement if current.version == 0 else renewed(parts.agreement, current)
    renewed(agreement, news)
    for client, seed in fresh.items():
        atomic_write(parts.site(client) / IDENTITY, seed)
        os.chmod(parts.site(client) / IDENTITY, 0o600)
    for folder in (*(parts.site(c) for c in known), root):
        atomic_write(folder / FILE, news.encode())
    return news


def _told(folder: Path) -> Membership | None:
    path = folder / FILE
    return Membership.decode(path.read_bytes()) if path.exists() else None


class _CuratorSums:
    """Rounds of a centralised simulation in the form in which the coordinator takes sums of clients' updates."""

    def __init__(self, clients: Mapping[str, Client]) -> None:
        from clients.centralised import CentralClient, Curator

        self._curator = Curator(
            {c: client for c, client in clients.items() if isinstance(client, CentralClient)}
        )

    def sum(self, session: str, kind: str, payload: Mapping[str, Any], layout: object) -> Summed:
        """One round; the sum is the mean already, and the curator its only contributor."""
        from coordinator.rounds import Summed

        start = np.frombuffer(payload["parameters"], dtype="<f4").copy()
        gradient, rows = self._curator.round(start, payload["round"])
        replies = {client: {"ledger": json.dumps(new).encode()} for client, new in rows.items()}
        return Summed(gradient, ("curator",), (), replies)


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
        there = {c: raw for c, raw in requests.items() if c in self.handlers}
        running = {client: self._pool.submit(self.handlers[client], raw) for client, raw in there.items()}
        replies = {client: future.result() for client, future in running.items()}
        return {client: reply for client, reply in replies.items() if reply is not None}


def _identity(secret: bytes) -> IdentityKey:
    return IdentityKey.from_seed(hashlib.sha256(b"identity" + secret).digest())


def _noise_key(secret: bytes) -> bytes:
    return hashlib.sha256(b"noise" + secret).digest()


def _client_root(config: Config, root: Path, run_id: str) -> Path:
    """Folder of the clients' stores of the run with directory `root`."""
    return Path(config.federation.client_root) / f"{root.name}-{run_id[:8]}"


def _folder(client_id: str) -> str:
    """A directory name for a client id, which may hold any characters."""
    safe = "".join(c if c.isalnum() else "_" for c in client_id)
    return f"{safe}-{hashlib.sha256(client_id.encode()).hexdigest()[:8]}"


def _name(config: Config) -> str:
    return f"{config.experiment}-{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
