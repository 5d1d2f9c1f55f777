"""Position rows on another grid; agreement with timm is in tests/integrations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitreg_kernels.measure.accuracy import compare
from vitreg_kernels.nn import patch_like_registers
from vitreg_kernels.nn.position import resample_positions

SIDE, DIM = 7, 12
GRIDS = [(4, 4), (7, 5), (9, 14), (1, 1)]


def rows(prefix=0):
    return torch.randn(1, prefix + SIDE * SIDE, DIM)


def dinov2_formula(pos_embed, grid, *, antialias, offset):
    """``interpolate_pos_encoding`` of DINOv2, on a model whose CLS token has a row."""
    patches = pos_embed[:, 1:].reshape(1, SIDE, SIDE, DIM).permute(0, 3, 1, 2)
    scale = tuple(float(n + offset) / SIDE for n in grid)
    target = {"scale_factor": scale} if offset else {"size": grid}
    patches = F.interpolate(patches, mode="bicubic", antialias=antialias, **target)
    assert patches.shape[2:] == grid
    return torch.cat((pos_embed[:, :1], patches.permute(0, 2, 3, 1).reshape(1, -1, DIM)), dim=1)


class TestResamplePositions:
    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize(("antialias", "offset"), [(True, 0.0), (False, 0.1), (False, 0.0)])
    def test_is_dinov2s(self, grid, antialias, offset):
        pos_embed = rows(1)
        options = {"antialias": antialias, "offset": offset}
        exact = dinov2_formula(pos_embed.double(), grid, **options)
        eager = dinov2_formula(pos_embed, grid, **options)
        accuracy = compare(resample_positions(pos_embed, grid, num_prefix_rows=1, **options), exact, eager, terms=16)
        assert accuracy.passed, accuracy

    def test_the_offset_and_the_filter_matter(self):
        pos_embed = rows()
        plain = resample_positions(pos_embed, (4, 4), antialias=False)
        assert (resample_positions(pos_embed, (4, 4), antialias=False, offset=0.1) - plain).abs().max() > 1e-3
        assert (resample_positions(pos_embed, (4, 4), antialias=True) - plain).abs().max() > 1e-2

    @pytest.mark.parametrize("offset", [0.0, 0.1])
    def test_nothing_is_done_where_the_grid_fits(self, offset):
        pos_embed = rows(5)
        assert resample_positions(pos_embed, (SIDE, SIDE), num_prefix_rows=5, offset=offset) is pos_embed

    def test_as_many_patches_in_another_shape_are_another_grid(self):
        pos_embed = torch.randn(1, 36, DIM)
        assert not torch.equal(resample_positions(pos_embed, (4, 9)), pos_embed)

    def test_the_prefix_passes_as_it_is(self):
        pos_embed = rows(3)
        assert torch.equal(resample_positions(pos_embed, (4, 9), num_prefix_rows=3)[:, :3], pos_embed[:, :3])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_in_fp32_and_back(self, dtype):
        pos_embed = rows(1).to(dtype)
        result = resample_positions(pos_embed, (4, 9), num_prefix_rows=1)
        wide = resample_positions(pos_embed.double(), (4, 9), num_prefix_rows=1)
        assert result.dtype == dtype
        # Computed wider and rounded once: never a whole step of the dtype away.
        torch.testing.assert_close(result, wide.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert (result == wide.to(dtype)).float().mean() > 0.99

    def test_gradcheck(self):
        pos_embed = torch.randn(1, 10, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: resample_positions(x, (4, 2), num_prefix_rows=1), pos_embed)

    def test_autocast_does_not_touch_it(self):
        pos_embed = rows()
        expected = resample_positions(pos_embed, (4, 9))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(resample_positions(pos_embed, (4, 9)), expected)

    @pytest.mark.parametrize("offset", [0.0, 0.1])
    def test_compiles_whole_with_gradients_and_any_grid(self, offset, dynamo):
        pos_embed = torch.nn.Parameter(rows(1))

        def run(image):
            options = {"antialias": not offset, "offset": offset}
            return resample_positions(pos_embed, tuple(image.shape), num_prefix_rows=1, **options).square()

        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
        # torch takes a scale, which the offset needs, as a constant: there, a graph a grid.
        with torch._dynamo.config.patch(error_on_recompile=not offset):
            for grid in ((4, 9), (3, 5)):
                image = torch.empty(grid)
                results = [compiled(image), *torch.autograd.grad(compiled(image).sum(), pos_embed)]
                torch.testing.assert_close(results, [run(image), *torch.autograd.grad(run(image).sum(), pos_embed)])

    @pytest.mark.parametrize("count", [48, 1])
    def test_rows_that_are_no_square_are_refused(self, count):
        with pytest.raises(ValueError, match=f"pos_embed has {count} rows, 1 of them for prefix tokens, and the other"):
            resample_positions(torch.zeros(1, count, DIM), (4, 4), num_prefix_rows=1)


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
