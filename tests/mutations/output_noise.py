"""The rows of `tests.mutations.secagg` about output noise: property, mechanism, test, edits."""

NOISE, OUTPUT = "secagg/test_noise.py::", "adversarial/test_output_noise.py::"

ROWS: tuple[tuple[int, str, str, *tuple[tuple[str, str], ...]], ...] = (
    (14, "`noise` sums only what carries noise",
        "adversarial/secagg/test_differencing.py::test_noise_opens_nothing_that_carries_no_noise",
        ('            if self.release == "noise":\n', "            if False:\n")),
    (14, "clients add output noise", NOISE + "test_the_survivors_noise_reaches_the_target_after_dropouts",
        ("        np.add(ring, drawn.astype(_signed(self.layout.ring_bits)).view(ring.dtype), out=ring)\n", "")),
    (14, "output noise is calibrated to the fewest honest survivors",
        OUTPUT + "test_what_is_estimated_of_a_victim_is_off_by_the_noise_at_least",
        ("variance = math.ceil(total / target.honest) + 1", "variance = math.ceil(total / parties) + 1")),
    (14, "a layout that counts on too many honest clients is refused",
        NOISE + "test_under_noise_nothing_without_noise_is_summed_and_none_with_too_little",
        ("        if layout.noise.honest > honest:", "        if layout.noise.honest > n:")),
    (14, "output noise is paid for before anything changes",
        OUTPUT + "test_it_is_paid_before_the_upload_leaves_and_refused_before_anything_is_made",
        ("            coding.add_noise(masked,", "            epoch.last_round = r\n            coding.add_noise(masked,")),
    (14, "every round has output noise of its own",
        OUTPUT + "test_under_noise_the_difference_has_the_noise_of_both_sums",
        ('bind("noise", parameters.session, parameters.epoch, client, round_id, coding, context)',
         'bind("noise", client)')),
    (14, "the sensitivity counts every entry",
        NOISE + "test_two_vectors_of_one_client_are_never_further_apart_than_the_sensitivity",
        ("return sum(size * width**2 for size, width in widths)", "return max(width**2 for size, width in widths)")),
    (9, "headroom for output noise", NOISE + "test_too_much_noise_is_refused_before_anything_is_coded",
        ("(math.ceil(Fraction(segment.magnitude) * 2**f) + reach) >= limit:",
         "math.ceil(Fraction(segment.magnitude) * 2**f) >= limit:")),
)  # fmt: skip
