"""One program in several processes: each computes its share of a batch, gradients are added up.

As in torch.nn.parallel.DistributedDataParallel, every process holds the same weights and takes the
same optimizer steps. Only sums travel, through shared memory. Threads would not do: an op takes
some 20 microseconds here, and a thread would wait as long for Python's lock after each.
"""
import multiprocessing.resource_tracker
import signal
import sys
import traceback

import numpy as np

from .optim import flat_gradients, split_like

CHUNK = 2 ** 19  # bytes that a process puts into shared memory at a time


class World:
    """The processes of a run as one of them sees it: its own `rank`, from 0, and `world_size`.

    World() is one process alone.
    """

    def __init__(self, rank=0, world_size=1, pipes=(), buffer=b""):
        self.rank, self.world_size, self._pipes = rank, world_size, pipes
        self._slots = np.frombuffer(buffer, np.uint8).reshape(2, world_size, -1)  # half, rank, byte

    def share(self, items):
        """Every world_size-th of the items: this process's own."""
        return items[self.rank::self.world_size]

    def all_reduce(self, array):
        """The sum of `array` over all processes, all of which must call this. In rank order, so
        that every process gets the same bits. Raises ChildProcessError if one has been killed."""
        array = np.asarray(array)
        if self.world_size == 1:
            return array
        pieces, step = [], CHUNK // array.itemsize
        for start in range(0, array.size, step):
            piece = array.ravel()[start:start + step]
            slots = self._slots[0][:, :piece.nbytes].view(piece.dtype)  # (world_size, n)
            slots[self.rank] = piece
            self.wait_for_all()
            pieces.append(slots.sum(axis=0))
            # Writing goes on in the other half: who comes back to this one knows all have read it.
            self._slots = self._slots[::-1]
        return np.concatenate(pieces).reshape(array.shape)

    def all_reduce_gradients(self, parameters):
        """Replace .grad of every parameter by its sum over all processes; None counts as zero."""
        total = self.all_reduce(flat_gradients(parameters))
        for p, grad in zip(parameters, split_like(total, parameters)):
            p.grad = grad

    def wait_for_all(self):
        """Return once every process has come here; raise what another one raised instead."""
        try:
            for pipe in self._pipes if self.rank == 0 else ():
                if failure := pipe.recv():
                    error, text = failure
                    raise error from RuntimeError(f"in another process:\n{text}")
            for pipe in self._pipes:
                pipe.send(None)
            if self.rank > 0:
                pipe.recv()
        except (EOFError, ConnectionError):  # nobody holds the other end of `pipe` any more
            rank = 0 if self.rank else 1 + self._pipes.index(pipe)
            raise ChildProcessError(f"process {rank} of {self.world_size} was killed; the run has "
                                    f"ended, run it again") from None


def launch(world_size, function, *arguments):
    """Run function(world, *arguments) in world_size processes; return what it returns in rank 0,
    which is this process.

    Where processes start afresh (macOS, Windows), `function` must be defined at the top of a
    module, the arguments must be plain values, and a script needs `if __name__ == "__main__"`. An
    exception in any process ends all and is raised here, ChildProcessError if one was killed.
    """
    if world_size == 1:
        return function(World(), *arguments)
    buffer, processes, pipes = multiprocessing.RawArray("B", 2 * world_size * CHUNK), [], []
    can_mask = hasattr(signal, "pthread_sigmask")  # not on Windows
    if can_mask:  # Ctrl-C waits until all are started; they inherit that, and never see it
        multiprocessing.resource_tracker.ensure_running()  # started later, it would let it in
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        try:
            for rank in range(1, world_size):
                pipe, their_pipe = multiprocessing.Pipe()
                process = multiprocessing.Process(target=_work, daemon=True, args=(
                    rank, world_size, their_pipe, pipe, buffer, np.geterr(), function, arguments))
                process.start()
                their_pipe.close()
                processes.append(process)
                pipes.append(pipe)
        finally:
            if can_mask:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        world = World(0, world_size, pipes, buffer)
        result = function(world, *arguments)
        world.wait_for_all()
        return result
    finally:
        for process in processes:
            process.kill()
            process.join()


def _work(rank, world_size, pipe, parents_pipe, buffer, numpy_errors, function, arguments):
    """The life of a process other than rank 0."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which ends the others
    parents_pipe.close()  # inherited; held open, it would hide that rank 0 is gone
    np.seterr(**numpy_errors)
    world = World(rank, world_size, [pipe], buffer)
    try:
        function(world, *arguments)
        world.wait_for_all()
    except ChildProcessError as error:
        print(error, file=sys.stderr)
    except Exception as error:
        pipe.send((error, traceback.format_exc()))
        pipe.recv()  # nothing comes: rank 0 raises the error and ends this process
