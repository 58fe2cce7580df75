"""The ledger: paid before released, refused before written, whole after any crash, checkable by others."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appa_secure.errors import PrivacyError, RunError
from appa_secure.privacy.accounting import GaussianEvent, epsilon
from appa_secure.privacy.ledger import ROW_FIELDS, Budget, Ledger, check_rows

BUDGET = Budget(8.0, 1e-6, "rdp", "response")
CONTEXT = GaussianEvent(4.0, 1.0, 1)
STEP = GaussianEvent(2.0, 0.1, 1)


def filled(path: Path, rounds: int = 3) -> Ledger:
    ledger = Ledger(path, "clinic", BUDGET)
    ledger.charge("context", CONTEXT)
    for number in range(rounds):
        ledger.charge(f"predictor/{number + 1}", STEP)
    return ledger


def test_rows_state_what_was_spent_so_far(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "l")
    rows = ledger.rows
    assert [row["release"] for row in rows] == ["context", "predictor/1", "predictor/2", "predictor/3"]
    for count, row in enumerate(rows):
        assert row["epsilon"] == epsilon([CONTEXT, *[STEP] * count], 1e-6, "rdp")
        assert set(row) == set(ROW_FIELDS)
        assert all(isinstance(row[name], form) for name, form in ROW_FIELDS.items())
    assert ledger.spent == rows[-1]["epsilon"]
    assert rows[0]["mechanism"] == "gaussian"
    assert rows[1]["mechanism"] == "poisson-subsampled gaussian"


def test_a_release_beyond_the_budget_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "l")
    before = (tmp_path / "l").read_bytes()
    with pytest.raises(PrivacyError, match=r"'clinic'.*'big'.*privacy\.epsilon=8"):
        ledger.charge("big", GaussianEvent(0.3, 1.0, 1))
    assert (tmp_path / "l").read_bytes() == before
    assert len(ledger.rows) == 4
    ledger.charge("predictor/4", STEP)  # and smaller ones still go


def test_a_row_is_on_disk_when_charge_returns(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l", "clinic", BUDGET)
    row = ledger.charge("context", CONTEXT)
    stored = json.loads((tmp_path / "l").read_text())
    assert {k: v for k, v in stored.items() if k != "check"} == row


def test_asking_for_a_paid_release_again_is_free(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "l")
    before = (tmp_path / "l").read_bytes()
    assert ledger.charge("predictor/1", STEP) == ledger.rows[1]
    again = Ledger(tmp_path / "l", "clinic", BUDGET)  # also after a restart
    assert again.charge("predictor/1", STEP) == ledger.rows[1]
    assert (tmp_path / "l").read_bytes() == before
    with pytest.raises(PrivacyError, match="was paid for as"):
        ledger.charge("predictor/1", GaussianEvent(1.0, 0.1, 1))


@pytest.mark.parametrize(
    ("client", "budget"),
    [
        ("other", BUDGET),
        ("clinic", Budget(8.0, 1e-5, "rdp", "response")),
        ("clinic", Budget(8.0, 1e-6, "rdp", "record")),
    ],
)
def test_another_clients_or_units_ledger_is_refused(tmp_path: Path, client: str, budget: Budget) -> None:
    filled(tmp_path / "l").close()
    with pytest.raises(PrivacyError, match="client_root"):
        Ledger(tmp_path / "l", client, budget)


def test_a_kill_at_any_byte_of_the_last_row_never_under_counts(tmp_path: Path) -> None:
    filled(tmp_path / "l").close()
    whole = (tmp_path / "l").read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for cut in range(start, len(whole) + 1):
        path = tmp_path / "cut"
        path.write_bytes(whole[:cut])
        ledger = Ledger(path, "clinic", BUDGET)
        # Without its newline the row's charge never returned, so what it pays for was never released.
        assert len(ledger.rows) == (4 if cut == len(whole) else 3)
        ledger.charge("predictor/3", STEP)
        assert ledger.rows[-1]["epsilon"] == epsilon([CONTEXT, *[STEP] * 3], 1e-6, "rdp")
        ledger.close()
        assert path.read_bytes() == whole  # the recovered ledger is the undisturbed one


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_inside_is_an_error_not_a_smaller_bill(tmp_path: Path, data: st.DataObject) -> None:
    filled(tmp_path / "l").close()
    whole = bytearray((tmp_path / "l").read_bytes())
    last = bytes(whole[:-1]).rfind(b"\n")
    at = data.draw(st.integers(0, last - 1))
    whole[at] ^= data.draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
    (tmp_path / "l").write_bytes(whole)
    try:
        with pytest.raises((RunError, PrivacyError)):
            Ledger(tmp_path / "l", "clinic", BUDGET)
    finally:
        (tmp_path / "l").unlink()


def test_an_auditor_recomputes_every_row(tmp_path: Path) -> None:
    rows = filled(tmp_path / "l").rows
    other = [{**row, "client": "school"} for row in rows]
    mixed = [row for pair in zip(rows, other, strict=True) for row in pair]
    assert check_rows(mixed) == {"clinic": rows[-1]["epsilon"], "school": rows[-1]["epsilon"]}
    assert check_rows([]) == {}


@pytest.mark.parametrize(
    ("row", "change", "words"),
    [
        (2, {"epsilon": 0.1}, "row 3 states epsilon"),
        (3, {"noise_multiplier": 0.5}, "row 4 states epsilon"),
        (1, {"count": 50}, "row 2 states epsilon"),
        (2, {"release": "predictor/1"}, "row 3: release 'predictor/1' of 'clinic' occurs twice"),
        (1, {"delta": 1e-3}, "row 2: 'clinic' changed"),
        (1, {"unit": "respondent"}, "row 2: 'clinic' changed"),
        (1, {"accountant": "prv"}, "row 2: 'clinic' changed"),
        (0, {"client": ""}, "row 1: empty client"),
    ],
)
def test_an_auditor_catches_every_lie(tmp_path: Path, row: int, change: dict, words: str) -> None:
    rows = filled(tmp_path / "l").rows
    rows[row] = {**rows[row], **change}
    with pytest.raises(PrivacyError, match=words):
        check_rows(rows)


def test_an_auditor_catches_a_row_left_out(tmp_path: Path) -> None:
    rows = filled(tmp_path / "l").rows
    check_rows([rows[0], rows[1], rows[3]])  # stating more than the rows cost is no lie
    honest = epsilon([CONTEXT, STEP, STEP], 1e-6, "rdp")
    with pytest.raises(PrivacyError, match="row 4"):
        check_rows([*rows[:3], {**rows[3], "epsilon": honest}])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_killed_at_any_byte_any_number_of_times_it_ends_as_if_undisturbed(
    tmp_path: Path, data: st.DataObject
) -> None:
    """A run pays for its releases in order; each kill leaves the file cut at any byte from the last whole row on."""
    releases = [
        (f"release {i}", GaussianEvent(noise, 0.1, count))
        for i, (noise, count) in enumerate(
            data.draw(st.lists(st.tuples(st.floats(3, 9), st.integers(0, 4)), min_size=1, max_size=6))
        )
    ]
    whole, path = tmp_path / "whole", tmp_path / "killed"
    for file in (whole, path):
        file.unlink(missing_ok=True)
    ledger = Ledger(whole, "clinic", BUDGET)
    for release in releases:
        ledger.charge(*release)
    ledger.close()
    wanted, paid = whole.read_bytes(), 0
    for _ in range(data.draw(st.integers(1, 4))):
        ledger = Ledger(path, "clinic", BUDGET)
        assert len(ledger.rows) >= paid  # nothing that was paid for is forgotten
        done = data.draw(st.integers(0, len(releases)))
        for release in releases[:done]:  # a resumed run asks from the beginning
            ledger.charge(*release)
        ledger.close()
        content = path.read_bytes()
        paid = content.count(b"\n")
        if len(content) < len(wanted):  # killed while the next row was being written
            cut = data.draw(st.integers(0, wanted.index(b"\n", len(content)) - len(content)))
            path.write_bytes(wanted[: len(content) + cut])
    ledger = Ledger(path, "clinic", BUDGET)
    for release in releases:
        ledger.charge(*release)
    ledger.close()
    assert path.read_bytes() == wanted
