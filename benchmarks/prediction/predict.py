"""Predicted time of a kernel from its machine code: counts of instructions by execution unit, and what bounds them.

The model, per multiprocessor and in cycles:

- A program's *busy* cycles on a unit are its instructions (how often each block runs times how many it has) over the
  unit's rate: schedulers, fp32 multiply-add, other arithmetic, exponentials, shared memory, matrix unit.
- A program *alone* takes the sum of these, as if its warps overlapped nothing, plus a barrier's cost at every barrier
  and one latency of device memory for the first loads and for each wait for loads that are not prefetched.
- Resident programs overlap one another perfectly: the multiprocessor needs, for each program, the busiest unit's
  cycles or the program's time alone over the number resident, whichever is more. Where a warp waits for its own
  products only (sm_80), a program counts as many times as a scheduler has warps of it.
- A kernel takes the longest of that, its traffic with device memory at that memory's bandwidth (each tensor once), and
  its loads and stores at the L2's.

It knows no bank conflicts, no clock that drops under load and no traffic jams, so it errs on the fast side for kernels
near the bandwidth of memory; that programs overlap nothing inside errs on the slow side for those near the matrix
unit's rate.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.prediction.gpu import (
    ALU_LANES,
    BARRIER_CYCLES,
    EXP_LANES,
    GPUS,
    L1_CYCLES,
    MAX_BLOCKS,
    MAX_WARPS,
    SHARED_BYTES_PER_CYCLE,
    WARP_SCHEDULERS,
    Gpu,
)
from benchmarks.prediction.sass import MATRIX, Code, Instruction, Path
from vitreg_kernels._triton.launch import Launch
from vitreg_kernels._triton.offline import Resources

WARP = 32
_FMA = {"FFMA", "FADD", "FMUL", "IMAD", "HFMA2", "HMUL2", "HADD2"}
_ALU = {"FMNMX", "FSEL", "FSETP", "IADD3", "VIADD", "LOP3", "LEA", "SHF", "ISETP", "SEL", "F2FP", "PRMT", "MOV", "IABS"}
_ALU |= {"IMNMX", "VIMNMX", "PLOP3", "FMNMX3"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "SHFL", "LDGSTS"}
_GLOBAL = {"LDG", "STG", "LDGSTS"}
_WIDTH = re.compile(r"\.(128|64|U16|U8|S16|S8)\b")
_MATRICES = re.compile(r"\.M88(?:\.(2|4))?\b")
_REGISTER = re.compile(r"\bR\d+\b")
_WGMMA = re.compile(r"HGMMA\.64x(\d+)x(\d+)")
_MMA = re.compile(r"HMMA\.16(8)(\d+)")


class Counts(NamedTuple):
    """What one program does.

    Attributes:
        products: matrix instructions, each warp's.
        flops: of them; 0 on architectures whose instructions do not say.
        exps: exponentials.
        units: cycles of a multiprocessor by execution unit.
        global_bytes: loaded from or stored to the L2, masked lanes included.
        barriers: barriers of the block that it passes.
        waits: times it waits for tokens from device memory with nothing to do meanwhile.
        cached_waits: times it waits for statistics in the L1, likewise.
    """

    products: float
    flops: float
    exps: float
    units: dict[str, float]
    global_bytes: float
    barriers: float
    waits: float
    cached_waits: float


class Prediction(NamedTuple):
    """One kernel on one GPU; nanoseconds are per (batch, head).

    Attributes:
        kernel: its name.
        resources: what the compiler gave it.
        resident: programs a multiprocessor holds at once.
        program: what one program of the most frequent kind does.
        memory_ns, l2_ns, multiprocessor_ns: the three bounds.
        bound_by: the unit or memory that decides.
    """

    kernel: str
    resources: Resources
    resident: int
    program: Counts
    memory_ns: float
    l2_ns: float
    multiprocessor_ns: float
    bound_by: str

    @property
    def ns(self) -> float:
        """Predicted time."""
        return max(self.memory_ns, self.l2_ns, self.multiprocessor_ns)


class Kind(NamedTuple):
    """Programs that do the same.

    Attributes:
        rows: rows of queries or keys that one owns, at least.
        columns: columns that it sweeps or keeps in shared memory.
        number: how many there are a head.
        trips: how often its loops may run: each way is a choice of numbers, any of which a loop may take.
    """

    rows: int
    columns: int
    number: int
    trips: tuple[frozenset[int], ...]


def predict(launch: Launch, resources: Resources, arch: int) -> Prediction:
    """Predicted time of a launch, compiled (``offline.compile_launch``) for an architecture of ``GPUS``.

    Raises:
        ValueError: if the machine code's products cannot be made to agree with those of the launch.
    """
    gpu = GPUS[arch]
    batch, num_heads, _, _ = launch.arguments["query"].pointer.shape
    heads = batch * num_heads
    resident = resident_programs(resources, gpu)
    streams = resident * (1 if gpu.warps_keep_step else resources.num_warps // WARP_SCHEDULERS)
    kinds = _kinds(launch)
    counted = _match(Code(resources.sass).paths(), kinds, launch, resources.num_warps, gpu)
    cycles, bounds = 0.0, Counter()
    for kind, counts in zip(kinds, counted, strict=True):
        waiting = gpu.latency_cycles * counts.waits + L1_CYCLES * counts.cached_waits
        alone = sum(counts.units.values()) + BARRIER_CYCLES * counts.barriers + waiting
        unit = max(counts.units, key=counts.units.__getitem__)
        per_program = max(counts.units[unit], alone / streams)
        cycles += kind.number * per_program
        bounds[unit if per_program == counts.units[unit] else "overlap"] += kind.number * per_program
    # Whole programs on whole multiprocessors: the last round may leave some idle.
    rounds = heads * sum(kind.number for kind in kinds) / gpu.multiprocessors
    multiprocessor_ns = cycles / gpu.clock_ghz / gpu.multiprocessors * math.ceil(rounds) / rounds
    l2_bytes = sum(kind.number * counts.global_bytes for kind, counts in zip(kinds, counted, strict=True))
    memory_bytes = sum(x.nbytes for x in launch.tensors) / heads
    times = {
        "device memory": memory_bytes / gpu.memory_tbps / 1e3,
        "L2": l2_bytes / gpu.l2_tbps / 1e3,
        bounds.most_common(1)[0][0]: multiprocessor_ns,
    }
    return Prediction(
        kernel=launch.kernel.__name__,
        resources=resources,
        resident=resident,
        program=counted[-1],
        memory_ns=times["device memory"],
        l2_ns=times["L2"],
        multiprocessor_ns=multiprocessor_ns,
        bound_by=max(times, key=times.__getitem__),
    )


def resident_programs(resources: Resources, gpu: Gpu) -> int:
    """How many programs of a kernel fit a multiprocessor."""
    registers = math.ceil(resources.registers / 8) * 8 * WARP * resources.num_warps
    shared = resources.shared_bytes + gpu.reserved_bytes
    limits = (gpu.registers // registers, gpu.shared_bytes // shared, MAX_WARPS // resources.num_warps, MAX_BLOCKS)
    return max(min(limits), 1)


def _kinds(launch: Launch) -> list[Kind]:
    """The kinds of programs of a launch: the prefix's own first."""
    constants, sizes = launch.constants, launch.arguments["sizes"]
    tokens = sizes.num_tokens
    block_m, block_n = constants["BLOCK_M"], constants["BLOCK_N"]
    if resident_widths := constants.get("RESIDENT_WIDTHS"):
        # Loops run over the owned tiles; a few left-over rows may have been dealt with before.
        ways = tuple(frozenset({tiles}) for tiles in (tokens // block_m, math.ceil(tokens / block_m)))
        return [Kind(math.ceil(tokens / 16) * 16, sum(resident_widths), 1, ways)]
    prefix, tail = constants["PREFIX"], constants["TAIL"]
    swept = tokens - (sizes.num_prefix if prefix else 0)
    full = (swept - 1) // block_n if tail else swept // block_n
    columns = prefix + full * block_n + tail
    trips = (frozenset({full, max(full - 1, 0)}),)  # compilers peel off an iteration here and there
    tiles = Kind(block_m, columns, math.ceil(swept / block_m), trips)
    return [Kind(prefix, columns, 1, trips), tiles] if prefix else [tiles]


def _match(paths: list[Path], kinds: list[Kind], launch: Launch, num_warps: int, gpu: Gpu) -> list[Counts]:
    """Counts of each kind of program, its loops run as often as its products ask for."""
    name = launch.kernel.__name__
    flops_of_score = 2 * _PRODUCTS[name] * launch.constants["BLOCK_D"]
    matched = []
    for kind in kinds:
        # Either the products are counted, or where instructions do not say their size, the one exponential of a score.
        possible = [
            (counts.flops / flops_of_score if gpu.readable_products else counts.exps / _EXPS.get(name, 1), counts)
            for path in paths
            for trips in kind.trips
            for counts in _assignments(path, trips, num_warps, gpu)
        ]
        planned = kind.rows * kind.columns
        enough = [(scores, counts) for scores, counts in possible if scores >= planned]
        scores, found = min(enough, key=lambda pair: (pair[0], -pair[1].units["arithmetic"]), default=(math.inf, None))
        # Tiles are cut to sizes, and narrow ones computed by several warps alike, so there may be more scores than
        # planned; never fewer.
        if scores > 2.5 * planned:
            raise ValueError(
                f"{name} should compute {planned} scores in a program that owns {kind.rows} rows, "
                f"and its machine code could compute {sorted({round(s) for s, _ in possible})}"
            )
        matrix = max(found.units["matrix"], planned * flops_of_score / _flops_per_cycle(gpu))
        matched.append(found._replace(units={**found.units, "matrix": matrix}))
    return matched


# Matrix products for each score, and exponentials where there is more than one.
_PRODUCTS = {
    "_attention_fwd_kernel": 2,
    "_statistics_fwd_kernel": 1,
    "_attention_bwd_kernel": 7,
    "_attention_bwd_query_kernel": 3,
    "_attention_bwd_key_value_kernel": 4,
}


_EXPS = {"_attention_bwd_kernel": 2}


def _assignments(path: Path, trips: frozenset[int], num_warps: int, gpu: Gpu) -> Iterator[Counts]:
    """Counts with every loop run as often as one of ``trips``, in all ways; those that compute nothing (waits) once."""
    headers = sorted({header for step in path for header in step.loops})
    computing = {header for step in path for i in step.instructions if i.opcode == "MUFU.EX2" for header in step.loops}
    options = [sorted(trips) if header in computing else [1] for header in headers]
    for chosen in itertools.product(*options):
        yield count(path, dict(zip(headers, chosen, strict=True)), num_warps, gpu)


def count(path: Path, trips: dict[int, int], num_warps: int, gpu: Gpu) -> Counts:
    """What a program that takes this path does, each loop running as often as ``trips`` says (by its header)."""
    run: Counter[Instruction] = Counter()
    barriers = 0.0
    for step in path:
        times = math.prod(trips[header] for header in step.loops)
        for instruction in step.instructions:
            run[instruction] += times
            barriers += times * (instruction.name == "BAR")
    warps_by_pool: Counter[str] = Counter()
    shared_bytes = global_bytes = products = flops = exps = 0.0
    for instruction, times in run.items():
        executed, name = times * num_warps, instruction.name
        warps_by_pool["issue"] += executed
        if name == "MUFU":
            warps_by_pool["exp"] += executed
            exps += executed * WARP * (instruction.opcode == "MUFU.EX2")
        warps_by_pool["fma"] += executed * (name in _FMA)
        warps_by_pool["alu"] += executed * (name in _ALU)
        shared_bytes += executed * _bytes(instruction) * (name in _SHARED)
        # Of statistics, the 8 lanes that hold different rows of the same columns load the same.
        global_bytes += (
            executed * _bytes(instruction) * (name in _GLOBAL) / (8 if _is_of_statistics(instruction) else 1)
        )
        products += executed * (name in MATRIX)
        flops += times * _flops(instruction, num_warps)
    units = {
        "exp": warps_by_pool["exp"] * WARP / EXP_LANES,
        "arithmetic": max(
            (warps_by_pool["issue"] - warps_by_pool["exp"]) / WARP_SCHEDULERS,
            warps_by_pool["fma"] * WARP / gpu.fma_lanes,
            warps_by_pool["alu"] * WARP / ALU_LANES,
        ),
        "shared memory": shared_bytes / SHARED_BYTES_PER_CYCLE,
        "matrix": flops / _flops_per_cycle(gpu),
    }
    return Counts(products, flops, exps, units, global_bytes, barriers, *_waits(path, trips))


def _waits(path: Path, trips: dict[int, int]) -> tuple[float, float]:
    """How often a program waits for tokens and for statistics with nothing to do meanwhile.

    That is where a loaded register is used before any matrix instruction has come between. Copies to shared memory are
    waited for before the first product after them, except in loops, where they are prefetched for the next round.
    """
    waits = {False: 0.0, True: 0.0}  # by whether for statistics
    products = 0
    loaded: dict[str, tuple[int, bool]] = {}  # registers on their way: how many products there were before, for what
    copied = 0  # how often the copies on their way are begun
    for step in path:
        times = math.prod(trips[header] for header in step.loops)
        for instruction in step.instructions:
            used = [register for register in _REGISTER.findall(instruction.operands) if register in loaded]
            awaited = {loaded[register][1] for register in used if loaded[register][0] == products}
            if awaited:
                waits[min(awaited)] += times
                loaded.clear()  # the others were begun at the same time
            for register in used:
                loaded.pop(register, None)
            if instruction.name == "LDG":
                first = int(_REGISTER.search(instruction.operands)[0][1:])
                entry = products, _is_of_statistics(instruction)
                loaded |= {f"R{first + i}": entry for i in range(max(_bytes(instruction) // WARP // 4, 1))}
            elif instruction.name == "LDGSTS" and not step.loops:
                copied = times
            elif instruction.name in MATRIX:
                products += 1
                waits[False] += copied
                copied = 0
    return waits[False], waits[True]


def _is_of_statistics(instruction: Instruction) -> bool:
    """Tokens are loaded 16 bytes at a time; narrower loads are of statistics, which kernels read again and again."""
    return instruction.name == "LDG" and ".128" not in instruction.opcode


def _flops_per_cycle(gpu: Gpu) -> float:
    """Of one multiprocessor's matrix unit."""
    return gpu.matrix_tflops * 1e3 / gpu.multiprocessors / gpu.clock_ghz


def _bytes(instruction: Instruction) -> int:
    """Bytes a warp's access moves."""
    if matrices := _MATRICES.search(instruction.opcode):
        return 128 * int(matrices[1] or 1)
    width = _WIDTH.search(instruction.opcode)
    return WARP * {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1, None: 4}[width and width[1]]


def _flops(instruction: Instruction, num_warps: int) -> int:
    """Floating-point operations of all warps of a program."""
    if found := _WGMMA.match(instruction.opcode):
        return num_warps // 4 * 2 * 64 * int(found[1]) * int(found[2])
    if found := _MMA.match(instruction.opcode):
        return num_warps * 2 * 16 * int(found[1]) * int(found[2])
    return 0
