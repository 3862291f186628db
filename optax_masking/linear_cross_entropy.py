"""The cross-entropy of a linear layer, without an array of all its logits.

This is an addition: Optax has no such loss.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking import _linear_blocks as blocks
from optax_masking._classes import (
  Shape,
  broadcasts,
  class_number,
  select,
  wide,
)
from optax_masking._linear_blocks import Arguments, Settings, axes_of, varying
from optax_masking._mask import (
  Mask,
  Where,
  boolean,
  check_array,
  check_floating,
)

__all__ = ["linear_softmax_cross_entropy_with_integer_labels"]


def linear_softmax_cross_entropy_with_integer_labels(
  features: jax.typing.ArrayLike,
  kernel: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
  *,
  bias: jax.typing.ArrayLike | None = None,
  where: Where = None,
  weights: jax.typing.ArrayLike | None = None,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
  logit_soft_cap: float | None = None,
  class_axis_name: Any = None,
  block_shape: tuple[int, int] | None = None,
) -> jax.Array:
  r"""Computes the softmax cross-entropy of a linear layer, block by block.

  It equals
  :func:`optax_masking.losses.softmax_cross_entropy_with_integer_labels` of
  ``features @ kernel + bias``, but the logits are never held all at once, and
  what is masked costs no time. For logits :math:`x`, a label :math:`y` and the
  :math:`K` included classes :math:`I`,

  .. math::
    w \left(\log s - (1 - a) x_y - \frac{a}{K} \sum_{k \in I} x_k
    + c \log^2 s \right)\,, \quad s = \sum_{k \in I} \exp x_k \,,

  with weights :math:`w`, ``label_smoothing`` :math:`a` and ``z_loss``
  :math:`c`. With a ``logit_soft_cap`` :math:`t` the logits are
  :math:`t \tanh(x / t)`.

  Rows are sorted so that included ones come first. Logits are computed in
  blocks of rows and classes, until no included row is left. The gradient
  computes each block a second time. Half precision is multiplied as it is and
  added up in float32. Beside arguments, results and a few numbers a row, the
  temporaries are at most 10 arrays of 2**21 numbers, for up to 8,192 features:
  they grow neither with the rows nor with the classes. In half precision there
  is a copy of the gradient of the kernel in float32, if there are more than
  ``2**21 / D`` rows.

  Reverse mode is what it is for. Forward mode and second derivatives are right,
  but computed from all logits at once. Under ``vmap`` the loops go on until
  each element of the batch has had its rows, and a kernel that is not mapped
  has a gradient for each element before these are added up: give the batch as
  axes of ``features`` instead.

  On many devices, under ``jit`` with sharded arrays or inside of
  ``jax.shard_map``, each device orders its own rows. Devices exchange the
  gradients of what they share and, if the classes are sharded, a few numbers a
  row.

  Args:
    features: Inputs of the layer, with shape ``[..., D]`` and a floating dtype.
    kernel: Weights of the layer, with shape ``[D, V]`` and a floating dtype.
    labels: Index of the class of each row, with shape ``[...]`` and an integer
      dtype; -1 is the last class. Where a row is masked it may be any integer;
      elsewhere one that names no class makes the loss NaN.
    bias: Added to the logits, with shape ``[V]``.
    where: What to include, True for included: rows, with shape ``[...]``;
      classes, with shape ``[V]`` or ``[..., V]``, where the leading axes may
      have size 1; or a scalar. A masked row may hold anything: its loss is 0,
      and so is the gradient of its features. A masked class is left out of the
      normalizer and of the smoothing. A row whose own class is masked, or all
      of whose classes are, counts as masked. A class that is masked in every
      included row may hold anything in ``kernel`` and ``bias``. One that is
      masked in some rows alone has to be finite.
    weights: Factors of the losses, with shape ``[...]``, where axes may have
      size 1, or a scalar. A weight of 0 is no mask: 0 times NaN is NaN.
    z_loss: Weight of the squared logarithm of the normalizer. This and the next
      two are Python numbers, not traced.
    label_smoothing: Fraction of the label that is spread over all included
      classes, from 0 to 1.
    logit_soft_cap: Bound of the absolute value of the logits.
    class_axis_name: Name or names of mapped axes, inside ``jax.shard_map`` with
      its default ``check_vma=True``, over which the classes are sharded:
      ``kernel``, ``bias`` and a ``where`` with classes are then one device's
      part, and ``labels`` count the classes of all.
    block_shape: Rows and classes of a block of logits. By default the sizes
      are chosen from the shapes.

  Returns:
    The losses, with shape ``[...]``, in the dtype of ``features``, ``kernel``
    and ``bias``, but float32 for half precision.

  Raises:
    TypeError: If ``features``, ``kernel`` or ``bias`` are not floating,
      ``labels`` not integer, ``where`` not boolean, ``weights`` boolean, or a
      number is traced.
    ValueError: If a shape does not fit, ``where`` fits in two ways (``[V]`` for
      as many rows as classes), or a number is out of range.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> features = jnp.array([[1.0, 2.0], [jnp.nan, jnp.nan]])
    >>> kernel = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    >>> labels = jnp.array([1, -100])  # The second row is padding.
    >>> print(optax.linear_softmax_cross_entropy_with_integer_labels(
    ...     features, kernel, labels, where=labels >= 0))
    [1.4076 0.    ]
    >>> def mean_loss(features, kernel):
    ...   losses = optax.linear_softmax_cross_entropy_with_integer_labels(
    ...       features, kernel, labels, where=labels >= 0)
    ...   return optax.reductions.masked_mean(losses, labels >= 0)
    >>> print(jax.grad(mean_loss)(features, kernel))
    [[ 0.7553 -0.09  ]
     [ 0.      0.    ]]

  References:
    Wijmans et al., `Cut Your Losses in Large-Vocabulary Language Models
    <https://arxiv.org/abs/2411.09009>`_, 2024, for blocks of logits; Chowdhery
    et al., `PaLM <https://arxiv.org/abs/2204.02311>`_, 2022, section 5, for the
    z-loss; Szegedy et al., `Rethinking the Inception Architecture
    <https://arxiv.org/abs/1512.00567>`_, 2015, section 7, for label smoothing.

  .. seealso::
    :func:`optax_masking.losses.softmax_cross_entropy_with_integer_labels`
  """
  arrays: dict[str, Any] = {
    "features": features,
    "kernel": kernel,
    "labels": labels,
  }
  arrays |= {"bias": bias, "weights": weights}
  _check_arrays(arrays)
  batch = np.shape(labels)
  mask = _mask_of_logits(where, (*batch, np.shape(kernel)[1]))
  settings = Settings(
    z_loss=_number("z_loss", z_loss),
    label_smoothing=_number("label_smoothing", label_smoothing, most=1),
    logit_soft_cap=_soft_cap(logit_soft_cap),
    block_shape=_block_shape(block_shape),
    has_bias=bias is not None,
    has_rows=mask is not None,
    has_classes=mask is not None and mask.shape[-1] != 1,
    own_classes=mask is not None and mask.shape[:-1] == batch != (1,),
    class_axes=_axis_names(class_axis_name),
  )
  present = {k: jnp.asarray(x) for k, x in arrays.items() if x is not None}
  call = functools.partial(_compiled, settings)
  spec = _explicit_spec(present, len(batch))
  if spec is not None:
    call = jax.sharding.auto_axes(call, out_sharding=spec)
  return call(present, mask)


def _explicit_spec(arrays: dict[str, jax.Array], rank: int) -> Any:
  """How the losses are sharded over an explicit mesh; None if there is none."""
  if not hasattr(jax.sharding, "auto_axes"):
    return None
  specs = {
    name: (*getattr(jax.typeof(x).sharding, "spec", ()), *[None] * x.ndim)
    for name, x in arrays.items()
  }
  if not any(axis for spec in specs.values() for axis in spec):
    return None
  pairs = zip(specs["labels"][:rank], specs["features"][:rank], strict=True)
  return jax.sharding.PartitionSpec(*(a or b for a, b in pairs))


@functools.partial(jax.jit, static_argnums=0)
def _compiled(
  settings: Settings, arrays: dict[str, jax.Array], mask: Any
) -> jax.Array:
  """The losses of checked arguments."""
  # Not with the package: it imports a part of JAX that is slow to load.
  from optax_masking import _linear_derivatives as derivatives

  features, kernel = arrays["features"], arrays["kernel"]
  labels = arrays["labels"]
  batch, (depth, classes) = labels.shape, kernel.shape
  dtype = wide(jnp.result_type(features, kernel))
  if not math.prod(batch):
    return jnp.zeros(batch, dtype)
  bias = arrays.get("bias", jnp.zeros(classes, dtype))
  rows, masks, masks_of_rows = _flat_masks(mask, batch)
  arguments = Arguments(
    features.reshape(-1, depth),
    kernel,
    bias,
    labels.reshape(-1),
    rows,
    masks,
    masks_of_rows,
  )
  arguments = _with_labels(settings, _on_all(settings, arguments))
  losses, *_ = derivatives.losses(settings, *arguments)
  losses = losses.reshape(batch)
  if "weights" not in arrays:
    return losses
  weights = select(arguments.rows.reshape(batch), arrays["weights"], 0)
  return losses * weights.astype(losses.dtype)


def _flat_masks(mask: Any, batch: Shape) -> tuple[Any, Any, Any]:
  """The included rows, the different masks of classes, and which has which.

  A mask that broadcasts along the batch is not expanded.
  """
  size = math.prod(batch)
  if mask is None:
    mask = jnp.ones((1,) * (len(batch) + 1), bool)
  several = mask.shape[:-1]
  masks = mask.reshape(-1, mask.shape[-1])
  numbers = jnp.arange(math.prod(several), dtype=jnp.int32).reshape(several)
  masks_of_rows = jnp.broadcast_to(numbers, batch).reshape(size)
  rows = jnp.any(mask, -1)
  return jnp.broadcast_to(rows, batch).reshape(size), masks, masks_of_rows


def _with_labels(settings: Settings, a: Arguments) -> Arguments:
  """Counts the classes from 0, and leaves out rows whose own is masked."""
  first, classes = blocks.first_class(settings, a)
  labels = class_number(a.labels, classes).astype(jnp.int32)
  if not settings.has_classes:
    return a._replace(labels=labels)
  here = labels - first
  is_here = (here >= 0) & (here < a.kernel.shape[1])
  column = jnp.clip(here, 0, a.kernel.shape[1] - 1)
  if settings.own_classes:
    of_label = jnp.take_along_axis(a.classes, column[:, None], 1)[:, 0]
  else:
    of_label = a.classes[a.classes_of_row, column]
  masked = is_here & ~of_label
  some = jnp.any(a.classes, -1)
  some = some if settings.own_classes else some[a.classes_of_row]
  if settings.class_axes:
    masked, some = (
      jax.lax.pmax(x.astype(jnp.int32), settings.class_axes) > 0
      for x in (masked, some)
    )
    masked, some = (varying(x, axes_of(a.labels)) for x in (masked, some))
  # A label that names no class makes the loss NaN, but not if none is left.
  return a._replace(labels=labels, rows=some & ~masked)


def _on_all(settings: Settings, a: Arguments) -> Arguments:
  """In `shard_map`, marks arrays that are the same on several devices.

  The transpose is the sum of the gradients over these devices. What each row
  has one of is the same for all devices that share the classes.
  """
  of_classes = frozenset(settings.class_axes)
  of_rows = axes_of(*a) - of_classes
  return Arguments(
    *(
      varying(x, of_rows if name in _OF_ROWS else of_rows | of_classes)
      for name, x in a._asdict().items()
    )
  )


_OF_ROWS = ("labels", "rows", "classes_of_row")


def _check_arrays(arrays: dict[str, Any]) -> None:
  for name, x in arrays.items():
    if x is not None:
      check_array(name, x)
  for name in ("features", "kernel", "bias"):
    if arrays[name] is not None:
      check_floating(name, arrays[name])
  dtype = jnp.result_type(arrays["labels"])
  if not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(f"`labels` must be integers, not {dtype}.")
  shapes = {k: np.shape(x) for k, x in arrays.items() if x is not None}
  features, kernel, labels = (shapes[k] for k in tuple(shapes)[:3])
  if not features:
    raise ValueError("`features` must have shape [..., D], but is a number.")
  if len(kernel) != 2 or kernel[0] != features[-1] or not kernel[1]:
    raise ValueError(
      f"`kernel` has shape {kernel}, but for features of shape {features} it"
      f" must have shape ({features[-1]}, V), with V classes."
    )
  if labels != features[:-1]:
    raise ValueError(
      f"`labels` has shape {labels}, but for features of shape {features} it"
      f" must have shape {features[:-1]}."
    )
  if shapes.get("bias", kernel[1:]) != kernel[1:]:
    raise ValueError(
      f"`bias` has shape {shapes['bias']}, but for a kernel of shape {kernel}"
      f" it must have shape {kernel[1:]}."
    )
  _check_weights(arrays["weights"], labels)


def _check_weights(weights: Any, batch: Shape) -> None:
  if weights is None:
    return
  dtype = jnp.result_type(weights)
  if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(
    dtype, jnp.integer
  ):
    raise TypeError(
      f"`weights` must be floating or integer, but has dtype {dtype}."
      + (" Pass a mask as `where`." if dtype == jnp.dtype(bool) else "")
    )
  shape = np.shape(weights)
  if shape and (len(shape) != len(batch) or not broadcasts(shape, batch)):
    raise ValueError(
      f"`weights` has shape {shape}, but must have that of the labels, {batch},"
      " or be a scalar."
    )


def _mask_of_logits(where: Where, shape: Shape) -> Any:
  """The mask with the rank of the logits, and size 1 where it broadcasts."""
  if where is None:
    return None
  mask = boolean(where)
  batch, classes = shape[:-1], shape[-1]
  if len(batch) > 1 and mask.shape == (classes,):
    return mask.reshape((1,) * len(batch) + mask.shape)
  if len(batch) == 1 and mask.shape == (classes,) != batch:
    return mask[None]
  logits = jax.ShapeDtypeStruct(shape, bool)
  return Mask(mask, -1, logits, refuse_ambiguous_where=True).where


def _number(name: str, x: Any, most: float = math.inf) -> float:
  """A weight that is part of the program."""
  if isinstance(x, jax.core.Tracer) or not isinstance(
    x, float | int | np.number | np.ndarray | jax.Array
  ):
    raise TypeError(
      f"`{name}` must be a number that is known when the loss is traced, not"
      f" {x!r}."
    )
  value = float(x)
  if not 0 <= value <= most or math.isinf(value):
    limit = "finite" if math.isinf(most) else f"at most {most:g}"
    raise ValueError(f"`{name}` must be at least 0 and {limit}, but is {x}.")
  return value


def _soft_cap(x: Any) -> float | None:
  if x is None:
    return None
  if not _number("logit_soft_cap", x):
    raise ValueError("`logit_soft_cap` must be positive. Pass None for none.")
  return float(x)


def _axis_names(names: Any) -> tuple[str, ...]:
  if names is None:
    return ()
  return names if isinstance(names, tuple) else (names,)


def _block_shape(given: Any) -> tuple[int, int] | None:
  if given is None:
    return None
  try:
    rows, classes = map(operator.index, given)
  except (TypeError, ValueError):
    rows = classes = 0
  if min(rows, classes) < 1:
    raise ValueError(
      "`block_shape` must be two positive integers, rows and classes, but is"
      f" {given!r}."
    )
  return rows, classes
