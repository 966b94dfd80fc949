"""Contents of small pattern files in both formats."""

import json

from minference_jax.patterns import AShape, BlockSparse, Dense, VerticalSlash

SMALL = [  # in the published format
    {"0": ["vertical_and_slash", 30, 800, 0.5], "1": ["stream_llm", 100, 800, 3]},
    {"1": ["block_sparse", 8, 1, 0.25]},
]
OURS = {
    "format": "minference-jax/patterns",
    "version": 1,
    "model": "tiny",
    "score": {"name": "recall", "direction": "higher_is_better"},
    "layers": [
        [{"kind": "vertical_slash", "vertical_size": 3, "slash_size": 4, "score": 0.5}, {"kind": "dense"}],
        [{"kind": "a_shape", "sink_size": 1, "window_size": 2}, {"kind": "block_sparse", "num_blocks": 7, "score": 1}],
    ],
}
EVERY_KIND = (  # what OURS says
    (VerticalSlash(vertical_size=3, slash_size=4), Dense()),
    (AShape(sink_size=1, window_size=2), BlockSparse(num_blocks=7)),
)


def saved(tmp_path, content):
    """A file of this text, or of this as JSON."""
    path = tmp_path / "patterns.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")  # a lone surrogate, too, which no text has
    return path
