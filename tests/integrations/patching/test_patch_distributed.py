"""Patched models in other processes: under DDP, FSDP2 and tensor parallel, and out of a pickle.

Two processes are started once for all of it, since that takes longer than what they do.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.integrations.patching.judge import assert_close, op_calls, results, scrambled
from tests.integrations.patching.small_vit import vit
from tests.two_processes import PROCESSES, member
from vitreg_kernels import patch, unpatch

pytest.importorskip("timm")
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def hugging_face(name: str, **options: int) -> nn.Module:
    """With q, k and v apart, and four heads: two for each process."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
    config = getattr(transformers, f"{name}Config")(**sizes, image_size=32, patch_size=8, **options)
    return scrambled(getattr(transformers, f"{name}Model")(config)).eval()


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By name, of a loss that is a mean over images, as a whole even where they are sharded."""
    model.zero_grad()
    output = model(x)
    (output * torch.linspace(-1, 1, output.shape[-1])).mean().backward()
    return whole({name: p.grad for name, p in model.named_parameters()})


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that no longer are sharded, by the names that they have without DDP."""
    return {
        name.removeprefix("module."): x.full_tensor() if hasattr(x, "full_tensor") else x.clone()
        for name, x in tensors.items()
    }


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def data_parallel(rank: int, folder: str) -> None:
    """The gradients of one process, and the checkpoint that it would save, whatever comes first."""
    torch.manual_seed(1)
    x = torch.randn(4, 3, 56, 56)
    mine, expected, weights = x.chunk(PROCESSES)[rank], gradients(vit(depth=2), x), whole(vit(depth=2).state_dict())
    for name, wrap in (("DDP", DistributedDataParallel), ("FSDP2", sharded)):
        for first, level in (("patched", "attention"), ("wrapped", "attention"), ("patched", "block")):
            case = f"{name}, {first} first, {level}"
            model = vit(depth=2)
            if first == "patched":
                patch(model, level=level)
            model = wrap(model)
            if first == "wrapped":
                patch(model, level=level)
            with op_calls() as calls:
                found = gradients(model, mine)
            assert len(calls) == (4 if level == "block" else 2), case
            state = model.state_dict()
            distributed_checkpoint.save(state, checkpoint_id=f"{folder}/{case}")
            unpatch(model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            distributed_checkpoint.load(state, checkpoint_id=f"{folder}/{case}")
            model.load_state_dict(state)
            with op_calls() as calls:
                again = gradients(model, mine)
            assert not calls, case
            for those in (found, again):
                torch.testing.assert_close(those, expected, atol=1e-5, rtol=1e-3, msg=lambda m, c=case: f"{c}: {m}")
            torch.testing.assert_close(whole(state), weights, atol=0, rtol=0)


def split_by_heads(model: nn.Module) -> nn.Module:
    """Each process has half of the heads, as plain tensors, and the module's counts are those of its half."""
    plan = {f"{part}_proj": ColwiseParallel(use_local_output=True) for part in "qkv"} | {"o_proj": RowwiseParallel()}
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for module in [m for m in model.modules() if hasattr(m, "q_proj")]:
        parallelize_module(module, mesh, plan)
        for count in ("num_heads", "num_attention_heads"):
            if hasattr(module, count):
                setattr(module, count, getattr(module, count) // PROCESSES)
    return model


def tensor_parallel(rank: int, folder: str) -> None:
    """Output and gradients of one process unpatched; heads are found by a view with -1, or by the module's count."""

    def found(model: nn.Module) -> dict[str, Tensor]:
        return whole(results(model, images(), call=lambda model, x: model(x).last_hidden_state))

    for name, options in (("ViT", {}), ("DINOv3ViT", {"num_register_tokens": 4})):
        model = hugging_face(name, **options)
        expected = found(copy.deepcopy(model))
        for first in ("patched", "split"):
            case = f"{name}, {first} first"
            ours = copy.deepcopy(model)
            if first == "patched":
                patch(ours)
            split_by_heads(ours)
            if first == "split":
                report = patch(ours)
                assert "(2 heads of 16, " in report.patched[0].backend, case
            with op_calls() as calls:
                actual = found(ours)
            assert [call.tensors[0].shape[1] for call in calls] == [2, 2], case
            assert_close(actual, expected)


def pickled(rank: int, folder: str) -> None:
    """A patched model opened where nobody patched anything; nothing but the pickle imports its library."""
    assert "transformers" not in sys.modules
    model = torch.load(f"{folder}/model.pt", weights_only=False)
    with op_calls() as calls:
        output = model(images()).last_hidden_state
    assert len(calls) == 2
    torch.testing.assert_close(output, torch.load(f"{folder}/output.pt"))


CHECKS = {check.__name__: check for check in (pickled, data_parallel, tensor_parallel)}  # in this order


def work(rank: int, folder: str, names: list[str]) -> None:
    with member(rank, folder):
        for name in names:
            failure = ""
            try:
                CHECKS[name](rank, folder)
            except (
                Exception
            ) as error:  # told by the test of that name; the other process may wait for this one until then
                failure = f"{type(error).__name__}: {error}"
            Path(folder, f"{name} {rank}.txt").write_text(failure)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what went wrong in each."""
    folder, names = tmp_path_factory.mktemp("processes"), ["data_parallel"]
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        names = list(CHECKS)
        model = hugging_face("DINOv3ViT")
        patch(model)
        torch.save(model, folder / "model.pt")
        torch.save(model(images()).last_hidden_state, folder / "output.pt")
    torch.multiprocessing.spawn(work, (str(folder), names), nprocs=PROCESSES)
    return folder


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes_do_what_one_does(check, folder):
    if check != "data_parallel":
        pytest.importorskip("transformers")
    assert [(folder / f"{check} {rank}.txt").read_text() for rank in range(PROCESSES)] == ["", ""]
