"""The prefill suite: whole prefills of a model, dense against sparse in turn, with their parts.

The prompt is random. Its lists are estimated live, in the prefill that is timed. Random weights give activations
without structure, so what they keep says nothing of a trained model: lists of a stated kind can take their place.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from minference_jax.bench.cases import Sizes, describe
from minference_jax.bench.constructed import ConstructedAttend
from minference_jax.bench.meters import Meter
from minference_jax.bench.oracle import WrongResult
from minference_jax.bench.prefill_parts import time_parts
from minference_jax.bench.records import environment, record
from minference_jax.cache import AnyPolicy, Host, Plain, Quantised, policy_of
from minference_jax.generate import LanguageModel, PrefillResult, compile_ahead
from minference_jax.generate.attend import SparseAttend
from minference_jax.generate.chunks import check_chunks, prefill_in_chunks
from minference_jax.generate.programs import prefill
from minference_jax.generate.prompts import pad_prompts
from minference_jax.implementations import device_of, memory_for
from minference_jax.measure import DENSE, CallTimer, ChosenAttention, PrefillTimer
from minference_jax.measure.energy import LEAST_SECONDS
from minference_jax.models import Attend, linear_of
from minference_jax.patterns import PatternArrays

LENGTHS = (8192, 32768, 131072)
"""Tokens, where no lengths are asked for and the model reads so many."""
SAME = (
    *("suite", "case", "attention", "pattern", "slash_granularity", "lists", "length", "dtype", "linear", "layers"),
    *("chunk_size", "kv_cache", "device", "jax", "jaxlib", "commit"),
)
"""Fields of a record that make two of them the same measurement."""


class Subject(NamedTuple):
    """What is measured.

    Attributes:
      name: of the model, in records.
      model: it reads.
      model_layers: how many the model has; `model` may have fewer.
      lists: what lists of sparse heads are estimated from, in words, where they are not constructed.
      pattern: of all heads, in words, where they have one each.
    """

    name: str
    model: LanguageModel
    model_layers: int
    lists: str
    pattern: str


class _Side(NamedTuple):
    """One way to prefill at one length; `facts` is what is found beside the times of its runs."""

    name: str
    timer: CallTimer
    meter: Meter
    repeats: int
    facts: dict[str, Any]


def no_attention(q, k, v, layer_input, *, scale, q_offset, kv_len) -> tuple[Any, None]:
    """Gives back the queries, which costs nothing: an `Attend`, to time everything else."""
    return q, None


class PrefillBench:
    """The suite for one model on one device.

    Args:
      subject: the model.
      attention: to be compared with dense.
      implementation: of sparse attention; None = the first that can. Dense attention is by the first that can.
      chunk_size: tokens read at a time, as in `LanguageModel.prefill`; None = all.
      local_share: lists are constructed, and of each vertical-slash head's slashes this share are the nearest, the
        others and the verticals at random; the estimate runs and chooses nothing. None = it chooses them.
      kv_cache: what is kept of keys and values, as in `LanguageModel.prefill`, with both attentions.
      repeats: timed prefills, after one that compiles and warms.
      baseline_repeats: of dense attention; None = as `repeats`, 0 = it is left out.
      has_parts: whether parts are timed, too, and a prefill without attention.
      max_new_tokens: timed apart, behind the first prefill of each attention; 0 = none.
      joules: reads an energy counter; gives None where there is none.

    Raises:
      ValueError: the options make no sense for the model.
      NotImplementedError: the implementation can't run on this device.
    """

    def __init__(
        self,
        subject: Subject,
        attention: ChosenAttention,
        *,
        implementation: str | None = None,
        chunk_size: int | None = None,
        kv_cache: str | AnyPolicy = "plain",
        local_share: float | None = None,
        repeats: int = 3,
        baseline_repeats: int | None = None,
        has_parts: bool = True,
        max_new_tokens: int = 0,
        joules: Callable[[], float | None] = lambda: None,
    ):
        if attention.name == DENSE.name:
            raise ValueError("attention='dense' can't be compared with dense: another one is needed")
        self._policy = policy_of(kv_cache)
        check_chunks(chunk_size, self._policy)
        subject.model.sparse_on_device(implementation)
        self._subject, self._model, self._sparse = subject, subject.model, attention
        self._split_model = nnx.split(subject.model.model)
        self._implementation, self._chunk_size, self._has_parts = implementation, chunk_size, has_parts
        self._repeats = {"dense": repeats if baseline_repeats is None else baseline_repeats}
        self._attentions = (self._sparse, DENSE) if self._repeats["dense"] else (self._sparse,)
        self._default_repeats, self._joules, self._max_new_tokens = repeats, joules, max_new_tokens
        if isinstance(self._policy, Host) and (attention.name == "auto" or local_share is not None):
            raise ValueError("kv_cache='host' goes neither with attention='auto' nor with constructed lists here")
        self._local_share = local_share
        if local_share is not None:
            self._check_constructed(local_share)
        self._attend(attention.name, implementation)

    def _check_constructed(self, local_share: float) -> None:
        if not 0 < local_share < 1:
            raise ValueError(f"{local_share=} must be above 0 and below 1")
        if self._sparse.slash_granularity != "line":
            raise ValueError("constructed lists are of single distances: they need slash_granularity='line'")

    def plan(self, lengths: Sequence[int] | None) -> list[int]:
        """The lengths to measure, the shortest first, each once; None = those of `LENGTHS` that the model reads.

        Raises:
          ValueError: the model can't read so many tokens, or has no room behind them for those that it makes.
        """
        most = self._model.config.max_length - self._made
        if lengths is None:
            return [length for length in LENGTHS if length <= most] or [most]
        if max(lengths) > most:
            raise ValueError(f"a length of {max(lengths)} tokens was asked for, {self._subject.name} can read {most}")
        return sorted(set(lengths))

    @property
    def _made(self) -> int:
        """Tokens that are made behind a prompt: the timed ones, after two that compile and warm."""
        return self._max_new_tokens and self._max_new_tokens + 2

    def is_measured(self, length: int, records: Sequence[dict[str, Any]]) -> bool:
        """Whether records hold both attentions at a length, with these settings, on this device and of this commit."""
        here = environment()
        for attention in self._attentions:
            wanted = {**self._described(attention, length), **here}
            if not any(all(one[name] == wanted[name] for name in SAME) for one in records):
                return False
        return True

    def measure(self, length: int) -> Iterator[dict[str, Any] | Exception]:
        """Yields the records of one length, dense first, each as soon as it is there.

        What does not fit the device, and what gives logits that are not finite, is yielded as a MemoryError or a
        WrongResult with one sentence, and the rest is measured.

        Raises:
          ValueError, NotImplementedError: as `LanguageModel.prefill`.
        """
        tokens = np.random.default_rng(0).integers(0, self._model.config.vocab_size, length)
        sides: dict[str, _Side] = {}
        for name, timer in self._timers(tokens).items():
            repeats = self._repeats.get(name, self._default_repeats)
            side = sides[name] = _Side(name, timer, Meter(self._joules), repeats, {})
            yield from self._guarded(sides, side, length, self._begin)
        for number in range(max(self._default_repeats, *self._repeats.values())):
            for side in [side for side in sides.values() if number < side.repeats]:
                yield from self._guarded(sides, side, length, _run)
        linear = sides.pop("linear", None)
        for side in list(sides.values()):
            yield from self._guarded(sides, side, length, _add_joules)
        for attention in (DENSE, self._sparse):
            if attention.name not in sides:
                continue
            side = sides[attention.name]
            if self._has_parts:
                yield from self._guarded({}, side, length, lambda side: self._add_parts(side, tokens), "the parts of ")
            yield self._record(attention, length, sides, linear)

    def _timers(self, tokens: np.ndarray) -> dict[str, CallTimer]:
        """Of everything but attention, of sparse and of dense attention."""
        how: dict[str, Any] = {"chunk_size": self._chunk_size, "kv_cache": self._policy}
        timers: dict[str, CallTimer] = {}
        if self._has_parts:
            timers["linear"] = CallTimer(lambda _: self._read(tokens, no_attention, None))
        for one in self._attentions:
            timers[one.name] = PrefillTimer(self._model, tokens, one, **how)
        name = self._sparse.name
        if self._local_share is not None or name == "auto":  # which runs by whatever is first for what it stands for
            timers[name] = CallTimer(lambda by: self._read(tokens, *self._attend(name, by, len(tokens))))
        return timers

    def _read(self, tokens: np.ndarray, attend: Attend, patterns: PatternArrays | None) -> PrefillResult:
        """A prefill by the programs of `LanguageModel.prefill`, with any attention."""
        graph, state = self._split_model
        config, chunk_size = self._model.config, self._chunk_size
        padded, lengths = pad_prompts([tokens], vocab_size=config.vocab_size, max_length=config.max_length)
        with memory_for("it"):
            if chunk_size is not None and lengths[0] > chunk_size and isinstance(self._policy, Plain | Quantised):
                return prefill_in_chunks(graph, state, padded, lengths, patterns, attend, chunk_size, self._policy)
            policy = Plain() if isinstance(self._policy, Host) else self._policy
            return prefill(graph, state, padded, lengths, patterns, attend, policy)

    def _begin(self, side: _Side) -> None:
        """Compiles and warms; notes density, and how long an answer takes where one is asked for."""
        names = {"linear": "none", "dense": None, "auto": "auto"}
        with memory_for("it"):
            side.timer.compile(names.get(side.name, self._implementation))
        read = side.timer.take()
        if side.name != "linear" and not np.isfinite(np.asarray(read.logits)).all():
            raise WrongResult("its logits are not finite")
        side.facts["density"] = 1.0 if read.density is None else float(np.asarray(read.density).mean())
        if self._made and side.name != "linear":
            side.facts["decode"] = _median_token_ms(self._model.decode(read, max_new_tokens=self._made))

    def _guarded(
        self, sides: dict[str, _Side], side: _Side, length: int, do: Callable[[_Side], None], what: str = ""
    ) -> Iterator[Exception]:
        """Does one thing with a side; where that can't be done, yields a sentence and drops it from `sides`."""
        fault: Exception | None = None
        try:
            do(side)
        except (MemoryError, WrongResult) as error:
            how = f"{'no' if side.name == 'linear' else side.name} attention"
            where = f"{self._subject.name}, {self._model.config.num_layers} layers, {length} tokens"
            fault = type(error)(f"{what}prefill with {how}, {where}: {error}")
        if fault is not None:  # not inside the handler: what failed keeps arrays alive
            sides.pop(side.name, None)
            yield fault

    def _add_parts(self, side: _Side, tokens: np.ndarray) -> None:
        attend, patterns = self._attend(side.name, side.timer.implementation, len(tokens))
        side.facts.update(time_parts(self._model, tokens, attend, patterns, self._chunk_size, self._policy))

    def _attend(self, name: str, implementation: str | None, length: int = 1):
        """How to attend and pattern arrays, as `LanguageModel.prefill` chooses them."""
        attention = DENSE if name == DENSE.name else self._sparse
        is_whole = self._chunk_size is None or length <= self._chunk_size
        how = (attention.pattern, attention.slash_granularity, None if name == "auto" else implementation)
        attend, patterns = self._model.choose(length, name, *how, is_whole)
        if self._local_share is not None and isinstance(attend, SparseAttend):
            attend = ConstructedAttend(**vars(attend), local_share=self._local_share)
        return attend, patterns

    def _described(self, attention: ChosenAttention, length: int) -> dict[str, Any]:
        """The fields of a record that say what is measured."""
        config, is_sparse = self._model.config, attention is not DENSE
        pattern = self._subject.pattern
        if attention.pattern is not None:
            pattern = describe(Sizes(pattern=attention.pattern), self._tiles(None), constructed=False)
        return {
            "suite": "prefill",
            "case": self._subject.name,
            "attention": attention.name,
            "pattern": pattern if is_sparse else None,
            "slash_granularity": attention.slash_granularity if is_sparse else None,
            "lists": self._lists if is_sparse else None,
            "length": length,
            "batch": 1,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "dtype": str(self._model.model.dtype),
            "linear": linear_of(self._model.model),
            "layers": config.num_layers,
            "model_layers": self._subject.model_layers,
            "chunk_size": self._chunk_size,
            "kv_cache": self._policy.name,
        }

    @property
    def _lists(self) -> str:
        if self._local_share is None:
            return self._subject.lists
        return f"a construction, {self._local_share:.0%} of slashes nearest, beside an estimate that chooses nothing"

    def _planned(self, attention: ChosenAttention, length: int) -> int | None:
        """Bytes that the compiler says a prefill takes; None = of a cache in host memory it says nothing."""
        if isinstance(self._policy, Host):
            return None
        how: dict[str, Any] = {"chunk_size": self._chunk_size, "kv_cache": self._policy, "pattern": attention.pattern}
        how |= {"attention": attention.name, "slash_granularity": attention.slash_granularity}
        how["implementation"] = None if attention is DENSE else self._implementation
        return max(program.total_bytes for program in compile_ahead(self._model, [length], **how))

    def _tiles(self, implementation: str | None) -> Any:
        """The tile sizes of sparse attention by an implementation."""
        entry, tiles = self._model.sparse_on_device(implementation)
        decoder = self._model.model
        return tiles or entry.tiles(
            device_of(decoder.embed.embedding[...]), self._model.config.head_dim, decoder.dtype.itemsize
        )

    def _record(
        self, attention: ChosenAttention, length: int, sides: dict[str, _Side], linear: _Side | None
    ) -> dict[str, Any]:
        side, config = sides[attention.name], self._model.config
        ms = _median_ms(side)
        is_part = config.num_layers < self._subject.model_layers
        measured = {
            **self._described(attention, length),
            "implementation": side.timer.implementation,
            "density": side.facts["density"],
            "ms": ms,
            "ms_spread": [1e3 * min(side.timer.seconds), 1e3 * max(side.timer.seconds)],
            "extrapolated_ms": ms * self._subject.model_layers / config.num_layers if is_part else None,
            "tokens_per_second": 1e3 * length / ms,
            "compile_ms": None if side.timer.compile_seconds is None else 1e3 * side.timer.compile_seconds,
            "linear_ms": None if linear is None else _median_ms(linear),
            "cache_ms": side.facts.get("cache"),
            "estimate_ms": side.facts.get("mass"),
            "index_ms": side.facts.get("index"),
            "kernel_ms": side.facts.get("kernel"),
            "decode_ms": side.facts.get("decode"),
            "peak_bytes": side.meter.peak_bytes,
            "planned_bytes": self._planned(attention, length),
            "host_peak_bytes": side.meter.host_peak_bytes,
            "host_peak_of": side.meter.host_peak_of,
            "joules": side.facts.get("joules"),
        }
        if attention is DENSE:
            return record(**measured)
        if attention.name != "auto":
            measured["tiles"] = "x".join(map(str, dataclasses.astuple(self._tiles(side.timer.implementation))))
        dense = sides.get(DENSE.name)
        if dense is not None:
            baseline_ms = _median_ms(dense)
            name = f"dense, {dense.timer.implementation}"
            measured |= {"baseline": name, "baseline_ms": baseline_ms, "ratio": ms / baseline_ms}
        return record(**measured)


def _median_ms(side: _Side) -> float:
    return 1e3 * statistics.median(side.timer.seconds)


def _median_token_ms(tokens: Iterator[np.ndarray]) -> float:
    """Median milliseconds of a token, without the first two: one is there already, the next compiles and warms."""
    next(tokens), next(tokens)
    seconds, before = [], time.perf_counter()
    for _ in tokens:
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    return 1e3 * statistics.median(seconds)


def _run(side: _Side) -> None:
    with side.meter.running(), memory_for("it"):
        side.timer.run()
    side.timer.take()


def _add_joules(side: _Side) -> None:
    """Joules of one prefill: of the timed ones where they are long enough for the counter, else of a row of others."""
    if None in side.meter.joules:
        return
    if min(side.timer.seconds) >= LEAST_SECONDS:
        side.facts["joules"] = statistics.fmean(side.meter.joules)  # type: ignore[arg-type]
        return
    count = 0
    row = Meter(side.meter.read_joules)
    with row.running():
        end = time.perf_counter() + 2 * LEAST_SECONDS
        while time.perf_counter() < end:
            side.timer.run_untimed()
            side.timer.take()
            count += 1
    side.facts["joules"] = row.joules[0] / count  # type: ignore[operator]
