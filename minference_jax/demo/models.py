"""The models that the operator lists, one of them in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path

from minference_jax.convert.default_model import MODEL_NAME
from minference_jax.demo.settings import Refused
from minference_jax.generate import LanguageModel


class Models:
    """What visitors may choose from. They name a model by its label; nothing that they send is a path or a hub id.

    Args:
        sources: by label, in order: what `load` takes.
        loader: loads one.
    """

    def __init__(self, sources: Mapping[str, str | None], loader: Callable[[str | None], LanguageModel]):
        self._sources, self._loader = dict(sources), loader
        self._label = ""
        self._model: LanguageModel | None = None

    @property
    def labels(self) -> list[str]:
        """Of all models, the first is the one to begin with."""
        return list(self._sources)

    def in_memory(self, label: str) -> LanguageModel | None:
        """The model where it is loaded; None where another one is."""
        return self._model if label == self._label else None

    def get(self, label: str) -> LanguageModel:
        """The model; what was loaded before is dropped first. To be called on the device's thread only.

        Raises:
            Refused: no such label.
            ValueError, OSError, MemoryError: as `load`; a model without a tokenizer.
        """
        if label not in self._sources:
            raise Refused("There is no such model here.")
        if self._model is None or label != self._label:
            self._label, self._model = "", None
            gc.collect()  # its arrays, before the next one's
            model = self._loader(self._sources[label])
            if model.tokenizer is None:
                raise ValueError(f"{label} has no tokenizer files, so it can't read text")
            self._label, self._model = label, model
        return self._model


def labels_of(sources: list[str]) -> dict[str, str | None]:
    """Labels for what the operator lists: of a path the last part only, since visitors see it.

    Args:
        sources: what `load` takes; none = the default model.

    Raises:
        ValueError: two have the same label.
    """
    if not sources:
        return {MODEL_NAME: None}
    labels = [Path(source).name or source for source in sources]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ValueError(f"two models are called {twice}: give folders of other names")
    return dict(zip(labels, sources, strict=True))
