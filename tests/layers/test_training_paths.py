"""A converted model trains like any other: the paths that training code takes through it."""

from __future__ import annotations

import copy
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from models import UNet, awakened, small_net
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import convsplit
from convsplit import SeparableConv2d

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
WAYS = {
    "uneven": {"forms": ("dw-pw", "pw-dw"), "budget": convsplit.Budget(error=0.4)},
    "cp": {"forms": "pw-dw-pw", "rank": 4},
}


@pytest.fixture(params=WAYS)
def converted(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return convsplit.convert(awakened(small_net()), **WAYS[request.param]).train()


def gradients(model: nn.Module, images: Tensor = IMAGES) -> list[Tensor]:
    model.zero_grad()
    model(images).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def assert_all_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_every_parameter_gets_a_gradient(converted: nn.Module) -> None:
    for (name, _), gradient in zip(converted.named_parameters(), gradients(converted), strict=True):
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name


def test_autocast_trains(converted: nn.Module) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = converted(IMAGES)
        loss = output.float().square().mean()
    loss.backward()
    assert output.dtype == torch.bfloat16
    assert (
        {p.dtype for p in converted.parameters()} == {p.grad.dtype for p in converted.parameters()} == {torch.float32}
    )
    assert all(p.grad.isfinite().all() for p in converted.parameters())


def test_channels_last_trains(converted: nn.Module) -> None:
    other = copy.deepcopy(converted).to(memory_format=torch.channels_last)
    found = gradients(other, IMAGES.to(memory_format=torch.channels_last))
    assert_all_close(found, gradients(converted), 1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(converted: nn.Module, reentrant: bool) -> None:
    expected = gradients(copy.deepcopy(converted))
    converted.zero_grad()
    images = IMAGES.clone().requires_grad_()
    checkpoint_sequential(converted, 3, images, use_reentrant=reentrant).square().mean().backward()
    assert_all_close([p.grad for p in converted.parameters()], expected)


def test_checkpointing_a_single_layer(converted: nn.Module) -> None:
    layer = next(m for m in converted.modules() if isinstance(m, SeparableConv2d))
    expected = gradients(layer)
    layer.zero_grad()
    checkpoint(layer, IMAGES, use_reentrant=False).square().mean().backward()
    assert_all_close([p.grad for p in layer.parameters()], expected)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["swa", "ema"])
def test_weight_averaging(converted: nn.Module, average: object, tmp_path: Path) -> None:
    averaged = AveragedModel(converted, multi_avg_fn=average, use_buffers=False)
    optimiser = torch.optim.SGD(converted.parameters(), lr=0.01)
    scheduler = SWALR(optimiser, swa_lr=0.005)
    seen = []
    for _ in range(3):
        optimiser.zero_grad()
        converted(IMAGES).square().mean().backward()
        optimiser.step()
        averaged.update_parameters(converted)
        scheduler.step()
        seen.append([p.detach().clone() for p in converted.parameters()])
    expected = [_averaged(steps, average is not None) for steps in zip(*seen, strict=True)]
    assert_all_close(list(averaged.module.parameters()), expected)
    update_bn([IMAGES], averaged)
    convsplit.save(averaged.module, tmp_path / "average.safetensors")
    loaded = convsplit.load(tmp_path / "average.safetensors", small_net()).eval()
    torch.testing.assert_close(loaded(IMAGES), averaged.eval()(IMAGES))


def _averaged(steps: tuple[Tensor, ...], exponential: bool) -> Tensor:
    if not exponential:
        return torch.stack(steps).mean(0)
    mean = steps[0]
    for step in steps[1:]:
        mean = mean.lerp(step, 0.5)
    return mean


def test_averaging_of_buffers_leaves_channels_alone(converted: nn.Module) -> None:
    averaged = AveragedModel(converted, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(converted)
    for name, buffer in converted.named_buffers():
        if name.endswith("channels"):
            assert torch.equal(averaged.module.get_buffer(name), buffer)
            assert averaged.module.get_buffer(name).dtype == torch.int64


def test_functional_call(converted: nn.Module) -> None:
    converted.eval()
    doubled = {name: 2 * p.detach() for name, p in converted.named_parameters()}
    other = copy.deepcopy(converted)
    other.load_state_dict(doubled, strict=False)
    torch.testing.assert_close(functional_call(converted, doubled, (IMAGES,)), other(IMAGES))


def test_gradients_per_image(converted: nn.Module) -> None:
    converted.eval()
    parameters = {name: p.detach() for name, p in converted.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(converted, parameters, (image.unsqueeze(0),)).square().mean()

    by_image = vmap(grad(loss), in_dims=(None, 0))(parameters, IMAGES)
    expected = gradients(converted)
    assert_all_close([gradient.mean(0) for gradient in by_image.values()], expected, 1e-4)


def test_compiled_training_step(converted: nn.Module) -> None:
    torch._dynamo.reset()
    expected = gradients(copy.deepcopy(converted))
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    assert_all_close(gradients(compiled), expected, 1e-4)


# Several processes


def _ddp_model(way: str) -> nn.Module:
    torch.manual_seed(0)
    # Batch norm would see another batch in each process, so it uses its running statistics.
    return convsplit.convert(awakened(UNet(8)), **WAYS[way]).eval()


def _ddp_worker(rank: int, port: int, way: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(_ddp_model(way))
    found = gradients(model, IMAGES[2 * rank : 2 * rank + 2])
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    torch.distributed.barrier()
    os._exit(0)  # All is on disk. A thread of gloo that wants the GIL of an interpreter being torn down aborts it.


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_the_gradients_of_one(way: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_ddp_worker, args=(rank, port, way, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(150)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert_all_close(torch.load(tmp_path / "gradients.pt", weights_only=True), gradients(_ddp_model(way)))
