"""What an attacker measures, beside what the accounting claims: `appa-secure audit privacy`.

`bound` is the statistics, `canaries` plants them and asks the real clients, `membership` and `reconstruction` are
attacks on the predictor, the policy's rewards and the context, `privacy` runs them all and writes the report.

Like `appa_secure.launch`, this package puts both sides together, on simulated or published data and on one machine; no
party of a federation uses it.
"""
