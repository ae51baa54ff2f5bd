"""Convert with several processes, each of which reads its own share of the calibration images.

    torchrun --nproc-per-node 2 examples/distributed_convert.py

Moments are summed over all processes (gloo on CPUs, nccl on GPUs), so every process ends with the same weights: those
one process would have found on all images, up to rounding.
"""

import argparse

import torch
from digits import digits, trained
from torch import distributed, nn

import convsplit


def largest_difference(model: nn.Module) -> float:
    """Between the weights of this process and those of the first."""
    worst = 0.0
    for value in model.state_dict().values():
        first = value.clone()
        distributed.broadcast(first, 0)
        worst = max(worst, float((first - value).abs().max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=float, default=0.3)
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.set_num_threads(1)
    model, images = trained(), digits()[0]

    own = list(images[rank::world][: 512 // world].split(64))
    converted = convsplit.convert(
        model, images[:1], budget=convsplit.Budget(params=arguments.params), calibration=own
    )

    difference = largest_difference(converted)
    drift = convsplit.compare(converted, model, images[:256]).drift.relative
    if rank == 0:
        print(f"{world} processes, drift {drift:.3f}, largest difference between their weights {difference:g}")
        if arguments.out:
            convsplit.save(converted, arguments.out)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
