# Addresses in device memory, sizes, strides and the stream are integers; csrc/cuda/kv_ops.h says what they mean.
device_type: str

Heads = tuple[int, int, int, int]
Cache = tuple[int, int, int, int, int, int]
Pool = tuple[int, int, int, int, int]
Tables = tuple[int, int, int, int]

def architectures() -> list[int]: ...
def store_kv(
    keys: Heads,
    values: Heads,
    slots: int,
    shape: tuple[int, int, int, int],
    key_cache: Cache,
    value_cache: Cache,
    stream: int,
    /,
) -> None: ...
def copy_blocks(pool: Pool, moves: int, count: int, stream: int, /) -> None: ...
def gather_blocks(pool: Pool, moves: int, count: int, tables: Tables, stream: int, /) -> None: ...
def advance(
    sequences: int,
    rows: int,
    stop_width: int,
    drawn: int,
    stop_tokens: int,
    state: int,
    draw_positions: int,
    sequence_of: int,
    capacities: int,
    input_ids: int,
    positions: int,
    slots: int,
    lengths: int,
    going: int,
    tables: Tables,
    block_size: int,
    stream: int,
    /,
) -> None: ...
