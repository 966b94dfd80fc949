"""The sizes that every decoder has."""

from __future__ import annotations

from dataclasses import dataclass, field

from minference_jax.models.rope import RopeConfig


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes that every decoder has; each family adds its switches.

    Attributes:
        vocab_size, hidden_size, intermediate_size: V, D and the MLP's inner features.
        num_layers, num_heads, num_kv_heads, head_dim: L, N, K, H; N is a multiple of K.
        rms_norm_eps: added to the mean square in the norms.
        max_position_embeddings: tokens the model was made for (before scaling where rope is dynamic).
        rope: position embedding.
        longest_prompt: most tokens of prompt and answer together, where something that the model does not do begins
            beyond, such as a sliding window; None = as many as there are positions.
        tie_embeddings: whether the logits use the embedding table instead of a matrix of their own.

    Raises:
        ValueError: a size that is not positive or sizes that do not fit each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig = field(default_factory=RopeConfig)
    longest_prompt: int | None = None
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        self.rope.rotary_dim(self.head_dim)
        if self.rms_norm_eps < 0:
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps} must not be negative")

    @property
    def max_length(self) -> int:
        """Tokens that prompt and answer may have together.

        They are max_position_embeddings, stretched where rope is dynamic, or yarn over a stated original context; and
        no more than longest_prompt.
        """
        rope, length = self.rope, self.max_position_embeddings
        if rope.rope_type == "dynamic":
            length = int(length * rope.given("factor"))
        elif rope.rope_type == "yarn" and rope.original_max_position_embeddings is not None:
            length = max(length, int(rope.original_max_position_embeddings * rope.given("factor")))
        return length if self.longest_prompt is None else min(length, self.longest_prompt)
