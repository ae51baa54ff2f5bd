"""Several processes: each reads its own share, all end with the weights that one process would have found."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from residual import images, small_net

import convsplit

WORKER = """
import os
import sys
import torch
sys.path.insert(0, {tests!r})
from residual import images, small_net
import convsplit

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = small_net()
own = list(images(64).split(16))[rank::2]
converted = convsplit.convert(model, images(), budget=convsplit.Budget(params=0.3), calibration=own)
torch.save(converted.state_dict(), f"{folder}/converted{{rank}}.pt")
convsplit.repair.recalibrate(converted, own)
convsplit.distill(converted, model, own, epochs=2, held_out=own[:1])
torch.save(converted.state_dict(), f"{folder}/distilled{{rank}}.pt")
torch.distributed.barrier()
os._exit(0)  # all is on disk; a thread of gloo that wants the GIL of an ending interpreter aborts it
"""


def torchrun(script: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.timeout(300)
def test_two_processes_find_what_one_finds(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path)))
    torchrun(script)
    states = {
        (step, rank): torch.load(tmp_path / f"{step}{rank}.pt", weights_only=True)
        for step in ("converted", "distilled")
        for rank in range(2)
    }
    for step in ("converted", "distilled"):
        for key, value in states[step, 0].items():
            assert torch.equal(value, states[step, 1][key]), f"{step}: {key}"
    alone = small_net()
    data, threads = list(images(64).split(16)), torch.get_num_threads()
    torch.set_num_threads(1)  # as the two processes have
    whole = convsplit.convert(alone, images(), budget=convsplit.Budget(params=0.3), calibration=data)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(states["converted", 0][key], value, rtol=1e-5, atol=1e-5)
    torch.set_num_threads(threads)


UNEQUAL = """
import os
import sys
import torch
sys.path.insert(0, {tests!r})
from residual import images, small_net
import convsplit

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = small_net()
own = list(images(64).split(16))[: 3 - 2 * rank]
converted = convsplit.convert(model, images(), budget=convsplit.Budget(params=0.3), calibration=own)
torch.save(converted.state_dict(), f"{folder}/unequal{{rank}}.pt")
try:
    convsplit.refit(converted, model, own if rank else [])
except ValueError as error:  # into a file: what two processes print runs into one another
    torch.save(str(error), f"{folder}/refused{{rank}}.pt")
torch.distributed.barrier()
os._exit(0)  # all is on disk; a thread of gloo that wants the GIL of an ending interpreter aborts it
"""


@pytest.mark.timeout(300)
def test_unequal_shares_neither_hang_nor_differ(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(UNEQUAL.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path)))
    torchrun(script)
    refusals = [torch.load(tmp_path / f"refused{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(refusal.startswith("one of the processes has no batches") for refusal in refusals)
    states = [torch.load(tmp_path / f"unequal{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_example_runs():
    pytest.importorskip("sklearn")
    output = torchrun(Path(__file__).parents[2] / "examples" / "distributed_convert.py")
    assert "2 processes" in output
    assert output.rstrip().endswith("weights 0")
