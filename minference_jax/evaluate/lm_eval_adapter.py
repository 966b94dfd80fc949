"""A model as lm-eval (EleutherAI/lm-evaluation-harness) takes one: `MinferenceLM`, where lm-eval is installed.

from lm_eval import simple_evaluate
from minference_jax.evaluate.lm_eval_adapter import MinferenceLM
simple_evaluate(MinferenceLM(minference_jax.load(), Contender(name="minference")), tasks=["arc_easy"])

Its RULER tasks take their lengths and the tokenizer from metadata, which both parts of lm-eval must be given:

metadata = {"max_seq_lengths": [4096], "tokenizer": "path/to/hf_folder"}
simple_evaluate(model, tasks=["niah_single_1"], task_manager=TaskManager(metadata=metadata), metadata=metadata)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from minference_jax.evaluate.contenders import Contender, resolve
from minference_jax.generate import LanguageModel

_MAX_NEW_TOKENS = 256  # where a task says nothing: lm-eval's own default


def __getattr__(name: str) -> Any:
    if name != "MinferenceLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _adapter()


class _Methods:
    """What lm-eval asks of a model, over `LanguageModel`; one prompt at a time.

    Args:
        model: that reads and answers, with a tokenizer.
        contender: the attention that prompts are read with; None = dense.

    Attributes:
        densities: of every prompt read so far, each the mean over heads of the share of dense attention's work.

    Raises:
        ValueError: no tokenizer, or a contender that is to cost as much as another; later, a prompt that is too long,
            or a task that draws its answers at random.
    """

    def __init__(self, model: LanguageModel, contender: Contender | None = None):
        super().__init__()
        self._contender = Contender(name="dense", attention="dense") if contender is None else contender
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer, so it can't read the tasks of lm-eval")
        if self._contender.equal_cost_to is not None:
            raise ValueError(f"{self._contender.name} is to cost as much as another, and lm-eval asks one alone")
        self._model = model
        self.tokenizer = model.tokenizer
        self.densities: list[float] = []

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else min(self._model.stop_tokens)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context starts after."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of prompts."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text in the model's chat template."""
        more = {} if add_generation_prompt else {"continue_final_message": True}
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, **more
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Token ids; None = with the tokenizer's own first tokens, unless the text has them, as in a chat template."""
        if add_special_tokens is None:
            first = self.tokenizer.bos_token
            add_special_tokens = first is None or not string.startswith(first)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        return [self._likelihood(context, continuation) for _, context, continuation in requests]

    def _likelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Of a continuation, read together with its context in one prefill."""
        tokens = [*context, *continuation]
        scores = self._model.score(tokens, **resolve(self._contender, self._model, len(tokens), {}))
        self.densities.append(1.0 if scores.density is None else float(np.mean(scores.density)))
        count = len(continuation)
        return float(scores.log_probs[-count:].astype(np.float64).sum()), bool(scores.greedy[-count:].all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context where they are longer."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._model.config.max_length - 1,
                context_len=1,
            )
            found.append(sum(self._likelihood(*make_disjoint_window(window))[0] for window in windows))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each up to the first of the task's stop texts."""
        return [self._answer(*request.args) for request in requests]

    def _answer(self, text: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise ValueError("answers are greedy, and a task asks for answers drawn at random (do_sample)")
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        tokens = self.tok_encode(text)
        most = options.get("max_gen_toks", _MAX_NEW_TOKENS)
        self._model.check_room([len(tokens)], most)
        read = self._model.prefill(tokens, **resolve(self._contender, self._model, len(tokens), {}))
        self.densities.append(1.0 if read.density is None else float(np.mean(read.density)))
        said = ""
        for piece in self._model.stream(read, max_new_tokens=most):
            said += piece
            if any(stop in said for stop in stops):
                break
        places = [said.find(stop) for stop in stops if stop in said]
        return said[: min(places)] if places else said


@cache
def _adapter() -> type:
    """The class, made once.

    Raises:
        ImportError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise ImportError("MinferenceLM needs lm-eval: pip install 'minference-jax[lm-eval]'") from error
    return type("MinferenceLM", (_Methods, TemplateLM), {"__doc__": _Methods.__doc__, "__module__": __name__})
