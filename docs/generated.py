"""The parts of the pages that are made when the documentation is built.

They are written to `docs/_generated`. The audit of Optax, which takes 20
seconds, is kept in `docs/_build` until a version or the code of the audit
changes. With `DOCS_WITHOUT_AUDIT=1` a placeholder takes its place.
"""

import collections
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import optax

import optax_masking
from optax_masking import _command
from optax_masking.losses._table import ROWS
from optax_masking.testing import CLAUSES

HERE = pathlib.Path(__file__).parent
GENERATED = HERE / "_generated"
SKIP_AUDIT = "DOCS_WITHOUT_AUDIT"
_FAMILIES = {
  "_classification": "Classification and divergences",
  "_fenchel_young": "Fenchel-Young losses",
  "_ranking": "Ranking",
  "_regression": "Regression and similarity",
  "_segmentation": "Segmentation",
  "_self_supervised": "Contrastive learning",
  "_smoothing": "Smoothing",
}
_MARKS = {"kept": "✓", "broken": "✗"}


def write_all():
  """Writes what has changed, and leaves other files as they are."""
  (GENERATED / "extra").mkdir(parents=True, exist_ok=True)
  copy_mathjax(GENERATED / "static" / "mathjax")
  _write("losses.md", table_of_losses())
  _write("api_losses.md", reference_of_losses())
  _write("commands.md", help_of_commands())
  if os.environ.get(SKIP_AUDIT):
    audit, page = None, "<!doctype html><p>The audit was skipped.</p>\n"
  else:
    audit, page = audit_of_optax()
  _write("optax_today.md", optax_today(audit))
  _write("extra/audit.html", page)


def _write(name, text):
  path = GENERATED / name
  if not path.exists() or path.read_text(encoding="utf-8") != text:
    path.write_text(text, encoding="utf-8")


def copy_mathjax(folder):
  """Copies the one program and the fonts that formulas need, 1 of 24 MB."""
  spec = importlib.util.find_spec("sphinx-mathjax-offline")
  source = pathlib.Path(spec.origin).parent / "static" / "mathjax"
  fonts = "output/chtml/fonts"
  shutil.copytree(source / fonts, folder / fonts, dirs_exist_ok=True)
  shutil.copy2(source / "tex-chtml.js", folder)


def table_of_losses():
  """What `optax-masking losses` prints, each name a link to its entry."""
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    _command.main(["losses"])
  return re.sub(
    r"(?m)^\| `(?:losses\.)?(\w+)`",
    lambda name: f"| [{name[0][2:]}]({_entry(name[1])})",
    output.getvalue(),
  )


def _entry(name):
  return f"#optax_masking.losses.{name}"


def reference_of_losses():
  """An entry for each loss, in the order of Optax's files."""
  families = collections.defaultdict(list)
  for name in ROWS:
    loss = getattr(optax_masking.losses, name)
    families[loss.__module__.rpartition(".")[2]].append(name)
  if families.keys() - _FAMILIES.keys():
    raise ValueError(f"a file without a title: {sorted(families)}")
  lines = []
  for file, title in _FAMILIES.items():
    lines += [f"## {title}", "", "```{eval-rst}"]
    for name in families[file]:
      lines.append(f".. autofunction:: optax_masking.losses.{name}")
    lines += ["```", ""]
  return "\n".join(lines)


def help_of_commands():
  """What each command prints with `--help`."""
  lines = []
  for name in ("losses", "audit", "stage", "status"):
    output = io.StringIO()
    with (
      contextlib.redirect_stdout(output),
      contextlib.suppress(SystemExit),
      mock.patch.dict(os.environ, {"COLUMNS": "80", "NO_COLOR": "1"}),
    ):
      _command.main([name, "--help"])
    lines += [f"## optax-masking {name}", "", "```text"]
    lines += [output.getvalue().rstrip(), "```", ""]
  return "\n".join(lines)


def audit_of_optax():
  """The quick audit of Optax as data, and as a page."""
  folder = HERE / "_build" / f"audit-{_fingerprint()}"
  data, page = folder / "audit.json", folder / "audit.html"
  if not (data.exists() and page.exists()):
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "optax_masking", "audit", "--quick"]
    command += ["optax", "--format", "json", "--output", str(data)]
    result = subprocess.run(
      [*command, "--also", f"html={page}"],
      cwd=HERE.parent,
      stderr=subprocess.PIPE,
      text=True,
    )
    if result.returncode not in (0, 1):  # 1: it has findings.
      raise RuntimeError(f"the audit of Optax failed:\n{result.stderr}")
  return json.loads(data.read_text("utf-8")), page.read_text("utf-8")


def _fingerprint():
  """Changes with the versions, and with the code that the audit is made of."""
  digest = hashlib.sha256()
  for module in (optax, jax, np):
    digest.update(f"{module.__name__} {module.__version__}\n".encode())
  package = pathlib.Path(optax_masking.__file__).parent
  losses = pathlib.Path(optax.__file__).parent / "losses"
  for file in sorted([*package.rglob("*.py"), *losses.rglob("*.py")]):
    digest.update(file.read_bytes())
  for file in sorted(package.glob("testing/_audit_formats/page.*")):
    digest.update(file.read_bytes())
  return digest.hexdigest()[:16]


def optax_today(audit):
  """The clauses that the losses of an audit keep, as Markdown."""
  if audit is None:
    return (
      ":::{warning}\nThe table is missing, since this documentation was built"
      f" with `{SKIP_AUDIT}` set.\nBuild it without, or run the command above."
      "\n:::\n"
    )
  reports = audit["targets"]["optax"]
  with_where = {n: r for n, r in reports.items() if _takes_where(r)}
  without = [name for name in reports if name not in with_where]
  versions = audit["versions"]
  clean = ", ".join(f"`{name}`" for name in reports if reports[name]["ok"])
  lines = [
    f"Of the {len(reports)} losses of Optax {versions['optax']}, with JAX"
    f" {versions['jax']}, {len(with_where)} take a mask.",
    f"Losses that keep all clauses: {clean or 'none'}.",
    "",
    "{.marks}",
    *_grid(with_where),
    "",
    "✓ kept, ✗ broken, · not tried, empty: does not apply, or another clause"
    " reports it. A name leads to what breaks.",
    "",
    f"The other {len(without)} have no `where`:",
    ", ".join(f"`{name}`" for name in without) + ".",
    "",
    "## What breaks",
    "",
  ]
  for name, report in with_where.items():
    lines += [f"(today-{name.replace('_', '-')})=", f"### `{name}`", ""]
    lines += [*_examples(report), ""]
  return "\n".join(lines)


def _takes_where(report):
  return report["clauses"]["accepts"] != "broken"


def _grid(reports):
  clauses = [clause for clause in CLAUSES if clause != "accepts"]
  heads = ["loss", *(clause.replace("_", " ") for clause in clauses)]
  yield "| " + " | ".join(heads) + " |"
  yield "|:--" + "|:-:" * len(clauses) + "|"
  for name, report in reports.items():
    link = f"[`{name}`](#today-{name.replace('_', '-')})"
    marks = (_mark(report["clauses"].get(clause, "")) for clause in clauses)
    yield f"| {link} | " + " | ".join(marks) + " |"


def _mark(state):
  return _MARKS.get(state, " " if state.startswith("does not apply") else "·")


def _examples(report):
  """The first finding of each broken clause."""
  first = {}
  for finding in report["findings"]:
    first.setdefault(finding["clause"], finding)
  if not first:
    return ["Nothing."]
  return [
    f"- **{clause.replace('_', ' ')}.** {_escaped(finding['message'])}"
    for clause, finding in first.items()
  ]


def _escaped(message):
  """A sentence in which nothing but what is between backticks is markup."""
  prose = functools.partial(re.sub, r"([\\*_\[\]<>|~$&#])", r"\\\1")
  return "`".join(
    part if i % 2 else prose(part)
    for i, part in enumerate(" ".join(message.split()).split("`"))
  )
