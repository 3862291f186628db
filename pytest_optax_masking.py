"""The pytest plugin: `--mask-audit=TARGET` and the fixture `assert_mask_safe`.

pytest imports this module at every start, and so it lies beside the package:
JAX is imported where it is used.
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
  """The function of `optax_masking.testing`; `-rP` tells what it tried."""
  from optax_masking import testing

  @functools.wraps(testing.assert_mask_safe)
  def check(*args, **kwargs):
    __tracebackhide__ = True
    report = testing.assert_mask_safe(*args, **kwargs)
    request.node.add_report_section("call", "mask audit", str(report))
    return report

  return check


@pytest.hookimpl(tryfirst=True)  # So that -k and -m choose from its items, too.
def pytest_collection_modifyitems(session, config, items):
  for target in dict.fromkeys(config.getoption("mask_audit")):
    name = f"mask-audit[{target}]"
    audit = MaskAudit.from_parent(session, name=name, nodeid=name)
    added = list(audit.of_target(target))
    items.extend(added)
    # For the numbers that pytest tells.
    report = pytest.CollectReport(name, "passed", None, added)
    config.hook.pytest_collectreport(report=report)


class MaskAudit(pytest.Collector):
  """The losses of a target."""

  def collect(self):
    return []

  def of_target(self, target):
    from optax_masking.testing import CLAUSES, _audit

    try:
      losses = _audit.losses_of(target)
    except _audit.TargetError as error:
      raise pytest.UsageError(str(error)) from None
    for loss in losses:
      report = Once(
        _audit.check, loss, self.config.getoption("mask_audit_quick")
      )
      for clause in CLAUSES:
        yield MaskAuditItem.from_parent(
          self,
          name=f"{loss.name}[{clause}]",
          report=report,
          loss=loss.name,
          clause=clause,
        )


class Once:
  """A function that is called once, also if it raises."""

  def __init__(self, function, *arguments):
    self.function = functools.partial(function, *arguments)
    self.report = self.raised = None

  def __call__(self):
    if self.report is None and self.raised is None:
      try:
        self.report = self.function()
      except Exception as error:
        self.raised = error
    if self.raised is not None:
      raise self.raised
    return self.report


class MaskAuditItem(pytest.Item):
  """A clause of the contract for a loss."""

  def __init__(self, *, report, loss, clause, **kwargs):
    super().__init__(**kwargs)
    self.report_of_loss = report
    self.loss = loss
    self.clause = clause

  def runtest(self):
    report = self.report_of_loss()
    if self.clause == "accepts":  # One of them tells it.
      self.user_properties.append(("mask_cases", report.cases))
    findings = tuple(f for f in report.findings if f.clause == self.clause)
    if findings:
      broken = dataclasses.replace(report, findings=findings)
      raise MaskAuditFailure(str(broken))
    state = report.clauses.get(self.clause, "left out")
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
