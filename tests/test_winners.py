"""The table of measured choices: who looks it up, what goes before it, and what a file may hold."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from resnet_fused import fuse, plan, projection, winners
from resnet_fused.calls import SiteCall
from resnet_fused.eager_blocks import BasicBlock
from resnet_fused.kernels import target, tiles
from resnet_fused.plan import ConvShape, Variant
from resnet_fused.winners import Winner, store
from tests.harness import hold_to_law, randomise
from tests.test_projected import called

HALF = torch.bfloat16
DEVICE = "cuda: a GPU"
SHAPE = ConvShape(32, 64, 56, 56, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, HALF, False, 0, DEVICE)
CPU = projection.unavailable(torch.device("cpu"), torch.float32)
needs_ops = pytest.mark.skipif(CPU is not None, reason=f"the projection ops cannot run: {CPU}")
MEASURED = Winner("library", "measured: own 0.61 ms, library 0.42 ms")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_winners(monkeypatch, tmp_path):
    """An empty table, no file looked for, and a folder of our own."""
    monkeypatch.setattr(plan, "_refused", {})
    monkeypatch.setattr(winners, "_tried", set())
    monkeypatch.setattr(winners, "_own", set())
    monkeypatch.setattr(store, "_warned", set())
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(winners.SWITCH, raising=False)
    winners._set({})
    yield
    winners._set({})


def cpu_name():
    return winners.device_name(torch.device("cpu"))


def shortcut_block():
    torch.manual_seed(0)
    return randomise(BasicBlock(12, 8, 2, nn.Sequential(nn.Conv2d(12, 8, 1, 2, bias=False), nn.BatchNorm2d(8))))


def shortcut_key(x, threads=None):
    call = SiteCall("cpu", (2, 2), (0, 0), (1, 1), 1, False, True, 0.1, 1e-5, projection=True)
    return plan.problem_key(plan.shape_of_call(call, x, torch.empty(8, 12, 1, 1)), "cpu")


def images():
    return torch.randn(2, 12, 7, 9).contiguous(memory_format=torch.channels_last)


def test_a_winner_goes_before_the_rules_and_says_so():
    assert plan.choose(SHAPE).name == "own"
    winners.merge({plan.problem_key(SHAPE, "triton"): MEASURED})
    assert plan.choose(SHAPE) == Variant("library", MEASURED.words)
    slow = dataclasses.replace(SHAPE, dtype=torch.float32)
    winners.merge({plan.problem_key(slow, "triton"): Winner("own", "measured")})
    assert plan.choose(slow) == Variant("own", "measured")


def test_what_cannot_run_and_force_go_before_a_winner():
    grouped = dataclasses.replace(SHAPE, groups=4)
    winners.merge({plan.problem_key(s, "triton"): Winner("own", "measured") for s in (SHAPE, grouped)})
    assert plan.choose(grouped) == Variant("library", "4 groups")
    with plan.force("library"):
        assert plan.choose(SHAPE) == Variant("library", "forced")
    plan.refuse(SHAPE, "too much shared memory")
    assert plan.choose(SHAPE) == Variant("library", "too much shared memory")


CHANGES = {
    "n": 31, "c": 32, "h": 55, "w": 55, "k": 32, "filter": (1, 1), "stride": (2, 2), "padding": (0, 0),
    "dilation": (2, 2), "groups": 2, "dtype": torch.float16, "tf32": True, "projection": 1, "device": "cuda: another",
}  # fmt: skip


def test_every_field_of_a_shape_is_in_its_key():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(ConvShape)}
    keys = {plan.problem_key(dataclasses.replace(SHAPE, **{name: value}), "triton") for name, value in CHANGES.items()}
    keys |= {plan.problem_key(dataclasses.replace(SHAPE, projection=2), "triton"), plan.problem_key(SHAPE, "cpu")}
    assert len(keys | {plan.problem_key(SHAPE, "triton")}) == len(CHANGES) + 3


def test_threads_are_in_the_key_of_a_cpu():
    x = images()
    torch.set_num_threads(1)
    one = shortcut_key(x)
    torch.set_num_threads(2)
    assert shortcut_key(x) != one


def test_every_field_of_a_product_is_in_the_key_of_its_tile():
    problem, sm_90 = tiles.Problem("fwd", 6272, 64, 64, 9, HALF), target.named("sm_90")
    changes = {"kind": "dgrad", "rows": 1, "cols": 1, "depth": 1, "taps": 1, "dtype": torch.half, "loads": 2}
    changes["exact"] = True
    assert set(changes) == {field.name for field in dataclasses.fields(tiles.Problem)}
    keys = {tiles.problem_key(dataclasses.replace(problem, **{n: v}), sm_90) for n, v in changes.items()}
    keys |= {tiles.problem_key(problem, t) for t in (sm_90, dataclasses.replace(sm_90, name=DEVICE))}
    assert len(keys) == len(changes) + 2


def test_a_measured_tile_is_chosen_where_it_fits():
    problem, sm_90 = tiles.Problem("wgrad", 64, 64, 6272, 9, HALF), target.named("sm_90")
    first, second = tiles.candidates(problem, sm_90)[:2]
    key = tiles.problem_key(problem, sm_90)
    assert tiles.choose(problem, sm_90) == first
    winners.merge({key: Winner(tiles.as_choice(second), "measured")})
    assert tiles.choose(problem, sm_90) == second
    huge = dataclasses.replace(first, rows=4096)
    for choice in (tiles.as_choice(huge), (1, 2), "own", (48, 64, 64, 4, 2, 1)):
        winners.merge({key: Winner(choice, "measured")})
        assert tiles.choose(problem, sm_90) == first


@needs_ops
def test_a_measured_shortcut_is_what_runs():
    x = images()
    assert len(called(fuse(shortcut_block()), x)) == 2  # the input needs no gradient
    winners.merge({shortcut_key(x): MEASURED})
    assert called(fuse(shortcut_block()), x) == []
    assert len(called(fuse(shortcut_block()), x[:1])) == 2
    with winners.using({}):
        assert len(called(fuse(shortcut_block()), x)) == 2
    assert called(fuse(shortcut_block()), x) == []


@needs_ops
@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
def test_a_measured_shortcut_obeys_the_law(memory):
    winners.merge({shortcut_key(images()): MEASURED})
    fused = hold_to_law(shortcut_block(), images(), torch.float32, memory=memory)
    assert called(fused, images()) == []


@needs_ops
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph_with_winners_read_while_tracing(dynamic):
    x = images()
    store.save(cpu_name(), {shortcut_key(x): MEASURED}, store.folder())
    compiled = torch.compile(fuse(shortcut_block()), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    seen = []
    with mock.patch.object(plan, "shortcut", lambda *a, real=plan.shortcut: seen.append(real(*a)) or seen[-1]):
        got = compiled(x)
    assert {variant.name for variant in seen} == (set() if dynamic else {"library"})
    assert winners.token == winners.digest({shortcut_key(x): MEASURED})
    assert torch.equal(got, fuse(shortcut_block())(x)) or dynamic


@needs_ops
def test_compiled_code_follows_a_new_table():
    x, seen = images(), []
    compiled = torch.compile(fuse(shortcut_block()), fullgraph=True, backend="aot_eager")
    with mock.patch.object(
        projection, "projection_fwd", lambda *a, f=projection.projection_fwd: seen.append(1) or f(*a)
    ):
        compiled(x)
        assert seen
        seen.clear()
        winners.merge({shortcut_key(x): MEASURED})
        compiled(x)
        assert not seen


def kept(entries=None, device=None):
    return store.save(device or cpu_name(), {"d | p": MEASURED} if entries is None else entries, store.folder())


def test_what_is_saved_is_loaded_at_the_first_decision():
    x = images()
    kept({shortcut_key(x): MEASURED})
    assert not winners.table()
    fuse(shortcut_block())(x)
    assert winners.table() == ({shortcut_key(x): MEASURED} if CPU is None else {})


def test_the_switch_and_a_distributed_start_turn_loading_off(monkeypatch):
    kept()
    for name, value in ((winners.SWITCH, "0"), ("WORLD_SIZE", "2")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            winners.ready(cpu_name())
            assert not winners.table()
    winners.ready(cpu_name())
    assert winners.table()


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
