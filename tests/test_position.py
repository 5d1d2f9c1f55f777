"""Position rows on another grid; agreement with timm is in tests/integrations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vitreg_kernels.measure.accuracy import compare
from vitreg_kernels.nn import patch_like_registers
from vitreg_kernels.nn.position import resample_positions

DIM = 12
LEARNT = [(7, 7), (6, 9), (3, 16)]  # 48 and 54 rows are no square
GRIDS = [(4, 4), (7, 5), (9, 14), (1, 1)]


def rows(prefix=0, grid=(7, 7)):
    return torch.randn(1, prefix + math.prod(grid), DIM)


def resampled(pos_embed, grid, **options):
    """From 7 x 7."""
    return resample_positions(pos_embed, grid, from_grid=(7, 7), **options)


def dinov2_formula(pos_embed, grid, *, from_grid, antialias, offset):
    """``interpolate_pos_encoding`` of DINOv2, each axis by its own side, on a model whose CLS token has a row."""
    patches = pos_embed[:, 1:].reshape(1, *from_grid, DIM).permute(0, 3, 1, 2)
    scale = tuple(float(n + offset) / side for n, side in zip(grid, from_grid, strict=True))
    target = {"scale_factor": scale} if offset else {"size": grid}
    patches = F.interpolate(patches, mode="bicubic", antialias=antialias, **target)
    assert patches.shape[2:] == grid
    return torch.cat((pos_embed[:, :1], patches.permute(0, 2, 3, 1).reshape(1, -1, DIM)), dim=1)


class TestResamplePositions:
    @pytest.mark.parametrize("from_grid", LEARNT)
    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize(("antialias", "offset"), [(True, 0.0), (False, 0.1), (False, 0.0)])
    def test_is_dinov2s(self, from_grid, grid, antialias, offset):
        pos_embed = rows(1, from_grid)
        options = {"antialias": antialias, "offset": offset, "from_grid": from_grid}
        exact = dinov2_formula(pos_embed.double(), grid, **options)
        eager = dinov2_formula(pos_embed, grid, **options)
        accuracy = compare(resample_positions(pos_embed, grid, num_prefix_rows=1, **options), exact, eager, terms=16)
        assert accuracy.passed, accuracy

    def test_the_offset_and_the_filter_matter(self):
        pos_embed = rows()
        plain = resampled(pos_embed, (4, 4), antialias=False)
        assert (resampled(pos_embed, (4, 4), antialias=False, offset=0.1) - plain).abs().max() > 1e-3
        assert (resampled(pos_embed, (4, 4), antialias=True) - plain).abs().max() > 1e-2

    @pytest.mark.parametrize("grid", LEARNT)
    @pytest.mark.parametrize("offset", [0.0, 0.1])
    def test_nothing_is_done_where_the_grid_fits(self, grid, offset):
        pos_embed = rows(5, grid)
        assert resample_positions(pos_embed, grid, from_grid=grid, num_prefix_rows=5, offset=offset) is pos_embed

    @pytest.mark.parametrize(("from_grid", "grid"), [((6, 6), (4, 9)), ((4, 9), (6, 6)), ((4, 9), (9, 4))])
    def test_as_many_patches_in_another_shape_are_another_grid(self, from_grid, grid):
        pos_embed = rows(0, from_grid)
        assert not torch.equal(resample_positions(pos_embed, grid, from_grid=from_grid), pos_embed)

    def test_a_turned_grid_gives_the_turned_rows(self):
        pos_embed = rows(0, (3, 8))
        turned = pos_embed.unflatten(1, (3, 8)).transpose(1, 2).flatten(1, 2)
        ours = resample_positions(turned, (5, 2), from_grid=(8, 3), offset=0.1, antialias=False)
        expected = resample_positions(pos_embed, (2, 5), from_grid=(3, 8), offset=0.1, antialias=False)
        torch.testing.assert_close(ours.unflatten(1, (5, 2)).transpose(1, 2).flatten(1, 2), expected)

    def test_the_prefix_passes_as_it_is(self):
        pos_embed = rows(3)
        assert torch.equal(resampled(pos_embed, (4, 9), num_prefix_rows=3)[:, :3], pos_embed[:, :3])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_in_fp32_and_back(self, dtype):
        pos_embed = rows(1).to(dtype)
        result = resampled(pos_embed, (4, 9), num_prefix_rows=1)
        wide = resampled(pos_embed.double(), (4, 9), num_prefix_rows=1)
        assert result.dtype == dtype
        # Computed wider and rounded once: never a whole step of the dtype away.
        torch.testing.assert_close(result, wide.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert (result == wide.to(dtype)).float().mean() > 0.99

    def test_gradcheck(self):
        pos_embed = torch.randn(1, 9, 2, dtype=torch.float64, requires_grad=True)
        options = {"from_grid": (2, 4), "num_prefix_rows": 1}
        assert torch.autograd.gradcheck(lambda x: resample_positions(x, (4, 2), **options), pos_embed)

    def test_autocast_does_not_touch_it(self):
        pos_embed = rows()
        expected = resampled(pos_embed, (4, 9))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(resampled(pos_embed, (4, 9)), expected)

    @pytest.mark.parametrize("offset", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
    def test_compiles_whole_with_gradients_and_any_grid(self, offset, dynamo):
        pos_embed = torch.nn.Parameter(rows(1))

        def run(image):
            options = {"antialias": not offset, "offset": offset}
            return resampled(pos_embed, tuple(image.shape), num_prefix_rows=1, **options).square()

        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
        # torch takes a scale, which the offset needs, as a constant: there, a graph a grid.
        with torch._dynamo.config.patch(error_on_recompile=not offset):
            for grid in ((4, 9), (3, 5)):
                image = torch.empty(grid)
                results = [compiled(image), *torch.autograd.grad(compiled(image).sum(), pos_embed)]
                torch.testing.assert_close(results, [run(image), *torch.autograd.grad(run(image).sum(), pos_embed)])

    @pytest.mark.parametrize(("count", "grid"), [(48, (7, 7)), (1, (1, 1)), (1, (0, 4)), (50, (7, 8))])
    def test_rows_that_are_not_the_grids_are_refused(self, count, grid):
        message = f"has {count} rows, 1 of them .* and the other {count - 1} are no grid of {grid[0]} x {grid[1]}"
        with pytest.raises(ValueError, match=message):
            resample_positions(torch.zeros(1, count, DIM), (4, 4), from_grid=grid, num_prefix_rows=1)


class TestPatchLikeRegisters:
    def test_are_grey_patches_of_horizontal_bands(self):
        pos_embed, bias = torch.randn(1, 64, DIM), torch.randn(DIM)
        registers = patch_like_registers(pos_embed, bias, 4)
        bands = pos_embed.reshape(4, 2 * 8, DIM).mean(1)
        torch.testing.assert_close(registers, (bands + bias)[None])

    @pytest.mark.parametrize("count", [1, 3, 16])
    def test_any_number_and_no_two_alike(self, count):
        registers = patch_like_registers(rows(), torch.randn(DIM), count)
        assert registers.shape == (1, count, DIM)
        assert len(registers[0].unique(dim=0)) == count

    @pytest.mark.parametrize(
        ("rows", "bias", "count", "message"),
        [
            ((49, DIM), (DIM,), 4, r"pos_embed must be \[1, M, C\] and patch_bias \[C\], not of shapes \(49, 12\)"),
            (
                (1, 49, DIM),
                (DIM, 1),
                4,
                r"pos_embed must be \[1, M, C\] and patch_bias \[C\], not of shapes .* \(12, 1\)",
            ),
            ((1, 49, DIM), (DIM,), 0, "num_registers must be a positive int, not 0"),
        ],
    )
    def test_bad_arguments_are_refused(self, rows, bias, count, message):
        with pytest.raises(ValueError, match=message):
            patch_like_registers(torch.zeros(rows), torch.zeros(bias), count)
