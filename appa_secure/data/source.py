"""What the readers of published surveys share: finding the files, recognising refusals, parsing cells."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from appa_secure.errors import DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

# Full matches only: "Don't know what that is" or "Not sure" may be an answer like any other.
_NONRESPONSE = re.compile(
    r"(?:other )?missing(?:;.*)?|inap(?:plicable)?(?:[:.].*)?"
    r"|(?:dk|don['’]?t know|do not know|no answer|no response|refused|refusal|na)"
    r"(?:\s*/\s*(?:dk|don['’]?t know|do not know|no answer|no response|refused|refusal|na))*"
    r"(?:\s*[(\[].*[)\]])?",
    re.IGNORECASE,
)


def is_nonresponse(option: str) -> bool:
    """True for options that record the absence of an answer: refused, don't know, no answer, missing."""
    return _NONRESPONSE.fullmatch(option.strip()) is not None


def local_path(path: str, kind: str) -> Path | None:
    """The local file or directory, or None when ``path`` is a hub id (owner/name, not existing here)."""
    local = Path(path).expanduser()
    if local.exists():
        return local
    if _HUB_ID.fullmatch(path):
        return None
    raise DataError(
        f"data.path={path!r} does not exist (data={kind}): give a local path or a hub id owner/name"
    )


def hub_error(path: str, problem: Exception) -> DataError:
    """One message for every way in which a hub download fails."""
    return DataError(
        f"data.path={path!r} is no local path, and reading it as a hub id failed "
        f"({type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else 'no details'}): "
        "check the id and the network, or download the data and give its local path"
    )


def literal(text: str, where: str) -> Any:
    """A Python literal from a text cell; nothing is executed. DataError naming ``where`` when it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as problem:
        raise DataError(f"{where}: not a list or dictionary literal: {text[:60]!r}") from problem
