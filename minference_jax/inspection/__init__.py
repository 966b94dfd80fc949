"""What sparse attention keeps and leaves out on a given prompt, head by head.

inspection: the figures of every head, over passages (what the last queries can't read) and maps (attention of a
head with the kept set); pictures: both drawn.
"""

from minference_jax.inspection.inspection import Inspection, inspect_attention
from minference_jax.inspection.maps import HeadMap
from minference_jax.inspection.passages import Passage, Passages

__all__ = ["HeadMap", "Inspection", "Passage", "Passages", "inspect_attention"]
