"""The pytest plugin: `--mask-audit=TARGET` and the fixture `assert_mask_safe`.

pytest imports this module at every start. So it lies beside the package, which
imports JAX, and its functions import the package where they use it.
"""

import dataclasses
import functools

import pytest


def pytest_addoption(parser):
  group = parser.getgroup("optax_masking", "mask audits")
  group.addoption(
    "--mask-audit",
    action="append",
    default=[],
    metavar="TARGET",
    help=(
      "add a test for each loss and each clause of the mask contract of TARGET:"
      " optax, optax_masking, or package.module:name of a loss or of a list of"
      " optax_masking.testing.MaskCase; may be repeated"
    ),
  )
  group.addoption(
    "--mask-audit-quick",
    action="store_true",
    help="audit values and gradients in float32 alone",
  )


@pytest.fixture
def assert_mask_safe(request):
  """`optax_masking.testing.assert_mask_safe`; `-rP` shows its report."""
  from optax_masking import testing

  @functools.wraps(testing.assert_mask_safe)
  def check(*args, **kwargs):
    __tracebackhide__ = True
    report = testing.assert_mask_safe(*args, **kwargs)
    request.node.add_report_section("call", "mask audit", str(report))
    return report

  return check


@pytest.hookimpl(tryfirst=True)  # Before -k and -m select from the items.
def pytest_collection_modifyitems(session, config, items):
  for target in dict.fromkeys(config.getoption("mask_audit")):
    name = f"mask-audit[{target}]"
    audit = MaskAudit.from_parent(session, name=name, nodeid=name)
    added = list(audit.make_items(target))
    items.extend(added)
    # pytest prints how many items its collectors have reported.
    report = pytest.CollectReport(name, "passed", None, added)
    config.hook.pytest_collectreport(report=report)


class MaskAudit(pytest.Collector):
  """The losses of a target."""

  def collect(self):
    return []

  def make_items(self, target):
    from optax_masking.testing import CLAUSES, _audit, _find

    try:
      losses = _find.find_losses(target)
    except _find.TargetError as error:
      raise pytest.UsageError(str(error)) from None
    for loss in losses:
      quick = self.config.getoption("mask_audit_quick")
      check_loss = CachedCall(_audit.check_loss, loss, quick)
      for clause in CLAUSES:
        yield MaskAuditItem.from_parent(
          self,
          name=f"{loss.name}[{clause}]",
          check_loss=check_loss,
          loss=loss.name,
          clause=clause,
        )


class CachedCall:
  """A function that runs once: later calls return or raise the same again."""

  def __init__(self, function, *arguments):
    self.function = functools.partial(function, *arguments)
    self.result = self.error = None

  def __call__(self):
    if self.result is None and self.error is None:
      try:
        self.result = self.function()
      except Exception as error:
        self.error = error
    if self.error is not None:
      raise self.error
    return self.result


class MaskAuditItem(pytest.Item):
  """A clause of the contract for a loss."""

  def __init__(self, *, check_loss, loss, clause, **kwargs):
    super().__init__(**kwargs)
    self.check_loss = check_loss
    self.loss = loss
    self.clause = clause

  def runtest(self):
    report = self.check_loss()
    if self.clause == "accepts":  # All items of a loss share one report.
      self.user_properties.append(("mask_cases", report.cases))
    findings = tuple(f for f in report.findings if f.clause == self.clause)
    if findings:
      broken = dataclasses.replace(report, findings=findings)
      raise MaskAuditFailure(str(broken))
    state = report.clauses.get(self.clause, "left out")
    if report.strict and self.clause in report.untried:
      raise MaskAuditFailure(
        f"{self.loss}, {self.clause} could not be tried: {state}"
      )
    if state != "kept":
      pytest.skip(f"{self.loss}, {self.clause}: {state}")

  def repr_failure(self, excinfo, style=None):
    if isinstance(excinfo.value, MaskAuditFailure):
      return str(excinfo.value)
    return super().repr_failure(excinfo, style)

  def reportinfo(self):
    return self.path, None, f"{self.loss}: {self.clause}"


class MaskAuditFailure(AssertionError):
  """A loss breaks a clause."""
