"""`tune`: what is measured, what is kept, what runs afterwards, and what it leaves alone."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_fused import fuse, plan, tune, use_tuned, winners
from resnet_fused.resnet import cifar_resnet
from resnet_fused.tuning import candidates, digest, law, sites, steps
from resnet_fused.winners import store
from tests.test_projected import called
from tests.tune_harness import (
    Clock,
    cpu_name,
    forget,
    images,
    need_a_traced_chain,
    needs_ops,
    no_winners,
    shortcut_block,
)

__all__ = ["no_winners"]  # a fixture for every test of this file
CLEAR = (0.010, 0.005)
EVEN = (0.010, 0.010)


def tuned(clock, model=None, x=None, wrong=None, **options):
    with clock.running(wrong):
        return tune(model or shortcut_block(), images() if x is None else x, timer=clock.timer(), **options)


@needs_ops
def test_a_clear_winner_is_kept_runs_and_is_used_by_the_next_process():
    report = tuned(Clock(*CLEAR))
    (measured,) = report.changed
    assert (measured.default, measured.winner) == ("extension", "library")
    assert measured.ratio.median == pytest.approx(2) and report.step.median == pytest.approx(2)
    assert not report.vetoed and report.undecided == 0
    assert called(fuse(shortcut_block()), images()) == []
    words = plan.shortcut(*shape_of(measured)).reason
    assert words == "measured: extension 10 ms, library 5 ms"
    assert report.digest == digest() != ""
    forget()
    assert called(fuse(shortcut_block()), images()) == []
    assert digest() == report.digest and Path(report.written).is_file()


def shape_of(measured):
    (problem,) = [p for p in sites.collect(step_of(shortcut_block(), images())) if p.key == measured.key]
    return problem.shape, problem.engine


def step_of(model, *sample):
    return steps.Step(steps.private_copy(model, None, None), sample)


@needs_ops
def test_without_a_clear_winner_the_rules_stay_and_the_reason_is_known():
    report = tuned(Clock(*EVEN))
    assert not report.changed and report.step is None
    assert len(called(fuse(shortcut_block()), images())) == 2
    (winner,) = winners.table().values()
    assert winner.choice == "extension" and winner.words.endswith("no other is clearly faster")


@needs_ops
def test_a_new_measurement_replaces_the_old():
    tuned(Clock(*CLEAR))
    tuned(Clock(*EVEN))
    (winner,) = winners.table().values()
    assert winner.choice == "extension"
    forget()
    assert use_tuned() == 1 and [w.choice for w in winners.table().values()] == ["extension"]


@needs_ops
def test_a_wrong_candidate_is_dropped_however_fast():
    report = tuned(Clock(*CLEAR), wrong=lambda y: y * 1.01)
    (measured,) = report.measured
    assert measured.winner == "extension" and "library dropped: FAIL y" in measured.notes[0]
    assert "dropped" in repr(report)


@needs_ops
def test_a_candidate_that_fails_is_dropped(monkeypatch):
    failing = candidates.variants

    def one_more(problem):
        return [*failing(problem), "own"] if problem.extension else failing(problem)

    monkeypatch.setattr(candidates, "variants", one_more)
    monkeypatch.setattr(plan, "shortcut", lambda shape, engine, real=plan.shortcut: no_own(real, shape, engine))
    report = tuned(Clock(*CLEAR))
    assert any("own dropped: RuntimeError: not here" in m for measured in report.measured for m in measured.notes)
    assert report.changed[0].winner == "library"


def no_own(real, shape, engine):
    if any(winner.choice == "own" for winner in winners.table().values()):
        raise RuntimeError("not here")
    return real(shape, engine)


@needs_ops
def test_whole_steps_have_the_last_word():
    report = tuned(Clock(*CLEAR, tuned=1.0))
    assert report.vetoed and report.step.high < 1 and report.changed
    assert "they are dropped" in repr(report) and report.written is None
    assert not winners.table() and len(called(fuse(shortcut_block()), images())) == 2


def two_shortcuts():
    return nn.Sequential(shortcut_block(12, 16), shortcut_block(16, 8))


@needs_ops
def test_the_time_limit_leaves_the_cheap_problems_to_the_rules():
    clock = Clock(*CLEAR)
    report = tuned(clock, two_shortcuts(), time_limit=0.35)
    assert [m.problem for m in report.measured] == ["2x12x7x9 to 16, 1x1/2, shortcut, float32"]
    assert report.undecided == 1 and "left to the rules: 1 more, as the time was up" in repr(report)
    assert report.seconds < 0.35 + 2 * (steps.LEAST_STEPS + 1) * 0.02
    assert tuned(Clock(*CLEAR), two_shortcuts()).undecided == 0


@needs_ops
def test_ctrl_c_keeps_what_is_finished():
    clock = Clock(*CLEAR)
    clock.limit = 0.6
    report = tuned(clock, two_shortcuts())
    assert report.interrupted and len(report.changed) == report.undecided == 1
    assert "Ctrl-C" in repr(report)
    forget()
    assert use_tuned() == 1


@needs_ops
def test_a_folder_that_cannot_be_written_to_leaves_the_winners_in_the_process(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"file/cache: cannot be written to.*for this process alone"):
        report = tuned(Clock(*CLEAR), cache_dir=tmp_path / "file" / "cache")
    assert report.written is None and "for this process alone" in repr(report)
    assert called(fuse(shortcut_block()), images()) == []


@needs_ops
def test_a_damaged_file_is_replaced_by_a_tune_that_succeeds(tmp_path):
    path = store.path_of(cpu_name(), tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="time_limit"):
        tune(shortcut_block(), images(), time_limit=-1, cache_dir=tmp_path)
    assert path.read_text() == "{"
    with pytest.warns(UserWarning, match="damaged, not JSON"):
        report = tuned(Clock(*CLEAR), cache_dir=tmp_path)
    assert report.written == str(path) and len(store.read(path, cpu_name())) == 1


@needs_ops
def test_what_the_named_folder_holds_is_used_too(tmp_path):
    store.save(cpu_name(), {f"{cpu_name()} | p": winners.Winner("own", "measured")}, tmp_path)
    tuned(Clock(*CLEAR), cache_dir=tmp_path)
    assert len(winners.table()) == len(store.load(cpu_name(), tmp_path)) == 2


def test_what_a_wrapper_holds_is_measured():
    model = shortcut_block()
    for wrapped in (model, nn.DataParallel(model), torch.compile(model, backend="eager"), torch.compile(fuse(model))):
        assert type(steps.private_copy(wrapped, None, None)).__name__ == "BasicBlock"
    holder = nn.Module()
    holder.module = model
    assert type(steps.private_copy(holder, None, None)) is nn.Module


def test_the_users_model_is_left_alone():
    model = fuse(nn.Sequential(shortcut_block(), nn.Dropout(0.5)))
    model[0].bn1.eval()
    x = images()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    grads = [p.grad for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    values, modes = [g.clone() for g in grads], [m.training for m in model.modules()]
    classes, sample, state = [type(m) for m in model.modules()], x.clone(), torch.get_rng_state()
    tune(model, x, time_limit=2)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, sample)
    assert [type(m) for m in model.modules()] == classes and [m.training for m in model.modules()] == modes
    assert all(p.grad is g and torch.equal(g, v) for p, g, v in zip(model.parameters(), grads, values))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_in_eval_mode_without_gradients_stays_so():
    model = shortcut_block().eval().requires_grad_(False)
    with torch.no_grad():
        report = tune(model, images(), time_limit=2)
    assert not model.training and len(report.measured) == (CPU_DECISIONS if report.measured else 0)


CPU_DECISIONS = 1


def test_problems_are_those_of_a_training_step():
    model = nn.Sequential(shortcut_block(), *(fuse_free(8) for _ in range(2)))
    found = sites.collect(step_of(model, images()))
    assert sorted({use.source.kind for problem in found for use in problem.uses}) == ["join", "pending", "plain"]
    assert sum(problem.count for problem in found) == 7
    assert [problem.cost for problem in found] == sorted((p.cost for p in found), reverse=True)
    assert {problem.shape.projection for problem in found} == {0, 1}
    for problem in found:
        for use in problem.uses:
            assert use.backward is not None
            (inputs,) = [sites.make_inputs(use, problem.key, torch.device("cpu"))]
            assert law.Law(inputs).broken_by(law.results(inputs)) is None


def fuse_free(k):
    from resnet_fused.eager_blocks import BasicBlock

    return BasicBlock(k, k)


def test_under_autocast_the_problems_have_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        found = sites.collect(step_of(shortcut_block(), images()))
    assert {problem.shape.dtype for problem in found} == {torch.bfloat16}
    assert {use.params.weight.dtype for problem in found for use in problem.uses} == {torch.float32}


@needs_ops
def test_compiled_with_a_winner_in_place():
    need_a_traced_chain()
    torch.compiler.reset()  # sizes that tests before it made dynamic would stay on the rules
    tuned(Clock(*CLEAR))
    model = fuse(shortcut_block())
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images()), model(images()))


def test_on_this_device(device):
    model, x = cifar_resnet(8, shortcut="B").to(device), torch.randn(4, 3, 8, 8).to(device)
    report = tune(model, x, time_limit=20)
    assert report.measured and report.device.startswith(device)
    assert not [note for m in report.measured for note in m.notes if "dropped" in note]


BAD = [
    (lambda m, x: tune(None, x), TypeError, r"tune: model: expected a torch\.nn\.Module, got NoneType"),
    (lambda m, x: tune(m, x, time_limit=0), ValueError, r"tune: time_limit: expected seconds above 0, got 0"),
    (lambda m, x: tune(m, x, time_limit=float("nan")), ValueError, r"time_limit: expected seconds above 0, got nan"),
    (lambda m, x: tune(m, ()), ValueError, r"tune: sample: expected tensors on one device, got no tensor"),
    (
        lambda m, x: tune(m, x.to("meta")),
        ValueError,
        r"tune: sample: expected a tensor on cpu or cuda, got one on meta",
    ),
    (lambda m, x: tune(copy.deepcopy(m).to("meta"), x), ValueError, r"tune: model: expected its parameters on cpu"),
    (lambda m, x: tune(m, x, memory="huge"), ValueError, r"memory: expected one of"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_arguments_are_named(call, error, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=words):
            call(shortcut_block(), images())
    assert not winners.table() and not list(store.folder().glob("*.json"))
