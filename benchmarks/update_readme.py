"""Writes the tables of README.md from the records in benchmarks/results."""

from pathlib import Path

from minference_jax.bench.records import attention_table, read, with_results

ROOT = Path(__file__).parent.parent


def updated() -> str:
    """The README as it should be."""
    results = ROOT / "benchmarks" / "results" / "attention.jsonl"
    return with_results((ROOT / "README.md").read_text(), [attention_table(read(results))])


if __name__ == "__main__":
    (ROOT / "README.md").write_text(updated())
