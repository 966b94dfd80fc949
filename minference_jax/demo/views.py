"""Pieces of the page as HTML. Everything that a visitor or a model wrote is escaped."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from html import escape

from minference_jax.demo.inspections import InspectState, LeftOut
from minference_jax.demo.runs import RunState, Side
from minference_jax.measure import takes_granularity
from minference_jax.measure.energy import LEAST_SECONDS

_WORDS = re.compile(r"\w+\s*|[^\w\s]+\s*|\s+")  # punctuation apart


def note(text: str, kind: str = "info") -> str:
    """One line about what goes on; kind is "info", "busy" or "bad"."""
    return f'<div class="note {kind}" role="status">{escape(text)}</div>' if text else ""


def numbers(state: RunState | None, now: float) -> str:
    """The three big numbers: dense seconds, sparse seconds, speed-up; seconds of a timed prefill run on while it runs.

    Args:
        state: of the run; None = there was none yet.
        now: by time.monotonic.
    """
    sparse = "only the keys that count" if state is None else state.attention.name.replace("_", "-")
    found = None if state is None else state.comparison
    if found is not None and found.density is None:
        sparse = f"{sparse} took dense attention"
    cards = [_card("dense", "Dense", "every key", state, now), _card("sparse", "Sparse", sparse, state, now)]
    if found is None:
        cards.append(_number("speedup", "Speed-up", "–", "of the prefill"))
    else:
        cards.append(_number("speedup", "Speed-up", f"{found.speedup:.2f}×", "of the prefill"))
    return f'<div class="shown"><div class="numbers">{"".join(cards)}</div>{_facts(state)}</div>'


def _facts(state: RunState | None) -> str:
    """What else is worth a line: tokens, and at the end density, memory and energy."""
    if state is None or not state.tokens:
        return ""
    facts = [f"{state.tokens:,} tokens"]
    if found := state.comparison:
        computed = "dense attention ran" if found.density is None else f"density {found.density.mean():.2f}"
        facts += [computed, f"peak memory so far {_memory(state)}"]
        joules = state.dense.joules, state.sparse.joules
        if None not in joules:
            facts.append(f"energy {joules[0]:.0f} J dense, {joules[1]:.0f} J sparse")
    return f'<div class="facts">{escape(" · ".join(facts))}</div>{_why_slower(state)}'


def _why_slower(state: RunState) -> str:
    """Why sparse attention did not pay, and from which length it is expected to; empty where it did."""
    found, least = state.comparison, state.pays_from
    if found is None or (found.density is not None and found.speedup >= 1):
        return ""
    why = "Sparse is slower here: what it takes to leave keys out is more than that saves."
    if found.density is None:
        why = "Dense attention ran twice: sparse attention is not expected to pay at this length."
    if least is None:
        why += " With half or more of the heads dense it is not expected to pay."
    elif least > state.tokens:
        why += f" As a rule of thumb it pays from about {least:,} tokens on this device, with these patterns."
    return f'<div class="facts">{escape(why)}</div>'


def _memory(state: RunState) -> str:
    found = state.comparison
    known = found is not None and found.peak_bytes is not None
    return f"{found.peak_bytes / 1e9:.2f} GB of the {found.peak_of}" if known else "unknown"  # type: ignore[union-attr,operator]


def _card(side: str, title: str, what: str, state: RunState | None, now: float) -> str:
    if state is None:
        return _number(side, title, "–", what)
    one: Side = getattr(state, side)
    live = state.active == side
    if live and state.is_timed:
        shown = f"{now - state.began:.1f} s"
    elif state.comparison is not None:
        shown = format_seconds(getattr(state.comparison, side).median_seconds)
    else:
        shown = format_seconds(one.seconds[-1]) if one.seconds else "–"
    if live and not state.is_timed:
        what = f"compiling, {now - state.began:.0f} s"
    elif one.compile_seconds is not None:
        what = f"{what}; compile {format_seconds(one.compile_seconds)}, not counted"
    return _number(side + (" live" if live else ""), title, shown, what)


def _number(kind: str, title: str, value: str, about: str) -> str:
    return (
        f'<div class="number {kind}"><div class="title">{escape(title)}</div>'
        f'<div class="value">{escape(value)}</div><div class="about">{escape(about)}</div></div>'
    )


def format_seconds(value: float) -> str:
    """Seconds with three figures or so."""
    if value >= 10:
        return f"{value:.1f} s"
    if value >= 0.1:
        return f"{value:.2f} s"
    return f"{value * 1000:.0f} ms" if value >= 0.01 else f"{value * 1000:.1f} ms"


def answers(state: RunState | None) -> str:
    """The two answers side by side; at the end what only one of them says is marked."""
    dense, sparse = ("", "") if state is None else (state.dense.answer, state.sparse.answer)
    over = state is not None and state.comparison is not None
    marked = mark_differences(dense.strip(), sparse.strip()) if over else (escape(dense), escape(sparse))
    verdict = ""
    if over:
        same = dense.strip() == sparse.strip()
        verdict = '<div class="verdict same">The answers are the same.</div>' if same else ""
        verdict = verdict or '<div class="verdict">Marked: what only one of the two says.</div>'
    columns = [
        f'<div class="answer {side}"><div class="title">{title} answers</div>'
        f'<div class="text">{text or ("<i>(nothing)</i>" if over else "&nbsp;")}</div></div>'
        for side, title, text in zip(("dense", "sparse"), ("Dense", "Sparse"), marked, strict=True)
    ]
    return f'<div class="answers">{"".join(columns)}</div>{verdict}'


def mark_differences(first: str, second: str) -> tuple[str, str]:
    """Two texts as HTML, in which the words that the other one does not have there are marked."""
    words = [_WORDS.findall(text) for text in (first, second)]
    bare = [[word.strip() for word in side] for side in words]
    matcher = difflib.SequenceMatcher(None, bare[0], bare[1], autojunk=False)
    out: list[list[str]] = [[], []]
    for kind, *places in matcher.get_opcodes():
        for side, (start, end) in enumerate((places[:2], places[2:])):
            text = escape("".join(words[side][start:end]))
            if text:
                out[side].append(text if kind == "equal" else f"<mark>{text}</mark>")
    return "".join(out[0]), "".join(out[1])


def details(state: RunState | None, *, no_energy: str) -> str:
    """Everything that was measured, as a table.

    Args:
        state: of a run that is over; else the table says that there is nothing yet.
        no_energy: why energy is not measured; empty where it is.
    """
    if state is None or state.comparison is None:
        return '<p class="hint">After a run: tokens, density, every timed run, memory, energy.</p>'
    found, both = state.comparison, (state.dense, state.sparse)
    density = "1 (dense attention ran)"
    if (by_head := found.density) is not None:
        density = f"{by_head.mean():.3f} (heads {by_head.min():.3f} to {by_head.max():.3f})"
    short = f"not measured: too short for the card's counter, under {LEAST_SECONDS:.0f} s"
    energy = [f"{one.joules:.0f} J" if one.joules is not None else short for one in both]
    rows = [
        ("prompt", f"{state.tokens:,} tokens", ""),
        ("density", "1", density),
        ("attention", "dense", state.attention.description),
        ("implementation", found.dense.implementation, found.sparse.implementation),
        ("compile, apart", *(_or_dash(one.compile_seconds) for one in both)),
        ("timed runs", *(", ".join(map(format_seconds, one.seconds)) for one in both)),
        ("energy of these", *(energy if not no_energy else (f"not measured: {no_energy}", ""))),
        ("peak memory", f"{_memory(state)}, since the demo began, loading and other runs included", ""),
        ("equal tokens", f"{found.agreed} of {found.compared}", ""),
        ("logits differ by", f"at most {found.max_logit_difference:.3g}", ""),
    ]
    if takes_granularity(state.attention.name):
        rows.insert(3, ("slashes", "–", state.attention.slash_granularity))
    return _table(("", "Dense", "Sparse"), rows)


def _or_dash(value: float | None) -> str:
    return "was compiled before" if value is None else format_seconds(value)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = []
    for name, *cells in rows:
        wide = len(cells) == 2 and not cells[1]
        body = f'<td colspan="2">{escape(cells[0])}</td>' if wide else "".join(f"<td>{escape(c)}</td>" for c in cells)
        lines.append(f"<tr><th>{escape(name)}</th>{body}</tr>")
    return f'<table class="facts-table"><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def picture(data_uri: str, alternative: str) -> str:
    """A picture that is part of the page, so that none is stored on the server."""
    return f'<img class="picture" src="{escape(data_uri)}" alt="{escape(alternative)}">' if data_uri else ""


def inspection(state: InspectState | None) -> str:
    """The map of a head and the passages that the whole model leaves out."""
    if state is None or not state.picture:
        return ""
    alternative = f"attention of layer {state.layer}, head {state.head}, and what is kept of it"
    return picture(state.picture, alternative) + _left_out(state.left_out, state.num_heads)


def _left_out(passages: tuple[LeftOut, ...], num_heads: int) -> str:
    if not passages:
        return '<p class="hint">No head leaves anything out for the last queries.</p>'
    intro = (
        "Passages of which the last queries, from which the answer begins, lose most attention, mean over all heads. "
        "What no head reads can reach the answer only by way of tokens between."
    )
    rows = [
        f'<div class="passage"><div class="title">tokens {one.start:,} to {one.end - 1:,} · {one.lost:.2%} of the '
        f"attention lost · read by {one.heads_reading} of {num_heads} heads</div>{escape(one.text)}</div>"
        for one in passages
    ]
    return f'<p class="hint">{intro}</p>{"".join(rows)}'
