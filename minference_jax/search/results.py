"""What a search found, as data: for every layer each candidate's sizes, cost and error, and the choice."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minference_jax.patterns import HeadPattern, ModelPatterns, ScoreDirection

SCORE_NAME = "relative_output_error"
SCORE_DIRECTION: ScoreDirection = "lower_is_better"


class CandidateResult(NamedTuple):
    """One candidate in one layer.

    Attributes:
        candidate: kind and proportions.
        patterns: N head patterns, the candidate at the budget; None for a head whose least sizes cost more.
        cost: N numbers, as the search counts; None as above.
        density: N numbers, share of dense attention's tiles; None as above.
        error: N numbers, norm of the output's difference from dense attention over the norm of dense attention's
            output, over all queries of all prompts; None as above.
    """

    candidate: HeadPattern
    patterns: tuple[HeadPattern | None, ...]
    cost: tuple[float | None, ...]
    density: tuple[float | None, ...]
    error: tuple[float | None, ...]


class LayerResult(NamedTuple):
    """One layer.

    Attributes:
        layer: index, from 0.
        candidates: in the order of the search.
        output_norms: N numbers, norm of dense attention's output over all prompts: tells another model or other
            prompts apart when a search goes on.
    """

    layer: int
    candidates: tuple[CandidateResult, ...]
    output_norms: tuple[float, ...]

    def choices(self) -> tuple[CandidateResult, ...]:
        """The candidate of least error of each head, of equal ones the first.

        Raises:
            ValueError: no candidate keeps within the budget at some head.
        """
        chosen = []
        for head in range(len(self.output_norms)):
            errors = [np.inf if one.error[head] is None else one.error[head] for one in self.candidates]
            best = int(np.argmin(errors))  # type: ignore[arg-type]
            if self.candidates[best].error[head] is None:
                raise ValueError(
                    f"layer {self.layer}, head {head}: every candidate costs more than the budget at its least sizes: "
                    f"give a larger budget or an A-shape among the candidates"
                )
            chosen.append(self.candidates[best])
        return tuple(chosen)


class SearchResult(NamedTuple):
    """A finished search.

    Attributes:
        patterns: the choice for every head, with its error as score.
        layers: what was compared, one for each layer.
    """

    patterns: ModelPatterns
    layers: tuple[LayerResult, ...]


def as_patterns(layers: tuple[LayerResult, ...], *, model: str | None, source: str) -> ModelPatterns:
    """The choices of all layers, exactly as they were found, with their errors as scores.

    Raises:
        ValueError: as `LayerResult.choices`.
    """
    chosen = [layer.choices() for layer in layers]
    return ModelPatterns(
        layers=tuple(tuple(one.patterns[head] for head, one in enumerate(row)) for row in chosen),  # type: ignore[misc]
        scores=tuple(tuple(one.error[head] for head, one in enumerate(row)) for row in chosen),
        score_name=SCORE_NAME,
        score_direction=SCORE_DIRECTION,
        model=model,
        source=source,
    )
