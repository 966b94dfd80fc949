"""A model, its tokenizer and its patterns: reads prompts with a chosen attention and answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from minference_jax.cache import AnyPolicy, Host, KVCache, extend_cache, policy_of
from minference_jax.generate.attend import choose_attend, pays_from, resolve_auto
from minference_jax.generate.chunks import check_chunks, prefill_in_chunks
from minference_jax.generate.decoding import Completion, decode_tokens, read_on
from minference_jax.generate.offloaded import prefill_to_host
from minference_jax.generate.programs import PrefillResult, Scores, prefill, read_more, score_tokens
from minference_jax.generate.prompts import Tokens, bucket_length, check_more, check_room, pad_prompts, stop_token_ids
from minference_jax.generate.sampling import check_answer
from minference_jax.generate.streaming import TextPieces, decode_text, text_pieces
from minference_jax.implementations import Implementation, device_of, first_sparse, memory_for
from minference_jax.index import SlashGranularity
from minference_jax.kernels.tiles import TileConfig
from minference_jax.models import Attend, Decoder, dense_attend
from minference_jax.patterns import HeadPattern, ModelPatterns, PatternArrays, uniform_patterns
from minference_jax.tile_table import TileTable


class LanguageModel:
    """A model with what it needs to read and write text.

    Args:
        model: one of `minference_jax.models`.
        tokenizer: of transformers; None = prompts and answers are token ids only.
        patterns: of every head, for attention="minference"; None = the documented default pattern for every head.
        stop_tokens: ids that end an answer; None = the tokenizer's end-of-sequence token.
        tiles: measured tile sizes; None, and for a device that they do not hold, those that suit it by rule.

    Raises:
        ValueError: patterns for another number of layers or heads.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any = None,
        patterns: ModelPatterns | None = None,
        *,
        stop_tokens: Sequence[int] | None = None,
        tiles: TileTable | None = None,
    ):
        self.config = model.config
        self.tokenizer = tokenizer
        self.patterns = patterns or uniform_patterns(self.config.num_layers, self.config.num_heads)
        self.patterns.check(self.config.num_layers, self.config.num_heads)
        if stop_tokens is None:
            end = getattr(tokenizer, "eos_token_id", None)
            stop_tokens = () if end is None else (end,)
        self.stop_tokens = frozenset(int(token) for token in stop_tokens)
        self.tiles = tiles or TileTable()
        self._graph, self._state = nnx.split(model)

    @property
    def model(self) -> Decoder:
        """The model itself; its parameters are shared, not copied."""
        return nnx.merge(self._graph, self._state)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds to one.

        Raises:
            ValueError: the model has no tokenizer.
        """
        return list(self._need_tokenizer().encode(text))

    def encode_chat(self, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's chat template, ready for the model's answer.

        Args:
            messages: {"role": ..., "content": ...} in order, or the text of a single user's message.

        Raises:
            ValueError: the model has no tokenizer, or that has no chat template.
        """
        tokenizer = self._need_tokenizer()
        if not tokenizer.chat_template:
            raise ValueError("the model's tokenizer has no chat template: use encode for plain text")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))

    def prefill(
        self,
        prompts: Tokens | Sequence[Tokens],
        *,
        attention: str = "minference",
        pattern: HeadPattern | ModelPatterns | None = None,
        slash_granularity: SlashGranularity = "line",
        implementation: str | None = None,
        chunk_size: int | None = None,
        kv_cache: str | AnyPolicy = "plain",
    ) -> PrefillResult:
        """Reads prompts, all at once or in chunks.

        One program is compiled per batch size, bucket of lengths, kind of attention, cache policy and chunk size.

        Args:
            prompts: token ids of one prompt, or of several of any lengths.
            attention: "minference" (every head by its pattern), "auto" (the same where the prompt is so long that it
                pays, and "dense" where it is not), "dense", or one pattern for every head: "a_shape",
                "vertical_slash", "block_sparse".
            pattern: the sizes of that one pattern; for "minference" the patterns to use, None = the model's.
            slash_granularity: what vertical-slash heads keep: "line", single distances as published, or "block", whole
                block diagonals.
            implementation: of the attention; None = the first that can do the call.
            chunk_size: tokens read at a time, a multiple of 128: activations take the memory of a chunk, and each chunk
                keeps what its own last queries ask for. None = all; so, too, where no prompt is longer than a chunk.
            kv_cache: what is kept of the keys and values: "plain", "int8", "fp8", "host", "snapkv", "pyramidkv",
                "streaming_llm", or one of the policies of `minference_jax.cache` with its sizes. The prompt itself is
                read with exact ones; in chunks each chunk is, and those before it are read as they are kept.

        Raises:
            ValueError: an empty prompt, one longer than the model can read, ids that are not its tokens, an unknown
                attention, implementation or policy, a pattern that does not fit, another `chunk_size`, chunks with
                another policy than "plain", "int8" and "fp8".
            NotImplementedError: the named implementation can't do the call; no host memory for "host".
            MemoryError: the device has too little.
        """
        tokens, lengths = pad_prompts(prompts, vocab_size=self.config.vocab_size, max_length=self.config.max_length)
        policy = policy_of(kv_cache)
        check_chunks(chunk_size, policy)
        whole = chunk_size is None or lengths.max() <= chunk_size
        attend, arrays = self.choose(tokens.shape[1], attention, pattern, slash_granularity, implementation, whole)
        with memory_for(f"a prefill of {len(tokens)} x {tokens.shape[1]} tokens"):
            if chunk_size is not None and not whole:
                chunks: Any = (chunk_size, policy)
                return prefill_in_chunks(self._graph, self._state, tokens, lengths, arrays, attend, *chunks)
            if isinstance(policy, Host):
                return prefill_to_host(self._graph, self._state, tokens, lengths, arrays, attend)
            return prefill(self._graph, self._state, tokens, lengths, arrays, attend, policy)

    def score(
        self,
        prompt: Tokens,
        *,
        attention: str = "minference",
        pattern: HeadPattern | ModelPatterns | None = None,
        slash_granularity: SlashGranularity = "line",
        implementation: str | None = None,
    ) -> Scores:
        """How likely each token of a prompt is after those before it, all read at once with the chosen attention.

        Args:
            prompt: token ids of one prompt, at least two.
            attention, pattern, slash_granularity, implementation: as in `prefill`.

        Raises:
            ValueError, NotImplementedError, MemoryError: as in `prefill`; a prompt of one token.
        """
        tokens, lengths = pad_prompts([prompt], vocab_size=self.config.vocab_size, max_length=self.config.max_length)
        if lengths[0] < 2:
            raise ValueError("a prompt of one token has no token after another: score needs at least two")
        attend, arrays = self.choose(tokens.shape[1], attention, pattern, slash_granularity, implementation)
        with memory_for(f"a prefill of 1 x {tokens.shape[1]} tokens"):
            found = score_tokens(self._graph, self._state, tokens, lengths, arrays, attend)
        log_probs, greedy = (np.asarray(x[0, : lengths[0] - 1]) for x in found[:2])
        return Scores(log_probs, greedy, None if found[2] is None else np.asarray(found[2][:, 0]))

    def extend(
        self,
        prefilled: PrefillResult,
        tokens: Tokens | Sequence[Tokens],
        *,
        attention: str = "dense",
        pattern: HeadPattern | ModelPatterns | None = None,
        slash_granularity: SlashGranularity = "line",
        implementation: str | None = None,
    ) -> PrefillResult:
        """Reads more tokens after a prefill's, such as each of several questions or a further document.

        Args:
            prefilled: from `prefill`, `extend` or `load_prefill`; it stays usable.
            tokens: token ids for its one row, or one list of ids for each of its rows.
            attention, pattern, slash_granularity, implementation: as in `prefill`, over the cache; "auto" goes by the
                tokens of both. What sparse heads keep is estimated from the last of the new tokens. Behind another
                cache than the plain one, sparse attention and a named implementation have one layer of it at a time
                written out in the model's dtype.

        Returns:
            Logits after the last of the tokens; the longer cache, of what is not plain a `SplitCache` whose tail has
            the new tokens; the density of reading them, or where that was dense the density of `prefilled`.

        Raises:
            ValueError: ids that are not the model's tokens, another number of rows, too little room, a row that would
                grow past the length at which longrope changes, an attention or pattern that `prefill` refuses, or
                sparse attention or a named implementation behind a cache that has left out tokens.
            NotImplementedError: the named implementation can't do the call.
            MemoryError: the device has too little.
        """
        padded, counts = pad_prompts(tokens, vocab_size=self.config.vocab_size, max_length=self.config.max_length)
        lengths = np.asarray(prefilled.cache.length)
        if len(lengths) != len(padded):
            raise ValueError(f"tokens of {len(padded)} rows do not go on from a prefill of {len(lengths)}")
        for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
            check_more(self.config, length, count)
        capacity = max(prefilled.cache.capacity, bucket_length(int(lengths.max()) + padded.shape[1]))
        attend, arrays = self.choose(capacity, attention, pattern, slash_granularity, implementation, False)
        with memory_for(f"reading {padded.shape[1]} tokens after {lengths.max()}"):
            if not isinstance(prefilled.cache, KVCache):
                attend = dense_attend if arrays is None and implementation is None else attend
                return read_on(self._graph, self._state, prefilled, padded, counts, arrays, attend)
            cache = extend_cache(prefilled.cache, capacity)
            read = read_more(self._graph, self._state, padded, counts, cache, arrays, attend)
            return read if arrays is not None else read._replace(density=prefilled.density)

    def choose(
        self,
        length: int,
        attention: str,
        pattern: HeadPattern | ModelPatterns | None,
        slash_granularity: SlashGranularity,
        implementation: str | None,
        whole_prompt: bool = True,
    ) -> tuple[Attend, PatternArrays | None]:
        """`choose_attend` for a prefill of so many padded tokens by this model; other arguments as in `prefill`."""
        tiles = None
        if attention != "dense":
            sparse, tiles = self.sparse_on_device(implementation)
        if attention == "auto":
            attention, pattern = resolve_auto(pattern, patterns=self.patterns, length=length, implementation=sparse)
        how: dict[str, Any] = {"slash_granularity": slash_granularity, "implementation": implementation, "tiles": tiles}
        return choose_attend(attention, pattern, patterns=self.patterns, **how, whole_prompt=whole_prompt)

    def sparse_on_device(self, implementation: str | None) -> tuple[Implementation, TileConfig | None]:
        """What computes sparse attention here and its measured tiles, None = by rule; raises as `prefill`."""
        device, dtype = device_of(*jax.tree.leaves(self._state)[:1]), self.model.dtype
        sparse = first_sparse(implementation, device, self.config.head_dim, dtype.itemsize)
        return sparse, self.tiles.find(device, sparse.name, self.config.head_dim, str(dtype))

    def pays_from(
        self, pattern: HeadPattern | ModelPatterns | None = None, *, implementation: str | None = None
    ) -> int | None:
        """Tokens of a prompt from which sparse prefill is expected to be faster than dense here, by a rule of thumb.

        Args:
            pattern: of every head; None = the model's own patterns.
            implementation: as in `prefill`.

        Returns:
            None where half of the heads or more are dense: the rule then expects it at no length.

        Raises:
            ValueError, NotImplementedError: as in `prefill`.
        """
        sparse, _ = self.sparse_on_device(implementation)
        if pattern is not None and not isinstance(pattern, ModelPatterns):
            pattern = uniform_patterns(self.config.num_layers, self.config.num_heads, pattern)
        return pays_from(pattern or self.patterns, sparse)

    def decode(
        self,
        prefilled: PrefillResult,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        key: jax.Array | None = None,
    ) -> Iterator[np.ndarray]:
        """Yields the next token of every row, int32 [B], max_new_tokens times, with dense attention over what is kept.

        Args:
            prefilled: from `prefill`; it stays usable.
            max_new_tokens: how many tokens to make.
            temperature, top_p: how tokens are drawn; temperature 0 = the likeliest.
            key: of jax.random, where tokens are drawn; not to be used for anything else.

        Raises:
            ValueError: options out of range, a missing key, more tokens than the model has positions for, or a row that
                would grow past the length at which longrope changes. At the call, not at the first token.
            MemoryError: the device has too little, at a token.
        """
        sampling = check_answer(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, key=key)
        lengths = np.asarray(prefilled.cache.length).tolist()
        self.check_room(lengths, max_new_tokens)
        return decode_tokens(self._graph, self._state, prefilled, max(lengths), max_new_tokens, sampling, key)

    def check_room(self, lengths: Sequence[int], max_new_tokens: int) -> None:
        """Whether prompts and their answers have room, as `decode` asks after they were read.

        Args:
            lengths: tokens of each prompt.
            max_new_tokens: most tokens of an answer.

        Raises:
            ValueError: there are fewer positions, or a row would grow past the length at which longrope changes: its
                cache is turned by the factors of shorter rows.
        """
        check_room(self.config, lengths, max_new_tokens)

    def complete(
        self, prefilled: PrefillResult, *, stop_tokens: Sequence[int] | None = None, **options: Any
    ) -> list[Completion]:
        """The answer of every row, up to a stop token or max_new_tokens.

        Args:
            prefilled: from `prefill`; it stays usable.
            stop_tokens: ids that end an answer; None = the model's.
            options: of `decode`: max_new_tokens, temperature, top_p, key.

        Raises:
            ValueError: as in `decode`.
        """
        stops = self.stop_tokens if stop_tokens is None else stop_token_ids(stop_tokens)
        rows: list[list[int]] = [[] for _ in range(prefilled.logits.shape[0])]
        stopped = [False] * len(rows)
        for tokens in self.decode(prefilled, **options):
            for index, token in enumerate(tokens.tolist()):
                stopped[index] = stopped[index] or token in stops
                if not stopped[index]:
                    rows[index].append(token)
            if all(stopped):
                break
        return [self._completion(row, end) for row, end in zip(rows, stopped, strict=True)]

    def stream(
        self, prefilled: PrefillResult, *, stop_tokens: Sequence[int] | None = None, **options: Any
    ) -> Iterator[str]:
        """Yields the answer to a single prompt as text, piece by piece, each of whole characters.

        Args:
            prefilled, stop_tokens, options: as in `complete`.

        Raises:
            ValueError: as in `decode`; several rows; the model has no tokenizer. At the call, not at the first piece.
        """
        if prefilled.logits.shape[0] != 1:
            raise ValueError(f"stream takes a single prompt, got a batch of {prefilled.logits.shape[0]}")
        stops = self.stop_tokens if stop_tokens is None else stop_token_ids(stop_tokens)
        return text_pieces(TextPieces(self._need_tokenizer()), self.decode(prefilled, **options), stops)

    def generate(
        self,
        prompts: str | Sequence[str] | Tokens | Sequence[Tokens],
        *,
        attention: str = "minference",
        pattern: HeadPattern | ModelPatterns | None = None,
        slash_granularity: SlashGranularity = "line",
        implementation: str | None = None,
        chunk_size: int | None = None,
        kv_cache: str | AnyPolicy = "plain",
        **options: Any,
    ) -> list[Completion]:
        """Reads prompts and answers each: `prefill`, then `complete`.

        Args:
            prompts: one or several, each a text (encoded as by `encode`) or token ids.
            attention, pattern, slash_granularity, implementation, chunk_size, kv_cache: as in `prefill`.
            options: of `complete`: max_new_tokens, temperature, top_p, key, stop_tokens.

        Raises:
            ValueError, NotImplementedError, MemoryError: as in `prefill` and `decode`.
        """
        tokens: Any = [prompts] if isinstance(prompts, str) else prompts
        texts = [isinstance(prompt, str) for prompt in tokens]
        if any(texts):
            if not all(texts):
                raise ValueError("prompts must be all texts or all token ids, got both")
            if "" in tokens:
                raise ValueError(f"prompt {tokens.index('')} is empty")
            tokens = [self.encode(text) for text in tokens]
        _, lengths = pad_prompts(tokens, vocab_size=self.config.vocab_size, max_length=self.config.max_length)
        answer = {name: value for name, value in options.items() if name != "stop_tokens"}
        stops = options.get("stop_tokens")
        stop_token_ids(() if stops is None else stops)  # as in `decode` and `complete`, but before minutes of reading
        check_answer(**answer)
        self.check_room(lengths.tolist(), answer["max_new_tokens"])
        how: dict[str, Any] = {"slash_granularity": slash_granularity, "implementation": implementation}
        how |= {"chunk_size": chunk_size, "kv_cache": kv_cache}
        prefilled = self.prefill(tokens, attention=attention, pattern=pattern, **how)
        return self.complete(prefilled, **options)

    def _completion(self, tokens: list[int], stopped: bool) -> Completion:
        text = None if self.tokenizer is None else decode_text(self.tokenizer, tokens)
        return Completion(tokens=tuple(tokens), text=text, finish_reason="stop" if stopped else "length")

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer: give token ids, and read answers with complete or decode")
        return self.tokenizer
