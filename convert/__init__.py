"""From Hugging Face folders and GGUF files to our checkpoints, and back into models."""
