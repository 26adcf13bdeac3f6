"""The manifest and the locks: what survives a stop at any point, and who may be in the folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

import tilewise
from tilewise.pipelines.batch import folder_lock, manifest
from tilewise.pipelines.batch.folder_lock import BusyError, FolderLock


def line(key: str, status: str = "done", **more) -> dict:
    file = {"file": f"{key}.mp4", "bytes": 3, "sha256": "0"} if status == "done" else {"error": "E"}
    return {"manifest": 1, "status": status, **file, "tilewise": "0", "run": {"batch": {"key": key}}, **more}


def put(path, *lines, end="\n"):
    path.write_text("\n".join(json.dumps(one) for one in lines) + end)


def statuses(folder):
    return {key: one["status"] for key, one in manifest.read_manifest(folder).items()}


def test_lines_come_back(tmp_path):
    path = manifest.shard_path(tmp_path, 0, 1)
    assert path == tmp_path / "manifest.jsonl"
    assert manifest.read_manifest(tmp_path) == {}
    for key in "abc":
        manifest.append(path, line(key, prompt="円\n"))
    assert manifest.read_manifest(tmp_path) == {key: line(key, prompt="円\n") for key in "abc"}
    assert path.read_text().count("\n") == 3


@pytest.mark.parametrize("cut", [1, 2, 20, 100])
def test_a_torn_last_line_is_left_out_and_mended(tmp_path, cut):
    path = tmp_path / "manifest.jsonl"
    put(path, line("a"), line("b"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    # Without its newline only, a line is complete; the next one must not be glued to it all the same.
    expected = {"a": "done"} | ({"b": "done"} if cut == 1 else {})
    assert statuses(tmp_path) == expected
    manifest.merge(tmp_path)
    manifest.append(path, line("c"))
    assert statuses(tmp_path) == expected | {"c": "done"}
    assert len(path.read_text().splitlines()) == len(expected) + 1


@pytest.mark.parametrize(
    "damaged",
    ['{"manifest": 1', "[]", "{}", '"text"', '{"manifest": 1, "status": "done", "run": {"batch": {"key": "x"}}}',
     "[" * 100_000, "\x00", "\udcff", json.dumps({**line("x"), "run": None})],
)  # fmt: skip
def test_any_other_damaged_line_is_left_out_said_and_kept_aside(tmp_path, damaged):
    path = tmp_path / "manifest.jsonl"
    piece = damaged.encode(errors="surrogateescape")
    whole = [json.dumps(line(key)).encode() for key in "ab"]
    path.write_bytes(b"\n".join([whole[0], piece, whole[1], b""]))
    told: list[str] = []
    assert set(manifest.read_manifest(tmp_path, told.append)) == set("ab")
    assert len(told) == 1 and told[0].startswith(f"{path}, line 2 is damaged (") and "left out" in told[0]
    manifest.merge(tmp_path, told.append)
    assert "manifest.damaged.txt" in told[1]
    assert (tmp_path / manifest.DAMAGED).read_bytes() == piece + b"\n"
    assert path.read_bytes() == b"\n".join([*whole, b""])
    manifest.merge(tmp_path, told.append)
    assert len(told) == 2


def test_a_line_is_not_glued_to_one_that_was_cut_off(tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(line("a")) + "\n" + json.dumps(line("b"))[:20])
    manifest.append(path, line("c"))
    assert set(manifest.read_manifest(tmp_path)) == set("ac")


def test_a_manifest_of_a_later_format(tmp_path):
    put(tmp_path / "manifest.jsonl", line("a"), {**line("b"), "manifest": 2})
    with pytest.raises(tilewise.ConfigError, match=r"line 2: format 2 is of a later tilewise.*--out"):
        manifest.read_manifest(tmp_path)


def test_the_last_line_counts_but_a_failure_takes_nothing_away(tmp_path):
    path = tmp_path / "manifest.jsonl"
    put(path, line("a", "failed"), line("b"), line("a"), line("b", "failed"), line("c", "failed"), line("c", "failed"))
    assert statuses(tmp_path) == {"a": "done", "b": "done", "c": "failed"}
    manifest.merge(tmp_path)
    assert len(path.read_text().splitlines()) == 3


def test_shards_are_merged(tmp_path):
    put(tmp_path / "manifest.jsonl", line("a"), line("b", "failed"))
    put(manifest.shard_path(tmp_path, 0, 2), line("b"))
    put(manifest.shard_path(tmp_path, 1, 2), line("c"), line("d"), end="")
    manifest.shard_path(tmp_path, 1, 2).write_bytes(manifest.shard_path(tmp_path, 1, 2).read_bytes()[:-9])
    expected = {"a": "done", "b": "done", "c": "done"}
    assert statuses(tmp_path) == expected
    manifest.merge(tmp_path)
    assert statuses(tmp_path) == expected
    assert sorted(os.listdir(tmp_path)) == ["manifest.jsonl"]


def test_a_stop_in_mid_merge_loses_nothing(tmp_path, monkeypatch):
    put(tmp_path / "manifest.jsonl", line("a"))
    put(manifest.shard_path(tmp_path, 0, 2), line("b"))
    monkeypatch.setattr(manifest, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        manifest.merge(tmp_path)
    assert statuses(tmp_path) == {"a": "done", "b": "done"}
    monkeypatch.undo()
    unlink = manifest.Path.unlink

    def stop(path, missing_ok=False):
        if "rank" in path.name:
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(manifest.Path, "unlink", stop)
    with pytest.raises(KeyboardInterrupt):
        manifest.merge(tmp_path)
    monkeypatch.undo()
    assert statuses(tmp_path) == {"a": "done", "b": "done"}


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "manifest.jsonl"
    manifest.append(path, line("a"))
    before = path.read_bytes()
    write = os.write

    def full(handle, data):
        write(handle, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        manifest.append(path, line("b"))
    assert path.read_bytes() == before


def test_a_clip_is_known_by_its_checksum(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"abc")
    told = manifest.done_line(tmp_path / "x.mp4", {"run": {"batch": {"key": "x"}}})
    assert manifest.is_whole(tmp_path, told)
    for content in (b"abd", b"abcd", b""):
        (tmp_path / "x.mp4").write_bytes(content)
        assert not manifest.is_whole(tmp_path, told)
    (tmp_path / "x.mp4").unlink()
    assert not manifest.is_whole(tmp_path, told)


@pytest.mark.parametrize("name", ["../x.mp4", "/etc/hostname", "a/x.mp4", "", None, 5])
def test_a_name_that_leads_out_of_the_folder_is_no_clip(tmp_path, name):
    assert not manifest.is_whole(tmp_path, {"file": name, "bytes": 3, "sha256": "0"})


# --- locks --------------------------------------------------------------------------------------------------------


def test_one_batch_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "GRACE", 0.2)
    first, calls = FolderLock(tmp_path, "one"), []
    first.enter(lambda: calls.append("first"))
    for identity in ("one", "other"):
        with pytest.raises(BusyError, match="another batch is at work"):
            FolderLock(tmp_path, identity).enter(lambda: calls.append("never"))
    first.leave(lambda: calls.append("last"))
    FolderLock(tmp_path, "other").enter(lambda: calls.append("first again"))
    assert calls == ["first", "last", "first again"]


def test_processes_of_one_batch_share_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "GRACE", 0.2)
    calls = []
    locks = [FolderLock(tmp_path, "one", rank, 3) for rank in range(3)]
    for lock in locks:
        lock.enter(lambda: calls.append("first"))
    assert all(lock.others_working() for lock in locks)
    with pytest.raises(BusyError):
        FolderLock(tmp_path, "one", 1, 3).enter(lambda: calls.append("never"))
    with pytest.raises(BusyError):
        FolderLock(tmp_path, "other", 7, 9).enter(lambda: calls.append("never"))
    locks[0].stop_working()
    locks[2].stop_working()
    assert locks[0].others_working()
    assert not locks[1].others_working()
    for lock in locks:
        assert calls == ["first"]
        lock.leave(lambda: calls.append("last"))
    assert calls == ["first", "last"]


def test_a_killed_process_holds_nothing(tmp_path):
    program = textwrap.dedent("""
        import pathlib, sys, time
        from tilewise.pipelines.batch.folder_lock import FolderLock
        FolderLock(pathlib.Path(sys.argv[1]), "one", 1, 2).enter(lambda: None)
        print("in", flush=True)
        time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        lock = FolderLock(tmp_path, "one", 0, 2)
        lock.enter(lambda: pytest.fail("the other is in the folder"))
        assert lock.others_working()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not lock.others_working()
        calls = []
        lock.leave(lambda: calls.append("last"))
        assert calls == ["last"]
    finally:
        process.kill()
