"""Offline search: the pattern of every head of a model, nearest to dense at a mean cost within the budget.

search: the search itself, over compare (candidates in one layer), candidates (kinds and proportions), budget (sizes of
equal cost), results (what was compared, and the choice), journal (what makes it resumable) and calibration (prompts,
where the user has none).
"""

from minference_jax.search.calibration import CALIBRATION_LENGTH, calibration_prompts, manual_prompt, retrieval_prompt
from minference_jax.search.candidates import DEFAULT_CANDIDATES
from minference_jax.search.results import CandidateResult, LayerResult, SearchResult, choose, least_cost
from minference_jax.search.search import DEFAULT_BUDGET, search_patterns

__all__ = [
    "CALIBRATION_LENGTH",
    "DEFAULT_BUDGET",
    "DEFAULT_CANDIDATES",
    "CandidateResult",
    "LayerResult",
    "SearchResult",
    "calibration_prompts",
    "choose",
    "least_cost",
    "manual_prompt",
    "retrieval_prompt",
    "search_patterns",
]
