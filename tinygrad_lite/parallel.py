"""One program in several processes, each with a share of the batch; their gradients are added up.

As in torch.nn.parallel.DistributedDataParallel, every process holds the same weights and takes the
same steps; only gradients and a few numbers travel. (Threads would not do: Python's global lock
lets only one of them run Python code at a time.)
"""

import contextlib
import multiprocessing.resource_tracker
import signal
from multiprocessing.pool import ExceptionWithTraceback

import numpy as np


class World:
    """What a process knows of a run: its own `rank`, from 0, and the `world_size`.

    World() stands for a single process. Rank 0 holds a pipe to each other process; each of those
    holds one pipe, to rank 0.
    """

    def __init__(self, rank=0, world_size=1, pipes=()):
        self.rank, self.world_size, self.pipes = rank, world_size, pipes

    def all_reduce(self, array):
        """The sum of `array` over all processes. All of them must call this, with like arrays.

        Rank 0 adds up in rank order, so the sum has the same bits in every process and every run.
        Raises what another process has raised; EOFError or ConnectionResetError if one was killed.
        """
        return self._exchange({"array": np.asarray(array)})["array"]

    def all_reduce_gradients(self, parameters):
        """Replace the .grad of every parameter by its sum over all processes.

        None counts as zero, but stays None if it is None in every process.
        """
        grads = {i: p.grad for i, p in enumerate(parameters) if p.grad is not None}
        for i, total in self._exchange(grads).items():
            parameters[i].grad = total

    def _exchange(self, values):
        """Each process contributes a dict; all get the union, with the arrays of a key added up."""
        if self.rank > 0:
            self.pipes[0].send(values)
            return self.pipes[0].recv()
        for pipe in self.pipes:
            received = pipe.recv()
            if isinstance(received, Exception):
                raise received
            for key, array in received.items():
                # Without asarray, a sum of shape () would be a NumPy scalar.
                values[key] = np.asarray(values.get(key, 0) + array)
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # killed just now; the next recv() reports it
                pipe.send(values)
        return values


def launch(world_size, function, *arguments):
    """Run function(world, *arguments) in world_size processes; return rank 0's result.

    Rank 0 is the calling process, so there the function can change its arguments in place. The
    others are new Python processes. They import the function, which must be defined at the top of
    a module, and get pickled copies of the arguments. An exception in any process ends them all
    and is raised here; EOFError or ConnectionResetError means that one was killed.
    """
    world = World(0, world_size, pipes=[])
    with contextlib.ExitStack() as at_exit:  # however it ends; the last callback runs first
        with contextlib.ExitStack() as when_started:
            if world_size > 1 and hasattr(signal, "pthread_sigmask"):  # not on Windows
                # In a terminal, Ctrl-C reaches every process, and rank 0 then ends the others. So
                # they start with it blocked, and remain so; here it waits until all are started.
                # (The resource tracker, a process of Python's own, would unblock it if it started
                # in between.)
                multiprocessing.resource_tracker.ensure_running()
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                when_started.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
            for rank in range(1, world_size):
                pipe, their_pipe = multiprocessing.Pipe()
                world.pipes.append(pipe)
                theirs = World(rank, world_size, [their_pipe])
                process = multiprocessing.get_context("spawn").Process(target=_work, args=[theirs])
                process.start()
                at_exit.callback(process.join)
                at_exit.callback(process.kill)
                their_pipe.close()  # they have a copy; with ours open, we would not see it close
        world._exchange({"work": (function, arguments)})
        result = function(world, *arguments)
        world.all_reduce(0)  # wait for the others; raises if one of them failed late
        return result


def _work(world):
    """What a process other than rank 0 runs."""
    try:
        function, arguments = world._exchange({})["work"]
        function(world, *arguments)
        world.all_reduce(0)
    except Exception as error:
        with contextlib.suppress(OSError):  # if rank 0 is gone, nobody listens
            world.pipes[0].send(ExceptionWithTraceback(error, error.__traceback__))
