"""Flower as the federation: same results as in one process, and failing nodes that stop nothing.

The apps of both sides talk over a grid without Ray here, except in one test, which starts the real engine.
"""

import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.cli.config_utils import load_and_validate
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from appa_secure import simulation
from appa_secure.config import compose
from appa_secure.errors import ConfigError, RunError
from appa_secure.flower import unwrap, wrap
from appa_secure.progress import Progress
from appa_secure.records import RunDir, read_journal
from clients.app import Resident, client_app
from coordinator.app import GridFederation

CANARY = "17 respondents chose option 3"


@pytest.fixture(autouse=True)
def _identity() -> None:
    """What a running engine knows and Flower's messages ask for."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


class Shouting:
    """Stands for a client: answers with the request in capitals and keeps what it was asked on disk."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.seen = store.read_text() if store.exists() else ""

    def handle(self, raw: bytes) -> bytes:
        if raw == b"fail":
            self.seen += "half done;"
            raise ValueError(CANARY)
        self.seen += raw.decode() + ";"
        time.sleep(0.005)  # long enough for another process to get in between, if it could
        self.store.write_text(self.seen)
        return raw.upper() + b" after " + self.seen.encode()


def resident(folder: Path, client: str = "a") -> Resident:
    return Resident(client, folder / f"{client}.lock", lambda: Shouting(folder / client))


class DirectGrid:
    """A grid whose nodes answer at once in this process; `nodes` maps a node id to its app."""

    def __init__(self, nodes: dict[int, Callable[[Message], Message | None]]) -> None:
        self.nodes, self.replies, self.taken = nodes, {}, 0

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self.taken += 1
            message.metadata.__dict__["_message_id"] = f"m{self.taken}"
            reply = self.nodes[message.metadata.dst_node_id](message)
            if reply is not None:
                self.replies[f"m{self.taken}"] = reply
            ids.append(f"m{self.taken}")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(i) for i in list(message_ids) if i in self.replies]


def node(app: ClientApp) -> Callable[[Message], Message]:
    context = Context(1, 1, {}, RecordDict(), {})
    return lambda message: app(message, context)


def grid_of(folder: Path, *clients: str) -> DirectGrid:
    apps = [client_app(partial(lambda found, _: found, resident(folder, c))) for c in clients]
    return DirectGrid({10 * i: node(app) for i, app in enumerate(apps, 1)})


def federation(grid: DirectGrid, *clients: str, **options: Any) -> GridFederation:
    return GridFederation(grid, clients, **{"timeout": 0.3, **options})


def test_bytes_reach_the_right_client_and_come_back(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, "b", "a", "c")
    there = federation(grid, "a", "b", "c")
    assert there.clients == ("a", "b", "c")
    replies = there.exchange({"c": b"to c", "a": b"to a"})
    assert replies == {"a": b"TO A after to a;", "c": b"TO C after to c;"}
    assert list(replies) == ["a", "c"]


def _broken(message: Message) -> Message:
    return Message(RecordDict({"metrics": ConfigRecord({"loss": 0.5})}), reply_to=message)


def _both(message: Message) -> Message:
    content = wrap(b"reply")
    content["metrics"] = ConfigRecord({"loss": 0.5})
    return Message(content, reply_to=message)


@pytest.mark.parametrize("behaviour", [lambda _: None, _broken, _both], ids=["silent", "nonsense", "metrics"])
def test_a_node_without_a_proper_answer_dropped_out(
    tmp_path: Path, behaviour: Callable[[Message], Message | None]
) -> None:
    grid = grid_of(tmp_path, "a", "b", "c")
    there = federation(grid, "a", "b", "c")
    grid.nodes[20] = behaviour
    assert set(there.exchange(dict.fromkeys("abc", b"hello"))) == {"a", "c"}


def test_a_node_with_an_error_dropped_out_and_says_nothing_of_its_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = grid_of(tmp_path, "a", "b")
    there = federation(grid, "a", "b")
    assert there.exchange({"a": b"fail", "b": b"one"}) == {"b": b"ONE after one;"}
    assert "ValueError" in caplog.text
    assert CANARY not in caplog.text
    message = Message(wrap(b"fail"), 10, "query.ask")
    message.metadata.__dict__["_message_id"] = "m"
    assert CANARY not in str(vars(grid.nodes[10](message)))
    # What the failed request left in memory is gone: the client goes on from what is on disk.
    assert there.exchange({"a": b"two"}) == {"a": b"TWO after two;"}


def test_a_missing_node_is_a_dropout(tmp_path: Path) -> None:
    there = federation(grid_of(tmp_path, "a", "stranger"), "a", "b")
    assert set(there.exchange({"a": b"x", "b": b"x"})) == {"a"}


def test_a_client_with_two_nodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="two nodes call themselves a"):
        federation(grid_of(tmp_path, "a", "a"), "a", "b")


def test_waiting_ends_when_the_engine_has_died(tmp_path: Path) -> None:
    grid, stopped = grid_of(tmp_path, "a"), threading.Event()
    there = federation(grid, "a", timeout=60.0, stopped=stopped)
    grid.nodes[10] = lambda _: None
    stopped.set()
    with pytest.raises(RunError, match="engine has stopped"):
        there.exchange({"a": b"x"})


def test_only_this_record_is_accepted() -> None:
    message = Message(wrap(b"raw"), 1, "query.ask")
    assert unwrap(message) == b"raw"
    message.content["appa-secure"]["more"] = 1
    with pytest.raises(ValueError, match="one record"):
        unwrap(message)


def test_a_client_is_rebuilt_only_after_others_answered_for_it(tmp_path: Path) -> None:
    built = []

    def build() -> Shouting:
        built.append(1)
        return Shouting(tmp_path / "a")

    one = Resident("a", tmp_path / "lock", build)
    other = Resident("a", tmp_path / "lock", build)
    one.handle(b"1")
    one.handle(b"2")
    assert len(built) == 1
    other.handle(b"3")
    assert one.handle(b"4") == b"4 after 1;2;3;4;"
    assert len(built) == 3


def _ask_often(folder: Path, name: str, times: int) -> None:
    found = resident(folder)
    for k in range(times):
        found.handle(f"{name}{k}".encode())


def test_answering_in_turns_loses_nothing(tmp_path: Path) -> None:
    """Threads stand for processes: a lock on a file opened twice holds between them just the same."""
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(_ask_often, tmp_path, name, 20) for name in "xyz"]:
            done.result()
    seen = (tmp_path / "a").read_text().split(";")[:-1]
    assert sorted(seen) == sorted(f"{name}{k}" for name in "xyz" for k in range(20))


def test_flower_accepts_the_project_as_an_app() -> None:
    """`flwr run` refuses an app whose configuration or components its own check does not like."""
    config, _ = load_and_validate(Path(__file__).resolve().parent.parent / "pyproject.toml")
    assert config["tool"]["flwr"]["app"]["fab-include"] == ["LICENSE"]  # no code travels


@pytest.mark.parametrize("given", ["", "config.yaml", "/nowhere/config.yaml"])
def test_an_app_without_a_configuration_says_what_is_missing(given: str) -> None:
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), {"config": given})
    with pytest.raises(ConfigError, match="absolute path of a resolved configuration"):
        simulation._site_client(context)


def test_without_ray_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "find_spec", lambda _: None)
    config = compose(["experiment=smoke"])
    with (
        RunDir.create(tmp_path / "run") as directory,
        pytest.raises(ConfigError, match=r"appa-secure\[simulation\]"),
    ):
        simulation.simulate(config, directory, Progress())


def rows(path: Path) -> list[dict[str, Any]]:
    clocks = {"seconds", "seconds_reward", "check"}
    return [{k: v for k, v in row.items() if k not in clocks} for row in read_journal(path)]


@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_simulation_gives_what_a_local_run_gives(tmp_path: Path) -> None:
    started = {}
    for kind in ("local", "simulation"):
        root = tmp_path / kind
        arguments = [
            "experiment=smoke", "name=run", f"output_root={root}/runs", "policy.warmup_steps=150",
            f"federation={kind}", f"federation.client_root={root}/clients",
        ]  # fmt: skip
        started[kind] = subprocess.Popen(
            [sys.executable, "-m", "appa_secure.cli", "run", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    for kind, process in started.items():
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err[-3000:]
        assert out == f"{tmp_path / kind}/runs/run\n"  # nothing of Flower's or Ray's
    local, simulated = (tmp_path / kind / "runs" / "run" for kind in started)
    assert np.array_equal(
        np.load(local / "predictor/parameters.npy"), np.load(simulated / "predictor/parameters.npy")
    )
    assert (local / "policy/model.safetensors").read_bytes() == (
        simulated / "policy/model.safetensors"
    ).read_bytes()
    for name in ("rewards.jsonl", "metrics.jsonl", "measurement.jsonl", "privacy_ledger.jsonl"):
        assert rows(local / name), f"{name} is empty"
        assert rows(local / name) == rows(simulated / name), f"{name} differs"
    assert any(row["result"] for row in rows(local / "rewards.jsonl")), (
        "no step was opened: nothing was compared"
    )
    ledgers = sorted((tmp_path / "local").glob("clients/*/*/ledger.jsonl"))
    assert len(ledgers) == 8
    for ledger in ledgers:
        assert rows(ledger) == rows(tmp_path / "simulation" / ledger.relative_to(tmp_path / "local"))
    counts = [json.loads((run / "summary.json").read_text())["secagg"] for run in (local, simulated)]
    assert counts[0] == counts[1]
