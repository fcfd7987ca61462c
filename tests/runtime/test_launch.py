"""How a program ends and prints, where no other test shows it; what it keeps in log.jsonl."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios

import pytest
import torch

from odc.distributed import print_main
from odc.runtime import arguments, launch, log
from tests.processes import environment

WORK = """
import os, sys
from odc.distributed import print_main
from odc.runtime import launch, log
def main(path):
    bar = log.progress_bar(100000, "work")
    for _ in range(2000):
        print_main("a line")
        print("a warning", file=sys.stderr, flush=True)
        bar.update(50)
    file = open(path, "w")
    sys.stdout.write("still")
    file.write("done")
launch.run_program(main, sys.argv[1])
"""


def test_names_that_are_not_utf8_can_be_printed(monkeypatch, tmp_path):
    """Also where the terminal's encoding is strict, as in most UTF-8 locales."""
    with open(tmp_path / "out", "w", encoding="utf-8", errors="strict") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit):
            launch.run_program(lambda: print("a\udcffb"))
    assert (tmp_path / "out").read_bytes() == b"a\\udcffb\n"


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "2>&1 | true"])
def test_streams_that_fail_end_nothing(tmp_path, streams):
    (tmp_path / "work.py").write_text(WORK)
    command = f"{sys.executable} work.py file {streams}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment(), timeout=60)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "done"


@pytest.mark.parametrize("terminal", ["stdout", "stderr", "both"])
def test_lines_do_not_depend_on_the_other_stream(monkeypatch, tmp_path, terminal):
    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # rows and columns
    for name in ("stdout", "stderr"):
        on_terminal = terminal in (name, "both")
        monkeypatch.setattr(sys, name, open(end if on_terminal else tmp_path / name, "w",
                                            closefd=not on_terminal))
    bar = log.progress_bar(3, "a bar")
    print_main("a line")
    shown = b""
    while select.select([main], [], [], 0.2)[0]:
        shown += os.read(main, 10_000)
    assert b"a line" in (shown if terminal != "stderr" else (tmp_path / "stdout").read_bytes())
    assert (b"a bar" in shown) == (terminal != "stdout")
    bar.close()
    os.close(main)
    os.close(end)


def test_a_notebook_keeps_its_handlers_and_flags():
    def main():
        launch.catch_signals()
        os.kill(os.getpid(), signal.SIGUSR1)
        launch.check_signals()

    before = [signal.getsignal(number) for number in launch.SIGNALS]
    launch.catch_signals()  # what a `main` does that is called as a function
    assert [signal.getsignal(number) for number in launch.SIGNALS] == before
    try:
        for _ in range(2):
            with pytest.raises(SystemExit) as stopped:
                launch.run_program(main)
            assert stopped.value.code == 128 + signal.SIGUSR1
        with pytest.raises(SystemExit) as stopped:
            launch.run_program(launch.check_signals)  # the flag is down
        assert stopped.value.code == 0
    finally:
        for number, handler in zip(launch.SIGNALS, before):
            signal.signal(number, handler)


@pytest.mark.parametrize("error, remedy", [
    (RuntimeError("unable to write to file </torch_12_34>: No space left on device (28)"),
     "--shm-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--shm-size"),
    (RuntimeError("Pin memory thread exited unexpectedly"), "--shm-size"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
     "lower --batch-size")])
def test_too_little_memory(error, remedy, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        launch.run_program(main)
    assert stopped.value.code == 2 and capsys.readouterr().err.count(remedy) == 1


def test_a_log_that_was_cut_and_events_that_fail(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st')
    (cut := log.Log(tmp_path / "log.jsonl", 5)).events = object()  # for TensorBoard
    cut.write(step=2, loss=3.0)
    assert cut.events is None
    assert (tmp_path / "log.jsonl").read_text().splitlines()[-1] == '{"step": 2, "loss": 3.0}'


@pytest.mark.parametrize("inserted", ["", "# a note\n", "{}\n", "[" * 100_000 + "\n", "\xff\n"])
def test_the_log_goes_on_where_the_checkpoint_was(tmp_path, inserted):
    path = tmp_path / "log.jsonl"
    first = log.Log(path)
    for step in range(3):
        first.write(epoch=0, step=step)
    position = first.position()
    first.write(epoch=0, step=3)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], inserted, *lines[1:]]), encoding="latin-1")
    log.Log(path, position).write(epoch=1, step=3)
    records = [log.read_record(line) for line in path.read_bytes().splitlines()]
    assert [(r["epoch"], r["step"]) for r in records if r] == [(0, 0), (0, 1), (0, 2), (1, 3)]


def test_paths_are_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert [arguments.path(text) for text in ("~/pics", ".", "a/../b", "shapes")] == [
        "/home/me/pics", str(tmp_path), str(tmp_path / "b"), "shapes"]
