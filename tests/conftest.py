"""One thread for every test, and for every process that a test starts; Ctrl-C as in a terminal."""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")
# Started in the background of a script, tests would have a SIGINT that is ignored, and so would what they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402

torch.set_num_threads(1)
