"""Masked losses of which the derivatives are written out.

To differentiate a loss of filled arguments costs more than the loss without a
mask: the compiler keeps the filled arguments, or their parts, for the backward
pass. A derivative that is written out reads the arguments again and fills them
in the same loop. Like the loss it sees masked elements as their fills, and so
do its own derivatives.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_masking._classes import Axes, on_cpus, select

# The `shard_map` of older versions refuses symbolic zeros, which save the
# derivatives with respect to constant arguments.
_SYMBOLIC_ZEROS = hasattr(jax, "shard_map")


def with_partials(
  value: Callable[..., tuple[jax.Array, ...]],
  *partials: Callable[..., jax.Array] | None,
  formula: Any = None,
  recompute: bool = False,
) -> Callable[..., tuple[jax.Array, ...]]:
  """Gives a masked loss derivatives that are written out.

  Args:
    value: A function ``value(axes, where, *arrays)`` that returns the loss and
      then statistics of its shape, such as a maximum, that the derivatives need
      again.
    *partials: For each of the first arrays, the derivative of the loss with
      respect to it: a function ``partial(axes, where, tangent, arrays,
      statistics)`` that is linear in the tangent of this array; or None for
      JAX's own. The other arrays have no derivative.
    formula: If given, it takes the place of the value and the derivatives where
      the program does not run on CPUs: a function ``formula(axes, where,
      *arrays)`` that returns the loss, and that JAX differentiates.
    recompute: Whether derivatives on CPUs compute anew what the value has
      computed. Otherwise XLA may write to memory what the two share.

  Returns:
    A function like ``value``. Its statistics have no derivative.
  """

  def by_platform(on_cpu, elsewhere):
    if formula is None:
      return on_cpu
    return functools.partial(on_cpus, on_cpu, elsewhere)

  @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
  def loss(axes: Axes, where: jax.Array, *arrays: Any) -> Any:
    def on_cpu(where, *arrays):
      return value(axes, where, *arrays)

    def elsewhere(where, *arrays):
      result, *statistics = jax.eval_shape(on_cpu, where, *arrays)
      loss = formula(axes, where, *arrays).astype(result.dtype)
      # A select is sharded like the loss.
      zero = jnp.where(loss == 0, loss, jnp.zeros_like(loss))
      return loss, *(zero for _ in statistics)

    return by_platform(on_cpu, elsewhere)(where, *arrays)

  def differentiate(i, axes, where, tangent, arrays, results):
    def own(function, where, tangent, arrays):
      def of_one(x):
        return function(axes, where, *arrays[:i], x, *arrays[i + 1 :])

      return jax.jvp(of_one, (arrays[i],), (tangent,))[1]

    def on_cpu(where, tangent, arrays, statistics):
      if recompute:  # The barriers of `jax.checkpoint` would hold on GPUs, too.
        barrier = jax.lax.optimization_barrier
        where, arrays = on_cpus(barrier, lambda x: x, (where, arrays))
      if partials[i] is None:
        term, *_ = own(value, where, tangent, arrays)
      else:
        term = partials[i](axes, where, tangent, arrays, statistics)
      return term.astype(results[0].dtype)

    def elsewhere(where, tangent, arrays, statistics):
      del statistics
      term = own(formula, where, tangent, arrays)
      return term.astype(results[0].dtype)

    # Nothing but the arguments and the statistics is kept for the backward
    # pass. Without a barrier XLA may share work between the passes, if they are
    # one program.
    term = jax.checkpoint(by_platform(on_cpu, elsewhere), prevent_cse=False)
    return term(where, tangent, tuple(arrays), tuple(results[1:]))

  @functools.partial(loss.defjvp, symbolic_zeros=_SYMBOLIC_ZEROS)
  def _(axes, primals, tangents):
    where, *arrays = primals
    result, *statistics = results = loss(axes, *primals)
    terms = [
      differentiate(i, axes, where, tangent, arrays, results)
      for i, tangent in enumerate(tangents[1 : 1 + len(partials)])
      if not isinstance(tangent, jax.custom_derivatives.SymbolicZero)
      and tangent.dtype != jax.dtypes.float0
    ]
    derivative = sum(terms[1:], *terms[:1]) if terms else jnp.zeros_like(result)
    zeros = map(jnp.zeros_like, statistics)
    return (result, *statistics), (derivative, *zeros)

  return loss


def elementwise(
  value: Callable[..., jax.Array],
  *partials: Callable[..., jax.Array] | None,
  fills: Sequence[float],
  recompute: bool = False,
) -> Callable[..., jax.Array]:
  """Masks a loss with a number for each element, by its partial derivatives.

  Args:
    value: A function of arrays, finite at the fills.
    *partials: For each array the derivative with respect to it, a function of
      the same arrays, finite at the fills; or None for JAX's own.
    fills: For each array the number that replaces masked elements.
    recompute: As in `with_partials`.

  Returns:
    A function of a mask with the rank of the data, and the arrays. Masked
    elements of its result are what the value is at the fills.
  """

  def filled(where, arrays):
    pairs = zip(arrays, fills, strict=False)
    return [select(where, x, fill) for x, fill in pairs]

  def masked(partial):
    if partial is None:
      return None

    def derivative(axes, where, tangent, arrays, statistics):
      del axes, statistics
      slope = partial(*filled(where, arrays))
      tangent = select(where, tangent, 0)
      dtype = jnp.promote_types(slope.dtype, tangent.dtype)
      return slope.astype(dtype) * tangent.astype(dtype)

    return derivative

  loss = with_partials(
    lambda axes, where, *arrays: (value(*filled(where, arrays)),),
    *map(masked, partials),
    recompute=recompute,
  )
  return lambda where, *arrays: loss((), where, *arrays)[0]
