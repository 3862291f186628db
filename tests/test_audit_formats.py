"""The formats of an audit hold what was found, and nothing else."""

import contextlib
import dataclasses
import html.parser
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized

from optax_masking.testing import _audit_formats as formats
from optax_masking.testing._audit_formats import Audit, identify
from optax_masking.testing._report import CLAUSES, Finding, Report

LONG_NAME = "softmax_cross_entropy_with_integer_labels"
# Markup and control characters of every format.
AWKWARD = (
  "<script>alert(1)</script> & \"a\" 'b' | c\n::error::d, 100%: [e](f) *g* _h_"
  " \\ `i|` nan \x1b[31m\x00\ud800\u2028::j </details> <!-- # $k$\r\n- end"
)
LONG = " ".join(f"word{i}" for i in range(200)) + " " + "x" * 300
KEPT = dict.fromkeys(CLAUSES, "kept")
FULL = Finding(
  "zero_gradient",
  "The vjp with respect to `labels` at [0, 1] is nan, not 0.",
  argument="labels",
  element=(0, 1),
  mask="all but the element [0, 1]",
  where=[[True, False, True], [True, True, True]],
  poison="inf",
  derivative="vjp",
  wrt="logits",
  transform="jit",
  dtype="float16",
  got="nan",
  expected="0.0",
  primitive="mul",
  source="package/file.py:12 in function",
  code="return labels * jnp.log(x)",
  cases=1234,
)
FINDINGS = (
  FULL,
  dataclasses.replace(FULL, derivative="hessian"),
  Finding(
    "invariance",
    AWKWARD,
    argument=AWKWARD,
    derivative="value",
    got=AWKWARD,
    expected="inf",
    source=f"/lib/site-packages/optax/{AWKWARD.splitlines()[0]}.py:7 in f",
    code=AWKWARD,
    dtype="float32",
  ),
  Finding("honesty", LONG, source=f"{'y' * 200}.py:3 in z"),
  Finding("empty", "TypeError: no\n  two lines", where=[True, False, False]),
)


def report(name, *findings, cases=1000, **clauses):
  told = {**KEPT, **clauses, **{f.clause: "broken" for f in findings}}
  return Report(name, findings, told, cases, 1.25)


def without_where(name):
  finding = Finding("accepts", f"{name} takes no `where`.")
  reasons = dict.fromkeys(CLAUSES, "takes no `where`")
  return Report(name, (finding,), {**reasons, "accepts": "broken"}, 1, 0.0)


UPSTREAM = {
  "hinge_loss": without_where("hinge_loss"),
  "l2_loss": without_where("l2_loss"),
  LONG_NAME: report(
    LONG_NAME, *FINDINGS, masked_label="no labels", identity="no labels"
  ),
  "kl_divergence": report("kl_divergence"),
  "half_asked": Report("half_asked", (), {"empty": "kept"}, 3, 0.0),
}
MASKED = {
  name: report(name, masked_label="nothing to try it on") for name in UPSTREAM
}
MASKED.pop("l2_loss")
OWN = "my.module:loss"
AUDIT = Audit(
  reports={
    "optax": UPSTREAM,
    "optax_masking": MASKED,
    OWN: {"a" * 130: report("a" * 130, FINDINGS[2]), AWKWARD: report(AWKWARD)},
  },
  versions={"optax": "0.2.8", "jax": "0.10.2", "awkward": AWKWARD},
)
NEW = identify("optax", LONG_NAME, FINDINGS[0])
AGAINST_BASELINE = dataclasses.replace(
  AUDIT, new=frozenset({NEW}), gone=(f"optax/{AWKWARD}/-", "b" * 150)
)
ALL = [
  ("findings", AUDIT),
  ("baseline", AGAINST_BASELINE),
  ("nothing_new", dataclasses.replace(AUDIT, new=frozenset(), quick=True)),
  ("clean", Audit({"optax_masking": MASKED}, {"jax": "0.10.2"})),
  ("no_losses", Audit({"optax": {}}, {})),
  ("no_targets", Audit({}, {})),
]


def findings_of(audit):
  """Each finding with its target and loss."""
  return [
    (target, name, finding)
    for target, reports in audit.reports.items()
    for name, report in reports.items()
    for finding in report.findings
  ]


def words(text):
  """What is printable, without backticks, spaces and control characters."""
  text = re.sub(r"\\(x[01].|ud800|u2028)", "", text)
  return "".join(c for c in text if "!" <= c <= "~" and c != "`")


def expected_state(report, clause):
  told = report.clauses.get(clause)
  return told if told in ("kept", "broken", None) else "untried"


INAPPLICABLE = "no integer argument names a class"
NOTE = "Without a mask the gradient of `x` is nan, too."
NOTED = Audit(
  {
    "optax": {
      name: dataclasses.replace(
        report(
          name,
          masked_label=f"does not apply: {INAPPLICABLE}",
          honesty="no gradient shows it",
        ),
        notes=(NOTE,),
      )
      for name in ("l2_loss", "log_cosh")
    }
  },
  {},
  seconds=1234.56,
)


class NotesTest(parameterized.TestCase):
  """What does not apply is no fault, and a note is told once."""

  @parameterized.parameters("text", "markdown", "html", "json_text", "sarif")
  def test_notes(self, write):
    written = getattr(formats, write)(NOTED)
    told = " ".join(re.sub(r"<[^>]*>|`", "", written).split())
    times = 2 if write == "json_text" else 1
    self.assertEqual(told.count("the gradient of x is nan"), times)

  def test_text(self):
    written = formats.text(NOTED)
    self.assertRegex(written, r"(?m)^l2_loss +✓ ✓ ✓ ✓ ✓   ✓ · ✓ ✓$")
    self.assertIn("not tried   blank: does not apply", written)
    self.assertNotIn(INAPPLICABLE, written)
    self.assertIn("not tried: honesty: no gradient shows it (2)", written)
    self.assertIn("note on l2_loss, log_cosh: ", written)

  @parameterized.parameters("text", "markdown", "html")
  def test_wall_time(self, write):
    """And not the sum of the seconds of all processes."""
    written = getattr(formats, write)(NOTED)
    self.assertIn("1,234.6", written)
    self.assertNotIn("2.5", re.sub("(?s)<style>.*</style>", "", written))

  def test_page(self):
    page = Page(formats.html(NOTED).removeprefix("<!doctype html>"))
    cells = [e for e in page.all("td") if "inapplicable" in e.classes()]
    self.assertEqual(
      [cell.text[1:] for cell in cells], [f"does not apply: {INAPPLICABLE}"] * 2
    )
    titles = [e.attributes.get("title") for e in page.all("span")]
    self.assertEqual(titles.count(INAPPLICABLE), 2)

  def test_json(self):
    found = strict(formats.json_text(NOTED))["targets"]["optax"]["l2_loss"]
    self.assertEqual(found["untried"], {"honesty": "no gradient shows it"})
    self.assertEqual(found["notes"], [NOTE])

  def test_losses_without_where_are_told_apart(self):
    new = identify("optax", "l2_loss", UPSTREAM["l2_loss"].findings[0])
    audit = Audit({"optax": UPSTREAM}, {}, new=frozenset({new}))
    self.assertIn(
      "2 without `where` (1 new), 5 findings (0 new)", formats.text(audit)
    )


class AuditTest(parameterized.TestCase):
  def test_sums(self):
    summaries = [AUDIT.summary(target) for target in AUDIT.reports]
    self.assertEqual(
      sum(numbers.cases for numbers in summaries), 2 + 2003 + 4000 + 2000
    )
    self.assertEqual(
      sum(numbers.seconds for numbers in summaries), 1.25 * (2 + 4 + 2)
    )

  @parameterized.product(
    audit=ALL,
    write=["text", "markdown", "json_text", "github", "html", "sarif"],
  )
  def test_is_text_of_whole_lines(self, audit, write):
    """And can be written in UTF-8, whatever an error message holds."""
    written = getattr(formats, write)(audit[1])
    self.assertEqual(written, written.rstrip("\n") + "\n" if written else "")
    self.assertNotIn("\x1b", written)
    self.assertNotIn("\x00", written)
    self.assertNotIn("\u2028", written)
    written.encode("utf-8")

  def test_only_the_page_needs_jinja(self):
    program = (
      "import sys; sys.modules['jinja2'] = None\n"
      "import optax_masking._command\n"
      "from optax_masking.testing import _audit_formats as formats\n"
      "for name in ('text', 'markdown', 'json_text', 'github', 'sarif'):\n"
      "  getattr(formats, name)(formats.Audit({'optax': {}}, {}))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def uncolored(text):
  return re.sub(r"\x1b\[[\d;]*m", "", text)


class TextTest(parameterized.TestCase):
  @parameterized.product(audit=ALL, color=[False, True])
  def test_fits(self, audit, color):
    for line in uncolored(formats.text(audit[1], color)).split("\n"):
      self.assertLessEqual(len(line), 100, line)
      self.assertEqual(line, line.rstrip())

  @parameterized.named_parameters(ALL)
  def test_color_is_all_that_color_adds(self, audit):
    plain = formats.text(audit)
    colored = formats.text(audit, color=True)
    self.assertEqual(formats.text(audit, color=False), plain)
    self.assertNotEqual(colored, plain)
    self.assertEqual(uncolored(colored), plain)

  def test_cells_stand_below_their_headings(self):
    lines = formats.text(AUDIT).split("\n")
    symbols = {"kept": "✓", "broken": "✗", "untried": "·", None: " "}
    heads = next(i for i, line in enumerate(lines) if "optax_masking" in line)
    heads = next(i for i in range(heads, len(lines)) if "accepts" in lines[i])
    block = lines[heads - 1]
    starts = {t: block.index(f" {t} ") + 1 for t in ["optax"]}
    starts["optax_masking"] = block.index("optax_masking")
    for i, clause in enumerate(CLAUSES):
      heading = clause.split("_")[-1] if "arithmetic" in clause else clause
      columns = [m.start() for m in re.finditer(heading, lines[heads + i])]
      self.assertLen(columns, 2, clause)
      self.assertEqual([c - 2 * i for c in columns], list(starts.values()))
      for column, reports in zip(columns, (UPSTREAM, MASKED), strict=True):
        for name, found in reports.items():
          (row,) = (x for x in lines if re.match(rf"{name} +\S", x))
          self.assertEqual(
            row.ljust(100)[column],
            symbols[expected_state(found, clause)],
            f"{name} {clause}",
          )
    (row,) = (x for x in lines if x.startswith("l2_loss  "))
    self.assertEqual(row[starts["optax_masking"] :], "no such loss")

  def test_targets_without_a_loss_in_common(self):
    """They are not side by side; a name that is too long has its own line."""
    written = formats.text(AUDIT)
    self.assertRegex(written, rf"(?m)^ *{OWN}$")
    self.assertIn(f"\n{'a' * 100}\n{'a' * 30}\n", written)

  def test_sums(self):
    written = formats.text(AGAINST_BASELINE)
    self.assertIn(
      "\noptax: 2 of 5 losses clean, 1 with broken clauses, 2 without `where`,"
      " 5 findings (1 new), 2,005",
      written.replace("\n  cases", " cases"),
    )
    self.assertIn("optax_masking: 4 of 4 losses clean, 0 findings", written)
    self.assertIn("not tried: takes no `where` (18); no labels (2)", written)
    self.assertNotIn("new", formats.text(AUDIT))

  def test_findings(self):
    written = formats.text(AGAINST_BASELINE)
    flat = " ".join(written.split())
    for part in (
      "✗ zero_gradient · new · labels · vjp wrt logits · float16",
      "at package/file.py:12 in function",
      FULL.message,
      "No longer found, of the baseline: 2",
      "optax: 6 known findings, see --baseline",
    ):
      self.assertIn(part, flat)
    for known in ("✗ honesty", "hessian", "✗ accepts"):
      self.assertNotIn(known, flat)
    flat = " ".join(formats.text(AUDIT).split())
    for part in (
      # They are told as one if a baseline does not tell them apart.
      "labels · vjp wrt logits, hessian wrt logits · float16 · and 1 more",
      "TypeError: no two lines",
      "✗ honesty",
      "word0 word1 word2",
    ):
      self.assertIn(part, flat)
    self.assertNotIn("word100", flat)
    self.assertNotIn("site-packages", flat)

  def test_new_findings_are_told_in_full(self):
    new = identify("optax", LONG_NAME, FINDINGS[3])
    audit = dataclasses.replace(AUDIT, new=frozenset({new}))
    self.assertIn("word199", formats.text(audit))

  def test_findings_of_several_losses_are_told_once(self):
    written = formats.text(AUDIT)
    self.assertIn("\noptax: hinge_loss, l2_loss\n  ✗ accepts\n", written)
    self.assertEqual(written.count("    takes no `where`"), 1)

  def test_a_newer_clause_and_more_targets_still_fit(self):
    reports = {f"target{i}": MASKED for i in range(5)}
    written = formats.text(Audit(reports, {}))
    self.assertLessEqual(max(map(len, written.split("\n"))), 100)
    self.assertEqual(written.count("kl_divergence "), 3)


class Page(html.parser.HTMLParser):
  """Reads HTML, and fails if an element is not closed, or the wrong one."""

  VOID = frozenset({"meta", "br"})

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.open = []
    self.elements = []
    self.feed(text)
    self.close()
    assert not self.open, self.open

  def handle_starttag(self, tag, attributes):
    names = [name for name, _ in attributes]
    assert len(set(names)) == len(names), (tag, names)
    element = Element(tag, dict(attributes), [*self.open])
    self.elements.append(element)
    if tag not in self.VOID:
      self.open.append(element)

  def handle_endtag(self, tag):
    assert self.open and self.open[-1].tag == tag, (tag, self.getpos())
    self.open.pop()

  def handle_data(self, data):
    for element in self.open:
      element.text += data

  def handle_comment(self, data):
    raise AssertionError(data)

  def all(self, tag, **attributes):
    return [
      e
      for e in self.elements
      if e.tag == tag
      and all(e.attributes.get(k) == v for k, v in attributes.items())
    ]


class Element:
  """An element with the text in it."""

  def __init__(self, tag, attributes, within):
    self.tag = tag
    self.attributes = attributes
    self.within = within
    self.text = ""

  def classes(self):
    return (self.attributes.get("class") or "").split()


class MarkdownTest(parameterized.TestCase):
  def tables(self, written):
    """The cells of the rows of each table."""
    groups = itertools.groupby(written.split("\n"), lambda x: x[:1] == "|")
    return [
      [[c.strip() for c in row[1:-1].split("|")] for row in rows]
      for table, rows in groups
      if table
    ]

  @parameterized.named_parameters(ALL)
  def test_structure(self, audit):
    written = formats.markdown(audit)
    tables = self.tables(written)
    self.assertLen(tables, 1 + len(audit.reports))
    for table in tables:
      self.assertLen({len(row) for row in table}, 1)
      self.assertRegex("".join(table[1]), r"^[:-]+$")
    tags = {element.tag for element in Page(written).elements}
    self.assertLessEqual(tags, {"code", "details", "summary", "br"})
    # A line that data could begin would be a heading, a list or a table.
    for line in written.split("\n"):
      self.assertRegex(line, r"^(#+ |- |\| |</?details>|\*\*|$|[\w&#;]+ )")

  def test_cells(self):
    _, *tables = self.tables(formats.markdown(AUDIT))
    signs = {"kept": "✅", "broken": "❌", "untried": "·", None: ""}
    for table, reports in zip(tables, AUDIT.reports.values(), strict=True):
      head, _, *rows = table
      self.assertEqual(head[1:], [c.replace("_", " ") for c in CLAUSES])
      self.assertLen(rows, len(reports))
      for row, (name, found) in zip(rows, reports.items(), strict=True):
        self.assertStartsWith(words(Page(row[0]).all("code")[0].text), name[:5])
        self.assertEqual(
          row[1:], [signs[expected_state(found, c)] for c in CLAUSES]
        )

  def test_nothing_in_the_data_is_markup(self):
    written = formats.markdown(AGAINST_BASELINE)
    page = Page(f"<main>{written}</main>")
    told = words(page.all("main")[0].text)
    for part in (FULL.message, *AGAINST_BASELINE.gone):
      self.assertIn(words(part.split("\n")[0]), told)
    for known in (LONG, AWKWARD.split(" \\ ")[0]):
      self.assertNotIn(words(known), words(written.split("### ")[1]))
    self.assertIn("6 known findings, see --baseline", written)
    whole = words(
      Page(f"<main>{formats.markdown(AUDIT)}</main>").all("main")[0].text
    )
    for part in (LONG, AWKWARD.split(" \\ ")[0].split("\n")[0]):
      self.assertIn(words(part), whole)
    without_tags = re.sub(r"<[^>]*>", "", written)
    for character in "`[]<>$~_\\":
      self.assertNotIn(character, without_tags)
    self.assertIn("to <code>labels</code> at", written)

  def test_baseline(self):
    written = formats.markdown(AGAINST_BASELINE)
    self.assertIn("**New against the baseline (1)**", written)
    self.assertIn("**Gone against the baseline (2)**", written)
    self.assertEqual(written.count("**new**"), 1)
    self.assertNotIn("baseline", formats.markdown(AUDIT))


def strict(text):
  """What a JSON parser reads that knows no NaN."""

  def refuse(constant):
    raise AssertionError(constant)

  return json.loads(text, parse_constant=refuse)


class JsonTest(parameterized.TestCase):
  @parameterized.named_parameters(ALL)
  def test_holds_the_reports(self, audit):
    read = strict(formats.json_text(audit))
    self.assertEqual(
      read["targets"],
      {
        target: {
          name: {
            **json.loads(json.dumps(report.to_dict())),
            "untried": report.untried,
          }
          for name, report in reports.items()
        }
        for target, reports in audit.reports.items()
      },
    )
    self.assertEqual(read["schema"], 1)
    self.assertEqual(read["versions"], audit.versions)
    self.assertEqual(read["quick"], audit.quick)
    new = None if audit.new is None else sorted(audit.new)
    self.assertEqual(read["new"], new)
    self.assertEqual(read["gone"], list(audit.gone))
    self.assertEqual(list(read["summary"]), list(audit.reports))

  def test_summary(self):
    self.assertEqual(
      strict(formats.json_text(AGAINST_BASELINE))["summary"]["optax"],
      {
        "losses": 5,
        "clean": 2,
        "without_where": 2,
        "new_without_where": 0,
        "findings": 7,
        "new": 1,
        "cases": 2005,
        "seconds": 2.5,
      },
    )

  def test_what_json_does_not_have(self):
    class Unknown:
      def __str__(self):
        return "unknown"

    where = [True, float("nan"), (float("-inf"), Unknown())]
    finding = dataclasses.replace(FULL, where=where)
    audit = Audit({"optax": {"loss": report("loss", finding)}}, {})
    (read,) = strict(formats.json_text(audit))["targets"]["optax"].values()
    self.assertEqual(
      read["findings"][0]["where"], [True, "nan", ["-inf", "unknown"]]
    )

  def test_schema_is_documented(self):
    """Every key is in the docstring, and every key there is in the JSON."""
    read = strict(formats.json_text(AGAINST_BASELINE))
    found = set(read)
    for reports in read["targets"].values():
      for one in reports.values():
        found |= set(one).union(*one["findings"])
    found = found.union(*read["summary"].values())
    documented = re.findall(r"(?m)^ +(\w+): ", formats.json_text.__doc__)
    self.assertEqual(set(documented), found)


class Command:
  """A workflow command, read as GitHub's runner does."""

  PATTERN = re.compile(r"::(\w+)(?: (.*?))?::(.*)")

  def __init__(self, line):
    self.kind, properties, message = self.PATTERN.fullmatch(line).groups()
    self.message = self.decoded(message)
    self.properties = {
      key: self.decoded(value).replace("%2C", ",")
      for key, value in (p.split("=", 1) for p in properties.split(","))
    }

  def decoded(self, text):
    codes = {"0D": "\r", "0A": "\n", "3A": ":", "2C": ",", "25": "%"}
    assert not re.search(r"%(?!0D|0A|3A|2C|25)", text), text
    return re.sub("%(..)", lambda match: codes[match[1]], text)


def commands(audit):
  return [Command(x) for x in formats.github(audit).split("\n")[:-1]]


class GithubTest(parameterized.TestCase):
  def test_every_clause_that_is_broken_is_an_error(self):
    read = commands(AUDIT)
    self.assertEqual({c.kind for c in read}, {"error"})
    told = [(c.properties["title"], c.message) for c in read]
    for target, name, finding in findings_of(AUDIT):
      if finding.derivative != "hessian":  # It is told with the vjp.
        self.assertTrue(
          any(
            title == f"{target} {name}: {finding.clause}"
            and words(message).startswith(words(finding.message)[:20])
            and CLAUSES[finding.clause] in message
            for title, message in told
          ),
          finding,
        )
    self.assertLen(read, 2 + 4 + 1)

  def test_awkward_text_comes_back(self):
    message = "100%0A, a: b\r\n::error::c%"
    finding = Finding("empty", message, source="x,y:%z.py:3 in f")
    audit = Audit({"a:b,c": {"%": report("%", finding)}}, {})
    self.assertNotIn("\r", formats.github(audit))
    (read,) = commands(audit)
    self.assertStartsWith(read.message, f"{message}\n")
    self.assertEqual(read.properties["title"], "a:b,c %: empty")
    self.assertEqual(read.properties["file"], "x,y:%z.py")
    self.assertEqual(read.properties["line"], "3")

  def test_only_what_is_new_is_an_error(self):
    read = commands(AGAINST_BASELINE)
    (error,) = (c for c in read if c.kind == "error")
    self.assertIs(read[0], error)
    self.assertEqual(
      error.properties["title"], f"optax {LONG_NAME}: zero_gradient"
    )
    self.assertIn("vjp", error.message)
    self.assertNotIn("hessian", error.message)
    self.assertEqual({c.kind for c in read[1:]}, {"notice"})
    self.assertIn("b" * 150, read[-1].message)

  @parameterized.parameters(
    ("a/b.py:12 in f", "a/b.py", "12"),
    ("a/b.py:12 in f, by way of c.py:4 in g", "a/b.py", "12"),
    (os.path.join(os.getcwd(), "a", "b.py:12 in <lambda>"), "a/b.py", "12"),
    ("/elsewhere/b.py:12 in f", "/elsewhere/b.py", "12"),
    ("c:b.py:12", "c:b.py", "12"),
    ("<string>", None, None),
    (None, None, None),
  )
  def test_source(self, source, file, line):
    finding = dataclasses.replace(FULL, source=source)
    (read,) = commands(Audit({"optax": {"loss": report("loss", finding)}}, {}))
    self.assertEqual(read.properties.get("file"), file)
    self.assertEqual(read.properties.get("line"), line)

  def test_sources_are_annotated_each(self):
    other = dataclasses.replace(FULL, source="package/file.py:13 in function")
    found = report("loss", FULL, other)
    read = commands(Audit({"optax": {"loss": found}}, {}))
    self.assertEqual([c.properties["line"] for c in read], ["12", "13"])

  def test_nothing_found(self):
    self.assertEqual(formats.github(Audit({"optax": MASKED}, {})), "")


class SarifTest(parameterized.TestCase):
  def result(self, finding, **options):
    audit = Audit({"optax": {"loss": report("loss", finding)}}, {}, **options)
    (run,) = strict(formats.sarif(audit))["runs"]
    (result,) = run["results"]
    return result

  @parameterized.named_parameters(ALL)
  def test_structure(self, audit):
    """The properties that SARIF 2.1.0 requires, of their types."""
    read = strict(formats.sarif(audit))
    self.assertEqual(read["version"], "2.1.0")
    self.assertIn("sarif-schema-2.1.0.json", read["$schema"])
    (run,) = read["runs"]
    rules = run["tool"]["driver"]["rules"]
    self.assertTrue(run["tool"]["driver"]["name"])
    self.assertEqual([rule["id"] for rule in rules], list(CLAUSES))
    for rule in rules:
      self.assertEqual(rule["shortDescription"]["text"], CLAUSES[rule["id"]])
    for invocation in run["invocations"]:
      self.assertIs(invocation["executionSuccessful"], True)
    self.assertLen(run["results"], len(findings_of(audit)))
    fingerprints = set()
    for result in run["results"]:
      self.assertEqual(rules[result["ruleIndex"]]["id"], result["ruleId"])
      self.assertIn(result["level"], ("error", "note"))
      self.assertTrue(result["message"]["text"])
      (location,) = result["locations"]
      for logical in location["logicalLocations"]:
        self.assertTrue(logical["fullyQualifiedName"])
      (fingerprint,) = result["partialFingerprints"].values()
      self.assertIsInstance(fingerprint, str)
      fingerprints.add(fingerprint)
    self.assertLen(fingerprints, len(run["results"]))

  def test_only_what_is_new_is_an_error(self):
    (run,) = strict(formats.sarif(AGAINST_BASELINE))["runs"]
    (error,) = (r for r in run["results"] if r["level"] == "error")
    self.assertEqual(list(error["partialFingerprints"].values()), [NEW])
    self.assertEqual(error["baselineState"], "new")
    (run,) = strict(formats.sarif(AUDIT))["runs"]
    self.assertEqual({r["level"] for r in run["results"]}, {"error"})

  @parameterized.parameters(
    ("tests/a b.py:12 in f", "tests/a%20b.py", 12),
    ("/lib/c.py:4 in g, by way of tests/a b.py:3 in f", "tests/a%20b.py", 3),
    ("tests/missing.py:12 in f", None, None),
    ("../elsewhere.py:12 in f", None, None),
    ("/elsewhere/b.py:12 in f", None, None),
    ("<string>", None, None),
    (None, None, None),
  )
  def test_place(self, source, uri, line):
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    self.enter_context(contextlib.chdir(folder))
    (folder / "tests").mkdir()
    (folder / "tests" / "a b.py").touch()
    (folder / "loss.py").touch()
    finding = dataclasses.replace(FULL, source=source)
    (location,) = self.result(finding)["locations"]
    if uri is None:
      self.assertNotIn("physicalLocation", location)
    else:
      place = location["physicalLocation"]
      self.assertEqual(place["artifactLocation"]["uri"], uri)
      self.assertEqual(place["region"], {"startLine": line})
    # GitHub refuses what has no file: better the loss than nothing.
    definitions = {"optax": {"loss": f"{folder / 'loss.py'}:7 in loss"}}
    (location,) = self.result(finding, definitions=definitions)["locations"]
    place = location["physicalLocation"]["artifactLocation"]
    self.assertEqual(place["uri"], uri or "loss.py")


def contrast(a, b):
  """The contrast of two colors, by the Web Content Accessibility Guidelines."""

  def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
      c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
      for c in channels
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

  high, low = sorted((luminance(a), luminance(b)), reverse=True)
  return (high + 0.05) / (low + 0.05)


HOSTILE = (
  "a' onload=alert(1)",
  'a" onmouseover="alert(1)" x="',
  "<img src=x onerror=alert(1)>",
  "</pre></code></td></table><script>alert(1)</script>",
  "</title></style><script>alert(1)</script><!--",
  "`</code><b>`",
  "{{ 7 * 7 }}{% raw %}{# <b> #}",
  "&lt;b&gt;",
)


def audit_of_strings(text):
  """An audit in which each string that a user or a loss chooses is `text`."""
  strings = {
    field.name: text
    for field in dataclasses.fields(Finding)
    if field.type in (str, str | None)
  }
  finding = Finding(**{**strings, "clause": "empty"}, element=(0,))
  found = report(
    text, finding, identity=text, honesty=text, transforms=text, accepts=text
  )
  key = identify(text, text, finding)
  return Audit(
    {text: {text: found}}, {text: text}, new=frozenset({key}), gone=(text,)
  )


class HtmlTest(parameterized.TestCase):
  @parameterized.parameters(*HOSTILE)
  def test_nothing_in_the_data_is_markup(self, text):
    """The elements and their attributes are those of a harmless text."""

    def read(text):
      written = formats.html(audit_of_strings(text))
      page = Page(written.removeprefix("<!doctype html>"))
      return page, [(e.tag, list(e.attributes)) for e in page.elements]

    page, structure = read(text)
    # With backticks and spaces where the other has them.
    _, harmless = read(re.sub(r"[^`\s]", "x", text))
    self.assertEqual(structure, harmless)
    self.assertEqual(page.all("h2")[0].text, text)
    blocks = page.all("pre")
    self.assertNotEmpty(blocks)
    for block in blocks:
      self.assertEqual(block.text, text)

  @parameterized.named_parameters(ALL)
  def test_is_one_page_that_loads_nothing(self, audit):
    written = formats.html(audit)
    page = Page(written.removeprefix("<!doctype html>"))
    self.assertStartsWith(written, "<!doctype html>\n<html")
    tags = {element.tag for element in page.elements}
    self.assertEmpty(tags & {"script", "link", "img", "iframe", "object", "a:"})
    for element in page.elements:
      for name, value in element.attributes.items():
        self.assertFalse(name.startswith("on") or name == "src", name)
        if name == "href":
          self.assertStartsWith(value, "#")
    (style,) = page.all("style")
    self.assertNotRegex(style.text, r"url\(|@import|https?:")
    self.assertNotIn("://", re.sub(r"<code>.*?</code>", "", written))
    (policy,) = (m for m in page.all("meta") if "http-equiv" in m.attributes)
    self.assertStartsWith(policy.attributes["content"], "default-src 'none'")

  @parameterized.named_parameters(ALL)
  def test_for_everyone(self, audit):
    """It has a language, a title, headings, captions and valid targets."""
    page = Page(formats.html(audit).removeprefix("<!doctype html>"))
    (root,) = page.all("html")
    self.assertEqual(root.attributes["lang"], "en")
    self.assertIn("audit", page.all("title")[0].text.lower())
    (viewport,) = page.all("meta", name="viewport")
    self.assertIn("width=device-width", viewport.attributes["content"])
    self.assertLen(page.all("h1"), 1)
    self.assertLen(page.all("main"), 1)
    self.assertLen(page.all("table"), len(audit.reports))
    self.assertLen(page.all("caption"), len(audit.reports))
    ids = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    self.assertLen(set(ids), len(ids))
    self.assertFalse(any(re.search(r"\s", i) or not i for i in ids))
    for link in page.all("a"):
      self.assertIn(link.attributes["href"].removeprefix("#"), ids)
      self.assertTrue(link.text.strip())
    for element in page.elements:
      if element.tag == "th":
        self.assertIn(element.attributes["scope"], ("row", "col"))

  def rows(self, page, target):
    """The rows of the table of a target, and the cells of each."""
    section = next(
      e
      for e in page.all("section")
      if "target" in e.classes()
      and any(h.text == target for h in page.all("h2") if e in h.within)
    )
    return {
      row: [c for c in page.elements if c.within and c.within[-1] is row]
      for row in page.all("tr")
      if section in row.within
    }

  def test_grid(self):
    page = Page(formats.html(AUDIT).removeprefix("<!doctype html>"))
    words_of = {"kept": "kept", "broken": "broken", None: "not asked for"}
    for target in ("optax", "optax_masking"):
      rows = self.rows(page, target)
      heads, *rows = rows.items()
      self.assertEqual(
        [c.text for c in heads[1][1:]], [c.replace("_", " ") for c in CLAUSES]
      )
      reports = AUDIT.reports[target]
      losses = [cells for row, cells in rows if "loss" in row.classes()]
      self.assertEqual([cells[0].text for cells in losses], list(reports))
      for (name, *cells), found in zip(losses, reports.values(), strict=True):
        self.assertEqual(name.tag, "th")
        spread = [
          cell
          for cell in cells
          for _ in range(int(cell.attributes.get("colspan", 1)))
        ]
        self.assertLen(spread, len(CLAUSES))
        for clause, cell in zip(CLAUSES, spread, strict=True):
          state = expected_state(found, clause)
          if state != "untried" or "labels" in found.clauses[clause]:
            self.assertNotIn("colspan", cell.attributes)
          self.assertIn(words_of.get(state, "not tried"), cell.text)
          if state == "untried":
            self.assertIn(words(found.clauses[clause]), words(cell.text))
      for row, cells in rows:
        if "detail" in row.classes():
          self.assertEqual(cells[0].attributes["colspan"], "11")

  def test_no_where_is_one_cell(self):
    page = Page(formats.html(AUDIT).removeprefix("<!doctype html>"))
    rows = self.rows(page, "optax")
    (cells,) = (c for c in rows.values() if c[0].text == "hinge_loss")
    self.assertLen(cells, 3)
    self.assertEqual(cells[2].attributes["colspan"], "9")
    for empty in ("dl", "ul", "details"):
      self.assertTrue(all(e.text.strip() for e in page.all(empty)), empty)

  def test_a_broken_cell_opens_what_was_found(self):
    page = Page(formats.html(AUDIT).removeprefix("<!doctype html>"))
    by_id = {e.attributes.get("id"): e for e in page.elements}
    opened = set()
    for link in page.all("a"):
      cell = link.within[-1]
      if cell.tag == "td" and "broken" in cell.classes():
        opened.add(link.attributes["href"].removeprefix("#"))
    told = [by_id[i] for i in opened]
    self.assertLen(told, 2 + 4 + 1)
    self.assertEqual({e.classes()[0] for e in told}, {"detail"})
    for _, name, finding in findings_of(AUDIT):
      (row,) = (
        e
        for e in told
        if words(finding.message) in words(e.text)
        and words(name) in words(e.text)
      )
      flat = words(row.text)
      self.assertIn(words(CLAUSES[finding.clause]), flat)
      for value in (
        finding.argument,
        finding.mask,
        finding.poison,
        finding.derivative,
        finding.dtype,
        finding.got,
        finding.expected,
        finding.primitive,
        finding.code,
      ):
        self.assertIn(words(value or ""), flat)
      place = (finding.source or "").split("site-packages/")[-1]
      self.assertIn(words(place), flat)

  def test_mask_is_drawn(self):
    page = Page(formats.html(AUDIT).removeprefix("<!doctype html>"))
    drawings = {e.text: e for e in page.all("pre") if "mask" in e.classes()}
    self.assertEqual(set(drawings), {"■ ◇ ■\n■ ■ ■", "■ □ □"})
    self.assertEqual(
      drawings["■ □ □"].attributes["aria-label"], "1 of 3 elements included"
    )

  def test_drawing_of_more_axes(self):
    where = [[[True, False]], [[False, False]]]
    for shape, drawn in (
      (where, "■ □\n\n□ □"),
      ([True] * 500, None),
      (True, None),
    ):
      finding = dataclasses.replace(FULL, where=shape)
      audit = Audit({"optax": {"loss": report("loss", finding)}}, {})
      page = Page(formats.html(audit).removeprefix("<!doctype html>"))
      masks = [e.text for e in page.all("pre") if "mask" in e.classes()]
      self.assertEqual(masks, [drawn] if drawn else [])

  def test_baseline(self):
    page = Page(formats.html(AGAINST_BASELINE).removeprefix("<!doctype html>"))
    (section,) = (e for e in page.all("section") if "baseline" in e.classes())
    self.assertIn(NEW, section.text)
    for key in AGAINST_BASELINE.gone:
      self.assertIn(words(key), words(section.text))
    badges = [e for e in page.all("span") if "badge" in e.classes()]
    self.assertLen(badges, 1)
    self.assertLen([e for e in page.all("tr") if "detail" in e.classes()], 1)
    self.assertIn("6 known findings, see --baseline", page.all("main")[0].text)
    self.assertTrue(
      any(e.text.endswith("1 known finding") for e in page.all("b"))
    )
    (link,) = (e for e in page.all("a") if e.text == NEW)
    self.assertEqual(
      link.attributes["href"], f"#optax/{LONG_NAME}/zero_gradient"
    )
    self.assertNotIn("against the baseline", formats.html(AUDIT))

  def test_numbers_are_shown_on_any_screen(self):
    """As the legend promises."""
    written = formats.html(AUDIT)
    self.assertIn("number of findings", written)
    self.assertNotRegex(written, r"\.number \{[^}]*display: none")

  @parameterized.product(
    scheme=["light", "dark"],
    pair=[
      ("ink", "page"),
      ("ink", "card"),
      ("soft", "page"),
      ("soft", "card"),
      ("soft", "wash"),
      ("link", "card"),
      ("link", "page"),
      ("good", "card"),
      ("bad", "page"),
      ("bad", "bad-wash"),
      ("new", "new-wash"),
    ],
  )
  def test_contrast(self, scheme, pair):
    (style,) = re.findall(r"(?s)<style>(.*)</style>", formats.html(AUDIT))
    light, dark = re.findall(r"(?s):root \{(.*?)\}", style)
    self.assertIn("prefers-color-scheme: dark", style)
    told = light if scheme == "light" else dark
    colors = dict(re.findall(r"--([\w-]+): (#\w{6});", told))
    self.assertGreaterEqual(contrast(*(colors[name] for name in pair)), 4.5)


if __name__ == "__main__":
  absltest.main()
