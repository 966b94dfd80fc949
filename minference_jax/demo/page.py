"""The page, in Gradio: what is where. What happens is in events."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from minference_jax.demo import views
from minference_jax.demo.events import Events
from minference_jax.demo.needle import Example
from minference_jax.demo.service import ATTENTIONS, Service
from minference_jax.measure import SIZES, ChosenAttention, default_sizes, takes_granularity

TITLE = "Dense and sparse prefill, side by side"
_INTRO = (
    "The same model reads one long text twice: with exact dense attention, and with MInference's sparse attention, "
    "which computes only what each head's pattern keeps. How much faster is it, and does the answer stay the same?"
)
_SIZE_LABELS = {
    "vertical_size": "vertical: keys that all queries see",
    "slash_size": "slash: distances that all queries see",
    "sink_size": "sink: first keys",
    "window_size": "window: nearest keys",
    "num_blocks": "blocks of 64 keys for every 64 queries",
}


class Inputs(NamedTuple):
    """Components that a visitor sets, in the order in which a request takes them."""

    model: Any
    text: Any
    question: Any
    attention: Any
    granularity: Any
    sizes: tuple[Any, ...]

    def flat(self) -> list[Any]:
        """All of them."""
        return [self.model, self.text, self.question, self.attention, self.granularity, *self.sizes]


def build_page(service: Service, attention: ChosenAttention, example: Example, device: str, folder: Path) -> Any:
    """The page, as gradio.Blocks that are not launched.

    Args:
        service: behind it.
        attention: to begin with.
        example: to begin with.
        device: that computes, in words.
        folder: where uploads lie.

    Raises:
        ImportError: there is no Gradio.
    """
    import gradio as gr

    def forget(visitor: str) -> None:
        page.state_holder.session_data.pop(visitor, None)
        page._queue.pending_messages_per_session.pop(visitor, None)

    def forget_silent() -> None:
        for visitor in list(page._queue.pending_messages_per_session):
            if service.visitors.is_silent(visitor):
                forget(visitor)

    events = Events(gr, service, folder, forget, forget_silent)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(30, 60), fill_width=False) as page:
        gr.HTML(_intro(service, device), padding=False)
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                inputs, example_inputs = _inputs(gr, service, attention, example)
                with gr.Row():
                    start = gr.Button("Run both", variant="primary", elem_id="run", min_width=120)
                    cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", interactive=False, min_width=120)
            with gr.Column(scale=6, min_width=300):
                status = gr.HTML(views.note(_ready(example)), elem_id="status", padding=False)
                numbers = gr.HTML(views.numbers(None, 0.0), elem_id="numbers", padding=False)
                answers = gr.HTML(views.answers(None), elem_id="answers", padding=False)
                with gr.Accordion("Details of the run", open=False, elem_id="details"):
                    details = gr.HTML(views.details(None, no_energy=service.counter.reason), padding=False)
        with gr.Row():
            with gr.Column(scale=5, min_width=300), gr.Accordion("Time against length", open=False, elem_id="history"):
                history = gr.HTML(
                    '<p class="hint">After a run of yours: it and those before it, since the demo began.</p>',
                    padding=False,
                )
            with gr.Column(scale=6, min_width=300), gr.Accordion("What is kept", open=False, elem_id="inspect"):
                place, inspect, kept = _inspection(gr)
        outputs = [status, start, cancel]
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        on_device = hidden | {"concurrency_limit": None, "trigger_mode": "once"}
        start.click(events.run, inputs.flat(), [*outputs, numbers, answers, details, history, kept], **on_device)
        inspect.click(events.inspect, [*inputs.flat(), *place], [*outputs, kept], **on_device)
        length, depth, make, upload = example_inputs
        texts = [inputs.text, inputs.question]
        one_at_a_time = on_device | {"concurrency_limit": 1}  # they are made beside a run
        make.click(events.example, [inputs.model, length, depth], [*outputs, *texts], **one_at_a_time)
        upload.upload(events.upload, upload, [status, inputs.text], concurrency_limit=2, **hidden)
        inputs.attention.change(events.attention, inputs.attention, [inputs.granularity, *inputs.sizes], **hidden)
        cancel.click(events.cancel, None, status, queue=False, **hidden)
        page.unload(events.leave)
    return page


def _intro(service: Service, device: str) -> str:
    most = f"up to {service.settings.max_prompt_tokens:,} tokens"
    where = f"Model: {', '.join(service.models.labels)} · Device: {device} · {most} · texts are not written to disk"
    return f'<div class="intro"><h1>{TITLE}</h1><p>{_INTRO}</p><p class="where">{escape(where)}</p></div>'


def _ready(example: Example) -> str:
    return f"Ready. The example has {example.tokens:,} tokens; the number {example.number} is hidden in it."


def _inputs(gr: Any, service: Service, attention: ChosenAttention, example: Example) -> tuple[Inputs, tuple[Any, ...]]:
    text = gr.Textbox(example.text, label="Text", lines=9, max_lines=9, elem_id="text")
    question = gr.Textbox(example.question, label="Question about the text", max_lines=3, elem_id="question")
    upload = gr.UploadButton("Upload txt, md or pdf", size="sm", elem_id="upload")  # the server says what it takes
    with gr.Accordion("Example with a hidden number", open=False, elem_id="example"):
        most = service.settings.max_prompt_tokens
        length = gr.Slider(min(256, most), most, example.length, step=1, label="tokens", buttons=[], elem_id="length")
        depth = gr.Slider(0, 1, 0.5, step=0.05, label="depth: 0 is the beginning", buttons=[], elem_id="depth")
        make = gr.Button("Take this example", size="sm", elem_id="make")
    with gr.Accordion("Model and attention", open=False, elem_id="attention"):
        labels = service.models.labels
        model = gr.Dropdown(labels, value=labels[0], label="Model", visible=len(labels) > 1, elem_id="model")
        name = gr.Dropdown(list(ATTENTIONS), value=attention.name, label="Sparse attention", elem_id="name")
        granularity = gr.Radio(
            ["line", "block"],
            value=attention.slash_granularity,
            label="slashes: single distances, or whole block diagonals",
            visible=takes_granularity(attention.name),
        )
        given = {} if attention.pattern is None else vars(attention.pattern)
        own = default_sizes(attention.name)
        sizes = tuple(
            gr.Number(given.get(size, _default(size)), label=_SIZE_LABELS[size], precision=0, visible=size in own)
            for size in SIZES
        )
    return Inputs(model, text, question, name, granularity, sizes), (length, depth, make, upload)


def _default(size: str) -> int:
    return next(sizes[size] for sizes in map(default_sizes, ATTENTIONS) if size in sizes)


def _inspection(gr: Any) -> tuple[list[Any], Any, Any]:
    gr.HTML(
        '<p class="hint">Reads the text again, layer by layer, and compares each head with dense attention. '
        "Shows the map of one head, and the passages that are left out. It takes longer than a run.</p>",
        padding=False,
    )
    with gr.Row():
        layer = gr.Number(0, label="layer", precision=0, min_width=80, elem_id="layer")
        head = gr.Number(0, label="head", precision=0, min_width=80, elem_id="head")
    button = gr.Button("Show what is kept", size="sm", elem_id="show")
    return [layer, head], button, gr.HTML("", elem_id="kept", padding=False)
