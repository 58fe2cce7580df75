"""Runs of a sweep as processes of their own, forked from one that has imported everything already.

Importing torch, Opacus, TRL and what they pull in takes as long as a small run. Python's fork server does it once per
sweep; each run is forked from it and is a process of its own. That server computes nothing and starts no Python thread.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["appa_secure.cli", "appa_secure.launch", "coordinator.pipeline"])
# A process's exit code can be read once. Starting one reads those of all others that have ended: while another thread reads
# too, one of the two finds nothing and takes it for 255.
_READING = threading.Lock()


def run(arguments: Sequence[str], log: Path | None, threads: int) -> int:
    """`appa-secure run ARGUMENTS` in a process of its own; returns its exit code, below 0 for a signal.

    Its standard output goes nowhere, what it says to people to the end of the file `log`, or to this process's own
    standard error for None. threads: how many it may use for arithmetic; that of the first call holds for all. It ends when
    this process does, however that comes about, and can be resumed like any run that was killed.
    """
    # Read once, when the fork server loads its libraries.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    process = _CONTEXT.Process(target=_main, args=(list(arguments), log))
    with _READING:
        process.start()
    wait([process.sentinel])
    with _READING:
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def _main(arguments: list[str], log: Path | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    if log is not None:
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), 2)
    sys.argv = ["appa-secure", "run", *arguments]
    from appa_secure.cli import main

    main()


def _end_with_parent() -> None:
    """A sweep that was killed can tell nobody: its runs would go on unseen, and keep a repeated sweep out."""
    parent = multiprocessing.parent_process()  # the sweep, not the fork server
    assert parent is not None
    parent.join()
    os._exit(1)
