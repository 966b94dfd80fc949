"""What `--attentions` of `minference-jax evaluate` asks for."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minference_jax.cli.values import HEAD_PATTERNS, head_pattern
from minference_jax.evaluate import Contender
from minference_jax.evaluate.contenders import with_dense
from minference_jax.generate import LanguageModel
from minference_jax.loading import more_patterns
from minference_jax.measure import takes_granularity
from minference_jax.patterns import read_patterns
from minference_jax.patterns.release import is_release

_NAMED = re.compile(r"([\w.,:-]+)=(.+)", re.DOTALL)  # a name has no slash, so that a path with "=" can be told from it


class Choice(NamedTuple):
    """A contender, and the file, folder or release that its patterns are from; None = from none.

    Those of a folder or a release depend on the model: until it is loaded the contender has none.
    """

    contender: Contender
    source: str | None = None


def choose_contenders(arguments: argparse.Namespace) -> list[Choice]:
    """What --attentions asks for, dense first; without it the model's own patterns and an A-shape of equal cost.

    Raises:
        ValueError: one that makes no sense, or a granularity that none of them takes.
        OSError: a pattern file can't be read.
    """
    found: list[Choice] = []
    for one in arguments.attentions or ["minference", "a_shape"]:
        parts = _NAMED.fullmatch(one)
        name, what = parts.groups() if parts else (Path(one).name, one)
        found.append(_choice(name, what, found, arguments))
    if arguments.slash_granularity is not None and not any(takes_granularity(x.contender.attention) for x in found):
        raise ValueError("--slash-granularity does not go with these --attentions: none has vertical-slash heads")
    if not any(one.contender.name == "dense" for one in found):
        dense = Contender(name="dense", attention="dense", implementation=arguments.implementation)
        found.insert(0, Choice(dense))
    with_dense([one.contender for one in found])
    return found


def with_patterns(choices: Sequence[Choice], name: str | None, model: LanguageModel) -> list[Contender]:
    """The contenders, those of folders and releases with the patterns that these have for the model of that name.

    Raises:
        ValueError, OSError: as `more_patterns`.
    """
    return [
        dataclasses.replace(contender, pattern=more_patterns(name, model.config, source))
        if source is not None and contender.pattern is None
        else contender
        for contender, source in choices
    ]


def _choice(name: str, what: str, before: list[Choice], arguments: argparse.Namespace) -> Choice:
    options: dict[str, Any] = {"name": name, "implementation": arguments.implementation}
    granularity: dict[str, Any] = {"slash_granularity": arguments.slash_granularity or "line"}
    kind = what.partition(":")[0]
    if what == "dense":
        return Choice(Contender(**options, attention="dense"))
    if what == "minference":
        return Choice(Contender(**options, **granularity))
    if what == "a_shape":
        others = [x.contender.name for x in before if x.contender.attention not in ("a_shape", "dense")]
        if not others:
            raise ValueError("a_shape costs as much as a sparse attention named before it, or give a_shape:SINK,WINDOW")
        return Choice(Contender(**options, attention="a_shape", equal_cost_to=others[0]))
    if kind in HEAD_PATTERNS:
        try:
            pattern = head_pattern(what)
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error)) from None
        fits = granularity if takes_granularity(kind) else {}
        return Choice(Contender(**options, **fits, attention=kind, pattern=pattern))
    if is_release(what):
        Path(what).stat()  # that there is none is to be said now
        return Choice(Contender(**options, **granularity), what)
    return Choice(Contender(**options, **granularity, pattern=read_patterns(what)), what)
