"""What `axis` and `where` accept, mean and refuse."""

import contextlib
import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax as upstream
import pytest
from cases import (
  BY_NAME,
  CASES,
  DTYPES,
  SHAPE,
  SLICED,
  assert_allclose,
  assert_close,
  assert_equal,
  each_case,
  masks,
  row_masks,
)

import optax_masking as optax

REDUCING = [case for case in SLICED if not case.elementwise]
# Whose callers may mean by a mask of lower rank one of the last axis.
RIGHT_ALIGNED = [
  case
  for case in CASES
  if case.name.startswith(("cosine", "poly", "ranking", "smooth"))
  or "kl_divergence" in case.name
]
ONE_READING = [case for case in REDUCING if case not in RIGHT_ALIGNED]

each_mechanism = functools.partial(
  each_case, dtypes=DTYPES[:1], mechanisms=True
)


@contextlib.contextmanager
def refuses(kind, message):
  with pytest.raises(kind) as error:
    yield
  assert str(error.value) == message


def error_of(function, *args, **kwargs):
  try:
    jax.eval_shape(lambda: function(*args, **kwargs))
  except Exception as error:
    return error
  raise AssertionError("no error")


@each_mechanism(REDUCING, quick=True)
def test_ranks(case, dtype):
  """A mask of the batch, of the data and a scalar, spelled in every way."""
  arguments = case.arguments(dtype)
  rows = [True, False, True, True]
  expected = case.loss(*arguments, where=np.array(rows)[:, None])
  for where in (
    rows,
    np.array(rows),
    jnp.array(rows),
    [[row] for row in rows],
    np.broadcast_to(np.array(rows)[:, None], SHAPE),
  ):
    got = case.loss(*arguments, where=where)
    assert_allclose(got, expected, rtol=1e-5)
  assert expected[1] == 0
  assert_equal(case.loss(*arguments, where=False), 0)
  assert_equal(case.loss(*arguments, where=[[False]]), 0)


@each_mechanism(SLICED, quick=True)
def test_broadcasts_along_any_axis(case, dtype):
  arguments = case.arguments(dtype)
  classes = np.array([[True, False, True, True, True]])
  assert_close(
    case.loss(*arguments, where=classes),
    case.loss(*arguments, where=np.broadcast_to(classes, SHAPE)),
    dtype,
  )


@each_mechanism(REDUCING, quick=True)
def test_broadcasts_along_one_of_several_axes(case, dtype):
  shape, axis = (2, 3, 2), (1, 2)
  arguments = case.arguments(dtype, shape, axis)
  where = np.array([[True, False, True], [False, True, True]])[..., None]
  assert_close(
    case.loss(*arguments, axis=axis, where=where),
    case.loss(*arguments, axis=axis, where=np.broadcast_to(where, shape)),
    dtype,
  )


@each_mechanism(SLICED, quick=True)
def test_positional(case, dtype):
  """In Optax's order, where it has one."""
  arguments = case.arguments(dtype)
  where = masks()["random"]
  expected = case.loss(*arguments, where=where)
  loss = getattr(optax.losses, case.name)
  axis = inspect.signature(loss).parameters.get("axis")
  if axis is None or axis.kind is axis.KEYWORD_ONLY:
    with pytest.raises(TypeError):
      case.loss(*arguments, -1, where)
  else:
    assert_equal(case.loss(*arguments, -1, where=where), expected)
    if case.name != "triplet_margin_loss":  # It has others in between.
      assert_equal(case.loss(*arguments, -1, where), expected)


@each_mechanism(quick=True)
def test_not_boolean(case, dtype):
  arguments = case.arguments(dtype)
  for where in (
    np.ones(case.shape, "int32"),
    jnp.ones(case.shape),
    np.ones(case.shape, int).tolist(),
    1,
    0.0,
  ):
    dtype = jnp.asarray(where).dtype
    mask = "jnp.asarray(mask)" if isinstance(where, list) else "mask"
    with refuses(
      TypeError,
      f"`where` must be boolean, but has dtype {dtype}. Pass `{mask} != 0`.",
    ):
      case.loss(*arguments, where=where)


@pytest.mark.parametrize(
  "where,written",
  [
    (np.array([True, None]), "array([True, None], dtype=object)"),
    ("padding", "'padding'"),
    ({True}, "{True}"),
    ([None, True], "[None, True]"),
    ([[True], [True, False]], "[[True], [True, False]]"),
    ([None] * 100, f"[{'None, ' * 12}[...]"),
  ],
)
def test_no_array(where, written):
  message = f"`where` must be a boolean array, but is {written}."
  for call in (
    lambda: optax.hinge_loss(jnp.ones(2), jnp.ones(2), where=where),
    lambda: optax.Mask(where, -1, jnp.ones(2)),
    lambda: optax.reductions.masked_sum(jnp.ones(2), where),
  ):
    with refuses(TypeError, message):
      call()


def test_empty_list():
  """It has no element that is not boolean."""
  for where, shape in (([], 0), ([[]], (1, 0)), ([[], []], (2, 0))):
    losses = optax.hinge_loss(jnp.ones(shape), jnp.ones(shape), where=where)
    assert losses.shape == np.shape(where)
  with pytest.raises(ValueError, match=r"`where` has shape \(0,\)"):
    optax.hinge_loss(jnp.ones(3), jnp.ones(3), where=[])


@each_mechanism(SLICED, quick=True)
def test_wrong_shape(case, dtype):
  """The message names the shape, what is accepted, and the way out."""
  shape = (4, 3, 5)
  arguments = case.arguments(dtype, shape)
  for where, fix in (
    ((4,), "where[..., None, None]"),
    ((5,), "where[None, None, :]"),
    ((3, 5), "where[None, :, :]"),
    ((7,), None),
    ((2, 3), None),
    ((4, 3, 4), None),
    ((1, 4, 3, 5), None),
    ((0,), None),
  ):
    reduced, batch = (
      ("no axis is reduced", "")
      if case.elementwise
      else (
        "`axis` reduces (2,)",
        ", or have rank 2 and broadcast to (4, 3)",
      )
    )
    message = (
      f"`where` has shape {where}, but for data of shape {shape}, of which"
      f" {reduced}, it must have rank 3 and broadcast to {shape}{batch}, or be"
      " a scalar." + (f" Did you mean {fix}?" if fix else "")
    )
    with refuses(ValueError, message):
      case.loss(*arguments, where=np.ones(where, bool))


def test_fix_is_accepted():
  """The expression that an error proposes works."""
  shape = (4, 3, 5)
  where = np.ones(4, bool)
  error = error_of(optax.cosine_distance, *[jnp.ones(shape)] * 2, where=where)
  (fix,) = re.findall(r"where\[.*\]", str(error))
  fixed = eval(fix, {"where": where})
  optax.cosine_distance(*[jnp.ones(shape)] * 2, where=fixed)


@each_mechanism(RIGHT_ALIGNED, quick=True)
def test_two_readings(case, dtype):
  """Optax read a `[C]` mask as classes: with B == C it is refused."""
  square = case.arguments(dtype, (5, 5))
  where = np.array([True, True, False, True, True])
  with refuses(
    ValueError,
    "`where` of shape (5,) fits data of shape (5, 5) in two ways: as one"
    " entry an example, where[..., None], and aligned to the last axis,"
    " where[None, :]. Write the one that you mean.",
  ):
    case.loss(*square, where=where)
  # Here Optax and the rule agree.
  assert_close(
    case.loss(*square, axis=0, where=where),
    case.loss(*square, axis=0, where=where[None, :]),
    dtype,
  )
  assert_equal(case.loss(*square, where=[False]), 0)
  # What only Optax's reading fits is refused too.
  oblong = case.arguments(dtype, (4, 5))
  with pytest.raises(ValueError, match=r"Did you mean where\[None, :\]\?"):
    case.loss(*oblong, where=where)


@each_mechanism(ONE_READING, quick=True)
def test_one_reading(case, dtype):
  """A `[B]` mask is one of examples, as in Optax where it takes one."""
  square = case.arguments(dtype, (5, 5))
  where = np.array([True, True, False, True, True])
  if "where" in inspect.signature(case.original).parameters:
    assert_allclose(
      case.loss(*square, where=where)[where],
      case.original(*square, where=where)[where],
      rtol=1e-5,
    )
  assert_close(
    case.loss(*square, where=where),
    case.loss(*square, where=where[:, None]),
    dtype,
  )


@each_mechanism(quick=True)
def test_strict_ranks(case, dtype):
  """No rank is promoted that Optax does not promote."""
  arguments = case.arguments(dtype)
  floats = case.floating

  def gradient(loss, **kwargs):
    return jax.eval_shape(
      jax.value_and_grad(lambda *x: jnp.sum(loss(*x, **kwargs)), floats),
      *arguments,
    )

  every_mask = [masks(case.shape)["random"], *row_masks(case.shape).values()]
  every_mask += [True, np.ones((1,) * len(case.shape), bool)]
  every_mask += [masks(case.shape)["whole classes"][:1]]
  # That without the last axis means another thing for these.
  if not case.elementwise and case.masks_examples:
    every_mask += [np.ones(case.shape[:-1], bool)]
  with jax.numpy_rank_promotion("raise"):
    try:
      gradient(case.original)
    except ValueError as e:
      pytest.skip(f"Optax promotes: {e}")
    for where in every_mask:
      gradient(case.loss, where=where)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  ["safe_softmax_cross_entropy", "ranking_softmax_loss", "log_cosh"],
)
def test_argument_of_size_one(name):
  """It broadcasts along the axis, whichever it is."""
  loss = BY_NAME[name].loss
  x, y, *more = BY_NAME[name].arguments(DTYPES[0])
  for where in (None, masks()["random"]):
    for arguments in ((x[:, :1], y, *more), (x, y[:, :1], *more)):
      expected = loss(*arguments, axis=-1, where=where)
      for axis in (1, (1,), (-1,)):
        got = loss(*arguments, axis=axis, where=where)
        assert_allclose(got, expected, rtol=1e-6)
      turned = [a.T for a in arguments]
      mask = None if where is None else where.T
      got = loss(*turned, axis=0, where=mask)
      assert_allclose(got, expected, rtol=1e-6)


def test_nan_of_size_one():
  """It comes out, if any of what it meets is included."""
  got = optax.safe_softmax_cross_entropy(
    jnp.array([[jnp.nan], [1.0], [jnp.nan]]),
    jnp.full((3, 2), 0.5),
    where=jnp.array([[True, False], [True, False], [False, False]]),
  )
  np.testing.assert_array_equal(jnp.isnan(got), [True, False, False])


@each_mechanism(REDUCING)
def test_errors_are_those_of_optax(case, dtype):
  """What raises without a mask raises the same with one."""
  arguments = case.arguments(dtype)
  for axis in (2, -3, (0, 0), (1, -1), "batch", 1.0):
    # Where Optax has no `axis`, without a mask our error is raised, too.
    loss = case.original if case.takes("axis") else case.loss
    expected = error_of(loss, *arguments, axis=axis)
    got = error_of(case.loss, *arguments, axis=axis, where=True)
    assert type(got) is type(expected)
    assert str(got) == str(expected)


def test_errors_of_elementwise_losses():
  arguments = [jnp.ones((2, 3))] * 2
  for where in (None, True):
    for axis, kind, message in (
      (2, ValueError, "axis 2 is out of range for the shape (2, 3)."),
      (-3, ValueError, "axis -3 is out of range for the shape (2, 3)."),
      (
        (0, -2),
        ValueError,
        "axis -2 of the shape (2, 3) is repeated in (0, -2).",
      ),
      (
        "x",
        TypeError,
        "`axis` must be an int, a tuple of ints or None, not 'x'.",
      ),
    ):
      with refuses(kind, message):
        optax.sigmoid_focal_loss(*arguments, axis=axis, where=where)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, -1, (0, 1), (1, -2), None, ()])
def test_sum_of_an_elementwise_loss(axis):
  where = masks()["random"]
  for case in SLICED:
    if case.elementwise:
      arguments = case.arguments(DTYPES[0])
      losses = case.loss(*arguments)
      assert_allclose(
        case.loss(*arguments, axis=axis),
        jnp.sum(losses, axis),
        rtol=1e-6,
        err_msg=case.name,
      )
      assert_allclose(
        case.loss(*arguments, axis=axis, where=where),
        jnp.sum(losses * where, axis),
        rtol=1e-5,
        err_msg=case.name,
      )


@each_mechanism(REDUCING)
def test_axis_without_a_mask(case, dtype):
  """Also where Optax has none."""
  for shape, axis in (((2, 3, 2), 1), ((2, 3, 2), (2, 0))):
    arguments = case.arguments(dtype, shape, axis)
    loss = functools.partial(case.loss, axis=axis)
    expected = jax.jit(loss)(*arguments)
    assert_allclose(loss(*arguments, where=True), expected, rtol=1e-5)


def test_axis_of_numpy():
  """It is the same axis, also after a tuple, with which NumPy compares it."""
  arguments = [jnp.arange(10.0).reshape(2, 5)] * 2
  loss = functools.partial(optax.hinge_loss, *arguments, where=True)
  for axis in ((0, 1), np.int64(1), (0, 1), (np.int64(0), 1), np.int32(1)):
    assert_equal(loss(axis=axis), jnp.sum(loss(), axis))


@each_mechanism([c for c in REDUCING if not c.has_classes])
def test_none_is_every_axis(case, dtype):
  arguments = case.arguments(dtype)
  where = masks()["random"]
  assert_allclose(
    case.loss(*arguments, axis=None, where=where),
    case.loss(*arguments, axis=(0, 1), where=where),
    rtol=1e-6,
  )


@each_mechanism([c for c in CASES if len(c.data) > 1])
def test_bad_data(case, dtype):
  logits, labels, *others = case.arguments(dtype)
  integer_logits = jnp.ones(case.shape, "int32")
  for arguments in (
    (integer_logits, labels),
    (logits[:, :4], labels[..., :2]),
    (logits, labels[:3]),
    (logits, labels[:1]),
    (logits, jnp.ones((3, 4, 4), labels.dtype)),
    (logits.tolist(), labels),
  ):
    try:
      case.original(*arguments, *others)
    except Exception as error:
      expected = error
    else:
      continue
    got = error_of(case.loss, *arguments, *others, where=True)
    assert type(got) is type(expected)
    assert str(got) == str(expected)


def test_bad_labels():
  logits = jnp.ones(SHAPE)
  loss = optax.softmax_cross_entropy_with_integer_labels
  original = upstream.softmax_cross_entropy_with_integer_labels
  for labels, kwargs in (
    (jnp.ones(4), {}),
    (jnp.ones(SHAPE, int), {}),
    (jnp.ones(4, bool), {}),
    (jnp.array(1), {}),
    (jnp.ones(4, int), {"axis": None}),
    (jnp.array(1), {"axis": None}),
  ):
    expected = error_of(original, logits, labels, **kwargs)
    got = error_of(loss, logits, labels, **kwargs, where=True)
    assert type(got) is type(expected)
    assert str(got) == str(expected)


@each_mechanism(SLICED)
def test_no_examples(case, dtype):
  arguments = case.arguments(dtype, (0, 5))
  for where in (True, np.ones((0, 5), bool), np.ones((0, 1), bool)):
    expected = case.original(*arguments)
    got = case.loss(*arguments, where=where)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype


@each_mechanism(SLICED)
def test_no_classes(case, dtype):
  """An error where Optax has one, and else empty slices."""
  arguments = [
    jnp.ones((4, 0)[: x.ndim], x.dtype) for x in case.arguments(dtype)
  ]
  for where in (np.ones((4, 0), bool), np.ones((4, 1), bool), True):
    try:
      expected = case.original(*arguments)
    except Exception as error:
      got = error_of(case.loss, *arguments, where=where)
      assert type(got) is type(error)
    else:
      got = case.loss(*arguments, where=where)
      assert got.shape == expected.shape
      assert_equal(got, 0)


@pytest.mark.parametrize(
  "name", ["hinge_loss", "softmax_cross_entropy", "kl_divergence"]
)
def test_calls_that_do_not_fit(name):
  """Python's own errors, with the name of the function."""
  x = jnp.ones(SHAPE)
  loss = getattr(optax.losses, name)
  for arguments, keywords in (((x, x), {"axs": 1}), ((x,), {}), ((), {})):
    got = error_of(loss, *arguments, **keywords, where=True)
    expected = error_of(loss, *arguments, **keywords)
    assert type(got) is type(expected) is TypeError
    assert str(got) == str(expected)
    assert str(got).startswith(f"{name}() ")
    assert got.__context__ is None


def test_python_scalars():
  """Where Optax takes none, nor does a mask."""
  for arguments in ((0.5, 1.0), (0.5, jnp.array(1.0))):
    expected = error_of(upstream.losses.sigmoid_focal_loss, *arguments)
    got = error_of(optax.sigmoid_focal_loss, *arguments, where=True)
    assert type(got) is type(expected)
    assert str(got) == str(expected)


@each_mechanism(REDUCING)
def test_garbage_of_lower_rank(case, dtype):
  """A target shared by a batch is never looked at where it is masked."""
  if case.has_classes or len(case.data) > 2:
    return
  first, second = case.arguments(dtype)
  where = np.array([[True, True, False, True, True]])
  expected = case.loss(first, second[0], where=where)
  garbage = second[0].at[2].set(jnp.nan)
  with jax.debug_nans(True):
    got = case.loss(first, garbage, where=where)
    assert_close(got, expected, dtype)
    try:
      case.original(first, 0.5)
    except Exception:
      return  # Optax wants an array there.
    for nothing in (float("nan"), np.float64("nan")):
      assert_equal(case.loss(first, nothing, where=False), 0)


def test_scalars():
  """Rank 0: only a scalar mask fits."""
  logit, label = jnp.asarray(0.3), jnp.asarray(1.0)
  assert_close(
    optax.sigmoid_focal_loss(logit, label, where=True),
    upstream.losses.sigmoid_focal_loss(logit, label),
    DTYPES[0],
  )
  assert optax.sigmoid_focal_loss(logit * jnp.nan, label, where=False) == 0
  with pytest.raises(ValueError, match=r"`where` has shape \(1,\)"):
    optax.sigmoid_focal_loss(logit, label, where=[True])
  with pytest.raises(ValueError, match=r"reduced, it must be a scalar\."):
    optax.sigmoid_focal_loss(logit, label, where=[True, False])


@each_mechanism()
def test_numpy_data(case, dtype):
  """NumPy's float64 is JAX's default, and its garbage is never looked at."""
  arguments = case.arguments(dtype)
  where = masks(case.shape)["random"]
  garbage = [
    np.where(where, x, np.nan)
    if position in case.floating
    else np.asarray(x, "int64")
    for position, x in enumerate(arguments)
  ]
  with jax.debug_nans(True), jax.debug_infs(True):
    got = case.loss(*garbage, where=where)
  assert_close(got, case.loss(*arguments, where=where), dtype)


KINDS = (
  ("float32", False),
  ("float16", False),
  ("bfloat16", False),
  (None, True),
  ("int8", False),
  ("int32", False),
  ("int32", True),
  ("bool", False),
  0.5,
  1,
)

# Other parameters that are numbers or arrays.
PARAMETERS = (
  ("sigmoid_focal_loss", "alpha"),
  *(
    (name, p.name)
    for name, case in BY_NAME.items()
    for p in inspect.signature(
      getattr(upstream.losses, name)
    ).parameters.values()
    if isinstance(p.default, float)
  ),
)


def test_types_of_labels():
  """Optax converts the labels of some losses to the dtype of the logits."""
  logits = jnp.ones(SHAPE, "float16")
  loss = optax.sigmoid_binary_cross_entropy
  original = upstream.sigmoid_binary_cross_entropy
  for dtype in ("float32", "bfloat16", "int32", "bool"):
    labels = jnp.ones(SHAPE, dtype)
    got = loss(logits, labels, where=True)
    assert got.dtype == original(logits, labels).dtype
    with jax.numpy_dtype_promotion("strict"):
      loss(logits, labels, where=np.ones(SHAPE, bool))


def test_what_is_like_an_array():
  class Like:
    def __init__(self, x):
      self.x, self.shape, self.dtype, self.ndim = x, x.shape, x.dtype, x.ndim

    def __array__(self, dtype=None, copy=None):
      return np.asarray(self.x, dtype)

  x, y = BY_NAME["kl_divergence"].arguments()
  where = masks()["random"]
  assert_close(
    optax.kl_divergence(x, Like(y), where=where),
    optax.kl_divergence(x, y, where=where),
    "float32",
  )


def check_types(case, kinds, shapes, call):
  """The result has Optax's dtype, and is weak where Optax's is.

  `call` has the loss, the arguments and keywords.
  """
  arrays = []
  for kind, shape in zip(kinds, shapes, strict=True):
    if isinstance(kind, tuple):
      dtype, weak = kind[0] or DTYPES[0], kind[1]
      arrays.append(jax.ShapeDtypeStruct(shape, dtype, weak_type=weak))

  def types(loss, **kwargs):
    def function(arrays):
      given = iter(arrays)
      given = [next(given) if isinstance(k, tuple) else k for k in kinds]
      return call(loss, given, kwargs)

    result = jax.tree.leaves(jax.eval_shape(function, arrays))
    return [(x.dtype, x.weak_type) for x in result]

  try:
    expected = types(case.original)
  except Exception:
    return  # It refuses these.
  every = [np.ones(case.shape, bool)] if arrays else [True]
  if len(set(kinds)) == 1:
    every.append(True)
  for where in every:
    try:
      got = types(case.loss, where=where)
    except (TypeError, ValueError) as e:
      # What the docstrings refuse under a mask.
      assert re.search("must (be floating|have the same size)", str(e))
    else:
      assert got, expected == f"{kinds} {np.shape(where)}"


@each_mechanism()
def test_types_of_data(case, dtype):
  shapes = [x.shape for x in case.arguments(dtype)]
  for kinds in itertools.product(KINDS, repeat=min(len(shapes), 2)):
    kinds = (*kinds, *kinds[1:] * 2)[: len(shapes)]
    check_types(case, kinds, shapes, lambda f, x, kw: f(*x, **kw))


@pytest.mark.slow
@pytest.mark.parametrize("name,parameter", PARAMETERS)
def test_types_of_parameters(name, parameter):
  case = BY_NAME[name]
  shapes = [x.shape for x in case.arguments(DTYPES[0])]
  for kind, data in itertools.product(KINDS, KINDS[:4]):
    check_types(
      case,
      (kind, *[data] * len(shapes)),
      [(), *shapes],
      lambda f, x, kw: f(*x[1:], **{parameter: x[0]}, **kw),
    )
