"""The pattern files of the MInference release and the models that each is for. The files themselves are not here.

Source: the files' numbers of layers and heads, the release's own table of models, and the models' configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class PublishedFile(NamedTuple):
    """One file of the release and the models that it is for.

    Attributes:
        file: its name.
        model_types, num_layers, num_heads, vocab_size: what the configs of its models say.
        models: context (tokens, max_position_embeddings) -> ids of the models that have it; empty where a later file of
            the release is for the same models.
    """

    file: str
    model_types: tuple[str, ...]
    num_layers: int
    num_heads: int
    vocab_size: int
    models: Mapping[int, tuple[str, ...]]


_GLM, _LLAMA, _PHI3, _QWEN2 = ("glm", "chatglm"), ("llama",), ("phi3",), ("qwen2",)
_BEST = "kv_out_v32_fit_o_best_pattern"
_GRADIENT = "gradientai/Llama-3"

PUBLISHED = (
    PublishedFile(
        f"Llama_3_8B_Instruct_262k_{_BEST}.json",
        *(_LLAMA, 32, 32, 128_256),
        {
            262_144: (f"{_GRADIENT}-8B-Instruct-262k",),
            1_048_576: (f"{_GRADIENT}-8B-Instruct-Gradient-1048k",),
            4_194_304: (f"{_GRADIENT}-8B-Instruct-Gradient-4194k",),
        },
    ),
    PublishedFile(
        f"Llama_3_70B_Instruct_262k_{_BEST}.json",
        *(_LLAMA, 80, 64, 128_256),
        {
            262_144: (f"{_GRADIENT}-70B-Instruct-Gradient-262k",),
            524_288: (f"{_GRADIENT}-70B-Instruct-Gradient-524k",),
            1_048_576: (f"{_GRADIENT}-70B-Instruct-Gradient-1048k",),
        },
    ),
    PublishedFile(f"Llama_3.1_8B_Instruct_128k_{_BEST}.json", *(_LLAMA, 32, 32, 128_256), {}),
    PublishedFile(
        f"Llama_3.1_8B_Instruct_128k_{_BEST}_v2.json",
        *(_LLAMA, 32, 32, 128_256),
        {131_072: ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct")},
    ),
    PublishedFile(
        f"Llama_3.1_70B_Instruct_128k_{_BEST}_v2.json",
        *(_LLAMA, 80, 64, 128_256),
        {131_072: ("meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Meta-Llama-3.1-70B-Instruct")},
    ),
    PublishedFile(
        f"GLM_4_9B_1M_instruct_{_BEST}.json",
        *(_GLM, 40, 32, 151_552),
        {1_048_576: tuple(f"{org}/glm-4-9b-chat-1m{form}" for org in ("zai-org", "THUDM") for form in ("", "-hf"))},
    ),
    PublishedFile(f"Yi_9B_200k_{_BEST}.json", *(_LLAMA, 48, 32, 64_000), {262_144: ("01-ai/Yi-9B-200K",)}),
    PublishedFile(
        f"Phi_3_mini_128k_instruct_{_BEST}.json",
        *(_PHI3, 32, 32, 32_064),
        {131_072: ("microsoft/Phi-3-mini-128k-instruct",)},
    ),
    PublishedFile(
        f"Qwen2_7B_Instruct_128k_instruct_{_BEST}.json",
        *(_QWEN2, 28, 28, 152_064),
        {32_768: ("Qwen/Qwen2-7B-Instruct",)},
    ),
    PublishedFile(
        f"Qwen2.5_7B_Instruct_128k_instruct_{_BEST}.json",
        *(_QWEN2, 28, 28, 152_064),
        {32_768: ("Qwen/Qwen2.5-7B-Instruct",)},
    ),
    PublishedFile(
        f"Qwen2.5_32B_Instruct_128k_{_BEST}.json",
        *(_QWEN2, 64, 40, 152_064),
        {32_768: ("Qwen/Qwen2.5-32B-Instruct",)},
    ),
    PublishedFile(
        f"Qwen2.5_72B_Instruct_128k_{_BEST}.json",
        *(_QWEN2, 80, 64, 152_064),
        {32_768: ("Qwen/Qwen2.5-72B-Instruct",)},
    ),
    PublishedFile(
        "Qwen2.5_7B_Instruct_1M.json", *(_QWEN2, 28, 28, 152_064), {1_010_000: ("Qwen/Qwen2.5-7B-Instruct-1M",)}
    ),
    PublishedFile(
        "Qwen2.5_14B_Instruct_1M.json", *(_QWEN2, 48, 40, 152_064), {1_010_000: ("Qwen/Qwen2.5-14B-Instruct-1M",)}
    ),
)
