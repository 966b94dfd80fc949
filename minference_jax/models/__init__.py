"""Flax NNX models. A model is told how to attend and knows nothing of sparsity, checkpoints or prompts."""
