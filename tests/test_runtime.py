"""What surrounds the kernels: threads, processes, start-up, warm-up, versions.

What must hold in a fresh process, or may end one, runs in a process of its own: a function of this
file, by name.
"""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest
from checks import FLOAT_DTYPES, assert_accurate, assert_same_bits, make_inputs

import fastattn
from fastattn import runtime
from fastattn.plan import plan
from fastattn.problem import check

TIMEOUT = 120
