"""Remove one mechanism of secure aggregation at a time, and see which test notices.

    .venv/bin/python -m tests.mutations.secagg [--only 4] [--markdown docs/results/mutations.md]

Each row of `ROWS` is an edit (or several, where a mechanism has two sides) and the test that must fail under it. Rows
are applied to a temporary copy of the tree, one at a time; the tests of all rows must pass in an unedited copy first.
A row whose text is not found, or found twice, is an error that names the row: adapt it to the code, do not delete it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from appa_secure.progress import Progress
from tests.mutations import output_noise

REPO = Path(__file__).resolve().parents[2]
COPIED = ("appa_secure", "clients", "coordinator", "configs", "tests", "pyproject.toml")
PACKAGE = "appa_secure/secagg/"
TIMEOUT = 600

PROPERTIES = {
    1: "pairwise seeds of full entropy, bound to their purpose",
    2: "a keystream is never used twice",
    3: "authenticated roster",
    4: "double masking, never both secrets of one party",
    5: "round, roster, layout and context are bound into the masks",
    6: "no replay, after a restart too",
    7: "threshold, cohort and parameters are validated before any key",
    8: "exact sums after dropouts, or a clean abort",
    9: "no wrap, no silent clipping",
    10: "shares and secrets",
    11: "sparse sharing graph",
    12: "the coordinator's view says nothing but the sum",
    13: "known answers and failure cases",
    14: "strict wire format, and the release policy",
}
PENDING: dict[int, str] = {}


@dataclass(frozen=True)
class Edit:
    """Replace `old`, which must occur exactly once in the package: wherever that is, code moves between files."""

    old: str
    new: str


@dataclass(frozen=True)
class Row:
    """Without `mechanism` of property number `property`, `test` must fail."""

    property: int
    mechanism: str
    edits: tuple[Edit, ...]
    test: str

    @property
    def name(self) -> str:
        return f"property {self.property}, {self.mechanism}"


def row(number: int, mechanism: str, test: str, *edits: tuple[str, str]) -> Row:
    return Row(number, mechanism, tuple(Edit(*edit) for edit in edits), f"tests/{test}")


LIES = "adversarial/secagg/test_coordinator_lies.py::"
VIEW = "adversarial/secagg/test_coordinator_view.py::"
HOLES = "adversarial/secagg/test_peer_holes.py::"
DISTINGUISHER = VIEW + "test_a_distinguisher_learns_nothing_from_same_sum_inputs"
IN_TIME, LATE = "[everybody in time]", "[the victim is declared dropped]"
DRIVER = "secagg/test_driver.py::"
MEMBERSHIP = "secagg/test_membership.py::"
RECOVERY = "adversarial/secagg/test_recovery.py::"
SEALED = "test_seed_shares_travel_under_the_senders_own_answer_key_only"
TABLE = "test_a_table_row_is_opened_by_the_mask_key_of_its_round_only"
TABLE_LIE = "test_a_dropped_party_that_sealed_wrong_pair_seeds_is_named"
REPLIES = "adversarial/secagg/test_replies.py::"
FORGED, COVERED = (
    "test_a_forged_reply_does_not_reach_the_sum",
    "test_the_mac_covers_payload_request_and_context",
)
FAULTS = "secagg/test_faults.py::"
GRAPH = "secagg/test_graph.py::"
BOUNDS = "test_failure_probabilities_are_below_the_stated_ones"
VECTORS = "secagg/test_vectors.py::"
POINTS = "secagg/test_fixedpoint.py::"

ROWS = (
    # 1
    row(1, "the last step to a mask key uses all bits of the seed", HOLES + "test_every_bit_of_a_seed_counts",
        ("return expand(seed, ", "return expand(seed[:4], ")),
    row(1, "session, epoch, both identities and round in a pair's seed",
        VECTORS + "test_a_whole_epoch_replays_byte_for_byte",
        ('bind("pair-seed", parameters.session, parameters.epoch, first, second, round_id)',
         'bind("pair-seed")')),
    row(1, "keys come from the random source", HOLES + "test_keys_are_not_found_by_guessing_the_randomness",
        ("self._policy = policy\n        self._rng = rng\n",
         "self._policy = policy\n        self._rng = __import__('random').Random(1).randbytes\n")),
    # 2
    row(2, "round, coding and context in a mask key",
        "secagg/test_masks.py::test_keys_differ_in_round_coding_and_context",
        ('bind("mask", round_id, coding, context)', 'bind("mask")')),
    row(2, "keys of their own for every round", VIEW + "test_equal_vectors_in_two_rounds_give_unrelated_uploads",
        ('bind("mask", round_id, coding, context)', 'bind("mask", coding, context)'),
        ("return np.frombuffer(rng(size), np.uint8).reshape(rounds, KINDS, KEY_BYTES).copy()",
         "return np.repeat(np.frombuffer(rng(size), np.uint8).reshape(rounds, KINDS, KEY_BYTES)[:1], rounds, 0)"),
        ('bind("pair-seed", parameters.session, parameters.epoch, first, second, round_id)',
         'bind("pair-seed", parameters.session, parameters.epoch, first, second)'),
        ('bind("self-seed", parameters.session, parameters.epoch, client, round_id)',
         'bind("self-seed", parameters.session, parameters.epoch, client)')),
    row(2, "the whole vector is masked", "secagg/test_masks.py::test_masks_add_whole_keystreams_modulo_the_ring",
        ("for start in range(0, vector.size, step or 1):", "for start in range(0, step, step or 1):")),
    # 3
    row(3, "signatures are verified", LIES + "test_a_swapped_key_is_refused",
        ("if not directory.verifies(", "if not directory or directory.verifies(")),
    row(3, "the MAC of an upload is verified", REPLIES + FORGED + "[another client-upload]",
        ("            verify_reply(envelope, key, request, self._epoch.context)\n",
         "            if due != UPLOAD:\n                verify_reply(envelope, key, request, self._epoch.context)\n")),
    row(3, "the MAC of an answer is verified", REPLIES + FORGED + "[another client-answer]",
        ("            verify_reply(envelope, key, request, self._epoch.context)\n",
         "            if due == UPLOAD:\n                verify_reply(envelope, key, request, self._epoch.context)\n")),
    row(3, "refusals stay signed", REPLIES + "test_refusals_stay_signed",
        ("            verify(envelope, self._directory)\n        if due == REFUSAL",
         "            due == REFUSAL or verify(envelope, self._directory)\n        if due == REFUSAL")),
    row(3, "the MAC covers the payload", REPLIES + COVERED + "[payload-upload]",
        ('bind("reply", _sha256(payload), request_digest(request), context)',
         'bind("reply", request_digest(request), context)')),
    row(3, "the MAC covers the request", REPLIES + "test_a_partition_changed_on_the_way_blames_no_client",
        ('bind("reply", _sha256(payload), request_digest(request), context)',
         'bind("reply", _sha256(payload), context)')),
    row(3, "the MAC covers the context", REPLIES + COVERED + "[context-answer]",
        ('bind("reply", _sha256(payload), request_digest(request), context)',
         'bind("reply", _sha256(payload), request_digest(request))')),
    row(3, "a reply key depends on the secret of client and coordinator", REPLIES + FORGED + "[a stranger's key-upload]",
        ('return derive(shared, transcript, bind("reply-key", parameters.session, parameters.epoch, client))',
         'return derive(b"", transcript, bind("reply-key", parameters.session, parameters.epoch, client))')),
    row(3, "session, epoch and client in a reply key",
        REPLIES + "test_reply_keys_differ_between_clients_epochs_and_sessions",
        ('bind("reply-key", parameters.session, parameters.epoch, client)', 'bind("reply-key")')),
    row(3, "the transcript salts a reply key",
        REPLIES + "test_reply_keys_differ_between_clients_epochs_and_sessions",
        ("return derive(shared, transcript, bind(\"reply-key\"", "return derive(shared, b\"\", bind(\"reply-key\"")),
    row(3, "the coordinator's key is in the digest of the proposal", REPLIES + "test_clients_see_one_coordinator_key",
        ("            self.ring_bits,\n            self.coordinator_key,\n", "            self.ring_bits,\n")),
    row(3, "the coordinator draws a key for every epoch",
        REPLIES + "test_the_coordinator_draws_a_key_for_every_epoch",
        ("        private = self._rng(KEY_BYTES)\n", "        private = bytes([1]) * 32\n")),
    row(3, "a low-order key of the coordinator is refused",
        REPLIES + "test_a_low_order_key_of_the_coordinator_is_refused_with_the_reason",
        ("if self.coordinator_key in LOW_ORDER:", "if False:")),
    row(3, "parties of the proposal must be in the client's directory",
        HOLES + "test_invented_peers_do_not_surround_a_lone_client",
        ("if client not in directory:", "if not client:")),
    row(3, "bundles must come from parties of the proposal", LIES + "test_an_invented_peer_is_refused",
        ("if sender not in p.clients:", "if not sender:")),
    row(3, "a client's own bundle must be in the roster", LIES + "test_own_bundle_cannot_be_replaced_or_left_out",
        ("if client not in roster.names or", "if False and")),
    # 4
    row(4, "pairwise masks", DISTINGUISHER + IN_TIME,
        ("            (add if self.client_id < peer else subtract).append(mask_key(seed, r, coding.digest, context))\n",
         ""),
        ("        for gone in self.dropped:\n", "        for gone in self.dropped[:0]:\n")),
    row(4, "self-masks", DISTINGUISHER + LATE,
        ("add = [mask_key(own, r, coding.digest, context)]", "add: list[bytes] = []"),
        ("subtract = [self_seed(seeds[name], self.transcript, p, name, r) for name in self.survivors]",
         "subtract: list[bytes] = []")),
    row(4, "a party cannot be both survivor and dropped", LIES + "test_a_party_named_in_both_lists_is_refused",
        ("for name in sorted(set(survivors) & set(dropped)):", "for name in ():")),
    row(4, "one partition per round", LIES + "test_the_second_share_kind_is_not_obtained_by_asking_again",
        ("if r < epoch.last_round or (r == epoch.last_round and self.state is ClientState.READY):",
         "if r < epoch.last_round:"),
        ('        epoch.wipe_shares(r)\n        epoch.checks = b""\n', ""),
        ('(_C.UPLOADED, "unmask"): _C.READY,',
         '(_C.UPLOADED, "unmask"): _C.READY, (_C.READY, "unmask"): _C.READY,')),
    row(4, "seed shares travel sealed", RECOVERY + SEALED,
        ('"seeds": ChaCha20Poly1305(key).encrypt(dealing.ONE_TIME_NONCE, seeds, None),',
         '"seeds": seeds + bytes(16),'),
        ('plain = ChaCha20Poly1305(key).decrypt(_NONCE, answer.body["seeds"], None)',
         'plain = answer.body["seeds"][:-TAG_BYTES]')),
    row(4, "their seal is under the sender's own answer key", RECOVERY + SEALED,
        ("return derive(secret, transcript, info)", 'return derive(b"", transcript, info)')),
    row(4, "a table is sealed under its owner's one-time mask key", RECOVERY + TABLE,
        ("return derive(mask_private, transcript, info)", 'return derive(b"", transcript, info)')),
    # 5
    row(5, "the context in the mask key", LIES + "test_different_contexts_for_different_clients_yield_noise",
        ('bind("mask", round_id, coding, context)', 'bind("mask", round_id, coding)')),
    row(5, "a client compares the context with its own",
        LIES + "test_another_layout_or_context_is_refused_by_the_client_that_sees_it",
        ('if envelope.body["context"] != context:', "if not context:")),
    row(5, "a client compares the layout with its own", HOLES + "test_scale_and_clipping_are_the_clients_own",
        ('if envelope.body["coding"] != coding.digest:', "if not coding.digest:")),
    row(5, "the transcript salts a pair's seed",
        LIES + "test_different_rosters_for_different_clients_give_no_sum",
        ("return derive(shared, transcript, info)", 'return derive(shared, b"", info)')),
    row(5, "acknowledgements of one transcript", LIES + "test_different_rosters_for_different_clients_give_no_sum",
        ("        if not epoch.confirmed:\n", "        if False:\n")),
    row(5, "so many signatures that no other transcript can have as many",
        RECOVERY + "test_acknowledgements_must_rule_out_a_second_transcript",
        ("enough = max(p.threshold, p.sharing.acks, policy.min_cohort)",
         "enough = max(p.threshold, policy.min_cohort)")),
    row(5, "signatures under another transcript do not count",
        RECOVERY + "test_a_client_hidden_from_its_holders_does_not_upload",
        ('        if ack.body["transcript"] != epoch.transcript:\n', "        if False:\n")),
    row(5, "acknowledgements are verified", RECOVERY + "test_forged_acknowledgements_do_not_count",
        ("        verify(ack, directory)\n", "")),
    row(5, "who has not uploaded does not answer", RECOVERY + "test_nobody_answers_for_a_round_without_an_upload",
        ('(_C.UPLOADED, "unmask"): _C.READY,',
         '(_C.UPLOADED, "unmask"): _C.READY, (_C.READY, "unmask"): _C.READY,'),
        ("        if r != epoch.last_round:\n", "        if False:\n")),
    # 6
    row(6, "rounds only increase", LIES + "test_rounds_cannot_be_replayed_or_reordered",
        ("if r <= epoch.last_round:", "if r < 1:")),
    row(6, "the last round survives a restart", DRIVER + "test_everybody_may_be_killed_between_any_two_messages",
        ('"last_round": epoch.last_round,', '"last_round": 0,')),
    row(6, "replies already given survive a restart",
        DRIVER + "test_everybody_may_be_killed_between_any_two_messages",
        ("[[key, reply] for key, reply in epoch.answers.items()]", "[]")),
    row(6, "epochs only increase", LIES + "test_rounds_cannot_be_replayed_or_reordered",
        ("if envelope.epoch <= self._sessions.get(envelope.session, 0):", "if envelope.epoch < 1:")),
    row(6, "a message belongs to one session and epoch", HOLES + "test_messages_of_one_session_do_nothing_in_another",
        ("if (envelope.session, envelope.epoch) != (session, epoch):", "if envelope.epoch != epoch:")),
    row(6, "a reply belongs to one round", REPLIES + "test_a_reply_of_another_round_is_refused",
        ("        expect(envelope, due, p.session, p.epoch, round_id)\n",
         "        expect(envelope, due, p.session, p.epoch, envelope.round)\n")),
    row(6, "reply keys survive a restart of the client",
        REPLIES + "test_reply_keys_survive_a_kill_on_both_sides_and_no_close",
        ('"reply_key": epoch.reply_key,', '"reply_key": b"",')),
    row(6, "reply keys survive a restart of the coordinator",
        REPLIES + "test_reply_keys_survive_a_kill_on_both_sides_and_no_close",
        ('"reply_keys": epoch.reply_keys,', '"reply_keys": {},')),
    row(6, "the context of an open round survives a restart",
        REPLIES + "test_reply_keys_survive_a_kill_on_both_sides_and_no_close",
        ('"context": epoch.context,\n        "checks"', '"context": b"",\n        "checks"')),
    row(6, "epoch numbers outlive a new directory",
        MEMBERSHIP + "test_an_update_destroys_the_epoch_and_remembers_its_number",
        ("self._directory, self._identity = directory, identity",
         "self._directory, self._identity, self._sessions = directory, identity, {}")),
    # 7
    row(7, "the client's own threshold", LIES + "test_weak_proposals_are_refused_before_any_key_is_made",
        ("if parameters.threshold < needed:", "if needed < 1:")),
    row(7, "the client's own minimum cohort", LIES + "test_weak_proposals_are_refused_before_any_key_is_made",
        ("if len(parties) < self.min_cohort:", "if len(parties) < 1:")),
    row(7, "the client's own ring", HOLES + "test_modulus_and_threshold_are_the_clients_own",
        ("if parameters.ring_bits != self.ring_bits:", "if parameters.ring_bits < 1:")),
    row(7, "more than half of the parties", LIES + "test_policy_and_threshold_are_validated_locally",
        ("if not n < 2 * self.threshold <= 2 * n:", "if not 0 < self.threshold <= n:")),
    row(7, "a client counts the survivors", LIES + "test_lies_about_dropouts_are_refused",
        ("if len(survivors) < epoch.parameters.threshold:", "if len(survivors) < 1:")),
    # 8
    row(8, "masks towards dropped parties are removed with their sign", RECOVERY + "test_recovery_needs_no_key_agreement",
        ("(subtract if name < gone else add)", "(add if name < gone else subtract)")),
    row(8, "the coordinator stops below the threshold",
        DRIVER + "test_any_dropout_pattern_gives_the_survivors_sum_or_a_clean_abort",
        ("if len(present) < threshold:", "if len(present) < 0:")),
    row(8, "who is silent is reported", DRIVER + "test_any_dropout_pattern_gives_the_survivors_sum_or_a_clean_abort",
        ("self._epoch.outbound.keys() - self._epoch.settled.keys() - blamed",
         "self._epoch.outbound.keys() & set()")),
    row(8, "a dropped party's pair seeds come from its table", RECOVERY + "test_recovery_needs_no_key_agreement",
        ("row = self._open_row(gone, mask_private)", "row: list[bytes] = []")),
    row(8, "survivors' checks of pair seeds", RECOVERY + TABLE_LIE + "[other seeds]",
        ("if claimed and pair_check(claimed) == said:", "if claimed:")),
    row(8, "a survivor's wrong check is named", RECOVERY + "test_a_survivor_that_lies_about_a_pair_seed_is_named",
        ("if said and said != pair_check(seed):", "if False:")),
    row(8, "a table with other seeds is named", RECOVERY + TABLE_LIE + "[unreadable]",
        ("if gone in self.tables and claimed != seed:", "if False:")),
    row(8, "a shared mask key is compared with the bundle",
        RECOVERY + "test_a_dropped_party_that_shared_another_key_than_its_own_is_named",
        ("if x25519_public(mask_private) != self.roster.bundle(gone).mask_key(self.round_id):", "if False:")),
    row(8, "a wrong seal is named", RECOVERY + "test_an_answer_sealed_under_another_key_is_named_and_survived",
        ('            self.culprits[name] = "sealed its answer under another key than it dealt"\n', "")),
    row(8, "low-order keys are refused", "secagg/test_faults.py::test_a_low_order_key_costs_its_owner_only",
        ("LOW_ORDER.isdisjoint(", "frozenset[bytes]().isdisjoint(")),
    row(8, "shares that were not needed are checked", FAULTS + "test_a_wrong_share_that_was_not_needed_is_named_too",
        ("doubtful = np.flatnonzero(~shamir.consistent(present, values, threshold, self.rng)).tolist()",
         "doubtful: list[int] = []")),
    row(8, "a dealer whose shares do not belong together is named",
        FAULTS + "test_a_dealer_whose_shares_do_not_belong_together_is_named_and_survived",
        ('            self.culprits[owner] = "dealt shares that do not belong together"\n', "            pass\n")),
    row(8, "many accusers make a culprit", FAULTS + "test_a_dealer_whose_packets_nobody_can_open_is_the_culprit",
        ("if times > most}", "if times < 0}")),
    row(8, "few accusers do not", FAULTS + "test_leaving_out_culprits_and_disputed_pairs_ends_in_a_set_up",
        ("if times > most}", "if times > 0}")),
    row(8, "nobody is in two disputes", FAULTS + "test_leaving_out_culprits_and_disputed_pairs_ends_in_a_set_up",
        ("        if accuser not in out and accused not in out:\n", "        if True:\n")),
    row(8, "faults are kept in bounds", FAULTS + "test_junk_does_not_fill_the_coordinators_memory",
        ("        if len(mine) < FAULTS_KEPT:\n", "        if True:\n")),
    row(8, "texts of refusals are kept in bounds", FAULTS + "test_junk_does_not_fill_the_coordinators_memory",
        ("getattr(fault, name)[:TEXT_KEPT]", "getattr(fault, name)")),
    # 9
    row(9, "the worst-case sum counts every party", HOLES + "test_a_sum_of_1100_does_not_wrap",
        ("while bits >= 0 and parties * math.ceil(", "while bits >= 0 and 1 * math.ceil(")),
    row(9, "too little precision is refused", POINTS + "test_overflow_is_refused_with_the_segments_name",
        ("if fraction < segment.min_bits:", "if fraction < 0:")),
    row(9, "values out of range are refused", POINTS + "test_out_of_range_is_counted_and_named",
        ("            if not (part.min() >= segment.lo and part.max() <= segment.hi):  # false for NaN\n",
         "            part = np.clip(part, segment.lo, segment.hi)\n            if False:\n")),
    row(9, "a sum that cannot be is recognised", POINTS + "test_noise_is_recognised",
        ("        if bad:\n", "        if False:\n")),
    # 10
    row(10, "shares hide the secret", "secagg/test_shamir.py::test_fewer_than_threshold_shares_fit_every_secret",
        ("values = (values + row) * x % _P", "values = (values + np.zeros_like(row)) * x % _P")),
    row(10, "a wrong share is pinned on its holder",
        DRIVER + "test_a_corrupted_share_is_pinned_on_its_author_and_survived",
        ("            if not share_matches(", "            if p.rounds < 0 and not share_matches(")),
    row(10, "secrets are compared with their commitments", DRIVER + "test_a_dealer_whose_shares_give_no_secret_is_named",
        ("return secret_commitment(self.roster.parameters, owner, self.round_id, kind, secret) == expected",
         "return bool(expected)")),
    row(10, "packets are bound to who deals to whom", VECTORS + "test_a_whole_epoch_replays_byte_for_byte",
        ('return bind("share-packet", parameters.session, parameters.epoch, roster, dealer, holder)',
         'return b""')),
    row(10, "used secrets are zeroed", DRIVER + "test_used_rounds_leave_no_secrets",
        ("        self.secrets[:to, [SEED, MASK_KEY]] = 0\n        self.pair_seeds[:to] = 0\n", "")),
    row(10, "used shares are zeroed", DRIVER + "test_used_rounds_leave_no_secrets",
        ("        self.held[:to] = 0\n", "")),
    row(10, "used answer keys are zeroed", DRIVER + "test_used_rounds_leave_no_secrets",
        ("        self.secrets[:to, ANSWER_KEY] = 0\n", "")),
    row(10, "closing destroys reply keys", REPLIES + "test_reply_keys_survive_a_kill_on_both_sides_and_no_close",
        ('self.encryption_private = self.reply_key = b""', 'self.encryption_private = b""')),
    row(10, "the coordinator forgets its private key", REPLIES + "test_the_coordinators_private_key_is_gone_after_the_set_up",
        ('    epoch.private = b""\n', "")),
    row(10, "closing destroys secrets", DRIVER + "test_closing_destroys_secrets_everywhere",
        ("            self._epoch.wipe()\n", "            pass\n")),
    row(10, "a new directory destroys the epoch",
        MEMBERSHIP + "test_an_update_destroys_the_epoch_and_remembers_its_number",
        ("        self.close_epoch()\n        self._directory, self", "        self._directory, self")),
    row(10, "secrets are not printed", DRIVER + "test_machines_and_keys_do_not_print_secrets",
        ("@dataclass(repr=False)", "@dataclass"),
        ("    def open_epoch(",
         "    def __repr__(self) -> str:\n        return repr(vars(self))\n\n    def open_epoch(")),
    # 11
    row(11, "holders are a client's own random choice", RECOVERY + "test_holders_are_a_clients_own_choice",
        ("holders = choose_holders(roster.names, self.client_id, degree, self._rng)",
         "holders = choose_holders(roster.names, self.client_id, degree, __import__('random').Random("
         "roster.digest() + self.client_id.encode()).randbytes)")),
    row(11, "holders are drawn from the fixed roster",
        RECOVERY + "test_a_sparse_graph_gives_exact_sums_through_dropouts_and_restarts",
        ("choose_holders(roster.names, ", "choose_holders(epoch.parameters.clients, ")),
    row(11, "holders are drawn uniformly", GRAPH + "test_holders_are_drawn_uniformly",
        ('order = np.argsort(np.frombuffer(rng(8 * len(others)), "<u8"), kind="stable")',
         "order = np.roll(np.arange(len(others)), rng(1)[0])")),
    row(11, "as many holders as are due", RECOVERY + "test_too_few_or_foreign_holders_are_refused",
        ("            or len(holders) != self.holders_each\n", "")),
    row(11, "holders are drawn from a quorum", RECOVERY + "test_a_roster_below_the_quorum_is_refused",
        ("return max(self.threshold, self.sharing.quorum)", "return self.threshold")),
    row(11, "tails are summed exactly", GRAPH + "test_tails_are_those_of_exact_arithmetic",
        ("return min(0.0, top + math.log2(float(np.exp2(logs - top).sum())))", "return min(0.0, top)")),
    row(11, "the degree keeps both secrets of a party apart", GRAPH + BOUNDS + "[1000]",
        ("if both > -PRIVACY_BITS - 1:", "if both > 0:")),
    row(11, "the threshold stands the dropouts", GRAPH + BOUNDS + "[1000]",
        ("degree, t) <= -CORRECTNESS_BITS\n", "degree, t) <= -1\n")),
    row(11, "the smallest group counts every set of parties", GRAPH + BOUNDS + "[101]",
        ("exponent = float(_log2_choose(honest, s)) + s * log2_tail(",
         "exponent = s * log2_tail(")),
    # 12
    row(12, "masks cover all bits of an entry", DISTINGUISHER + IN_TIME,
        ("operation(part, mask[: part.size], out=part)",
         "operation(part, mask[: part.size] >> np.uint8(16), out=part)")),
    # 13
    row(13, "labels of the key schedule", VECTORS + "test_a_whole_epoch_replays_byte_for_byte",
        ('bind("share-key",', 'bind("share-keys",')),
    row(13, "failures have their names", VECTORS + "test_failures",
        ("raise BothShareKinds(COORDINATOR,", "raise WrongRoster(COORDINATOR,")),
    # 14
    row(14, "trailing bytes are an error", "secagg/test_wire.py::test_bad_messages_name_their_sender",
        ("    if end != len(data):\n", "    if end > len(data):\n")),
    row(14, "unknown fields are an error", HOLES + "test_a_metric_beside_the_vector_is_refused",
        ("if fields.keys() != forms.keys():", "if not fields.keys() >= forms.keys():")),
    row(14, "decoders raise the protocol's own errors only",
        "adversarial/secagg/test_fuzz.py::test_twenty_thousand_malformed_messages",
        ("    if at >= len(data):\n        raise NotCanonical(\"ends too early\")\n", "")),
    row(14, "`abort` opens nothing partial", "adversarial/secagg/test_differencing.py::test_differencing_fails_under_abort",
        ('if policy.release == "abort" and dropped:', "if False and dropped:")),
    row(14, "`abort` takes no smaller roster",
        "adversarial/secagg/test_differencing.py::test_a_new_epoch_without_the_victim_is_refused_under_abort",
        ('if self.release == "abort" and set(parameters.clients) != set(directory):', "if False:")),
    *(row(*entry) for entry in output_noise.ROWS),
)  # fmt: skip


Result = tuple[Row, str, tuple[str, ...]]


class Stale(Exception):
    """A row that no longer fits the code."""


def apply(entry: Row, tree: Path) -> dict[Path, str]:
    """Edit the package in `tree`; returns the edited files' contents from before. Raises `Stale` and changes nothing if
    text is missing."""
    before = {path: path.read_text("utf-8") for path in sorted((tree / PACKAGE).glob("*.py"))}
    after = dict(before)
    for edit in entry.edits:
        found = [path for path, text in after.items() for _ in range(text.count(edit.old))]
        if len(found) != 1:
            raise Stale(f"{entry.name}: text occurs {len(found)} times in {PACKAGE}: {edit.old.strip()!r}")
        after[found[0]] = after[found[0]].replace(edit.old, edit.new)
        try:
            compile(after[found[0]], str(found[0]), "exec")
        except SyntaxError as error:
            raise Stale(f"{entry.name}: the edit of {found[0].name} does not compile: {error}") from None
    changed = {path: text for path, text in before.items() if after[path] != text}
    for path in changed:
        path.write_text(after[path], "utf-8")
    return changed


@contextmanager
def copied_tree() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        tree = Path(folder)
        for name in COPIED:
            source = REPO / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, tree / name)
        yield tree


def pytest(tree: Path, nodes: Sequence[str], timeout: int = TIMEOUT) -> tuple[int, str]:
    """Exit status and output of a run in `tree`, with nothing of this tree on the path."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider",
               "-m", "not bench", *nodes]  # fmt: skip
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


def try_row(entry: Row, tree: Path) -> tuple[str, tuple[str, ...]]:
    """`caught`, `survived`, or what went wrong; and the files that were edited."""
    before = apply(entry, tree)
    files = tuple(path.name for path in before)
    try:
        status, output = pytest(tree, [entry.test])
    except subprocess.TimeoutExpired:
        return f"no end after {TIMEOUT} s", files
    finally:
        for path, text in before.items():
            path.write_text(text, "utf-8")
    if status == 0:
        return "survived", files
    if status == 1:
        return "caught", files
    return f"pytest ended with status {status}: {output.strip().splitlines()[-1]}", files


def markdown(results: Sequence[Result]) -> str:
    """The record for docs/results."""
    lines = [
        "# Mutations of secure aggregation",
        "",
        "Written by `python -m tests.mutations.secagg --markdown docs/results/mutations.md`. In each row one mechanism is",
        "removed from a copy of the code, and the named test is run; *caught* means that it fails. The edits are in",
        "`tests/mutations/secagg.py`. All tests pass without an edit.",
        "",
        "| property | removed | in | test | |",
        "|---|---|---|---|---|",
    ]
    for entry, result, edited in results:
        files = " ".join(f"`{PACKAGE}{name}`" for name in edited)
        lines.append(
            f"| {entry.property}. {PROPERTIES[entry.property]} | {entry.mechanism} | {files} | `{entry.test}` "
            f"| {result} |"
        )
    lines += [f"\n{number}. {PROPERTIES[number]}: {why}." for number, why in PENDING.items()]
    caught = sum(result == "caught" for _, result, _ in results)
    return "\n".join(lines) + f"\n\n{caught} of {len(results)} caught.\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations.secagg",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", type=int, action="append", metavar="N", help="rows of this property; may be repeated"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the record")
    args = parser.parse_args(argv)
    rows = [entry for entry in ROWS if not args.only or entry.property in args.only]
    results: list[Result] = []
    began = time.monotonic()
    with Progress() as progress, copied_tree() as tree:
        nodes = sorted({entry.test for entry in rows})
        progress.note(f"{len(nodes)} tests without an edit")
        status, output = pytest(tree, nodes, 5 * TIMEOUT)
        if status != 0:
            print(f"{output}\nThe tests must pass before anything is removed.", file=sys.stderr)
            return 2
        for done, entry in enumerate(rows, start=1):
            try:
                result, files = try_row(entry, tree)
            except Stale as error:
                result, files = "stale", ()
                progress.note(str(error))
            results.append((entry, result, files))
            progress.step("mutations", done, len(rows), result=result, removed=entry.name)
    if args.markdown:
        args.markdown.write_text(markdown(results), "utf-8")
    for entry, result, _ in results:
        if result != "caught":
            print(f"{result.upper()}: {entry.name} ({entry.test})")
    caught = sum(result == "caught" for _, result, _ in results)
    print(f"{caught} of {len(results)} mutations caught in {time.monotonic() - began:.0f} s")
    return 0 if caught == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
