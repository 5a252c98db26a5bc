"""The verifier beside math-verify: answers per second, and who is right on the test's cases.

    .venv/bin/python benchmarks/verifier_speed.py            # minutes; wants an idle machine
    .venv/bin/python benchmarks/verifier_speed.py --quick    # does it run?

`perturbed` are MATH-500's gold answers with a number, sign or element changed (`PERTURBATIONS` of
tests/unit/rewards), `respelled` the same answers written otherwise; no pair is letter by letter
equal. Each block is a fresh process of one thread that grades all pairs one by one, ours and
math-verify in turn; imports and the first pair are not counted. `per_cpu_s` is answers per second
of the process's CPU time, which a busy machine changes less than `per_s`.

math-verify goes to `benchmarks/.venv-math-verify` at the first run (git-ignored). It is used as in
the paper's reference: `verify(parse(gold), parse(answer))`, both between dollar signs, which keeps
its own time-outs of 5 s. An exception counts as "not equal", as there.

`cases` are the pairs of tests/unit/rewards/equivalence_cases.txt, both ways round. They were
written for this library: that it agrees with them all says less than where the other does not.
`hostile` times each answer of tests/unit/rewards/hostile.py (ours only). `pool` is `VerifierPool`
on respelled and perturbed answers, several times over so that no two items are equal; the best of
three, since the two cores are shared.
"""

import argparse
import importlib.metadata
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the library beside this file, installed or not

DATA = ROOT.parent / "shared" / "data" / "eval" / "math500.parquet"
TARGET = ROOT / "benchmarks" / ".venv-math-verify"
PACKAGES = ["math-verify==0.9.0", "latex2sympy2_extended==1.11.0", "antlr4-python3-runtime==4.13.2"]
SIDES = ("ours", "math_verify")
Pairs = list[tuple[str, str]]


def child(side: str) -> None:
    """Grade the pairs that come on standard input; verdicts and times go to standard output."""
    if side == "ours":
        from megatron_zero.rewards.equivalence import is_equivalent as grade
    else:
        sys.path.insert(0, str(TARGET))
        import math_verify

        def grade(answer: str, gold: str) -> bool:
            try:
                gold_value, value = (math_verify.parse(f"${text}$") for text in (gold, answer))
                return math_verify.verify(gold_value, value)
            except Exception:  # its parser raises what it likes; that is "not equal"
                return False

    pairs = json.load(sys.stdin)
    grade(*pairs[0])
    wall, cpu = time.monotonic(), time.process_time()
    verdicts, seconds = [], []
    for answer, gold in pairs:
        began = time.process_time()
        verdicts.append(bool(grade(answer, gold)))
        seconds.append(time.process_time() - began)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    print(
        json.dumps({"verdicts": verdicts, "wall_s": wall, "cpu_s": cpu, "slowest_s": max(seconds)})
    )


def run(side: str, pairs: Pairs) -> dict[str, Any]:
    """`child` in a process of its own."""
    result = subprocess.run(
        [sys.executable, __file__, "--child", side],
        input=json.dumps(pairs),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
    )
    return json.loads(result.stdout.splitlines()[-1])


def speed(pairs: Pairs, rounds: int, expected: bool) -> dict[str, dict[str, float]]:
    """Both sides in turn; medians of the rounds."""
    blocks: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            blocks[side].append(run(side, pairs))
    return {
        side: {
            "per_cpu_s": round(len(pairs) / statistics.median(b["cpu_s"] for b in found)),
            "per_s": round(len(pairs) / statistics.median(b["wall_s"] for b in found)),
            "slowest_s": round(max(b["slowest_s"] for b in found), 3),
            "right": sum(v is expected for v in found[0]["verdicts"]),
            "of": len(pairs),
        }
        for side, found in blocks.items()
    }


def agreement(cases: list[tuple[str, str, str, bool]]) -> dict[str, Any]:
    """Verdicts on the test's cases in both directions, by kind, and the false positives."""
    both_ways = [case for k, a, b, v in cases for case in ((k, a, b, v), (k, b, a, v))]
    report: dict[str, Any] = {}
    for side in SIDES:
        verdicts = run(side, [(a, b) for _, a, b, _ in both_ways])["verdicts"]
        wrong = [(case, v) for case, v in zip(both_ways, verdicts, strict=True) if v != case[3]]
        kinds = sorted({case[0] for case in cases})
        by_kind = {kind: sum(case[0] == kind for case, _ in wrong) for kind in kinds}
        report[side] = {
            "of": len(both_ways),
            "false_positives": sum(v for _, v in wrong),
            "false_negatives": sum(not v for _, v in wrong),
            "wrong_by_kind": {kind: count for kind, count in by_kind.items() if count},
            "false_positive_pairs": [[case[1], case[2]] for case, v in wrong if v],
        }
    return report


def pool_throughput(pairs: Pairs, repeats: int, workers: tuple[int, ...]) -> dict[str, Any]:
    """Responses per second of wall clock by number of workers, started before."""
    from megatron_zero.rewards.verifier_pool import VerifierPool

    hanging = [(r"\boxed{9**9**9**9}", r"\frac{1}{2}"), (r"\boxed{(x+1)**200000}", "x+1")]
    items = [
        (rf"\boxed{{{answer}}}", [gold, f"no answer {i}"])
        for i in range(repeats)
        for answer, gold in pairs
    ]
    report: dict[str, Any] = {"responses": len(items)}
    for count in workers:
        times, parent = [], []
        with VerifierPool(count, 5.0, 1024) as pool:
            pool.grade([(rf"\boxed{{{i}}}", "1/2") for i in range(100 * count)])
            for batch in (items, hanging + items) * 3:
                began, cpu = time.monotonic(), time.process_time()
                graded = pool.grade(batch)
                times.append(time.monotonic() - began)
                parent.append(time.process_time() - cpu)
            assert {g.outcome for g in graded} == {"correct", "wrong"}
        report[f"{count} workers"] = {
            "per_s": round(len(items) / min(times[::2])),
            "per_s_after_two_hanging": round(len(items) / min(times[1::2])),
            "parent_cpu_us_per_response": round(min(parent) / len(items) * 1e6),
        }
    return report


def hostile_times() -> dict[str, Any]:
    """Every hostile answer against three golds, the last one made of itself."""
    from tests.unit.rewards.hostile import hostile_answers

    with tempfile.TemporaryDirectory() as directory:
        hostile = hostile_answers(f"{directory}/executed")
        golds = (r"\frac{1}{2}", "x+1")
        times = run("ours", [(a, gold) for a in hostile for gold in (*golds, f"{a}+0")])
        executed = bool(os.listdir(directory))
    return {
        "answers": len(hostile),
        "slowest_cpu_s": round(times["slowest_s"], 3),
        "rewarded": sum(v for i, v in enumerate(times["verdicts"]) if i % 3 < 2),
        "executed": executed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few pairs, no results file")
    parser.add_argument("--data", type=Path, default=DATA, help="parquet file with `answer`")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    if not TARGET.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(TARGET)]
        subprocess.run([*pip, *PACKAGES], check=True)
    import pyarrow.parquet

    from tests.unit.rewards.test_rewards_equivalence import PERTURBATIONS, RESPELLINGS
    from tests.unit.rewards.test_rewards_equivalence import cases as all_cases

    shared = runpy.run_path(str(ROOT / "benchmarks" / "rl_step_vs_trl.py"))
    started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    golds = [str(row) for row in pyarrow.parquet.read_table(options.data)["answer"].to_pylist()]
    golds = golds[: 20 if options.quick else None]
    changed = {(p(gold), gold) for gold in golds for p in PERTURBATIONS}
    respelled = {(r(gold), gold) for gold in golds for r in RESPELLINGS}
    pairs = {
        name: sorted(pair for pair in found if pair[0] != pair[1])
        for name, found in (("perturbed", changed), ("respelled", respelled))
    }
    rounds = 1 if options.quick else 3
    load = os.getloadavg()[0]
    report = {
        "started": started,
        "command": " ".join(["verifier_speed.py", *sys.argv[1:]]),
        "commit": shared["git_commit"](),
        "hardware": shared["hardware"](),
        "versions": {"python": sys.version.split()[0]}
        | {name: importlib.metadata.version(name) for name in ("mpmath", "sympy")}
        | dict(package.split("==") for package in PACKAGES),
        "load_before": load,
        "perturbed": speed(pairs["perturbed"], rounds, False),
        "respelled": speed(pairs["respelled"], rounds, True),
        "hostile": hostile_times(),
        "pool": pool_throughput(
            pairs["perturbed"] + pairs["respelled"], 1 if options.quick else 2, (1, 2)
        ),
        "cases": agreement(list(all_cases())[: 100 if options.quick else None]),
    }
    print(json.dumps(report, indent=2, ensure_ascii=False))
    if not options.quick:
        output = ROOT / "benchmarks" / "results" / "verifier_speed.json"
        output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
