"""From a prompt to an answer: jitted prefill of any attention, decoding, sampling, text."""

from minference_jax.generate.ahead import CompiledProgram, compile_ahead
from minference_jax.generate.attend import ATTENTION_NAMES
from minference_jax.generate.decoding import Completion
from minference_jax.generate.language_model import LanguageModel
from minference_jax.generate.programs import PrefillResult, Scores
from minference_jax.generate.prompts import bucket_length
from minference_jax.generate.saved import load_prefill, save_prefill

__all__ = [
    "ATTENTION_NAMES",
    "CompiledProgram",
    "Completion",
    "LanguageModel",
    "PrefillResult",
    "Scores",
    "bucket_length",
    "compile_ahead",
    "load_prefill",
    "save_prefill",
]
