"""Survey data in one internal form, and the loaders that produce it."""

from __future__ import annotations

import logging
from typing import Any

from appa_secure.data.survey import (
    MAX_OPTIONS,
    GroupData,
    Question,
    Responses,
    Split,
    Survey,
    counts_of,
    split_members,
    split_questions,
)
from appa_secure.errors import DataError

__all__ = [
    "MAX_OPTIONS",
    "GroupData",
    "Question",
    "Responses",
    "Split",
    "Survey",
    "counts_of",
    "load",
    "split_members",
    "split_questions",
]

_log = logging.getLogger(__name__)


def load(cfg: Any, seed: int) -> Survey:
    """Read or generate the survey that ``cfg`` (the ``data`` section of the configuration) names.

    ``seed`` drives the synthetic population; files are read as they are. Dropped questions and answers
    are counted in ``Survey.dropped`` and logged. DataError when nothing usable is left.
    """
    survey = _load(cfg, seed)
    for reason, count in survey.dropped.items():
        _log.info("%s: dropped %d (%s)", survey.name, count, reason)
    _log.info("%s: %d questions, %d groups", survey.name, len(survey.questions), len(survey.groups))
    return survey


def _load(cfg: Any, seed: int) -> Survey:
    # Imported on use: `datasets` and the parsers are not needed by a client that holds its own csv file.
    if cfg.kind == "synthetic":
        from appa_secure.data import synthetic

        return synthetic.load(cfg, seed)
    if cfg.path is None:
        raise DataError(
            f"data.path is needed for data={cfg.kind}: give a local path, or a hub id where one exists"
        )
    if cfg.kind == "opinionqa":
        from appa_secure.data import opinionqa

        return opinionqa.load(cfg)
    if cfg.kind == "globalopinionqa":
        from appa_secure.data import globalopinionqa

        return globalopinionqa.load(cfg)
    if cfg.kind == "table":
        from appa_secure.data import table

        return table.load(cfg)
    raise DataError(f"data.kind={cfg.kind!r}: choose synthetic, opinionqa, globalopinionqa or table")
