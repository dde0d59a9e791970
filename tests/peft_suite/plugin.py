"""The pytest plugin of PEFT's test suite: which tests run, what is expected of them, the count."""

import inspect
import re
from collections import Counter

import pytest
from peft_suite import cases, edits
from peft_suite.expected import EXPECTED, Reason

OURS = (cases.SecuraConfig,)
REASON = pytest.StashKey[Reason]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-suite", action="store_true", help="every expected failure must be among the tests"
    )


def pytest_configure() -> None:
    cases.randomise_where_asked()


def _is_ours(value: object) -> bool:
    value = getattr(value, "func", value)  # of a partial
    return isinstance(value, OURS) or (inspect.isclass(value) and issubclass(value, OURS))


def _takes_part(item: pytest.Item) -> bool:
    """Whether one of our configurations is among a test's parameters, or it runs as LoRA's."""
    name = item.path.name
    if name.endswith("_as_lora.py"):
        return bool(re.search(edits.AS_LORA[name.replace("_as_lora", "")], item.nodeid))
    parameters = getattr(item, "callspec", None)
    return parameters is not None and any(map(_is_ours, parameters.params.values()))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left = [item for item in items if not _takes_part(item)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if _takes_part(item)]
    used = set()
    for item in items:
        pattern = next((p for p in EXPECTED if re.search(p, item.nodeid)), None)
        if pattern is not None:
            used.add(pattern)
            item.stash[REASON] = EXPECTED[pattern]
            item.add_marker(
                pytest.mark.xfail(reason=EXPECTED[pattern].sentence, strict=True), append=False
            )
    unused = sorted(set(EXPECTED) - used)
    if unused and config.option.whole_suite:
        raise pytest.UsageError(f"no test has the name of these expected failures: {unused}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """An expected failure with another error is a failure."""
    report = yield
    reason = item.stash.get(REASON, None)
    if reason is not None and report.skipped and hasattr(report, "wasxfail"):
        error = f"{call.excinfo.typename}: {call.excinfo.value}"
        if not re.search(reason.error, error):
            del report.wasxfail
            report.outcome = "failed"
    return report


def pytest_unconfigure(config: pytest.Config) -> None:
    """The count comes last: why tests failed as expected, and the line of numbers."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is None or config.option.collectonly:
        return
    stats = reporter.stats
    failed = [r for kind in ("failed", "error") for r in stats.get(kind, [])]
    surprises = sum("XPASS(strict)" in str(r.longrepr) for r in failed)
    reasons = Counter(r.wasxfail.removeprefix("reason: ") for r in stats.get("xfailed", []))
    for reason, count in reasons.most_common():
        reporter.write_line(f"{count:5} {reason}")
    reporter.write_line(
        f"PEFT's tests on ours: {len(stats.get('passed', []))} passed, "
        f"{len(failed) - surprises} failed, {reasons.total()} expected failures, {surprises} "
        f"expected failures that passed, {len(stats.get('skipped', []))} skipped"
    )
