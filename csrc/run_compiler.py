"""Run a compiler for ninja and keep what it says: ``python run_compiler.py LOG OUTPUT strict|lenient COMMAND...``.

The assembler tells of registers and spills of every kernel; that goes to the log alone. Warnings are shown, and so is
code that was not made as it was meant, which nvcc counts as information even with -Werror; strict, they fail.
"""

import subprocess
import sys
from pathlib import Path

SHOWN = ("warning", "Potential Performance Loss")


def main(log: str, output: str, mode: str, *command: str) -> int:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    Path(log).write_bytes(done.stdout)
    text = done.stdout.decode(errors="replace")
    warned = any(word in text for word in SHOWN)
    if done.returncode or warned:
        print(text)
    if warned and mode == "strict":
        Path(output).unlink(missing_ok=True)
        return 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
