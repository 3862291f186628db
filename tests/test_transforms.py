"""Clause 8: the contract under every JAX transformation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from cases import DTYPES, NAMED, assert_close, masks
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


def _shard_map(loss: Callable) -> Callable:
  batch = PartitionSpec("batch")
  shard_map = getattr(jax, "shard_map", None)
  if shard_map is None:  # Where it was before JAX 0.6.
    from jax.experimental.shard_map import shard_map
  return jax.jit(shard_map(loss, mesh=_mesh(), in_specs=batch, out_specs=batch))


def _sharded_jit(loss: Callable) -> Callable:
  sharding = NamedSharding(_mesh(), PartitionSpec("batch"))
  return jax.jit(loss, in_shardings=sharding, out_shardings=sharding)


ROWS = np.array([[True], [False], [False], [True]])
TRANSFORMS = (_vmap, _scan, jax.checkpoint, _shard_map, _sharded_jit)


def derivatives(case, transform, arguments, where):
  """The value, the gradients, and how both change in a direction."""
  count = len(case.floating())
  loss = transform(lambda where, *arguments: case.loss(*arguments, where=where))

  def value_and_gradients(*floats):
    def total(*floats):
      return jnp.sum(loss(where, *floats, *arguments[count:]))

    return jax.value_and_grad(total, range(count))(*floats)

  floats = arguments[:count]
  return jax.jvp(
    value_and_gradients, floats, [jnp.ones_like(x) for x in floats]
  )


class TransformsTest(parameterized.TestCase):
  @parameterized.product(
    name_and_case=NAMED, transform=TRANSFORMS, dtype=DTYPES
  )
  def test_derivatives(self, name_and_case, transform, dtype):
    """First and second ones, with garbage in what is masked."""
    _, case = name_and_case
    clean = case.arguments(dtype)
    roundings = 128 if dtype in ("float32", "float64") else 32
    for where in (masks()["random"], ROWS):
      arguments = [
        jnp.where(where, x, jnp.nan) if position in case.floating() else x
        for position, x in enumerate(clean)
      ]
      expected = derivatives(case, lambda loss: loss, arguments, where)
      got = derivatives(case, transform, arguments, where)
      # A second derivative is a difference of larger numbers.
      jax.tree.map(
        lambda a, b: assert_close(a, b, dtype, roundings=roundings),
        got,
        expected,
      )

  @parameterized.named_parameters(NAMED)
  def test_mask_alone_is_mapped(self, case):
    """One data set under a batch of masks."""
    arguments = case.arguments(DTYPE)
    wheres = np.stack(list(masks().values()))
    got = jax.vmap(lambda where: case.loss(*arguments, where=where))(wheres)
    for where, row in zip(wheres, got, strict=True):
      assert_close(row, case.loss(*arguments, where=where), DTYPE)

  @parameterized.product(name_and_case=NAMED, dtype=DTYPES)
  def test_strict_promotion(self, name_and_case, dtype):
    """No dtype is promoted that Optax does not promote."""
    _, case = name_and_case
    arguments = case.arguments(dtype)
    for where in (masks()["random"], ROWS):
      expected = case.loss(*arguments, where=where)
      with jax.numpy_dtype_promotion("strict"):
        assert_close(case.loss(*arguments, where=where), expected, dtype)

  @parameterized.named_parameters(NAMED)
  def test_explicit_mesh(self, case):
    """Where the type of an array has its sharding, for masks of all kinds."""
    if not hasattr(jax, "set_mesh"):
      self.skipTest("JAX has no explicit meshes yet.")
    axis_type = jax.sharding.AxisType.Explicit
    with jax.set_mesh(jax.make_mesh((2,), ("batch",), (axis_type,))):
      arguments = case.arguments(DTYPE)
      sharded = [jax.device_put(x, PartitionSpec("batch")) for x in arguments]
      for where in (masks()["random"], ROWS, masks()["random"][:1]):
        expected = case.loss(*arguments, where=where)
        assert_close(case.loss(*sharded, where=where), expected, DTYPE)
        if len(where) > 1:
          where = jax.device_put(where, PartitionSpec("batch"))
          assert_close(case.loss(*sharded, where=where), expected, DTYPE)

  def test_index_checks(self):
    """A masked label is not looked up."""
    logits = jnp.ones((2, 3))
    labels = jnp.array([1, -100])
    where = jnp.array([[True, True, False], [False, False, False]])
    error, _ = checkify.checkify(
      optax.softmax_cross_entropy_with_integer_labels,
      checkify.index_checks,
    )(logits, labels, where=where)
    error.throw()

  @parameterized.named_parameters(NAMED)
  def test_no_recompilation(self, case):
    """Another mask of the same shape runs the same program."""
    traces = 0

    @jax.jit
    def loss(arguments, where):
      nonlocal traces
      traces += 1
      return case.loss(*arguments, where=where)

    for where in masks().values():
      loss(case.arguments(DTYPE), where)
    self.assertEqual(traces, 1)


if __name__ == "__main__":
  absltest.main()
