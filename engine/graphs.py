"""CUDA graphs: steps over the batches of an order, captured once for each shape of a batch, then replayed."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fedmoe.engine.ranges import phase
from fedmoe.engine.samples import Loader
from fedmoe.engine.seeds import host_kept, renew_gpu_state

MOST_GRAPHS = 64
"""Of a track; of more, the least recently used is dropped."""


LARGE = 256 * 10**6
"""Bytes of a tensor that is put aside on the host while a step is captured: half of what a plan sets aside for graphs
and workspaces."""


class Track:
    """What of a device one lane's steps use, and nobody else's at the same time: streams for branches, and graphs.

    The graphs share a pool of memory, since they never run at the same time and keep nothing in it. They are captured
    on a stream of the track's own: libraries have a workspace for each stream, which a graph goes on using.
    """

    def __init__(self, device: torch.device, graphs: bool = False) -> None:
        self._gpu = device.type == "cuda"
        self.graphs = graphs and self._gpu
        self._sides: list[torch.cuda.Stream] = []
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None
        self._stream = torch.cuda.Stream(device) if self.graphs else None
        self._kept: OrderedDict[tuple[Replayed, tuple[int, ...]], torch.cuda.CUDAGraph] = OrderedDict()

    def sides(self, count: int) -> list[torch.cuda.Stream]:
        """So many streams beside the current one; none without a GPU."""
        while self._gpu and len(self._sides) < count:
            self._sides.append(torch.cuda.Stream())
        return self._sides[:count]

    def graph(
        self, owner: "Replayed", shape: tuple[int, ...], make: Callable[[], torch.cuda.CUDAGraph]
    ) -> torch.cuda.CUDAGraph:
        """The owner's graph for batches of this shape, made if there is none."""
        key = owner, shape
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > MOST_GRAPHS:
                torch.cuda.synchronize()  # it may still run
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def drop(self, owner: "Replayed | None" = None) -> None:
        """Drop the owner's graphs, or all; none of them may still run."""
        for key in [key for key in self._kept if owner in (None, key[0])]:
            del self._kept[key]
        if self.graphs and not self._kept:
            # PyTorch refuses a pool whose last graph has gone while tensors in it live on, as a library's gradients do.
            self._pool = torch.cuda.graph_pool_handle()

    def captured(
        self, step: Callable[[], None], changing: Sequence[Tensor], restart: Callable[[], None]
    ) -> torch.cuda.CUDAGraph:
        """Capture a step; warming up takes some, so `changing` is put back, and `restart` called, before and after."""
        kept, random = [_aside(tensor) for tensor in changing], torch.cuda.get_rng_state()
        side, current = self._stream, torch.cuda.current_stream()
        assert side is not None
        side.wait_stream(current)
        try:
            with host_kept() as drawn:
                try:
                    with torch.cuda.stream(side):
                        for _ in range(3):
                            step()
                finally:
                    current.wait_stream(side)
                if drawn():
                    raise RuntimeError("its modules draw random numbers on the host, which a graph would repeat")
                restart()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                    step()
            return graph
        except BaseException:
            renew_gpu_state()  # PyTorch leaves it in the state of capturing
            raise
        finally:
            torch.cuda.set_stream(current)  # a capture that fails may leave its own
            torch.cuda.set_rng_state(random)  # or whoever makes a client capture would change its dropout
            for tensor, value in zip(changing, kept, strict=True):
                tensor.copy_(value)
            restart()


def _aside(tensor: Tensor) -> Tensor:
    """A copy, of a large one on the host: once for each shape of a batch, that costs less than the memory."""
    return tensor.to("cpu" if tensor.nbytes > LARGE else tensor.device, copy=True)


class Replayed:
    """Takes steps over the batches of an order: by `take`, or where the track has graphs, by replaying that.

    `take` does one step on indices of samples, of any shape; `changing` is all that it changes and that persists, and
    `restart` sets everything else that it uses to what it is before a client's first step.
    """

    def __init__(
        self,
        take: Callable[[Tensor], None],
        loader: Loader,
        track: Track,
        changing: Sequence[Tensor],
        restart: Callable[[], None],
    ) -> None:
        self._take, self._loader, self._track = take, loader, track
        self._changing, self._restart = changing, restart
        self._able = track.graphs and loader.resident
        self._next = torch.zeros(1, dtype=torch.int64, device=loader.device)  # the batch to come
        self._place = torch.empty(0, dtype=torch.int64)  # [n], of the order, at an address that the graphs know

    @property
    def graphed(self) -> bool:
        """Whether steps are replayed."""
        return self._able

    def run(self, order: Tensor) -> Iterator[None]:  # int64 [steps, ...] on the CPU
        """Take the steps; yields before each."""
        if self._able and (graph := self._graph(order)) is not None:
            for _ in range(len(order)):
                yield
                with phase("step"):
                    graph.replay()
            return
        for indices in order.to(self._loader.device, non_blocking=True) if self._loader.resident else order:
            yield
            with phase("step"):
                self._take(indices)

    def drop(self) -> None:
        """Capture anew from now on."""
        self._track.drop(self)

    def _graph(self, order: Tensor) -> torch.cuda.CUDAGraph | None:
        """The graph for batches of this shape, with the order in place.

        None where a step cannot be captured, as one that makes the host wait: from then on each is taken by itself.
        """
        if order.numel() > self._place.numel():  # seldom, since it costs the graphs
            torch.cuda.synchronize()
            self.drop()
            room = 1 << (order.numel() - 1).bit_length()
            self._place = torch.zeros(room, dtype=torch.int64, device=self._loader.device)
        self._place[: order.numel()].copy_(order.reshape(-1).pin_memory(), non_blocking=True)
        self._next.zero_()
        shape = tuple(order.shape[1:])
        try:
            return self._track.graph(self, shape, lambda: self._captured(shape))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph of this step: {str(error).splitlines()[0]}", stacklevel=2)
            self._able = False
            return None

    def _captured(self, shape: tuple[int, ...]) -> torch.cuda.CUDAGraph:
        size = torch.Size(shape).numel()
        every = self._place[: len(self._place) // size * size].view(-1, *shape)

        def step() -> None:
            self._take(every.index_select(0, self._next)[0])
            self._next.add_(1).remainder_(len(every))  # warming up may take more of them than there are

        return self._track.captured(step, [*self._changing, self._next], self._restart)
