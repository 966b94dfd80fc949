"""What a job does on the device to show what a head keeps, and what the model leaves out."""

from __future__ import annotations

from dataclasses import dataclass

from minference_jax.demo.jobs import Job
from minference_jax.demo.plots import head_picture
from minference_jax.demo.settings import Refused, Settings
from minference_jax.generate import LanguageModel, bucket_length
from minference_jax.generate.streaming import decode_text
from minference_jax.inspection import inspect_attention
from minference_jax.measure import ChosenAttention, Prompt

_PASSAGES = 8
_EXCERPT = 160  # characters of a passage
_PIXELS = 384  # along a side of the map


@dataclass(frozen=True)
class LeftOut:
    """A passage that is left out: tokens from `start` to before `end`; see `inspection.Passage`."""

    start: int
    end: int
    lost: float
    heads_reading: int
    text: str


@dataclass(frozen=True)
class InspectState:
    """An inspection so far.

    Attributes:
        layer, head: whose map.
        step: what happens now.
        picture: the map as a data URI; empty before the end.
        left_out: those that lose most, first.
        num_heads: of the whole model.
    """

    layer: int
    head: int
    step: str = ""
    picture: str = ""
    left_out: tuple[LeftOut, ...] = ()
    num_heads: int = 0


def run_inspection(
    job: Job,
    model: LanguageModel,
    prompt: Prompt,
    attention: ChosenAttention,
    place: tuple[int, int],
    settings: Settings,
) -> InspectState:
    """Reads the prompt layer by layer; tells each through `job.state`.

    Args:
        job: of which this is the work.
        model, prompt, attention, settings: as in `run_comparison`.
        place: layer and head.

    Raises:
        Cancelled: between two layers.
        Refused: no such layer or head; `auto` takes dense attention.
        ValueError, NotImplementedError, MemoryError: as in `inspect_attention`.
    """
    layer, head = place
    layers, heads = model.config.num_layers, model.config.num_heads
    if not (0 <= layer < layers and 0 <= head < heads):
        raise Refused(f"The model has layers 0 to {layers - 1} with heads 0 to {heads - 1}.")
    if attention.name == "auto":
        least = model.pays_from(implementation=settings.implementation)
        if least is None or bucket_length(len(prompt.tokens)) < least:
            raise Refused("At this length auto takes dense attention, which leaves nothing out: choose another one.")
    job.state = InspectState(layer, head)

    def progress(done: int, total: int, name: str) -> None:
        job.check()
        job.state = InspectState(layer, head, step=f"looking at the heads of layer {min(done + 1, total)} of {total}")

    found = inspect_attention(
        model,
        prompt.tokens,
        pattern=attention.pattern,
        slash_granularity=attention.slash_granularity,
        implementation=settings.implementation,
        maps=[place],
        map_pixels=_PIXELS,
        progress=progress,
    )
    passages = tuple(
        LeftOut(one.start, one.end, one.lost, one.heads_reading, _excerpt(model, prompt.tokens[one.start : one.end]))
        for one in found.passages.left_out(count=_PASSAGES)
    )
    job.state = InspectState(
        layer, head, picture=head_picture(found, layer, head), left_out=passages, num_heads=layers * heads
    )
    return job.state


def _excerpt(model: LanguageModel, tokens: list[int]) -> str:
    text = " ".join(decode_text(model.tokenizer, tokens).split())
    return text if len(text) <= _EXCERPT else f"{text[:_EXCERPT].rstrip()} ..."
