"""Measured choices on disk: when a file is read, what makes it unusable, and that none is ever half written."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest

from resnet_fused import fuse, winners
from resnet_fused.winners import Winner, store
from tests.tune_harness import CPU, cpu_name, forget, images, no_winners, shortcut_block

__all__ = ["no_winners"]

MEASURED = Winner("library", "measured: own 0.61 ms, library 0.42 ms")
ROOT = Path(__file__).resolve().parent.parent


def kept(entries=None, device=None):
    return store.save(device or cpu_name(), {"d | p": MEASURED} if entries is None else entries, store.folder())


def test_what_is_saved_is_loaded_at_the_first_decision():
    kept({f"{cpu_name()} | p": MEASURED})
    assert not winners.table()
    fuse(shortcut_block())(images())
    assert winners.table() == ({f"{cpu_name()} | p": MEASURED} if CPU is None else {})


def test_the_switch_and_a_distributed_start_turn_loading_off(monkeypatch):
    kept()
    for name, value in ((winners.SWITCH, "0"), ("WORLD_SIZE", "2")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            winners.ready(cpu_name())
            assert not winners.table()
        forget()
        winners.ready(cpu_name())
        assert winners.table()
        forget()


def test_what_a_process_read_for_itself_is_dropped_once_it_is_one_of_several(monkeypatch):
    kept({f"{cpu_name()} | p": MEASURED})
    winners.ready(cpu_name())
    winners.merge({"cuda: shared | p": MEASURED})
    monkeypatch.setattr(winners, "_joined", lambda: True)
    winners.ready(cpu_name())
    assert set(winners.table()) == {"cuda: shared | p"}


def test_import_reads_no_file(tmp_path):
    kept()
    code = "import resnet_fused; from resnet_fused import winners; assert not winners._tried and not winners._table"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def damage(path: Path, how: str) -> None:
    text = path.read_text()
    held = json.loads(text)
    entry = next(iter(held["winners"].values()))
    if how == "truncated":
        path.write_text(text[: len(text) // 2])
    elif how == "empty":
        path.write_text("")
    elif how == "binary":
        path.write_bytes(b"\x80\x81\xff")
    elif how == "a list":
        path.write_text("[1, 2]")
    elif how == "deep":
        path.write_text("[" * 100_000)
    else:
        if how == "foreign":
            held["format"] = "something else"
        elif how == "schema":
            held["schema"] = store.SCHEMA + 1
        elif how == "version":
            held["identity"]["torch"] = "1.0"
        elif how == "no winners":
            del held["winners"]
        elif how == "a bad choice":
            entry["choice"] = [64, "wide"]
        elif how == "no words":
            del entry["words"]
        path.write_text(json.dumps(held))


DAMAGES = {
    "truncated": "not JSON", "empty": "not JSON", "binary": "not JSON", "a list": "not a file of", "deep": "not JSON",
    "foreign": "not a file of", "schema": "expected schema 1, got 2", "version": "stale: made for torch '1.0', here",
    "no winners": "it has no winners", "a bad choice": "chooses", "no words": "is no winner",
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_a_file_that_cannot_be_used_is_warned_of_once_and_kept_until_it_is_replaced(how):
    path = kept()
    damage(path, how)
    before = path.read_bytes()
    with pytest.warns(UserWarning, match=DAMAGES[how]) as caught:
        winners.ready(cpu_name())
    assert len(caught) == 1 and str(path) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        winners._tried.clear()
        winners.ready(cpu_name())
    assert not winners.table() and path.read_bytes() == before
    kept({"d | q": MEASURED})
    assert store.read(path, cpu_name()) == {"d | q": MEASURED}


def test_a_file_for_other_versions_is_warned_of():
    path = kept()
    with mock.patch.object(store, "identity", lambda device: {"device": device, "torch": "99"}):
        with pytest.warns(UserWarning, match="stale: made for other versions") as caught:
            winners.ready(cpu_name())
        assert str(path) in str(caught[0].message)
        assert kept() != path
    assert path.is_file()


def test_the_identity_holds_versions_and_instruction_set():
    assert set(store.identity("cpu: x")) == {"device", "resnet_fused", "torch", "isa"}
    assert set(store.identity("cuda: x")) == {"device", "resnet_fused", "torch", "triton", "cuda"}
    paths = {store.path_of(device, Path()) for device in ("cpu: x", "cpu: y", "cuda: x", "cuda: x y", "cuda: x/y")}
    assert len(paths) == 5


@pytest.mark.parametrize("crash", ["fsync", "replace"])
def test_a_crash_in_the_middle_of_writing_leaves_the_old_file(crash):
    path = kept()
    before = path.read_bytes()
    with mock.patch.object(os, crash, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        kept({"d | q": MEASURED})
    assert path.read_bytes() == before and sorted(p.name for p in path.parent.iterdir()) == [".lock", path.name]


def write_many(folder: str, start: object, mark: str) -> None:
    start.wait()
    for i in range(20):
        store.save("cpu: x", {f"cpu: x | {mark} {i}": MEASURED}, Path(folder))


def test_two_processes_that_write_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Event()
    writers = [context.Process(target=write_many, args=(str(tmp_path), start, mark)) for mark in "ab"]
    for writer in writers:
        writer.start()
    start.set()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert len(store.load("cpu: x", tmp_path)) == 40


def test_folders_by_argument_variable_and_platform(monkeypatch, tmp_path):
    assert store.folder(tmp_path) == tmp_path
    assert store.folder() == tmp_path / "cache"
    monkeypatch.delenv(store.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.folder() == tmp_path / "xdg" / "resnet_fused"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.folder() == tmp_path / ".cache" / "resnet_fused"


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(store.StoreError, match="file/cache: cannot be written to"):
        store.check_writable(tmp_path / "file" / "cache")
    winners.ready(cpu_name())  # nothing is kept there: no word about it


def test_the_digest_is_of_the_choices():
    table = {"a | p": MEASURED, "b | p": Winner((64, 64), "x")}
    assert store.digest(table) == store.digest(dict(reversed(list(table.items()))))
    assert store.digest(table) == store.digest({**table, "a | p": Winner("library", "other words")})
    for other in ({**table, "a | p": Winner("own", "")}, {**table, "b | p": Winner((64, 32), "")}, {"a | p": MEASURED}):
        assert store.digest(other) != store.digest(table)
