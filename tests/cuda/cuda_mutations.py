"""One-line mistakes in csrc/cuda, for tests/cuda/mutate.py."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """In csrc/cuda/<file>, `new` in place of `old`, which is there once; a driver's tests of `kernel` must notice."""

    kernel: str
    what: str
    old: str
    new: str
    sanitizer: str = "asan"
    file: str = "kv_ops.cu"

    def __str__(self) -> str:
        return f"{self.file}: {self.kernel}{self.kernel and ', '}{self.what}"


MUTATIONS = [
    Mutation("store_kv", "the first slot is not written", "if (slot < 0) return;", "if (slot <= 0) return;"),
    Mutation("store_kv", "a slot of -1 is written", "if (slot < 0) return;", ""),
    Mutation("store_kv", "the values are not written", "blockIdx.y == 0 ? keys : values", "keys"),
    Mutation("store_kv", "the last head is not written", "i < shape.heads * packs", "i < (shape.heads - 1) * packs"),
    Mutation("store_kv", "off-by-one mask of the items", "i < shape.heads * packs", "i <= shape.heads * packs"),
    Mutation("store_kv", "swapped stride of the items", "item * stream.to.item_stride", "item * stream.to.slot_stride"),
    Mutation(
        "store_kv", "swapped stride of the heads", "head * stream.from.head_stride", "head * stream.to.head_stride"
    ),
    Mutation(
        "store_kv",
        "rounded twice",
        "__float2bfloat16_rn(to_float(x))",
        "__float2bfloat16_rn(__half2float(__float2half_rn(to_float(x))))",
    ),
    Mutation(
        "store_kv", "unaligned packs", "return reinterpret_cast<uintptr_t>(data) % 16 == 0;", "return data != nullptr;"
    ),
    Mutation("store_kv", "packs of items that lie apart", "return to.item_stride == 1 && ", "return "),
    Mutation("copy_blocks", "the last word is not copied", "w < words; w +=", "w + 1 < words; w +="),
    Mutation("copy_blocks", "off-by-one mask of the words", "w < words; w +=", "w <= words; w +="),
    Mutation("copy_blocks", "a source of -1 is copied", "if (source < 0) return;", ""),
    Mutation(
        "copy_blocks",
        "chunks overlap and leave gaps",
        "w = blockIdx.z * kThreads + threadIdx.x",
        "w = threadIdx.x * gridDim.z * 2 + blockIdx.z",
    ),
    Mutation(
        "copy_blocks",
        "part and block change places",
        "part + target * pool.block_stride",
        "part + target * pool.part_stride",
    ),
    Mutation(
        "gather_blocks", "no barrier before moves are read", "__syncthreads();  // the moves are here", "", "tsan"
    ),
    Mutation(
        "gather_blocks",
        "no barrier after moves were read",
        "__syncthreads();  // nobody still needs these moves",
        "",
        "tsan",
    ),
    Mutation(
        "gather_blocks",
        "the last move of a batch is not made",
        "i < size; ++i) {\n      if (sources",
        "i < size - 1; ++i) {\n      if (sources",
    ),
    Mutation("gather_blocks", "moves from -1 are made", "if (sources[i] >= 0) visit", "if (sources[i] >= -1) visit"),
    Mutation("gather_blocks", "a move between batches is not made", "start += kThreads", "start += kThreads + 1"),
    Mutation("gather_blocks", "off-by-one mask of the words", "place < pool.part_bytes", "place <= pool.part_bytes"),
    Mutation(
        "gather_blocks",
        "swapped stride of the tables",
        "index / tables.width * tables.stride",
        "index / tables.width * tables.width",
    ),
    Mutation(
        "gather_blocks",
        "off-by-one mask of the entries",
        "index < static_cast<int64_t>(tables.rows) * tables.width;",
        "index <= static_cast<int64_t>(tables.rows) * tables.width;",
    ),
    Mutation(
        "advance", "no barrier before rows look at sequences", "__syncthreads();  // who failed or stopped", "", "tsan"
    ),
    Mutation("advance", "no barrier before sequences look at rows", "__syncthreads();  // who has no room", "", "tsan"),
    Mutation(
        "advance", "no barrier in the sum", "  __syncthreads();\n  int32_t total = 0;", "  int32_t total = 0;", "tsan"
    ),
    Mutation("advance", "the sum of a warp lacks its odd lanes", "offset > 0; offset /= 2", "offset > 1; offset /= 2"),
    Mutation(
        "advance",
        "the last slot is not used",
        "step.positions[r] + 1 >= step.capacities[r]",
        "step.positions[r] + 2 >= step.capacities[r]",
    ),
    Mutation(
        "advance",
        "a slot too many",
        "step.positions[r] + 1 >= step.capacities[r]",
        "step.positions[r] >= step.capacities[r]",
    ),
    Mutation(
        "advance",
        "no room counts for more than a stop token",
        "atomicCAS(&step.state[sequence], kGoing, kNoRoom)",
        "step.state[sequence] = kNoRoom",
    ),
    Mutation("advance", "the draw's counter stands still", "++step.draw_positions[s];", ""),
    Mutation("advance", "the lengths stand still", "++step.lengths[r];", ""),
    Mutation(
        "advance",
        "the slot is that of the token before",
        "slot = block * block_size + position % block_size;",
        "slot = block * block_size + (position - 1) % block_size;",
    ),
    Mutation("advance", "stopped sequences go on", "if (state == kGoing || state == kNoRoom)", "if (state != kFailed)"),
    Mutation(
        "advance",
        "sequences without room never go on",
        "if (state == kGoing || state == kNoRoom)",
        "if (state == kGoing)",
    ),
    Mutation("advance", "a failed draw is taken", "if (token < 0) return kFailed;", ""),
    Mutation("advance", "the last stop token is not looked at", "i < step.stop_width", "i < step.stop_width - 1"),
    Mutation(
        "advance", "swapped stride of the tables", "tables.data[r * tables.stride + ", "tables.data[r * tables.width + "
    ),
    Mutation(
        "",
        "a failed step leaves the stream capturing",
        "if (!finished_) cudaStreamEndCapture(stream_, &graph_);",
        "",
        "asan",
        file="stream_capture.cu",
    ),
    Mutation(
        "",
        "the recorded graph is not destroyed",
        "if (graph_ != nullptr) cudaGraphDestroy(graph_);",
        "",
        "asan",
        file="stream_capture.cu",
    ),
    Mutation(
        "",
        "the executable graph is not destroyed",
        "cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(dead));",
        "(void)dead;",
        "asan",
        file="stream_capture.cu",
    ),
]
