"""Function transforms: what docs/function_transforms.md says of each op and backend is what happens."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from contract import transforms
from contract.test_contract import OPS, every_backend, most_kinds
from contract.transforms import TRIALS, calls_of, close, inputs_of, loss_of, of_inputs, one_by_one, outcome, stacked
from contract.transforms_table import read
from vitreg_kernels._triton.mode import INTERPRETING
from vitreg_kernels.functional import register_attention, register_attention_qkv, residual_layer_norm
from vitreg_kernels.ops.attention.types import Rope

TABLE = read()

CASES = [
    # Of one op the compiler's trials every time; each takes a second or two.
    pytest.param(
        *(trial, op, backend.name),
        id=f"{trial.name}-{op}-{backend.name}",
        marks=[pytest.mark.slow] if "torch.compile" in trial.name and str(op) != "TokenNorms" else [],
    )
    for trial in TRIALS
    for op in OPS
    for backend in op.backends
    if transforms.is_tried(trial, op)
]


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(("trial", "op", "backend"), CASES)
def test_the_table_is_true(trial, op, backend, tmp_path):
    """Each transform is right, or says the sentence that the table quotes."""
    assert outcome(trial, op, backend, tmp_path) == TABLE[trial.name, str(op), backend]


def test_the_table_has_nothing_else():
    tried = {(trial.name, str(op), backend.name) for trial in TRIALS for op in OPS for backend in op.BACKENDS}
    assert TABLE.keys() <= tried


@every_backend
def test_calls_of_one_image(op, backend):
    """Joined, a tensor that is the same for all would not be laid out as a kernel lays out its own."""
    if not op.OUTPUTS:
        return
    call, *others = calls_of(op, op.resized(op.KINDS[0], 1, 9))
    # Of the tokens alone: gradients of parameters are the mapped formula's, and no kernel's.
    loss, tokens = loss_of(op, backend.name, call), {name: call[name] for name in op.TOKENS if name in call}
    upstream = torch.randn(transforms.SIZE)
    _, pull = vjp(loss, tokens)
    expected = one_by_one(lambda one: pull(one["upstream"])[0], {"upstream": upstream})
    close(vmap(pull)(upstream)[0], expected)
    name, rest = op.TOKENS[0], {n: x for n, x in tokens.items() if n != op.TOKENS[0]}
    batch = torch.stack([call[name], *(other[name] for other in others)])

    def gradient(one: dict) -> dict:
        return grad(loss)({**rest, **one})

    close(vmap(gradient)({name: batch}), one_by_one(gradient, {name: batch}))


class TestMapped:
    """Every input alone, wherever its mapped dimension lies, and what else of a call may be mapped."""

    @most_kinds
    def test_one_input_alone(self, op, backend, spec):
        made = calls_of(op, spec)
        function, batch = of_inputs(op, backend.name, made[0]), stacked(op, made)
        fixed = inputs_of(op, made[0])
        for name, x in batch.items():
            only = {n: x if n == name else y.expand(transforms.SIZE, *y.shape) for n, y in fixed.items()}
            expected = one_by_one(function, only)
            for dim in (0, x.ndim - 1):
                dims = {n: dim if n == name else None for n in fixed}
                close(vmap(function, (dims,))({**fixed, name: x.movedim(0, dim)}), expected)

    @most_kinds
    def test_gradients_of_one_input_alone(self, op, backend, spec):
        if not op.OUTPUTS:
            return
        made = calls_of(op, spec)
        loss, batch, fixed = loss_of(op, backend.name, made[0]), stacked(op, made), inputs_of(op, made[0])
        for name in batch:
            dims = {n: 0 if n == name else None for n in fixed}
            only = {n: batch[n] if n == name else y.expand(transforms.SIZE, *y.shape) for n, y in fixed.items()}
            close(vmap(grad(loss), (dims,))({**fixed, name: batch[name]}), one_by_one(grad(loss), only))

    @every_backend
    def test_twice(self, op, backend):
        made = calls_of(op, op.KINDS[0])
        function, batch = of_inputs(op, backend.name, made[0]), stacked(op, made)
        twice = {name: torch.stack([x, x.flip(0)], 1) for name, x in batch.items()}
        found = vmap(vmap(function))(twice)
        for i in range(2):
            expected = one_by_one(function, {name: x[:, i] for name, x in twice.items()})
            close({name: x[:, i] for name, x in found.items()}, expected)

    @every_backend
    def test_what_is_no_input(self, op, backend):
        """Masks, rotations and factors of stochastic depth, each call its own."""
        made = calls_of(op, op.KINDS[0])
        others = [n for n, x in made[0].items() if n not in op.INPUTS and _has_tensors(x)]
        for name in others:
            each = [call[name] for call in made]
            dims = tree_map(lambda x: 0 if isinstance(x, torch.Tensor) else None, each[0])
            function = partial(lambda x, name: op.outputs(backend.name, {**made[0], name: x}), name=name)
            mapped = vmap(function, (dims,))(_stacked(each))
            for i, one in enumerate(each):
                expected = op.outputs(backend.name, {**made[0], name: one})
                close({n: x[i] for n, x in mapped.items()}, expected)

    @every_backend
    def test_no_call_at_all(self, op, backend):
        if INTERPRETING:
            pytest.skip("the interpreter runs no empty grid")
        made = calls_of(op, op.KINDS[0])
        function = of_inputs(op, backend.name, made[0])
        none = {name: x[:0] for name, x in stacked(op, made).items()}
        try:
            found = vmap(function)(none)
        except RuntimeError:  # where torch's own operations have no such rule
            assert not backend.opaque
            return
        for name, x in function(inputs_of(op, made[0])).items():
            assert found[name].shape == (0, *x.shape), name


CONSTANT = {
    "rope": lambda x, q: register_attention(q, q, q, num_prefix_tokens=2, rope=Rope(x.cos(), x.sin()), backend="cpu"),
    "drop_path": lambda x, q: (
        residual_layer_norm(q[:, 0], q[:, 1], drop_path=x.sum(1)[:2], weight=torch.ones(16), backend="cpu").normalized
    ),
}


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.parametrize(
    "derivative",
    [
        lambda f, x: grad(lambda x: vmap(f)(x).square().sum())(torch.stack((x, x))),
        lambda f, x: grad(lambda x: f(x).square().sum())(x),
        lambda f, x: jvp(f, (x,), (x,)),
        lambda f, x: vmap(lambda x: jvp(f, (x,), (x,)))(torch.stack((x, x))),
        lambda f, x: vmap(f)(torch.stack((x, x)).requires_grad_()),
    ],
    ids=["grad of vmap", "grad", "jvp", "jvp within vmap", "autograd of vmap"],
)
@pytest.mark.skipif(INTERPRETING, reason="of the backend cpu")
def test_what_is_constant_says_so_under_every_transform(name, derivative):
    """Its gradient would be missing in silence."""
    query, x = torch.randn(2, 2, 5, 16), torch.randn(3, 16)
    with pytest.raises(ValueError, match=f"{name}.* carr(y|ies) no gradient"):
        derivative(lambda x: CONSTANT[name](x, query), x)


@pytest.mark.skipif(INTERPRETING, reason="of the backends in torch code")
@pytest.mark.parametrize("backend", ["cpu", "sdpa", "reference"])
def test_statistics_have_no_tangent(backend):
    """As they have no gradient: forward and reverse mode agree."""
    query, tangent = torch.randn(2, 2, 2, 7, 8)

    def loss(query, lse_of=lambda x: x):
        output, found = register_attention(query, query, query, outputs=("lse",), backend=backend)
        return (output * lse_of(found.lse)[..., None]).sum()

    expected = (grad(partial(loss, lse_of=torch.Tensor.detach))(query) * tangent).sum()
    close(jvp(loss, (query,), (tangent,))[1], expected)
    close((grad(loss)(query) * tangent).sum(), expected)


@pytest.mark.skipif(INTERPRETING, reason="of the backend cpu")
@pytest.mark.parametrize("mapped", ["cos", "sin"])
@pytest.mark.parametrize("shape", [(5, 8), (1, 5, 8)], ids=str)
def test_half_a_rotation_is_mapped(mapped, shape):
    query, angles, others = torch.randn(2, 2, 7, 8), torch.randn(shape), torch.randn(3, *shape)

    def attend(backend, x):
        rope = Rope(**{"cos": angles.cos(), "sin": angles.sin(), mapped: x})
        return register_attention(query, query, query, num_prefix_tokens=2, rope=rope, backend=backend)

    close(*(vmap(partial(attend, backend))(others) for backend in ("cpu", "reference")))


@pytest.mark.skipif(INTERPRETING, reason="of the backend cpu")
@pytest.mark.parametrize("mode", ["double backward", "forward mode within a checkpoint"])
def test_among_hooks_of_saved_tensors(mode):
    query, tangent = torch.randn(2, 2, 2, 7, 8)

    def attend(x, backend):
        return register_attention(x, x, x, backend=backend)

    def second(backend):
        x = query.clone().requires_grad_()
        if mode == "double backward":
            with torch.autograd.graph.save_on_cpu():
                (gradient,) = torch.autograd.grad(attend(x, backend).sin().sum(), x, create_graph=True)
                return torch.autograd.grad((gradient * tangent).sum(), x)[0]
        return checkpointed(attend, x, backend)

    def checkpointed(function, x, *arguments):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent)
            result = checkpoint(function, dual, *arguments, use_reentrant=False)
            return forward_ad.unpack_dual(result).tangent.detach()

    if mode != "double backward":
        try:
            checkpointed(torch.sin, query.clone().requires_grad_())
        except NotImplementedError:  # torch 2.10
            pytest.skip("torch's own checkpoint has no forward mode")
    close(second("cpu"), second("reference"))


def test_packs_are_cut_alike():
    """Where each image begins is read on the host."""
    qkv, bounds = torch.randn(1, 6, 3, 1, 16), torch.tensor([[0, 2, 6], [0, 3, 6]], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens cannot be mapped"):
        vmap(lambda cu: register_attention_qkv(qkv, cu_seqlens=cu))(bounds)
    with pytest.raises(ValueError, match="cu_seqlens cannot be mapped"):
        vmap(grad(lambda qkv, cu: register_attention_qkv(qkv, cu_seqlens=cu).sum()), (None, 0))(qkv, bounds)


def _has_tensors(x: object) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(x))


def _stacked(each: list) -> object:
    return tree_map(lambda *xs: torch.stack(xs) if isinstance(xs[0], torch.Tensor) else xs[0], *each)
