"""DINOv3's rotation of a grid of patches."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from vit_cases import TINY, angles_of

from vitreg_kernels.measure.accuracy import compare
from vitreg_kernels.nn.rope import PatchRope, patch_rope

CPU = torch.device("cpu")


def rope_of(grid, head_dim=16, dtype=torch.float32, **options):
    return patch_rope(grid, head_dim, device=CPU, dtype=dtype, **options)


class TestPatchRope:
    @pytest.mark.parametrize("grid", [(4, 4), (3, 7), (1, 1), (37, 37)])
    @pytest.mark.parametrize("head_dim", [16, 64, 20])
    def test_is_dinov3s(self, grid, head_dim):
        config = replace(TINY, dim=3 * head_dim, position="rope")
        exact, eager = (angles_of(grid, config, dtype) for dtype in (torch.float64, torch.float32))
        rope = rope_of(grid, head_dim)
        for actual, function in ((rope.cos, torch.cos), (rope.sin, torch.sin)):
            accuracy = compare(actual, function(exact.tile(2)), function(eager.tile(2)), terms=4)
            assert accuracy.passed, accuracy
        assert not rope.interleaved

    def test_corners_of_the_image_lie_at_one(self):
        """Of two by two patches the centres are at -1/2 and 1/2; the shortest period is half an image."""
        rope = rope_of((2, 2), head_dim=4)
        angles = math.pi * torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
        torch.testing.assert_close(rope.cos, angles.cos().tile(2))
        torch.testing.assert_close(rope.sin, angles.sin().tile(2), atol=1e-6, rtol=0)

    def test_height_comes_first_and_each_side_has_its_own_scale(self):
        quarters = rope_of((2, 5)).sin.unflatten(0, (2, 5)).chunk(4, dim=-1)
        assert torch.equal(quarters[0], quarters[0][:, :1].expand(-1, 5, -1))  # the same along a row
        assert torch.equal(quarters[1], quarters[1][:1].expand(2, -1, -1))  # the same down a column
        assert torch.equal(quarters[0], quarters[2])
        assert torch.equal(quarters[1], quarters[3])
        # Centres at the same share of the image's height turn alike, however many rows there are.
        torch.testing.assert_close(rope_of((6, 5)).sin[5], rope_of((2, 5)).sin[0])

    def test_base_is_the_longest_period(self):
        assert rope_of((3, 3), base=10.0).cos.ne(rope_of((3, 3)).cos).any()
        # The middle of an odd grid is the middle of the image, at angle 0.
        assert torch.equal(rope_of((3, 3)).cos[4], torch.ones(16))


class TestCache:
    def test_one_rotation_a_grid(self):
        rope, x = PatchRope(16, 100.0), torch.zeros(1)
        assert rope((3, 4), x) is rope((3, 4), x)
        assert rope((4, 3), x) is not rope((3, 4), x)
        assert torch.equal(rope((3, 4), x).cos, rope_of((3, 4)).cos)

    def test_one_a_dtype_and_no_narrower_than_fp32(self):
        rope = PatchRope(16, 100.0)
        dtypes = (torch.float64, torch.bfloat16, torch.float32)
        found = [rope((3, 4), torch.zeros(1, dtype=dtype)).cos.dtype for dtype in dtypes]
        assert found == [torch.float64, torch.float32, torch.float32]

    def test_old_grids_are_forgotten(self):
        rope, x = PatchRope(16, 100.0), torch.zeros(1)
        first = rope((1, 1), x)
        for n in range(2, 40):
            rope((n, 1), x)
        assert len(rope._cache) <= 8
        assert rope((1, 1), x) is not first

    def test_inference_first_and_training_after(self):
        rope, x = PatchRope(16, 100.0), torch.randn(12, 16, requires_grad=True)
        with torch.inference_mode():
            rope((3, 4), x)
        (x * rope((3, 4), x).cos).sum().backward()
        assert torch.equal(x.grad, rope_of((3, 4)).cos)

    def test_what_a_mode_made_is_not_kept(self):
        """A fake tensor, or a tensor of a trace, would turn up in a later call."""
        rope = PatchRope(16, 100.0)
        with torch._subclasses.FakeTensorMode():
            rope((3, 4), torch.zeros(1))
        torch.jit.trace(lambda x: x + rope((3, 4), x).cos, torch.zeros(1))
        assert torch.equal(rope((3, 4), torch.zeros(1)).cos, rope_of((3, 4)).cos)

    def test_has_no_state(self):
        rope, x = PatchRope(16, 100.0), torch.zeros(1)
        rope((3, 4), x)
        assert not rope.state_dict()
        for twin in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
            assert torch.equal(twin((3, 4), x).sin, rope((3, 4), x).sin)

    def test_compiles_whole_with_any_grid(self, dynamo):
        rope = PatchRope(16, 100.0)

        def turned(x):
            return x * rope(tuple(x.shape[:2]), x).cos.unflatten(0, x.shape[:2])

        compiled = torch.compile(turned, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for grid in ((3, 4), (7, 5)):
                x = torch.randn(*grid, 16)
                torch.testing.assert_close(compiled(x), turned(x))
