"""Parameters of a model by name: what a converter fills in and a checkpoint stores.

Names are the dotted attribute paths of the modules, such as `layers.attention.q_proj.kernel`; those under `layers.`
hold all layers, stacked on a leading axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from minference_jax.models.config import DecoderConfig
from minference_jax.models.decoder import Decoder
from minference_jax.models.fp8 import FP8, SCALE, WEIGHT, check_linear, linear_of, quantize_parameters, replace_linear
from minference_jax.models.glm import Glm, GlmConfig
from minference_jax.models.llama import Llama, LlamaConfig
from minference_jax.models.phi3 import Phi3, Phi3Config
from minference_jax.models.qwen3 import Qwen3, Qwen3Config

_MODELS: dict[type[DecoderConfig], type[Decoder]] = {
    LlamaConfig: Llama,
    Qwen3Config: Qwen3,
    Phi3Config: Phi3,
    GlmConfig: Glm,
}

_FP8_DTYPES = {WEIGHT: jnp.dtype(FP8).name, SCALE: "float32"}  # by how the names of an 8-bit layer's parameters end


def abstract_model(
    config: DecoderConfig, *, dtype: jax.typing.DTypeLike = jnp.float32, linear: str | None = None
) -> Decoder:
    """The model of `config` with shapes in place of arrays, which take no memory.

    Args:
        config: shape and switches.
        dtype: of the parameters.
        linear: as in `load`.

    Raises:
        ValueError: no model is known for the config, or an unknown `linear`.
    """
    check_linear(linear)
    if type(config) not in _MODELS:
        known = ", ".join(kind.__name__ for kind in _MODELS)
        raise ValueError(f"no model is known for a config of type {type(config).__name__}; known: {known}")
    model = nnx.eval_shape(lambda: _MODELS[type(config)](config, rngs=nnx.Rngs(0), param_dtype=dtype))
    if linear is not None:
        replace_linear(model.layers)
    return model


def _by_name(model: nnx.Module) -> dict[str, nnx.Variable]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(str(part) for part in path): variable for path, variable in flat}


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model; takes no memory."""
    return {name: tuple(variable.shape) for name, variable in _by_name(abstract_model(config)).items()}


def parameters_of(model: nnx.Module) -> dict[str, jax.Array]:
    """Name and array of every parameter of a model; nothing is copied."""
    return {name: variable[...] for name, variable in _by_name(model).items()}


def from_parameters(config: DecoderConfig, parameters: Mapping[str, jax.Array]) -> Decoder:
    """The model of `config` around the given arrays; nothing is initialised or copied.

    Args:
        config: shape and switches.
        parameters: name -> array for exactly the names of `parameter_shapes(config)`, all of one dtype; or what
            `quantize_parameters` makes of all of them.

    Raises:
        ValueError: names that are missing or unknown, shapes that differ, 8-bit weights or scales of another dtype (all
            listed at once), or several dtypes.
    """
    model = abstract_model(config, linear="fp8" if any(name.endswith(SCALE) for name in parameters) else None)
    variables = _by_name(model)
    faults = [f"missing: {name}" for name in variables.keys() - parameters.keys()]
    faults += [f"unknown: {name}" for name in parameters.keys() - variables.keys()]
    for name in variables.keys() & parameters.keys():
        have, need = tuple(parameters[name].shape), tuple(variables[name].shape)
        if have != need:
            faults.append(f"misshapen: {name} is {list(have)}, the model needs {list(need)}")
        dtype = next((kind for end, kind in _FP8_DTYPES.items() if name.endswith(end)), None)
        if dtype not in (None, str(parameters[name].dtype)):
            faults.append(f"mistyped: {name} is {parameters[name].dtype}, the model needs {dtype}")
    if faults:
        raise ValueError("these parameters do not fit the model:\n  " + "\n  ".join(sorted(faults)))
    plain = [array for name, array in parameters.items() if not name.endswith(tuple(_FP8_DTYPES))]
    dtypes = sorted({str(array.dtype) for array in plain})
    if len(dtypes) > 1:
        raise ValueError(f"all parameters must have one dtype, got {', '.join(dtypes)}")
    for name, variable in variables.items():
        variable.set_value(jnp.asarray(parameters[name]))
    return model


def quantize_linear(model: Decoder, linear: str = "fp8") -> Decoder:
    """The model with every linear layer of its layers (q, k, v, o, gate, up, down) computed in another way.

    Embeddings, norms, biases and lm_head are shared with the given model, which stays as it is.

    Args:
        model: any decoder.
        linear: "fp8": weights and activations as 8-bit floating-point numbers; see `minference_jax.models.fp8`.

    Raises:
        ValueError: another `linear`, or a model whose linear layers are so already.
    """
    check_linear(linear)
    if linear_of(model) is not None:
        raise ValueError(f"the model's linear layers are {linear_of(model)} already")
    return from_parameters(model.config, quantize_parameters(parameters_of(model)))
