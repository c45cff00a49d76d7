"""T5X's Adafactor and learning-rate factors, as optax sees them.

optax has an Adafactor of its own, but another one: it counts from 0 and
applies the weight decay elsewhere. Published prompts were trained with T5X's,
whose mixing rate depends on the step count *including the base checkpoint's
steps*: at step 1,100,000 the second moment is in effect a sum of squares and
the clipping decides the size of every update. Hence `initial_step`.
"""

from collections.abc import Callable, Mapping, Sequence
import inspect
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np
import optax

from prompt_tuning.errors import UserError
from prompt_tuning.models import parameters

Schedule = Callable[[Int[Array, ''] | int], Float[Array, '']]

# Where the caller does not say it: axes that stack independent arrays.
STACKED_AXES = {
  r'(^|/)(encoder/encoder|decoder/decoder)/': parameters.LAYERS_AXIS,
  r'(^|/)prompt/table$': 0,
}


class AdafactorState(NamedTuple):
  """State of `adafactor`.

  Attributes:
    count: int32 scalar, the step, the base checkpoint's steps included.
    moments: the tree of parameters, each replaced by a dict of float32 arrays:
      `v` (shape of the parameter), or `v_row` and `v_col` if it is factored;
      also `m` when momentum is used.
  """

  count: Int[Array, '']
  moments: Any


class _Layout(NamedTuple):
  """Which axes of one parameter are averaged and which are factored."""

  averaged: tuple[int, ...]
  row: int | None  # the axis that v_row keeps; None: not factored
  column: int | None


def adafactor(
  learning_rate: float | Schedule,
  *,
  initial_step: int = 0,
  decay_rate: float = 0.8,
  step_offset: int = 0,
  factored: bool = True,
  multiply_by_parameter_scale: bool = True,
  clipping_threshold: float | None = 1.0,
  weight_decay_rate: float | None = None,
  weight_decay_rate_lr_exponent: float | None = None,
  global_norm_clip_threshold: float | None = None,
  max_parameter_scale: float | None = None,
  min_dim_size_to_factor: int = 128,
  never_factor: Sequence[str] = (),
  stacked_axes: Mapping[str, int] | None = None,
  beta1: float | None = None,
  dtype_momentum: Any = jnp.float32,
  epsilon1: float = 1e-30,
  epsilon2: float = 1e-3,
  skip_nan_updates: bool = False,
) -> optax.GradientTransformation:
  """Adafactor (Shazeer and Stern, 2018) with T5X's numbers.

  A matrix whose two dimensions both reach `min_dim_size_to_factor` keeps its
  second moment as row and column means. As in T5X, that includes a prompt of
  128 tokens or more; `never_factor=('prompt/',)` switches it off. T5X also
  factors the kernels of a scanned model that are smaller; here they follow
  the same rule as in an unrolled one, so that both train alike.

  Args:
    learning_rate: a number, or a function of the step (base steps included).
    initial_step: the base checkpoint's step, from which the count goes on.
    decay_rate: the second moment decays by 1 - (step + 1 - offset)^-decay_rate.
    step_offset: subtracted from the step in that formula only.
    factored: False keeps a full second moment for every parameter.
    multiply_by_parameter_scale: makes the learning rate relative to the
      root mean square of each parameter.
    clipping_threshold: upper bound of an update's RMS before the learning
      rate; None: no bound.
    weight_decay_rate: the share of each parameter taken away per step. It is
      not multiplied by the learning rate.
    weight_decay_rate_lr_exponent: if given, the weight decay is multiplied by
      learning_rate to this power (and `weight_decay_rate` defaults to 1).
    global_norm_clip_threshold: upper bound of the norm of all gradients.
    max_parameter_scale: upper bound of a parameter's scale.
    min_dim_size_to_factor: see above.
    never_factor: regular expressions of parameter paths that are not factored.
    stacked_axes: regular expression of a path -> the axis that stacks
      independent arrays: the layers of a scanned stack, the prompts of a table
      [K, P, E]. Whatever is averaged is averaged within one of them, so that a
      scanned model is trained as an unrolled one, and K prompts together as
      each of them alone. None: `STACKED_AXES`.
    beta1: momentum; None: none, and no memory for it.
    dtype_momentum: the type in which momentum is stored.
    epsilon1: added to squared gradients.
    epsilon2: lower bound of a parameter's scale.
    skip_nan_updates: leaves values alone where an update would make them NaN.

  Returns:
    An optax transformation whose updates are new value - old value.

  Raises:
    UserError: a rate that cannot be one.
  """
  stacked_axes = STACKED_AXES if stacked_axes is None else stacked_axes
  for name, value, below in (
    ('decay_rate', decay_rate, math.inf),
    ('clipping_threshold', clipping_threshold, math.inf),
    ('weight_decay_rate', weight_decay_rate, 1.0),
    ('beta1', beta1, 1.0),
  ):
    if value is not None and not 0 <= value < below:
      raise UserError(
        f'adafactor.{name} must be in [0, {below:g}), got {value}'
      )

  def layout_of(path: str, shape: tuple[int, ...]) -> _Layout:
    stacked = [
      axis
      for pattern, axis in stacked_axes.items()
      if re.search(pattern, path) and axis < len(shape)
    ]
    averaged = tuple(a for a in range(len(shape)) if a not in stacked)
    matrix = len(averaged) == 2
    large = all(shape[a] >= min_dim_size_to_factor for a in averaged)
    barred = any(re.search(pattern, path) for pattern in never_factor)
    if not (factored and matrix and large) or barred:
      return _Layout(averaged, None, None)
    # T5X calls the smaller dimension the row's, the first of two equal ones.
    row, column = sorted(averaged, key=lambda axis: shape[axis])
    return _Layout(averaged, row, column)

  def init_moments(path, param):
    layout = layout_of(path, param.shape)
    if layout.row is None:
      moments = {'v': jnp.zeros(param.shape, jnp.float32)}
    else:
      row_shape = np.delete(param.shape, layout.column)
      column_shape = np.delete(param.shape, layout.row)
      moments = {
        'v_row': jnp.zeros(row_shape, jnp.float32),
        'v_col': jnp.zeros(column_shape, jnp.float32),
      }
    if beta1 is not None:
      moments['m'] = jnp.zeros(param.shape, dtype_momentum)
    return moments

  def init(params: Any) -> AdafactorState:
    moments = jax.tree_util.tree_map_with_path(
      lambda path, param: init_moments(_path_name(path), param), params
    )
    return AdafactorState(jnp.asarray(initial_step, jnp.int32), moments)

  def update_one(path, param, grad, moments, decay, rate, weight_decay):
    layout = layout_of(path, param.shape)
    old = param.astype(jnp.float32)
    grad = grad.astype(jnp.float32)

    def rms(x):
      square = jnp.mean(x * x, axis=layout.averaged, keepdims=True)
      return jnp.sqrt(square)

    # `mix` is not t^-decay_rate: next to 1 float32 rounds it, as T5X does.
    mix = 1.0 - decay
    squared = jnp.square(grad) + epsilon1
    new = {}
    if layout.row is None:
      new['v'] = decay * moments['v'] + mix * squared
      step = grad * new['v'] ** -0.5
    else:
      row, column = layout.row, layout.column
      new['v_row'] = decay * moments['v_row'] + mix * jnp.mean(squared, column)
      new['v_col'] = decay * moments['v_col'] + mix * jnp.mean(squared, row)
      v_row = jnp.expand_dims(new['v_row'], column)
      v_col = jnp.expand_dims(new['v_col'], row)
      row_mean = jnp.mean(v_row, axis=row, keepdims=True)
      step = grad * (v_row / row_mean) ** -0.5 * v_col**-0.5

    if clipping_threshold is not None:
      step = step / jnp.maximum(1.0, rms(step) / clipping_threshold)
    if multiply_by_parameter_scale:
      scale = jnp.maximum(rms(old), epsilon2)
      if max_parameter_scale is not None:
        scale = jnp.minimum(scale, max_parameter_scale)
      rate = rate * scale
    step = rate * step
    if beta1 is not None:
      step = beta1 * moments['m'].astype(jnp.float32) + (1.0 - beta1) * step
      new['m'] = step.astype(dtype_momentum)

    kept = old if weight_decay is None else (1.0 - weight_decay) * old
    target = kept - step
    if skip_nan_updates:
      target = jnp.where(jnp.isnan(target), old, target)
      new = {k: jnp.where(jnp.isnan(x), moments[k], x) for k, x in new.items()}
    return (target - old).astype(param.dtype), new

  def update(grads: Any, state: AdafactorState, params: Any = None):
    if params is None:
      raise ValueError(
        'adafactor needs the parameters: update(g, state, params)'
      )
    rate = learning_rate
    if callable(learning_rate):
      rate = learning_rate(state.count)
    weight_decay = weight_decay_rate
    if weight_decay_rate_lr_exponent:
      weight_decay = (weight_decay or 1.0) * rate**weight_decay_rate_lr_exponent
    # [0, 1): 0 at the first step, when the count starts at the offset.
    count = jnp.asarray(state.count - step_offset, jnp.float32)
    decay = 1.0 - (count + 1.0) ** -decay_rate

    paths_and_params, treedef = jax.tree_util.tree_flatten_with_path(params)
    grads_flat = treedef.flatten_up_to(grads)
    if global_norm_clip_threshold:
      norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in grads_flat))
      share = jnp.minimum(1.0, global_norm_clip_threshold / norm)
      grads_flat = [g * share.astype(g.dtype) for g in grads_flat]
    out = [
      update_one(
        _path_name(path), param, grad, moments, decay, rate, weight_decay
      )
      for (path, param), grad, moments in zip(
        paths_and_params, grads_flat, treedef.flatten_up_to(state.moments)
      )
    ]
    updates = treedef.unflatten([delta for delta, _ in out])
    moments = treedef.unflatten([new for _, new in out])
    return updates, AdafactorState(optax.safe_increment(state.count), moments)

  return optax.GradientTransformation(init, update)


def _path_name(path: tuple) -> str:
  """'encoder/layers_0/mlp/wo/kernel' for a path of jax.tree_util."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


_FACTORS = (
  'constant',
  'linear_warmup',
  'linear_decay',
  'rsqrt_decay',
  'rsqrt_normalized_decay',
  'decay_every',
  'cosine_decay',
)


def create_learning_rate_scheduler(
  factors: str = 'constant * linear_warmup * rsqrt_decay',
  base_learning_rate: float = 0.5,
  warmup_steps: int = 1000,
  decay_factor: float = 0.5,
  steps_per_decay: int = 20000,
  steps_per_cycle: int = 100000,
  step_offset: int = 0,
  min_learning_rate: float = 1e-8,
) -> Schedule:
  """The product of named factors, by T5X's names and to T5X's last bit.

  With s = max(0, step - step_offset) and w = warmup_steps:
    constant                base_learning_rate
    linear_warmup           min(1, s / w)
    linear_decay            base_learning_rate * min(s / w,
                            1 + decay_factor * (w - s)); it replaces the two
                            factors above
    rsqrt_decay             1 / sqrt(max(s, w))
    rsqrt_normalized_decay  sqrt(w / max(s, w))
    decay_every             decay_factor ^ floor(s / steps_per_decay)
    cosine_decay            (1 + cos(pi * x)) / 2 with x the fraction of
                            max(0, s - w) / steps_per_cycle

  Args:
    factors: names joined by '*'.
    base_learning_rate: see above, as are the next four.
    warmup_steps: steps.
    decay_factor: a number.
    steps_per_decay: steps.
    steps_per_cycle: steps.
    step_offset: steps; give the base checkpoint's step for a warm-up of a run
      that starts there.
    min_learning_rate: the rate never falls below this.

  Returns:
    A function from the step (int, base steps included) to a float32 scalar.

  Raises:
    UserError: for an unknown factor.
  """
  names = [name.strip() for name in factors.split('*')]
  for name in names:
    if name not in _FACTORS:
      raise UserError(
        f'learning-rate factor {name!r} is unknown; use one of '
        + ', '.join(_FACTORS)
      )

  def apply(name: str, rate, step):
    # Multiplications and divisions stand in T5X's order: rounding counts.
    match name:
      case 'constant':
        return rate * base_learning_rate
      case 'linear_warmup':
        return rate * jnp.minimum(1.0, step / warmup_steps)
      case 'linear_decay':
        falling = 1.0 + decay_factor * (warmup_steps - step)
        return rate * (
          base_learning_rate * jnp.minimum(step / warmup_steps, falling)
        )
      case 'rsqrt_decay':
        return rate / jnp.sqrt(jnp.maximum(step, warmup_steps))
      case 'rsqrt_normalized_decay':
        rate = rate * jnp.sqrt(warmup_steps)
        return rate / jnp.sqrt(jnp.maximum(step, warmup_steps))
      case 'decay_every':
        return rate * decay_factor ** (step // steps_per_decay)
      case 'cosine_decay':
        cycles = jnp.maximum(0.0, (step - warmup_steps) / steps_per_cycle)
        wave = 0.5 * (1.0 + jnp.cos(jnp.pi * (cycles % 1.0)))
        return rate * jnp.maximum(0.0, wave)

  def schedule(step):
    step = jnp.maximum(0, step - step_offset)
    rate = 1.0
    for name in names:
      rate = apply(name, rate, step)
    return jnp.asarray(jnp.maximum(rate, min_learning_rate), jnp.float32)

  return schedule


def build_optimizer(
  optimizer_fn: Callable[..., optax.GradientTransformation],
  schedule: float | Schedule,
  initial_step: int = 0,
  axes: Mapping[str, Any] | None = None,
  rates: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
  """Any optimiser, on the step count that includes the base's steps.

  Arrays of different rates have an optimiser of the same kind for each rate,
  as parameter groups have elsewhere: what it does by the norm of all gradients
  it does by those of one rate.

  Args:
    optimizer_fn: `adafactor`, or a function of optax that takes
      `learning_rate` (its other arguments bound by gin or functools.partial).
    schedule: a number, or a function of the step, counted from the start of
      this run.
    initial_step: the base checkpoint's step. An optimiser without such an
      argument counts from 0 itself.
    axes: {collection: `Method.axes`} of what is trained; tells an optimiser
      that takes `stacked_axes` which axes stack independent arrays.
    rates: {'collection/path': `Method.rate`} of what is trained, factors of
      the learning rate; None: all are 1. An array of rate 0 stays as it is,
      without weight decay or optimiser state.

  Raises:
    UserError: if `optimizer_fn` does not take `learning_rate`, or a rate is
      below 0 or not finite.
  """
  settings = inspect.signature(optimizer_fn).parameters
  open_ended = any(p.kind is p.VAR_KEYWORD for p in settings.values())
  if 'learning_rate' not in settings and not open_ended:
    name = getattr(optimizer_fn, '__name__', repr(optimizer_fn))
    raise UserError(
      f'optimizer {name} takes no learning_rate; give a function such as '
      'adafactor or optax.adamw'
    )
  more: dict[str, Any] = {}
  if 'stacked_axes' in settings and axes is not None:
    more['stacked_axes'] = _stacked(axes)
  if 'initial_step' in settings:
    more['initial_step'] = initial_step
    if callable(schedule):
      from_start = schedule
      schedule = lambda count: from_start(count - initial_step)

  def at_rate(rate):
    if rate == 0:
      return optax.set_to_zero()
    scaled = schedule
    if rate != 1 and callable(schedule):
      scaled = lambda count: schedule(count) * np.float32(rate)
    elif rate != 1:
      scaled = schedule * rate
    return optimizer_fn(learning_rate=scaled, **more)

  rates = rates or {}
  for path, rate in rates.items():
    if not 0 <= rate < math.inf:
      raise UserError(
        f'learning_rate_scale must be 0 or more, and finite, got {rate:g} for'
        f' {path}'
      )
  if set(rates.values()) <= {1.0}:
    return at_rate(1.0)
  labels = lambda params: jax.tree_util.tree_map_with_path(
    lambda path, _: f'rate {rates[_path_name(path)]}', params
  )
  return optax.partition(
    {f'rate {rate}': at_rate(rate) for rate in set(rates.values())}, labels
  )


def _stacked(axes: Mapping[str, Any]) -> dict[str, int]:
  """Patterns of the arrays with an axis that stacks, and which it is."""
  found = {}
  for path, names in jax.tree_util.tree_leaves_with_path(
    axes, is_leaf=lambda leaf: isinstance(leaf, tuple)
  ):
    for axis, name in enumerate(names):
      if name in ('layers', 'prompts'):
        found[f'^{re.escape(_path_name(path))}$'] = axis
  return found
