"""The mask contract as checks of any loss."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking.testing import _trace
from optax_masking.testing._case import (
  DERIVATIVES,
  LARGE,
  Problem,
  name_of,
)
from optax_masking.testing._compaction import Compact, compactions
from optax_masking.testing._masks import (
  evenly_spaced,
  few_of_each_kind,
  make_masks,
  poisons,
)
from optax_masking.testing._program import (
  PARTS,
  Quantity,
  cotangent,
  program,
  quantities,
)
from optax_masking.testing._report import (
  CLAUSES,
  Finding,
  Report,
  sort_by_clause,
)

# By how many roundings two programs of the same numbers may differ. In half
# precision a rounding is large, but most of a program computes in float32.
_ROUNDINGS, _ROUNDINGS_OF_HALF = 32.0, 8.0
# How many numbers a batch of poisoned arrays may have.
_BATCH = 2**21


# The default reason for a clause that was not tried.
_WHY_UNTRIED = {
  **dict.fromkeys(CLAUSES, "there is nothing to try it on"),
  "masked_label": "no integer argument names a class of which a mask has some",
  "honesty": "no gradient shows which elements count",
  "compaction": "no mask leaves data of a shape that the loss takes",
}


class FindingLog:
  """Collects the findings of a check, one of each kind, for its `Report`."""

  def __init__(self, skip: Sequence[str]):
    self.skip = frozenset(skip)
    self.found: dict[str, Finding] = {}
    self.tried: set[str] = set()
    self.reasons: dict[str, str] = {}
    self.cases = 0

  def wants(self, clause: str) -> bool:
    return clause not in self.skip

  def add(
    self, clause: str, describe: Callable[[], dict[str, Any]], **facts: Any
  ) -> bool:
    """Counts a failing case; describes it if it is the first of its kind."""
    if not self.wants(clause):
      return False
    self.tried.add(clause)
    finding = Finding(clause, "", **facts)
    known = self.found.get(finding.key)
    if known is not None:
      self.found[finding.key] = dataclasses.replace(
        known, cases=known.cases + 1
      )
      return False
    self.found[finding.key] = dataclasses.replace(finding, **describe())
    return True

  def report(self, name: str, seconds: float, data: str) -> Report:
    findings = sort_by_clause(self.found.values())
    broken = {finding.clause for finding in findings}
    clauses = {}
    for clause in CLAUSES:
      if not self.wants(clause):
        continue
      if clause in broken:
        clauses[clause] = "broken"
      elif clause in self.tried:
        clauses[clause] = "kept"
      else:
        clauses[clause] = self.reasons.get(clause, _WHY_UNTRIED[clause])
    return Report(name, findings, clauses, self.cases, seconds, data)


def _number(x: Any) -> str:
  return f"{float(x):.6g}"


def _at(index: Sequence[int]) -> str:
  return f" at {list(map(int, index))}" if len(index) else ""


def _error(error: BaseException) -> str:
  lines = str(error).strip().splitlines() or [""]
  text = lines[0] if len(lines[0]) < 300 else lines[0][:300] + "..."
  return f"{type(error).__name__}: {text}"


class Checker:
  """The checks of a loss on the data of one dtype."""

  def __init__(self, problem: Problem, findings: FindingLog):
    self.problem = problem
    self.findings = findings
    self.options = problem.options
    self.dtype = problem.arguments[problem.floats[0]].value.dtype.name
    self.epsilon = max(
      float(jnp.finfo(problem.arguments[f].value.dtype).eps)
      for f in problem.floats
    )
    rng = np.random.default_rng(0)
    self.tangents = [
      (rng.choice((-1, 1), x.shape) * rng.uniform(0.5, 1.5, x.shape)).astype(
        x.dtype
      )
      for x in (problem.values[f] for f in problem.floats)
    ]
    self.classes = max(problem.shape, default=1)
    self.everything = np.ones(problem.where.shape, bool)
    half = self.epsilon > float(jnp.finfo("float32").eps)
    self._roundings = _ROUNDINGS_OF_HALF if half else _ROUNDINGS
    self._known_roles: dict[int, str | None] = {}
    self._sizes: dict[Quantity, float] = {}

  def run(self) -> None:
    """Runs all checks."""
    problem, findings = self.problem, self.findings
    try:
      self.result = self._shape_of_result(
        problem.call(problem.values, where=problem.where)
      )
    except _NotALoss as error:
      raise TypeError(str(error)) from None
    except Exception as error:
      findings.add(
        "accepts", self._refusal(error), transform="eager", dtype=self.dtype
      )
      for clause in CLAUSES:
        findings.reasons[clause] = "the loss does not run with the mask"
      return
    self.axes = problem.axes_of_result(self.result.shape)
    findings.tried.add("accepts")
    self._replace_what_is_not_finite()
    self.values = problem.values
    self.compiled = bool({"jit", "vmap"} & set(self.options.transforms))
    self.parts = self._parts()
    if not self.parts:
      return
    self.unmasked = self._unmasked()
    self.quantities = quantities(self.parts, problem.floats)
    self.derivatives = len({q.derivative for q in self.quantities})
    plain = program(problem.call, self.parts, problem.floats)
    self._evaluate = jax.jit(plain) if self.compiled else plain
    self.masks = make_masks(problem)
    # The results without a mask: the size of a rounding is relative to them.
    self.usual = self.evaluate(self.values, self.everything)
    self.clean = {
      name: self.evaluate(self.values, where)
      for name, where in self.masks.items()
    }
    for name, where in self.masks.items():
      self._check_clean(name, where)
      self._check_poisons(name, where)
    self._check_compaction()
    self._check_identity()
    self._check_honesty()
    self._check_arithmetic()
    if "vmap" in self.options.transforms:
      self._check_vmap()
    if "eager" in self.options.transforms and self.compiled:
      self._check_in_python()
      self._check_eager()

  # Tools of the checks.

  def evaluate(
    self, values: Sequence[Any], where: np.ndarray, tangents: Any = None
  ) -> list[np.ndarray]:
    """All quantities, counted as so many cases as there are derivatives."""
    self.findings.cases += self.derivatives
    tangents = self.tangents if tangents is None else tangents
    return jax.device_get(self._evaluate(values, tangents, where=where))

  def _shape_of_result(self, result: Any) -> jax.ShapeDtypeStruct:
    dtype = getattr(result, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
      returned = (
        f"an array of {dtype}" if dtype is not None else f"{type(result)}"
      )
      raise _NotALoss(
        f"{name_of(self.problem.loss_fn)} returned {returned}, not one floating"
        " array. Wrap it in a function that returns the loss alone."
      )
    return jax.ShapeDtypeStruct(result.shape, dtype)

  def _refusal(self, error: BaseException) -> Callable[[], dict[str, Any]]:
    where, name = self.problem.where, self.options.where_name
    message = (
      f"The loss does not take a mask of shape {where.shape}: {_error(error)}"
    )
    if f"unexpected keyword argument '{name}'" in str(error):
      message = (
        f"The loss has no argument `{name}`. If its mask has another name, give"
        " it as `where_name`."
      )

    def describe():
      return {
        "message": message,
        "mask": "as given",
        "where": where.tolist(),
        "got": _error(error),
      }

    return describe

  def _replace_what_is_not_finite(self) -> None:
    """Replaces NaN and bad labels in padding, which some masks include."""
    problem = self.problem
    for i, a in enumerate(problem.arguments):
      masked = problem.masked(problem.where, i)
      kept = a.value[~masked]
      if a.floating:
        if not np.isfinite(kept).all():
          raise ValueError(
            f"`{a.name}` has a NaN or an infinity that is included, as"
            f" {a.value.dtype}. Call with data that are finite where `where` is"
            " True."
          )
        broken = masked & ~np.isfinite(a.value)
      elif a.value.dtype == bool or not masked.any():
        continue
      else:
        kept = kept if kept.size else np.zeros(1, a.value.dtype)
        broken = masked & ((a.value < kept.min()) | (a.value > kept.max()))
      problem.replace(i, broken)
    try:
      value = problem.call(problem.values, where=self.everything)
      if not np.isfinite(np.asarray(value)).all():
        for i, a in enumerate(problem.arguments):
          if a.floating:
            problem.replace(i, problem.masked(problem.where, i))
    except Exception:  # The checks below find what the loss refuses.
      return

  def _unmasked(self) -> Callable[..., Any] | None:
    """The loss without a mask, if there is a way to call it."""
    problem = self.problem
    candidates: list[Callable[..., Any]] = [
      functools.partial(problem.call, where=None),
      problem.call,
    ]
    if self.options.reference is not None:
      candidates = [problem.call_reference]
    reason = ""
    for call in candidates:
      run = program(call, self._plain_parts, problem.floats)
      try:
        value, *_ = jax.eval_shape(run, problem.values, self.tangents)
        if value.shape == self.result.shape:
          return call
        reason = f"it returns the shape {value.shape}"
      except Exception as error:
        reason = reason or _error(error)
    why_untried = "the loss needs a mask, and no `reference` was given"
    if self.options.reference is not None:
      why_untried = f"the reference does not run: {reason}"
    self.findings.reasons["identity"] = why_untried
    return None

  def _parts(self) -> list[str]:
    """The parts of the program that can be computed."""
    problem, findings = self.problem, self.findings
    floats, parts = problem.floats, []
    failed: set[str] = set()
    for derivative in DERIVATIVES:
      if derivative not in ("value", *self.options.derivatives):
        continue
      for part in PARTS[derivative]:
        single = program(problem.call, [part], floats)
        try:
          if self.compiled:  # A custom_vjp fails only when it is lowered.
            jax.jit(single).lower(
              problem.values, self.tangents, where=problem.where
            )
          else:
            single(problem.values, self.tangents, where=problem.where)
          parts.append(part)
        except Exception as error:
          text = _error(error)
          if text in failed:  # The same, by way of another derivative.
            continue
          failed.add(text)
          how = "under jit" if self.compiled else "eagerly"
          message = f"The {part} can't be computed {how}: {text}"
          if part != "value":
            left = tuple(d for d in self.options.derivatives if d in parts)
            message += (
              " If the loss does not mean to have it, leave it out:"
              f" derivatives={left}."
            )
          facts = {
            "message": message,
            "mask": "as given",
            "where": problem.where.tolist(),
            "got": text,
          }
          findings.add(
            "transforms",
            functools.partial(dict, facts),
            derivative=derivative,
            transform="jit" if self.compiled else "eager",
            dtype=self.dtype,
          )
          if part == "value":
            for clause in CLAUSES:
              findings.reasons[clause] = f"the loss does not run {how}"
            return []
    return parts

  def add(
    self,
    clause: str,
    quantity: Quantity,
    describe: Callable[[], dict[str, Any]],
    argument: int | None = None,
    transform: str | None = None,
  ) -> bool:
    names = [a.name for a in self.problem.arguments]
    return self.findings.add(
      clause,
      describe,
      argument=None if argument is None else names[argument],
      derivative=quantity.derivative,
      wrt=None if quantity.wrt is None else names[quantity.wrt],
      transform=transform or ("jit" if self.compiled else "eager"),
      dtype=self.dtype,
    )

  def what(self, quantity: Quantity, index: Sequence[int]) -> str:
    """A quantity at an index, in words."""
    text = quantity.label
    if quantity.wrt is not None:
      name = self.problem.arguments[quantity.wrt].name
      text += f" with respect to `{name}`"
    return text + _at(index)

  def facts(
    self, name: str, where: np.ndarray, got: Any, expected: Any
  ) -> dict[str, Any]:
    return {
      "mask": name,
      "where": where.tolist() if where.size <= 256 else None,
      "got": _number(got),
      "expected": _number(expected),
    }

  def examples_left(self, where: np.ndarray) -> np.ndarray:
    """Which entries of the loss have anything included."""
    if self.axes is None:
      return np.broadcast_to(where.any(), self.result.shape)
    return self.problem.included(where, self.result.shape, self.axes)

  # The checks.

  def _check_clean(self, name: str, where: np.ndarray) -> None:
    """On clean data: zeros where the contract has zeros."""
    problem, clean = self.problem, self.clean[name]
    left = self.examples_left(where)
    for quantity, got in zip(self.quantities, clean, strict=True):
      if quantity.wrt is None and not quantity.repeats_value:
        self._check_zero(
          "empty",
          quantity,
          got,
          ~left,
          name,
          where,
          "with nothing included",
        )
      elif quantity.wrt is not None:
        masked = problem.masked(where, quantity.wrt)
        self._check_zero(
          "zero_gradient",
          quantity,
          got,
          masked,
          name,
          where,
          "which is masked",
          argument=quantity.wrt,
        )
    if not where.any():
      for quantity, got in zip(self.quantities, clean, strict=True):
        if quantity.wrt is not None:
          self._check_zero(
            "empty",
            quantity,
            got,
            ~problem.masked(where, quantity.wrt),
            name,
            where,
            "with nothing included",
            argument=quantity.wrt,
          )
    self._check_masked_labels(name, where, left)
    self._check_same(
      "transforms",
      name,
      where,
      lambda values: [
        (quantity, got, clean[0])
        for quantity, got in zip(self.quantities, clean, strict=True)
        if quantity.repeats_value
      ],
      "Under differentiation, {what} is {got}; by itself it is {expected}.",
    )
    for argument in problem.floats:
      masked = problem.masked(where, argument)
      if not masked.any() or not {"jvp", "hessian"} & {
        q.derivative for q in self.quantities
      }:
        continue
      tangents = [
        np.where(masked, t, 0).astype(t.dtype) if f == argument else 0 * t
        for f, t in zip(problem.floats, self.tangents, strict=True)
      ]
      results = self.evaluate(self.values, where, tangents)
      for quantity, got, usual in zip(
        self.quantities, results, clean, strict=True
      ):
        if quantity.label == "the tangent" or quantity.derivative == "hessian":
          self._check_zero(
            "zero_gradient",
            quantity,
            got,
            np.isfinite(usual),  # Others overflow without a direction, too.
            name,
            where,
            "in the direction of the masked elements of"
            f" `{problem.arguments[argument].name}` alone",
            argument=argument,
          )

  def _check_zero(
    self,
    clause: str,
    quantity: Quantity,
    got: np.ndarray,
    region: np.ndarray,
    name: str,
    where: np.ndarray,
    why: str,
    argument: int | None = None,
  ) -> None:
    if not region.any():
      return
    self.findings.tried.add(clause)
    wrong = region & ~(got == 0)
    if not wrong.any():
      return
    index = tuple(map(int, np.argwhere(wrong)[0]))

    def describe():
      return {
        "message": (
          f"On clean data, {self.what(quantity, index)}, {why}, is"
          f" {_number(got[index])}, not 0."
        ),
        "element": index if argument == quantity.wrt is not None else None,
        **self.facts(name, where, got[index], 0),
        **self.blame(quantity, got[index], self.values, where),
      }

    self.add(clause, quantity, describe, argument)

  def _check_masked_labels(
    self, name: str, where: np.ndarray, left: np.ndarray
  ) -> None:
    """An example whose own class is masked has no target left."""
    problem = self.problem
    rank = len(problem.shape)
    for i, a in enumerate(problem.arguments):
      lacking = [k for k in range(rank) if k not in a.axes]
      batch = tuple(k for k in range(rank) if k not in lacking)
      if (
        not jnp.issubdtype(a.value.dtype, jnp.integer)
        or len(lacking) != 1
        or a.axes != batch
        or a.value.shape != tuple(problem.shape[k] for k in batch)
        or self.axes != batch
        or self._roles(lacking[0]) != "class"
      ):
        continue
      (axis,) = lacking
      full = np.moveaxis(problem.full(where), axis, -1)
      target = np.take_along_axis(full, a.value[..., None], -1)[..., 0]
      lost = ~np.broadcast_to(target, left.shape) & left
      if not lost.any():
        continue
      for quantity, got in zip(self.quantities, self.clean[name], strict=True):
        if quantity.repeats_value:
          continue
        region = lost
        if quantity.wrt is not None:
          own = problem.arguments[quantity.wrt]
          if own.axes == tuple(range(rank)):
            region = np.expand_dims(lost, axis)
          elif own.axes != batch:
            continue
          region = np.broadcast_to(region, got.shape)
        self._check_zero(
          "masked_label",
          quantity,
          got,
          region,
          name,
          where,
          f"of an example whose own class, in `{a.name}`, is masked",
          argument=i if quantity.wrt is None else quantity.wrt,
        )

  def _check_poisons(self, name: str, where: np.ndarray) -> None:
    """Clauses 1 and 2: the content of masked elements changes nothing."""
    for argument, poison, poison_value in self.poisonings(where):
      values = self.poisoned(where, argument, poison_value)
      got = self.evaluate(values, where)
      self._compare(
        name, where, argument, poison, poison_value, self.clean[name], got
      )

  def poisonings(
    self, where: np.ndarray
  ) -> Iterator[tuple[int, str, np.ndarray]]:
    """Each argument with something masked, and each poison for it."""
    for i, a in enumerate(self.problem.arguments):
      if self.problem.masked(where, i).any():
        for poison, poison_value in poisons(
          a.value.dtype, self.classes
        ).items():
          yield i, poison, poison_value

  def poisoned(
    self,
    where: np.ndarray,
    argument: int,
    poison_value: np.ndarray,
    element: tuple[int, ...] | None = None,
  ) -> list[np.ndarray]:
    """The data with a poison in all masked elements, or in one element."""
    values = list(self.values)
    replaced = np.array(values[argument])
    if element is None:
      replaced[self.problem.masked(where, argument)] = poison_value
    else:
      replaced[element] = poison_value
    values[argument] = replaced
    return values

  def _compare(
    self,
    name: str,
    where: np.ndarray,
    argument: int,
    poison: str,
    poison_value: np.ndarray,
    clean: list[np.ndarray],
    got: list[np.ndarray],
    transform: str | None = None,
    at: Sequence[int] | None = None,
  ) -> None:
    """Compares results with and without a poison."""
    problem = self.problem
    listed = self.quantities if at is None else [self.quantities[i] for i in at]
    wrong_value = False
    self.findings.tried.update(("invariance", "zero_gradient"))
    named = problem.arguments[argument].name
    for quantity, before, after in zip(listed, clean, got, strict=True):
      wrong = ~((after == before) | np.isnan(before))
      if not wrong.any() or (quantity.repeats_value and wrong_value):
        continue
      wrong_value |= quantity.part == "value"
      masked = np.zeros(wrong.shape, bool)
      if quantity.wrt is not None:
        masked = problem.masked(where, quantity.wrt)
      for clause, region in (
        ("invariance", wrong & ~masked),
        ("zero_gradient", wrong & masked & ~(after == 0)),
      ):
        if not region.any():
          continue
        index = tuple(map(int, np.argwhere(region)[0]))

        def describe(
          quantity=quantity,
          before=before,
          after=after,
          clause=clause,
          index=index,
        ):
          element = self._culprit(
            where, argument, poison_value, quantity, index, transform
          )
          holds = f"`{named}` holds {poison}" + (
            f"{_at(element)}, which is masked"
            if element is not None
            else " where it is masked"
          )
          changed = self.what(quantity, index)
          message = f"When {holds}, {changed} becomes {_number(after[index])};"
          message += f" with clean data it is {_number(before[index])}."
          if clause == "zero_gradient":
            message = (
              f"When {holds}, {changed}, which is masked, is"
              f" {_number(after[index])}, not 0."
            )
          return {
            "message": message,
            "element": element,
            "poison": poison,
            **self.facts(
              name,
              where,
              after[index],
              0 if clause == "zero_gradient" else before[index],
            ),
            **self.blame(
              quantity,
              after[index],
              self.poisoned(where, argument, poison_value, element),
              where,
              against=self.values,
            ),
          }

        if (
          self.add(clause, quantity, describe, argument, transform)
          and transform
        ):
          # It was not found under jit.
          def differ(
            quantity=quantity, before=before, after=after, index=index
          ):
            return {
              "message": (
                f"When `{named}` holds {poison} where it is masked,"
                f" {self.what(quantity, index)} is {_number(after[index])}"
                f" under {transform}, and {_number(before[index])} under jit."
              ).replace("under eager", "without jit"),
              "poison": poison,
              **self.facts(name, where, after[index], before[index]),
              **self.blame(
                quantity,
                after[index],
                self.poisoned(where, argument, poison_value),
                where,
                against=self.values,
              ),
            }

          self.add("transforms", quantity, differ, argument, transform)

  def _culprit(
    self,
    where: np.ndarray,
    argument: int,
    poison_value: np.ndarray,
    quantity: Quantity,
    index: tuple[int, ...],
    transform: str | None,
  ) -> tuple[int, ...] | None:
    """A masked element that does the harm alone, if one does."""
    masked = np.argwhere(self.problem.masked(where, argument))
    elements = [tuple(map(int, e)) for e in masked]
    if len(elements) == 1:
      return elements[0]
    if transform is not None:
      return None
    position = self.quantities.index(quantity)
    clean = self.evaluate(self.values, where)[position]
    for i in evenly_spaced(len(elements), 64):
      values = self.poisoned(where, argument, poison_value, elements[i])
      got = self.evaluate(values, where)[position]
      if not (got[index] == clean[index] or np.isnan(clean[index])):
        return elements[i]
    return None

  def _check_compaction(self) -> None:
    """Clause 3: the loss is that of the data without masked elements."""
    if not self.findings.wants("compaction"):
      return

    def smaller(values, where):
      return list(
        compactions(
          self.problem,
          values,
          where,
          self.axes,
          self.result.shape,
          self._roles,
          self._separate,
        )
      )

    for name, where in self.masks.items():
      for i, compact in enumerate(smaller(self.values, where)):
        try:
          value = self._evaluate_compact(compact)[None]
        except Exception as error:
          self.findings.reasons.setdefault(
            "compaction", f"the loss does not take less data: {_error(error)}"
          )
          continue
        if value.shape != compact.left_of_result(self.clean[name][0]).shape:
          self.findings.reasons.setdefault(
            "compaction", "the loss has a shape that its axes do not explain"
          )
          continue

        size = _written_size(self.unmasked or self.problem.call, compact, self)
        if size is not None:
          self.findings.reasons.setdefault(
            "compaction", f"the loss is written for data of the size {size}"
          )
          continue

        def compared(values, where=where, i=i):
          return self._compact_pairs(smaller(values, where)[i], values, where)

        self._check_same(
          "compaction",
          name,
          where,
          compared,
          "With the mask, {what} is {got}; for the data without the masked"
          " elements it is {expected}.",
        )

  def _evaluate_compact(self, compact: Compact) -> dict[int | None, Any]:
    """The value and the gradients of the loss of less data."""
    weights = cotangent(self.result.shape, self.result.dtype)
    keywords = {} if self.unmasked else {"where": compact.where}
    return self._plainly(
      compact.values, compact.left_of_result(weights), **keywords
    )

  def _plainly(
    self, values: Sequence[Any], weights: Any = None, **keywords: Any
  ) -> dict[int | None, Any]:
    """The value, at None, and the gradients of the loss without a mask."""
    self.findings.cases += len(self._plain_parts)
    tangents = [values[f] for f in self.problem.floats]
    value, *gradients = jax.device_get(
      self._plain(values, tangents, weights, **keywords)
    )
    return {
      None: value,
      **dict(zip(self.problem.floats, gradients[1:], strict=bool(gradients))),
    }

  def _compact_pairs(
    self, compact: Compact, values: Sequence[np.ndarray], where: np.ndarray
  ) -> list[tuple[Quantity, np.ndarray, np.ndarray]]:
    expected = self._evaluate_compact(compact)
    results = self.evaluate(values, where)
    pairs = []
    for quantity, got in zip(self.quantities, results, strict=True):
      if quantity.part == "value":
        pairs.append((quantity, compact.left_of_result(got), expected[None]))
      elif quantity.part == "vjp" and quantity.wrt is not None:
        take = compact.left_of[quantity.wrt]
        if take is not None:
          pairs.append((quantity, take(got), expected[quantity.wrt]))
    return pairs

  @functools.cached_property
  def _plain(self) -> Callable[..., list[jax.Array]]:
    """The value and the gradients of the loss without a mask, compiled."""
    call = self.unmasked or self.problem.call
    run = program(call, self._plain_parts, self.problem.floats)
    return jax.jit(run) if self.compiled else run

  @property
  def _plain_parts(self) -> list[str]:
    return [part for part in ("value", "vjp") if part in self.parts]

  @functools.cached_property
  def nearby(self) -> list[np.ndarray]:
    """Other data, off the kinks and ties that these may be on."""
    rng = np.random.default_rng(1)
    return [
      (x * rng.uniform(0.99, 1.01, x.shape)).astype(x.dtype)
      if i in self.problem.floats
      else x
      for i, x in enumerate(self.values)
    ]

  def _check_same(
    self,
    clause: str,
    name: str,
    where: np.ndarray,
    pairs: Callable[..., list[tuple[Quantity, np.ndarray, np.ndarray]]],
    message: str,
    transform: str | None = None,
  ) -> None:
    """Compares the results of two programs on the same data, up to rounding.

    A derivative at a kink depends on rounding: a difference counts only if
    there is one on slightly different data, too.
    """
    self.findings.tried.add(clause)
    beside = None
    for i, (quantity, got, expected) in enumerate(pairs(self.values)):
      # An expected NaN or infinity is no number to compare with.
      wrong = self._differ(got, expected, quantity) & np.isfinite(expected)
      if quantity.derivative == "hessian":
        # Its terms may cancel by more than the computed sizes show.
        wrong &= ~np.isfinite(got)
      if not wrong.any():
        continue
      if quantity.wrt is not None or quantity.label == "the tangent":
        beside = beside or pairs(self.nearby)
        if not self._differ(beside[i][1], beside[i][2], quantity).any():
          continue
      index = tuple(map(int, np.argwhere(wrong)[0]))

      def describe(quantity=quantity, got=got, expected=expected, index=index):
        return {
          "message": message.format(
            what=self.what(quantity, index),
            got=_number(got[index]),
            expected=_number(expected[index]),
          ),
          **self.facts(name, where, got[index], expected[index]),
          **self.blame(quantity, got[index], self.values, where),
        }

      self.add(clause, quantity, describe, quantity.wrt, transform)

  def _roles(self, axis: int) -> str | None:
    if axis not in self._known_roles:
      self._known_roles[axis] = self._find_roles(axis)
    return self._known_roles[axis]

  def _find_roles(self, axis: int) -> str | None:
    """The role of the integer arguments without an axis of the data.

    They are "free" if the loss stays the same when the entries along the axis
    move. They name a "class" if it stays the same when the integers move, too.
    """
    problem = self.problem
    moved, renamed = [], []
    for a in problem.arguments:
      if axis in a.axes:
        x = np.roll(a.value, 1, a.axes.index(axis))
        moved.append(x)
        renamed.append(x)
      else:
        moved.append(a.value)
        integer = jnp.issubdtype(a.value.dtype, jnp.integer)
        names = (a.value + 1) % problem.shape[axis] if integer else a.value
        renamed.append(names.astype(a.value.dtype))
    for role, values in (("free", moved), ("class", renamed)):
      result = self.evaluate(values, self.everything)[0]
      if self.axes is not None and axis in self.axes:
        result = np.roll(result, -1, self.axes.index(axis))
      if not self._differ(result, self.usual[0], self.quantities[0]).any():
        return role
    return None

  def _separate(self, axis: int) -> bool:
    """Whether no slice along an axis changes the loss of another."""
    problem = self.problem
    rank = len(problem.shape)

    def first(axes, shape):
      chosen = np.zeros(shape, bool)
      chosen[tuple(slice(None) if k == axis else 0 for k in axes)] = True
      return chosen

    tangents = [
      np.where(first(a.axes, a.value.shape), t, 0).astype(t.dtype)
      for a, t in zip(
        (problem.arguments[f] for f in problem.floats),
        self.tangents,
        strict=True,
      )
    ]
    results = self.evaluate(self.values, self.everything, tangents)
    compared = False
    for quantity, got in zip(self.quantities, results, strict=True):
      if quantity.label == "the tangent" and self.axes:
        others = ~first(self.axes, got.shape)
      elif quantity.part == "forward over reverse" and not self.axes:
        axes = problem.arguments[quantity.wrt or 0].axes
        if len(axes) != rank:
          continue
        others = ~first(axes, got.shape)
      else:
        continue
      compared = True
      if np.abs(got[others]).max(initial=0) > 1e-6 * np.abs(got).max(initial=0):
        return False
    return compared

  def _differ(
    self, got: np.ndarray, expected: np.ndarray, quantity: Quantity
  ) -> np.ndarray:
    """Where numbers differ by more than rounding explains."""
    got, expected = (np.asarray(x, "float64") for x in (got, expected))
    room = self._roundings * self.epsilon
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    room = room * max(self._size(quantity), largest)
    return ~((np.abs(got - expected) <= room) | (got == expected))

  def _size(self, quantity: Quantity) -> float:
    """The size of the terms that a quantity is the sum of.

    Terms may cancel, and so the size is the largest under any of the masks. The
    terms of a loss are as large as its gradient times the data. The terms of a
    gradient are as large as those of the loss, divided by the data.
    """
    if quantity not in self._sizes:
      self._sizes[quantity] = self._find_size(quantity)
    return self._sizes[quantity]

  def _find_size(self, quantity: Quantity) -> float:
    def largest(position):
      arrays = [self.usual[position]]
      arrays += [clean[position] for clean in self.clean.values()]
      finite = (np.asarray(x, "float64") for x in arrays)
      return max(
        float(np.abs(x[np.isfinite(x)]).max(initial=0)) for x in finite
      )

    own = largest(self.quantities.index(quantity))
    if quantity.derivative not in ("value", "vjp"):
      return own
    loss = largest(0)
    count = max(1, self.usual[0].size)
    for q, gradient in zip(self.quantities, self.usual, strict=True):
      if q.part == "vjp" and q.wrt is not None:
        terms = np.asarray(gradient, "float64") * np.asarray(
          self.values[q.wrt], "float64"
        )
        terms = np.abs(terms[np.isfinite(terms)])
        loss = max(loss, float(terms.sum()) / count)
    if quantity.wrt is None:
      return max(own, loss)
    data = np.abs(np.asarray(self.values[quantity.wrt], "float64"))
    data = data.max(initial=0)
    return max(own, loss / data) if data else own

  def _check_identity(self) -> None:
    """Clause 5: a mask that masks nothing changes no number."""
    problem, unmasked = self.problem, self.unmasked
    if unmasked is None:
      return
    dtype = jax.eval_shape(unmasked, problem.values).dtype
    if dtype != self.result.dtype:
      self.findings.add(
        "transforms",
        lambda: {
          "message": (
            f"The loss has dtype {self.result.dtype} with a mask, and"
            f" {dtype} without one."
          ),
          "got": str(self.result.dtype),
          "expected": str(dtype),
        },
        derivative="value",
        dtype=self.dtype,
      )
    self._check_program()

    def compared(values):
      expected = self._plainly(values)
      return [
        (quantity, got, expected[quantity.wrt])
        for quantity, got in zip(
          self.quantities, self.evaluate(values, self.everything), strict=True
        )
        if quantity.part in ("value", "vjp")
      ]

    self._check_same(
      "identity",
      "all included",
      self.everything,
      compared,
      "With everything included, {what} is {got}; without a mask it is"
      " {expected}.",
    )

  def _check_program(self) -> None:
    """Clause 5: without a mask, the reference's own program."""
    problem = self.problem
    if self.options.reference is None:
      return
    try:
      ours = jax.make_jaxpr(functools.partial(problem.call, where=None))(
        problem.values
      )
      theirs = jax.make_jaxpr(problem.call_reference)(problem.values)
    except Exception:  # The loss needs a mask: there are its numbers alone.
      return
    if str(ours) == str(theirs):
      return
    self.findings.add(
      "identity",
      lambda: {
        "message": "Without a mask the loss is another program than its"
        " reference.",
        "mask": "None",
        "got": "another program",
      },
      derivative="value",
      dtype=self.dtype,
    )

  def _check_honesty(self) -> None:
    """Clause 6: NaN and infinity in included elements come out."""
    if not self.findings.wants("honesty"):
      return
    problem = self.problem
    gradients = {
      q.wrt: i
      for i, q in enumerate(self.quantities)
      if q.part == "vjp" and q.wrt is not None
    }
    value = self.quantities[0]
    for name, where in self.masks.items():
      if name not in ("as given", "all included"):
        continue
      for i in problem.floats:
        kept = [
          tuple(map(int, e)) for e in np.argwhere(~problem.masked(where, i))
        ]
        for element in (kept[k] for k in evenly_spaced(len(kept), 4)):
          # An element without a slope may be a threshold, or be unused.
          if i not in gradients or not self.clean[name][gradients[i]][element]:
            continue
          self._check_comes_out(value, name, where, i, element)

  def _check_comes_out(
    self,
    quantity: Quantity,
    name: str,
    where: np.ndarray,
    argument: int,
    element: tuple[int, ...],
  ) -> None:
    problem = self.problem
    self.findings.tried.add("honesty")
    named = problem.arguments[argument].name
    for poison in (np.nan, np.inf, -np.inf):
      dtype = self.values[argument].dtype
      values = self.poisoned(where, argument, dtype.type(poison), element)
      got = self.evaluate(values, where)[0]
      holds = f"`{named}` holds {poison}{_at(element)}, which is included"
      if np.isnan(poison) and self.options.reference is None:
        # A comparison that is False for NaN is no attempt to hide it.
        wrong = not np.isnan(got).any() and self._may_clean
        message = f"When {holds}, no entry of the loss is NaN."
        expected = "nan"
      elif name == "all included" and self.unmasked is not None:
        plain = self._plainly(values)[None]
        wrong = any(
          not np.array_equal(kind(got), kind(plain))
          for kind in (np.isnan, np.isposinf, np.isneginf)
        )
        message = (
          f"When {holds}, the loss is {_first_nonfinite(got)}; without a mask"
          f" it is {_first_nonfinite(plain)}."
        )
        expected = _first_nonfinite(plain)
      else:
        continue
      if wrong:

        def describe(
          got=got, message=message, expected=expected, poison=poison
        ):
          return {
            "message": message,
            "element": element,
            "poison": str(poison),
            "mask": name,
            "where": where.tolist() if where.size <= 256 else None,
            "got": _first_nonfinite(got),
            "expected": expected,
          }

        self.add("honesty", quantity, describe, argument)

  @functools.cached_property
  def _may_clean(self) -> bool:
    """Whether the program looks for NaN, or can't be looked into."""
    try:
      return _looks_for_nan(self._jaxpr.jaxpr)
    except Exception:  # The loss can't be traced.
      return True

  @functools.cached_property
  def _jaxpr(self) -> Any:
    run = program(self.problem.call, self.parts, self.problem.floats)
    return jax.make_jaxpr(
      lambda values, tangents, where: run(values, tangents, where=where)
    )(self.values, self.tangents, self.problem.where)

  @functools.cached_property
  def _jaxpr_runs(self) -> bool:
    """Whether the program can be run operation by operation."""
    try:
      self._traced(self.values, self.everything)
    except Exception:
      return False
    return True

  def _traced(
    self, values: Sequence[Any], where: np.ndarray
  ) -> tuple[list[_trace.Step], list[_trace.Value]]:
    """All steps of the program on some data."""
    if self.problem.size > LARGE:
      raise ValueError("the data are too large to keep all of its arrays")
    arrays = map(jnp.asarray, [*values, *self.tangents, where])
    return _trace.run(self._jaxpr, list(arrays))

  def blame(
    self,
    quantity: Quantity,
    got: Any,
    values: Sequence[Any],
    where: np.ndarray,
    against: Sequence[Any] | None = None,
  ) -> dict[str, Any]:
    """The operation in which a wrong number arose, if it can be found."""
    if against is None and np.isfinite(got):
      return {}
    position = self.quantities.index(quantity)
    try:
      steps, outputs = self._traced(values, where)
      if against is not None and np.isfinite(got):
        clean, _ = self._traced(against, where)

        def wrong(value):
          x = _trace.floating(value)
          if x is None or len(steps) != len(clean):
            return False
          y = clean[value.step].outputs[value.position].array
          return not np.array_equal(x, np.asarray(y))

      else:
        wrong = _trace.has_nan if np.isnan(got) else _trace.nonfinite
      step = _trace.first(steps, outputs[position], wrong)
    except Exception:  # The loss does not compile, or JAX is newer.
      return {}
    return {} if step is None else _step_facts(step)

  def _check_arithmetic(self) -> None:
    """Clause 7: no NaN or infinity is computed because of a mask."""
    if not self.findings.wants("clean_arithmetic"):
      return

    def broken(values, where):
      self.findings.cases += 1
      steps, outputs = self._traced(values, where)
      return (
        steps,
        outputs,
        [
          i
          for i, s in enumerate(steps)
          if any(map(_trace.nonfinite, s.outputs))
        ],
      )

    def place(step):
      return step.primitive, _trace.source(step)

    try:
      steps, _, wrong = broken(self.values, self.everything)
    except Exception as error:
      self.findings.reasons["clean_arithmetic"] = (
        f"the loss can't be run operation by operation: {_error(error)}"
      )
      return
    usual = {place(steps[i]) for i in wrong}
    self.findings.tried.add("clean_arithmetic")
    for name, where in few_of_each_kind(self.masks).items():
      # The usual label of padding is finite, too.
      labels = [p for p in self.poisonings(where) if p[1] == "-100"]
      for poisoning in (None, *labels):
        values = self.values
        if poisoning is not None:
          values = self.poisoned(where, poisoning[0], poisoning[2])
        steps, outputs, wrong = broken(values, where)
        new = [i for i in wrong if place(steps[i]) not in usual]
        if new:
          self._add_arithmetic(name, where, steps, outputs, new[0], poisoning)

  def _add_arithmetic(
    self,
    name: str,
    where: np.ndarray,
    steps: Sequence[_trace.Step],
    outputs: Sequence[_trace.Value],
    first: int,
    poisoning: tuple[int, str, np.ndarray] | None,
  ) -> None:
    step = steps[first]
    quantity = next(
      (
        q
        for q, output in zip(self.quantities, outputs, strict=True)
        if first in _trace.origins(steps, [output])[0]
      ),
      self.quantities[0],
    )
    output = next(filter(_trace.nonfinite, step.outputs))
    numbers = np.ravel(np.asarray(output.array))
    number = numbers[~np.isfinite(numbers)][0]
    _, positions = _trace.origins(steps, step.inputs)
    sources = [p for p in positions if p in self.problem.floats]
    argument = sources[0] if len(sources) == 1 else None
    when, poison = "On finite data, with this mask", None
    if poisoning is not None:
      argument, poison, _ = poisoning
      named = self.problem.arguments[argument].name
      when = f"When `{named}` holds {poison} where it is masked"

    def describe():
      return {
        "message": (
          f"{when}, `{step.primitive}` computes {_number(number)} on the way to"
          f" {self.what(quantity, ())}."
        ),
        "poison": poison,
        **self.facts(name, where, number, 0),
        "expected": "a finite number",
        **_step_facts(step),
      }

    self.add("clean_arithmetic", quantity, describe, argument)

  def _check_vmap(self) -> None:
    """The clauses again, for a batch of masks and poisons at once."""
    problem = self.problem
    tried = [
      (name, where, *poisoning)
      for name, where in self.masks.items()
      for poisoning in self.poisonings(where)
    ]
    most = max(4, _BATCH // (problem.size + problem.where.size))
    tried = [tried[i] for i in evenly_spaced(len(tried), most)]
    names = list(self.masks)[:most]
    wheres = np.stack(
      [*(self.masks[name] for name in names), *(each[1] for each in tried)]
    )

    def batch(x):
      return np.broadcast_to(x, (len(wheres), *x.shape))

    def together(values, where):
      return jax.vmap(lambda values, where: problem.call(values, where=where))(
        values, where
      )

    # The derivatives of a batched loss, as a training step takes them.
    run = jax.jit(program(together, self.parts, problem.floats))
    tangents = [batch(t) for t in self.tangents]
    weights = batch(cotangent(self.result.shape, self.result.dtype))

    def lanes(rows):
      self.findings.cases += len(rows) * self.derivatives
      stacked = [np.stack(column) for column in zip(*rows, strict=True)]
      return jax.device_get(run(stacked, tangents, weights, where=wheres))

    try:
      clean = lanes([self.values] * len(wheres))
    except Exception as error:
      text = _error(error)
      self.findings.add(
        "transforms",
        lambda: {
          "message": f"The loss does not run under vmap: {text}",
          "got": text,
        },
        transform="vmap",
        dtype=self.dtype,
      )
      return
    got = lanes(
      [self.values] * len(names)
      + [
        self.poisoned(where, argument, poison_value)
        for _, where, argument, _, poison_value in tried
      ]
    )
    for lane, name in enumerate(names):
      self._check_same(
        "transforms",
        name,
        self.masks[name],
        lambda values, lane=lane, name=name: [
          (quantity, a[lane], b)
          for quantity, a, b in zip(
            self.quantities,
            clean if values is self.values else lanes([values] * len(wheres)),
            self.evaluate(values, self.masks[name]),
            strict=True,
          )
        ],
        "Under vmap, {what} is {got}; under jit it is {expected}.",
        "vmap",
      )
    same = np.ones(len(wheres), bool)
    for before, after in zip(clean, got, strict=True):
      equal = (before == after) | np.isnan(before)
      same &= equal.reshape(len(wheres), -1).all(-1)
    for lane in map(int, np.flatnonzero(~same)):
      name, where, argument, poison, poison_value = tried[lane - len(names)]
      self._compare(
        name,
        where,
        argument,
        poison,
        poison_value,
        [x[lane] for x in clean],
        [x[lane] for x in got],
        "vmap",
      )

  def _check_eager(self) -> None:
    """The clauses again, operation by operation, for some of the masks."""
    for name in ("as given", "nothing included", next(iter(self.masks))):
      if name in self.masks and self._jaxpr_runs:
        self._check_one_by_one(name, self.masks[name])

  def _check_one_by_one(self, name: str, where: np.ndarray) -> None:
    def one_by_one(values):
      self.findings.cases += self.derivatives
      _, outputs = self._traced(values, where)
      return [np.asarray(x.array) for x in outputs]

    def compared(values):
      compiled = self.evaluate(values, where)
      return list(
        zip(self.quantities, one_by_one(values), compiled, strict=True)
      )

    self._check_same(
      "transforms",
      name,
      where,
      compared,
      "Without jit, {what} is {got}; under jit it is {expected}.",
      "eager",
    )
    clean = one_by_one(self.values)
    for argument, poison, poison_value in self.poisonings(where):
      got = one_by_one(self.poisoned(where, argument, poison_value))
      self._compare(
        name, where, argument, poison, poison_value, clean, got, "eager"
      )

  def _check_in_python(self) -> None:
    """Calls the loss itself: on concrete arrays it may do other things."""
    where, floats = self.problem.where, self.problem.floats
    parts = [p for p in ("value", "vjp") if p in self.parts]
    at = [i for i, q in enumerate(self.quantities) if q.part in parts]
    run = program(self.problem.call, parts, floats)

    def value(values):
      self.findings.cases += 1
      return [np.asarray(self.problem.call(values, where=where))]

    def derivatives(values):
      self.findings.cases += len(parts)
      return jax.device_get(run(values, self.tangents, where=where))

    try:
      clean = value(self.values), derivatives(self.values)
      for argument, poison, poison_value in self.poisonings(where):
        values = self.poisoned(where, argument, poison_value)
        same = "as given", where, argument, poison, poison_value
        self._compare(*same, clean[0], value(values), "eager", [0])
        if poison == "nan":
          self._compare(*same, clean[1], derivatives(values), "eager", at)
    except Exception as error:
      self.findings.add(
        "accepts", self._refusal(error), transform="eager", dtype=self.dtype
      )


def _sizes(jaxpr: Any) -> set[int]:
  """The sizes of all axes of all arrays of a program."""
  sizes: set[int] = set()
  for eqn in jaxpr.eqns:
    for variable in eqn.outvars:
      sizes.update(getattr(variable.aval, "shape", ()))
    for inner in _programs_in(eqn):
      sizes |= _sizes(inner)
  return sizes


def _written_size(
  call: Callable[..., Any], compact: Compact, checker: Checker
) -> int | None:
  """A size of the full data that the loss keeps for smaller data."""
  given = set(itertools.chain(*(x.shape for x in compact.values)))
  gone = set(checker.problem.shape) - given - {1}
  if not gone:
    return None

  def written(others: dict[int, int]) -> set[int]:
    def like(x):
      shape = [others.get(size, size) for size in x.shape]
      return jax.ShapeDtypeStruct(shape, x.dtype)

    keywords = {} if checker.unmasked else {"where": like(compact.where)}
    jaxpr = jax.make_jaxpr(call)(list(map(like, compact.values)), **keywords)
    return gone & _sizes(jaxpr.jaxpr)

  sizes: set[int] = set()
  with contextlib.suppress(Exception):  # The loss can't be traced.
    sizes = written({})
  if sizes:
    # One that comes of another axis, as its length less 1, goes with it.
    with contextlib.suppress(Exception):  # If it is made for that, it stays.
      sizes &= written({size: size + 1000 for size in given if size > 1})
  return min(sizes, default=None)


def _looks_for_nan(jaxpr: Any) -> bool:
  """Whether a program tests for NaN, as nan_to_num does."""
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == "is_finite":
      return True
    if name in ("eq", "ne") and eqn.invars[0] is eqn.invars[-1]:
      return True
    if any(map(_looks_for_nan, _programs_in(eqn))):
      return True
  return False


def _programs_in(eqn: Any) -> Iterator[Any]:
  """The programs that an operation runs."""
  for parameter in jax.tree.leaves(
    list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
  ):
    if hasattr(parameter, "eqns"):
      yield parameter


def _step_facts(step: _trace.Step) -> dict[str, Any]:
  place, code = _trace.source(step)
  return {"primitive": step.primitive, "source": place, "code": code}


def _first_nonfinite(x: np.ndarray) -> str:
  """The first entry that is not finite, or else the first entry, as text."""
  flat = np.ravel(np.asarray(x, "float64"))
  broken = flat[~np.isfinite(flat)]
  return _number((broken if broken.size else flat)[0]) if flat.size else "empty"


class _NotALoss(Exception):
  """The loss function returned something that is no loss."""
