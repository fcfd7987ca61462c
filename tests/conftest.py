"""One thread for every test, and for every process that a test starts; Ctrl-C as in a terminal."""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")
# A script's background jobs ignore SIGINT, those of nohup SIGHUP, and so would all that the tests
# start.
for number, handler in ((signal.SIGINT, signal.default_int_handler),
                        (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from tests.runs import SMALL, run_main  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """150 small images of three classes."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(150):
        colour = np.array([(80, 0, 0), (0, 80, 0), (0, 0, 80)][i % 3])
        pixels = generator.integers(0, 255, (36, 40, 3)) // 3 + colour
        (root / f"class{i % 3}").mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"class{i % 3}" / f"{i:03d}.png")
    return root


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory):
    """The output of a short run on the folder, never interrupted."""
    output = tmp_path_factory.mktemp("finished")
    assert run_main("--data", folder, "--output", output, *SMALL, "--epochs", "2") == 0
    return output
