"""What the solves of a refit cost, and what float32 factors do to the fitted weights.

OMP_NUM_THREADS=2 python eval/benchmarks/solves.py

A writer of random activations: correlated, with a decaying spectrum and some channels a thousand
times as large as the others, rounded to bfloat16 as in a run. It keeps three quarters of its inputs
and is fitted on them, in three ways: as once, every ridge tried with a float64 factor on all
outputs; as now in float64; and as now in float32 with refinement. FLOPs are counted as torch
calls the routines; those of a layer of a 7B follow from formulas that are held against the counts.
"""

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import as_json, command, hardware, place, surroundings, table, write
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sp3llm.maths.refit import (
    Gram,
    add_gram_,
    add_to_gram,
    empty_gram,
    restricted,
    ridge_solution,
    squared_error,
    sum_grams,
)
from sp3llm.maths.ridge import RIDGES, ridge_errors, ridge_fit, search_ridge
from sp3llm.maths.unit_selection import select_units

# Tokens an input, of which one in eight is held back; the ridge that units are chosen with.
TOKENS, HELD_BACK, CHOICE_RIDGE = 8, 8, 1e-4
HUGE_CHANNELS, HUGE = 4, 1000.0
NOISE, PRIOR_OFF = 0.02, 1.0
# Of Llama-2-7B at 75 % of its parameters: width, and FFN neurons.
WIDTH, FFN, KEPT_WIDTH, KEPT_FFN, LAYERS = 4096, 11008, 3584, 8448, 32
# What `ridge_errors` combines outputs to, and how many ridges a layer tries that begins where the
# one before it ended.
SKETCH, PROBES, TRIED = 128, 8, 3
ROUNDS = 16


# --------------------------------------------------------------------------- counting


Flops = dict[str, float]


class Counter(TorchDispatchMode):
    """FLOPs of products and factorisations by dtype, a multiplication and an addition each one."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Flops = defaultdict(float)
        self.solved: dict[int, int] = defaultdict(int)
        """How often a factor was solved with, by the number of right sides."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        count = _COUNTS.get(name)
        if name == "linalg_solve_triangular" and not kwargs.get("upper"):
            self.solved[args[1].shape[1]] += 1
        if count is not None:
            dtype = next(arg.dtype for arg in args if isinstance(arg, Tensor))
            self.flops[str(dtype).removeprefix("torch.")] += count(*args)
        return func(*args, **(kwargs or {}))


def _product(a: Tensor, b: Tensor) -> float:
    return 2.0 * math.prod(a.shape) * b.shape[-1]


_COUNTS: dict[str, Callable[..., float]] = {
    "mm": _product,
    "bmm": _product,
    "addmm": lambda _, a, b, **__: _product(a, b),
    "addmm_": lambda _, a, b, **__: _product(a, b),
    "linalg_cholesky_ex": lambda a, *_, **__: cholesky(len(a)),
    "cholesky_inverse": lambda a, *_, **__: 2 * cholesky(len(a)),
    "linalg_solve_triangular": lambda a, b, **__: 1.0 * len(a) * b.numel(),
    "cholesky_solve": lambda b, a, *_, **__: 2.0 * len(a) * b.numel(),
    "_cholesky_solve_helper": lambda b, a, *_, **__: 2.0 * len(a) * b.numel(),
}


# --------------------------------------------------------------------------- formulas


def cholesky(size: int) -> float:
    """FLOPs of a factor."""
    return size**3 / 3


def choice_flops(inputs: int, outputs: int, keep: int) -> float:
    """Of `select_units`, one neuron a unit."""
    flops = 3 * cholesky(inputs) + 2 * inputs**2 * outputs
    a_round = max(1, (inputs - keep) // ROUNDS)
    for left in range(inputs, keep, -a_round):
        gone = min(left - keep, a_round)
        flops += cholesky(gone) + 2 * gone**2 * (outputs + inputs)
        flops += 2 * inputs * gone * (outputs + inputs)
    return flops


def fit_flops_before(inputs: int, outputs: int) -> Flops:
    """Eight ridges, each with a factor, all outputs and their error; the prior's error; the last
    solution.
    """
    all_outputs = 2 * inputs**2 * outputs
    tries = len(RIDGES) * (cholesky(inputs) + 2 * all_outputs)
    return {"float64": tries + cholesky(inputs) + 2 * all_outputs}


def fit_flops_now(inputs: int, outputs: int, tried: int, refined: tuple[int, int] | None) -> Flops:
    """`tried` ridges on combinations of the outputs, in calls of `ridge_errors` of three; the
    prior's error; the last solution. `refined`: in float32, and how often solutions were refined,
    those of combinations and the last one; None: in float64.
    """
    few, probes = min(SKETCH, outputs), min(PROBES, outputs)
    combined, some = 2 * inputs**2 * few, 2 * inputs**2 * probes
    all_outputs = 2 * inputs**2 * outputs
    calls = math.ceil(tried / 3)
    sketches = calls * (3 * 2 * inputs * outputs * few + combined)
    factors, once = (tried + 1) * cholesky(inputs), tried * combined + all_outputs
    errors = tried * combined + all_outputs
    if refined is None:
        return {"float64": sketches + factors + once + errors}
    again = refined[0] * combined + refined[1] * all_outputs
    # What is left of the equation is looked at before and after.
    looks = (tried + 1 + sum(refined)) * some
    return {"float64": sketches + looks + again + errors, "float32": factors + once + again}


def of_layer(fit: Callable[[int, int], Flops], choice: str) -> Flops:
    """Of a layer of the 7B: two maps of readers, the writer of attention, that of the FFN."""
    fits = [(KEPT_WIDTH, WIDTH), (KEPT_WIDTH, WIDTH), (WIDTH, KEPT_WIDTH), (KEPT_FFN, KEPT_WIDTH)]
    total: Flops = defaultdict(float)
    total[choice] += choice_flops(FFN, KEPT_WIDTH, KEPT_FFN)
    for inputs, outputs in fits:
        for dtype, flops in fit(inputs, outputs).items():
            total[dtype] += flops
    return dict(total)


# --------------------------------------------------------------------------- what is fitted


def grams(inputs: int, outputs: int, seed: int) -> tuple[tuple[Gram, Gram], Tensor]:
    """Grams to fit and held back of a writer's inputs and targets, and its prior."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # Directions of falling energy, turned into channels by four reflections.
    energy_P = torch.arange(1, inputs + 1).float().rsqrt()
    mirrors = [normal(inputs) for _ in range(4)]
    size_P = torch.ones(inputs)
    size_P[torch.randperm(inputs, generator=generator)[:HUGE_CHANNELS]] = HUGE
    weight_PQ = normal(inputs, outputs) / math.sqrt(inputs) / size_P[:, None]
    pair = empty_gram(inputs, outputs, "cpu"), empty_gram(inputs, outputs, "cpu")
    blocks = TOKENS * inputs // 2048
    for block in range(blocks):
        a_NP = normal(2048, inputs) * energy_P
        for mirror_P in mirrors:
            unit_P = mirror_P / mirror_P.norm()
            a_NP -= 2 * (a_NP @ unit_P)[:, None] * unit_P
        a_NP = (a_NP * size_P).bfloat16()
        y_NQ = a_NP.float() @ weight_PQ
        y_NQ += NOISE * y_NQ.std() * normal(*y_NQ.shape)
        add_to_gram(pair[block % HELD_BACK == 0], a_NP, y_NQ)
    prior_PQ = weight_PQ + PRIOR_OFF * weight_PQ * normal(inputs, outputs)
    return pair, prior_PQ.double()


@dataclass(frozen=True)
class Way:
    """How a writer is chosen for and fitted."""

    name: str
    dtype: torch.dtype
    before: bool = False
    """Every ridge on all outputs."""
    start: float | None = None
    """Where the search for a ridge begins; None: nothing is known."""


@dataclass(frozen=True)
class Outcome:
    """What a way came to."""

    kept_P: Tensor
    solution_PQ: Tensor
    ridge: float
    tried: int
    refined: tuple[int, int]
    seconds: dict[str, float]
    flops: dict[str, Flops]


def go(way: Way, pair: tuple[Gram, Gram], prior_PQ: Tensor, keep: int) -> Outcome:
    """Choose and fit. `pair` stays as it is."""
    seconds = {}
    both = sum_grams(*pair)
    began = time.perf_counter()
    with Counter() as choice:
        kept_P = select_units(both, prior_PQ, keep, 1, "obs", CHOICE_RIDGE, way.dtype)
    seconds["choice"] = time.perf_counter() - began
    fitting, held_back = (restricted(gram, kept_P) for gram in pair)
    prior_KQ = prior_PQ[kept_P]
    began = time.perf_counter()
    with Counter() as fitted:
        if way.before:
            errors = {math.inf: squared_error(held_back, prior_KQ, None)}
            for ridge in RIDGES:
                solution_KQ, _, used = ridge_solution(fitting, prior_KQ, ridge, False)
                errors[used] = squared_error(held_back, solution_KQ, None)
            best, tried = min(errors, key=errors.get), len(RIDGES)
            solution_KQ, _, _ = ridge_solution(add_gram_(fitting, held_back), prior_KQ, best, False)
        else:
            found = search_ridge(
                lambda some: ridge_errors(fitting, held_back, prior_KQ, None, some, way.dtype),
                way.start,
            )
            fit = ridge_fit(fitting, held_back, prior_KQ, None, found, way.dtype)
            best, tried, solution_KQ = fit.ridge, len(found), fit.solution_PQ
    seconds["fit"] = time.perf_counter() - began
    outputs, flops = prior_PQ.shape[1], {"choice": dict(choice.flops), "fit": dict(fitted.flops)}
    refined = (fitted.solved[SKETCH] - tried, fitted.solved[outputs] - 1)
    return Outcome(kept_P, solution_KQ, best, tried, refined, seconds, flops)


def contest(inputs: int, outputs: int, repeats: int) -> list[dict[str, Any]]:
    """All ways at a shape; errors are against the same inputs kept, the same ridge, in float64."""
    pair, prior_PQ = grams(inputs, outputs, inputs)
    keep, rows, reference = 3 * inputs // 4, [], None
    ways = [Way("before: eight ridges", torch.float64, before=True)]
    for dtype in (torch.float64, torch.float32):
        name = str(dtype).removeprefix("torch.")
        ways += [Way(f"now, {name}, first layer", dtype), Way(f"now, {name}", dtype, start=0.0)]
    for way in ways:
        if way.start is not None:
            way = Way(way.name, way.dtype, start=rows[-1]["ridge"])
        outcomes = [go(way, pair, prior_PQ, keep) for _ in range(repeats)]
        outcome = outcomes[0]
        reference = reference or outcome
        exact_KQ, _, _ = ridge_solution(
            restricted(sum_grams(*pair), outcome.kept_P),
            prior_PQ[outcome.kept_P],
            outcome.ridge,
            False,
        )
        off = (outcome.solution_PQ - exact_KQ).norm() / exact_KQ.norm()
        rounded = (exact_KQ.bfloat16().double() - exact_KQ).norm() / exact_KQ.norm()
        chosen = len(set(outcome.kept_P.tolist()) & set(reference.kept_P.tolist()))
        rows.append(
            {
                "way": way.name,
                "inputs": inputs,
                "outputs": outputs,
                "keep": keep,
                "ridge": outcome.ridge,
                "ridges_tried": outcome.tried,
                "refined": outcome.refined,
                "error": off.item(),
                "bfloat16_error": rounded.item(),
                "chosen_alike": chosen / keep,
                "seconds": {
                    part: min(one.seconds[part] for one in outcomes) for part in outcome.seconds
                },
                "flops": outcome.flops,
            }
        )
        print(rows[-1], flush=True)
    return rows


def by_ridge(inputs: int, outputs: int) -> list[dict[str, Any]]:
    """Errors of float32 solutions against float64 ones, nothing left out, at every ridge."""
    pair, prior_PQ = grams(inputs, outputs, inputs)
    both, rows = sum_grams(*pair), []
    for ridge in RIDGES:
        exact_PQ, _, _ = ridge_solution(both, prior_PQ, ridge, False)
        with Counter() as counter:
            found_PQ, _, _ = ridge_solution(both, prior_PQ, ridge, False, torch.float32)
        rows.append(
            {
                "ridge": ridge,
                "error": ((found_PQ - exact_PQ).norm() / exact_PQ.norm()).item(),
                "solves": counter.solved[outputs],
                "float64_factor": found_PQ.equal(exact_PQ),
            }
        )
    return rows


def check_formulas(rows: list[dict[str, Any]]) -> float:
    """The largest relative difference between the formulas and what was counted."""
    worst = 0.0
    for row in rows:
        inputs, outputs, keep = row["inputs"], row["outputs"], row["keep"]
        low = "float32" in row["way"]
        fit = fit_flops_now(keep, outputs, row["ridges_tried"], row["refined"] if low else None)
        fit = fit_flops_before(keep, outputs) if "before" in row["way"] else fit
        choice = {"float32" if low else "float64": choice_flops(inputs, outputs, keep)}
        for said, found in ((choice, row["flops"]["choice"]), (fit, row["flops"]["fit"])):
            for dtype in said:
                worst = max(worst, abs(said[dtype] / found[dtype] - 1))
    return worst


# --------------------------------------------------------------------------- words


def shapes_table(rows: list[dict[str, Any]]) -> str:
    head = ["writer", "way", "choice, s", "fit, s", "float64, GFLOP", "float32, GFLOP"]
    head += ["ridges tried", "error of the weights", "chosen as before"]
    body = []
    for row in rows:
        work: Flops = defaultdict(float)
        for part in row["flops"].values():
            for dtype, flops in part.items():
                work[dtype] += flops / 1e9
        body.append(
            [
                f"{row['inputs']} x {row['outputs']}",
                row["way"],
                f"{row['seconds']['choice']:.2f}",
                f"{row['seconds']['fit']:.2f}",
                f"{work['float64']:.0f}",
                f"{work['float32']:.0f}",
                str(row["ridges_tried"]),
                f"{row['error']:.0e}" if row["error"] else "0",
                f"{100 * row['chosen_alike']:.1f} %",
            ]
        )
    return table(head, body)


def layer_rows() -> list[dict[str, Any]]:
    """FLOPs of a layer of the 7B, by way and dtype."""
    ways = {
        "before: eight ridges": of_layer(fit_flops_before, "float64"),
        "now, float64": of_layer(lambda p, q: fit_flops_now(p, q, TRIED, None), "float64"),
        "now, float32": of_layer(lambda p, q: fit_flops_now(p, q, TRIED, (0, 0)), "float32"),
        "now, float32, each refined once": of_layer(
            lambda p, q: fit_flops_now(p, q, TRIED, (TRIED, 1)), "float32"
        ),
    }
    return [{"way": name, "flops": flops} for name, flops in ways.items()]


def ridges_table(rows: list[dict[str, Any]]) -> str:
    head = ["ridge", "error of the weights", "factor", "refined"]
    body = [
        [
            f"{row['ridge']:.0e}",
            f"{row['error']:.0e}" if row["error"] else "0",
            "float64" if row["float64_factor"] else "float32",
            "not enough" if row["float64_factor"] else f"{row['solves'] - 1} times",
        ]
        for row in rows
    ]
    return table(head, body)


def page(record: dict[str, Any]) -> str:
    rows, layer = record["writers"], record["layer_of_7b"]

    def tera(row: dict[str, Any], dtype: str, times: int = 1) -> str:
        return f"{times * row['flops'].get(dtype, 0.0) / 1e12:.1f}"

    head = ["way", "float64, TFLOP", "float32, TFLOP", "all 32 layers, float64", "float32"]
    body = [
        [
            row["way"],
            *(tera(row, dtype) for dtype in ("float64", "float32")),
            *(tera(row, dtype, LAYERS) for dtype in ("float64", "float32")),
        ]
        for row in layer
    ]
    return f"""# What the solves of a refit cost

A writer keeps three quarters of its inputs and is fitted on them ({TOKENS} tokens an input, one in
{HELD_BACK} held back; {HUGE_CHANNELS} channels {HUGE:g} times as large as the others; tokens in
bfloat16), {hardware(record["machine"])}, nothing beside it. "First layer": nothing is known of the
ridge; else the search begins where it ended. The error is that of the fitted weights against a
float64 solution with the same ridge and inputs; rounding them to bfloat16, in which they are
written, costs {rows[0]["bfloat16_error"]:.0e}.

    {command(__file__)}

{shapes_table(rows)}

The first of these writers with all its inputs, by a float32 factor, at every ridge (relative to
each input's own mean square, in all of this page):

{ridges_table(record["by_ridge"])}

A layer of Llama-2-7B at 75 % ({WIDTH} to {KEPT_WIDTH}, FFN {FFN} to {KEPT_FFN}): two maps of
readers, two writers and the choice among the FFN's neurons, {TRIED} ridges tried, by formulas
that are within {100 * record["formulas_off"]:.1f} % of what was counted above:

{table(head, body)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=["2048x1024", "4096x1024"])
    parser.add_argument("--name", default="solves")
    parser.add_argument("--repeats", type=int, default=2, help="the fastest counts")
    options = parser.parse_args()
    contest(256, 192, 1)  # what is loaded and begun once
    rows = []
    for shape in options.shapes:
        rows += contest(*map(int, shape.split("x")), options.repeats)
    about = surroundings("cpu", threads=str(torch.get_num_threads()))
    about["formulas_off"] = check_formulas(rows)
    record = {
        "command": command(__file__),
        **about,
        "writers": rows,
        "by_ridge": by_ridge(*map(int, options.shapes[0].split("x"))),
        "layer_of_7b": layer_rows(),
    }
    write(place(options.name), md=page(record), json=as_json(record))
    print(place(options.name).with_suffix(".md"))


if __name__ == "__main__":
    main()
