"""The README's links into the code point at the lines that they name, and its commands exist."""

import importlib
import re
import shlex

import pytest

from tests.processes import ROOT

README = (ROOT / "README.md").read_text()
LINKS = re.findall(r"\[`([^`]+)`\]\(([\w./]+)#L(\d+)\)", README)


def test_there_are_links_for_each_equation():
    assert {"# Eq. 1", "# Eq. 2"} <= {text for text, _, _ in LINKS} and len(LINKS) >= 10


@pytest.mark.parametrize("text, path, number", LINKS)
def test_links_point_at_what_they_name(text, path, number):
    line = (ROOT / path).read_text().splitlines()[int(number) - 1]
    assert text in line, f"README: {path}#L{number} is {line.strip()!r}"


TESTS = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]


def test_files_and_tests_that_are_named_exist():
    for path in re.findall(r"`((?:tests|odc)/[\w./]+\.py)`", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(test_\w+)`", README):
        assert any(f"def {name}(" in test for test in TESTS), name


def commands():
    """(script or module, its arguments) of every command with options, wherever it stands."""
    code = [*re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE),
            *re.findall(r"`([^`\n]+)`", README)]
    program = re.compile(r"(?:\b(train|eval_\w+)\.py|-m (odc[.\w]+)|\bodc\.sh) +(--.*)$")
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        if found := program.search(line):
            yield found[1] or found[2] or "train", found[3]


def test_every_command_has_arguments_that_its_script_takes():
    seen = []
    for script, arguments in commands():
        module = importlib.import_module("odc.settings" if script == "train" else script)
        module.make_parser().parse_args(shlex.split(arguments))
        seen.append(script)
    assert seen.count("train") >= 4 and seen.count("eval_linear") >= 6, seen
    assert "odc.assign" in seen, seen


def test_the_two_commands_that_ci_runs_are_there():
    assert "\npip install -r requirements.txt && torchrun --nproc_per_node=2 train.py\n" in README
    assert "\npip install -r tests/requirements.txt && python -m pytest tests\n" in README


def test_imports_run_downwards_as_the_tree_is_drawn():
    """A file imports from lines of the README's tree below its own, or from its own folder."""
    tree = README.split("The tree.")[1].split("```")[1]
    names = re.findall(r"^odc/(\w+)|, (\w+)\.py", tree, re.MULTILINE)
    order = [first or second for first, second in names]
    assert order.index("errors") == len(order) - 1 and order.index("memory") < order.index("model")
    for path in (ROOT / "odc").rglob("*.py"):
        own = path.relative_to(ROOT / "odc").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        code = path.read_text()
        imported = re.findall(r"from odc\.(\w+)[\w.]* import|import odc\.(\w+)", code)
        used = {first or second for first, second in imported}
        for line in re.findall(r"from odc import ([\w, ]+)", code):
            used |= set(line.split(", "))
        for name in used - {own}:
            assert order.index(name) > order.index(own), f"{path.name} imports {name}"
