"""Changes the code at random, and looks whether the tests of a loss notice.

    python tests/mutations.py                       # 150 mutants, seed 0.
    python tests/mutations.py --number 20 --seed 1  # Others, and fewer.
    python tests/mutations.py fills.py:98           # All of a line, or a file.

Cosmic Ray makes the mutants and runs pytest. What is here draws a sample, and
gives each mutant the tests of losses that use what it changes. All of it
happens in a copy. The exit status is 1 if a mutant survives.
"""

import argparse
import ast
import collections
import functools
import itertools
import os
import pathlib
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile

import parso
from conftest import CACHE
from cosmic_ray.commands.init import _all_work_items as all_work_items
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import OPERATOR_PROVIDERS

from optax_masking.losses import _table as table

ENGINE = (
  "_mask.py",
  "_decorator.py",
  "_compiled.py",
  "_classes.py",
  "fills.py",
)
NOT_MUTATED = ("_table.py", "_original.py")
# In these a loss is an example, of the test kit or of what is staged.
UNRELATED = "audit audit_formats guard new_loss processes pytest_plugin staging"
PYTEST = (
  f"{shlex.quote(sys.executable)} -m pytest -x -q -p no:cacheprovider --tb=line"
  + "".join(f" --ignore=tests/test_{name}.py" for name in UNRELATED.split())
)
TIMEOUT = 900  # Seconds, for all tests of one speed.
# Of Cosmic Ray's operators those whose mutants a test could miss: `x << y` in
# the place of `x * y` is an error for any floats.
OPERATORS = re.compile(
  r".*/(Number|Replace(True|False|And|Or|Continue)|AddNot|Remove|Exception|Zero"
  r"|Argument|Name)|.*_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Pow_Mul"
  r"|Mod_FloorDiv|BitAnd_BitOr|BitOr_BitAnd|Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt"
  r"|Gt_GtE|GtE_Gt|Is_IsNot|IsNot_Is|USub_Nothing|Invert_Nothing)$"
)
# And two of our own: which arguments can stand in for a call, such as for a
# select, and which function for another.
ARGUMENTS = {"where": (1, 2), "maximum": (0, 1), "minimum": (0, 1)}
ARGUMENTS |= {"select": (1,), "_included": (0,), "stop_gradient": (0,)}
NAMES = {"any": "all", "all": "any", "max": "min", "min": "max"}
NAMES |= {"maximum": "minimum", "minimum": "maximum"}
NAMES |= {"below_maximum": "far_below", "far_below": "below_maximum"}
NAMES |= {"zero_unless_empty": "0.0"}


class Argument(Operator):
  """Puts an argument in the place of a call."""

  def instead(self, node) -> list[str]:
    if node.type != "atom_expr" or node.children[-1].children[0] != "(":
      return []
    name = node.children[-2].get_last_leaf().value
    inside = node.children[-1].children[1]
    given = inside.children[::2] if inside.type == "arglist" else [inside]
    return [f"({given[i].get_code()})" for i in ARGUMENTS.get(name, ())]

  def mutation_positions(self, node):
    return [(node.start_pos, node.end_pos)] * len(self.instead(node))

  def mutate(self, node, index):
    return parso.parse(f" {self.instead(node)[index]}")

  @classmethod
  def examples(cls):  # Abstract in Cosmic Ray.
    return ()


class Name(Argument):
  """Puts a function in the place of another."""

  def instead(self, node) -> list[str]:
    is_use = node.type == "name" and not node.is_definition()
    return [NAMES[node.value]] if is_use and node.value in NAMES else []


OPERATOR_PROVIDERS["own"] = {"Argument": Argument, "Name": Name}


def names(*nodes):
  found = itertools.chain.from_iterable(map(ast.walk, nodes))
  return {node.id for node in found if isinstance(node, ast.Name)}


def definitions(tree):
  """Functions, classes and constants. `_` is a rule of what decorates it."""
  for node in tree.body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      first = min(n.lineno for n in (node, *node.decorator_list))
      rule_of = names(*node.decorator_list) if node.name == "_" else {node.name}
      yield rule_of.pop(), node, range(first, node.end_lineno + 1)
    elif isinstance(node, ast.Assign):
      yield (
        min(names(*node.targets)),
        node,
        range(node.lineno, node.end_lineno + 1),
      )


def without_effect(tree):
  """What only a type checker looks at, and the reader of an error."""
  for node in ast.walk(tree):
    match node:
      case ast.arg(annotation=found) | ast.FunctionDef(returns=found):
        yield found
      case ast.AnnAssign(annotation=found):
        yield found
      case ast.Call(func=ast.Name("isinstance"), args=[_, found]):
        yield found
      case ast.Raise() | ast.Call(func=ast.Attribute(attr="warn")):
        yield node
      case ast.Assign(value=ast.BinOp(op=ast.BitOr()) | ast.Subscript()):
        yield node  # A type with a name.


def all_mutants(paths):
  """Mutants by file and definition, and which names a definition has."""
  found, uses = collections.defaultdict(list), collections.defaultdict(set)
  for path in paths:
    tree = ast.parse(path.read_text())
    skipped = [
      ((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset))
      for n in without_effect(tree)
      if n is not None
    ]
    owners = {}
    for name, node, lines in definitions(tree):
      uses[name] |= names(node)
      owners |= dict.fromkeys(lines, name)
    for item in all_work_items([path], {}):
      (m,) = item.mutations
      effect = not any(a <= m.start_pos < b for a, b in skipped)
      if (
        effect and OPERATORS.match(m.operator_name) and m.start_pos[0] in owners
      ):
        found[path, owners[m.start_pos[0]]].append(m)
  return found, uses


def sample(found, rng):
  """First one of each file, then one of each definition, then the others."""
  files = collections.defaultdict(list)
  for key, mutants in found.items():
    files[key[0]].append([(*key, m) for m in rng.sample(mutants, len(mutants))])
  rows = [rng.sample(groups, len(groups)) for groups in files.values()]
  for _ in range(2):  # A column of files is definitions; of these, mutants.
    rows = [x for column in itertools.zip_longest(*rows) for x in column if x]
  return rows


def commands(path, changed, uses):
  """The tests of losses that use a definition, the quickest first."""
  from cases import MECHANISMS

  def used(name, seen):
    for other in uses[name] - seen if name in uses else ():
      seen.add(other)
      used(other, seen)
    return seen

  def command_for(losses, marks, files=()):
    # Not of those whose names have the name of the loss in them.
    words = [
      " and not ".join([n, *(m for m in table.ROWS if n in m != n)])
      for n in losses
    ]
    words = " or ".join([*files, *(f"({w})" for w in words)])
    first = "".join(f"tests/{name} " for name in files)
    return f'{PYTEST} {first} tests -k "{words}" -m "{marks}"'

  stems = [path.stem.strip("_"), "masked_inputs" * (path.name in ENGINE)]
  files = [f"test_{stem}.py" for stem in stems]
  files = [name for name in files if pathlib.Path("tests", name).exists()]
  # One of each mechanism, three of them first; without any, three others.
  losses = [n for n in MECHANISMS if changed in used(n, {n})] or [
    n for n in table.ROWS if changed in used(n, {n})
  ][:3]
  yield command_for(losses[:3], "not slow", files)
  yield command_for(losses[:3], "slow", files)
  if losses[3:]:
    yield command_for(losses[3:], "not slow")
  yield f"{PYTEST} tests/test_losses.py tests/test_swap.py"


@functools.cache
def passes_without_mutant(test):
  """Whether it does; otherwise it is left out from now on."""
  command = [*shlex.split(PYTEST), "-m", "", test]
  passes = subprocess.run(command, capture_output=True).returncode != 1
  if not passes:
    print(f"left out, since it fails without a mutant: {test}", flush=True)
    leave_out = f" --deselect={shlex.quote(test)}"
    os.environ["PYTEST_ADDOPTS"] = (
      os.environ.get("PYTEST_ADDOPTS", "") + leave_out
    )
  return passes


def survivor(mutant, commands):
  """The difference, if no test has noticed it, and else what has."""
  commands = list(commands)
  while commands:
    result = mutate_and_test([mutant], commands[0], TIMEOUT)
    failed = re.search("^FAILED (.*?)(?: - |$)", result.output, re.MULTILINE)
    if failed and not passes_without_mutant(failed[1]):
      continue  # The same again, without that test.
    no_test = re.match(r"\s*\d+ deselected in", result.output)
    if result.is_killed and not no_test:
      return None, failed[1] if failed else result.output.strip()[-300:]
    commands.pop(0)
  return result.diff, "SURVIVED"


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("only", nargs="*", help="parts of FILE:LINE:")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--number", type=int, default=150)
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder, "copy")
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache")
    shutil.copytree(pathlib.Path(__file__).parents[1], copy, ignore=ignored)
    os.chdir(copy)
    sys.path.append("tests")
    os.environ["PYTHONPATH"] = str(copy)
    # Most programs are those of the checkout.
    os.environ.setdefault(
      "JAX_COMPILATION_CACHE_DIR", CACHE["jax_compilation_cache_dir"]
    )
    collect = [*shlex.split(PYTEST), "--collect-only"]
    subprocess.run(collect, check=True, stdout=subprocess.DEVNULL)
    package = pathlib.Path("optax_masking")
    paths = [package / name for name in (*ENGINE, "_cross_entropy.py")]
    wrappers = sorted((package / "losses").glob("_[a-z]*.py"))
    paths += [path for path in wrappers if path.name not in NOT_MUTATED]
    found, uses = all_mutants(paths)
    drawn = {}
    for path, changed, m in sample(found, random.Random(options.seed)):
      place = f"{path}:{m.start_pos[0]}:{m.start_pos[1] + 1}"
      if any(part in f"{place}:" for part in options.only or ("",)):
        drawn[f"{place}: {m.operator_name} {m.occurrence}"] = path, changed, m
    every = list(drawn.items())[: None if options.only else options.number]
    survivors = {}
    for i, (what, (path, changed, m)) in enumerate(every):
      print(f"{i + 1}/{len(every)} {what}", end=": ", flush=True)
      diff, by = survivor(m, commands(path, changed, uses))
      print(by, diff or "", flush=True)
      survivors |= {what: diff} if diff else {}
  for what, diff in survivors.items():
    print(f"\n{what}\n{diff}")
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  seconds = (used.ru_utime + used.ru_stime) / max(len(every), 1)
  killed = len(every) - len(survivors)
  print(f"\n{killed} of {len(every)} mutants killed, {seconds:.0f} s each.")
  return int(bool(survivors))


if __name__ == "__main__":
  sys.exit(main())
