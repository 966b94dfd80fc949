"""Results as JSON lines that an interrupted run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minference_jax.bench.records import environment

_KEY = ("task", "length", "index", "attention")


class Journal:
    """Records of a run, each written as soon as it is known. A line with `settings` comes first; lines with
    `environment` say with which device, versions and commit those after them were made.

    Args:
        path: file of JSON lines; one that exists is gone on with, and a last line that was not written to its end is
            taken off. None = records are kept in memory alone.
        settings: of the run, plain JSON; a file made with others is refused.

    Raises:
        ValueError: the file is no such file, or was made with other settings.
        OSError: it can't be read or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]):
        self.records: list[dict[str, Any]] = []
        self._path = None if path is None else Path(path)
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}
        if self._path is None:
            return
        settings = json.loads(json.dumps(settings))
        lines = self._read() if self._path.exists() else []
        if lines:
            self._check(lines[0].get("settings"), settings)
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"settings": settings})
        before = [line["environment"] for line in lines if "environment" in line]
        if before[-1:] != [here := environment()]:
            self._write({"environment": here})
        for line in lines[1:]:
            if "environment" not in line:
                self._keep(line)

    def find(self, task: str, length: int, index: int, attention: str) -> dict[str, Any] | None:
        """The record of one sample and attention; None where there is none yet."""
        return self._known.get((task, length, index, attention))

    def append(self, record: dict[str, Any]) -> None:
        """Keeps a record, and writes it where there is a file."""
        self._keep(record)
        if self._path is not None:
            self._write(record)

    def _keep(self, record: dict[str, Any]) -> None:
        try:
            self._known[tuple(record[name] for name in _KEY)] = record
        except KeyError as error:
            raise ValueError(f"{self._path}: a record lacks {error}; it is no file of an evaluation") from None
        self.records.append(record)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines; a torn last one is taken off the file."""
        raw = self._path.read_bytes() if self._path is not None else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]]
            if not all(isinstance(line, dict) for line in lines) or (
                lines and not isinstance(lines[0].get("settings"), dict)
            ):
                raise ValueError("its first line has no settings")
            if raw and not lines and not raw.startswith(b'{"settings"'):
                raise ValueError("it has no whole line")
        except ValueError as error:
            raise ValueError(f"{self._path} is no file of an evaluation: {error}") from None
        if whole != raw and self._path is not None:
            os.truncate(self._path, len(whole))
        return lines

    def _check(self, found: Any, settings: Mapping[str, Any]) -> None:
        names = [*settings, *(name for name in found if name not in settings)]
        for name in names:
            if found.get(name) != settings.get(name):
                raise ValueError(
                    f"{self._path} was made with {name}={found.get(name)!r}, this run has {settings.get(name)!r}: "
                    "give another file"
                )
