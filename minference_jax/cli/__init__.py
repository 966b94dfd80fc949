"""The command line, `minference-jax`. Importing it and its --help import nothing heavy."""

from minference_jax.cli.entry import main

__all__ = ["main"]
