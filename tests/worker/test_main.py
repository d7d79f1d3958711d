import subprocess
import sys


def test_what_a_rank_prints_is_no_result() -> None:
    script = "import os; from sgld.worker.main import say_on_stderr; say_on_stderr(); print('a'); os.system('echo b')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, sorted(done.stderr.split())) == ("", ["a", "b"])
