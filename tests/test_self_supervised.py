"""NT-Xent: rows, entries, and pairs that are not there."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax as upstream
import pytest
from absl.testing import absltest, parameterized
from cases import (
  DTYPES,
  assert_all_close,
  assert_allclose,
  assert_equal,
)

import optax_masking as optax

NAN = float("nan")
RNG = np.random.default_rng(2)
EMBEDDINGS = RNG.normal(size=(7, 3)).astype("float32")
LABELS = np.array([0, 0, 1, 1, 2, 0, 3])


@pytest.mark.slow
class NtxentTest(parameterized.TestCase):
  def test_hand_worked(self):
    # One positive pair, of the same direction, and one orthogonal: from both
    # sides log((e^1 + e^0) / e^1).
    embeddings = jnp.array([[1.0, 0.0], [2.0, 0.0], [NAN, NAN], [0.0, 1.0]])
    got = optax.ntxent(
      embeddings,
      jnp.array([0, 0, 0, 1]),
      temperature=1.0,
      where=jnp.array([True, True, False, True]),
    )
    assert_allclose(got, math.log(1 + 1 / math.e), rtol=1e-6)

  @parameterized.product(
    rows=(
      (1, 1, 1, 1, 1, 1, 1),
      (1, 1, 1, 0, 1, 1, 1),
      (1, 1, 0, 0, 0, 0, 0),  # No negative pair.
      (1, 0, 0, 0, 0, 1, 1),
      (0, 1, 1, 1, 0, 0, 1),
    ),
  )
  def test_rows(self, rows):
    """The loss of the rows that are left, with garbage in the others."""
    dtype = DTYPES[sum(rows) % len(DTYPES)]
    rows = np.array(rows, bool)
    x = jnp.asarray(EMBEDDINGS, dtype)
    garbage = jnp.where(rows[:, None], x, NAN)
    labels = np.where(rows, LABELS, 0)  # The same label as of others.

    def got(x, temperature):
      return optax.ntxent(x, labels, temperature, where=rows)

    def expected(x, temperature):
      return upstream.ntxent(
        x[rows].astype(jnp.promote_types(dtype, "float32")),
        LABELS[rows],
        temperature,
      )

    got, expected = (jax.jit(jax.value_and_grad(f)) for f in (got, expected))
    for temperature in (0.07, 1.0):
      with jax.debug_nans(True), jax.debug_infs(True):
        value, gradient = got(garbage, temperature)
      self.assertEqual(value.dtype, dtype)
      right = expected(x, temperature)
      # Each similarity is divided by the temperature.
      roundings = 16 / temperature
      assert_all_close((value, gradient), right, dtype, roundings=roundings)
      assert_equal(gradient[~rows], 0)

  def test_no_positive_pair(self):
    def loss(x, rows):
      return optax.ntxent(x, LABELS, where=rows)

    def derivatives(*given):
      return jax.value_and_grad(loss)(*given), jax.hessian(loss)(*given)

    derivatives = jax.jit(derivatives)
    for rows in (
      (0, 0, 0, 0, 0, 0, 0),
      (1, 0, 0, 0, 0, 0, 0),
      (1, 0, 1, 0, 1, 0, 1),
    ):
      with jax.debug_nans(True), jax.debug_infs(True):
        got = derivatives(EMBEDDINGS, np.array(rows, bool))
      jax.tree.map(lambda x: assert_equal(x, 0), got)

  def test_low_temperature(self):
    """No exponential of a positive pair is 0, as it may be in Optax."""
    x = np.array([[1.0, 0.0], [-1.0, 1e-3], [1.0, 1e-3]], "float32")
    labels = np.array([0, 0, 1])
    value, gradient = jax.value_and_grad(optax.ntxent)(
      x, labels, 1e-3, where=True
    )
    # Similarities of -1, 1 and -1: 2000 from one side, log 2 from the other.
    assert_allclose(value, (2000 + math.log(2)) / 2, rtol=1e-3)
    self.assertTrue(jnp.all(jnp.isfinite(gradient)))

  def test_zero_embedding(self):
    """An included one has similarity 0 to all, as in Optax."""
    x = np.where(np.arange(7)[:, None] == 1, 0, EMBEDDINGS)
    for where in (True, np.ones(7, bool), np.ones((7, 3), bool)):
      got = jax.value_and_grad(optax.ntxent)(x, LABELS, where=where)
      expected = jax.value_and_grad(upstream.ntxent)(x, LABELS)
      jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4), got, expected)

  def test_honesty_without_a_negative_pair(self):
    x = np.where(np.arange(7)[:, None] == 1, NAN, EMBEDDINGS)
    for arguments in ((x, LABELS * 0), (EMBEDDINGS, LABELS * 0, NAN)):
      self.assertTrue(jnp.isnan(upstream.ntxent(*arguments)))
      self.assertTrue(jnp.isnan(optax.ntxent(*arguments, where=True)))
    rows = np.arange(7) != 1
    self.assertEqual(optax.ntxent(x, LABELS * 0, where=rows), 0)

  def test_masked_labels(self):
    """They may be anything, also of another dtype."""
    rows = np.array([1, 1, 1, 0, 1, 1, 0], bool)
    expected = optax.ntxent(EMBEDDINGS, LABELS, where=rows)
    theirs = upstream.ntxent(EMBEDDINGS[rows], LABELS[rows])
    assert_allclose(expected, theirs, rtol=1e-5)
    for garbage in (-100, 0, 2**31 - 1):
      labels = np.where(rows, LABELS, garbage)
      assert_equal(optax.ntxent(EMBEDDINGS, labels, where=rows), expected)
    labels = np.where(rows, LABELS, NAN)
    assert_equal(optax.ntxent(EMBEDDINGS, labels, where=rows), expected)

  def test_axis(self):
    rows = np.array([1, 1, 1, 0, 1, 1, 1], bool)
    for where in (None, rows):
      kept = rows if where is not None else np.ones(7, bool)
      expected = upstream.ntxent(EMBEDDINGS[kept], LABELS[kept])
      for x, axis in (
        (EMBEDDINGS, 1),
        (EMBEDDINGS.T, 0),
        (EMBEDDINGS[:, None], (1, 2)),
        (EMBEDDINGS[:, None], (-1, 1)),
        (EMBEDDINGS.T[:, :, None], (0, 2)),
      ):
        got = optax.ntxent(x, LABELS, axis=axis, where=where)
        assert_allclose(got, expected, rtol=1e-5)
    with self.assertRaises(TypeError):  # Optax's.
      optax.ntxent(EMBEDDINGS[:, None], LABELS[:, None], where=True)

  def test_what_optax_refuses(self):
    for arguments in (
      (EMBEDDINGS, LABELS[:3]),
      (EMBEDDINGS, LABELS[:1]),
      (EMBEDDINGS.astype("int32"), LABELS),
    ):
      with self.assertRaises(Exception) as theirs:
        upstream.ntxent(*arguments)
      with self.assertRaises(type(theirs.exception)) as ours:
        optax.ntxent(*arguments, where=True)
      self.assertEqual(str(ours.exception), str(theirs.exception))


@pytest.mark.slow
class TripletTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 4, 2.0, 3)
  def test_norms(self, norm_degree):
    """Finite to the second derivative, with no `eps` too."""
    x = EMBEDDINGS[:4], EMBEDDINGS[1:5] + 3, EMBEDDINGS[2:6] - 3
    where = np.array([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]], bool)
    garbage = [np.where(where, a, NAN) for a in x]

    def got(*x):
      return optax.losses.triplet_margin_loss(
        *x, norm_degree=norm_degree, margin=20.0, eps=0.0, where=where
      ).sum()

    def expected(*x):
      rows = [
        upstream.losses.triplet_margin_loss(
          *(a[i, kept] for a in x),
          norm_degree=norm_degree,
          margin=20.0,
          eps=0.0,
        )
        for i, kept in enumerate(where)
        if kept.any()
      ]
      return sum(rows)

    if norm_degree % 2:  # Without an absolute value sums must be positive.
      x = x[0], x[0] - abs(x[1]), x[0] - abs(x[2])
      garbage = [np.where(where, a, NAN) for a in x]
    x = [jnp.asarray(a) for a in x]
    assert_allclose(got(*garbage), expected(*x), rtol=1e-5)
    with jax.debug_nans(True), jax.debug_infs(True):
      jax.grad(got, (0, 1, 2))(*garbage)
    for derivative in (jax.grad, jax.hessian):
      assert_all_close(
        jax.jit(derivative(got, (0, 1, 2)))(*garbage),
        jax.jit(derivative(expected, (0, 1, 2)))(*x),
        DTYPES[0],
      )

  @parameterized.parameters(0.5, 1.5, 2.0)
  def test_derivatives_of_a_degree(self, norm_degree):
    """In forward mode twice, next to Optax without what is masked."""
    a, p, n = jnp.array([[3.0, 4, 5]]), jnp.zeros((1, 3)), jnp.ones((1, 3))
    where = np.array([[True, True, False]])

    def second(loss):
      def first(a):
        return jax.jvp(loss, (a,), (jnp.ones_like(a),))[1]

      return lambda a: jax.jvp(first, (a,), (jnp.ones_like(a),))[1]

    keywords = {"norm_degree": norm_degree, "margin": 5.0}
    with jax.debug_nans(True), jax.debug_infs(True):
      got = second(
        lambda a: optax.losses.triplet_margin_loss(
          a, p, n, where=where, **keywords
        )
      )(a)
    expected = second(
      lambda a: upstream.losses.triplet_margin_loss(
        a, p[:, :2], n[:, :2], **keywords
      )
    )(a[:, :2])
    assert_allclose(got, expected, rtol=1e-4)

  def test_vectors_of_one_entry(self):
    """Optax counts their distances once; under a mask that has no meaning."""
    x = jnp.ones((2, 3)), jnp.zeros((2, 1)), jnp.zeros(3)
    loss = optax.losses.triplet_margin_loss
    loss(x[0], x[1], x[1])
    for vectors in ((x[0], x[1], x[0]), (x[1], x[1], x[0]), (x[1], x[2], x[2])):
      with self.assertRaisesRegex(ValueError, r"the same size along the axes"):
        loss(*vectors, where=jnp.ones((2, 3), bool))
    for positives in x[1:]:
      with self.assertRaisesRegex(ValueError, r"along the axes \(0, 1\)"):
        loss(x[0], positives, x[0], (0, 1), where=jnp.ones((2, 3), bool))
    # Along the batch they broadcast, and along an axis of size 1.
    for *vectors, axis in (
      (x[0], x[2], x[0][:1], -1),
      (x[0][:1], x[2], x[0][:1], (0, 1)),
    ):
      assert_allclose(
        loss(*vectors, axis, where=jnp.ones(vectors[0].shape, bool)),
        upstream.losses.triplet_margin_loss(*vectors, axis),
        rtol=1e-6,
      )

  def test_axis(self):
    x = EMBEDDINGS[:4], EMBEDDINGS[1:5] + 3, EMBEDDINGS[2:6] - 3
    where = np.array([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]], bool)
    loss = optax.losses.triplet_margin_loss
    got = loss(*(a.T for a in x), 0, where=where.T)
    for i, kept in enumerate(where):
      expected = upstream.losses.triplet_margin_loss(*(a[i, kept] for a in x))
      assert_allclose(got[i], expected if kept.any() else 0, rtol=1e-5)


if __name__ == "__main__":
  absltest.main()
