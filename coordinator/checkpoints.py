"""What a PPO checkpoint holds beyond the underlying trainer's: the critic, and a mark that it is complete."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from appa_secure.errors import RunError

CRITIC_FILE, STATE_FILE = "critic.safetensors", "ppo.json"


def unmark(folder: Path) -> None:
    """A checkpoint about to be written over is incomplete until `complete` says otherwise."""
    (folder / STATE_FILE).unlink(missing_ok=True)


def complete(folder: Path, critic: nn.Module, state: dict[str, Any]) -> None:
    """Add the critic and, last and by renaming, the state whose presence makes the checkpoint complete."""
    save_file(critic.state_dict(), folder / CRITIC_FILE)
    part = folder / f"{STATE_FILE}.part"
    part.write_text(json.dumps(state))
    part.replace(folder / STATE_FILE)


def load_critic(folder: Path, critic: nn.Module) -> None:
    """Put the checkpoint's critic weights into ``critic``."""
    critic.load_state_dict(load_file(folder / CRITIC_FILE))


def check(folder: Path, state: dict[str, Any]) -> None:
    """Refuse a checkpoint that is incomplete or belongs to another run.

    Raises:
        RunError: the mark is missing, or an entry of ``state`` differs from the one written.
    """
    if not (folder / STATE_FILE).is_file():
        raise RunError(f"{folder} lacks {STATE_FILE}, so its writing was cut off: resume from an earlier one")
    written = json.loads((folder / STATE_FILE).read_text())
    for name, value in state.items():
        if written.get(name) != value:
            found = written.get(name)
            raise RunError(f"{folder} belongs to another run: {name}={found!r} there, {value!r} here")


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint in a folder; one whose writing was cut off does not count."""
    folders = [path.parent for path in Path(output_dir).glob(f"checkpoint-*/{STATE_FILE}")]
    return max(folders, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of named weights, their names and values as float32."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
