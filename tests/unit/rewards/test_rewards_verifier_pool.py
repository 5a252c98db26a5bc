r"""The pool: right verdicts in order, whatever a response does to its worker.

No answer is known that keeps a worker busy for long. `STALL` does it to a worker of the test's own,
as other bodies do (`use_worker`); other failures are made from outside, by signals.
"""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_zero.rewards import verifier_pool
from megatron_zero.rewards.verifier_pool import VerifierPool

pytestmark = pytest.mark.processes

BOMB = (r"\boxed{bomb}", ("1",))
STALL = "while True: pass"
GOOD = (r"\boxed{0.5}", ("1/2",))
BAD = (r"\boxed{0.6}", ("1/2",))
ROOT = Path(__file__).parents[3]


@pytest.fixture
def make_pool():
    pools = []

    def make(**changes):
        settings = {"num_workers": 1, "timeout_s": 1.0, "memory_mb": 512, **changes}
        pools.append(VerifierPool(**settings))
        assert outcomes(pools[-1], [GOOD]) == ["correct"]  # started
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def outcomes(pool, items):
    return [graded.outcome for graded in pool.grade(items)]


def is_alive(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_verdicts_keep_the_order_of_the_items(make_pool):
    pool = make_pool(num_workers=2)
    items = [
        (rf"\boxed{{{i}}}", (f"{i}.0",) if i % 3 else (f"{i + 1}", f"{i + 2}")) for i in range(300)
    ]
    expected = ["correct" if i % 3 else "wrong" for i in range(300)]
    items.insert(7, ("nothing", ("1",)))
    expected.insert(7, "unparsable")
    assert outcomes(pool, items) == expected
    assert pool.grade([]) == []
    graded = pool.grade([GOOD, BAD])
    assert [(g.reward, g.correct, g.formatted) for g in graded] == [(1, 1, 1), (0, 0, 1)]


def test_answers_of_one_class_are_those_that_the_verifier_calls_equal(make_pool):
    texts = ["1/2", "3", r"\frac{1}{2}", "0.50", "", r"\{1,2\}", "3", "x", r"\{2,1\}"]
    group = [rf"so \boxed{{{text}}}" for text in texts] + ["none"]
    pool = make_pool(num_workers=2)
    classes = [0, 1, 0, 0, None, 2, 1, 3, 2, None]
    assert pool.answer_classes([group, [], group[::-1], ["none"]]) == [
        classes,
        [],
        [None, 0, 1, 2, 0, None, 3, 3, 2, 3],
        [None],
    ]
    # 50% is both of what it stands between, so all three are one class, whichever comes first
    chain = [rf"\boxed{{{text}}}" for text in ("0.5", "50", r"50\%")]
    assert pool.answer_classes([chain, chain[::-1]]) == [[0, 0, 0], [0, 0, 0]]
    assert pool.answer_classes([chain[:2]]) == [[0, 1]]


def test_an_answer_that_stalls_is_equal_to_nothing(make_pool, use_worker):
    use_worker(STALL)
    pool = make_pool(timeout_s=0.5)
    texts = ["0.5", "bomb", "1/2"]
    assert pool.answer_classes([[rf"\boxed{{{text}}}" for text in texts]]) == [[0, 1, 0]]


def test_answer_tags():
    with VerifierPool(1, 5.0, 512, answer_format="answer_tag") as pool:
        graded = pool.grade(
            [
                ("</think> <answer> 0.5 </answer>", ("1/2",)),
                (r"</think> <answer>\boxed{0.5</answer>", ("1/2",)),
                ("</think>\n<answer>0.5</answer>", ("1/2",)),
            ]
        )
    assert [(g.outcome, g.formatted) for g in graded] == [
        ("correct", True),
        ("unparsable", True),
        ("unparsable", False),
    ]


def test_a_stalled_item_times_out_alone(make_pool, use_worker):
    """More stalls than workers: in the reference everything after them scores 0."""
    use_worker(STALL)
    pool = make_pool(num_workers=2, timeout_s=1.0)
    before = pool.worker_pids
    stalls = [(BOMB[0], (f"{i}",)) for i in range(3)]
    start = time.monotonic()
    assert outcomes(pool, [GOOD, *stalls, GOOD, BAD, (r"\boxed{2/4}", ("1/2",))]) == [
        "correct",
        *["timeout"] * 3,
        "correct",
        "wrong",
        "correct",
    ]
    # 3 stalls on 2 workers: 2 rounds of 1 s and the start of new workers in between
    assert 2.0 <= time.monotonic() - start < 20.0
    assert not any(is_alive(pid) for pid in before)
    graded = pool.grade([stalls[0]])[0]
    assert (graded.reward, graded.correct, graded.formatted) == (0.0, False, True)


def test_two_answers_that_hang_a_naive_checker_cost_the_next_thousand_nothing(make_pool):
    """They are refused by size: two workers for all, and every correct answer rewarded."""
    pool = make_pool(num_workers=2, timeout_s=30.0)
    before = pool.worker_pids
    hanging = [(r"\boxed{9**9**9**9}", r"\frac{1}{2}"), (r"\boxed{(x+1)**200000}", "x+1")]
    graded = pool.grade(hanging + [(rf"\boxed{{{i}/2}}", i / 2) for i in range(1000)])
    assert [g.outcome for g in graded] == ["wrong"] * 2 + ["correct"] * 1000
    assert sum(g.reward for g in graded) == 1000
    assert pool.worker_pids == before


def test_two_answers_that_do_hang_cost_two_replacements(make_pool, use_worker, monkeypatch):
    """Also when they come in the middle of what was written ahead to a worker."""
    use_worker(STALL)
    started = []
    start = verifier_pool._Worker._start
    monkeypatch.setattr(
        verifier_pool._Worker, "_start", lambda self: started.append(self) or start(self)
    )
    pool = make_pool(num_workers=2, timeout_s=1.0)
    items = [(rf"\boxed{{{i}/2}}", i / 2) for i in range(1000)]
    items[5:5] = [(BOMB[0], "1"), (BOMB[0], "2")]
    graded = pool.grade(items)
    assert [g.outcome for g in graded[5:7]] == ["timeout"] * 2
    assert [g.outcome for g in graded[:5] + graded[7:]] == ["correct"] * 1000
    assert len(started) == 2 + 2


def test_several_threads_may_grade_at_once(make_pool):
    pool = make_pool(num_workers=2, timeout_s=30.0)
    with ThreadPoolExecutor(4) as threads:
        batches = [
            [(rf"\boxed{{{i}/3}}", [f"{i + k % 2}/3"]) for i in range(k, k + 60)] for k in range(8)
        ]
        results = list(threads.map(lambda batch: outcomes(pool, batch), batches))
    assert results == [["wrong" if k % 2 else "correct"] * 60 for k in range(8)]


def test_equal_items_are_graded_once(make_pool, use_worker):
    use_worker(STALL)
    pool = make_pool(timeout_s=1.0)
    start = time.monotonic()
    assert outcomes(pool, [BOMB] * 8) == ["timeout"] * 8
    assert time.monotonic() - start < 4.0


def test_hostile_answers_get_an_outcome_and_leave_no_trace(make_pool):
    """Refused by their size, all by one worker; a box that is too long or never closes is none."""
    wrong = ["9**9**9**9", "(x+1)**200000", "9^{9^{9}}", "100000000!", "((10!)!)!"]
    wrong += ["-" * 1900 + "1", "(" * 900 + "1" + ")" * 900, r"\sqrt" * 380 + "2", "$" * 1999]
    wrong += ["{" * 4000 + "1" + "}" * 4000, "é\ud800\x00\n", "\\" * 2000, "1" * 9999]
    unparsable = ["1" * 100_000, "x" * 1_000_000, "{" * 1_000_000, "\\" * 1999]
    pool = make_pool(timeout_s=10.0)
    before = pool.worker_pids
    for answer in wrong + unparsable:
        items = [(rf"\boxed{{{answer}}}", (r"\frac{1}{2}",)), GOOD, BAD]
        expected = "wrong" if answer in wrong else "unparsable"
        assert outcomes(pool, items) == [expected, "correct", "wrong"], answer[:40]
    assert pool.worker_pids == before


def test_responses_of_megabytes(make_pool):
    pool = make_pool(timeout_s=1.0)
    filler = "Wait, { let me check \\boxed{1}. " * 30_000
    items = [(f"{filler}{i} {GOOD[0]}", GOOD[1]) for i in range(8)]
    assert outcomes(pool, items) == ["correct"] * 8
    assert outcomes(pool, [("{" * 5_000_000, ("1",)), GOOD]) == ["unparsable", "correct"]


def test_a_worker_killed_while_idle_is_replaced_and_no_item_pays(make_pool):
    pool = make_pool(num_workers=2)
    assert outcomes(pool, [GOOD, BAD]) == ["correct", "wrong"]
    before = pool.worker_pids
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in before))
    assert outcomes(pool, [GOOD, BAD]) == ["correct", "wrong"]
    assert not set(before) & set(pool.worker_pids)


def test_a_worker_killed_while_it_grades_is_a_crash(make_pool, use_worker):
    use_worker(STALL)
    pool = make_pool(timeout_s=30.0)
    pid = pool.worker_pids[0]
    killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    killer.start()
    assert outcomes(pool, [BOMB, GOOD, BAD]) == ["crash", "correct", "wrong"]
    killer.join()


def test_a_stopped_worker_times_out(make_pool):
    pool = make_pool(timeout_s=1.0)
    os.kill(pool.worker_pids[0], signal.SIGSTOP)
    assert outcomes(pool, [GOOD, BAD]) == ["timeout", "wrong"]


def test_an_interrupted_call_leaves_no_stale_verdict(make_pool, monkeypatch):
    pool = make_pool(timeout_s=30.0)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(verifier_pool._Worker, "_reply", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.grade([(r"\boxed{7}", ("8",))])
    assert outcomes(pool, [BAD, GOOD]) == ["wrong", "correct"]


@pytest.fixture
def use_worker(monkeypatch, tmp_path):
    """Have pools start a worker that runs `body` for the answer "bomb"."""

    def use(body):
        script = tmp_path / "worker.py"
        lines = [
            "import os, sys, time",
            "from megatron_zero.rewards import worker",
            "grade = worker.is_equivalent",
            "hoard = []",
            "def is_equivalent(answer, golds):",
            "    if answer == 'bomb':",
            textwrap.indent(textwrap.dedent(body), " " * 8),
            "    return grade(answer, golds)",
            "worker.is_equivalent = is_equivalent",
            "worker.main(sys.argv[1:])",
        ]
        script.write_text("\n".join(lines))
        command = verifier_pool.worker_command

        def patched(memory_mb):
            return [sys.executable, str(script), *command(memory_mb)[4:]]

        monkeypatch.setattr(verifier_pool, "worker_command", patched)

    return use


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("hoard.append(bytearray(2**30))", "crash"),
        ("while True: hoard.append(bytearray(2**20))", "crash"),
        ("os._exit(0)", "crash"),
        ("raise AttributeError('a defect')", "crash"),
        ("os.kill(os.getpid(), 11)", "crash"),
        ("while True: time.sleep(60)", "timeout"),
        ("while True: pass", "timeout"),
        ("print('correct', flush=True); os.write(1, b'correct\\n'); return False", "wrong"),
    ],
)
def test_what_a_worker_can_do(make_pool, use_worker, body, outcome):
    use_worker(body)
    pool = make_pool(timeout_s=1.0 if outcome == "timeout" else 30.0, memory_mb=256)
    assert outcomes(pool, [GOOD, BOMB, GOOD, BAD]) == ["correct", outcome, "correct", "wrong"]


def test_the_memory_limit_counts_from_the_start(make_pool, use_worker):
    use_worker("hoard.append(bytearray(100 * 2**20))")
    pool = make_pool(timeout_s=5.0, memory_mb=256)
    before = pool.worker_pids
    assert outcomes(pool, [BOMB, GOOD]) == ["wrong", "correct"]
    assert before == pool.worker_pids


def test_workers_that_cannot_start_are_reported(monkeypatch):
    broken = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(verifier_pool, "worker_command", lambda *_: broken)
    pool = VerifierPool(num_workers=1, timeout_s=1.0, memory_mb=64)
    with pool, pytest.raises(RuntimeError, match=r"do not start .*exit status 3.*SystemExit"):
        pool.grade([GOOD])


def test_workers_end_with_the_pool(make_pool):
    pool = make_pool(num_workers=2)
    pids = pool.worker_pids
    assert all(is_alive(pid) for pid in pids)
    pool.close()
    assert not any(is_alive(pid) for pid in pids)
    with pytest.raises(ValueError, match="closed"):
        pool.grade([GOOD])


def test_workers_die_with_their_parent(tmp_path):
    """Killed without a chance to clean up, one worker idle, one in the middle of an item."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, signal
            from megatron_zero.rewards.verifier_pool import VerifierPool
            pool = VerifierPool(num_workers=2, timeout_s=100.0, memory_mb=512)
            pool.grade([({GOOD[0]!r}, ("1/2",)), ({BAD[0]!r}, ("1/2",))])
            print(*pool.worker_pids, flush=True)
            os.kill(pool.worker_pids[0], signal.SIGSTOP)
            pool.grade([({BAD[0]!r}, "7"), ({BAD[0]!r}, "8")])
            """
        )
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        time.sleep(0.3)
        assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
        parent.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_workers_are_light_and_inherit_nothing_of_the_job(make_pool, monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "RANK", "NCCL_DEBUG", "LD_PRELOAD", "SECRET"):
        monkeypatch.setenv(name, "7" if name != "LD_PRELOAD" else "")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    pid = make_pool().worker_pids[0]
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode()
    names = {entry.partition("=")[0] for entry in environment.split("\0") if entry}
    assert names <= {*verifier_pool._PASSED_ON, "PYTHONPATH", "PYTHONHASHSEED"}
    assert not re.search("torch|cuda|vllm|numpy", Path(f"/proc/{pid}/maps").read_text())
    assert os.getsid(pid) == pid  # Ctrl-C in the terminal does not reach it
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, megatron_zero.rewards.worker; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout.split()
    heavy = {"torch", "numpy", "vllm", "megatron", "transformers", "pandas"}
    assert {name.partition(".")[0] for name in loaded} & heavy == set()


@pytest.mark.parametrize(
    "change", [{"num_workers": 0}, {"timeout_s": 0.0}, {"memory_mb": 0}, {"answer_format": "tag"}]
)
def test_settings_out_of_range_are_refused(change):
    settings = {"num_workers": 1, "timeout_s": 1.0, "memory_mb": 64, **change}
    with pytest.raises(ValueError, match=next(iter(change))):
        VerifierPool(**settings)


def test_golds_are_texts_numbers_or_several(make_pool):
    pool = make_pool()
    golds = ["12", 12, 12.0, ["11", 12], ("12",), "1", 1, ["1", 2], []]
    expected = ["correct"] * 5 + ["wrong"] * 4
    assert outcomes(pool, [(r"\boxed{12.00}", gold) for gold in golds]) == expected
    for gold in (None, {"a": 1}, True, [None]):
        with pytest.raises(ValueError, match="gold answer"):
            pool.grade([(r"\boxed{1}", gold)])


def test_a_worker_whose_pool_ends_while_it_starts_says_nothing():
    """A run that is refused meanwhile has its own last words."""
    command = [sys.executable, "-m", "megatron_zero.rewards.worker", str(os.getpid()), "512"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as worker:
        worker.stdout.close()
        assert worker.stderr.read() == b""
    assert worker.returncode == 0
