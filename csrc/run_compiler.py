"""Run a compiler for ninja and keep what it says: ``python run_compiler.py LOG OUTPUT strict|lenient COMMAND...``.

The assembler tells of registers and spills of every kernel; that goes to the log alone. Warnings are shown, and so is
code that was not made as it was meant, which nvcc counts as information even with -Werror; strict, they fail.
"""

import re
import subprocess
import sys
from pathlib import Path

WARNINGS = ("warning", "Potential Performance Loss")
# What `-Xptxas -v` adds: "ptxas info    : ..." and indented lines of properties.
VERBOSE = re.compile(r"^(ptxas info .*|    \d+ bytes stack frame.*)\n", re.MULTILINE)


def main(log: str, output: str, mode: str, *command: str) -> int:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    Path(log).write_bytes(done.stdout)
    text = done.stdout.decode(errors="replace")
    warned = any(word in text for word in WARNINGS)
    if done.returncode or warned:
        print(VERBOSE.sub(_unless_a_warning, text))
    if warned and mode == "strict":
        Path(output).unlink(missing_ok=True)
        return 1
    return done.returncode


def _unless_a_warning(line: re.Match[str]) -> str:
    return line[0] if any(word in line[0] for word in WARNINGS) else ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
