"""Secure aggregation side by side with Flower's SecAgg+, in one run: `make bench-secagg`.

Both protocols run in this process without a network, one thread each: the figures are computing times. The peer is
driven by `peers/flower_secagg.py` in the folder that APPA_SHARED names (default: ../shared); without it only our own
columns are filled. Ours runs at its default threshold ceil(2n/3), the peer at a bare majority, where it is faster.

client mask    one client's whole reply to a round request: encoding, all masks, MAC
server unmask  everything between the last upload and the decoded sum, the sum of the uploads included
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import modes
from rich.console import Console
from rich.table import Table

from appa_secure.progress import Progress
from appa_secure.secagg import (
    Aggregate,
    ClientMachine,
    ClientPolicy,
    Continue,
    CoordinatorMachine,
    Directory,
    EpochReady,
    IdentityKey,
    Layout,
    Segment,
    respond,
    shamir,
)
from appa_secure.secagg.masks import apply_masks, fastest_mode, keystream
from appa_secure.secagg.policy import DEFAULT_ROUNDS

N = 50
DIMS = (64, 10**3, 10**5, 10**6)
DROPPED = (0.0, 0.1, 0.3)
RING_BITS = 32
CONTEXT = hashlib.sha256(b"bench").digest()
CHUNK = 256 * 1024
BOUND = "what bounds it"
REPO = Path(__file__).resolve().parents[2]

Seconds = list[float]


@dataclass
class Timing:
    """Wall times of one kind of round, in seconds."""

    client: Seconds = field(default_factory=list)  # per client and repetition
    answer: Seconds = field(default_factory=list)
    collect: Seconds = field(default_factory=list)  # server: taking the uploads in, per repetition
    server: Seconds = field(default_factory=list)  # server: unmasking, per repetition
    upload_bytes: int = 0


class Ours:
    """n clients and a coordinator in this process; every call of a machine is timed."""

    def __init__(self, n: int, rounds: int, note: Callable[[str], None]) -> None:
        self.names = [f"client-{i:04d}" for i in range(n)]
        keys = {name: IdentityKey.generate() for name in self.names}
        directory = Directory({name: key.public_bytes() for name, key in keys.items()})
        policy = ClientPolicy(ring_bits=RING_BITS, max_rounds=rounds, release="recover")
        self.clients = {name: ClientMachine(name, key, directory, policy) for name, key in keys.items()}
        self.coordinator = CoordinatorMachine(
            b"bench", directory, rounds=rounds, ring_bits=RING_BITS, release="recover"
        )
        self.rounds, self.round = rounds, 0
        self.client_setup: Seconds = [0.0] * n
        self.server_setup = 0.0
        self._set_up(note)

    def _set_up(self, note: Callable[[str], None]) -> None:
        with clocked() as spent:
            step: Any = self.coordinator.propose(1)
        self.server_setup += spent[0]
        beat = time.monotonic()
        while isinstance(step, Continue):
            for i, name in enumerate(self.names):
                with clocked() as spent:
                    reply = respond(self.clients[name], step.outbound[name])
                self.client_setup[i] += spent[0]
                assert reply is not None
                with clocked() as spent:
                    self.coordinator.receive(name, reply)
                self.server_setup += spent[0]
                if time.monotonic() - beat > 10:
                    beat = time.monotonic()
                    note(
                        f"set-up of {len(self.names)} clients: {self.coordinator.state.value}, client {i + 1}"
                    )
            with clocked() as spent:
                step = self.coordinator.advance()
            self.server_setup += spent[0]
        assert isinstance(step, EpochReady), step

    def measure(self, layout: Layout, vector: np.ndarray, dropped: int, timing: Timing) -> None:
        """One round in which the last `dropped` clients never upload; checks the sum."""
        self.round += 1
        step = self.coordinator.begin_round(self.round, CONTEXT, layout)
        alive = self.names[: len(self.names) - dropped]
        collect = 0.0
        for name in alive:
            with clocked() as spent:
                reply = self.clients[name].upload(step.outbound[name], vector, layout=layout, context=CONTEXT)
            timing.client.append(spent[0])
            timing.upload_bytes = len(reply)
            with clocked() as spent:
                self.coordinator.receive(name, reply)
            collect += spent[0]
        timing.collect.append(collect)
        with clocked() as spent:
            outcome: Any = self.coordinator.advance()
        server = spent[0]
        assert isinstance(outcome, Continue), outcome
        for name in alive:
            with clocked() as spent:
                reply = self.clients[name].unmask(outcome.outbound[name])
            timing.answer.append(spent[0])
            with clocked() as spent:
                self.coordinator.receive(name, reply)
            server += spent[0]
        with clocked() as spent:
            outcome = self.coordinator.advance()
        timing.server.append(server + spent[0])
        assert isinstance(outcome, Aggregate), outcome
        one = layout.preflight(len(self.names)).encode(vector)
        assert np.array_equal(outcome.ring_sum, one * one.dtype.type(len(alive))), "the sum is wrong"


@contextmanager
def clocked() -> Iterator[Seconds]:
    spent = [0.0]
    began = time.perf_counter()
    yield spent
    spent[0] = time.perf_counter() - began


def load_peer() -> ModuleType | None:
    """The driver of the peer, if the shared folder has it; it is not part of this repository."""
    path = Path(os.environ.get("APPA_SHARED", REPO.parent / "shared")) / "peers" / "flower_secagg.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("flower_secagg", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure_peer(peer: ModuleType, dim: int, dropped: int, timing: Timing) -> None:
    drop = {"collect_masked_vectors": dropped} if dropped else None
    result, grid, _, _ = peer.run(N, dim, N, N // 2 + 1, drop)
    assert result.get("max_err", 1.0) < 1e-3, result
    timing.client += grid.tclient["collect_masked_vectors"]
    timing.server.append(result["unmask"]["server_s"])
    timing.collect.append(result["collect_masked_vectors"]["server_s"])
    vectors = next(reply for stage, _, reply in grid.log if stage == "collect_masked_vectors")
    config = vectors.content.config_records[peer.RECORD_KEY_CONFIGS]
    timing.upload_bytes = sum(map(len, config[peer.Key.MASKED_PARAMETERS]))


def expansion(repetitions: int) -> tuple[Seconds, Seconds, Seconds]:
    """GB/s of raw AES-256-CTR, of the routine that mask expansion takes on this machine, and of mask expansion (keystream
    and modular add), over 10^6 32-bit entries and one key per peer. Taken in turns, so that a busy machine slows all."""
    vector = np.zeros(10**6, dtype=np.uint32)
    keys = [bytes([i]) * 32 for i in range(N)]
    zeros, out = memoryview(bytes(CHUNK)), bytearray(CHUNK + 16)
    whole, rest = divmod(vector.nbytes, CHUNK)
    tail = zeros[:rest]
    rates: tuple[Seconds, Seconds] = ([], [])
    masked: Seconds = []
    for _ in range(repetitions):
        for mode, found in zip((modes.CTR(bytes(16)), fastest_mode()), rates, strict=True):
            with clocked() as spent:
                for key in keys:
                    stream = keystream(key, mode)
                    for _ in range(whole):
                        stream(zeros, out)
                    stream(tail, out)
            found.append(len(keys) * vector.nbytes / spent[0] / 1e9)
        with clocked() as spent:
            apply_masks(vector, keys, [])
        masked.append(len(keys) * vector.nbytes / spent[0] / 1e9)
    return *rates, masked


def primitives() -> list[tuple[str, Seconds]]:
    """Seconds of the operations everything is made of."""
    a, b = X25519PrivateKey.generate(), X25519PrivateKey.generate().public_key()
    signer = Ed25519PrivateKey.generate()
    signature, public = signer.sign(CONTEXT), signer.public_key()
    t = -(-2 * N // 3)
    secrets = np.frombuffer(os.urandom(32 * N), np.uint8).reshape(N, 32)
    dealt = shamir.share(secrets, t, N, os.urandom)
    points = np.tile(np.arange(1, t + 1, dtype=np.int64), (N, 1))  # (S, t)
    rows = np.ascontiguousarray(dealt[:t].transpose(1, 0, 2))  # (S, t, 9)
    works: tuple[tuple[str, Callable[[], object], int], ...] = (
        ("X25519 key agreement", lambda: a.exchange(b), 100),
        ("Ed25519 signature", lambda: signer.sign(CONTEXT), 100),
        ("Ed25519 verification", lambda: public.verify(signature, CONTEXT), 100),
        (f"Shamir: deal one secret, {t} of {N}", lambda: shamir.share(secrets[:1], t, N, os.urandom), 10),
        (f"Shamir: combine {N} secrets, {t} of {N}", lambda: shamir.combine(points, rows), 10),
    )
    found = []
    for name, work, times in works:
        work()
        samples = []
        for _ in range(9):
            with clocked() as spent:
                for _ in range(times):
                    work()
            samples.append(spent[0] / times)
        found.append((name, samples))
    return found


# -- presentation


def spread(samples: Sequence[float], unit: str = "s") -> str:
    """Median and interquartile range (range, for fewer than four samples); seconds in a unit that suits them."""
    if not samples:
        return "–"
    middle, scale = statistics.median(samples), 1.0
    if unit == "s" and middle < 1:
        scale, unit = (1e3, "ms") if middle >= 1e-3 else (1e6, "µs")
    if len(samples) == 1:
        return f"{scale * middle:.3g} {unit}"
    low, high = min(samples), max(samples)
    if len(samples) >= 4:
        low, _, high = statistics.quantiles(samples, n=4)
    return f"{scale * middle:.3g} ({scale * low:.3g}..{scale * high:.3g}) {unit}"


def ratio(peer: Sequence[float], ours: Sequence[float]) -> float | None:
    return statistics.median(peer) / statistics.median(ours) if peer and ours else None


@dataclass
class Report:
    """Tables of text, printed with rich and written as Markdown."""

    tables: list[tuple[str, tuple[str, ...], Sequence[tuple[str, ...]]]] = field(default_factory=list)

    def add(self, title: str, heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        self.tables.append((title, heads, rows))
        table = Table(title=title, title_justify="left")
        for i, head in enumerate(heads):
            words = i == 0 or head == BOUND
            table.add_column(head, justify="left" if words else "right", no_wrap=head != BOUND)
        for row in rows:
            table.add_row(*(f"[bold red]{c}[/]" if c == "MISSED" else c for c in row))
        Console(width=max(Console().width, 110)).print(table)  # a table cut at 80 columns loses its figures

    def markdown(self, preface: str) -> str:
        parts = [preface]
        for title, heads, rows in self.tables:
            lines = ["| " + " | ".join(cells) + " |" for cells in (heads, ("---",) * len(heads), *rows)]
            parts.append(f"### {title}\n\n" + "\n".join(lines))
        return "\n\n".join(parts) + "\n"


Cell = tuple[int, float]


def targets(
    ours: dict[Cell, Timing],
    peers: dict[Cell, Timing],
    share: float,
    large: tuple[float, float, float] | None,
    why: Mapping[str, str],
) -> list[tuple[str, ...]]:
    """What was asked for, what was reached; where that is less, what bounds it (`why`, by the beginning of the name)."""
    rows: list[tuple[str, ...]] = []

    def row(name: str, value: float | None, unit: str, target: str, good: bool) -> None:
        reached = "not measured" if value is None else f"{value:,.4g}{unit}"
        verdict = "–" if value is None else "reached" if good else "MISSED"
        bound = next((text for start, text in why.items() if name.startswith(start)), "–")
        rows.append((name, target, reached, verdict, bound if verdict == "MISSED" else ""))

    def at_least(name: str, least: int, value: float | None) -> None:
        row(name, value, "x", f">= {least:,}x", (value or 0) >= least)

    def clients(where: dict[Cell, Timing], dim: int) -> Seconds:
        return [s for (d, _), timing in where.items() if d == dim for s in timing.client]

    for dim, least in ((10**3, 50), (10**6, 6)):
        at_least(f"client mask, dim {dim:,}", least, ratio(clients(peers, dim), clients(ours, dim)))
    for dim, gone, least in ((10**3, 0.0, 1000), (10**3, 0.3, 1000), (10**6, 0.3, 40)):
        cell = (dim, gone)
        value = ratio(peers[cell].server, ours[cell].server) if cell in peers and cell in ours else None
        at_least(f"server unmask, dim {dim:,}, {gone:.0%} dropped", least, value)
    row("mask expansion, dim 1,000,000", 100 * share, " %", ">= 70 % of raw AES-CTR", share >= 0.7)
    for dim in (10**5, 10**6):
        if (dim, 0.0) in ours:
            size = ours[dim, 0.0].upload_bytes / dim
            row(f"upload, dim {dim:,}", size, "", "<= 4.1 bytes per entry", size <= 4.1)
    if large:
        client, server, setup = large
        row("n = 1,000: client, per round", 1e3 * client, " ms", "<= 10 ms", client <= 0.01)
        row("n = 1,000: server, per round", server, " s", "<= 2 s", server <= 2)
        row("n = 1,000: epoch set-up, per client", setup, " s", "<= 1 s", setup <= 1)
    return rows


def compare(args: argparse.Namespace, progress: Progress, report: Report) -> None:
    peer = None if args.ours_only else load_peer()
    if peer is None:
        progress.note("without the peer: no peers/flower_secagg.py in APPA_SHARED, or --ours-only")
    dims = (10**3, 10**6) if args.quick else DIMS
    dropped = (0.0, 0.3) if args.quick else DROPPED
    cells = [(dim, share) for dim in dims for share in dropped]

    progress.note("primitives and mask expansion")
    report.add(
        "Primitives, median (IQR)",
        ("operation", "time"),
        [(name, spread(samples)) for name, samples in primitives()],
    )
    raw, taken, masked = expansion(5 if args.quick else 15)
    share = statistics.median(m / r for m, r in zip(masked, raw, strict=True))

    ours = {cell: Timing() for cell in cells}
    world = Ours(N, args.reps * len(cells) + 1, progress.note)
    total = len(cells) * (args.reps + (args.peer_reps if peer else 0))
    done = 0
    layouts = {dim: Layout((Segment("v", dim, -8.0, 8.0),), RING_BITS) for dim in dims}
    vectors = {dim: np.random.default_rng(dim).normal(0, 1, dim).clip(-8, 8) for dim in dims}
    world.measure(layouts[dims[0]], vectors[dims[0]], 0, Timing())  # the first round also checks the roster
    for cell in cells:
        dim, gone = cell
        for _ in range(args.reps):
            world.measure(layouts[dim], vectors[dim], round(N * gone), ours[cell])
            done += 1
            progress.step("bench", done, total, who="ours", dim=dim, dropped=f"{gone:.0%}")
    setup_rows = [
        ("client", spread(world.client_setup)),
        ("client, per round of the epoch", spread([s / world.rounds for s in world.client_setup])),
        ("server", spread([world.server_setup])),
    ]
    setup_title = f"Our epoch set-up, n = {N}, {world.rounds} rounds (the peer sets up every round)"
    del world
    gc.collect()

    peers: dict[Cell, Timing] = {}
    if peer is not None:
        for cell in cells:
            peers[cell] = Timing()
            for _ in range(args.peer_reps):
                measure_peer(peer, cell[0], round(N * cell[1]), peers[cell])
                gc.collect()
                done += 1
                progress.step("bench", done, total, who="peer", dim=cell[0], dropped=f"{cell[1]:.0%}")

    def side_by_side(title: str, pick: Callable[[Timing], Seconds]) -> None:
        rows = []
        for cell in cells:
            theirs = pick(peers[cell]) if cell in peers else []
            factor = ratio(theirs, pick(ours[cell]))
            rows.append(
                (
                    f"{cell[0]:,}, {cell[1]:.0%} dropped",
                    spread(pick(ours[cell])),
                    spread(theirs),
                    "–" if factor is None else f"{factor:,.0f}x" if factor >= 10 else f"{factor:.1f}x",
                )
            )
        report.add(title, ("dim", "ours", "Flower SecAgg+", "peer / ours"), rows)

    side_by_side(f"Client mask, n = {N}: median (IQR)", lambda t: t.client)
    side_by_side(f"Server unmask, n = {N}: median (IQR)", lambda t: t.server)
    side_by_side(f"Server, taking uploads in, n = {N}: median (IQR)", lambda t: t.collect)
    rows = [
        (
            f"{dim:,}",
            f"{ours[dim, 0.0].upload_bytes / dim:.3f}",
            f"{peers[dim, 0.0].upload_bytes / dim:.3f}" if peers else "–",
            spread(ours[dim, 0.0].answer),
        )
        for dim in dims
    ]
    heads = ("dim", "ours, bytes per entry", "peer, bytes per entry", "our client's answer")
    report.add("Upload size and answer to the unmask request", heads, rows)
    report.add(setup_title, ("who", "median (IQR)"), setup_rows)
    alone = [4e6 * N / (rate * 1e9) for rate in taken]
    bound = ratio([s for (dim, _), t in peers.items() if dim == 10**6 for s in t.client], alone)
    report.add(
        f"Mask expansion: 10^6 32-bit entries, {N} masks",
        ("what", "rate"),
        [
            (f"raw AES-256-CTR, {CHUNK // 1024} KiB chunks", spread(raw, "GB/s")),
            (
                f"the same keystream by the quicker routine here ({fastest_mode().name})",
                spread(taken, "GB/s"),
            ),
            ("keystreams added in the ring", spread(masked, "GB/s")),
            ("share of raw, median of paired runs", f"{100 * share:.0f} %"),
            ("the keystreams of one client mask alone, by that routine", spread(alone)),
            ("peer's client mask at 10^6 / that: no ratio can exceed it", f"{bound:.1f}x" if bound else "–"),
        ],
    )
    large = measure_large(args, progress, report) if args.large else None
    why = {
        "client mask, dim 1,000,000": f"keystreams alone take {spread(alone)}: at most {bound or 0:.1f}x",
        "client mask": f"{N} keys: an HMAC, an AES key schedule and a check of the seed each, before any entry is masked",
        "server unmask, dim 1,000,000": "one keystream per survivor, and one per survivor and dropped party",
        "server unmask": f"{N} answers to decode, authenticate and unseal; two keys per survivor, one per survivor and "
        "dropped party",
        "mask expansion": "the modular add reads and writes every chunk once more per keystream",
        "n = 1,000: epoch set-up": "one X25519 key agreement per round and peer",
        "n = 1,000: client": "one keystream key per peer; the first round's acknowledgements are not counted",
        "n = 1,000: server": "decoding of 900 uploads and answers; shares of 1,000 secrets, 114 of 153 each",
    }
    heads = ("what", "target", "reached", "verdict", BOUND)
    report.add("Targets", heads, targets(ours, peers, share, large, why))


def measure_large(args: argparse.Namespace, progress: Progress, report: Report) -> tuple[float, float, float]:
    """Many clients, dim 10^3, a tenth dropped."""
    n, dim = args.large, 10**3
    progress.note(f"set-up of {n} clients, {args.large_rounds} rounds")
    world = Ours(n, args.large_rounds, progress.note)
    layout, timing = Layout((Segment("v", dim, -8.0, 8.0),), RING_BITS), Timing()
    vector = np.random.default_rng(n).normal(0, 1, dim).clip(-8, 8)
    world.measure(layout, vector, 0, Timing())  # the first round also checks the roster
    for i in range(min(args.reps, args.large_rounds - 1)):
        world.measure(layout, vector, n // 10, timing)
        progress.step("large", i + 1, args.reps)
    client = statistics.median(timing.client) + statistics.median(timing.answer)
    server = statistics.median(c + s for c, s in zip(timing.collect, timing.server, strict=True))
    rows = [
        ("client mask, per round", spread(timing.client)),
        ("client answer, per round", spread(timing.answer)),
        ("server, per round: uploads", spread(timing.collect)),
        ("server, per round: unmask", spread(timing.server)),
        (f"epoch set-up of {world.rounds} rounds, per client", spread(world.client_setup)),
        (f"epoch set-up of {world.rounds} rounds, server", spread([world.server_setup])),
    ]
    report.add(f"n = {n:,}, dim {dim:,}, 10% dropped: median (IQR)", ("what", "time"), rows)
    return client, server, statistics.median(world.client_setup)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.secagg",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = partial(parser.add_argument)
    add("--quick", action="store_true", help="dims 10^3 and 10^6, 0 and 30 %% dropped only: about 4 minutes")
    add("--ours-only", action="store_true", help="leave the peer out: about half a minute")
    add("--reps", type=int, default=5, help="repetitions of each of our rounds (default: 5)")
    add(
        "--peer-reps",
        type=int,
        default=1,
        help="repetitions of each round of the peer, half a minute each (default: 1)",
    )
    add("--large", type=int, metavar="N", nargs="?", const=1000, default=0,
        help="also N clients (default 1000) at dim 10^3 with 10 %% dropped; on a complete graph of peers N = 1000 "
        "takes hours and gigabytes, so use it with the sparse graph or a smaller N")  # fmt: skip
    add(
        "--large-rounds",
        type=int,
        default=DEFAULT_ROUNDS,
        help="rounds per epoch of --large (default: %(default)s)",
    )
    add("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown, for docs/results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    report, began = Report(), time.monotonic()
    with Progress() as progress:
        compare(args, progress, report)
    minutes = (time.monotonic() - began) / 60
    words = " ".join(sys.argv[1:] if argv is None else argv)
    preface = (
        f"`python -m tests.bench.secagg {words}`, {minutes:.1f} minutes, one thread on {platform.machine()}, "
        f"load average {os.getloadavg()[0]:.1f} at the end. n = {N}, ring of {RING_BITS} bits; ours at threshold "
        f"{-(-2 * N // 3)}, the peer at {N // 2 + 1}. Computing times without a network; medians, with the "
        "interquartile range over clients and repetitions in brackets."
    )
    if args.markdown:
        args.markdown.write_text(report.markdown(preface), encoding="utf-8")
    print(preface)


if __name__ == "__main__":
    main()
