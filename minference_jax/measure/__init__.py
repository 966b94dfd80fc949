"""Dense against another attention on one prompt, on this machine: what the command line and the demo share.

attentions: a choice of attention; prompts: a text with a question; timing: prefills, compilation apart; comparison: two
attentions side by side; device: what computes and how much memory it took; energy: of a GPU. Nothing here prints.
"""

from minference_jax.measure.attentions import (
    DENSE,
    SIZES,
    ChosenAttention,
    attention_of,
    default_sizes,
    takes_granularity,
)
from minference_jax.measure.comparison import Answer, Comparison, Side, Step, compare, greedy_tokens, steps_of
from minference_jax.measure.device import device_name, host_peak, memory_limit, peak_memory, reset_host_peak
from minference_jax.measure.prompts import Prompt, encode_question
from minference_jax.measure.timing import CallTimer, PrefillTimer

__all__ = [
    "DENSE",
    "SIZES",
    "Answer",
    "CallTimer",
    "ChosenAttention",
    "Comparison",
    "PrefillTimer",
    "Prompt",
    "Side",
    "Step",
    "attention_of",
    "compare",
    "default_sizes",
    "device_name",
    "encode_question",
    "greedy_tokens",
    "host_peak",
    "memory_limit",
    "peak_memory",
    "reset_host_peak",
    "steps_of",
    "takes_granularity",
]
