"""federation=simulation: the same machines as in `local`, with Flower's simulation engine between them.

One virtual SuperNode per client; Ray's worker processes take turns in answering for the clients, whose state
is on disk. Like `appa_secure.launch`, this module puts both sides together, which neither may do. `clientapp`
and `serverapp` are the same two apps for Flower's own command line (`flwr run`).
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from appa_secure.config import Config, load
from appa_secure.errors import AppaError, ConfigError, RunError
from appa_secure.launch import Parts, align, prepare
from appa_secure.progress import Progress
from appa_secure.records import CONFIG, RunDir
from appa_secure.report import render
from clients.app import Resident, client_app
from coordinator.app import GridFederation, Job, server_app

LOG = "clients.log"  # where workers say what went wrong; beside the clients' stores, not in the run directory
_CONFIG_KEY = "config"  # in Flower's run configuration: path of a resolved configuration


def simulate(config: Config, directory: RunDir, progress: Progress) -> None:
    """Do (or finish) the run in `directory` on Flower's simulation engine. Raises ConfigError without Ray."""
    if find_spec("ray") is None:
        raise ConfigError(
            "federation.kind=simulation runs on Ray, which is not installed. "
            "Fix: pip install 'appa-secure[simulation]', or federation=local"
        )
    parts = prepare(config, directory.root, progress)
    progress.note(f"simulation: starting Flower's engine; errors of clients go to {parts.client_root / LOG}")
    with engine(parts, directory.root) as federation:
        align(config, parts, federation, directory, progress)


@contextmanager
def engine(parts: Parts, root: Path) -> Iterator[GridFederation]:
    """Flower's engine with a node per client of the run in `root`, as a federation; stopped at the end.

    The engine has a thread to itself and its ServerApp only lends the federation out, so that the run stays
    in the caller's thread: interrupts and errors then end it as they end a local run.
    """
    lent: queue.SimpleQueue[GridFederation | None] = queue.SimpleQueue()
    given_back, stopped = threading.Event(), threading.Event()
    crash: list[BaseException] = []

    def lend(federation: GridFederation) -> None:
        lent.put(federation)
        given_back.wait()

    job = Job(parts.agreement.clients, lend, stopped=stopped)
    clients = client_app(partial(_simulated_client, root.absolute(), Path.cwd()))

    def serve() -> None:
        try:
            _run_flower(server_app(lambda _: job), clients, len(job.clients))
        except BaseException as error:  # Flower leaves by SystemExit as well
            crash.append(error)
        finally:
            stopped.set()
            lent.put(None)

    # Standard output belongs to the path of the run; Ray reports some of its mishaps there.
    with _own_environment(), redirect_stdout(sys.stderr):
        thread = threading.Thread(target=serve, name="flower-engine", daemon=True)
        thread.start()
        try:
            federation = lent.get()
            if federation is None:
                cause = crash[0]
                if isinstance(cause, AppaError):
                    raise cause
                raise RunError(f"Flower's engine did not start ({cause}): see its messages above") from cause
            yield federation
        finally:
            given_back.set()
            thread.join()


def _run_flower(server: ServerApp, clients: ClientApp, nodes: int) -> None:
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\.")  # that GPUs may show one day
    run_simulation(
        server_app=server,
        client_app=clients,
        num_supernodes=nodes,
        backend_config={
            "init_args": {
                "address": "local",  # never a cluster that happens to run on this machine
                "num_cpus": min(nodes, os.cpu_count() or 1),
                "object_store_memory": 2**29,  # bytes; by default Ray takes 30 % of the machine's
                "include_dashboard": False,
                "log_to_driver": False,  # Ray would write the workers' output to standard output
                "logging_level": "ERROR",
                "_temp_dir": os.environ["FLWR_HOME"],
            },
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},  # one worker per core
        },
    )


@contextmanager
def _own_environment() -> Iterator[None]:
    """A temporary home for Flower and Ray, and the environment as it was when they are gone."""
    before = dict(os.environ)
    # Not below $TMPDIR, which may be long: Ray puts sockets there, and their paths end at 107 characters.
    home = tempfile.mkdtemp(prefix="appa-", dir="/tmp")
    os.environ["FLWR_HOME"] = home
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # workers run in this environment, also under `uv run`
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
        shutil.rmtree(home, ignore_errors=True)


# --- in a worker --------------------------------------------------------------------------------------------


def _simulated_client(root: Path, folder: Path, context: Context) -> Resident:
    """The client of the node in `context`; relative paths of the configuration start from `folder`."""
    os.chdir(folder)
    return _resident(root / CONFIG, root, int(context.node_config["partition-id"]))


@cache
def _resident(config: Path, root: Path, index: int) -> Resident:
    """One of the run's clients as this process holds it."""
    parts = _parts(config, root)
    client_id = parts.agreement.clients[index]
    return Resident(client_id, parts.client_root / f"node-{index}.lock", partial(parts.client, client_id))


@cache
def _parts(config: Path, root: Path) -> Parts:
    # Results must not depend on the number of cores.
    torch.set_num_threads(1)
    parts = prepare(load(config), root)
    parts.client_root.mkdir(mode=0o700, parents=True, exist_ok=True)
    handler = logging.FileHandler(parts.client_root / LOG, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    logging.getLogger("clients").addHandler(handler)
    return parts


# --- for `flwr run` -----------------------------------------------------------------------------------------


def _configured(context: Context) -> tuple[Path, Config, Path]:
    """The configuration file that the run configuration names, its content, and the directory of the run."""
    path = Path(str(context.run_config.get(_CONFIG_KEY, "")))
    if not path.is_absolute() or not path.is_file():
        raise ConfigError(
            f"run-config {_CONFIG_KEY}={str(path)!r}: give the absolute path of a resolved configuration"
        )
    config = load(path)
    if config.predictor.origin is not None:
        raise ConfigError(
            f"{path}: predictor.origin needs all clients' stores on one machine. Fix: predictor.origin=null"
        )
    if config.name is None:
        raise ConfigError(f"{path}: name is null: set one, so that all nodes speak of the same run")
    return path, config, Path(config.output_root).absolute() / config.name


def _site_client(context: Context) -> Resident:
    path, _, root = _configured(context)
    return _resident(path, root, int(context.node_config["partition-id"]))


def _job(context: Context) -> Job:
    _, config, root = _configured(context)
    parts = prepare(config, root)

    def work(federation: GridFederation) -> None:
        with RunDir.open(root) if root.exists() else RunDir.create(root) as directory, Progress() as progress:
            directory.write_config(config.to_yaml())
            directory.write_environment()
            align(config, parts, federation, directory, progress)
        render(root)

    return Job(parts.agreement.clients, work)


serverapp = server_app(_job)
clientapp = client_app(_site_client)
