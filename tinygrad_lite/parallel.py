"""One program in several processes, each with a share of the batch; their gradients are added up.

As in torch.nn.parallel.DistributedDataParallel, every process holds the same weights and takes the
same steps; only gradients and a few numbers travel. (Threads would not do: Python lets only one of
them run at a time.)
"""

import contextlib
import multiprocessing
import signal
from multiprocessing.pool import ExceptionWithTraceback

import numpy as np


class World:
    """What a process knows of a run: its own `rank`, from 0, and the `world_size`.

    World() is a process alone. Rank 0 has a pipe to every other process, these one to rank 0.
    """

    def __init__(self, rank=0, world_size=1, pipes=()):
        self.rank, self.world_size, self.pipes = rank, world_size, pipes

    def all_reduce(self, array):
        """The sum of `array` over all processes. All of them must call this, with like arrays.

        Rank 0 adds up in rank order, so the sum has the same bits in every process and every run.
        Raises what another process has raised, and EOFError if one was killed.
        """
        return self._add_up({"array": np.asarray(array)})["array"]

    def all_reduce_gradients(self, parameters):
        """Replace the .grad of every parameter by its sum over all processes.

        None counts as zero, but stays None if it is None in every process.
        """
        grads = {i: p.grad for i, p in enumerate(parameters) if p.grad is not None}
        for i, total in self._add_up(grads).items():
            parameters[i].grad = total

    def _add_up(self, arrays):
        """The sums of a dict of arrays; a process may lack some of them."""
        if self.rank > 0:
            self.pipes[0].send(arrays)
            return self.pipes[0].recv()
        for pipe in self.pipes:
            received = pipe.recv()
            if isinstance(received, Exception):
                raise received
            for key, array in received.items():
                arrays[key] = arrays.get(key, 0) + array
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # killed just now, which the next recv() will tell
                pipe.send(arrays)
        return arrays


def launch(world_size, function, *arguments):
    """Run function(world, *arguments) in world_size processes; return what it returns on rank 0.

    Rank 0 is the calling process itself, so there the function may change its arguments in place.
    The others are started afresh: they import the function, which must stand at the top of a
    module, and receive pickled copies of the arguments. An exception in any process ends all of
    them and is raised here; EOFError if one was killed.
    """
    context = multiprocessing.get_context("spawn")
    world = World(0, world_size, pipes=[])
    # In a terminal, Ctrl-C reaches all processes. Rank 0 ends the others, so they must ignore it;
    # a process ignores what was ignored where it was started.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.ExitStack() as at_exit:  # however it ends; the last callback runs first
        at_exit.callback(signal.signal, signal.SIGINT, handler)
        for rank in range(1, world_size):
            pipe, their_pipe = context.Pipe()
            theirs = World(rank, world_size, [their_pipe])
            process = context.Process(target=_work, args=(theirs, function, arguments), daemon=True)
            process.start()
            at_exit.callback(process.join)
            at_exit.callback(process.kill)
            world.pipes.append(pipe)
            their_pipe.close()  # they have a copy; with theirs alone open, the pipe ends with them
        signal.signal(signal.SIGINT, handler)
        result = function(world, *arguments)
        world.all_reduce(0)  # wait for the others, and hear of a late exception
        return result


def _work(world, function, arguments):
    """What a process other than rank 0 runs."""
    try:
        function(world, *arguments)
        world.all_reduce(0)
    except Exception as error:
        with contextlib.suppress(OSError):  # if rank 0 is gone, nobody listens
            world.pipes[0].send(ExceptionWithTraceback(error, error.__traceback__))
