"""The workflows for GitHub Actions, as far as they can be checked without it: the commands that
they run exist, a release publishes what was tested, and the names given to pip are the package's.
"""

import re
import tomllib
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / ".github" / "workflows"
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)


def workflow(name: str) -> dict:
    loaded = yaml.safe_load((WORKFLOWS / name).read_text())
    loaded["on"] = loaded.pop(True)  # YAML 1.1 reads the word "on" as a truth value
    return loaded


def steps(name: str) -> list[dict]:
    return [step for job in workflow(name)["jobs"].values() for step in job.get("steps", ())]


def test_every_target_of_make_is_phony_or_a_file():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert sorted(phony.split()) == sorted(TARGETS)


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.yml")), ids=lambda path: path.name)
def test_commands_exist(path):
    lines = [line for step in steps(path.name) for line in step.get("run", "").splitlines()]
    assert lines
    for line in lines:
        first, *rest = line.split()
        if first == "make":
            assert rest[0] in TARGETS, line
        elif "/" in first and not first.startswith("empty/"):
            assert (ROOT / first).is_file() and (ROOT / first).stat().st_mode & 0o100, line
        for module in re.findall(r"python -m (secura_kernels\S*)", line):
            assert (ROOT / module.replace(".", "/") / "__main__.py").is_file(), line
    for job in workflow(path.name)["jobs"].values():
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file()
        else:
            assert job["steps"]


def test_ci_runs_what_every_commit_must_pass():
    assert ".ci/run" in [step.get("run") for step in steps("ci.yml")]
    for target in re.findall(r"^make ([a-z-]+)", (ROOT / ".ci" / "run").read_text(), re.M):
        assert target in TARGETS


def test_pythons_of_ci_are_those_the_package_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [c.rpartition(" ")[2] for c in project["classifiers"] if ":: 3." in c]
    assert workflow("ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == named
    assert project["requires-python"] == f">={named[0]}"


def test_a_release_publishes_what_was_tested():
    """By a tag alone, after every job of ci.yml, with no secret and no right but the identity."""
    release = workflow("release.yml")
    assert release["on"] == {"push": {"tags": ["v*"]}}
    build, publish = release["jobs"]["build"], release["jobs"]["publish"]
    assert (
        build["uses"] == "./.github/workflows/ci.yml"
        and "workflow_call" in workflow("ci.yml")["on"]
    )
    assert publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"}
    assert not any(
        "secrets" in (WORKFLOWS / name).read_text() for name in ("ci.yml", "release.yml")
    )

    def artifact(name, action):
        (step,) = (s for s in steps(name) if s.get("uses", "").startswith(action))
        return step["with"]

    assert artifact("release.yml", "actions/download-artifact") == artifact(
        "ci.yml", "actions/upload-artifact"
    )
    assert not any(step.get("run", "").startswith("make") for step in publish["steps"])


def test_extras_that_the_documents_name_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    named = {
        (name, extra)
        for page in pages
        for name, extras in re.findall(r"(\.|secura-kernels)\[([a-z,]+)\]", page.read_text())
        for extra in extras.split(",")
    }
    assert ("secura-kernels", "peft") in named
    assert {extra for _, extra in named} <= project["optional-dependencies"].keys()
    assert project["name"] == "secura-kernels"
