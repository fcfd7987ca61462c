"""How a program ends, where no other test shows it."""

import subprocess
import sys

from tests.processes import ROOT, environment


def test_names_that_are_not_utf8_can_be_printed():
    """Also where the terminal's encoding is strict, as in most UTF-8 locales."""
    code = "from odc.runtime import launch; launch.run_program(lambda: print('a\\udcffb'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env=environment(PYTHONIOENCODING="utf-8:strict"))
    assert done.returncode == 0 and done.stdout == b"a\\udcffb\n", done.stderr
