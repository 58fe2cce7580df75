"""Members of a sweep that start from one predictor: as if each had trained it itself, paid for once, whatever is killed."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appa_secure import launch
from appa_secure import sweep as sweeping
from appa_secure.config import Config, compose, load
from appa_secure.errors import AppaError, ConfigError, RunError
from appa_secure.messages import REPLIES, REQUESTS, pack, unpack
from appa_secure.origin import predictor_part, read_origin
from appa_secure.privacy.ledger import check_rows
from appa_secure.records import CONFIG, RunDir, read_journal, verify

OPTIONS = (
    "experiment=smoke", "policy=tabular", "predictor.local_steps=1", "privacy.accountant=rdp", "predictor.rounds=2",
    "evaluation.predictor_every=1", "ppo.steps=3",
)  # fmt: skip
_CLOCKS = {"seconds", "seconds_reward", "check"}


def place(root: Path) -> list[str]:
    return [f"output_root={root / 'runs'}", f"federation.client_root={root / 'clients'}"]


def rows(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in _CLOCKS} for row in read_journal(path)]


def results(run: Path) -> dict[str, Any]:
    """Everything a run computed, without clocks and fresh keys."""
    summary = json.loads((run / "summary.json").read_text())
    return {
        "predictor": np.load(run / "predictor" / "parameters.npy").tobytes(),
        "policy": (run / "policy" / "table.safetensors").read_bytes(),
        **{n: rows(run / f"{n}.jsonl") for n in ("rewards", "metrics", "measurement", "privacy_ledger")},
        **{k: summary[k] for k in ("alignment", "predictor", "ceiling", "gap_closed", "privacy", "stamp")},
    }


def child(arguments: list[str], log: Path | None, threads: int) -> int:
    """What the sweep starts as a process of its own, in this one."""
    resume = Path(arguments[1]) if arguments[0] == "--resume" else None
    launch.run(load(resume / CONFIG) if resume else compose(arguments), resume)
    return 0


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping.children, "run", child)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[sweeping.Member, ...], Path]:
    """A sweep over two rules that nothing disturbed."""
    root = tmp_path_factory.mktemp("swept")
    members = sweeping.plan([*OPTIONS, "aggregation=min,average", "name=both", *place(root)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeping.children, "run", child)
        assert sweeping.run_all(members, 1, lambda line: None) == [True, True]
    return members, root


def origin_of(member: sweeping.Member) -> Path:
    assert member.origin is not None
    return member.origin.directory


def stores(member: sweeping.Member) -> dict[str, Path]:
    """Each client's folder of a run."""
    parts = launch.prepare(load(member.directory / CONFIG), member.directory)
    return {c: parts.site(c) for c in parts.agreement.clients}


def test_a_member_is_bit_for_bit_the_run_that_computed_everything_itself(
    swept: tuple[tuple[sweeping.Member, ...], Path], tmp_path: Path
) -> None:
    members, _ = swept
    assert members[0].origin == members[1].origin
    for member, rule in zip(members, ("min", "average"), strict=True):
        # Noise follows from the run's name, so the run that does it all bears the name of the shared one.
        alone = [*OPTIONS, f"aggregation={rule}", f"name={origin_of(member).name}", *place(tmp_path / rule)]
        itself = results(launch.run(compose(alone)))
        shared = results(member.directory)
        for name, found in itself.items():
            assert shared[name] == found, name
    one, other = (results(m.directory) for m in members)
    assert one["policy"] != other["policy"]
    assert one["predictor"] == other["predictor"]


def test_the_release_is_paid_for_once_and_every_record_says_where(
    swept: tuple[tuple[sweeping.Member, ...], Path],
) -> None:
    members, _ = swept
    base = origin_of(members[0])
    paid = read_journal(base / "privacy_ledger.jsonl")
    head = json.loads((base / "summary.json").read_text())["transcript_head"]
    for member in members:
        run = member.directory
        ledger = read_journal(run / "privacy_ledger.jsonl")
        assert ledger == paid
        assert max(check_rows(ledger).values()) <= 8.0
        transcript = read_journal(run / "transcript.jsonl")
        verify(run / "transcript.jsonl")
        assert transcript[0]["origin"]["transcript"] == head
        assert {row.get("kind") for row in transcript if row["event"] == "round"} == {"score"}
        statement = (run / "privacy_statement.md").read_text()
        assert "One release for several runs" in statement
        assert head in statement
        stated = json.loads((run / "privacy_statement.json").read_text())
        assert stated["released_in"]["run"] == transcript[0]["origin"]["run"]
        for folder in stores(member).values():
            own = read_journal(folder / "ledger.jsonl")
            assert own == [row for row in paid if row["client"] == own[0]["client"]]
    assert "One release" not in (base / "privacy_statement.md").read_text()


def test_what_is_handed_over_holds_no_keys_and_nothing_to_repeat(
    swept: tuple[tuple[sweeping.Member, ...], Path], tmp_path: Path
) -> None:
    """Two copies of a client would each answer a round; equal noise keys would let noise be subtracted."""
    from clients.store import ClientStore

    members, _ = swept
    base = launch.prepare(load(origin_of(members[0]) / CONFIG), origin_of(members[0]))
    states = (
        [
            ClientStore(folder).load()
            for folder in (base.site("Elders"), *(stores(m)["Elders"] for m in members))
        ]
        if "Elders" in base.agreement.clients
        else []
    )
    client = base.agreement.clients[0]
    client = base.agreement.clients[0]
    states = [
        ClientStore(base.site(client)).load(),
        *(ClientStore(stores(m)[client]).load() for m in members),
    ]
    assert len({s["noise_key"] for s in states}) == 3
    assert len({json.dumps(sorted(s["context"].items()), default=bytes.hex) for s in states}) == 1
    store = ClientStore(tmp_path / "new")
    origin = read_origin(load(members[0].directory / CONFIG))
    assert origin is not None
    store.adopt(ClientStore(base.site(client)), origin.run, origin.parameters, base.agreement.questions)
    assert set(store.load()) == {"context", "per_question", "predicted", "frozen"}


def test_a_client_that_was_handed_a_context_never_makes_or_trains_on_another(
    swept: tuple[tuple[sweeping.Member, ...], Path],
) -> None:
    members, _ = swept
    parts = launch.prepare(load(members[0].directory / CONFIG), members[0].directory)
    name = parts.agreement.clients[0]

    def ask(kind: str, **body: Any) -> Any:
        return unpack(REPLIES, parts.client(name).handle(pack(REQUESTS, kind, **body)), name)

    theta = np.load(members[0].directory / "predictor" / "parameters.npy").tobytes()
    trained = ask("train", session="predictor", round=1, parameters=theta, message=b"")
    assert (trained.kind, trained.body["code"]) == ("refusal", "OutOfOrder")
    assert json.loads(ask("context").body["ledger"]) == []
    # Without what was handed over, the ledger's row would make a second release look paid for.
    shutil.rmtree(parts.site(name))
    client = parts.client(name)
    client._state["context"] = {}
    ledger = parts.site(name) / "ledger.jsonl"
    before = ledger.read_bytes()
    agreement = parts.agreement
    setup = pack(REQUESTS, "setup", run=agreement.plan.run, agreement=agreement.digest())
    assert unpack(REPLIES, client.handle(setup), name).kind == "setup"
    refused = unpack(REPLIES, client.handle(pack(REQUESTS, "context")), name)
    assert (refused.kind, refused.body["code"]) == ("refusal", "OutOfOrder")
    assert ledger.read_bytes() == before


# -- kills -----------------------------------------------------------------------------------------------------


def sweep(members: tuple[sweeping.Member, ...]) -> list[bool]:
    sweeping.children.run = child  # its runs in this process, so that one signal stops them all
    return sweeping.run_all(members, 1, lambda line: None)


def killed_when(members: tuple[sweeping.Member, ...], reached: Callable[[], bool]) -> None:
    """Sweep over `members` in another process and send it SIGKILL as soon as `reached`."""
    # Not a fork of this one: what it has computed in threads leaves torch's libraries in a state that crashes a child.
    process = multiprocessing.get_context("forkserver").Process(target=sweep, args=(members,), daemon=True)
    process.start()
    until = time.monotonic() + 120
    while process.is_alive() and not reached() and time.monotonic() < until:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the work ended before it could be killed"
    assert reached()


def test_kills_during_the_predictor_and_during_a_member_leave_no_trace(
    swept: tuple[tuple[sweeping.Member, ...], Path], tmp_path: Path
) -> None:
    undisturbed, _ = swept
    members = sweeping.plan([*OPTIONS, "aggregation=min,average", "name=both", *place(tmp_path)])
    base, (first, second) = origin_of(members[0]), (m.directory for m in members)

    def lines(path: Path, count: int) -> Callable[[], bool]:
        return lambda: path.exists() and path.read_bytes().count(b"\n") >= count

    def done(run: Path, stage: str) -> Callable[[], bool]:
        return lambda: (run / "stages" / f"{stage}.json").exists()

    killed_when(members, lines(base / "privacy_ledger.jsonl", 1))  # while clients pay
    killed_when(members, lambda: (base / "predictor" / "state.npz").exists())  # between rounds
    killed_when(members, done(base, "predictor"))  # before its summary
    killed_when(members, lambda: (first / "stages").is_dir())  # while clients are handed their part
    killed_when(members, done(first, "setup"))  # while the ledger is copied
    killed_when(members, lines(first / "rewards.jsonl", 2))  # in alignment
    killed_when(members, lambda: (second / "stages").is_dir())
    assert sweep(members) == [True, True]
    for member, calm in zip(members, undisturbed, strict=True):
        for name, found in results(calm.directory).items():
            assert results(member.directory)[name] == found, name
        for folder in stores(member).values():
            releases = [row["release"] for row in read_journal(folder / "ledger.jsonl")]
            assert releases == ["context", "predictor/1", "predictor/2"]


def test_a_predictor_that_fails_takes_its_members_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = sweeping.plan([*OPTIONS, "aggregation=min,average", "name=both", *place(tmp_path)])
    monkeypatch.setattr(sweeping.children, "run", lambda *_: 1)
    said: list[str] = []
    assert sweeping.run_all(members, 2, said.append) == [False, False]
    assert sum("its predictor did not finish" in line for line in said) == 2
    assert not members[0].directory.exists()


# -- which runs ------------------------------------------------------------------------------------------------


def test_families_are_what_has_the_same_predictor(tmp_path: Path) -> None:
    def origins(*more: str) -> list[str | None]:
        members = sweeping.plan([*OPTIONS, *place(tmp_path), *more])
        return [None if m.origin is None else m.origin.directory.name for m in members]

    assert len(set(origins("aggregation=appa,min,max"))) == 1
    assert len(set(origins("policy=tabular,tiny", "task.max_weight=10"))) == 1
    assert origins("seed=1,2") == [None, None]  # nothing is shared
    a, b, c, d = origins("seed=1,2", "aggregation=appa,min")
    assert a != b or a != c
    assert len({a, b, c, d}) == 2
    assert origins("privacy.epsilon=8,3", "aggregation=appa") == [None, None]
    assert origins("aggregation=appa,min", "evaluation.truth=false", "evaluation.predictor_every=0") == [
        None,
        None,
    ]
    assert origins("aggregation=appa,min", "predictor=truth", "privacy=off") == [None, None]
    assert origins("aggregation=min,average", "until=predictor") == [None, None]


def test_an_origin_that_is_another_predictor_or_unfinished_or_changed_is_refused(
    swept: tuple[tuple[sweeping.Member, ...], Path], tmp_path: Path
) -> None:
    members, _ = swept
    base = origin_of(members[0])
    config = load(members[0].directory / CONFIG)
    assert predictor_part(config) == predictor_part(load(base / CONFIG))

    def start(origin: Path, **predictor: Any) -> Config:
        section = config.predictor.model_copy(update={"origin": str(origin), **predictor})
        return config.model_copy(update={"predictor": section, "name": "other", "output_root": str(tmp_path)})

    with pytest.raises(ConfigError, match=r"another predictor \(rounds: 2 there, rounds: 4 here\)"):
        read_origin(start(base, rounds=4))
    with pytest.raises(ConfigError, match="went on to align"):
        read_origin(start(members[0].directory))
    with pytest.raises(ConfigError, match="no finished run"):
        read_origin(start(tmp_path / "nothing"))
    changed = tmp_path / base.name
    shutil.copytree(base, changed)
    np.save(changed / "predictor" / "parameters.npy", np.load(base / "predictor" / "parameters.npy") + 1)
    with pytest.raises(RunError, match="does not hold this client's part"):
        launch.run(start(changed))
    lines = (changed / "transcript.jsonl").read_text().splitlines(keepends=True)
    (changed / "transcript.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(RunError, match="cut off or rewritten"):
        read_origin(start(changed))


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("evaluation.truth=false", "evaluation.truth=true"),
        ("until=predictor", "until=align"),
        ("secagg.output_epsilon=8", "secagg.output_epsilon=null"),
    ],
)
def test_where_sharing_could_show_more_than_one_run_does_it_is_refused(override: str, fix: str) -> None:
    more = ["evaluation.predictor_every=0"] if "truth" in override else []
    with pytest.raises(AppaError, match=rf"predictor\.origin=somewhere: .*{fix}"):
        compose(["experiment=smoke", "predictor.origin=somewhere", override, *more])


def test_a_killed_sweep_takes_its_runs_with_it(tmp_path: Path) -> None:
    """Their lock is free soon after, so that the sweep can be repeated at once."""
    arguments = [*OPTIONS, *place(tmp_path), "ppo.steps=5000", "name=run"]
    code = f"from appa_secure.children import run; run({arguments!r}, None, 1)"
    sweep, run = subprocess.Popen([sys.executable, "-c", code]), tmp_path / "runs" / "run"
    _wait(lambda: (run / "metrics.jsonl").exists(), 120)
    with pytest.raises(RunError, match="another process"):
        RunDir.open(run)
    sweep.kill()
    sweep.wait()
    _wait(lambda: _is_free(run), 20)
    assert not (run / "summary.json").exists()


def _is_free(run: Path) -> bool:
    try:
        RunDir.open(run).close()
    except RunError:
        return False
    return True


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not so after {seconds} s"
        time.sleep(0.1)
