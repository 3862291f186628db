"""`Mask` itself, in losses of one's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_all_close, assert_close, assert_equal, masks

import optax_masking as optax

WHERE = masks()["random"]
X = np.random.default_rng(0).normal(size=WHERE.shape).astype("float32")
LABELS = np.array([1, 0, 3, 4])


def improbability(logits, labels, axis=-1, where=None):
  """Of the class of each example; 0 where it is masked."""
  mask = optax.Mask(where, axis, logits, examples=labels).with_class(labels)
  p = jax.nn.softmax(mask(logits, optax.fills.below_maximum), axis)
  labels = jnp.expand_dims(mask.example(labels, 0), axis)
  p = jnp.squeeze(jnp.take_along_axis(p, labels, axis), axis)
  return mask.out(1 - p)


def error(predictions, targets=None, axis=(), where=None):
  mask = optax.Mask(where, axis, predictions, targets)
  x, y = mask(predictions, 0.0), mask(targets, 0.0)
  return mask.sum(abs(x if y is None else x - y))


def expected_improbability(where):
  """One example after the other, without what is masked."""
  losses = np.zeros(len(X))
  for i, kept in enumerate(where):
    if kept[LABELS[i]]:
      p = np.exp(X[i].astype("float64")) * kept
      losses[i] = 1 - p[LABELS[i]] / p.sum()
  return losses


@pytest.mark.parametrize("kind", masks())
def test_class(kind):
  where = masks()[kind]
  garbage = np.where(where, X, np.nan)
  labels = np.where(where.any(-1), LABELS, -100)
  got = improbability(garbage, labels, where=where)
  assert_close(got, expected_improbability(where), "float32", terms=1.0)
  assert_all_close(improbability(garbage.T, labels, 0, where.T), got, "float32")
  gradient = jax.grad(lambda x: improbability(x, labels, where=where).sum())
  assert_equal(gradient(garbage)[~where], 0)


def test_sum():
  garbage = np.where(WHERE, X, np.inf)
  expected = np.where(WHERE, abs(X), 0)
  assert_equal(error(garbage, where=WHERE), expected)
  assert_close(error(garbage, axis=0, where=WHERE), expected.sum(0), "float32")
  assert_close(error(X, axis=None), abs(X).sum(), "float32")
  assert_equal(error(X, 1.0, where=False), 0)
  with pytest.raises(ValueError, match=r"axis 2 is out of range"):
    error(X, axis=2)


def test_without_a_mask():
  """It is the loss itself, and what it is given."""
  mask = optax.Mask(None, 5, X, examples=LABELS)
  assert mask.where is None
  assert mask(X, 0.0) is X
  assert mask.example(LABELS, 0) is LABELS
  assert mask.with_class(LABELS) is mask
  assert mask.out(X) is X
  plain = jax.make_jaxpr(abs)(X)
  assert str(jax.make_jaxpr(error)(X)) == str(plain)
  assert_equal(mask.any, True)


def mean_absolute_error(predictions, targets, axis=-1, where=None):
  """As in the docstring."""
  mask = optax.Mask(where, axis, predictions, targets)
  x, y = mask(predictions, 0.0), mask(targets, 0.0)
  total = mask.sum(jnp.abs(x - y))
  return total / jnp.maximum(mask.count(), 1)


ROWS = np.array([True, False, True, False])


@pytest.mark.parametrize(
  "where", [None, WHERE, ROWS, ROWS[:, None], WHERE[:1], True, False]
)
def test_count(where):
  """Of masks of each shape, and without one."""
  included = np.ones(X.shape, bool)
  if where is not None:
    full = where if np.ndim(where) != 1 else where[:, None]
    included &= full
  x, y = np.where(included, X, np.nan), np.ones_like(X)
  axes = (-1, 0, (0, 1), None, ())
  for axis in axes[:1] if np.ndim(where) == 1 else axes:
    mask = optax.Mask(where, axis, x, y)
    expected = included.sum(axis)
    assert mask.count().shape == expected.shape
    assert mask.count().dtype == jnp.asarray(0).dtype
    np.testing.assert_array_equal(mask.count(), expected)
    np.testing.assert_array_equal(jax.jit(mask.count)(), expected)
    mean = np.where(included, abs(X - 1), 0).sum(axis) / expected.clip(1)
    loss = functools.partial(mean_absolute_error, x, y, axis, where)
    assert_close(loss(), mean, "float32")
    assert_close(jax.jit(loss)(), mean, "float32")


def test_count_of_other_shapes():
  """Of data that broadcast, of examples alone, of classes and of nothing."""
  for where in (None, True, [[True]]):
    mask = optax.Mask(where, 1, X[:1], 1.0, None, examples=LABELS)
    np.testing.assert_array_equal(mask.count(), [5] * 4)
    np.testing.assert_array_equal(
      optax.Mask(where, -1, X[:, :0]).count(), [0] * 4
    )
  mask = optax.Mask(WHERE, -1, X, examples=LABELS).with_class(LABELS)
  kept = WHERE[np.arange(4), LABELS]
  np.testing.assert_array_equal(mask.count(), WHERE.sum(-1) * kept)
  with pytest.raises(ValueError, match="axis 2 is out of range"):
    optax.Mask(None, 2, X).count()


def test_with_class_is_another_mask():
  mask = optax.Mask(WHERE, -1, X, examples=LABELS)
  other = mask.with_class(LABELS)
  included = WHERE[np.arange(4), LABELS]
  assert not included.all()
  np.testing.assert_array_equal(mask.where, WHERE)
  np.testing.assert_array_equal(other.where, WHERE & included[:, None])
  np.testing.assert_array_equal(other.any, included)
  with pytest.raises(AttributeError, match="cannot assign to field 'where'"):
    mask.where = other.where


def test_transformations():
  """It is made inside of them."""
  filled = np.where(WHERE, X, 0)
  rows = jax.vmap(lambda x, where: optax.Mask(where, -1, x)(x, 0.0))
  assert_equal(rows(X, WHERE), filled)
  _, scanned = jax.lax.scan(
    lambda carry, row: (carry, optax.Mask(row[1], -1, row[0])(row[0], 0.0)),
    None,
    (X, WHERE),
  )
  assert_equal(scanned, filled)


def test_result_of_another_shape():
  mask = optax.Mask(WHERE, -1, X)
  with pytest.raises(ValueError) as error:
    mask.out(jnp.zeros(()))
  assert str(error.value) == (
    "`Mask.out` was given the shape (), but for data of shape (4, 5), of which"
    " `axis` reduces (1,), it takes (4,) or (4, 5)."
  )
  with pytest.raises(ValueError) as error:
    mask.sum(jnp.zeros(4))
  assert str(error.value) == (
    "`Mask.sum` was given the shape (4,), but takes that of the data, (4, 5)."
  )


def test_no_data():
  """Only a mask needs them."""
  for data in ((), (None,)):
    with pytest.raises(TypeError, match="`Mask` needs the data, for their sh"):
      optax.Mask(WHERE, -1, *data, examples=LABELS)
    assert optax.Mask(None, -1, *data).sum(X[0]) == X[0].sum()


def test_argument_of_another_shape():
  """The error has the name and the shapes that the caller has."""
  with pytest.raises(ValueError) as error:
    optax.Mask(WHERE, -1, X, X[:3], 1.0)
  assert str(error.value) == (
    "The data have the shapes (4, 5) and (3, 5) and (), which do not broadcast."
  )
  mask = optax.Mask(WHERE[:, :1], -1, X)
  for fill in (0.0, optax.fills.far_below):
    for x in (X[:3], X.T, X[None], np.ones((4, 7), "float32")):
      with pytest.raises(ValueError) as error:
        mask(x, fill, "targets")
      assert str(error.value) == (
        f"`targets` has shape {x.shape}, but must broadcast to that of the"
        " data, (4, 5)."
      )
  for labels in (LABELS[:3], LABELS[:, None], np.ones((4, 4), int)):
    with pytest.raises(ValueError) as error:
      mask.example(labels, 0, "labels")
    assert str(error.value) == (
      f"`labels` has shape {labels.shape}, but for data of shape (4, 5), of"
      " which `axis` reduces (1,), it must broadcast to (4,)."
    )


def test_examples_of_another_rank():
  with pytest.raises(ValueError, match=r"has shape \(4, 5\), but must have"):
    optax.Mask(WHERE, -1, X, examples=np.ones((4, 5), int))
  with pytest.raises(ValueError) as error:
    optax.Mask(WHERE, -1, X, examples=LABELS[:3])
  assert str(error.value) == (
    "An array with one entry an example has shape (3,), but for data of shape"
    " (4, 5), of which `axis` reduces (1,), it must broadcast with (4,)."
  )
  assert optax.Mask(True, -1, X[:1], examples=LABELS).shape == (4, 5)


@pytest.mark.parametrize(
  "axis,examples",
  [(-1, {(4,): (4, 1)}), ((), {}), (None, {})],
)
def test_shapes_of_masks(axis, examples):
  """The table of the module, for data of shape (4, 5)."""
  accepted = {s: s for s in ((4, 5), (4, 1), (1, 5), (1, 1))}
  accepted |= {(): (1, 1), **examples}
  for shape, expected in accepted.items():
    assert optax.Mask(np.ones(shape, bool), axis, X).where.shape == expected
  for shape in {(4,), (5,)} - accepted.keys():
    with pytest.raises(ValueError, match=r"`where` has shape \(\d,\)"):
      optax.Mask(np.ones(shape, bool), axis, X)
  if axis == -1:
    square, where = X[:, :4], np.ones(4, bool)
    assert optax.Mask(where, axis, square).where.shape == (4, 1)
    with pytest.raises(ValueError, match="in two ways"):
      optax.Mask(where, axis, square, refuse_ambiguous_where=True)
