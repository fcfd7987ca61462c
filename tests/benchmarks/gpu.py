"""All benchmarks on a GPU by one command, each in a process of its own, with a time limit.

    python -m tests.benchmarks.gpu                      everything
    python -m tests.benchmarks.gpu --only step kmeans   some

The tables of the benchmarks follow each other on the standard output. A benchmark that fails or
takes too long is named, and the next one begins; the exit code is then 1.
"""

import argparse
import subprocess
import sys

import torch

# name: [arguments of python -m tests.benchmarks.NAME]
RUNS = {
    "step": [[]],
    "memory": [[], ["--splits"]],
    "kmeans": [["--large"]],
    "knn": [[]],
    "svm": [[], ["--low-shot"]],
    "input": [[]],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--minutes", type=float, default=10, help="limit of each")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no CUDA device here: nothing measured")
    failed = []
    for name, arguments in ((name, some) for name in args.only for some in RUNS[name]):
        title = " ".join([name, *arguments])
        print(f"\n## {title}", flush=True)
        call = [sys.executable, "-m", f"tests.benchmarks.{name}", "--device", args.device]
        try:
            subprocess.run([*call, *arguments], check=True, timeout=60 * args.minutes)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"no figures: {error}", flush=True)
            failed.append(title)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
