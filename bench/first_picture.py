"""How long does a picture take from the shell to the file, on a fresh start?

Each run is a new `sgld generate` process with the model that ships with the package. `--cold` empties the file cache
before each run (Linux, root).

    python bench/first_picture.py --runs 5 [--cold] [--json bench/results/first_picture.json]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

COMMAND = [sys.executable, "-m", "sgld_cli", "generate", "--prompt", "A beautiful sunset over the mountains"]


def drop_file_cache() -> None:
    """Make the kernel forget every file it has in memory.

    :raises PermissionError: needs root.
    """
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def seconds_to_file(folder: Path) -> float:
    """Run the command once and see that there is a picture."""
    start = time.perf_counter()
    result = subprocess.run([*COMMAND, "--output-path", str(folder)], check=True, capture_output=True, text=True)
    elapsed_s = time.perf_counter() - start
    picture = Path(result.stdout.strip())
    assert picture.stat().st_size > 1000, f"{picture} isn't a picture"
    return elapsed_s


def measured(num_runs: int, *, is_cold: bool) -> list[float]:
    """The seconds of each run; with a warm cache one more comes first and isn't counted."""
    with tempfile.TemporaryDirectory() as folder:
        if not is_cold:
            seconds_to_file(Path(folder))
        seconds = []
        for _ in range(num_runs):
            if is_cold:
                drop_file_cache()
            seconds.append(seconds_to_file(Path(folder)))
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seconds = measured(args.runs, is_cold=args.cold)
    report = {
        "question": "seconds from shell to file, " + ("cold" if args.cold else "warm") + " file cache",
        "command": " ".join(["sgld", *COMMAND[3:]]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "runs_s": [round(s, 2) for s in seconds],
        "median_s": round(statistics.median(seconds), 2),
        "max_s": round(max(seconds), 2),
    }
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
