"""MInference prefill in JAX: sparse attention for long prompts."""
