"""A call of a loss as a list of named arrays, and how its mask enters it.

A mask is passed by a name, is an entry of an argument, or is derived by the
loss from its data. In each way the loss is called with other masks than the
given one, while its other arrays are replaced.
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking.testing._options import Options

Rebuild = Callable[[Sequence[Any]], Any]


def name_of(loss_fn: Callable[..., Any]) -> str:
  """The name of a function, also of a partial or a callable object."""
  if isinstance(loss_fn, functools.partial):
    return name_of(loss_fn.func)
  return getattr(loss_fn, "__name__", type(loss_fn).__name__)


class UnusableResult(TypeError):
  """A loss returned something in which the loss is not where it should be."""


def contents(result: Any) -> str:
  """What a loss returned, in words."""
  dtype = getattr(result, "dtype", None)
  if dtype is not None:
    return f"an array of {dtype}"
  if isinstance(result, dict):
    return f"a dict of {', '.join(map(str, result))}"
  if isinstance(result, tuple | list):
    return f"a {type(result).__name__} of {len(result)}"
  return f"{type(result)}"


class Call:
  """A loss with its arguments.

  Attributes:
    names: Names of the arrays, without the mask.
    all_names: Names of all leaves of the arguments.
    arrays: The arrays, as they were given.
    where: The mask that was given, boolean.
    parameters: Names of the positional arguments.
    mask_name: The name of the mask in messages.
    sources: Positions of the arrays that the mask is derived from.
  """

  def __init__(
    self,
    loss_fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    where: Any,
    options: Options,
  ):
    if not callable(loss_fn):
      raise TypeError(f"`loss_fn` must be a function, but is {loss_fn!r}.")
    self.loss_fn = loss_fn
    self.options = options
    self.name = name_of(loss_fn)
    self._by_name = not isinstance(where, str) and not callable(where)
    skipped = options.where_name if self._by_name else None
    self.parameters = _argument_names(loss_fn, len(args), skipped)
    self._mask_argument = _position_of_mask(loss_fn, skipped, len(args))
    leaves, self._rebuild = flatten((tuple(args), dict(kwargs)))
    self._leaves = [leaf for _, leaf in leaves]
    names = [self._name(path) for path, _ in leaves]
    self._mask_leaf: int | None = None
    self._derive: Callable[..., Any] | None = None
    self.sources: tuple[int, ...] = ()
    if where is None:
      raise TypeError(
        "`where` is None: pass the mask to try, the name of the argument that"
        " is the mask, or a function that makes it of arguments."
      )
    if isinstance(where, str):
      where = where.replace('"', "'")
      self._mask_leaf = _find_leaf(where, names, self._leaves, self.name)
      self.mask_name, where = where, self._leaves[self._mask_leaf]
    else:
      self.mask_name = options.where_name
    positions = [
      i
      for i, leaf in enumerate(self._leaves)
      if is_array(leaf) and i != self._mask_leaf
    ]
    self._array_leaves = positions  # In the order of `arrays`.
    self.names = [names[i] for i in positions]
    self.all_names = names
    self.arrays = [self._leaves[i] for i in positions]
    if callable(where):
      if options.inverted_where:
        raise TypeError(
          "`inverted_where` is for a mask that the loss takes. A function as"
          " `where` returns True for what is included."
        )
      self._derive, self.mask_name = where, "where(...)"
      where = self.derived(self.arrays)
      self.sources = self._find_sources()
    given, self._mask_dtype = _as_boolean(
      where, self.mask_name, options.numeric_where
    )
    self.where = ~given if options.inverted_where else given

  def _name(self, path: str) -> str:
    """Names a leaf of (args, kwargs) as its caller does."""
    group, head, rest = re.fullmatch(
      r"\[(\d)\]\[(\d+|'.*?')\](.*)", path, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    if group == "0":
      return self.parameters[int(head)] + rest
    return head.strip("'") + rest

  def host_mask(self, where: np.ndarray) -> np.ndarray:
    """A mask, True for what is included, as the loss takes it.

    As an input of a program: XLA would make a select of a product with a mask
    that it converts itself.
    """
    where = np.asarray(where)
    inverted = self.options.inverted_where
    return (~where if inverted else where).astype(self._mask_dtype)

  def inverted(self) -> "Call":
    """The same call, if the loss takes True for what is masked."""
    other = self.with_options(inverted_where=not self.options.inverted_where)
    other.where = ~self.where
    return other

  def with_options(self, **options: Any) -> "Call":
    """The same with other options."""
    other = copy.copy(self)
    other.options = dataclasses.replace(self.options, **options)
    return other

  @property
  def mask_dtype(self) -> str:
    """The dtype of the mask that was given."""
    return self._mask_dtype.name

  @property
  def mask_is_derived(self) -> bool:
    """Whether the loss makes its mask of other arguments."""
    return self._derive is not None

  def __call__(self, arrays: Sequence[Any], where: Any) -> Any:
    """Calls the loss on other arrays, and with a mask as `host_mask` makes it.

    A mask that is derived comes of the arrays.
    """
    arrays = list(map(jnp.asarray, arrays))
    args, kwargs = self._arguments(arrays, jnp.asarray(where))
    return self._output(self.loss_fn(*args, **kwargs))

  def without_mask(self, omit: bool) -> Callable[[Sequence[Any]], Any] | None:
    """The loss as it is called without a mask, or with None for one."""
    in_between = self._mask_leaf is not None or self._mask_argument is not None
    if self._derive is not None or (omit and in_between):
      return None

    def call(arrays):
      if omit:
        args, kwargs = self._rebuild(self._with(arrays))
      else:
        args, kwargs = self._arguments(arrays, None)
      return self._output(self.loss_fn(*args, **kwargs))

    return call

  @property
  def mask_is_optional(self) -> bool:
    """Whether the loss declares None as the default of its mask."""
    return self._by_name and any(
      p.name == self.options.where_name and p.default is None
      for p in parameters_of(self.loss_fn)
    )

  def reference(self, arrays: Sequence[Any]) -> Any:
    """Calls the reference on the same arguments, without a mask."""
    args, kwargs = self._rebuild(self._with(arrays))
    return self.options.reference(*args, **kwargs)  # type: ignore[misc]

  def _with(self, arrays: Sequence[Any]) -> list[Any]:
    leaves = list(self._leaves)
    for position, x in zip(self._array_leaves, arrays, strict=True):
      leaves[position] = x
    return leaves

  def _arguments(self, arrays: Sequence[Any], mask: Any) -> tuple[Any, Any]:
    """The arguments with other arrays, and with a mask where it belongs."""
    leaves = self._with(arrays)
    if self._mask_leaf is not None:
      leaves[self._mask_leaf] = mask
    args, kwargs = self._rebuild(leaves)
    if self._by_name:
      i = self._mask_argument
      if i is None:
        kwargs = {**kwargs, self.options.where_name: mask}
      else:
        args = (*args[:i], mask, *args[i:])
    return args, kwargs

  def _output(self, result: Any) -> Any:
    """The loss in what the function returned."""
    if self.options.has_aux:
      if not isinstance(result, tuple | list) or not result:
        raise UnusableResult(
          f"With has_aux=True {self.name} must return a tuple whose first entry"
          f" is the loss, but it returned {contents(result)}."
        )
      result = result[0]
    output = self.options.output
    if callable(output):
      return output(result)
    try:
      return result if output is None else result[output]
    except (KeyError, IndexError, TypeError) as error:
      raise UnusableResult(
        f"output={output!r} is not in what {self.name} returned:"
        f" {contents(result)}."
      ) from error

  # Masks that the loss derives from its data.

  def derived(self, arrays: Sequence[Any]) -> Any:
    """The mask that the given function makes of the arguments."""
    args, kwargs = self._rebuild(self._with(arrays))
    by_name = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
    assert self._derive is not None
    own = inspect.signature(self._derive).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in own):
      return self._derive(**by_name)
    wanted = [p.name for p in own if p.name in by_name or p.default is p.empty]
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
      raise ValueError(
        f"`where` is a function of {', '.join(unknown)}, but the arguments of"
        f" {self.name} are {', '.join(by_name)}."
      )
    return self._derive(**{name: by_name[name] for name in wanted})

  def _find_sources(self) -> tuple[int, ...]:
    """The arrays that the mask depends on."""
    try:
      jaxpr = jax.make_jaxpr(self.derived)(self.arrays).jaxpr
    except Exception:  # A function in NumPy can't be traced.
      return tuple(i for i in range(len(self.arrays)) if self._decides(i))
    needed = {v for v in jaxpr.outvars if not hasattr(v, "val")}
    for eqn in reversed(jaxpr.eqns):
      if needed & set(eqn.outvars):
        needed |= {v for v in eqn.invars if not hasattr(v, "val")}
    return tuple(i for i, v in enumerate(jaxpr.invars) if v in needed)

  def _decides(self, position: int) -> bool:
    """Whether the derived mask changes with the content of an array."""
    x = np.asarray(self.arrays[position])
    others = [np.zeros_like(x), np.ones_like(x), x[::-1] if x.ndim else x]
    if jnp.issubdtype(x.dtype, jnp.floating):
      others.append(np.full_like(x, np.nan))
    given = np.asarray(self.derived(self.arrays))
    for other in others:
      arrays = list(self.arrays)
      arrays[position] = other
      if not self.derives(arrays, given):
        return True
    return False

  def arrays_for(
    self, arrays: Sequence[np.ndarray], where: np.ndarray
  ) -> list[np.ndarray] | None:
    """Arrays from which the loss derives a mask; None if none are found.

    Where an element of the given data is masked, its value masks other elements
    too. Lengths are counted.
    """
    if self._derive is None:
      return list(arrays)
    labels, lengths = {}, {}
    for i in self.sources:
      if (x := self._with_labels(arrays[i], i, where)) is not None:
        labels[i] = x
      if (x := _with_lengths(arrays[i], where)) is not None:
        lengths[i] = x
    for changes in ({}, labels, lengths, {**lengths, **labels}, None):
      if changes is None:  # To find the switches takes long.
        changes = self._switches.set_to(where) if self._switches else {}
      replaced = [changes.get(i, x) for i, x in enumerate(arrays)]
      if self.derives(replaced, where):
        return replaced
    return None

  @functools.cached_property
  def everything(self) -> np.ndarray:
    """The mask that includes the most.

    A mask of shifted labels never has the last elements.
    """
    where = np.ones(self.where.shape, bool)
    if self.arrays_for(self.arrays, where) or self._switches is None:
      return where
    return self._switches.most

  @functools.cached_property
  def _switches(self) -> "_Switches | None":
    for source in self.sources:
      found = _find_switches(self, source)
      if found is not None:
        return found
    return None

  def derives(self, arrays: Sequence[np.ndarray], where: np.ndarray) -> bool:
    """Whether the loss has this mask with these arrays."""
    if self._derive is None:
      return True
    with contextlib.suppress(Exception):  # Of values that are not expected.
      return np.array_equal(self.derived(arrays), where)
    return False

  def _with_labels(
    self, x: np.ndarray, source: int, where: np.ndarray
  ) -> np.ndarray | None:
    """Labels some elements as the given data label theirs."""
    if not x.shape == where.shape == self.where.shape:
      return None
    given = np.asarray(self.arrays[source])
    kept, masked = given[self.where], given[~self.where]
    if kept.size:
      x = np.where(where & ~self.where, np.resize(kept, x.shape), x)
    if masked.size:
      x = np.where(~where & self.where, masked[0], x)
    return x.astype(given.dtype)


@dataclasses.dataclass(frozen=True)
class _Switches:
  """Elements of an array each of which decides about one of a derived mask.

  Attributes:
    source: The position of the array.
    on: The array with which the most is included.
    off: The element that masks.
    most: The mask that the array `on` makes.
    switch_of: For each included element of `most`, the index of its switch in
      the flat array.
  """

  source: int
  on: np.ndarray
  off: Any
  most: np.ndarray
  switch_of: np.ndarray

  def set_to(self, where: np.ndarray) -> dict[int, np.ndarray]:
    """The array for a mask of the same shape."""
    if where.shape != self.most.shape:
      return {}
    x = self.on.copy()
    x.flat[self.switch_of[self.most & ~where]] = self.off
    return {self.source: x}


# The largest array in which switches are looked for, one by one.
_MOST_SWITCHES = 512


def _find_switches(call: Call, source: int) -> _Switches | None:
  given = np.asarray(call.arrays[source])
  if given.size > _MOST_SWITCHES:
    return None

  def mask_of(x):
    arrays = list(call.arrays)
    arrays[source] = x
    return np.asarray(call.derived(arrays)) != 0

  for off in [*np.unique(given[given == given]).tolist()[:16], np.nan]:
    is_off = (given == off) if off == off else (given != given)
    if is_off.all() or not is_off.any():
      continue
    on = np.where(is_off, np.resize(given[~is_off], given.shape), given)
    most = mask_of(on)
    if not most.any() or mask_of(np.full_like(given, off)).any():
      continue
    switch_of = np.full(most.shape, -1)
    for i in range(given.size):
      x = on.copy()
      x.flat[i] = off
      switch_of[most & ~mask_of(x)] = i
    if (switch_of[most] >= 0).all():
      return _Switches(source, on, off, most, switch_of)
  return None


def _with_lengths(x: np.ndarray, where: np.ndarray) -> np.ndarray | None:
  """Counts the elements of each row."""
  is_integer = jnp.issubdtype(x.dtype, jnp.integer)
  if not x.shape or x.shape != where.shape[:-1] or not is_integer:
    return None
  return where.sum(-1).astype(x.dtype)


def flatten(tree: Any) -> tuple[list[tuple[str, Any]], Rebuild]:
  """The leaves of a tree with their paths, and a function that replaces them.

  Dataclasses that JAX does not know, and modules of Flax, are trees, too.
  """
  paths, structure = jax.tree_util.tree_flatten_with_path(tree)
  leaves: list[tuple[str, Any]] = []
  parts: list[tuple[int, Rebuild]] = []
  for path, leaf in paths:
    prefix = jax.tree_util.keystr(path)
    opened = _open(leaf)
    if opened is None:
      leaves.append((prefix, leaf))
      parts.append((1, lambda xs: xs[0]))
      continue
    inner, close = opened
    named, rebuild = flatten(inner)
    for name, x in named:
      leaves.append((prefix + re.sub(r"^\['(\w+)'\]", r".\1", name), x))

    def whole(xs, close=close, rebuild=rebuild):
      return close(rebuild(xs))

    parts.append((len(named), whole))

  def rebuild_all(xs):
    values, start = [], 0
    for count, part in parts:
      values.append(part(xs[start : start + count]))
      start += count
    return jax.tree_util.tree_unflatten(structure, values)

  return leaves, rebuild_all


def _open(leaf: Any) -> tuple[Any, Callable[[Any], Any]] | None:
  """What an object holds, and a function that makes one of other content."""
  nnx = sys.modules.get("flax.nnx")
  if nnx is not None and isinstance(leaf, nnx.Module):
    graph, state = nnx.split(leaf)
    return state, lambda state: nnx.merge(graph, state)
  if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
    return None
  fields = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)}

  def close(fields):
    other = copy.copy(leaf)
    for name, x in fields.items():
      object.__setattr__(other, name, x)
    return other

  return fields, close


def is_array(x: Any) -> bool:
  """Whether a leaf is data: no random key, no text, no Python number."""
  if isinstance(x, np.generic):  # A size or a flag of NumPy is static.
    return jnp.issubdtype(x.dtype, jnp.floating)
  if not isinstance(x, jax.Array | np.ndarray):
    return False
  if x.dtype == np.uint32 and x.shape == (2,):  # An older kind of key.
    return False
  return jnp.issubdtype(x.dtype, jnp.number) or x.dtype == np.bool_


def parameters_of(loss_fn: Callable[..., Any]) -> list[inspect.Parameter]:
  """The parameters of a loss, none if they are unknown."""
  try:
    return list(inspect.signature(loss_fn).parameters.values())
  except (TypeError, ValueError):  # A callable without a signature.
    return []


def missing_arguments(loss_fn: Callable[..., Any], count: int) -> list[str]:
  """Names of the parameters that so many positional arguments leave."""
  parameters = parameters_of(loss_fn)
  return [p.name for i, p in enumerate(parameters) if i >= count]


def _argument_names(
  loss_fn: Callable[..., Any], count: int, skipped: str | None
) -> list[str]:
  """Names for so many positional arguments, without the mask."""
  names: list[str] = []
  for p in parameters_of(loss_fn):
    if p.kind is p.VAR_POSITIONAL:
      names += [f"{p.name}[{i}]" for i in range(count - len(names))]
    elif p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
      names += [p.name] if p.name != skipped else []
  return names + [f"args[{i}]" for i in range(len(names), count)]


def _position_of_mask(
  loss_fn: Callable[..., Any], name: str | None, count: int
) -> int | None:
  """The position at which to insert a mask; None to pass it by its name."""
  for position, p in enumerate(parameters_of(loss_fn)):
    if p.name != name:
      continue
    between = position < count and p.kind is p.POSITIONAL_OR_KEYWORD
    if between or (p.kind is p.POSITIONAL_ONLY and position <= count):
      return position
  return None


def _find_leaf(
  name: str, names: Sequence[str], leaves: Sequence[Any], loss: str
) -> int:
  """The position of the leaf that is the mask."""
  arrays = [n for n, x in zip(names, leaves, strict=True) if is_array(x)]
  if name not in arrays:
    close = difflib.get_close_matches(name, arrays, 1)
    raise ValueError(
      f"`where` is {name!r}, but the arrays that {loss} was given are"
      f" {', '.join(arrays)}."
      + (f" Did you mean {close[0]!r}?" if close else "")
    )
  return names.index(name)


def _as_boolean(
  where: Any, name: str, numeric: bool
) -> tuple[np.ndarray, np.dtype]:
  """A mask as booleans, and the dtype that the loss wants it in."""
  mask = np.asarray(where)
  if mask.dtype == bool:
    return mask, mask.dtype
  if not numeric:
    raise TypeError(
      f"`{name}` must be boolean, but has dtype {mask.dtype}. If the loss takes"
      " a mask of zeros and ones, pass numeric_where=True; if it does not,"
      f" `{name} != 0`."
    )
  others = mask[(mask != 0) & (mask != 1)]
  if others.size:
    raise ValueError(
      f"With numeric_where=True, `{name}` may have zeros and ones, but has"
      f" {others.flat[0]}."
    )
  return mask.astype(bool), mask.dtype
