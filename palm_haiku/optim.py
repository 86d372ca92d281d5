"""Optimizers: AdamW as small models like it, and the one that trained PaLM."""

import jax
import jax.numpy as jnp
import optax

LEARNING_RATES = {"adamw": 3e-3, "palm": 1e-2}  # the highest, unless another is asked for


def adamw(learning_rate: float = LEARNING_RATES["adamw"], *, steps: int, warmup: int = 100,
          b2: float = 0.99, weight_decay: float = 0.1,
          clip: float = 1.0) -> optax.GradientTransformation:
  """AdamW with linear warm-up, cosine decay to a tenth, and global-norm clipping.

  Args:
    learning_rate: at its highest, after `warmup` steps.
    steps: length of the run, at whose end the learning rate is a tenth of its highest.
    warmup: steps of linear warm-up; at most a tenth of the run is spent on it.
    weight_decay: on matrices only, not on the gains of norms.
  """
  return optax.chain(
      optax.clip_by_global_norm(clip),
      optax.adamw(schedule(learning_rate, steps=steps, warmup=warmup), b1=0.9, b2=b2,
                  weight_decay=weight_decay, mask=_matrices))  # mutant: adamw


def schedule(learning_rate: float, *, steps: int, warmup: int = 100) -> optax.Schedule:
  """Linear warm-up, then a cosine that ends at a tenth; arguments as in `adamw`."""
  return optax.warmup_cosine_decay_schedule(
      init_value=0.0, peak_value=learning_rate, warmup_steps=min(warmup, steps // 10),
      decay_steps=max(steps, 1), end_value=learning_rate / 10)  # mutant: schedule


def palm(learning_rate: float = LEARNING_RATES["palm"], *, constant_steps: int = 10_000,
         clip: float = 1.0) -> optax.GradientTransformation:
  """The optimizer of PaLM (arXiv:2204.02311, section 5): Adafactor without factoring.

  That is Adam whose step is scaled by the root mean square of each parameter matrix: beta1 0.9,
  beta2 1 - k^-0.8 at step k, weight decay the square of the current learning rate.

  Args:
    learning_rate: constant for `constant_steps`, then falling with 1/sqrt(k).
    clip: global norm of the gradient.
  """
  def rate(count):
    k = jnp.maximum(count + 1, constant_steps)  # mutant: palm's rate
    return learning_rate * jnp.sqrt(constant_steps / k)

  return optax.chain(
      optax.clip_by_global_norm(clip),
      optax.scale_by_factored_rms(factored=False, decay_rate=0.8),
      optax.ema(0.9, debias=False),
      _scale_by_parameter_rms(),
      optax.scale_by_learning_rate(rate),
      _decay_by_squared_learning_rate(rate))  # mutant: palm


def _is_layer(path) -> bool:
  """Whether a parameter's first axis is that of the stacked layers."""
  return "/layers/" in path[0].key


def _matrices(params):
  return jax.tree_util.tree_map_with_path(lambda path, x: x.ndim - _is_layer(path) > 1, params)


def _scale_by_parameter_rms(min_rms: float = 1e-3) -> optax.GradientTransformation:
  """Multiplies an update by the root mean square of its parameter, layer by layer."""
  def scale(path, update, param):
    axes = tuple(range(int(_is_layer(path)), param.ndim))  # mutant: root mean square
    rms = jnp.sqrt(jnp.square(param).mean(axes, keepdims=True))
    return update * jnp.maximum(rms, min_rms)

  return optax.stateless(
      lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates, params))


def _decay_by_squared_learning_rate(schedule) -> optax.GradientTransformation:
  def update(updates, state, params=None, **_):
    decay = schedule(state.count) ** 2  # mutant: palm's decay
    updates = jax.tree.map(lambda u, p: u - decay * p, updates, params)
    return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

  return optax.GradientTransformation(
      lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update)
