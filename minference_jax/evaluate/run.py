"""Asks every question with every attention, on the same weights in the same run, and scores the answers."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from minference_jax.evaluate.contenders import Contender, contender_settings, describe, resolve, with_dense
from minference_jax.evaluate.journal import Journal
from minference_jax.evaluate.metrics import METRICS
from minference_jax.evaluate.samples import Sample
from minference_jax.generate import LanguageModel, PrefillResult
from minference_jax.models.digest import weights_digest

_LARGEST_REST = 1 / 8  # of a prompt that may be read after what it shares with others
OnRecord: TypeAlias = Callable[[Mapping[str, Any]], None]


def evaluate_answers(
    model: LanguageModel,
    samples: Iterable[Sample],
    contenders: Sequence[Contender],
    *,
    output: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    share_contexts: bool = True,
    on_record: OnRecord | None = None,
) -> list[dict[str, Any]]:
    """Greedy answers of dense attention and of each contender to every sample, scored.

    A prompt is read by the contender's attention and answered with dense attention over its cache. Samples that follow
    one another and ask about one context share its prefill: what their prompts begin with alike is read once by the
    contender's attention, and the rest of each, where it is an eighth at most, with dense attention over that cache.
    The choice of what to keep then knows nothing of the question. That is harder for sparse attention than the paper's
    protocol, where the whole prompt with its question is read at once; for dense attention it makes no difference.

    What can be known of settings, patterns and the file is checked before the first prefill, each prompt before those
    of its context.

    Args:
        model: that reads and answers.
        samples: in any number; they are taken one context at a time.
        contenders: beside dense attention, which is always asked first.
        output: file of JSON lines, one for each sample and attention. One that exists is gone on with: what it holds
            is not asked again. None = no file.
        settings: of the samples, plain JSON, such as the model's name and a seed; a file with others is refused.
        share_contexts: False = every prompt is read whole, as in the paper.
        on_record: called with every record as soon as it is known, also with those found in the file.

    Returns:
        Records: task, length, index, context, about, tokens (of the prompt), shared_tokens (of them read for several
        questions at once), attention, pattern, density (mean over heads of the share of dense attention's work; 1 for
        dense), said, answers, score, metric, prompt (a digest of its tokens), environment (device, versions, commit and
        date of when it was made).

    Raises:
        ValueError: contenders that do not go together or are the same, patterns that do not fit the model, a prompt
            without room for its answer, a file of another run.
        NotImplementedError, MemoryError: as `LanguageModel.prefill`.
        OSError: the file can't be read or written.
    """
    ordered = with_dense(contenders)
    journal = Journal(output, run_settings(model, ordered, settings, share_contexts=share_contexts))
    for _, group in itertools.groupby(samples, key=lambda one: (one.task, one.length, one.context)):
        several = list(group)
        for one in several:
            model.check_room([len(one.prompt)], one.max_new_tokens)
        shared = shared_prefix([one.prompt for one in several]) if share_contexts and len(several) > 1 else 0
        for contender in ordered:
            for record in _ask(model, several, shared, contender, journal):
                if on_record is not None:
                    on_record(record)
    return journal.records


def run_settings(
    model: LanguageModel, ordered: Sequence[Contender], given: Mapping[str, Any] | None, **more: Any
) -> dict[str, Any]:
    """What a file of results must have been made with to be gone on with, as plain JSON.

    Raises:
        ValueError, NotImplementedError: as `contender_settings`.
    """
    contenders = contender_settings(ordered, model)
    own = {"config": hashlib.sha256(repr(model.config).encode()).hexdigest()[:16], "dtype": str(model.model.dtype)}
    own["weights"] = weights_digest(model.model)
    return {**(given or {}), **own, **more, "contenders": contenders}


def _ask(
    model: LanguageModel, samples: Sequence[Sample], shared: int, contender: Contender, journal: Journal
) -> Iterator[dict[str, Any]]:
    """Records of one contender for the samples of one context; what the journal holds is not asked again."""
    cached: tuple[PrefillResult, str | None] | None = None
    for sample in samples:
        where = (sample.task, sample.length, sample.index)
        digest = hashlib.sha256(np.asarray(sample.prompt, np.int32).tobytes()).hexdigest()[:16]
        found = journal.find(*where, contender.name)
        if found is not None:
            if found["prompt"] != digest:
                raise ValueError(
                    f"the file holds another prompt for {sample.task}, sample {sample.index}: give another file"
                )
            yield found
            continue
        like = None if contender.equal_cost_to is None else journal.find(*where, contender.equal_cost_to)
        densities = {} if like is None else {like["attention"]: like["density"]}
        if shared:
            cached = cached or _read(model, sample.prompt[:shared], contender, densities)
            read, pattern = cached
            read = model.extend(read, sample.prompt[shared:])
        else:
            read, pattern = _read(model, sample.prompt, contender, densities)
        (completion,) = model.complete(read, max_new_tokens=sample.max_new_tokens)
        said = completion.text or ""
        record = {
            **dict(zip(("task", "length", "index"), where, strict=True)),
            "context": sample.context,
            "about": dict(sample.about),
            "tokens": len(sample.prompt),
            "shared_tokens": shared,
            "attention": contender.name,
            "pattern": pattern,
            "density": 1.0 if read.density is None else float(np.mean(read.density)),
            "said": said,
            "answers": list(sample.answers),
            "score": METRICS[sample.metric](said, sample.answers),
            "metric": sample.metric,
            "prompt": digest,
        }
        yield journal.append(record)


def _read(
    model: LanguageModel, prompt: Sequence[int], contender: Contender, densities: dict[str, float]
) -> tuple[PrefillResult, str | None]:
    options = resolve(contender, model, len(prompt), densities)
    pattern = options["pattern"]
    if contender.attention == "minference" and pattern is None:
        pattern = model.patterns
    return model.prefill(list(prompt), **options), describe(pattern)


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with alike, at least one of each left over; 0 where too many are left.

    What is left is read with dense attention: were it much of a prompt, a sparse contender would be a dense one.
    """
    first, shortest, longest = prompts[0], min(map(len, prompts)), max(map(len, prompts))
    places = range(shortest - 1)
    alike = next((i for i in places if any(prompt[i] != first[i] for prompt in prompts)), shortest - 1)
    return alike if (longest - alike) <= _LARGEST_REST * longest else 0
