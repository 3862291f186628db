"""Clause 8: the contract under every JAX transformation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from cases import DTYPES, NAMED, masks, tolerance
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


TRANSFORMS = (_vmap, _scan, jax.checkpoint, _shard_map, _sharded_jit)


class TransformsTest(parameterized.TestCase):
  @parameterized.product(
    name_and_case=NAMED, transform=TRANSFORMS, mask=("random", "rows")
  )
  def test_value_and_gradients(self, name_and_case, transform, mask):
    """Garbage in what is masked, in and out of each transformation."""
    _, case = name_and_case
    where = masks()["random"]
    if mask == "rows":
      where = np.array([[True], [False], [False], [True]])
    arguments = [
      jnp.where(where, x, jnp.nan) if i in case.floating() else x
      for i, x in enumerate(case.arguments(DTYPE))
    ]

    def loss(*arguments_and_where):
      *arguments, where = arguments_and_where
      return case.loss(*arguments, where=where)

    def value_and_gradients(loss):
      return jax.value_and_grad(
        lambda *args: jnp.sum(loss(*args)), case.floating()
      )

    expected = value_and_gradients(loss)(*arguments, where)
    got = value_and_gradients(transform(loss))(*arguments, where)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a, b, equal_nan=False, **tolerance(DTYPE)
      ),
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
      np.testing.assert_allclose(
        row,
        case.loss(*arguments, where=where),
        equal_nan=False,
        **tolerance(DTYPE),
      )

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
