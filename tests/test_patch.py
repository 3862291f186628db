"""`optax_masking.patch` replaces the losses inside Optax."""

import gc
import importlib
import pathlib
import sys
import tempfile
import threading
import types

import jax.numpy as jnp
import optax as upstream
from absl.testing import absltest, parameterized
from cases import MASKED
from test_swap import run

import optax_masking as optax

ORIGINAL = {name: getattr(upstream.losses, name) for name in MASKED}
PRIVATE = importlib.import_module("optax.losses._classification")


def replaced():
  """The replaced losses. Asserts that no module of Optax disagrees."""
  functions = {name: set() for name in MASKED}
  for module_name, module in sys.modules.copy().items():
    if module_name.partition(".")[0] == "optax":
      for name in functions.keys() & vars(module).keys():
        functions[name].add(vars(module)[name])
  for name, losses in functions.items():
    assert losses in ({ORIGINAL[name]}, {getattr(optax.losses, name)}), name
  return {
    name for name, losses in functions.items() if ORIGINAL[name] not in losses
  }


class PatchTest(parameterized.TestCase):
  def tearDown(self):
    super().tearDown()
    self.assertEmpty(replaced())

  def test_everywhere(self):
    """No module of Optax has an original loss any more."""
    with optax.patch():
      modules = [
        vars(module)
        for name, module in sys.modules.copy().items()
        if name.partition(".")[0] == "optax"
      ]
      ids = set(map(id, modules))
      referrers = gc.get_referrers(*ORIGINAL.values())
      self.assertNotIn(True, [id(x) in ids for x in referrers])
      for name in ORIGINAL:
        masked = getattr(optax.losses, name)
        holders = [module for module in modules if module.get(name) is masked]
        # `optax.losses` and the module it is from.
        self.assertGreaterEqual(len(holders), 2, name)
      self.assertEqual(replaced(), set(MASKED))
      for module in (upstream, upstream.losses, PRIVATE):
        self.assertIs(module.kl_divergence, optax.kl_divergence)
      where = jnp.array([True, False])
      loss = upstream.squared_error(
        jnp.ones(2), jnp.array([3, jnp.nan]), where=where
      )
      self.assertEqual(loss.tolist(), [4, 0])

  def test_some(self):
    with optax.patch("kl_divergence", "dice_loss"):
      self.assertEqual(replaced(), {"kl_divergence", "dice_loss"})

  def test_exception(self):
    with self.assertRaisesRegex(RuntimeError, "inside"), optax.patch():
      raise RuntimeError("inside")

  def test_nesting(self):
    """An original comes back when the last patch that names it ends."""
    with optax.patch("kl_divergence"):
      with optax.patch():
        with optax.patch("kl_divergence", "kl_divergence"):
          pass
        self.assertEqual(replaced(), set(MASKED))
      self.assertEqual(replaced(), {"kl_divergence"})

  def test_any_order(self):
    first, second = optax.patch("l2_loss", "log_cosh"), optax.patch("l2_loss")
    with first:
      second.__enter__()
    self.assertEqual(replaced(), {"l2_loss"})
    second.__exit__(None, None, None)

  def test_repetition(self):
    again = optax.patch("l2_loss")
    for _ in range(2):
      with again, again:
        self.assertEqual(replaced(), {"l2_loss"})
      self.assertEmpty(replaced())

  def test_decorator(self):
    @optax.patch("l2_loss")
    def count_down(n):
      self.assertEqual(replaced(), {"l2_loss"})
      return count_down(n - 1) if n else "done"

    self.assertEmpty(replaced())
    self.assertEqual(count_down(2), "done")
    self.assertEqual(count_down.__name__, "count_down")

  def test_permanent(self):
    run(
      "import optax, optax_masking\n"
      "optax_masking.patch(permanent=True)\n"
      "from optax import kl_divergence\n"
      "assert kl_divergence is optax_masking.kl_divergence\n"
      "with optax_masking.patch(): pass\n"
      "assert optax.kl_divergence is kl_divergence\n"
    )

  def test_what_is_out_of_reach(self):
    """A function that was taken out of Optax before stays as it is."""
    taken = {"kl_divergence": upstream.kl_divergence}
    with optax.patch():
      self.assertIs(taken["kl_divergence"], ORIGINAL["kl_divergence"])

  def test_names(self):
    for name in ("adam", "squared_eror"):
      with self.assertRaisesRegex(ValueError, f"'{name}' is no loss .* ntxent"):
        optax.patch(name)
    with self.assertRaisesRegex(TypeError, r"write @patch\(\)"):
      optax.patch(lambda: None)


class ImportsTest(absltest.TestCase):
  """Imports of modules of Optax during a patch."""

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)
    upstream.__path__.append(folder.name)
    self.before = set(sys.modules)

  def tearDown(self):
    super().tearDown()
    upstream.__path__.remove(str(self.folder))
    for name in set(sys.modules) - self.before:
      del sys.modules[name]
      vars(upstream).pop(name.rpartition(".")[2], None)
    self.assertEmpty(replaced())

  def test_imported_meanwhile(self):
    """A new module gets the masked losses, and the originals at the end."""
    (self.folder / "later.py").write_text("from optax import kl_divergence")
    with optax.patch():
      later = importlib.import_module("optax.later")
      self.assertIs(later.kl_divergence, optax.kl_divergence)
    self.assertIs(later.kl_divergence, ORIGINAL["kl_divergence"])

  def test_imported_by_another_thread(self):
    """A patch waits for a module that has taken a loss, but not stored it."""
    sys.modules["events"] = events = types.ModuleType("events")
    events.taken, events.go = threading.Event(), threading.Event()
    (self.folder / "slow.py").write_text(
      "import events, optax\n"
      "taken = [optax.kl_divergence]\n"
      "events.taken.set()\n"
      "events.go.wait()\n"
      "kl_divergence = taken.pop()\n"
    )
    importing = threading.Thread(
      target=importlib.import_module, args=("optax.slow",)
    )
    importing.start()
    events.taken.wait()
    threading.Timer(0.2, events.go.set).start()
    with optax.patch():
      importing.join()
      slow = sys.modules["optax.slow"]
      self.assertIs(slow.kl_divergence, optax.kl_divergence)
    self.assertIs(slow.kl_divergence, ORIGINAL["kl_divergence"])

  def test_many_threads(self):
    """Threads patch and import at the same time."""
    errors = []

    def work(number):
      try:
        for i in range(20):
          with optax.patch(MASKED[number], MASKED[number + 1]):
            name = f"made_{number}_{i}"
            file = self.folder / f"{name}.py"
            file.write_text("from optax.losses import *")
            importlib.invalidate_caches()
            module = importlib.import_module(f"optax.{name}")
            loss = MASKED[number]
            assert getattr(module, loss) is getattr(optax.losses, loss)
            assert getattr(upstream.losses, loss) is getattr(optax.losses, loss)
      except BaseException as e:
        errors.append(e)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    self.assertEmpty(errors)


if __name__ == "__main__":
  absltest.main()
