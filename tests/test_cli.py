"""The command line, as it is typed: in processes of its own, but for what stops before work."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from checks import printed

import fastattn
from fastattn.bench.compare import changes
from fastattn.bench.saved import Run
from fastattn.cli import main

HISTORY = Path(__file__).parents[1] / "bench" / "history"
RECORDED = HISTORY / "2026-11-25-emeraldrapids-50ac752.json"


def run(*words, status=0):
    """Return what a command prints."""
    return printed("fastattn", *words, status=status)


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


def test_heatmap(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    weights, picture = tmp_path / "weights.npy", tmp_path / "weights.png"
    np.save(weights, fastattn.attention_weights(np.eye(3), np.eye(3)))
    run("heatmap", weights, "--tokens", "the cat sat", "--output", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "cat" in run("heatmap", weights, "--tokens", "the cat sat")


class Encoder:
    """Attends, with the first of two heads only, to one word; both look mostly at [CLS]."""

    @classmethod
    def from_folder(cls, folder):
        return cls()

    def weights(self, text, layer):
        pieces = ["[CLS]", *text.split(), "[SEP]"]
        weights = np.zeros((2, len(pieces), len(pieces)))
        weights[:, :, 0] = 1
        weights[0, 2] = [0.2, 0.8, 0, 0]
        return pieces, weights


@pytest.mark.parametrize(("head", "darkest"), [((), "0.4"), (("--head", "0"), "0.8")])
def test_heatmap_of_a_text(head, darkest, monkeypatch, capsys):
    """Shaded for what is drawn, and for words: neither for other heads nor for [CLS]."""
    monkeypatch.setattr("fastattn.minilm.SentenceEncoder", Encoder)
    assert main(["heatmap", "--text", "one two", "--model", "folder", *head]) == 0
    *_, lowest = capsys.readouterr().out.splitlines()
    assert lowest.endswith(f" to {darkest}")


# ---------------------------------------------------------------------------
# Bad input: one line that says what was wrong, and status 2
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a run, and with much that is none."""
    folder = tmp_path_factory.mktemp("bad")
    text = RECORDED.read_text()
    (row,) = json.loads(text)["results"][:1]
    files = {
        "run.json": text,
        "torn.json": text[: len(text) // 2],
        "version.json": text.replace('"format": 1', '"format": 2'),
        "machine.json": re.sub('"cpu": "[^"]*"', '"cpu": "another"', text),
        "threads.json": text.replace('"threads": 2', '"threads": 64'),
        "no-machine.json": text.replace('"machine"', '"automaton"'),
        "no-yardstick.json": text.replace('"yardstick"', '"inch"'),
        "negative.json": text.replace(f"[{row['samples']['fastattn'][0]}", "[-1.0"),
        "list.json": "[1, 2]",
        "empty.json": "",
        "runs/of-another-cpu.json": re.sub('"cpu": "[^"]*"', '"cpu": "another"', text),
        "torn-runs/run.json": text[: len(text) // 2],
        "text.npy": "no array",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
        assert name == "run.json" or content != text
    np.save(folder / "w.npy", np.eye(3))
    return folder


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("dcotor", "invalid choice"),
        ("doctor now", "unrecognized arguments"),
        ("compare run.json", "required: NEW"),
        ("compare run.json none.json", "none.json: No such file"),
        ("compare run.json torn.json", "torn.json: torn"),
        ("compare run.json empty.json", "empty.json: torn"),
        ("compare run.json list.json", "must be a run"),
        ("compare run.json version.json", "must be of format 1"),
        ("compare run.json machine.json", "must be of the same machine: got .* another"),
        ("compare run.json threads.json", "must be of the same machine: got .* 64 threads"),
        ("compare run.json no-machine.json", "machine is missing"),
        ("compare run.json no-yardstick.json", r"results\[0\]: yardstick is missing"),
        ("compare run.json negative.json", r"results\[0\]: fastattn must be a number above 0"),
        ("compare run.json run.json --fail-under x", "--fail-under: must be .* above 0: got 'x'"),
        ("gate nowhere", "nowhere: no such folder"),
        ("gate runs", "must hold a run of this CPU"),
        ("gate torn-runs", "torn-runs/run.json: torn"),
        ("bench T99", "no case is named 'T99': the groups are T1"),
        ("bench --list no-case", "no case is named 'no-case'"),
        ("bench --shape 1,2,3", "must be six whole numbers above 0"),
        ("bench --shape 1,a,1,4,4,4", "must be six whole numbers above 0"),
        ("bench --shape 1,1,1,4,0,4", "must be six whole numbers above 0"),
        ("bench --shape 1,8,3,64,64,64", "Hkv must divide Hq: got 3 and 8"),
        ("bench --shape 1,99,99,99999,99999,64", "needs .* GB"),
        ("bench --shape 1,1,1,8,4,4 --causal", "needs a key for each query"),
        ("bench --shape 1,1,1,8,8,4 T1", "a case of its own"),
        ("bench --dtype float16", "describe a --shape"),
        ("bench T10 --threads 0", "--threads: must be a whole number from 1"),
        ("bench T10 --json none/run.json", "none: no such folder"),
        ("bench T10 --json runs", "needs a file"),
        ("bench T10 --keep none", "none: no such folder"),
        ("warmup float33", "dtypes must be float16"),
        ("cache fill", "invalid choice"),
        ("heatmap", "give a FILE"),
        ("heatmap none.npy", "none.npy: No such file"),
        ("heatmap text.npy", "text.npy: torn"),
        ("heatmap w.npy --tokens two~words", "as many tokens as .* got 2 and 3"),
        ("heatmap w.npy --head 0", "--head must be a head"),
        ("heatmap w.npy --head x", "must be all, or a whole number"),
        ("heatmap w.npy --head all", "give an --output"),
        ("heatmap --text words", "needs a --model FOLDER"),
        ("heatmap --text words --model runs", "(runs/model|needs the packages)"),
    ],
)
def test_bad_input(line, says, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    try:
        status = main([word.replace("~", " ") for word in line.split()])
    except SystemExit as end:  # from argparse
        status = end.code
    text, complaint = capsys.readouterr()
    assert (status, text) == (2, "")
    assert re.fullmatch(f"fastattn.*: .*{says}.*\n", complaint), complaint


def test_a_failure_is_the_status_of_the_process():
    assert run("bench", "T99", status=2).count("\n") == 1
