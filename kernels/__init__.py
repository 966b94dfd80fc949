"""Array kernels and the integer layouts they read: jax only, nothing of patterns, models or files."""
