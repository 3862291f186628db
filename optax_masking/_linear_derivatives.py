"""Derivatives of the cross-entropy of a linear layer, in both modes.

`jax.custom_vjp` would refuse the forward mode, and the transpose that JAX would
make of a tangent would keep all logits. So the tangent is a primitive: its
transpose is the gradient by blocks, and everything else about it, second
derivatives included, is plain JAX.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from optax_masking import (
  _linear_blocks as blocks,
  _linear_partitioned as partitioned,
)
from optax_masking._classes import wide
from optax_masking._linear_blocks import Arguments, Settings

# For each `vmap` around a primitive the axes of its residuals, 0 or None. What
# is linear always has one.
_Maps = tuple[tuple[int | None, ...], ...]
_LINEAR = 3  # Features, kernel, bias.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def losses(settings: Settings, *arguments: Any) -> Any:
  """The losses, and the normalizers to compute the softmax anew from."""
  return partitioned.losses(settings, *arguments)


@losses.defjvp
def _(settings, primals, tangents):
  loss, *normalizer = losses(settings, *primals)
  tangent = _tangent.bind(
    *primals, *normalizer, *tangents[:_LINEAR], settings=settings, maps=()
  )
  zeros = [jnp.zeros_like(x) for x in normalizer]
  return (loss, *normalizer), (tangent, *zeros)


def plain_losses(settings: Settings, *arguments: Any) -> jax.Array:
  """The same losses from all logits at once, for JAX to differentiate."""
  a = Arguments(*arguments)
  x = jnp.where(a.rows[:, None], a.features, 0)
  kernel, bias = a.kernel, a.bias
  included = a.rows[:, None]
  if settings.has_classes:
    used = blocks.used_classes(settings, a)
    kernel, bias = jnp.where(used, kernel, 0), jnp.where(used, bias, 0)
    included &= a.classes[a.classes_of_row]
  dtype = wide(jnp.result_type(x, kernel, bias))
  logits = jnp.dot(x, kernel, preferred_element_type=dtype) + bias
  logits = blocks.capped(settings, logits)
  least = jnp.finfo(dtype).min
  top = jnp.max(jnp.where(included, logits, least), -1)
  top = jnp.where(a.rows & (top < jnp.inf), jax.lax.stop_gradient(top), 0)
  if settings.class_axes:
    top = jax.lax.pmax(top, settings.class_axes)
  below = jnp.where(included, logits, top[:, None]) - top[:, None]
  total = jnp.sum(jnp.where(included, jnp.exp(below), 0), -1)
  first, classes = blocks.first_class(settings, a)
  at = a.labels - first
  is_label = jnp.arange(a.kernel.shape[1]) == at[:, None]
  of_label = jnp.sum(jnp.where(is_label & included, logits, 0), -1)
  sums = blocks.Sums(
    top, total, of_label, jnp.sum(jnp.where(included, logits, 0), -1)
  )
  if settings.class_axes:
    rest = jax.lax.psum(sums[1:], settings.class_axes)
    sums = blocks.Sums(top, *rest)
  total = jnp.where(a.rows, sums.total, 1)
  named = (a.labels < classes) | ~a.rows
  number = blocks.number_of_classes(settings, a)[a.classes_of_row]
  sums = sums._replace(total=total)
  loss = blocks.loss_of_sums(settings, sums, named, number)
  return jnp.where(a.rows, loss, 0)


def _plain_tangent(settings: Settings, *arguments: Any) -> jax.Array:
  """The tangent of the losses, from all logits at once."""
  residuals = arguments[: -_LINEAR - 2]
  linear, rest = residuals[:_LINEAR], residuals[_LINEAR:]

  def of_linear(*linear):
    return plain_losses(settings, *linear, *rest)

  return jax.jvp(of_linear, linear, arguments[-_LINEAR:])[1]


def _plain_gradients(settings: Settings, *arguments: Any) -> Any:
  """The gradients of the losses, from all logits at once."""
  residuals, cotangent = arguments[:-3], arguments[-1]
  linear, rest = residuals[:_LINEAR], residuals[_LINEAR:]

  def of_linear(*linear):
    return plain_losses(settings, *linear, *rest)

  return jax.vjp(of_linear, *linear)[1](cotangent)


def _mapped(function: Any, maps: _Maps, linear: int) -> Any:
  """Maps a function as its arguments have been."""
  for axes in maps:
    function = jax.vmap(function, (*axes, *[0] * linear))
  return function


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _gradients(settings: Settings, maps: _Maps, *arguments: Any) -> Any:
  """The gradients by blocks; their own derivatives are plain JAX."""
  by_blocks = functools.partial(partitioned.gradients, settings)
  return _mapped(by_blocks, maps, 1)(*arguments)


@_gradients.defjvp
def _(settings, maps, primals, tangents):
  plain = functools.partial(_plain_gradients, settings)
  plain = _mapped(plain, maps, 1)
  *rest, cotangent = primals

  def of_floating(*floating):
    return tuple(plain(*floating[:-1], *rest[_LINEAR:], floating[-1]))

  given = (*primals[:_LINEAR], cotangent)
  moved = (*tangents[:_LINEAR], tangents[-1])
  _, tangent = jax.jvp(of_floating, given, moved)
  return _gradients(settings, maps, *primals), tangent


_tangent = Primitive("linear_cross_entropy_tangent")


def _evaluate_tangent(*arguments: Any, settings: Settings, maps: _Maps) -> Any:
  plain = functools.partial(_plain_tangent, settings)
  return _mapped(plain, maps, _LINEAR)(*arguments)


def _tangent_jvp(primals, tangents, *, settings, maps):
  *rest, x, kernel, bias = primals
  of_residuals = tangents[:_LINEAR]
  result = _tangent.bind(*primals, settings=settings, maps=maps)
  linear = [ad.instantiate_zeros(t) for t in tangents[-_LINEAR:]]
  moved = _tangent.bind(*rest, *linear, settings=settings, maps=maps)
  if all(type(t) is ad.Zero for t in of_residuals):
    return result, moved
  of_residuals = [ad.instantiate_zeros(t) for t in of_residuals]

  def with_residuals(*residuals):
    return _evaluate_tangent(
      *residuals, *rest[_LINEAR:], x, kernel, bias, settings=settings, maps=maps
    )

  _, more = jax.jvp(with_residuals, tuple(rest[:_LINEAR]), tuple(of_residuals))
  return result, moved + more


def _tangent_transpose(cotangent, *arguments, settings, maps):
  rest, linear = arguments[:-_LINEAR], arguments[-_LINEAR:]
  if type(cotangent) is ad.Zero:
    return [None] * len(arguments)
  found = _gradients(settings, maps, *rest, cotangent)
  return [None] * len(rest) + [
    g if ad.is_undefined_primal(x) else None
    for g, x in zip(found, linear, strict=True)
  ]


def _tangent_batched(arguments, axes, *, settings, maps):
  (size,) = {
    x.shape[a] for x, a in zip(arguments, axes, strict=True) if a is not None
  }
  first = len(arguments) - _LINEAR
  moved, kept = [], []
  for i, (x, a) in enumerate(zip(arguments, axes, strict=True)):
    # The result is as the last residual is. What is linear is broadcast here,
    # so that its transpose adds up over the axis.
    if a is None and i >= first - 1:
      moved.append(jnp.broadcast_to(x, (size, *x.shape)))
      a = 0
    else:
      moved.append(x if a is None else jnp.moveaxis(x, a, 0))
    kept.append(None if a is None else 0)
  maps = (*maps, tuple(kept[:first]))
  return _tangent.bind(*moved, settings=settings, maps=maps), 0


_tangent.def_impl(_evaluate_tangent)
ad.primitive_jvps[_tangent] = _tangent_jvp
ad.primitive_transposes[_tangent] = _tangent_transpose
batching.primitive_batchers[_tangent] = _tangent_batched
mlir.register_lowering(
  _tangent, mlir.lower_fun(_evaluate_tangent, multiple_results=False)
)


@_tangent.def_abstract_eval
def _(*arguments, settings, maps):
  del settings, maps
  return arguments[-_LINEAR - 1]  # As the normalizer.
