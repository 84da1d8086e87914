"""One program in several processes, each on its share of a batch; their gradients are added up.

As in torch.nn.parallel.DistributedDataParallel, all hold the same weights and take the same steps.
Only gradients and what is logged travel. Threads would wait for Python's lock after every op."""
import contextlib
import multiprocessing.resource_tracker
import signal
import sys
import traceback

import numpy as np

CHUNK = 2 ** 19  # bytes that a process puts into shared memory at a time


class World:
    """A process's view of a run: its `rank`, from 0, and `world_size`. World() is one alone."""
    def __init__(self, rank=0, world_size=1, pipes=(), buffer=b""):
        self.rank, self.world_size, self._pipes = rank, world_size, pipes  # [(rank, pipe to it)]
        self._slots = np.frombuffer(buffer, np.uint8).reshape(2, world_size, -1)  # (2, rank, byte)

    def share(self, items): return items[self.rank::self.world_size]  # this process's own items

    def all_reduce(self, array):
        """The sum of `array` over all processes, all of which must call this. In rank order, so
        that every process gets the same bits. Raises ChildProcessError if one has been killed."""
        array = np.asarray(array)
        if self.world_size == 1:
            return array
        sums, step = [], CHUNK // array.itemsize
        for piece in np.split(array.ravel(), range(step, array.size, step)):
            self._slots = self._slots[::-1]  # two sets in turn: when one is next, all have read it
            slots = self._slots[0, :, :piece.nbytes].view(piece.dtype)  # (world_size, n)
            slots[self.rank] = piece
            self.wait_for_all()  # until it is written
            sums.append(slots.sum(axis=0))
        return np.concatenate(sums).reshape(array.shape)

    def all_reduce_gradients(self, parameters, log=()):
        """Replace .grad of every parameter by its sum over all processes; None counts as zero.
        Returns the sum of `log`, some numbers, in the parameters' dtype."""
        grads = [np.zeros_like(p.data) if p.grad is None else p.grad for p in parameters]
        total = self.all_reduce(np.concatenate(  # one vector: every sum is a wait
            [*map(np.ravel, grads), np.ravel(log)], dtype=grads[0].dtype))
        *grads, log = np.split(total, np.cumsum([p.size for p in parameters]))
        for p, grad in zip(parameters, grads):
            p.grad = grad.reshape(p.shape)
        return log

    def wait_for_all(self):
        """Return once every process has come here; rank 0 raises what another raised instead."""
        failure = None
        try:
            for rank, pipe in self._pipes if self.rank == 0 else ():
                failure = failure or pipe.recv()
            for rank, pipe in self._pipes if not failure else ():
                pipe.send(None)
            if self.rank > 0:
                pipe.recv()
        except (EOFError, OSError):  # nobody holds the other end of `pipe` any more
            raise ChildProcessError(f"process {rank} of {self.world_size} was killed") from None
        if failure:
            error, text = failure
            raise error from RuntimeError(f"in another process:\n{text}")


def launch(world_size, function, *arguments):
    """Run function(world, *arguments) in world_size processes; return what it returns in this one,
    rank 0. An exception in any ends all and is raised here, ChildProcessError if one was killed.
    Where processes start afresh (macOS, Windows), `function` must stand at the top of a module, and
    take plain values; a script needs `if __name__ == "__main__"`."""
    if world_size == 1:
        return function(World(), *arguments)
    buffer, processes, pipes = multiprocessing.RawArray("B", 2 * world_size * CHUNK), [], []
    try:
        with contextlib.ExitStack() as when_started:
            if hasattr(signal, "pthread_sigmask"):  # not on Windows
                # Ctrl-C waits until all are started; they inherit that, and never see it. Python's
                # resource tracker, if it started among them, would let it in.
                multiprocessing.resource_tracker.ensure_running()
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                when_started.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
            for rank in range(1, world_size):
                pipe, theirs = multiprocessing.Pipe()
                process = multiprocessing.Process(target=_work, daemon=True, args=(
                    rank, world_size, theirs, pipe, buffer, np.geterr(), function, arguments))
                process.start()
                processes.append(process)
                theirs.close()
                pipes.append((rank, pipe))
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
    world = World(rank, world_size, [(0, pipe)], buffer)
    try:
        function(world, *arguments)
        world.wait_for_all()
    except ChildProcessError as error:
        sys.exit(str(error))
    except Exception as error:
        pipe.send((error, traceback.format_exc()))
        pipe.recv()  # nothing comes: rank 0 raises the error and ends this process
