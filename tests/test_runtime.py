"""What surrounds the kernels: threads, processes, start-up, warm-up, versions.

What needs a fresh process, or may end one, is a function of this file that `in_a_process` runs.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest
from checks import (
    FLOAT_DTYPES,
    LAYERS,
    TIMEOUT,
    assert_same_bits,
    in_a_process,
    layouts,
    make_inputs,
    with_layer,
)
from numba.core.dispatcher import Dispatcher
from numpy.testing import assert_allclose

import fastattn
from fastattn import reference, runtime
from fastattn.cores import usable_cores
from fastattn.plan import plan
from fastattn.problem import check

HAS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this platform")

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="threads are moved on Linux only")


def large_inputs(seed=0):
    """Return inputs that are enough work for several threads."""
    return make_inputs(np.random.default_rng(seed), seqlen_q=130, seqlen_kv=130, head_dim=32)


def check_large(seed=0):
    """Call with work for several threads and compare with the reference."""
    inputs = large_inputs(seed)
    assert_allclose(fastattn.attention(*inputs), reference.attention(*inputs), atol=1e-5)


def test_large_inputs_are_for_several_threads():
    assert workers(*large_inputs()) == 2


def workers(query, key, value):
    """Return how many of two threads a call takes."""
    keywords = {"mask": None, "bias": None, "causal": False, "query_offset": None}
    keywords |= {"kv_lengths": None, "scale": None, "layout": "bhld"}
    return plan(check(query, key, value, return_lse=False, out=None, **keywords).frame, 2).workers


# ---------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------


@pytest.fixture
def keep_threads():
    """Put the number of threads back after a test."""
    before = fastattn.get_num_threads()
    yield
    fastattn.set_num_threads(before)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS == 1, reason="Numba has one thread only")
@pytest.mark.usefixtures("keep_threads")
class TestThreads:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    @pytest.mark.parametrize("lengths", [(1, 700), (7, 300), (33, 65), (130, 130), (500, 9)])
    def test_bits_do_not_depend_on_them(self, lengths, dtype, rng):
        inputs = make_inputs(
            rng,
            heads=6,
            kv_heads=2,
            seqlen_q=lengths[0],
            seqlen_kv=lengths[1],
            head_dim=40,
            dtype=dtype,
        )
        results = {}
        for n in (1, 2):
            fastattn.set_num_threads(n)
            results[n] = fastattn.attention(*inputs, causal=True, return_lse=True)
        for one, two in zip(results[1], results[2], strict=True):
            assert_same_bits(two, one)

    def test_number_is_kept(self):
        for n in (1, 2, np.int64(1)):
            fastattn.set_num_threads(n)
            assert fastattn.get_num_threads() == n

    def test_number_is_this_library_s_own(self):
        before = numba.get_num_threads()
        try:
            for mine, theirs in ((1, 2), (2, 1)):
                fastattn.set_num_threads(mine)
                numba.set_num_threads(theirs)
                check_large()
                assert (fastattn.get_num_threads(), numba.get_num_threads()) == (mine, theirs)
        finally:
            numba.set_num_threads(before)


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (1, 4, 16, 32), (6, 3)])
def test_small_work_is_for_one_thread(shape):
    assert workers(*[np.ones(shape)] * 3) == 1


def call_small_only():
    x = np.ones((1, 4, 16, 32), np.float32)
    fastattn.attention(x, x, x)
    with pytest.raises(ValueError, match="not initialized"):
        numba.threading_layer()


def test_small_work_starts_no_threads():
    in_a_process(call_small_only)


def call_from_many_threads(layer):
    """Call at once from Python threads that start together, first calls of the process included."""
    count, calls = 8, 24
    start = threading.Barrier(count)

    def call(n):
        if n < count:
            start.wait()
        check_large(n)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(call, range(calls)))
    assert numba.threading_layer() == layer


@pytest.mark.parametrize("layer", LAYERS)
def test_many_python_threads(layer):
    in_a_process(call_from_many_threads, layer, **with_layer(layer))


# ---------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------


def fork_after_first_use(layer):
    check_large()
    assert numba.threading_layer() == layer
    child = os.fork()
    if child == 0:
        signal.alarm(TIMEOUT // 2)  # a child that hangs would keep the pipes open
        check_large(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, "the child has failed, died or hung"
    check_large(2)


@HAS_FORK
@pytest.mark.parametrize("layer", LAYERS)
def test_fork_after_first_use(layer):
    in_a_process(fork_after_first_use, layer, **with_layer(layer))


def call_in_pool(method):
    check_large()
    with multiprocessing.get_context(method).Pool(2) as pool:
        pool.map_async(check_large, range(4)).get(TIMEOUT / 2)


@pytest.mark.parametrize("method", [pytest.param("fork", marks=HAS_FORK), "spawn"])
def test_multiprocessing(method):
    in_a_process(call_in_pool, method)


# ---------------------------------------------------------------------------
# Start-up and settings
# ---------------------------------------------------------------------------


def test_import_loads_nothing_heavy():
    """Numba takes most of a second to import, and a caller may never call."""
    code = "import sys, numpy; old = {*sys.modules}; import fastattn; print(*{*sys.modules} - old)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert loaded - sys.stdlib_module_names <= {"fastattn", "numpy"}


def spin_after_a_launch(policy):
    before = dict(os.environ)
    fastattn.attention(*large_inputs())  # nothing of NumPy's BLAS, whose threads spin too
    assert dict(os.environ) == before
    assert numba.threading_layer() == "omp"
    begin = time.process_time()
    time.sleep(0.1)
    # GOMP's own default is some ten milliseconds.
    assert (time.process_time() - begin < 0.003) == (policy != "active")


@pytest.mark.parametrize("policy", [None, "active"])
def test_idle_threads_sleep_unless_the_caller_wants_them_awake(policy):
    environment = {"NUMBA_THREADING_LAYER": "omp", "OMP_WAIT_POLICY": policy}
    in_a_process(spin_after_a_launch, policy, **environment)


def affinities():
    """Return the cores that each thread of this process may use."""
    tasks = Path("/proc/self/task").iterdir()
    return {frozenset(os.sched_getaffinity(int(task.name))) for task in tasks}


def cores_after_launches(cores):
    os.sched_setaffinity(0, cores)
    for _ in range(20):
        time.sleep(0.002)  # threads fall asleep, and are woken on any core
        check_large()
    assert affinities() == {frozenset(cores)}


@ON_LINUX
@pytest.mark.parametrize("number", [1, 2])
def test_threads_may_use_the_same_cores_as_before(number):
    cores = set(sorted(os.sched_getaffinity(0))[:number])
    in_a_process(cores_after_launches, cores, NUMBA_NUM_THREADS="2")


def shared_cores():
    query, key, value = make_inputs(
        np.random.default_rng(0), batch=(1,), heads=12, seqlen_q=256, seqlen_kv=256, head_dim=64
    )
    seconds = {}
    for threads in (1, 2):
        fastattn.set_num_threads(threads)
        fastattn.attention(query, key, value)
        samples = []
        for _ in range(30):
            time.sleep(0.003)
            begin = time.perf_counter()
            fastattn.attention(query, key, value)
            samples.append(time.perf_counter() - begin)
        seconds[threads] = sorted(samples)[len(samples) // 4]
    assert seconds[2] < 0.9 * seconds[1], seconds


@ON_LINUX
@pytest.mark.alone
@pytest.mark.skipif(usable_cores() < 2, reason="there is one core only")
def test_woken_threads_have_cores_of_their_own():
    in_a_process(shared_cores, OPENBLAS_NUM_THREADS="1", OMP_WAIT_POLICY=None)


def short_calls_around_a_long_one():
    rng = np.random.default_rng(0)
    short, long = (
        make_inputs(rng, batch=(1,), heads=8, seqlen_q=n, seqlen_kv=n, head_dim=64)
        for n in (64, 4096)
    )

    def seconds():
        samples = timeit.repeat(lambda: fastattn.attention(*short), number=100, repeat=15)
        return sorted(samples)[len(samples) // 4]

    fastattn.attention(*short)
    before = seconds()
    fastattn.attention(*long)
    after = seconds()
    assert after < 1.4 * before, (before, after)


@pytest.mark.alone
def test_a_long_call_leaves_no_threads_that_slow_short_ones():
    in_a_process(short_calls_around_a_long_one, NUMBA_THREADING_LAYER="omp", OMP_WAIT_POLICY=None)


def settings():
    """Return everything that is set for the whole process."""
    numbas = {name: value for name, value in vars(numba.config).items() if name.isupper()}
    return numbas, dict(os.environ), numba.get_num_threads(), np.geterr(), np.get_printoptions()


def use_everything():
    before = settings()
    fastattn.warmup(progress=False)
    fastattn.set_num_threads(1)
    check_large()
    fastattn.show_versions()
    assert settings() == before


def test_no_setting_of_the_process_changes():
    in_a_process(use_everything)


# ---------------------------------------------------------------------------
# Warm-up
# ---------------------------------------------------------------------------


class TestWarmup:
    def test_progress(self, capsys):
        fastattn.warmup(["float32"], progress=True)
        output = capsys.readouterr()
        assert output.err.startswith("\rfastattn: compiling [")
        assert output.err.endswith("] 2/2\n")
        assert output.out == ""

    def test_no_progress(self, capsys):
        fastattn.warmup(["float32"], progress=False)
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize("terminal", [True, False])
    @pytest.mark.parametrize("patience", [0.0, 1e9])
    def test_progress_where_somebody_waits(self, patience, terminal, capsys, monkeypatch):
        monkeypatch.setattr(runtime, "_WARM_UP_AFTER", patience)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        fastattn.warmup(["float32"])
        assert bool(capsys.readouterr().err) == (terminal and patience == 0.0)

    @pytest.mark.parametrize("progress", [True, False, None])
    def test_nothing_to_do(self, progress, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        fastattn.warmup([], progress=progress)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_leaves_nothing_to_compile(self, dtype):
        in_a_process(call_after_warmup, dtype)


def call_after_warmup(dtype):
    """Count what Numba has compiled or loaded, before and after calls of every kind."""
    fastattn.warmup([dtype], progress=False)
    from fastattn.kernels import launch

    def count():
        entries = [each for each in vars(launch).values() if isinstance(each, Dispatcher)]
        return sum(len(each.signatures) for each in entries)

    before = count()
    assert before > 0
    for inputs in (make_inputs(np.random.default_rng(0)), large_inputs()):
        query, key, value = (x.astype(dtype) for x in inputs)
        zeros = np.zeros((query.shape[-2], key.shape[-2]))
        keywords = {"mask": zeros == 0, "bias": zeros, "causal": True, "return_lse": True}
        fastattn.attention(query, key, value, **keywords)
        for change in ("transposed", "sliced", "read_only"):
            fastattn.attention(layouts[change](query), key, value)
    assert count() == before


# ---------------------------------------------------------------------------
# Versions
# ---------------------------------------------------------------------------


def test_show_versions(capsys):
    import llvmlite
    from fastattn.kernels.code_cache import directory
    from fastattn.kernels.host import HOST

    check_large()
    fastattn.show_versions()
    lines = capsys.readouterr().out.splitlines()
    shown = {name.strip(): text.strip() for name, _, text in (x.partition("  ") for x in lines)}
    expected = {
        "fastattn": fastattn.__version__,
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "platform": sys.platform,
        "cpu": HOST.cpu,
        "instruction set": HOST.instruction_set,
        "lanes": f"{HOST.vector_bytes // 4} float32",
        "accumulators": " x ".join(map(str, HOST.wide)),
        "bfloat16": "in pairs" if HOST.pairs_bfloat else "as float32",
        "threading layer": numba.threading_layer(),
        "threads": str(fastattn.get_num_threads()),
        "compiled code": str(directory() or "in memory only"),
    }
    assert shown.keys() == expected.keys()
    for name, text in expected.items():
        assert text.lower() in shown[name].lower()
