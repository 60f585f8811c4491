"""What the ranks of the training tests do; every rank imports this, and runs `one_rank`."""

import contextlib
import dataclasses
import io
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import torch
from torch import nn

from resnet_fused.cli import main
from resnet_fused.train import Stop, TrainConfig, Trainer, UserError, checkpoint, complete
from resnet_fused.train import data as datasets
from resnet_fused.train import ranks as processes
from resnet_fused.train.progress import Progress
from tests.test_train import SMALL_RUN, StopAt, tiny

RANKS = 2
COUNTS = (9, 2, 1, 0)
# Nine images on two ranks: five and four.
UNEVEN = dataclasses.replace(SMALL_RUN, batch_size=9, lr=0.02, iterations=5, compare=True)
WIDE = dataclasses.replace(UNEVEN, model="tests.train_ranks_harness:wide")
# On three ranks: three, three and two.
EIGHT = dataclasses.replace(WIDE, batch_size=8)
RUNS = {
    "uneven": UNEVEN,
    "wide": WIDE,
    "one image": dataclasses.replace(WIDE, batch_size=1, iterations=2),
    "own statistics": dataclasses.replace(WIDE, sync_bn=False, iterations=2, compare=False),
}
SYNTHETIC = ("--data", "synthetic", "--image-size", "8", "--batch-size", "9")
ENDLESS = (*SYNTHETIC, "--iterations", "100000", "--checkpoint-every", "5", "--resume", "auto", "--timeout", "100")


class Wide(nn.Module):
    """A net in float64 that takes float32 images."""

    def __init__(self, net):
        super().__init__()
        self.net = net.double()

    def forward(self, x):
        return self.net(x.double())


def wide(num_classes=10, in_channels=3, fused=True):
    return Wide(tiny(num_classes, in_channels, fused))


def data():
    """Synthetic images, of which the test images are two batches."""
    return datasets.load("synthetic", image_size=8)


def train(config, out, group=processes.ALONE, state=None, stop_after=None):
    """A run or a piece of one, and what it came to on this rank."""
    dataset = data()
    out = Path(out) if group.first else Path(out).with_name("of another rank")
    trainer = Trainer(complete(config, dataset) if state is None else config, dataset, out, state, group)
    stop, progress = Stop(), Progress(config.iterations, stream=io.StringIO())
    if stop_after is not None:
        stop = StopAt(stop_after)
        progress.update = stop.count
    trainer.run(progress, stop)
    trainer.close()
    return outcome(trainer, stop.signal)


def outcome(trainer, signal=0):
    models = {lane.name: {k: v.clone() for k, v in lane.model.state_dict().items()} for lane in trainer.lanes}
    return {
        "iteration": trainer.iteration,
        "signal": signal,
        "losses": {name: torch.tensor(values, dtype=torch.float64) for name, values in trainer.history.losses.items()},
        "evaluations": trainer.history.evaluations,
        "lr": trainer.schedule.state_dict(),
        "scale": trainer.lanes[0].scaler.state_dict(),
        "models": models,
    }


def go_on(folder, out, group=processes.ALONE, **options):
    """Continue the run in ``folder`` by its checkpoint, into ``out``."""
    state = group.from_first(lambda: checkpoint.load(Path(folder)))
    return train(TrainConfig.from_dict(state["config"]), out, group, state, **options)


def continued(group, folder):
    """A run stopped after its second step by a signal to the last rank, gone on with on 2, on 1, and on 1 then 2."""
    last = group.rank == RANKS - 1
    seen = {"cut": train(UNEVEN, folder / "cut", group, stop_after=2 if last else 1000)}
    seen["two"] = go_on(folder / "cut", folder / "two", group)
    if group.first:  # not a word to the other rank: an ordinary run beside it
        seen["one"] = go_on(folder / "cut", folder / "one")
        go_on(folder / "cut", folder / "step", stop_after=1)
    torch.distributed.barrier()
    seen["two again"] = go_on(folder / "step", folder / "again", group)
    return seen


def refusals(group):
    """What each rank hears when one of them cannot go on."""

    def refuse(on, error):
        if group.rank == on:
            raise error(f"no such thing on {on}")
        return "fine"

    def heard(call):
        try:
            return call()
        except (UserError, OSError) as error:
            return f"{type(error).__name__}: {error}"

    return {
        "rank 1": heard(lambda: group.together(lambda: refuse(1, UserError))),
        "rank 0": heard(lambda: group.from_first(lambda: refuse(0, OSError))),
        "later machine": heard(lambda: group.one_by_one(lambda: refuse(1, UserError))),
        "none": heard(lambda: group.together(lambda: refuse(2, UserError))),
        "sums": group.total([1.0, float(group.rank)]),
        "signal": group.agreed(15 if group.rank == 1 else 0),
        "parts": [list(range(count))[group.part(count)] for count in COUNTS],
    }


def command(*flags):
    """The command's exit code, output and errors, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["train", "--model", "tests.test_train:tiny", *flags])
    return code, out.getvalue(), err.getvalue()


def interrupted(rank, *flags):
    """The command, of which the last rank gets a SIGINT once there is a checkpoint."""

    def interrupt():
        while not (Path(flags[-1]) / checkpoint.NAME).exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    waiting = threading.Thread(target=interrupt, daemon=True)
    if rank == RANKS - 1:
        waiting.start()
    return command(*flags)


def one_rank(rank, folder, ports):
    torch.set_num_threads(1)
    os.environ.update(environment(rank, ports[0]), RESNET_FUSED_TUNE="0")
    folder = Path(folder)
    with processes.joined("cpu", 120) as group:
        seen = {name: train(config, folder / name, group) for name, config in RUNS.items()}
        seen.update(continued(group, folder), refusals=refusals(group))
    os.environ["MASTER_PORT"] = str(ports[1])
    seen["bad path"] = command("--data", f"folder:{folder}/nowhere", "--out", str(folder / "none"))
    os.environ["MASTER_PORT"] = str(ports[2])
    seen["compared"] = command(*SYNTHETIC, "--iterations", "8", "--compare", "--out", str(folder / "compared"))
    os.environ["MASTER_PORT"] = str(ports[3])
    seen["interrupted"] = interrupted(rank, *ENDLESS, "--out", str(folder / "endless"))
    torch.save(seen, folder / f"{rank}.pt")


def three(rank, folder, port):
    """On three ranks: a run in float64, and one in float32 that is cut and gone on with."""
    torch.set_num_threads(1)
    os.environ.update(environment(rank, port, 3), RESNET_FUSED_TUNE="0")
    folder = Path(folder)
    narrow = dataclasses.replace(EIGHT, model=UNEVEN.model)
    with processes.joined("cpu", 120) as group:
        seen = {"wide": train(EIGHT, folder / "wide", group), "whole": train(narrow, folder / "whole", group)}
        train(narrow, folder / "cut", group, stop_after=2)
        seen["gone on"] = go_on(folder / "cut", folder / "gone on", group)
        seen["fp16"] = train(dataclasses.replace(narrow, amp="fp16"), folder / "fp16", group)
    torch.save(seen, folder / f"{rank}.pt")


def environment(rank, port, size=RANKS):
    """What torchrun sets for a rank."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(target, *arguments, size=RANKS):
    """Run ``target(rank, *arguments)`` in fresh processes, to the end."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=target, args=(rank, *arguments)) for rank in range(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(400)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in started] == [0] * size
