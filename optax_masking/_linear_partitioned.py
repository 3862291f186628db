"""The blocks on many devices, where the compiler decides who has what.

Left to itself it would order the rows of all devices together, and exchange
them. So it is told how rows and classes may be divided: then each device orders
its own rows, and the devices exchange a number a row, over the classes, and the
gradients of what they share.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec as P

from optax_masking import _linear_blocks as blocks
from optax_masking._linear_blocks import Arguments, Settings

# Axes by letter: n rows, d features, v classes, m masks of classes.
_RULES = {
  "losses": "n d, d v, v, n, n, m v, n -> n, n, n",
  "gradients": "n d, d v, v, n, n, m v, n, n, n, n -> n d, d v, v",
}


def losses(settings: Settings, *arguments: Any) -> Any:
  """As `_linear_blocks.losses`, of the same arrays one by one."""
  return _called("losses", settings, arguments)


def gradients(settings: Settings, *arguments: Any) -> Any:
  """As `_linear_blocks.gradients`, of the same arrays one by one."""
  return _called("gradients", settings, arguments)


def _here(name: str, settings: Settings, *arguments: Any) -> Any:
  """On one device, or on each."""
  if settings.own_classes:  # On each device the first row has the first one.
    a = Arguments(*arguments[:7])
    number = jnp.arange(a.rows.shape[0], dtype=a.classes_of_row.dtype)
    arguments = *a[:-1], number, *arguments[7:]
  if name == "losses":
    return blocks.losses(settings, Arguments(*arguments))
  *rest, top, total, cotangent = arguments
  return blocks.gradients(settings, Arguments(*rest), (top, total), cotangent)


def _called(name: str, settings: Settings, arguments: Any) -> Any:
  here = functools.partial(_here, name, settings)
  # JAX 0.5 would have the whole on each device.
  if jax.device_count() == 1 or not hasattr(jax, "shard_map") or _is_mapped():
    return here(*arguments)

  @custom_vmap
  def divided(*arguments):
    return _divided[name](settings, *arguments)

  @divided.def_vmap
  def _(axis_size, in_batched, *arguments):
    del axis_size
    axes = tuple(0 if batched else None for batched in in_batched)
    results = jax.vmap(here, axes)(*arguments)
    return results, jax.tree.map(lambda _: True, results)

  return divided(*arguments)


def _is_mapped() -> bool:
  """Whether this is inside of `shard_map`, where each device is by itself."""
  mesh = jax.sharding.get_abstract_mesh()
  return bool(getattr(mesh, "manual_axes", ()))


def _names(spec: Any) -> tuple[str, ...]:
  """The mesh axes in an entry of a specification."""
  if spec is None:
    return ()
  return spec if isinstance(spec, tuple) else (spec,)


def _partition(
  name: str, settings: Settings, mesh: Any, shapes: Any, result_shapes: Any
) -> Any:
  """What each device computes, of which parts."""
  one_by_one = jax.tree.leaves(result_shapes)
  if not hasattr(shapes[0].sharding, "spec"):  # All devices do the same.
    whole = shapes[0].sharding
    if not all(s.sharding.is_fully_replicated for s in shapes):
      raise NotImplementedError("Shard the arrays over a mesh with names.")
    alike = (whole,) * len(one_by_one), (whole,) * len(shapes)
    return mesh, functools.partial(_here, name, settings), *alike
  features, kernel, bias, labels = (s.sharding.spec for s in shapes[:4])
  rows = _names((*labels, None)[0]) or _names((*features, None)[0])
  of_classes = _names((*kernel, None, None)[1]) or _names((*bias, None)[0])
  of_classes = tuple(a for a in of_classes if a not in rows)
  n, v = rows or None, of_classes or None
  by_letter = {"n": n, "v": v, "d": None, "m": None}

  def shardings(text):
    parts = [P(*(by_letter[a] for a in x.split())) for x in text.split(",")]
    return tuple(NamedSharding(mesh, p) for p in parts)

  given, found = map(shardings, _rule(name, settings).split("->"))
  local = settings._replace(class_axes=of_classes)

  def on_device(*arguments):
    results = _here(name, local, *arguments)
    if name == "losses":
      return results
    of_features, *of_parameters = results
    if of_classes:
      of_features = jax.lax.psum(of_features, of_classes)
    if rows:
      of_parameters = jax.lax.psum(of_parameters, rows)
    return of_features, *of_parameters

  return mesh, on_device, found, given


def _rule(name: str, settings: Settings, *shapes: Any) -> str:
  """Which axes are divided alike."""
  del shapes
  rule = _RULES[name]
  return rule.replace("m v", "n v") if settings.own_classes else rule


def _make(name: str) -> Any:
  def whole(settings, *arguments):
    return _here(name, settings, *arguments)

  function = custom_partitioning(whole, static_argnums=(0,))
  function.def_partition(
    partition=functools.partial(_partition, name),
    sharding_rule=functools.partial(_rule, name),
    infer_sharding_from_operands=None,
  )
  return function


_divided = {name: _make(name) for name in _RULES}
