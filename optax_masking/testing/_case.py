"""A loss with data to check it on, and the elements that a mask masks."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking.testing._report import CLAUSES

DERIVATIVES = ("value", "vjp", "jvp", "hessian")
TRANSFORMS = ("eager", "jit", "vmap")
MASKS = ("given", "none", "all", "elements", "rows", "columns")

# How many numbers the data may have, and how many large data have.
MOST = 2**20
LARGE = 2**17

# For each axis of an array the axis of the data that it is, or None if the data
# do not have it.
Axes = tuple[int | None, ...]


class MaskCase:
  """A loss with its arguments and options: see `assert_mask_safe`.

  Args:
    loss_fn: The loss.
    *args: Its arguments.
    where: Its mask.
    name: What to call it, by default the name of the function.
    **options: The other arguments of `assert_mask_safe`.

  Examples:
    >>> import numpy as np
    >>> import optax_masking as optax
    >>> from optax_masking.testing import MaskCase
    >>> MaskCase(
    ...     optax.squared_error, np.ones(3), np.zeros(3),
    ...     where=np.array([True, True, False]))
    MaskCase('squared_error')
  """

  def __init__(
    self,
    loss_fn: Callable[..., Any],
    *args: Any,
    where: Any,
    name: str | None = None,
    **options: Any,
  ):
    self.loss_fn = loss_fn
    self.args = args
    self.where = where
    self.name = name or name_of(loss_fn)
    self.options = options

  def __repr__(self) -> str:
    return f"MaskCase({self.name!r})"


def name_of(loss_fn: Callable[..., Any]) -> str:
  """The name of a function, also of a partial or a callable object."""
  if isinstance(loss_fn, functools.partial):
    return name_of(loss_fn.func)
  return getattr(loss_fn, "__name__", type(loss_fn).__name__)


@dataclasses.dataclass(frozen=True)
class Options:
  """The options of a check. The fields are those of `assert_mask_safe`."""

  where_name: str = "where"
  axes: Mapping[str, Axes | None] | None = None
  reference: Callable[..., Any] | None = None
  skip: Sequence[str] = ()
  dtypes: Sequence[Any] | None = None
  derivatives: Sequence[str] = DERIVATIVES
  transforms: Sequence[str] = TRANSFORMS
  masks: Sequence[str] = MASKS
  samples: int = 16

  @property
  def named_axes(self) -> Mapping[str, Axes | None]:
    return self.axes or {}

  def __post_init__(self):
    for field, known in (
      ("skip", tuple(c for c in CLAUSES if c != "accepts")),
      ("derivatives", DERIVATIVES),
      ("transforms", TRANSFORMS),
      ("masks", MASKS),
    ):
      given = getattr(self, field)
      if isinstance(given, str):
        raise TypeError(
          f"`{field}` must be a sequence of strings, but is {given!r}. Write"
          f" {field}=({given!r},)."
        )
      for each in given:
        if each not in known:
          raise ValueError(
            f"`{field}` has {each!r}; it may have {', '.join(known)}."
          )
      if not given and field in ("transforms", "masks"):
        raise ValueError(f"`{field}` is empty; it may have {', '.join(known)}.")
    if isinstance(self.dtypes, str):
      raise TypeError(
        f"`dtypes` must be a sequence, but is {self.dtypes!r}. Write"
        f" dtypes=({self.dtypes!r},)."
      )
    for dtype in self.dtypes or ():
      if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(
          f"`dtypes` has {jnp.dtype(dtype).name}; it may have floating dtypes."
          " They are those of the floating arguments; the others stay as given."
        )
    if self.samples < 1:
      raise ValueError(f"`samples` must be 1 or more, but is {self.samples}.")


@dataclasses.dataclass(frozen=True)
class Argument:
  """An array that a loss is called with.

  `axes` has, for each axis of the array, the axis of the data that it is. All
  examples share an array that is not `maskable`: no mask masks any of it.
  """

  name: str
  value: np.ndarray
  axes: Axes
  maskable: bool

  @property
  def floating(self) -> bool:
    return jnp.issubdtype(self.value.dtype, jnp.floating)


def _is_array(x: Any) -> bool:
  """Whether an object is data: no random key, and no array of text."""
  if not isinstance(x, jax.Array | np.ndarray | np.generic):
    return False
  if x.dtype == np.uint32 and x.shape == (2,):  # An older kind of key.
    return False
  return jnp.issubdtype(x.dtype, jnp.number) or x.dtype == np.bool_


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
  return len(shape) == len(to) and all(
    s in (1, t) for s, t in zip(shape, to, strict=True)
  )


def _find_axes(
  shape: tuple[int, ...], data: tuple[int, ...], reduced: tuple[int, ...] | None
) -> tuple[Axes, bool]:
  """Which axes of the data an array has, and whether examples own it."""
  rank = len(data)
  if len(shape) == rank:
    axes = tuple(
      k if s in (1, d) else None
      for k, (s, d) in enumerate(zip(shape, data, strict=True))
    )
    shared = rank > 0 and (axes[0] is None or shape[0] == 1 != data[0])
    return axes, not shared
  if reduced is not None:
    batch = tuple(k for k in range(rank) if k not in reduced)
    if shape and _broadcasts(shape, [data[k] for k in batch]):
      return batch, True
  matching = 0
  while matching < len(shape) and shape[matching] == data[matching]:
    matching += 1
  if matching:
    return (*range(matching), *[None] * (len(shape) - matching)), True
  if _broadcasts(shape, data[rank - len(shape) :]):
    return tuple(range(rank - len(shape), rank)), False
  return (None,) * len(shape), False


class Problem:
  """A loss with the data of one dtype, called on a flat list of arrays."""

  def __init__(
    self,
    loss_fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    where: Any,
    options: Options,
    dtype: Any,
  ):
    self.loss_fn = loss_fn
    self.options = options
    self.where = _boolean(where)
    leaves, self._tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
    names = _names(loss_fn, args)
    self._leaves = [leaf for _, leaf in leaves]
    self._positions = [i for i, x in enumerate(self._leaves) if _is_array(x)]
    if not self._positions:
      raise ValueError(
        f"{name_of(loss_fn)} was given no array to mask. Pass arrays of JAX or"
        " NumPy, not lists or numbers."
      )
    arrays = {
      names(leaves[i][0]): _host(self._leaves[i], dtype)
      for i in self._positions
    }
    if not any(jnp.issubdtype(x.dtype, jnp.floating) for x in arrays.values()):
      kinds = ", ".join(f"{n} {x.dtype}" for n, x in arrays.items())
      raise ValueError(
        f"{name_of(loss_fn)} was given no array of floating numbers, and so"
        f" has no gradient to check: {kinds}."
      )
    unknown = options.named_axes.keys() - arrays.keys() - {"where", "return"}
    if unknown:
      raise ValueError(
        f"`axes` names {sorted(unknown)}, but the arrays are"
        f" {', '.join(arrays)}, and 'where' and 'return'."
      )
    self.size = sum(x.size for x in arrays.values())
    if self.size > MOST:
      raise ValueError(
        f"The arrays have {self.size:,} numbers, and all derivatives are"
        f" computed many times: pass {MOST:,} at most. Some rows and some"
        " columns of them show the same faults."
      )
    free = {n: x for n, x in arrays.items() if n not in options.named_axes}
    rank = max(x.ndim for x in (free or arrays).values())
    largest = [x.shape for x in (free or arrays).values() if x.ndim == rank]
    try:
      self.shape = np.broadcast_shapes(*largest)
    except ValueError:
      self.shape = largest[0]
    if not all(self.shape):
      raise ValueError(
        f"The data have shape {self.shape}, without any element to check."
      )
    self.reduced = _reduced_axes(loss_fn, kwargs, rank)
    self.arguments = [
      self._argument(name, x, options) for name, x in arrays.items()
    ]
    self.floats = [i for i, a in enumerate(self.arguments) if a.floating]
    self.where_axes = self._axes_of_where()

  def _argument(self, name: str, x: np.ndarray, options: Options) -> Argument:
    if name not in options.named_axes:
      return Argument(name, x, *_find_axes(x.shape, self.shape, self.reduced))
    axes = options.named_axes[name]
    if axes is None:
      return Argument(name, x, (None,) * x.ndim, False)
    rank = len(self.shape)
    axes = tuple(a if a is None else _axis(name, a, rank) for a in axes)
    if len(set(axes) - {None}) != len([a for a in axes if a is not None]):
      raise ValueError(
        f"`axes` has an axis of the data twice for `{name}`. An array of pairs"
        " of examples can't be checked: make it of the examples in a function"
        " of these."
      )
    if len(axes) != x.ndim:
      raise ValueError(
        f"`axes` has {len(axes)} for `{name}`, of shape {x.shape}."
      )
    return Argument(name, x, axes, True)

  def _axes_of_where(self) -> tuple[int, ...]:
    rank, shape = len(self.shape), self.where.shape
    given = self.options.named_axes.get("where")
    if given is not None:
      axes = tuple(_axis("where", a, rank) for a in given if a is not None)
      candidates = [axes] if len(axes) == len(given) == len(shape) else []
    else:
      batch = [k for k in range(rank) if k not in (self.reduced or ())]
      candidates = [
        tuple(c)
        for c in (
          range(rank),
          batch,
          range(len(shape)),
          range(rank - len(shape), rank),
        )
        if len(c) == len(shape) <= rank
      ]
    for axes in candidates:
      if _broadcasts(shape, [self.shape[k] for k in axes]):
        return axes
    data = next(a.name for a in self.arguments if a.value.ndim == rank)
    raise ValueError(
      f"`where` has shape {shape}, which does not fit data of shape"
      f" {self.shape}, that of `{data}`. It must broadcast to the data, or have"
      " the shape of their first axes (one entry an example). Otherwise name"
      " the axes of the data that its axes are, axes={'where': (0, 2)}, and the"
      f" arrays that are no data, axes={{{data!r}: None}}."
    )

  @property
  def values(self) -> list[np.ndarray]:
    return [a.value for a in self.arguments]

  def replace(self, argument: int, broken: np.ndarray) -> None:
    """Replaces broken elements of an argument by numbers of included ones."""
    a = self.arguments[argument]
    kept = a.value[~broken & ~self.masked(self.where, argument)]
    if not broken.any():
      return
    if not kept.size:
      kept = np.array([0.5 if a.floating else 0], a.value.dtype)
    value = np.array(a.value)
    value[broken] = np.resize(kept, int(broken.sum()))
    self.arguments[argument] = dataclasses.replace(a, value=value)

  def call(self, values: Sequence[Any], **mask: Any) -> Any:
    """Calls the loss on other arrays; without `where`, without a mask."""
    args, kwargs = self._arguments_of(values)
    if mask:
      kwargs = {**kwargs, self.options.where_name: mask["where"]}
    return self.loss_fn(*args, **kwargs)

  def call_reference(self, values: Sequence[Any]) -> Any:
    """Calls the reference, on the same arguments."""
    args, kwargs = self._arguments_of(values)
    return self.options.reference(*args, **kwargs)  # type: ignore[misc]

  def _arguments_of(self, values: Sequence[Any]) -> tuple[Any, Any]:
    leaves = list(self._leaves)
    for position, x in zip(self._positions, values, strict=True):
      leaves[position] = x
    return jax.tree_util.tree_unflatten(self._tree, leaves)

  def full(self, where: np.ndarray) -> np.ndarray:
    """A mask in the shape of the data."""
    order = np.argsort(self.where_axes)
    expanded = np.transpose(where, order) if where.ndim else where
    missing = {*range(len(self.shape))} - {*self.where_axes}
    return np.broadcast_to(np.expand_dims(expanded, tuple(missing)), self.shape)

  def included(
    self, where: np.ndarray, shape: Sequence[int], axes: Axes
  ) -> np.ndarray:
    """The elements of an array that meet an included element of the data."""
    own = [
      k for k, s in zip(axes, shape, strict=True) if k is not None and s != 1
    ]
    full = self.full(where)
    others = tuple(k for k in range(full.ndim) if k not in own)
    left = np.transpose(full.any(others), np.argsort(np.argsort(own)))
    for position, (k, s) in enumerate(zip(axes, shape, strict=True)):
      if k is None or s == 1:
        left = np.expand_dims(left, position)
    return np.broadcast_to(left, shape)

  def masked(self, where: np.ndarray, argument: int) -> np.ndarray:
    """The elements of an argument that a mask masks."""
    a = self.arguments[argument]
    if not a.maskable:
      return np.zeros(a.value.shape, bool)
    return ~self.included(where, a.value.shape, a.axes)

  def axes_of_result(self, shape: tuple[int, ...]) -> Axes | None:
    """Which axes of the data a result has; None if they are unknown."""
    if "return" in self.options.named_axes:
      axes = self.options.named_axes["return"]
      return axes if axes is None or len(axes) == len(shape) else None
    if shape == self.shape:
      return tuple(range(len(shape)))
    if not shape:
      return ()
    axes, _ = _find_axes(shape, self.shape, self.reduced)
    return None if None in axes else axes


def _axis(name: str, axis: int, rank: int) -> int:
  if not -rank <= axis < rank:
    raise ValueError(
      f"`axes` has {axis} for `{name}`, but the data have {rank} axes."
    )
  return axis % rank


def _boolean(where: Any) -> np.ndarray:
  mask = np.asarray(where)
  if mask.dtype != bool:
    raise TypeError(
      f"`where` must be boolean, but has dtype {mask.dtype}. Write where != 0."
    )
  return mask


def _host(x: Any, dtype: Any) -> np.ndarray:
  x = np.asarray(x)
  if jnp.issubdtype(x.dtype, jnp.floating) and dtype is not None:
    with np.errstate(over="ignore"):
      x = x.astype(dtype)
  # As JAX takes it, so without float64 unless it is on.
  return x.astype(jax.dtypes.canonicalize_dtype(x.dtype))


def _names(loss_fn: Callable[..., Any], args: Sequence[Any]) -> Callable:
  """A function from the path of an argument in (args, kwargs) to its name."""
  positional: list[str] = []
  try:
    for p in inspect.signature(loss_fn).parameters.values():
      if p.kind is p.VAR_POSITIONAL:
        rest = len(args) - len(positional)
        positional += [f"{p.name}[{i}]" for i in range(rest)]
      elif p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
        positional.append(p.name)
  except (TypeError, ValueError):  # A callable without a signature.
    pass
  positional += [f"args[{i}]" for i in range(len(positional), len(args))]

  def name(path: tuple[Any, ...]) -> str:
    keyword, first, *rest = path
    head = first.key if keyword.idx else positional[first.idx]
    return f"{head}{jax.tree_util.keystr(tuple(rest))}"

  return name


def _reduced_axes(
  loss_fn: Callable[..., Any], kwargs: Mapping[str, Any], rank: int
) -> tuple[int, ...] | None:
  """The axes that the argument `axis` of a loss names, None if unknown."""
  axis: Any = kwargs.get("axis", inspect.Parameter.empty)
  if axis is inspect.Parameter.empty:
    try:
      axis = inspect.signature(loss_fn).parameters["axis"].default
    except (KeyError, TypeError, ValueError):
      return None
  if axis is None:
    return None  # All axes, or another meaning in this loss.
  try:
    axes = [int(a) for a in np.atleast_1d(np.asarray(axis, int))]
  except (TypeError, ValueError):
    return None
  if any(not -rank <= a < rank for a in axes):
    return None
  return tuple(sorted(a % rank for a in axes))
