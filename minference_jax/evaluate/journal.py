"""The journal of an evaluation: what it was asked, then a line for each sample and attention. It makes it resumable.

Lines with `environment` stand between the records: on which device, with which versions and commit those behind them
were made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from minference_jax import journal
from minference_jax.bench.records import environment
from minference_jax.journal import (
    COUNT,
    LIST,
    NUMBER,
    OBJECT,
    SHARE,
    TEXT,
    WHOLE,
    Check,
    check_fields,
    list_of,
    or_null,
)

FORMAT = journal.Format("minference-jax/evaluation", 1, "an evaluation")
PERPLEXITY = "perplexity"
"""The task of the records that have likelihoods in place of answers."""
ENVIRONMENT = ("device", "driver", "jax", "jaxlib", "commit", "date")
"""What is known of where a record was made."""

_KEY = ("task", "length", "index", "attention")
_EVERY: dict[str, Check] = {"task": TEXT, "length": COUNT, "index": WHOLE, "attention": TEXT}
_EVERY |= {"pattern": or_null(TEXT), "density": NUMBER, "prompt": TEXT}
_ANSWER = _EVERY | {"context": WHOLE, "about": OBJECT, "tokens": COUNT, "shared_tokens": WHOLE, "said": TEXT}
_ANSWER |= {"answers": LIST, "score": SHARE, "metric": TEXT}
_ENVIRONMENT = dict.fromkeys(ENVIRONMENT, TEXT) | dict.fromkeys(("driver", "commit"), or_null(TEXT))


class Journal:
    """Records of a run, each written as soon as it is known.

    Args:
        path: of the file; one that exists is gone on with. None = records are kept in memory alone.
        settings: of the run, plain JSON; a file made with others is refused.

    Attributes:
        records: in the order in which they were made, each with its `environment`.

    Raises:
        ValueError: the file is damaged, something else, or was made with other settings.
        OSError: it can't be read or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]):
        self.records: list[dict[str, Any]] = []
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._settings, self._here = settings, environment()
        self._last: dict[str, Any] | None = None  # the environment that the file ends with
        self._file = journal.Journal(path, FORMAT, settings, self._read)

    def find(self, task: str, length: int, index: int, attention: str) -> dict[str, Any] | None:
        """The record of one sample and attention; None where there is none yet."""
        return self._known.get((task, length, index, attention))

    def append(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps a record, and writes it where there is a file; gives it back with its environment."""
        if self._last != self._here:
            self._file.append({"environment": self._here})
            self._last = self._here
        self._file.append(record)
        return self._keep(record)

    def _keep(self, record: Mapping[str, Any]) -> dict[str, Any]:
        kept = {**record, "environment": self._last}
        self._known[tuple(record[name] for name in _KEY)] = kept
        self.records.append(kept)
        return kept

    def _read(self, line: dict[str, Any]) -> None:
        """A line of the file; raises ValueError where it is not what an evaluation writes."""
        if "environment" in line:
            check_fields(line, {"environment": OBJECT})
            check_fields(line["environment"], _ENVIRONMENT)
            self._last = line["environment"]
            return
        if self._last is None:
            raise ValueError("a record stands before any environment")
        check_fields(line, self._checks(line))
        if tuple(line[name] for name in _KEY) in self._known:
            raise ValueError(f"{line['task']}, sample {line['index']}, of {line['attention']} is there twice")
        self._keep(line)

    def _checks(self, line: Mapping[str, Any]) -> dict[str, Check]:
        names = tuple(self._settings["contenders"])
        own = {"attention": Check(lambda value: value in names, f"one of {', '.join(names)}")}
        if line.get("task") != PERPLEXITY:
            return _ANSWER | own
        sums, whole = (list_of(check, self._settings["steps"]) for check in (NUMBER, COUNT))
        above = Check(lambda value: value is None, "null") if line.get("attention") == "dense" else sums
        numbers = {"ends": whole, "counts": whole, "nll": sums, "nll_squares": sums}
        return _EVERY | own | numbers | {"above": above, "above_squares": above}
