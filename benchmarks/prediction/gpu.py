"""Rates of the GPUs that predictions are made for. None was measured by this project."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """One GPU; "a cycle" is a multiprocessor's clock cycle.

    Attributes:
        name: as in the docs.
        multiprocessors: streaming multiprocessors.
        clock_ghz: clock that the rates below are held at.
        registers: 32-bit registers a multiprocessor.
        shared_bytes: shared memory a multiprocessor; every block takes ``reserved_bytes`` of its own besides.
        reserved_bytes: shared memory the system takes of every block.
        matrix_tflops: dense 16-bit matrix products.
        memory_tbps: bandwidth of device memory.
        l2_tbps: bandwidth from the L2 to the multiprocessors.
        fma_lanes: fp32 multiply-adds a cycle.
        latency_cycles: from a load that misses the L2 to its data.
        warps_keep_step: products are instructions of whole groups of warps, which wait for one another at every tile.
        readable_products: their instructions say how large they are.
    """

    name: str
    multiprocessors: int
    clock_ghz: float
    registers: int
    shared_bytes: int
    reserved_bytes: int
    matrix_tflops: float
    memory_tbps: float
    l2_tbps: float
    fma_lanes: int
    latency_cycles: int
    warps_keep_step: bool
    readable_products: bool


# CUDA C++ Programming Guide, "Arithmetic Instructions" and "Technical Specifications": results a cycle and
# multiprocessor, the same for compute capabilities 8.0, 9.0 and 10.0. A warp scheduler issues one instruction a cycle.
EXP_LANES = 16
ALU_LANES = 64
SHARED_BYTES_PER_CYCLE = 128
WARP_SCHEDULERS = 4
MAX_WARPS = 64
MAX_BLOCKS = 32

# A barrier of a block, from the last arrival to the first instruction after it. An assumption.
BARRIER_CYCLES = 30

# From a load that hits the L1 to its data. An assumption.
L1_CYCLES = 40

# Matrix and memory rates of the H200 are what large products and copies reach on one (about 790 TFLOP/s and 4.3 TB/s,
# the ceilings that the goals were set by); the others' are data-sheet figures. The bandwidth of the L2 and the latency
# under load are assumptions in line with public microbenchmarks. `make gpu` measures copies and products anew.
GPUS: dict[int, Gpu] = {
    80: Gpu("A100 SXM 80 GB", 108, 1.41, 65536, 164 * 1024, 1024, 312.0, 2.0, 4.5, 64, 600, False, True),
    90: Gpu("H200 SXM", 132, 1.85, 65536, 228 * 1024, 1024, 790.0, 4.3, 5.5, 128, 800, True, True),
    100: Gpu("B200 SXM", 148, 1.85, 65536, 228 * 1024, 1024, 2250.0, 8.0, 10.0, 128, 900, True, False),
}
