"""llama.cpp, one model and no experts: the floor that the mixture is held against. Needs the extra `bench`."""

import ctypes
import importlib.util
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from decode_burst import Burst
from decode_mixture import Prompts
from decode_traffic import FLOAT16, Traffic
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

from pcm_fast.checkpoint import ModelConfig

ABSENT = "llama_cpp is not installed (make bench installs it): no step of one model to compare with"
ROOM = 256  # positions of a context beyond the prompt


def installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def conditions() -> dict[str, object]:
    """Version, and what the library says it was built for."""
    import llama_cpp

    system = llama_cpp.llama_print_system_info().decode()
    parts = [part.strip() for part in system.replace("CPU :", "|").split("|")]
    flags = [part.partition(" =")[0] for part in parts if part.endswith("= 1")]
    return {"llama-cpp-python": version("llama-cpp-python"), "llama.cpp built with": " ".join(flags) or system}


class LlamaDecoder:
    """One GGUF file in llama.cpp, called through its C interface: reading a token and getting the logits, no draw."""

    def __init__(self, path: Path, config: ModelConfig, prompts: Prompts, new_tokens: int, threads: int) -> None:
        import llama_cpp

        self._api, self._vocabulary = llama_cpp, config.vocab_size
        self._prompts, self._next = prompts, prompts.continuation(new_tokens - 1)
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C holds the pointer
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = prompts.length + ROOM
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        traffic = Traffic(config)
        weights = sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)
        self.step_bytes = weights + traffic.kv_bytes(1, prompts.length, FLOAT16)
        self.flops = traffic.step_flops(1, 1, prompts.length, None)
        self.stored_bytes = 0
        self._read(prompts.prompt(0))  # the file is mapped: now it is in memory

    def run(self, turn: int) -> Burst:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        first = self._read(self._prompts.prompt(turn))
        return Burst([self._read([token]) for token in self._next], first)

    def _read(self, tokens: list[int]) -> float:
        """Seconds to read tokens and get the logits after the last."""
        ids = (self._api.llama_token * len(tokens))(*tokens)
        start = time.perf_counter()
        if self._api.llama_decode(self._context, self._api.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError(f"llama_decode failed on {len(tokens)} tokens")
        pointer = self._api.llama_get_logits_ith(self._context, -1)
        logits = np.ctypeslib.as_array(pointer, shape=(self._vocabulary,))
        seconds = time.perf_counter() - start
        if not np.isfinite(logits[0]):
            raise RuntimeError("llama.cpp: expected finite logits")
        return seconds


def requantised(source: Path, target: Path, kind: str) -> Path:
    """A copy of a GGUF file with all matrices as `kind` ("F32", "BF16", "Q8_0"); vectors and metadata as they are."""
    reader = GGUFReader(source)
    architecture: Any = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for name, item in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":  # the writer's own
            continue
        element = item.types[-1] if item.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, item.contents(), item.types[0], sub_type=element)
    wanted = GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        data, stored = tensor.data, tensor.tensor_type
        if len(tensor.shape) > 1 and stored != wanted:
            data, stored = quants.quantize(quants.dequantize(data, stored), wanted), wanted
        writer.add_tensor(tensor.name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
