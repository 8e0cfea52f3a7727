"""The command line, as it is typed: in processes of its own."""

import json
import subprocess
import sys

import numpy as np
import pytest

import fastattn
from fastattn.bench.compare import changes
from fastattn.bench.saved import Run


def run(*words, status=0):
    """Return what a command prints, and assert the status it ends with."""
    finished = subprocess.run(
        [sys.executable, "-m", "fastattn", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == status, finished.stderr
    return finished.stdout + finished.stderr


COMMANDS = ("doctor", "warmup", "cache", "bench", "compare", "gate", "heatmap")


def test_help():
    text = run("--help")
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_commands(command):
    assert f"usage: fastattn {command}" in run(command, "--help")


def test_version():
    assert fastattn.__version__ in run("--version")


def test_doctor():
    text = run("doctor")
    assert "threading layer" in text
    assert "compiled code" in text


def test_unknown_command():
    assert "invalid choice" in run("dcotor", status=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the file of a run of one small case."""
    path = tmp_path_factory.mktemp("runs") / "run.json"
    run("bench", "--shape", "1,2,2,64,64,16", "--no-peers", "--json", path)
    return path


def test_bench_saves_what_it_measured(saved):
    (row,) = Run.load(saved).speeds.values()
    assert row["seconds"]["fastattn"] > 0
    assert row["speed_over"]["NumPy"] > 0


def slowed(path, factor):
    """Write a copy of a run in which every sample of fastattn took so many times as long."""
    content = json.loads(path.read_text())

    def walk(node):
        if isinstance(node, dict):
            for name, each in node.items():
                if name == "samples":
                    each["fastattn"] = [seconds * factor for seconds in each["fastattn"]]
                walk(each)
        elif isinstance(node, list):
            for each in node:
                walk(each)

    walk(content)
    copy = path.with_name(f"slowed-{factor}.json")
    copy.write_text(json.dumps(content))
    return copy


def test_compare_with_itself(saved):
    (change,) = changes(Run.load(saved), Run.load(saved))
    assert change.ratio == pytest.approx(1)
    assert change.verdict == ""
    run("compare", saved, saved, "--fail-under", "0.95")


def test_compare_sees_half_the_speed(saved):
    (change,) = changes(Run.load(saved), Run.load(slowed(saved, 2)))
    assert change.ratio == pytest.approx(0.5, rel=0.1)
    assert change.verdict == "slower"
    run("compare", saved, slowed(saved, 2), "--fail-under", "0.95", status=1)


def test_compare_of_something_else(tmp_path):
    other = tmp_path / "other.json"
    other.write_text("[1, 2]")
    text = run("compare", other, other, status=2)
    assert "other.json" in text
    assert "Traceback" not in text


def test_heatmap(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    weights, picture = tmp_path / "weights.npy", tmp_path / "weights.png"
    np.save(weights, fastattn.attention_weights(np.eye(3), np.eye(3)))
    run("heatmap", weights, "--tokens", "the cat sat", "--output", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "cat" in run("heatmap", weights, "--tokens", "the cat sat")


def test_heatmap_of_nothing(tmp_path):
    text = run("heatmap", tmp_path / "none.npy", status=2)
    assert "none.npy" in text
    assert "Traceback" not in text
