"""Pull requests to Optax: their order, their state, and what they say."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from optax_masking.upstream._changes import (
  PROPOSALS,
  RANK_RULE,
  TEXTS,
  Proposal,
  change_of,
  real_name,
)
from optax_masking.upstream._checkout import Checkout
from optax_masking.upstream._edits import EditError, wrapped

_PACKAGE = pathlib.Path(__file__).parents[2]


def count_lines(patch: str) -> str:
  """How many lines a patch adds and removes, as `+10 -2`."""
  signs = [line[0] for line in re.findall(r"^[+-](?!\+\+ |-- ).*", patch, re.M)]
  return f"+{signs.count('+')} -{signs.count('-')}"


def apply(checkout: Checkout, proposal: Proposal) -> Checkout:
  """The checkout with all of a proposal that can be staged."""
  if proposal.name == RANK_RULE.name:
    return checkout.with_rank_rule(proposal.losses)
  return checkout.staged(n for n in proposal.losses if not checkout.obstacle(n))


def without(left_out: Collection[str]) -> list[Proposal]:
  """The proposals without some losses, and without those that call them."""
  names = set(map(real_name, left_out))
  return [
    dataclasses.replace(
      proposal,
      losses=[
        n for n in proposal.losses if not {n, change_of(n).needs} & names
      ],
    )
    for proposal in PROPOSALS
  ]


def in_order(
  checkout: Checkout, proposals: Sequence[Proposal]
) -> Iterator[tuple[Proposal, Proposal | None, Checkout, Checkout]]:
  """Each proposal, the one that it is on, and the checkout before and after."""
  chain, below = checkout, None
  for proposal in proposals:
    before, base = (checkout, None) if proposal.alone else (chain, below)
    after = apply(before, proposal)
    if not proposal.alone and after.changed(before):
      chain, below = after, proposal
    yield proposal, base, before, after


@contextlib.contextmanager
def copied(checkout: Checkout) -> Iterator[pathlib.Path]:
  """A copy of a checkout as it is, or as it would be."""
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(checkout.root / "optax", root / "optax", ignore=ignored)
    for module, text in checkout.texts.items():
      (root / "optax" / "losses" / f"{module}.py").write_text(text, "utf-8")
    yield root


def _run(checkout: Checkout, arguments: Sequence[str]) -> str:
  """Runs Python with the Optax of a checkout."""
  with copied(checkout) as root:
    path = [str(root), str(_PACKAGE), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
      [sys.executable, *arguments],
      env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
      cwd=root,
      capture_output=True,
      text=True,
    )
  if done.returncode:
    raise EditError(f"The Optax of {checkout.root} fails:\n{done.stderr}")
  return done.stdout


def check(checkout: Checkout, names: Sequence[str]) -> dict[str, list[str]]:
  """The verdict on each loss, and its program without a mask."""
  module = "optax_masking.upstream._checks"
  return json.loads(_run(checkout, ["-m", module, *names]))


_PRINTER = """
import contextlib, io, json, sys
import jax, jax.numpy as jnp, optax
def printed(code):
  out = io.StringIO()
  try:
    with contextlib.redirect_stdout(out):
      exec(code, {"jax": jax, "jnp": jnp, "optax": optax})
  except Exception as error:
    return f"{type(error).__name__}: {error}".splitlines()[0]
  return out.getvalue().strip()
print(json.dumps([printed(code) for code in sys.argv[1:]]))
"""


def print_examples(
  checkout: Checkout, proposals: Sequence[Proposal]
) -> list[str]:
  """What the examples of proposals print with a checkout."""
  examples = [p.example for p in proposals]
  return json.loads(_run(checkout, ["-c", _PRINTER, *examples]))


def message(proposal: Proposal, before: str, after: str, patch: str) -> str:
  """The title and, in Markdown, the text of a pull request."""
  subject = " and ".join(proposal.losses)
  if len(subject) > 40:
    subject = f"the {proposal.name} losses"
  title, kind = f"Keep masked elements out of {subject}", "repair"
  if "\n+    where: " in patch or "\n+      where: " in patch:
    title, kind = f"Add where to {subject}", "where"
  if proposal.name == RANK_RULE.name:
    title, kind = "Let a mask of lower rank have one entry a slice", "rank"
  elif "padded frames" in patch:
    title, kind = "Keep padded frames out of the gradients of CTC", "padding"
  names = ", ".join(f"`{n}`" for n in proposal.losses)
  notes = [change_of(n).note for n in proposal.losses if kind != "rank"]
  example = f"```python\n{proposal.example.rstrip()}\n```"
  parts = [
    title,
    wrapped(f"{names}: {proposal.repairs}", ""),
    f"{example}\nBefore:\n```\n{before}\n```\nAfter:\n```\n{after}\n```"
    * (after != before),
    wrapped(" ".join([TEXTS[kind], *filter(None, dict.fromkeys(notes))]), ""),
  ]
  if proposal.issues != "none":
    parts.append(f"Related to {proposal.issues}.")
  return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def status(checkout: Checkout) -> str:
  """Lists the pull requests in the order in which they should be made."""
  rows = list(in_order(checkout, [*PROPOSALS, RANK_RULE]))
  final = functools.reduce(apply, PROPOSALS, checkout)
  names = [n for p in PROPOSALS for n in p.losses if checkout.module_of(n)]
  with ThreadPoolExecutor() as pool:
    was, becomes = pool.map(check, (checkout, final), (names, names))
  lines = [f"Pull requests to Optax {checkout.version}, in {checkout.root}"]
  for number, (proposal, base, before, after) in enumerate(rows, 1):
    facts = ["not proposed"]
    if after.changed(before):
      facts = [count_lines(after.patch(before)) + " lines with tests"]
      facts += [f"on top of {base.name}"] if base else []
      facts += [proposal.issues] if proposal.issues != "none" else []
    lines.append(f"\n{number:2}. {proposal.name}: {', '.join(facts)}")
    lines.append(f"    {proposal.repairs}")
    for name in proposal.losses if proposal is not RANK_RULE else ():
      obstacle = checkout.obstacle(name)
      text = f"{was.get(name, [''])[0]} -> {becomes.get(name, [''])[0]}"
      if checkout.is_staged(name):
        text = f"is staged: {was[name][0]}"
      elif obstacle:
        text = f"can't be staged: {obstacle}"
      text = textwrap.indent(wrapped(f"{name}: {text}", "  ", ""), " " * 6)
      lines.append(text.rstrip())
    options = " ".join(f"--loss {n}" for n in proposal.losses)
    if proposal is RANK_RULE:
      options = "--rank-rule"
    if after.changed(before):
      lines.append(f"    optax-masking stage CHECKOUT {options}")
  return "\n".join(lines) + "\n"
