"""Does sparse attention keep the answers? Benchmarks of long prompts, against dense attention on the same weights.

samples of niah, ruler and infinitebench -> run: asked with every contender -> journal: kept, and gone on with ->
summary: scores with intervals and differences -> plots. perplexity is read, not asked. linear: what 8-bit
linear layers cost, with dense attention. lm_eval_adapter is for the tasks
of lm-eval.
"""

from minference_jax.evaluate.contenders import Contender, equal_cost_a_shape
from minference_jax.evaluate.infinitebench import INFINITEBENCH_TASKS, infinitebench_samples, read_infinitebench
from minference_jax.evaluate.infinitebench_tasks import SYNTHETIC
from minference_jax.evaluate.linear import LinearErrors, linear_errors
from minference_jax.evaluate.metrics import METRICS
from minference_jax.evaluate.niah import niah_samples
from minference_jax.evaluate.perplexity import evaluate_perplexity
from minference_jax.evaluate.plots import plot
from minference_jax.evaluate.ruler import NO_CORPUS, RULER_TASKS, ruler_samples
from minference_jax.evaluate.run import evaluate_answers
from minference_jax.evaluate.samples import Sample, Samples
from minference_jax.evaluate.summary import summarize, table

__all__ = [
    "INFINITEBENCH_TASKS",
    "METRICS",
    "NO_CORPUS",
    "RULER_TASKS",
    "SYNTHETIC",
    "Contender",
    "LinearErrors",
    "Sample",
    "Samples",
    "equal_cost_a_shape",
    "evaluate_answers",
    "evaluate_perplexity",
    "infinitebench_samples",
    "linear_errors",
    "niah_samples",
    "plot",
    "read_infinitebench",
    "ruler_samples",
    "summarize",
    "table",
]
