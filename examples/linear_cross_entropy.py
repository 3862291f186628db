"""Trains the character model without an array of all its logits.

The model of `padded_text.py` is trained twice, by the same steps: with the
loss of its logits, and with the loss of its last layer, of which only blocks of
logits exist and none of padding. The output has the losses of both, which are
the same but for rounding, and the temporaries of a step. With the few classes
of characters the logits are no large part of them; with as many classes as a
tokenizer has, they are nearly all. The features of the padding are NaN.

    python examples/linear_cross_entropy.py
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from padded_text import (
  CONTEXT,
  END,
  PADDING,
  Params,
  encode,
  find_characters,
  find_sentences,
  init_params,
  pad,
)

import optax_masking as optax
from optax_masking.reductions import masked_mean

Loss = Callable[[Params, jax.Array], jax.Array]


def features_of(params: Params, labels: jax.Array) -> jax.Array:
  """The inputs of the last layer, and NaN in the padding."""
  length = labels.shape[1]
  text = jnp.pad(jnp.maximum(labels, 0), ((0, 0), (CONTEXT, 0)))
  contexts = jnp.stack([text[:, i : i + length] for i in range(CONTEXT)], -1)
  x = params["embed"][contexts].reshape(*contexts.shape[:-1], -1)
  x = jax.nn.relu(x @ params["hidden"] + params["hidden_bias"])
  return x + jnp.where(labels == PADDING, jnp.nan, 0.0)[..., None]


def unfused_loss(params: Params, labels: jax.Array) -> jax.Array:
  """The mean loss of a character, from all logits."""
  mask = labels != PADDING
  # Garbage would get from the features into the gradient of `out`.
  features = jnp.where(mask[..., None], features_of(params, labels), 0)
  losses = optax.softmax_cross_entropy_with_integer_labels(
    features @ params["out"] + params["out_bias"], labels, where=mask
  )
  return masked_mean(losses, mask)


def fused_loss(params: Params, labels: jax.Array) -> jax.Array:
  """The same, from blocks of logits."""
  mask = labels != PADDING
  losses = optax.linear_softmax_cross_entropy_with_integer_labels(
    features_of(params, labels),
    params["out"],
    labels,
    bias=params["out_bias"],
    where=mask,
  )
  return masked_mean(losses, mask)


def compile_step(
  loss: Loss, params: Params, batch: jax.Array, steps: int
) -> tuple[Any, Any]:
  """The program of a step, and the state that it begins with."""
  optimizer = optax.adamw(optax.cosine_decay_schedule(4e-3, steps))
  state = jax.eval_shape(optimizer.init, params)

  def step(params, state, batch):
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  program = jax.jit(step, donate_argnums=1).lower(params, state, batch)
  return program.compile(), optimizer.init


def train(
  loss: Loss, params: Params, batches: Sequence[jax.Array]
) -> list[float]:
  """The loss of each batch before its step."""
  program, init = compile_step(loss, params, batches[0], len(batches))
  state = init(params)
  losses = []
  for batch in batches:
    params, state, value = program(params, state, batch)
    losses.append(float(value))
  return losses


def temporaries(loss: Loss, batch: jax.Array, classes: int) -> str:
  """What a step with so many classes needs beside parameters and results."""
  params = jax.eval_shape(lambda k: init_params(k, classes), jax.random.key(0))
  program, _ = compile_step(loss, params, batch, 1)
  memory = program.memory_analysis()
  return (
    "unknown"
    if memory is None
    else (f"{memory.temp_size_in_bytes / 1e6:,.0f} MB")
  )


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description="Trains with blocks of logits.")
  parser.add_argument("--steps", type=int, default=40)
  parser.add_argument("--sentences", type=int, default=128, help="in a batch")
  options = parser.parse_args(argv)

  sentences = find_sentences()
  characters = find_characters(sentences)
  text = pad([encode(s + END, characters) for s in sentences])
  rng = np.random.default_rng(0)
  rows = (
    rng.choice(len(text), options.sentences) for _ in range(options.steps)
  )
  batches = [text[row] for row in rows]
  print(
    f"{(text == PADDING).mean():.0%} of the text is padding;"
    f" {len(characters)} classes, {batches[0].size:,} rows in a batch\n\n"
    "Loss in nats per character:\n   step    unfused      fused"
  )
  params = init_params(jax.random.key(0), len(characters))
  unfused = train(unfused_loss, params, batches)
  fused = train(fused_loss, params, batches)
  for i in range(0, len(batches), max(len(batches) // 8, 1)):
    print(f"  {i:5}   {unfused[i]:8.4f}   {fused[i]:8.4f}")
  print("\nTemporaries of a step:\n  classes    unfused      fused")
  for classes in (len(characters), 16000):
    sizes = (
      temporaries(loss, batches[0], classes)
      for loss in (unfused_loss, fused_loss)
    )
    print(f"{classes:9,}  " + "".join(f"{size:>9}  " for size in sizes))
  # Rounding grows from step to step.
  if not np.allclose(unfused, fused, rtol=1e-2):
    sys.exit("error: the losses differ.")
  if not fused[-1] < 0.9 * fused[0]:
    sys.exit("error: the loss did not fall by a tenth.")


if __name__ == "__main__":
  main()
