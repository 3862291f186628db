"""Trains a character model on sentences of varied length, padded with NaN.

The text is that of Python's own `help()` about the language, which differs a
little from one version to the next. The sentences of a batch are padded to one
length. In the padding every label is -100 and every logit NaN, so that padding
that gets into a gradient can't go unnoticed.

The output has the falling training and held-out losses, a few sentences that
the model makes up, and the gradients of one batch next to those of the same
sentences without any padding: with `where=mask`, and with `loss * mask`. The
loss with `loss * mask` may look right, since XLA can make a select of a product
with a mask. Its gradient is NaN all the same.

    python examples/padded_text.py
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax as plain_optax
from jax.flatten_util import ravel_pytree

import optax_masking as optax
from optax_masking import reductions

CONTEXT = 8  # The model sees so many characters before the one it predicts.
LONGEST = 120  # Characters in a sentence.
PADDING = -100  # The label behind the end of a sentence.
END = "\n"  # Ends a sentence and, as its context, begins it. Its index is 0.

Params = dict[str, jax.Array]
Loss = Callable[[Params, jax.Array], jax.Array]


def find_sentences() -> list[str]:
  paragraphs = "\n\n".join(topics.values()).split("\n\n")
  lines = (" ".join(paragraph.split()) for paragraph in paragraphs)
  parts = (part for line in lines for part in re.split(r"(?<=\.) ", line))
  pattern = re.compile(rf"[A-Z][^|]{{18,{LONGEST - 2}}}\.")  # No tables.
  return sorted({p for p in parts if p.isascii() and pattern.fullmatch(p)})


def find_characters(sentences: Sequence[str]) -> str:
  return END + "".join(sorted(set("".join(sentences))))


def encode(text: str, characters: str) -> list[int]:
  return [characters.index(c) for c in text]


def pad(sequences: Sequence[list[int]]) -> jax.Array:
  labels = np.full((len(sequences), LONGEST + 1), PADDING)
  for row, sequence in zip(labels, sequences, strict=True):
    row[: len(sequence)] = sequence
  return jnp.array(labels)


def init_params(key: jax.Array, characters: int) -> Params:
  embed, hidden, out = jax.random.split(key, 3)
  inputs, units = CONTEXT * 24, 256
  return {
    "embed": jax.random.normal(embed, (characters, 24)),
    "hidden": jax.random.normal(hidden, (inputs, units)) / inputs**0.5,
    "hidden_bias": jnp.zeros(units),
    "out": 0.1 * jax.random.normal(out, (units, characters)) / units**0.5,
    "out_bias": jnp.zeros(characters),
  }


def predict(params: Params, contexts: jax.Array) -> jax.Array:
  """Logits of the character that follows each context."""
  x = params["embed"][contexts].reshape(*contexts.shape[:-1], -1)
  x = jax.nn.relu(x @ params["hidden"] + params["hidden_bias"])
  return x @ params["out"] + params["out_bias"]


def predict_all(params: Params, labels: jax.Array) -> jax.Array:
  """Logits of each character of each sentence, and NaN in the padding."""
  length = labels.shape[1]
  text = jnp.pad(jnp.maximum(labels, 0), ((0, 0), (CONTEXT, 0)))
  contexts = [text[:, i : i + length] for i in range(CONTEXT)]
  logits = predict(params, jnp.stack(contexts, axis=-1))
  # Added, since a select would keep NaN gradients from reaching the parameters.
  return logits + jnp.where(labels == PADDING, jnp.nan, 0.0)[..., None]


def masked_losses(
  params: Params, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The loss of each character, and a mask without the padding."""
  mask = labels != PADDING
  return optax.softmax_cross_entropy_with_integer_labels(
    predict_all(params, labels), labels, where=mask
  ), mask


def masked_loss(
  params: Params,
  labels: jax.Array,
  denominator: jax.Array | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """The mean loss of a character, on all devices of a named axis."""
  return reductions.masked_mean(
    *masked_losses(params, labels), denominator=denominator, axis_name=axis_name
  )


def loss_times_mask(params: Params, labels: jax.Array) -> jax.Array:
  """The usual code without `where`: its gradient is NaN."""
  mask = labels != PADDING
  losses = plain_optax.softmax_cross_entropy_with_integer_labels(
    predict_all(params, labels), labels
  )
  return (losses * mask).sum() / mask.sum()


def unpadded_loss(params: Params, labels: jax.Array) -> jax.Array:
  """The sum of the losses of a sentence at its own length, by plain Optax."""
  return plain_optax.softmax_cross_entropy_with_integer_labels(
    predict_all(params, labels), labels
  ).sum()


def train(
  params: Params, train_set: jax.Array, held_out: jax.Array, steps: int
) -> tuple[Params, list[float]]:
  """Returns the trained parameters and the held-out losses on the way."""
  optimizer = optax.adamw(optax.cosine_decay_schedule(4e-3, steps))
  state = optimizer.init(params)
  evaluate = jax.jit(masked_loss)

  @jax.jit
  def step(
    params: Params, state: plain_optax.OptState, batch: jax.Array
  ) -> tuple[Params, plain_optax.OptState]:
    grads = jax.grad(masked_loss)(params, batch)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  print("\nLoss in nats per character:\n   step   training   held-out")
  rng = np.random.default_rng(0)
  losses = []
  for i in range(steps + 1):
    if i * 8 % steps < 8:  # Nine times, at the beginning and at the end too.
      training = evaluate(params, train_set[: len(held_out)])
      losses.append(float(evaluate(params, held_out)))
      print(f"  {i:5}   {training:8.3f}   {losses[-1]:8.3f}", flush=True)
    if i < steps:
      batch = train_set[rng.choice(len(train_set), 32, replace=False)]
      params, state = step(params, state, batch)
  return params, losses


def write(params: Params, text: str, characters: str) -> str:
  """Continues a sentence, for one line of output."""
  rng = np.random.default_rng(0)
  while len(text) < 72 and not text.endswith(END):
    context = encode((END * CONTEXT + text)[-CONTEXT:], characters)
    logits = predict(params, jnp.array(context))
    p = np.array(jax.nn.softmax(3 * logits))
    text += characters[rng.choice(len(characters), p=p)]
  return text.strip() if text.endswith(END) else text + "..."


@partial(jax.jit, static_argnums=0)
def loss_and_gradient(
  loss: Loss, params: Params, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
  value, grads = jax.value_and_grad(loss)(params, labels)
  return value, ravel_pytree(grads)[0]


def compare_gradients(params: Params, sequences: list[list[int]]) -> bool:
  """Whether a padded batch has the gradient of its unpadded sentences."""
  tokens = sum(map(len, sequences))
  unpadded = [
    loss_and_gradient(unpadded_loss, params, jnp.array([sequence]))
    for sequence in sequences
  ]
  loss, exact = (
    jnp.stack(x).sum(0) / tokens for x in zip(*unpadded, strict=True)
  )
  largest = abs(exact).max()
  print(f"\nOne batch of {len(sequences)} held-out sentences:")
  print("                          loss   gradient")
  print(f"  each unpadded        {loss:7.4f}   largest entry {largest:.1e}")

  batch = pad(sequences)
  loss, grad = loss_and_gradient(masked_loss, params, batch)
  error = abs(grad - exact).max()
  print(f"  padded, where=mask   {loss:7.4f}   differs by at most {error:.1e}")
  loss, grad = loss_and_gradient(loss_times_mask, params, batch)
  nans = f"{jnp.isnan(grad).sum():,} of {grad.size:,}"
  print(f"  padded, loss * mask  {loss:7.4f}   NaN in {nans} entries")
  # The two sums add some 1,000 float32 terms in different orders.
  return bool(error <= 1e-5 * largest)


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description="Trains on padded sentences.")
  parser.add_argument("--steps", type=int, default=800, help="at least 20")
  steps = parser.parse_args(argv).steps

  sentences = find_sentences()
  np.random.default_rng(0).shuffle(sentences)
  lengths = [len(sentence) for sentence in sentences]
  characters = find_characters(sentences)
  sequences = [encode(s + END, characters) for s in sentences]
  count = len(sequences) // 10
  held_out, train_set = pad(sequences[:count]), pad(sequences[count:])
  padding = (train_set == PADDING).mean()
  print(
    f"{len(sentences):,} sentences, {count} of them held out\n"
    f"{min(lengths)} to {max(lengths)} characters in a sentence,"
    f" {len(characters) - 1} distinct ones in all\n"
    f"{padding:.0%} of the training set is padding"
  )

  params = init_params(jax.random.key(0), len(characters))
  params, losses = train(params, train_set, held_out, steps)
  if not losses[-1] < 0.9 * losses[0]:
    sys.exit("error: the held-out loss did not fall by a tenth.")

  print("\nThe model writes:")
  for start in ("The ", "If the ", "Return ", "An exception "):
    print(" ", write(params, start, characters))
  # Some accelerators multiply float32 in fewer bits unless asked not to.
  with jax.default_matmul_precision("highest"):
    if not compare_gradients(params, sequences[:8]):
      sys.exit("error: the padding changed the gradients.")


if __name__ == "__main__":
  main()
