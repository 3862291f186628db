"""One row a loss: the facts that its signature does not say.

The exports, the tests, the audit, the benchmark, the table that `optax-masking
losses` prints and the staged losses are derived from these rows. A loss that is
added here is in all of them.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_masking.losses._original import original

Shape = tuple[int, ...]
Maker = Callable[[np.random.Generator, Shape], np.ndarray]
Loss = Callable[..., Any]

# Descriptions of what a mask removes that several losses share.
_ELEMENTS = "elements: 0 in the output, and not in the sum over `axis`"
_CLASSES = "classes, from the normalizer and the sum, or whole examples"
_OWN_CLASS = "also examples whose own class is masked"
_TERMS = "terms of the sum, or whole examples"
_ENTRIES = "entries of both vectors, or whole examples"
_FRAMES = (
  "frames, as padding does, or classes of a frame; also what `logit_paddings`"
  " marks"
)


# Makers of data. The last axis of a shape is that of the classes, features or
# items.


def logits(rng, shape):
  """Scores of either sign."""
  return 2 * rng.normal(size=shape)


def vectors(rng, shape):
  """Entries that are not small, for reciprocals of norms in float16."""
  return rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1.5, shape)


def soft_labels(rng, shape):
  """Targets between 0 and 1."""
  return rng.uniform(0.1, 0.9, shape)


def large_labels(rng, shape):
  """Targets that are not small, for reciprocals of squares in float16."""
  return rng.uniform(0.4, 0.9, shape)


def probabilities(rng, shape):
  """Distributions along the last axis."""
  x = rng.uniform(0.5, 2, shape)
  return x / x.sum(-1, keepdims=True)


def log_probabilities(rng, shape):
  """Logarithms of distributions along the last axis."""
  return np.log(probabilities(rng, shape))


def signs(rng, shape):
  """Binary targets as 1 and -1."""
  return rng.choice([-1.0, 1.0], shape)


def binary(rng, shape):
  """Binary targets as 1 and 0."""
  return rng.integers(0, 2, shape)


def class_index(rng, shape):
  """The class of each example."""
  return rng.integers(0, shape[-1], shape[:-1])


def pairs(rng, shape):
  """Groups of two embeddings."""
  del rng
  return np.arange(shape[0]) // 2


def symbols(sequences, frames):
  """Labels 1 and 2, the last of each second sequence padding, and paddings."""
  sequence = np.arange(sequences)[:, None]
  position = np.arange(min(max(frames // 2, 1), 16))
  labels = 1 + (sequence + position) % 2
  paddings = (sequence % 2 == 1) & (position > 0) & (position == position[-1])
  return labels, paddings.astype("float32")


# Adapters: each turns Optax's function into one of arrays, `axis` and `where`.


def _without_reduction(loss):
  def lists(logits, labels, weights, **keywords):
    return loss(logits, labels, weights=weights, reduce_fn=None, **keywords)

  return lists


def _of_logsumexp(make):
  return make(jax.nn.logsumexp)


def _of_sequences(loss):
  def sequences(logits, **keywords):
    sizes = np.delete(logits.shape, keywords.get("axis", -1)).tolist()
    labels, label_paddings = symbols(*sizes)
    paddings = np.zeros(sizes, "float32")
    result = loss(logits, paddings, labels, label_paddings, **keywords)
    return result[0] if isinstance(result, tuple) else result

  return sequences


# Each turns a shape into a similar one that Optax's loss takes.


def _as_given(shape):
  return shape


def _one_axis_of_examples(shape):
  return math.prod(shape[:-1]), shape[-1]


def _few_examples(shape):  # Each is compared with each.
  return min(math.prod(shape[:-1]), 256), shape[-1]


def _images(shape):
  if len(shape) > 2:
    return shape
  images = math.gcd(shape[0], 8)
  return images, shape[0] // images, shape[-1]


def _sequences(shape):
  rows = math.prod(shape[:-1])
  frames = math.gcd(rows, 128)
  return rows // frames, frames, shape[-1]


@dataclasses.dataclass(frozen=True)
class Row:
  """The facts about a loss.

  Attributes:
    name: The name in `optax.losses`.
    data: Makers of its arguments, in their order.
    removes: Description of what a mask removes.
    written_for: Fingerprints of the versions of Optax's function that the
      wrapper was written for; the first is that of Optax 0.2.7 and 0.2.8.
    empty: Description of the value where nothing is included.
    elementwise: Whether the loss returns a number for each element.
    slices: Whether the slices along `axis` are independent.
    keeps_shape: Whether the loss has an `axis` and returns an array like its
      data.
    shape: A shape for small data.
    adapt: Turns Optax's function into one of the data, `axis` and `where`.
    fit: Turns a shape into a similar one that Optax's loss takes.
    masks_examples: Whether the loss takes a mask without the last axis.
    result_axes: The axes of the data that the result has, if its shape does not
      show them.
    compacts: Whether masked elements can be deleted from the data. Those of
      sequences can't, since the labels, another argument, number the classes.
    makes_loss: Whether it is a function that returns the loss.
    alias_of: The loss of which this is a deprecated name.
    output_of: The loss of which this is the first result.
    mechanism: The way in which the loss is masked, named for one loss of each
      way. Tests of properties that depend on the way alone try these losses by
      day, and every loss at night.
  """

  name: str
  data: tuple[Maker, ...]
  removes: str
  written_for: tuple[str, ...]
  _: dataclasses.KW_ONLY
  empty: str = "0"
  elementwise: bool = False
  slices: bool = True
  keeps_shape: bool = False
  shape: Shape = (4, 5)
  adapt: Callable[[Loss], Loss] | None = None
  fit: Callable[[Shape], Shape] = _as_given
  masks_examples: bool = True
  result_axes: tuple[int, ...] | None = None
  compacts: bool = True
  makes_loss: bool = False
  alias_of: str | None = None
  output_of: str | None = None
  mechanism: str | None = None

  def of(self, losses: Any) -> Loss:
    """The loss of this name in a module, as a function of the data."""
    loss = getattr(losses, self.name)
    return self.adapt(loss) if self.adapt else loss

  def takes(self, parameter: str) -> bool:
    """Whether Optax's function has a parameter."""
    function = getattr(original, self.name)
    return parameter in inspect.signature(function).parameters

  @property
  def at_top(self) -> bool:
    """Whether Optax has it at its top, too."""
    return self.name in vars(optax)

  @property
  def has_axis_of_slices(self) -> bool:
    """Whether Optax's loss has an `axis` along which slices are independent."""
    return self.slices and self.takes("axis")

  def positions(self, *makers: Maker) -> tuple[int, ...]:
    """The positions of the arguments that these makers make."""
    return tuple(i for i, make in enumerate(self.data) if make in makers)

  @property
  def has_classes(self) -> bool:
    """Whether an argument is the class of each example."""
    return class_index in self.data

  @property
  def per_example(self) -> tuple[int, ...]:
    """The positions of the arguments with one entry an example."""
    return self.positions(class_index, pairs)

  @property
  def floating(self) -> tuple[int, ...]:
    """The positions of the differentiable arguments."""
    integers = self.positions(class_index, pairs, binary)
    return tuple(i for i in range(len(self.data)) if i not in integers)

  def arguments(
    self,
    dtype: Any = "float32",
    shape: Shape | None = None,
    axis: int | tuple[int, ...] = -1,
    scale: float = 1.0,
    seed: int = 0,
  ) -> tuple[jax.Array, ...]:
    """Makes data for a shape, the same at each call.

    Args:
      dtype: Dtype of the floating arguments.
      shape: Shape of the data; by default `self.shape`.
      axis: Axis or axes of the classes, features or items.
      scale: Number to multiply logits and logarithms by.
      seed: Seed of the data.
    """
    shape = self.shape if shape is None else shape
    given = axis if isinstance(axis, tuple) else (axis,)
    axes = [a % len(shape) for a in given]
    batch = [a for a in range(len(shape)) if a not in axes]
    sizes = [shape[a] for a in batch]
    flat = (*sizes, math.prod(shape[a] for a in axes))
    rng = np.random.default_rng(sum(map(ord, self.name)) + seed)

    def array(make):
      x = make(rng, flat)
      if make in (logits, log_probabilities):
        x = x * scale
      if x.ndim == len(flat):
        x = x.reshape(*sizes, *(shape[a] for a in axes))
        x = np.transpose(x, np.argsort([*batch, *axes]))
      return jnp.asarray(x, "int32" if x.dtype.kind == "i" else dtype)

    return tuple(map(array, self.data))


_CTC: dict[str, Any] = {
  "empty": "0, also if a label is included in no frame",
  "slices": False,
  "shape": (2, 4, 3),
  "adapt": _of_sequences,
  "fit": _sequences,
  "result_axes": (0,),
  "compacts": False,
}

_ROWS = (
  Row(
    "softmax_cross_entropy",
    (logits, soft_labels),
    _CLASSES,
    ("d199865b",),
    mechanism="a formula with probabilities",
  ),
  Row(
    "softmax_cross_entropy_with_integer_labels",
    (logits, class_index),
    f"classes, from the normalizer, or whole examples; {_OWN_CLASS}",
    ("53a93425",),
    mechanism="a formula with a class",
  ),
  Row(
    "safe_softmax_cross_entropy", (logits, soft_labels), _CLASSES, ("7cdce703",)
  ),
  Row(
    "poly_loss_cross_entropy",
    (logits, soft_labels),
    _CLASSES,
    ("53656573",),
    mechanism="a fill of a softmax",
  ),
  Row(
    "ranking_softmax_loss",
    (logits, soft_labels, soft_labels),
    "items of a list, from the normalizer and the sum, or whole lists; also"
    " from the count of `reduce_fn`",
    ("eb71e2ed",),
    empty="0, any mean too",
    adapt=_without_reduction,
  ),
  Row(
    "multiclass_hinge_loss",
    (logits, class_index),
    f"classes, from the maximum, or whole examples; {_OWN_CLASS}",
    ("0555c84a",),
    fit=_one_axis_of_examples,
    mechanism="a fill of a maximum, with a class",
  ),
  Row(
    "multiclass_perceptron_loss",
    (logits, class_index),
    f"classes, from the maximum, or whole examples; {_OWN_CLASS}",
    ("568b91a4",),
    fit=_one_axis_of_examples,
  ),
  Row(
    "multiclass_sparsemax_loss",
    (logits, class_index),
    f"classes, from the projection, or whole examples; {_OWN_CLASS}",
    ("37639fac",),
    fit=_one_axis_of_examples,
  ),
  Row(
    "make_fenchel_young_loss",
    (logits, soft_labels),
    "of the loss it returns: entries, from the maximum and the sum, or whole"
    " examples",
    ("5f8e6a5a",),
    adapt=_of_logsumexp,
    makes_loss=True,
  ),
  Row(
    "kl_divergence",
    (log_probabilities, probabilities),
    _TERMS,
    ("fcfa2a1e",),
    mechanism="fills that are numbers",
  ),
  Row(
    "kl_divergence_with_log_targets",
    (log_probabilities, log_probabilities),
    _TERMS,
    ("ba393901",),
  ),
  Row(
    "generalized_kl_divergence",
    (logits, probabilities),
    _TERMS,
    ("522956b3",),
  ),
  Row(
    "convex_kl_divergence",
    (logits, probabilities),
    _TERMS,
    ("200e36fc",),
    alias_of="generalized_kl_divergence",
  ),
  Row(
    "cosine_similarity",
    (logits, logits),
    _ENTRIES,
    ("c9a363db",),
  ),
  Row(
    "cosine_distance",
    (logits, logits),
    _ENTRIES,
    ("770e02c1",),
    mechanism="a fill of norms",
  ),
  Row(
    "triplet_margin_loss",
    (logits, logits, logits),
    "entries of the three vectors, or whole examples",
    ("0832ee6a",),
  ),
  Row(
    "sigmoid_binary_cross_entropy",
    (logits, soft_labels),
    _ELEMENTS,
    ("fa58b3e2",),
    elementwise=True,
    mechanism="a formula of elements",
  ),
  Row(
    "sigmoid_focal_loss",
    (logits, soft_labels),
    _ELEMENTS,
    ("ca92d550", "b25df937"),
    elementwise=True,
  ),
  Row(
    "hinge_loss", (logits, signs), _ELEMENTS, ("c7597056",), elementwise=True
  ),
  Row(
    "perceptron_loss",
    (logits, signs),
    _ELEMENTS,
    ("9be3f7c3",),
    elementwise=True,
  ),
  Row(
    "sparsemax_loss",
    (logits, binary),
    _ELEMENTS,
    ("c74fb491",),
    elementwise=True,
  ),
  Row(
    "squared_error",
    (logits, logits),
    _ELEMENTS,
    ("5cb021b1",),
    elementwise=True,
    mechanism="a formula of errors",
  ),
  Row("l2_loss", (logits, logits), _ELEMENTS, ("85cf2c50",), elementwise=True),
  Row(
    "huber_loss", (logits, logits), _ELEMENTS, ("0c328dec",), elementwise=True
  ),
  Row("log_cosh", (logits, logits), _ELEMENTS, ("053fd849",), elementwise=True),
  Row(
    "smooth_labels",
    (soft_labels, soft_labels),
    "classes: 0 in the output, and `alpha` is spread over the others; or whole"
    " examples",
    ("f96ddf7e",),
    empty="0 for each class",
    keeps_shape=True,
    mechanism="a result of the data's shape",
  ),
  Row(
    "dice_loss",
    (logits, soft_labels),
    "pixels, by a mask of their shape, or pixel-class pairs: from all sums;"
    " classes of which it leaves no pixel, from the mean",
    ("6008cf68", "4e4ed75a"),
    slices=False,
    shape=(2, 4, 3),
    fit=_images,
    mechanism="a batch of images",
  ),
  Row(
    "multiclass_generalized_dice_loss",
    (logits, large_labels),
    "as `dice_loss`, and from the frequencies that weight the classes",
    ("3fb94ed9",),
    slices=False,
    shape=(2, 4, 3),
    fit=_images,
  ),
  Row(
    "binary_dice_loss",
    (logits, soft_labels),
    "pixels, from all sums",
    ("3ae98a10",),
    slices=False,
    masks_examples=False,
    result_axes=(0,),
  ),
  Row(
    "ntxent",
    (vectors, pairs),
    "embeddings, as if they were not in the batch, or entries of the vectors",
    ("0dda955b",),
    empty="0, without a positive pair",
    slices=False,
    shape=(6, 5),
    fit=_few_examples,
    mechanism="a batch of embeddings",
  ),
  Row(
    "ctc_loss",
    (logits,),
    _FRAMES,
    ("8cebdd80",),
    output_of="ctc_loss_with_forward_probs",
    **_CTC,
  ),
  Row(
    "ctc_loss_with_forward_probs",
    (logits,),
    _FRAMES,
    ("91732f90",),
    mechanism="a batch of sequences",
    **_CTC,
  ),
)

ROWS = {row.name: row for row in _ROWS}
