"""Clause 8: the contract under every JAX transformation."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
  DTYPES,
  assert_all_close,
  assert_close,
  each_case,
  masks,
  row_masks,
)
from jax.experimental import checkify
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_masking as optax

DTYPE = DTYPES[0]


def _vmap(loss: Callable) -> Callable:
  return jax.vmap(loss)


def _scan(loss: Callable) -> Callable:
  def scanned(*rows):
    return jax.lax.scan(lambda carry, row: (carry, loss(*row)), None, rows)[1]

  return scanned


def _mesh() -> Mesh:
  return Mesh(np.array(jax.devices()), ("batch",))


if hasattr(jax, "shard_map"):
  shard_map = jax.shard_map
else:  # Where it was before JAX 0.6.
  from jax.experimental.shard_map import shard_map


def _shard_map(loss: Callable) -> Callable:
  batch = PartitionSpec("batch")
  return jax.jit(shard_map(loss, mesh=_mesh(), in_specs=batch, out_specs=batch))


def _sharded_jit(loss: Callable) -> Callable:
  sharding = NamedSharding(_mesh(), PartitionSpec("batch"))
  return jax.jit(loss, in_shardings=sharding, out_shardings=sharding)


TRANSFORMS = (_vmap, _scan, jax.checkpoint, _shard_map, _sharded_jit)


def batched(case, transform, dtype, masked=True):
  """A loss to be transformed, and arguments and masks with rows to be mapped.

  For a loss of a whole batch the rows are batches.
  """

  def loss(where, *arguments):
    if not masked:
      return case.original(*arguments)
    return case.loss(*arguments, where=where)

  arguments = case.arguments(dtype)
  wheres = [
    masks(case.shape)["random"],
    row_masks(case.shape)["some rows masked"],
  ]
  if case.slices:
    return loss, transform(loss), arguments, wheres
  arguments = [
    jnp.stack([x, x / 2]) if p in case.floating else jnp.stack([x, x])
    for p, x in enumerate(arguments)
  ]
  wheres = [np.stack([where, where[::-1]]) for where in wheres]
  mapped = jax.vmap(loss)
  return (
    mapped,
    transform(loss if transform in (_vmap, _scan) else mapped),
    arguments,
    wheres,
  )


def derivatives(case, loss, arguments, where):
  """The value and the gradients."""

  def total(floats):
    return jnp.sum(loss(where, *case.with_floats(arguments, floats)))

  floats = [arguments[p] for p in case.floating]
  return jax.jit(jax.value_and_grad(total))(floats)


@functools.cache
def untransformed(case, dtype, kind):
  loss, _, arguments, wheres = batched(case, lambda loss: loss, dtype)
  where = wheres[kind]
  return derivatives(case, loss, case.garbled(arguments, where), where)


@pytest.mark.parametrize("transform", TRANSFORMS)
@each_case(mechanisms=True)
def test_derivatives(case, dtype, transform):
  """With garbage in what is masked. Second ones are under `vmap` anyway."""
  _, transformed, clean, wheres = batched(case, transform, dtype)
  roundings = 128 if dtype in ("float32", "float64") else 8
  for kind, where in enumerate(wheres if transform is _vmap else wheres[:1]):
    expected = untransformed(case, dtype, kind)
    arguments = case.garbled(clean, where)
    try:
      got = derivatives(case, transformed, arguments, where)
    except TypeError as e:
      # Optax's scan in `ctc_loss` does not run under `shard_map`.
      assert "scan body function carry" in str(e)
      assert transform is _shard_map
      _, theirs, _, _ = batched(case, transform, dtype, masked=False)
      with pytest.raises(TypeError, match="scan body function carry"):
        theirs(where, *clean)
      pytest.skip("nor does Optax's loss")
    assert_all_close(got, expected, dtype, roundings=roundings)


@each_case(dtypes=DTYPES[:1], mechanisms=True)
@pytest.mark.parametrize("kind", ["elements", "rows"])
def test_reverse_over_reverse(case, dtype, kind):
  """The Hessian, of all arguments, as it is forward over reverse."""
  where = masks(case.shape)["random"]
  if kind == "rows":
    where = row_masks(case.shape)["some rows masked"]
  full = np.broadcast_to(where, case.shape)
  arguments = case.garbled(case.arguments(dtype), full)

  def total(floats):
    given = case.with_floats(arguments, floats)
    return jnp.sum(case.loss(*given, where=where))

  gradient = jax.grad(total)
  forward, reverse = jax.jit(
    lambda x: [jac(gradient)(x) for jac in (jax.jacfwd, jax.jacrev)]
  )([arguments[p] for p in case.floating])
  # Of a vector with one entry the cosine has no second derivative, but terms
  # that cancel do.
  roundings = 512 if case.name == "cosine_similarity" else 64
  assert np.all([np.isfinite(x).all() for x in jax.tree.leaves(forward)])
  assert_all_close(reverse, forward, dtype, roundings=roundings)


@each_case(dtypes=DTYPES[:1], mechanisms=True)
def test_mask_alone_is_mapped(case, dtype):
  """One data set under a batch of masks."""
  arguments = case.arguments(dtype)
  wheres = np.stack(list(masks(case.shape).values()))
  got = jax.vmap(lambda where: case.loss(*arguments, where=where))(wheres)
  for where, row in zip(wheres, got, strict=True):
    assert_close(row, case.loss(*arguments, where=where), dtype)


@each_case(mechanisms=True)
def test_strict_promotion(case, dtype):
  """No dtype is promoted that Optax does not promote."""
  arguments = case.arguments(dtype)
  try:
    with jax.numpy_dtype_promotion("strict"):
      case.original(*arguments)
  except ValueError as e:
    assert "dtype promotion" in str(e)
    pytest.skip(f"Optax promotes: {e}")
  for where in (
    masks(case.shape)["random"],
    row_masks(case.shape)["some rows masked"],
  ):
    # First, since what is compiled for another promotion is used again.
    with jax.numpy_dtype_promotion("strict"):
      got = case.loss(*arguments, where=where)
    assert_close(got, case.loss(*arguments, where=where), dtype)


@each_case(dtypes=DTYPES[:1], mechanisms=True)
def test_explicit_mesh(case, dtype):
  """Where the type of an array has its sharding, for masks of all kinds."""
  if not hasattr(jax, "set_mesh"):
    pytest.skip("JAX has no explicit meshes yet.")
  axis_type = jax.sharding.AxisType.Explicit
  with jax.set_mesh(jax.make_mesh((2,), ("batch",), (axis_type,))):
    arguments = case.arguments(dtype)
    sharded = [jax.device_put(x, PartitionSpec("batch")) for x in arguments]
    try:
      case.original(*sharded)
    except Exception as e:
      pytest.skip(f"Optax does not: {e}")
    random = masks(case.shape)["random"]
    rows = row_masks(case.shape)["some rows masked"]
    for where in (
      rows,
      random[:1],
      jax.device_put(random, PartitionSpec("batch")),
    ):
      expected = case.loss(*arguments, where=np.asarray(where))
      assert_close(case.loss(*sharded, where=where), expected, dtype)


def test_index_checks():
  """A masked label is not looked up."""
  logits = jnp.ones((2, 3))
  labels = jnp.array([1, -100])
  where = jnp.array([[True, True, False], [False, False, False]])
  error, _ = checkify.checkify(
    optax.softmax_cross_entropy_with_integer_labels,
    checkify.index_checks,
  )(logits, labels, where=where)
  error.throw()


@each_case(dtypes=DTYPES[:1], mechanisms=True)
def test_no_recompilation(case, dtype):
  """Another mask of the same shape runs the same program."""
  traces = 0

  @jax.jit
  def loss(arguments, where):
    nonlocal traces
    traces += 1
    return case.loss(*arguments, where=where)

  for where in masks(case.shape).values():
    loss(case.arguments(dtype), where)
  assert traces == 1
