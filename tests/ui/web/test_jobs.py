"""The server's list of jobs, without a browser: order, cancelling, what a restart finds, damaged files, what tabs are told."""

from __future__ import annotations

import json
import threading
import time

import pytest

pytest.importorskip("gradio", reason="the page needs Gradio: pip install -e '.[ui]'")

import gradio as gr

from tilewise.ui.web.common.safety import RefusedError
from tilewise.ui.web.jobs import job_file
from tilewise.ui.web.jobs.job import CANCELLED, DONE, FAILED, INTERRUPTED, RUNNING, WAITING, Job, State
from tilewise.ui.web.jobs.job_file import JobFile
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.tabs.job_view import JobView, job_box, progress
from tilewise.ui.web.tabs.jobs import jobs_html, line_html


def endless(values, job: Job):
    job.keep(begun=True)
    while True:
        job.tell("denoise", 1, 100)
        time.sleep(0.002)


def quick(values, job: Job):
    job.tell("denoise", 1, 2)
    return {"said": values["word"]}


def broken(values, job: Job):
    raise RefusedError("too <large>")


def queue_of(folder=None, waiting: int = 5) -> JobQueue:
    made = JobQueue(waiting, folder)
    for work in (endless, quick, broken):
        made.register(work.__name__, work)
    made.start()
    return made


@pytest.fixture
def job_queue():
    made = queue_of()
    yield made
    made.close()


def until(told) -> None:
    end = time.monotonic() + 10
    while not told():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_jobs_run_one_at_a_time_and_in_order(job_queue):
    running, order = [], []

    def work(values, job: Job):
        running.append(values["n"])
        assert len(running) == 1
        time.sleep(0.01)
        running.remove(values["n"])
        order.append(values["n"])
        return {"n": values["n"]}

    job_queue.register("work", work)
    jobs = [job_queue.submit("work", f"job {n}", {"n": n}) for n in range(4)]
    states = list(job_queue.watch(jobs[3]))
    assert [job.join(5) for job in jobs] == [DONE] * 4
    assert order == [0, 1, 2, 3] == [job.result["n"] for job in jobs]
    assert any(state.ahead for state in states)
    assert job_queue.jobs() == jobs[::-1]


def test_who_watches_is_told_a_few_times_a_second(job_queue):
    """However fast the steps are: each state costs the page tens of milliseconds."""
    job = job_queue.submit("endless", "", {})
    states = job_queue.watch(job)
    began = time.monotonic()
    for _ in range(4):
        assert next(states).phase in ("", "denoise")
    assert time.monotonic() - began > 3 * 0.09
    job_queue.cancel(job.id)
    assert len(list(states)) < 10 and job.status == CANCELLED


def test_cancelling_frees_the_device_whether_at_work_or_waiting():
    job_queue = queue_of(waiting=1)
    first = job_queue.submit("endless", "", {})
    until(lambda: first.status == RUNNING)
    second = job_queue.submit("endless", "", {})
    with pytest.raises(RefusedError, match="1 job already waits"):
        job_queue.submit("quick", "", {})
    assert job_queue.cancel(second.id) and second.status == CANCELLED  # at once, although the device is busy
    assert first.status == RUNNING
    third = job_queue.submit("quick", "", {"word": "next"})
    assert job_queue.cancel(first.id)
    assert (first.join(5), third.join(5), third.result) == (CANCELLED, DONE, {"said": "next"})
    assert not job_queue.cancel(first.id) and not job_queue.cancel("nobody")
    job_queue.close()


def test_who_stops_watching_leaves_the_job_alone(job_queue):
    job = job_queue.submit("endless", "", {})
    watcher = job_queue.watch(job)
    next(watcher)
    watcher.close()
    until(lambda: job.status == RUNNING)
    time.sleep(0.05)
    assert not job.cancelled() and job.status == RUNNING
    job_queue.cancel(job.id)
    assert job.join(5) == CANCELLED


def test_a_failure_is_the_jobs_alone(job_queue):
    job, after = job_queue.submit("broken", "", {}), job_queue.submit("quick", "", {"word": "still"})
    assert (job.join(5), job.error, after.join(5)) == (FAILED, "too <large>", DONE)
    again = job_queue.again(after.id)
    assert again.id != after.id and again.join(5) == DONE
    with pytest.raises(RefusedError, match="has ended"):
        job_queue.again("0" * 12)
    unknown = job_queue.submit("of another version", "", {})
    assert unknown.join(5) == FAILED and "no jobs of the kind" in str(unknown.error)
    assert "too &lt;large&gt;" in jobs_html(job_queue)
    job_queue.clear()
    assert job_queue.jobs() == []


def test_a_restart_finds_the_jobs(tmp_path):
    """The one that ran is interrupted, those that waited run, and those that ended are as they were."""
    first = queue_of(tmp_path)
    done = first.submit("quick", "a prompt", {"word": "é"})
    assert done.join(5) == DONE
    ran = first.submit("endless", "", {})
    until(lambda: ran.result)
    waits = first.submit("quick", "", {"word": "later"})
    told = json.loads((tmp_path / "jobs.json").read_text())
    assert [job["status"] for job in told["jobs"]] == [DONE, RUNNING, WAITING]  # as a kill -9 would leave it
    first.close()
    assert (ran.status, waits.status) == (INTERRUPTED, WAITING)
    (tmp_path / "jobs.json").write_text(json.dumps(told))

    second = queue_of(tmp_path)
    found = {job.id: job for job in second.jobs()}
    assert list(found) == [waits.id, ran.id, done.id] and second.problems == []
    assert (found[done.id].result, found[done.id].title) == ({"said": "é"}, "a prompt")
    assert (found[ran.id].status, found[ran.id].result) == (INTERRUPTED, {"begun": True})
    assert (found[waits.id].join(5), found[waits.id].result) == (DONE, {"said": "later"})
    assert "the server stopped while it ran" in jobs_html(second)
    again = second.again(ran.id)
    until(lambda: again.status == RUNNING)
    second.close()
    assert again.status == INTERRUPTED


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("{", 0), ("[]", 0), ('{"format": 99, "jobs": []}', 0), ("[" * 10**5, 0), ("\udcff", 0),
        ('{"format": 1, "jobs": [3, {"id": "../../etc"}, GOOD]}', 1),
    ],
    ids=["torn", "list", "later format", "deep", "no text", "entries"],
)  # fmt: skip
def test_a_damaged_list_is_put_aside_and_said(tmp_path, text, left):
    job = Job("quick", "kept", {"word": 1})
    job.status = DONE
    text = text.replace("GOOD", json.dumps(job.to_dict()))
    (tmp_path / "jobs.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    job_queue = queue_of(tmp_path)
    assert [each.title for each in job_queue.jobs()] == ["kept"] * left
    assert "kept as jobs.damaged-1.json" in job_queue.problems[0]
    assert "jobs.damaged-1.json" in jobs_html(job_queue) and "a note" in line_html(job_queue)
    assert (tmp_path / "jobs.damaged-1.json").read_bytes() == text.encode("utf-8", "surrogateescape")
    assert job_queue.submit("quick", "", {"word": 2}).join(5) == DONE
    job_queue.close()
    assert len(json.loads((tmp_path / "jobs.json").read_text())["jobs"]) == left + 1


def test_the_list_on_disk_is_bounded_and_two_servers_have_two(tmp_path, monkeypatch):
    monkeypatch.setattr(job_file, "MOST", 3)
    one, two = queue_of(tmp_path), queue_of(tmp_path)
    for n in range(5):
        assert one.submit("quick", "", {"word": n}).join(5) == DONE
    assert [job.values["word"] for job in one.jobs()] == [4, 3, 2]
    monkeypatch.setattr(job_file, "MOST_BYTES", 600)
    one.submit("quick", "", {"word": "x" * 500}).join(5)
    assert len(one.jobs()) == 1
    two.submit("quick", "", {"word": "of the other"}).join(5)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["jobs-2.json", "jobs.json"]
    one.close()
    two.close()
    three = JobFile(tmp_path)
    assert three.path.name == "jobs.json"
    three.close()


def test_a_list_that_cannot_be_written_fails_no_job(tmp_path, monkeypatch):
    job_queue = queue_of(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job_file, "write_text", full)
    assert job_queue.submit("quick", "", {"word": 1}).join(5) == DONE
    assert "No space left" in job_queue.problems[0]
    job_queue.close()


class TestATab:
    """What `JobView` tells a browser tab: [go, stop, status, preview, *outputs]."""

    @pytest.fixture
    def view(self, job_queue):
        def result(job: Job) -> list[str]:
            return [str(job.result.get("said", "nothing"))]

        return {
            kind: JobView(
                job_queue, kind, job_box(kind), lambda: ("title", {"word": "made"}), result, [""], "cancelled; kept"
            )
            for kind in ("quick", "endless", "broken")
        }

    def test_buttons_follow_the_job_and_old_results_leave(self, view, job_queue):
        name, status = view["endless"]._begin()
        assert "starting" in status
        told = view["endless"].follow(name)
        busy = next(told)
        assert (busy[0]["interactive"], busy[1]["interactive"], busy[4]) == (False, True, "")
        other = view["endless"].follow(name)  # of another tab
        next(other)
        view["endless"]._cancel(name)
        for stream in (told, other):
            last = list(stream)[-1]
            assert (last[0]["interactive"], last[1]["interactive"]) == (True, False)
            assert "cancelled; kept" in last[2]
        assert "nothing is running here" in view["endless"]._cancel(name)

    def test_a_job_that_has_ended_is_shown_to_who_comes_later(self, view, job_queue):
        name, _ = view["quick"]._begin()
        assert job_queue.find(name).join(5) == DONE
        [last] = view["quick"].follow(name)
        assert last[2:] == ["", "", "made"]
        name, _ = view["broken"]._begin()
        assert job_queue.find(name).join(5) == FAILED
        assert "too &lt;large&gt;" in next(view["broken"].follow(name))[2]
        for other in ("", "0" * 12, name):  # of another kind, too
            [last] = view["quick"].follow(other)
            assert last[0]["interactive"] and ("no longer" in last[2]) == bool(other)

    def test_a_tab_that_shows_another_job_leaves_the_first_stream(self, view, job_queue):
        class Request:
            session_hash = "one tab"

        endless_one, _ = view["endless"]._begin()
        first = view["endless"]._follow(Request(), endless_one)
        next(first)
        next(view["endless"]._follow(Request(), "0" * 12))
        assert list(first) == [[gr.skip()] * 5]  # what Gradio repeats as the stream ends must change nothing
        job_queue.cancel(endless_one)


def test_progress_in_words():
    assert "waiting: 1 job ahead" in progress(State(ahead=1))
    assert "waiting: 2 jobs ahead" in progress(State(ahead=2))
    words = progress(State(phase="denoise <x>", done=1, total=4, seconds=3.2, phase_seconds=2))
    assert "<b>denoise &lt;x&gt;</b> 1/4 · 3.2 s, about 6.0 s left" in words and 'aria-valuenow="25"' in words
    assert "about 5 min left in all" in progress(State(phase="clip 1 of 9: denoise", done=1, total=4, all_left=300))


def test_threads_do_not_lose_jobs(job_queue):
    def start() -> None:
        for _ in range(5):
            job_queue.submit("quick", "", {"word": 0})

    job_queue.waiting = 100
    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: all(job.status == DONE for job in job_queue.jobs()))
    assert len({job.id for job in job_queue.jobs()}) == 20
