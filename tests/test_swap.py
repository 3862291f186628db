"""`optax_masking` in the place of `optax`, in every form of import."""

import ast
import importlib
import inspect
import pathlib
import pickle
import pkgutil
import re
import subprocess
import sys
import types
import warnings
from unittest import mock

import jax.numpy as jnp
import optax as upstream
from absl.testing import absltest, parameterized
from cases import MASKED

import optax_masking as optax

OWN_MODULES = {"fills", "linear_cross_entropy", "reductions"}
OWN_FUNCTIONS = {
  "Mask",
  "linear_softmax_cross_entropy_with_integer_labels",
  "masked_inputs",
  "patch",
}
IMPORTS = (
  "import optax_masking as optax; adam = optax.contrib.muon",
  "import optax_masking; optax_masking.losses.squared_error",
  "from optax_masking import adamw, losses, tree_utils; losses.hinge_loss",
  "from optax_masking.losses import softmax_cross_entropy, hinge_loss",
  "import optax_masking.contrib; optax_masking.contrib.muon",
  "import optax_masking.contrib as contrib; contrib.muon",
  "from optax_masking.contrib import muon",
  "from optax_masking import contrib; contrib.muon",
  "import optax_masking.losses; optax_masking.losses.l2_loss",
  "from optax_masking.losses import *; squared_error, softmax_cross_entropy",
  "from optax_masking import *; adam, softmax_cross_entropy, chain",
  "from optax_masking._src import base; base.GradientTransformation",
  "import optax_masking.losses._ranking as r; r.ranking_softmax_loss",
  "from optax_masking.schedules._schedule import constant_schedule",
  "import importlib; importlib.import_module('optax_masking.tree')",
)
OWN = {"losses"} | OWN_FUNCTIONS | OWN_MODULES | set(MASKED)


def run(statements):
  """Runs a program that imports nothing else."""
  result = subprocess.run(
    [sys.executable, "-c", statements], capture_output=True, text=True
  )
  if result.returncode:
    raise AssertionError(result.stderr)
  return result.stdout


def run_each(programs):
  """Runs programs, each in a process that has imported Optax alone."""
  run(
    "import os, sys, optax\n"
    f"for program in {list(programs)!r}:\n"
    "  child = os.fork()\n"
    "  if not child:\n"
    "    exec(program, {})\n"
    "    os._exit(0)\n"
    "  if os.waitpid(child, 0)[1]:\n"
    "    sys.exit(f'This fails: {program}')\n"
  )


def unaccounted(losses):
  """The public functions of a module that are not masked."""
  public = {n for n in dir(losses) if not n.startswith("_")}
  return public - set(MASKED)


def unnamed(module, source):
  """Public names that neither `import *` nor a source's list imports."""
  imported = {
    alias.asname
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
  }
  # A test may have imported Optax's own.
  public = {n for n in dir(module) if not re.search("^_|_test$", n)}
  return public - set(getattr(module, "__all__", public)) - imported


class SwapTest(parameterized.TestCase):
  def test_everything_else_is_optax(self):
    public = [name for name in dir(upstream) if not name.startswith("_")]
    self.assertGreater(len(public), 200)
    for name in public:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if hasattr(upstream, name):
          self.assertEqual(
            getattr(optax, name) is getattr(upstream, name),
            name not in OWN,
            name,
          )

  def test_losses(self):
    """Replaced where Optax has them, at the top and in `losses`."""
    for name in dir(upstream.losses):
      if name.startswith("_"):
        continue
      ours = getattr(optax.losses, name)
      theirs = getattr(upstream.losses, name)
      self.assertEqual(ours is theirs, name not in MASKED, name)
      self.assertEqual(hasattr(optax, name), hasattr(upstream, name))
      if hasattr(upstream, name):
        self.assertIs(getattr(optax, name), ours)

  def test_every_loss_is_accounted_for(self):
    """All are masked."""
    self.assertEqual(unaccounted(upstream.losses), set())
    later = types.ModuleType("optax.losses")
    vars(later).update(vars(upstream.losses), new_loss=lambda x: x)
    self.assertEqual(unaccounted(later), {"new_loss"})

  def test_older_optax(self):
    """What it lacks is lacking here, and nothing else is."""
    run_each(
      "import optax\n"
      f"del optax.losses.{lacking}\n"
      f"vars(optax).pop({lacking!r}, None)\n"
      f"optax.__all__ = tuple(set(optax.__all__) - {{{lacking!r}}})\n"
      "import optax_masking\n"
      f"assert not hasattr(optax_masking, {lacking!r})\n"
      f"assert not hasattr(optax_masking.losses, {lacking!r})\n"
      f"assert {lacking!r} not in dir(optax_masking.losses)\n"
      f"assert {lacking!r} not in optax_masking.losses.__all__\n"
      "from optax_masking import *\n"
      "from optax_masking.losses import *\n"
      "assert optax_masking.l2_loss is optax_masking.losses.l2_loss\n"
      "assert optax_masking.l2_loss is not optax.l2_loss\n"
      for lacking in ("ntxent", "dice_loss", "softmax_cross_entropy")
    )

  def test_no_name_of_optax_is_taken(self):
    """What this package adds is nothing that Optax has."""
    added = set(dir(optax)) - set(dir(upstream))
    added -= {"testing", "upstream"}  # They are there once they are imported.
    self.assertEqual(
      {n for n in added if not n.startswith("_")},
      OWN_FUNCTIONS | OWN_MODULES,
    )
    for module in pkgutil.iter_modules(optax.__path__):
      if module.name != "losses" and not module.name.startswith("_"):
        self.assertFalse(hasattr(upstream, module.name), module.name)
    self.assertIs(optax.masked, upstream.masked)
    self.assertIs(optax.transforms, upstream.transforms)
    self.assertIs(optax.tree, upstream.tree)

  def test_signatures_are_supersets(self):
    """Optax's parameters, in its order and with its defaults, come first."""
    for name in MASKED:
      ours = inspect.signature(getattr(optax.losses, name)).parameters
      theirs = inspect.signature(getattr(upstream.losses, name)).parameters
      self.assertEqual(list(ours)[: len(theirs)], list(theirs))
      for parameter in theirs.values():
        self.assertEqual(ours[parameter.name].kind, parameter.kind)
        self.assertEqual(ours[parameter.name].default, parameter.default)
      for added in ours.keys() - theirs.keys():
        self.assertIn(added, ("axis", "where"))
        self.assertEqual(ours[added].kind, inspect.Parameter.KEYWORD_ONLY)

  def test_imports(self):
    run_each(
      "import warnings; warnings.simplefilter('error', ImportWarning)\n"
      + statement
      for statement in IMPORTS
    )

  def test_reload(self):
    """One finder is enough, also if its class is made again."""
    run(
      "import importlib, sys, optax_masking as optax\n"
      "before = list(sys.meta_path)\n"
      "importlib.reload(optax._submodules)\n"
      "importlib.reload(optax)\n"
      "assert sys.meta_path == before, sys.meta_path\n"
    )

  def test_modules_are_the_same_objects(self):
    """Two copies of a module would have unequal classes."""
    names = ["_src.base", "contrib._muon", "schedules._schedule"]
    names += [m.name for m in pkgutil.iter_modules(upstream.__path__)]
    for name in names:
      if name != "losses":
        self.assertIs(
          importlib.import_module(f"optax_masking.{name}"),
          importlib.import_module(f"optax.{name}"),
        )
    self.assertEqual(upstream.contrib.__spec__.name, "optax.contrib")
    self.assertEqual(upstream.contrib.__name__, "optax.contrib")

  def test_stubs(self):
    """A type checker finds each of Optax's modules under the other name."""
    package = pathlib.Path(optax.__file__).parent
    modules = {
      m.name
      for m in pkgutil.iter_modules(upstream.__path__)
      if m.ispkg and not m.name.startswith("_")
    }
    stubs = {path.stem: path.read_text() for path in package.glob("[!_]*.pyi")}
    self.assertEqual(stubs.keys(), modules - {"losses"})
    for name, text in stubs.items():
      self.assertStartsWith(
        text,
        f"import optax.{name} as __getattr__\nfrom optax.{name} import *\n",
      )
    self.assertTrue((package / "py.typed").exists())

  def test_names_that_star_leaves_out(self):
    """A type checker finds each of Optax's names, in its `__all__` or not."""
    package = pathlib.Path(optax.__file__).parent
    for module in package.glob("[!_]*.pyi"):
      theirs = getattr(upstream, module.stem)
      self.assertEmpty(unnamed(theirs, module.read_text()), module)
    source = inspect.getsource(optax)
    self.assertIn("\n  from optax_masking._unlisted import *", source)
    source += (package / "_unlisted.pyi").read_text()
    self.assertEmpty(unnamed(upstream, source) - set(MASKED))
    source = source.replace("named_chain as named_chain,", "")
    self.assertEqual(unnamed(upstream, source) - set(MASKED), {"named_chain"})

  def test_star(self):
    """The names of `from optax import *`, and its objects but the losses."""
    for module in ("", ".losses"):
      ours: dict = {}
      theirs: dict = {}
      with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        exec(f"from optax_masking{module} import *", ours)
        exec(f"from optax{module} import *", theirs)
      # Not the names that a program has by itself, as `__builtins__`.
      ours, theirs = (
        {n: x for n, x in names.items() if not n.startswith("__")}
        for names in (ours, theirs)
      )
      self.assertEqual(ours.keys(), theirs.keys())
      different = {n for n in ours if ours[n] is not theirs[n]}
      self.assertEqual(different, theirs.keys() & MASKED)

  def test_what_optax_adds_later(self):
    for ours, theirs in ((optax, upstream), (optax.losses, upstream.losses)):
      theirs.added_later = object()
      try:
        self.assertIs(ours.added_later, theirs.added_later)
        self.assertIn("added_later", dir(ours))
      finally:
        del theirs.added_later

  def test_what_optax_serves_lazily(self):
    """A deprecated name warns of the line that asks for it."""
    with self.assertWarnsRegex(
      DeprecationWarning, "optax.contrib.dpsgd"
    ) as caught:
      self.assertIs(optax.dpsgd, upstream.contrib.dpsgd)
    self.assertEqual(caught.filename, __file__)  # Else Python would hide it.

  def test_errors_name_the_module_that_was_asked(self):
    for module in (optax, optax.losses):
      name = module.__name__
      with self.assertRaises(AttributeError) as caught:
        _ = module.l2_los
      self.assertEqual(
        str(caught.exception), f"module {name!r} has no attribute 'l2_los'"
      )
      # Python looks in them for similar names.
      self.assertIs(caught.exception.obj, module)
      self.assertEqual(caught.exception.name, "l2_los")
      with self.assertRaisesRegex(ImportError, f"'l2_los' from {name!r}"):
        exec(f"from {name} import l2_los")
    with self.assertRaisesRegex(ModuleNotFoundError, "no_such_module"):
      importlib.import_module("optax_masking.no_such_module")

  def test_errors_say_what_optax_says(self):
    """Of a name that it removed, what to use instead."""
    removed = mock.Mock(side_effect=AttributeError("Use b."))
    with (
      mock.patch.object(upstream, "__getattr__", removed),
      self.assertRaisesRegex(AttributeError, "^Use b.$"),
    ):
      _ = optax.removed

  def test_dir(self):
    for ours, theirs in ((optax, upstream), (optax.losses, upstream.losses)):
      self.assertEqual(set(dir(theirs)) - set(dir(ours)), set())
      self.assertEqual(dir(ours), sorted(set(dir(ours))))

  def test_pickle(self):
    state = optax.adamw(1e-3).init({"w": jnp.ones(2)})
    copy = pickle.loads(pickle.dumps(state))
    self.assertIs(type(copy[0]), upstream.ScaleByAdamState)
    self.assertIs(
      pickle.loads(pickle.dumps(optax.softmax_cross_entropy)),
      optax.losses.softmax_cross_entropy,
    )

  def test_in_the_place_of_optax(self):
    """Masked losses put into Optax do not call themselves."""
    original = upstream.losses.kl_divergence
    try:
      upstream.losses.kl_divergence = optax.losses.kl_divergence
      sys.modules[
        "optax.losses._classification"
      ].kl_divergence = optax.losses.kl_divergence
      x = jnp.log(jnp.array([0.5, 0.5]))
      for loss in (
        upstream.losses.kl_divergence,
        optax.kl_divergence,
        optax.generalized_kl_divergence,
      ):
        self.assertAlmostEqual(float(loss(x, jnp.exp(x), where=True)), 0)
    finally:
      upstream.losses.kl_divergence = original
      sys.modules["optax.losses._classification"].kl_divergence = original

  def test_version(self):
    """The package's own, also where it is looked up by installers."""
    from importlib.metadata import version

    self.assertEqual(optax.__version__, version("optax_masking"))
    self.assertNotEqual(optax.__version__, upstream.__version__)

  def test_imports_little(self):
    """Beside Optax, this package and nothing else: it adds little time."""
    loaded = run(
      "import sys, optax; before = set(sys.modules)\n"
      "import optax_masking; print(*sorted(set(sys.modules) - before))"
    ).split()
    self.assertNotEmpty(loaded)
    for name in loaded:
      self.assertStartsWith(name, "optax_masking")
    self.assertLessEqual(len(loaded), 24)


if __name__ == "__main__":
  absltest.main()
