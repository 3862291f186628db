"""Makes `optax_masking.contrib` and the like the same modules as Optax's."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence

_OURS = __package__ + "."


class _OptaxModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds in Optax each module that this package does not have itself.

  This finder comes before the finder of files. Under the name
  `optax_masking.contrib._muon`, the finder of files would load the file of
  `optax.contrib._muon` a second time, with classes unequal to the first ones.
  """

  def find_spec(
    self,
    fullname: str,
    path: Sequence[str] | None,
    target: types.ModuleType | None = None,
  ) -> importlib.machinery.ModuleSpec | None:
    if not fullname.startswith(_OURS):
      return None
    parent = sys.modules[fullname.rpartition(".")[0]].__name__
    find_file = importlib.machinery.PathFinder.find_spec
    if parent.startswith(__package__) and find_file(fullname, path):
      return None
    if importlib.util.find_spec(_in_optax(fullname)) is None:
      return None
    return importlib.machinery.ModuleSpec(fullname, self)

  def exec_module(self, module: types.ModuleType) -> None:
    # `import` returns the module that is in `sys.modules` afterwards.
    name = module.__name__
    sys.modules[name] = importlib.import_module(_in_optax(name))


def _in_optax(name: str) -> str:
  return "optax." + name.removeprefix(_OURS)


def install() -> None:
  """Puts the finder before all others, once in a process.

  After a reload of this module the finder that is there is of an older class of
  the same name.
  """
  names = [(type(f).__module__, type(f).__qualname__) for f in sys.meta_path]
  if (_OptaxModules.__module__, _OptaxModules.__qualname__) not in names:
    sys.meta_path.insert(0, _OptaxModules())
