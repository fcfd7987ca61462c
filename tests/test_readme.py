"""What the READMEs name is there: commands with their arguments, files, functions, tests."""

import importlib
import re
import shlex

import pytest

from tests.processes import ROOT

READMES = {path: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("odc/**/README.md"),
                                               *ROOT.glob("tests/**/README.md")]}
each_readme = pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))


def commands(text):
    """(script or module, its arguments) of every command with options, wherever it stands."""
    code = [*re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE),
            *re.findall(r"`([^`\n]+)`", text)]
    program = re.compile(r"(?:\b(train|eval_\w+)\.py|-m (odc[.\w]+)|\bodc\.sh) +(--.*)$")
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        if (found := program.search(line)) and "--help" not in line:
            yield found[1] or found[2] or "train", found[3]


@each_readme
def test_every_command_has_arguments_that_its_script_takes(path):
    for script, arguments in commands(READMES[path]):
        module = importlib.import_module("odc.settings" if script == "train" else script)
        module.make_parser().parse_args(shlex.split(arguments, comments=True))


def test_the_main_readme_has_commands_for_all_programs_and_those_of_ci():
    text = READMES[ROOT / "README.md"]
    assert {"train", "eval_knn", "eval_linear", "eval_svm", "odc.assign"} == {
        script for script, _ in commands(text)}
    assert "\npip install -r requirements.txt && torchrun --nproc_per_node=2 train.py\n" in text
    assert "\npip install -r tests/requirements.txt && python -m pytest tests\n" in text


@each_readme
def test_files_functions_and_tests_that_are_named_exist(path):
    text = READMES[path]
    for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
        assert (path.parent / link).exists(), link
    for name in re.findall(r"`([\w./]+\.py)`", text):
        assert (path.parent / name).exists() or (ROOT / name).exists(), name
    for name, link in re.findall(r"\[`(\w+)`\]\(([\w./]+\.py)\)", text):
        assert f"def {name}(" in (path.parent / link).read_text(), f"{name} in {link}"
    tests = [file.read_text() for file in (ROOT / "tests").rglob("test_*.py")]
    for name in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {name}(" in test for test in tests), name
