"""Draws a training that NaN in padding ends, and where the NaN is.

A small network learns waves of different lengths, padded to one length. The
targets of the padding are NaN. One training takes `jnp.mean(loss, where=mask)`,
of Optax's loss: the loss of its first step is right, the gradient is NaN, and
so is every later loss. The other has `where=mask` in the loss, too.

The output has the losses on the way and the numbers of NaN in the gradient of
one batch. The pictures are SVG, each for a light and for a dark page:
`training-*.svg` has the losses over the steps, `gradients-*.svg` the gradient
with respect to each prediction of the batch.

    pip install -e '.[pictures]'
    python examples/pictures.py                       # To docs/_static.
    python examples/pictures.py --output pictures
"""

import argparse
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax as plain_optax

import optax_masking as optax
from optax_masking import reductions

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROWS, LENGTH, STEPS = 10, 24, 200
DOCS = pathlib.Path(__file__).parents[1] / "docs" / "_static"
THEMES = {
  "light": {"ink": "#1f2328", "good": "#0f7b5f", "bad": "#c0392b"},
  "dark": {"ink": "#d5d9de", "good": "#4cc9a0", "bad": "#ff7b6b"},
}
INKS = (
  "text.color",
  "axes.labelcolor",
  "axes.edgecolor",
  "xtick.color",
  "ytick.color",
)

Params = dict[str, jax.Array]
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def make_batch() -> tuple[jax.Array, jax.Array]:
  """Features of each position, and its target, which is NaN in the padding."""
  rng = np.random.default_rng(0)
  time = np.linspace(0, 1, LENGTH)
  pitch, phase = rng.uniform(2, 8, (ROWS, 1)), rng.uniform(0, 3, (ROWS, 1))
  angle = pitch * time + phase
  x = np.stack(np.broadcast_arrays(time, pitch / 8, phase / 3), axis=-1)
  lengths = np.sort(rng.integers(4, LENGTH + 1, ROWS))[::-1]
  padding = np.arange(LENGTH) >= lengths[:, None]
  return jnp.array(x), jnp.where(padding, jnp.nan, jnp.sin(angle))


def init_params() -> Params:
  first, second = jax.random.split(jax.random.key(0))
  return {
    "hidden": 3 * jax.random.normal(first, (3, 64)),
    "bias": jnp.zeros(64),
    "out": jax.random.normal(second, (64,)) / 8,
  }


def predict(params: Params, x: jax.Array) -> jax.Array:
  return jnp.tanh(x @ params["hidden"] + params["bias"]) @ params["out"]


def mean_where(predictions: jax.Array, targets: jax.Array) -> jax.Array:
  """The usual code without a maskable loss."""
  losses = plain_optax.squared_error(predictions, targets)
  return jnp.mean(losses, where=~jnp.isnan(targets))


def masked(predictions: jax.Array, targets: jax.Array) -> jax.Array:
  mask = ~jnp.isnan(targets)
  losses = optax.squared_error(predictions, targets, where=mask)
  return reductions.masked_mean(losses, mask)


def train(loss: Loss, x: jax.Array, y: jax.Array) -> list[float]:
  """The loss before each step, and after the last."""
  params = init_params()
  optimizer = optax.adam(0.02)
  state = optimizer.init(params)

  def loss_fn(params: Params) -> jax.Array:
    return loss(predict(params, x), y)

  @jax.jit
  def step(
    params: Params, state: plain_optax.OptState
  ) -> tuple[Params, plain_optax.OptState, jax.Array]:
    value, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  values = []
  for _ in range(STEPS + 1):
    params, state, value = step(params, state)
    values.append(float(value))
  return values


def save(figure: Any, path: pathlib.Path) -> None:
  # Without metadata: a picture that has not changed is the same file.
  unknown = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  figure.savefig(path, facecolor="none", metadata=unknown)
  plt.close(figure)
  text = path.read_text(
    encoding="utf-8"
  ).splitlines()  # Without spaces at ends.
  path.write_text("\n".join(map(str.rstrip, text)) + "\n", encoding="utf-8")
  print(f"  {path}")


def draw_training(
  curves: dict[str, list[float]], colors: dict[str, str], path: pathlib.Path
) -> None:
  figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
  for (name, values), color in zip(
    curves.items(), (colors["bad"], colors["good"]), strict=True
  ):
    finite = [v for v in values if math.isfinite(v)]
    ends = len(finite) < len(values)
    axes.plot(finite, color=color, marker="X" if ends else None, ms=9)
    note = f"{name}\nNaN from the second step on" if ends else name
    place = (6, finite[0]) if ends else (70, values[70] * 1.5)
    axes.annotate(note, place, color=color, va="center")
  axes.set(yscale="log", xlabel="step", ylabel="loss")
  axes.spines[["top", "right"]].set_visible(False)
  save(figure, path)


def draw_gradients(
  gradients: dict[str, np.ndarray], colors: dict[str, str], path: pathlib.Path
) -> None:
  figure, panels = plt.subplots(
    1, 2, figsize=(6.4, 3), layout="constrained", sharey=True
  )
  finite = [g[np.isfinite(g)] for g in gradients.values()]
  largest = max(abs(g).max() for g in finite)
  for axes, (name, gradient) in zip(panels, gradients.items(), strict=True):
    image = axes.imshow(
      np.ma.masked_invalid(gradient),
      cmap=plt.get_cmap("PRGn").with_extremes(bad=colors["bad"]),
      vmin=-largest,
      vmax=largest,
      interpolation="none",
      aspect="auto",
    )
    nans = int(np.isnan(gradient).sum())
    title = f"{nans} of {gradient.size} are NaN" if nans else "no NaN"
    axes.set_title(f"{name}\n{title}", fontsize=10)
    axes.set(xlabel="position", yticks=[])
  panels[0].set_ylabel("sequence")
  figure.colorbar(image, ax=panels, label="gradient", shrink=0.9)
  nan = plt.Rectangle((0, 0), 1, 1, color=colors["bad"])
  panels[0].legend(
    [nan], ["NaN"], loc="lower right", labelcolor="#1f2328", facecolor="white"
  )
  save(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description="Draws NaN in gradients.")
  parser.add_argument("--output", type=pathlib.Path, default=DOCS)
  output = parser.parse_args(argv).output

  x, y = make_batch()
  losses = {"jnp.mean(loss, where=mask)": mean_where, "where=mask": masked}
  curves = {name: train(loss, x, y) for name, loss in losses.items()}
  print(f"  step   {'   '.join(curves)}")
  for i in (0, 1, STEPS // 4, STEPS // 2, STEPS):
    numbers = (f"{v[i]:{len(name)}.4f}" for name, v in curves.items())
    print(f"  {i:4}   {'   '.join(numbers)}")

  predictions = predict(init_params(), x)
  gradients = {
    name: np.array(jax.grad(loss)(predictions, y))
    for name, loss in losses.items()
  }
  nans = {name: int(np.isnan(g).sum()) for name, g in gradients.items()}
  print(f"\nGradient with respect to {y.size} predictions:")
  for name, count in nans.items():
    print(f"  {name:27} NaN in {count}")

  output.mkdir(parents=True, exist_ok=True)
  print("\nPictures:")
  for theme, colors in THEMES.items():
    ink = {name: colors["ink"] for name in INKS}
    fixed = {"svg.hashsalt": "optax_masking", "axes.facecolor": "none"}
    with matplotlib.rc_context({**ink, **fixed, "font.size": 10}):
      draw_training(curves, colors, output / f"training-{theme}.svg")
      draw_gradients(gradients, colors, output / f"gradients-{theme}.svg")

  wrong, right = curves.values()
  padding = int(np.isnan(y).sum())
  if list(nans.values()) != [padding, 0]:
    sys.exit("error: NaN is not where it is expected.")
  if not (
    math.isclose(wrong[0], right[0], rel_tol=1e-5) and math.isnan(wrong[1])
  ):
    sys.exit("error: the other training is not as it is described.")
  if not right[-1] < 0.1 * right[0]:
    sys.exit("error: the masked training did not fall to a tenth.")


if __name__ == "__main__":
  main()
