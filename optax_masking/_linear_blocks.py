"""Cross-entropies of a linear layer, of which only blocks of logits exist.

Rows are ordered by the mask, the included ones first, so that the loops end
where these do. The order has panels of rows, whose features are copied side by
side. For a panel, block after block of classes is taken from the kernel, and
for each of those, block after block of rows from the panel. What a block of
logits adds to the sums is all that remains of it, and for the gradients it is
computed a second time.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_masking._classes import wide

# Rows of a block of logits. Fewer multiply slowly, and more are computed in
# vain if only some of the last block are included.
ROWS = 256
# Numbers in a panel of features, and in a block of the kernel. A block of
# logits has no more, for at most 2**13 classes.
NUMBERS = 2**21
LEAST, MOST = 128, 2**13  # Classes of a block.
AxisNames = tuple[str, ...]


class Settings(NamedTuple):
  """What does not depend on the arrays' elements, and can be hashed."""

  z_loss: float
  label_smoothing: float
  logit_soft_cap: float | None
  block_shape: tuple[int, int] | None  # None for one chosen from the shapes.
  has_bias: bool
  has_rows: bool  # Whether some rows may be masked.
  has_classes: bool  # Whether some classes may be.
  own_classes: bool  # Whether each row has a mask of its own.
  class_axes: AxisNames = ()  # Mapped axes over which classes are sharded.


class Arguments(NamedTuple):
  """The arrays: N rows of D features, V classes, M masks of classes."""

  features: Any  # [N, D]
  kernel: Any  # [D, V]
  bias: Any  # [V]
  labels: Any  # [N]. One that names no class is the number of all classes.
  rows: Any  # [N], True where a row is included.
  classes: Any  # [M, V], True where a class is included.
  classes_of_row: Any  # [N], the mask of classes of each row.


class _Plan(NamedTuple):
  panel: int  # Rows of a panel, some blocks.
  rows: int  # Of a block.
  classes: int  # Of a block.
  used: Any  # [V], classes that some row includes; or None for all.


class _Panel(NamedTuple):
  """Rows of the order, side by side."""

  index: Any  # Where each is among all rows; past the end for none.
  count: Any  # How many are included: the first ones.
  features: Any
  labels: Any
  is_named: Any  # Whether the label names a class.
  classes_of_row: Any


class _Classes(NamedTuple):
  """A block of classes."""

  start: Any
  first: Any  # Those before were in the block before. None if there are none.
  kernel: Any
  bias: Any
  used: Any  # [C], those that some row includes; or None for all.


def _dtypes(a: Arguments) -> tuple[Any, Any]:
  """Those of the factors of products, and of their sums."""
  dtype = jnp.promote_types(a.features.dtype, a.kernel.dtype)
  return dtype, wide(jnp.promote_types(dtype, a.bias.dtype))


def _plan(settings: Settings, a: Arguments) -> _Plan:
  """The sizes of blocks, which bound the temporaries, and used classes."""
  (rows, features), classes = a.features.shape, a.kernel.shape[1]
  if settings.block_shape:
    of_rows, of_classes = settings.block_shape
    panel = 2 * of_rows
  else:
    most = NUMBERS // max(features, 1)
    of_rows, of_classes = ROWS, min(max(most, LEAST), MOST)
    panel = min(max(most, of_rows), 2 * MOST)
  of_rows = min(of_rows, max(rows, 1))
  # As even as possible, since the last block has classes of the one before.
  of_classes = math.ceil(classes / math.ceil(classes / of_classes))
  if not settings.block_shape:
    of_classes = min(math.ceil(of_classes / 16) * 16, classes)
  blocks = min(panel // of_rows, math.ceil(rows / of_rows))
  used = used_classes(settings, a)
  return _Plan(max(blocks, 1) * of_rows, of_rows, of_classes, used)


def varying(x: Any, axes: frozenset[str]) -> Any:
  """Marks an array as one that varies over mapped axes of `shard_map`."""
  axes = axes - axes_of(x)
  return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def axes_of(*arrays: Any) -> frozenset[str]:
  """The mapped axes over which some of the arrays vary."""
  axes: frozenset[str] = frozenset()
  for x in arrays if hasattr(jax, "typeof") else ():
    kind = jax.typeof(x)
    # Where it is depends on the version of JAX.
    named = getattr(kind, "manual_axis_type", None)
    axes |= frozenset(getattr(named, "varying", getattr(kind, "vma", ())))
  return axes


def _full(shape: Any, value: float, dtype: Any, like: Any) -> jax.Array:
  """A constant that varies as an array does: a loop begins with it."""
  return varying(jnp.full(shape, value, dtype), axes_of(like))


def _order(settings: Settings, a: Arguments, plan: _Plan) -> Any:
  """The included rows, then the others, then none; and the included ones."""
  n = a.rows.shape[0]
  rest = -n % plan.panel
  if settings.has_rows:
    order = jnp.argsort(~a.rows, stable=True)
    count = jnp.sum(a.rows, dtype=jnp.int32)
  else:
    order, count = jnp.arange(n), n
  return jnp.pad(order.astype(jnp.int32), (0, rest), constant_values=n), count


def _panels(
  settings: Settings, a: Arguments, plan: _Plan, body: Any, carry: Any
) -> Any:
  """Calls `body(panel, carry)` for each panel with something included."""
  order, count = _order(settings, a, plan)
  first, classes = first_class(settings, a)
  stored = _as_stored(a.features)

  def step(i, carry):
    index = jax.lax.dynamic_slice(order, (i * plan.panel,), (plan.panel,))
    here = jnp.clip(count - i * plan.panel, 0, plan.panel)
    included = jnp.arange(plan.panel) < here
    # Past the end there are zeros to take, and what is put there is dropped.
    past = a.rows.shape[0] + jnp.arange(plan.panel)
    index = jnp.where(included, index, past)

    def taken(x):
      return x.at[index].get(mode="fill", fill_value=0)

    features = jax.lax.bitcast_convert_type(taken(stored), a.features.dtype)
    features = features.astype(_dtypes(a)[0])
    labels, of_row = taken(a.labels), taken(a.classes_of_row)
    named = labels < classes
    panel = _Panel(index, here, features, labels - first, named, of_row)
    return body(panel, carry)

  return jax.lax.fori_loop(0, -(-count // plan.panel), step, carry)


def _as_stored(x: jax.Array) -> jax.Array:
  """Half precision as integers of the same bits, and else the array itself.

  A loop that takes or replaces parts of an array in half precision would have
  XLA for CPUs keep all of it in float32.
  """
  if jnp.finfo(x.dtype).bits != 16:
    return x
  return jax.lax.bitcast_convert_type(x, jnp.uint16)


def _class_blocks(a: Arguments, plan: _Plan, body: Any, carry: Any) -> Any:
  """Calls `body(classes, carry)` for each block of classes."""
  features, classes = a.kernel.shape
  size, used = plan.classes, plan.used
  stored = _as_stored(a.kernel)

  def step(i, carry):
    start = jnp.minimum(i * size, classes - size)
    kernel = jax.lax.dynamic_slice(stored, (0, start), (features, size))
    kernel = jax.lax.bitcast_convert_type(kernel, a.kernel.dtype)
    bias = jax.lax.dynamic_slice(a.bias, (start,), (size,))
    first = i * size - start if classes % size else None
    used_here = None
    if used is not None:
      used_here = jax.lax.dynamic_slice(used, (start,), (size,))
      # An illegal class may hold anything, and 0 times NaN is NaN.
      kernel = jnp.where(used_here, kernel, 0)
      bias = jnp.where(used_here, bias, 0)
    dtype, sum_dtype = _dtypes(a)
    kernel, bias = kernel.astype(dtype), bias.astype(sum_dtype)
    return body(_Classes(start, first, kernel, bias, used_here), carry)

  return jax.lax.fori_loop(0, -(-classes // size), step, carry)


def _row_blocks(count: Any, size: int, body: Any, carry: Any) -> Any:
  """Calls `body(rows, carry)` until all included rows had their turn."""

  def step(i, carry):
    return body((i * size, size), carry)

  return jax.lax.fori_loop(0, -(-count // size), step, carry)


def used_classes(settings: Settings, a: Arguments) -> Any:
  """The classes that an included row includes, or None for all."""
  if not settings.has_classes:
    return None
  if a.classes.shape[0] == 1:
    return a.classes[0]
  of_masks = jnp.zeros(a.classes.shape[0], bool)
  of_masks = of_masks.at[a.classes_of_row].max(a.rows)
  return jnp.any(a.classes & of_masks[:, None], 0)


def first_class(settings: Settings, a: Arguments) -> tuple[Any, Any]:
  """The number of the first class that is here, and how many are anywhere."""
  classes = a.kernel.shape[1]
  if not settings.class_axes:
    return 0, classes
  index = jax.lax.axis_index(settings.class_axes).astype(a.labels.dtype)
  return index * classes, jax.lax.axis_size(settings.class_axes) * classes


def _rows_of(x: jax.Array, rows: tuple[Any, int]) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x, *rows)


def _included_classes(
  settings: Settings, a: Arguments, panel: _Panel, block: _Classes, rows: Any
) -> Any:
  """Which logits of a block count, broadcastable to it, or None for all."""
  width = block.kernel.shape[1]
  included = None
  if settings.has_classes and a.classes.shape[0] == 1:
    included = block.used[None]
  elif settings.has_classes:

    def of_row(i):
      start = jnp.asarray(block.start, i.dtype)  # Of 64 bits, if JAX is.
      return jax.lax.dynamic_slice(a.classes, (i, start), (1, width))[0]

    included = jax.vmap(of_row)(_rows_of(panel.classes_of_row, rows))
  if block.first is None:
    return included
  new = (jnp.arange(width) >= block.first)[None]
  return new if included is None else included & new


def _logits(
  settings: Settings, panel: _Panel, block: _Classes, rows: Any
) -> jax.Array:
  """A block of logits, in the dtype of sums."""
  features = _rows_of(panel.features, rows)
  logits = jnp.dot(
    features, block.kernel, preferred_element_type=block.bias.dtype
  )
  if settings.has_bias:
    logits += block.bias
  return capped(settings, logits)


def capped(settings: Settings, logits: jax.Array) -> jax.Array:
  """The logits, drawn in below a soft cap if there is one."""
  cap = settings.logit_soft_cap
  return logits if cap is None else cap * jnp.tanh(logits / cap)


def _positions(panel: _Panel, block: _Classes, rows: Any) -> jax.Array:
  """Where each label is in a block of classes, and less than 0 if nowhere."""
  at = _rows_of(panel.labels, rows) - block.start
  return jnp.where(at < block.kernel.shape[1], at, -1)


class Sums(NamedTuple):
  """What the blocks of classes have had of each row."""

  top: Any  # The largest logit.
  total: Any  # The sum of exponentials below it.
  of_label: Any  # The label's logit.
  logits: Any  # The sum of logits, for label smoothing.


def losses(
  settings: Settings, a: Arguments
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The losses, and the normalizers: largest logits, sums of exponentials."""
  plan = _plan(settings, a)
  dtype = _dtypes(a)[1]
  number = number_of_classes(settings, a)

  def of_panel(panel, results):
    def of_classes(block, sums):
      def of_rows(rows, sums):
        logits = _logits(settings, panel, block, rows)
        included = _included_classes(settings, a, panel, block, rows)
        at = _positions(panel, block, rows)
        old = Sums(*(_rows_of(x, rows) for x in sums))
        new = _with_block(settings, old, logits, included, at)
        pairs = zip(sums, new, strict=True)
        return Sums(*(_replaced(x, y, rows[0]) for x, y in pairs))

      return _row_blocks(panel.count, plan.rows, of_rows, sums)

    zero = _full(plan.panel, 0, dtype, a.features)
    sums = Sums(zero + jnp.finfo(dtype).min, zero, zero, zero)
    sums = _class_blocks(a, plan, of_classes, sums)
    sums = _over_devices(settings, sums)
    is_row = jnp.arange(plan.panel) < panel.count
    top = jnp.where(is_row, _finite(sums.top), 0)
    total = jnp.where(is_row, sums.total, 1)
    loss = loss_of_sums(
      settings,
      sums._replace(top=top, total=total),
      panel.is_named,
      number.at[panel.classes_of_row].get(mode="clip"),
    )
    new = loss, top, total
    return tuple(
      x.at[panel.index].set(y, mode="drop", unique_indices=True)
      for x, y in zip(results, new, strict=True)
    )

  zero = _full(a.rows.shape, 0, dtype, a.rows)
  return _panels(settings, a, plan, of_panel, (zero, zero, zero + 1))


def _replaced(x: jax.Array, rows: jax.Array, start: Any) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)


def _finite(top: jax.Array) -> jax.Array:
  """The largest logits, or 0 in the place of infinity and NaN."""
  return jnp.where(top < jnp.inf, top, 0)


def _with_block(
  settings: Settings, old: Sums, logits: jax.Array, included: Any, at: Any
) -> Sums:
  """Adds a block of logits to the sums of its rows."""
  known = logits
  if included is not None:
    known = jnp.where(included, logits, jnp.finfo(logits.dtype).min)
  top = jnp.maximum(old.top, jnp.max(known, -1))
  finite = _finite(top)[:, None]
  if included is None:
    terms = jnp.exp(logits - finite)
  else:
    below = jnp.where(included, logits, finite) - finite
    terms = jnp.where(included, jnp.exp(below), 0)
  # No block before may have had an included logit. What is so far below is 0.
  before = jnp.maximum(_finite(old.top), finite[:, 0] - 1000)
  scale = jnp.exp(jnp.minimum(before - finite[:, 0], 0))
  found = jnp.take_along_axis(logits, jnp.maximum(at, 0)[:, None], -1)[:, 0]
  total = old.logits
  if settings.label_smoothing:
    kept = logits if included is None else jnp.where(included, logits, 0)
    total = total + jnp.sum(kept, -1)
  return Sums(
    top,
    old.total * scale + jnp.sum(terms, -1),
    jnp.where(at >= 0, found, old.of_label),
    total,
  )


def _over_devices(settings: Settings, sums: Sums) -> Sums:
  """The sums over the classes of all devices."""
  axes = settings.class_axes
  if not axes:
    return sums
  top = jax.lax.pmax(sums.top, axes)
  before = jnp.maximum(_finite(sums.top), _finite(top) - 1000)
  total = sums.total * jnp.exp(jnp.minimum(before - _finite(top), 0))
  of_label, logits = sums.of_label, sums.logits
  total, of_label = jax.lax.psum((total, of_label), axes)
  if settings.label_smoothing:
    logits = jax.lax.psum(logits, axes)
  return Sums(top, total, of_label, logits)


def number_of_classes(settings: Settings, a: Arguments) -> jax.Array:
  """How many classes each mask of classes includes, on all devices."""
  dtype = _dtypes(a)[1]
  if settings.has_classes:
    number = jnp.sum(a.classes, 1).astype(dtype)
  else:
    number = _full(1, a.kernel.shape[1], dtype, a.kernel)
  if settings.class_axes:
    number = jax.lax.psum(number, settings.class_axes)
  return jnp.maximum(number, 1)


def loss_of_sums(
  settings: Settings, sums: Sums, named: Any, number: Any
) -> jax.Array:
  r"""The loss of each row, from its sums.

  With :math:`\log s` below the largest logit :math:`m`, a label's logit
  :math:`x_y`, :math:`K` classes and a label smoothing of :math:`a` it is
  :math:`\log s - (1 - a) (x_y - m) - a / K \sum_j (x_j - m)`, and for a z-loss
  of :math:`c` then :math:`c (m + \log s)^2`.
  """
  smoothing = settings.label_smoothing
  log_total = jnp.log(sums.total)
  # Divides 0 by 0, since debug tools would report a constant NaN.
  of_label = sums.of_label / named.astype(log_total.dtype)
  below = of_label - sums.top
  if smoothing:
    mean = sums.logits / number - sums.top
    below = (1 - smoothing) * below + smoothing * mean
  loss = log_total - below
  if settings.z_loss:
    loss += settings.z_loss * jnp.square(log_total + sums.top)
  return loss


def gradients(
  settings: Settings, a: Arguments, normalizer: Any, cotangent: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of the features, the kernel and the bias."""
  plan = _plan(settings, a)
  dtype = _dtypes(a)[1]
  factors = _factors(settings, a, normalizer, cotangent)

  def of_panel(panel, results):
    of_features, *of_parameters = results
    here = [f.at[panel.index].get(mode="fill", fill_value=0) for f in factors]

    def of_classes(block, carry):
      def of_rows(rows, carry):
        logits = _logits(settings, panel, block, rows)
        included = _included_classes(settings, a, panel, block, rows)
        at = _positions(panel, block, rows)
        of_block = tuple(_rows_of(f, rows)[:, None] for f in here)
        slopes = _slopes(settings, logits, included, at, of_block)
        features = _rows_of(panel.features, rows)
        new = _products(settings, features, block.kernel, slopes)
        of_features = _rows_of(carry[0], rows) + new[0]
        of_features = _replaced(carry[0], of_features, rows[0])
        return of_features, carry[1] + new[1], carry[2] + new[2]

      of_features, of_kernel, of_bias = carry
      own = (
        _full(block.kernel.shape, 0, dtype, a.features),
        _full(block.bias.shape, 0, dtype, a.features),
      )
      of_features, *own = _row_blocks(
        panel.count, plan.rows, of_rows, (of_features, *own)
      )
      if block.used is not None:
        own = jax.tree.map(lambda x: jnp.where(block.used, x, 0), own)
      both = zip((of_kernel, of_bias), own, strict=True)
      return of_features, *(_added(x, y, block.start) for x, y in both)

    own = _full(panel.features.shape, 0, dtype, a.features)
    own, *of_parameters = _class_blocks(
      a, plan, of_classes, (own, *of_parameters)
    )
    own = _as_stored(own.astype(a.features.dtype))
    of_features = of_features.at[panel.index].set(
      own, mode="drop", unique_indices=True
    )
    return of_features, *of_parameters

  # Sums over more than one panel have all digits.
  once = a.features.shape[0] <= plan.panel
  zeros = tuple(
    _full(x.shape, 0, x.dtype if once or not i else dtype, a.features)
    for i, x in enumerate((a.features, a.kernel, a.bias))
  )
  zeros = _as_stored(zeros[0]), *zeros[1:]
  x, kernel, bias = _panels(settings, a, plan, of_panel, zeros)
  x = jax.lax.bitcast_convert_type(x, a.features.dtype)
  return x, kernel.astype(a.kernel.dtype), bias.astype(a.bias.dtype)


class _Factors(NamedTuple):
  """What the slopes of a row's logits are made of."""

  top: Any
  of_exponential: Any
  of_label: Any
  of_all: Any


def _factors(
  settings: Settings, a: Arguments, normalizer: Any, cotangent: Any
) -> _Factors:
  top, total = normalizer
  cotangent = jnp.where(a.rows, cotangent, 0)
  of_exponential = cotangent / total
  if settings.z_loss:
    of_exponential *= 1 + 2 * settings.z_loss * (top + jnp.log(total))
  number = number_of_classes(settings, a)
  number = number.at[a.classes_of_row].get(mode="clip")
  smoothing = settings.label_smoothing
  of_all = smoothing * cotangent / number
  return _Factors(top, of_exponential, (1 - smoothing) * cotangent, of_all)


def _slopes(
  settings: Settings,
  logits: jax.Array,
  included: Any,
  at: jax.Array,
  factors: tuple[Any, ...],
) -> jax.Array:
  """The gradient of a block of logits."""
  top, of_exponential, of_label, of_all = factors
  known = logits
  if included is not None:
    known = jnp.where(included, logits, top)
  slopes = jnp.exp(known - top) * of_exponential
  slopes -= jnp.where(jnp.arange(logits.shape[1]) == at[:, None], of_label, 0)
  if settings.label_smoothing:
    slopes -= of_all
  if settings.logit_soft_cap is not None:
    slopes *= 1 - jnp.square(known / settings.logit_soft_cap)
  return slopes if included is None else jnp.where(included, slopes, 0)


def _products(
  settings: Settings, features: Any, kernel: Any, slopes: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
  """What the slopes of a block contribute to the gradients."""
  dtype = slopes.dtype
  of_bias = jnp.sum(slopes, 0) if settings.has_bias else 0
  # bfloat16 has the range of float32. In float16 small slopes would be 0.
  if kernel.dtype == jnp.bfloat16:
    slopes = slopes.astype(jnp.bfloat16)
  of_features = jnp.dot(slopes, kernel.T, preferred_element_type=dtype)
  of_kernel = jnp.dot(features.T, slopes, preferred_element_type=dtype)
  return of_features, of_kernel, of_bias


def _added(x: jax.Array, part: jax.Array, start: Any) -> jax.Array:
  """Adds to some columns, in place."""
  old = jax.lax.dynamic_slice_in_dim(x, start, part.shape[-1], x.ndim - 1)
  part = (old + part).astype(x.dtype)
  return jax.lax.dynamic_update_slice_in_dim(x, part, start, x.ndim - 1)
