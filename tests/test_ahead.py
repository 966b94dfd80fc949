"""Programs compiled ahead of time: later calls find them, wherever they come from, and their memory is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from small_models import CONTEXT, NUM_HEADS, write_model

from minference_jax import AShape, compile_ahead, load, use_compilation_cache
from minference_jax.cli import main
from minference_jax.kernels import mass_triton

A_SHAPE = {"attention": "a_shape", "pattern": AShape(sink_size=4, window_size=40)}
OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
    "jax_traceback_in_locations_limit",
)


@pytest.fixture(autouse=True)
def _options_as_they_were():
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax.clear_caches()  # what this process has compiled before would not be written
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_model(tmp_path_factory.mktemp("model")))


def kept(folder):
    """Names of the big programs that are kept."""
    programs = {path.name for path in folder.iterdir() if path.name.endswith("-cache")}
    return {name for name in programs if name.startswith(("jit_prefill", "jit__read_chunk", "jit_read_token"))}


def test_later_calls_find_what_was_compiled_ahead(model, tmp_path):
    folder = use_compilation_cache(tmp_path / "programs")
    whole = list(compile_ahead(model, [100, 120, 300], max_new_tokens=30, **A_SHAPE))
    parts = list(compile_ahead(model, [300], chunk_size=128, **A_SHAPE))
    assert [(one.name, one.length) for one in whole] == [
        ("prefill", 128),
        ("prefill", 320),
        ("decode", 256),
        ("decode", 448),
    ]
    assert [(one.name, one.batch, one.length) for one in parts] == [("chunk", 1, 320)]
    before = kept(folder)
    assert len(before) == 5
    jax.clear_caches()
    for prompt in ([1] * 120, [1] * 300):
        read = model.prefill(prompt, **A_SHAPE)
        model.complete(read, max_new_tokens=30, stop_tokens=[])
    model.prefill([1] * 290, chunk_size=128, **A_SHAPE)
    assert kept(folder) == before


def test_the_memory_told_is_that_of_weights_cache_and_more_for_longer_prompts(model):
    short, long = (next(compile_ahead(model, [length], batch=2, **A_SHAPE)) for length in (128, 512))
    leaves = jax.tree.leaves(model.prefill([[1] * 512] * 2, **A_SHAPE).cache)
    cache, weights = (sum(x.nbytes for x in arrays) for arrays in (leaves, jax.tree.leaves(model.model)))
    assert cache <= long.output_bytes <= cache + 10_000
    assert weights <= long.argument_bytes <= weights + 10_000
    assert long.total_bytes == long.argument_bytes + long.output_bytes + long.temporary_bytes
    assert short.temporary_bytes < long.temporary_bytes


@pytest.mark.parametrize(
    ("given", "options", "sentence"),
    [
        ([], {}, r"lengths=\[\] must be one or more"),
        ([0], {}, r"lengths=\[0\] must be one or more"),
        ([10.0], {}, r"lengths=\[10.0\], batch=1 and max_new_tokens=0 must be integers"),
        ([10], {"batch": 1.5}, "batch=1.5 and"),
        ([10], {"batch": 0}, "batch=0 must be at least 1"),
        ([10], {"max_new_tokens": -1}, "max_new_tokens=-1 at least 0"),
        ([CONTEXT], {"max_new_tokens": 1}, f"a prompt of {CONTEXT} tokens and max_new_tokens=1 need"),
        ([10], {"chunk_size": 100}, "chunk_size=100 must be None or a multiple of 128"),
        ([10], {"attention": "all"}, "'all'"),
    ],
)
def test_what_can_not_be_compiled_is_refused_before_anything_is(model, given, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        compile_ahead(model, given, **options)


def test_what_xla_chose_for_single_products_is_kept_too(tmp_path):
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    use_compilation_cache(tmp_path)
    assert "autotune_cache" in jax.config.jax_persistent_cache_enable_xla_caches


def test_a_gpu_kernel_is_the_same_program_wherever_it_is_called(tmp_path):
    use_compilation_cache(tmp_path)
    q, k = (jax.ShapeDtypeStruct((1, length, heads, 64), jnp.bfloat16) for length, heads in ((64, NUM_HEADS), (512, 2)))
    positions = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def here(q, k, positions):
        return mass_triton.attention_mass(q, k, positions, scale=0.1)

    def elsewhere(q, k, positions):
        # a line more
        return mass_triton.attention_mass(q, k, positions, scale=0.1)

    texts = []
    for call in (here, elsewhere):
        call.__name__ = "call"
        texts.append(jax.jit(call).trace(q, k, positions).lower(lowering_platforms=("cuda",)).as_text())
        jax.clear_caches()
    assert "triton" in texts[0]
    assert texts[0] == texts[1]


def test_the_command_compiles_into_the_folder_and_prints_memory(tmp_path, capsys):
    folder, at = write_model(tmp_path / "model"), tmp_path / "programs"
    options = ["--lengths", "100", "--max-new-tokens", "4", "--attention", "dense"]
    assert main(["compile", "--model", str(folder), *options, "--compilation-cache", str(at)]) == 0
    heading, prefill, decode, last = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["program", "batch", "tokens", "seconds"]
    assert (prefill.split()[:3], decode.split()[:3]) == (["prefill", "1", "128"], ["decode", "1", "256"])
    sizes = [float(size) for size in prefill.split()[4:]]
    np.testing.assert_allclose(sizes[3], sum(sizes[:3]), atol=0.002)
    assert last == f"kept in {at}"
    before = kept(at)
    assert len(before) == 2
    asked = ["--prompt", "hello " * 12, "--no-chat-template", "--max-new-tokens", "4", "--attention", "dense"]
    jax.clear_caches()
    assert main(["generate", "--model", str(folder), *asked, "--compilation-cache", str(at)]) == 0
    assert kept(at) == before
    (tmp_path / "file").write_text("")
    assert main(["compile", "--model", str(folder), *options, "--compilation-cache", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err
