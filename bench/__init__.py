"""The bench under pytest: every case, start-up, memory and accuracy; the gate, and the pictures.

What measures a case is `fastattn.bench`, which `fastattn bench` uses too.
"""

from pathlib import Path
from runpy import run_path

# Before anything imports NumPy: its BLAS asks for the number of threads only then. So the file is
# read by its path: to import it is to import the package, and with it NumPy.
run_path(str(Path(__file__).parents[1] / "fastattn" / "bench" / "machine.py"))["limit_threads"]()

LATEST = Path(__file__).parent / "results" / "latest.json"
HISTORY = Path(__file__).parent / "history"
