"""A stand-in for CUDA's graphs: operators are noted while captured, and run again on the same memory when replayed.

As on a GPU, what is captured is not run (what it wrote is taken back), a replay reads and writes the very tensors that
were there at capture, and what the host decided then stays decided.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


def tensors_in(*values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def written_by(func, args, kwargs):
    """The tensors that an operator writes into."""
    values = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    writes = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return tensors_in([values[name] for name in writes if name in values])


def is_view(args, kwargs, result):
    """Whether the results lie where arguments do."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(args, kwargs)}
    return all(tensor.untyped_storage().data_ptr() in storages for tensor in tensors_in(result))


class _Tape(TorchDispatchMode):
    """Notes every operator with its arguments and results, and keeps what it overwrites."""

    def __init__(self, graph):
        super().__init__()
        self.graph, self.overwritten = graph, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written = written_by(func, args, kwargs)
        self.overwritten += [(tensor, tensor.clone()) for tensor in written]
        result = func(*args, **kwargs)
        if written or not is_view(args, kwargs, result):
            self.graph.append((func, args, kwargs, None if written else result))
        return result

    def take_back(self):
        for tensor, before in reversed(self.overwritten):
            tensor.copy_(before)


class RecordedGraphs:
    """A ``GraphApi``. `events` says what was asked for, in order."""

    def __init__(self, fails=False):
        self.events, self.fails, self.replaying = [], fails, False

    @contextlib.contextmanager
    def warm_up(self):
        self.events.append("warm up")
        yield
        self.events.append("warmed up")

    def make_graph(self):
        return []

    @contextlib.contextmanager
    def capture(self, graph):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.events.append("capture")
        tape = _Tape(graph)
        with tape:
            yield
        tape.take_back()
        self.events.append("captured")

    def replay(self, graph):
        self.events.append("replay")
        self.replaying = True
        for func, args, kwargs, result in graph:
            again = func(*args, **kwargs)
            if result is not None:
                tree_map(lambda old, new: old.copy_(new) if isinstance(old, torch.Tensor) else old, result, again)
        self.replaying = False

    def reserved(self):
        return 0


class Operators(TorchDispatchMode):
    """The names of operators that run outside of a replay and are more than a view: they allocate or write."""

    def __init__(self, graphs):
        super().__init__()
        self.graphs, self.names = graphs, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.graphs.replaying and (written_by(func, args, kwargs) or not is_view(args, kwargs, result)):
            self.names.append(func._schema.name)
        return result
