"""How processes end: statuses, the last line, and which rank's word torchrun's process repeats."""

import argparse
import json
import signal
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from megatron_zero import failures, torchrun
from megatron_zero.checks import UserError, fail


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*JOB, "RANK", "TORCHELASTIC_ERROR_FILE", failures.TOLD_BY_TORCHRUN):
        monkeypatch.delenv(name, raising=False)


JOB = {"TORCHELASTIC_RUN_ID": "job", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}


def be_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", str(rank))


def status_of(error: Exception) -> int:
    with pytest.raises(SystemExit) as caught, failures.reported():
        raise error
    return int(caught.value.code)


def test_a_mistake_is_one_line_and_a_crash_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as caught, failures.reported():
        fail("data.dataset", "x", "no such file")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: data.dataset='x': no such file\n"
    assert status_of(ValueError("deep down\nmore")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1] == "error: ValueError: deep down"
    assert status_of(KeyError("k")) == 1


def test_ctrl_c_is_said_once(monkeypatch, capsys):
    for spoken in ("ended by SIGINT\n", ""):
        with pytest.raises(SystemExit) as caught, failures.reported():
            raise KeyboardInterrupt
        assert caught.value.code == 130
        assert capsys.readouterr().err == spoken
        be_rank(monkeypatch, 0)  # of a job torchrun says it


@pytest.mark.parametrize(("rank", "spoken"), [(None, "error: no\n"), (0, "error: no\n"), (1, "")])
def test_only_the_first_rank_reports_a_mistake(rank, spoken, monkeypatch, capsys):
    if rank is not None:
        be_rank(monkeypatch, rank)
    for around in (failures.user_errors, failures.reported):
        with pytest.raises(SystemExit) as caught, around():
            raise UserError("no")
        assert caught.value.code == 2
        assert capsys.readouterr().err == spoken


@pytest.mark.parametrize(
    "left_over",
    [{"RANK": "3"}, {"RANK": "x"}, {**JOB, "RANK": "3"}, {"RANK": "1", "WORLD_SIZE": "3"}],
)
def test_a_rank_that_is_left_over_from_something_else_silences_nobody(
    left_over, monkeypatch, capsys
):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    assert status_of(UserError("no")) == 2
    assert capsys.readouterr().err == "error: no\n"
    assert status_of(RuntimeError("no")) == 1
    assert capsys.readouterr().err.endswith("\nerror: RuntimeError: no\n")


def test_every_rank_reports_a_crash(monkeypatch, capsys):
    be_rank(monkeypatch, 1)
    assert status_of(RuntimeError("no")) == 1
    assert "error: rank 1 (" in capsys.readouterr().err.splitlines()[-1]


def test_what_checks_input_takes_any_value_error_for_a_mistake(capsys):
    with pytest.raises(SystemExit) as caught, failures.user_errors():
        raise ValueError("no")
    assert caught.value.code == 2 and capsys.readouterr().err == "error: no\n"
    with pytest.raises(KeyError), failures.user_errors():
        raise KeyError("bug")


class Job:
    """Ranks that failed, with the files that they left, as torchrun's agent has them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, monkeypatch
        self.failures: dict[int, ProcessFailure] = {}

    def rank(self, rank: int, exitcode: int, error: Exception | None = None) -> None:
        file = self.folder / "attempt_0" / str(rank) / "error.json"
        if error is not None:
            with self.patch.context() as patch:
                be_rank(patch, rank)
                patch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
                patch.setenv(failures.TOLD_BY_TORCHRUN, "1")
                status_of(error)
        self.failures[rank] = ProcessFailure(rank, 100 + rank, exitcode, str(file))


@pytest.fixture
def job(tmp_path, monkeypatch) -> Job:
    return Job(tmp_path, monkeypatch)


LOST = RuntimeError("Connection closed by peer")


def test_a_mistake_of_one_rank_is_the_only_word(job, capsys):
    job.rank(0, -signal.SIGTERM, LOST)
    job.rank(1, 2, UserError("data.data_dir='/x': no such folder"))
    job.rank(2, -signal.SIGTERM)
    assert torchrun.report(job.failures) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: data.data_dir='/x': no such folder (found by rank 1 on ")


def test_where_the_jobs_store_ended_first_the_ranks_own_word_is_the_cause(job, capsys):
    job.rank(0, 1, LOST)
    job.rank(1, 2, UserError("data.data_dir='/x': no such folder"))
    args = argparse.Namespace(nnodes="2", rdzv_endpoint="host0:29500")
    gone = RendezvousConnectionError("the connection to the store has failed")
    written = torchrun.written_since(job.folder, 0.0)
    assert torchrun._report_meeting(gone, args, written) == 2
    assert capsys.readouterr().err.startswith("error: data.data_dir='/x': no such folder")
    assert torchrun.written_since(job.folder, time.time() + 1) == []  # of an earlier job
    assert torchrun._report_meeting(gone, args, []) == 1
    assert "2 nodes did not meet at host0:29500, or lost one another" in capsys.readouterr().err


def test_a_mistake_that_all_find_is_told_as_rank_0_found_it(job, capsys):
    job.rank(1, 2, UserError("seen from 1"))
    job.rank(0, 2, UserError("seen from 0"))
    assert torchrun.report(job.failures) == 2
    assert capsys.readouterr().err == "error: seen from 0\n"


def test_of_crashes_the_first_is_told_with_its_traceback(job, capsys):
    job.rank(1, 1, ValueError("deep down"))
    job.rank(0, -signal.SIGTERM, LOST)
    assert torchrun.report(job.failures) == 1
    error = capsys.readouterr().err
    assert error.count("Traceback") == 1 and "ValueError: deep down\n" in error
    assert "afterwards rank 0 on " in error
    last = error.splitlines()[-1]
    assert last.startswith("error: rank 1 on ") and last.endswith(": ValueError: deep down")


def test_a_rank_that_was_killed_is_the_cause(job, capsys):
    job.rank(0, 1, LOST)
    job.rank(1, -signal.SIGKILL)
    assert torchrun.report(job.failures) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: rank 1 was ended by SIGKILL (out of memory?)"


def test_a_rank_that_torchrun_had_to_kill_is_not(job, capsys, monkeypatch):
    job.rank(0, 1, RuntimeError("the cause"))
    job.rank(1, -signal.SIGKILL)
    later = time.time() + 30
    monkeypatch.setattr(torchrun.time, "time", lambda: later)
    assert torchrun.report(job.failures) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("RuntimeError: the cause")


@pytest.mark.parametrize(("exitcode", "status"), [(1, 1), (2, 2), (3, 1)])
def test_ranks_that_left_no_word(exitcode, status, job, capsys):
    job.rank(0, exitcode)
    assert torchrun.report(job.failures) == status
    assert capsys.readouterr().err == f"error: rank 0 ended with status {exitcode}\n"


def test_torchs_own_torchrun_has_the_sentence_in_its_box(job):
    job.rank(0, -signal.SIGTERM, LOST)
    job.rank(1, 2, UserError("data.data_dir='/x': no such folder"))
    text = str(ChildFailedError("train", job.failures))
    assert "traceback : error: data.data_dir='/x': no such folder" in text


def test_a_file_that_is_not_ours_is_no_word():
    assert failures.written_failure({"message": "<NONE>"}) is None
    assert failures.written_failure(json.loads('{"message": {"message": "x"}}')) is None
