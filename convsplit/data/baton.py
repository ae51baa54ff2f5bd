"""A forward pass that can be stopped: a thread of its own, which runs only while it holds the baton.

Whoever calls `advance` waits until the pass stands still again, so of all passes and their caller exactly one runs at
any time: nothing needs a lock, and the order of all computations is fixed.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

MOST_THREADS = 512  # of all passes: OpenMP gives every thread that computes helpers of its own, which stay as it does


class Abandoned(BaseException):
    """Ends a pass from within; not an `Exception`, which a model may catch."""


class Pass:
    """One run of a function that calls `stop` wherever it may be held up.

    Gradient mode, inference mode, autocast and the default device belong to a thread: the pass takes over those of
    the thread that made it.

    >>> steps = Pass(lambda: [steps.stop(at) for at in "ab"])
    >>> [steps.advance(), steps.advance(), steps.advance()]
    ['a', 'b', None]
    """

    def __init__(self, run: Callable[[], Any], threads: int | None = None) -> None:
        self._run, self._modes, self._threads = run, _modes(), threads
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self._error: BaseException | None = None
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._main,), name="convsplit pass", daemon=True)
        self.at: Any = None  # what it stands at; None while it has not begun and when it has ended
        self.ended = False

    @property
    def begun(self) -> bool:
        """Whether it was ever advanced."""
        return self._thread.ident is not None

    def runs_here(self) -> bool:
        """Whether the calling thread is that of this pass."""
        return threading.get_ident() == self._thread.ident

    def advance(self) -> Any:
        """Go on to the next stop, which is returned; None at the end. An error of the function is raised here."""
        if self.ended:
            return None
        if self.begun:
            self._go.release()
        else:
            self._thread.start()
        self._stands.acquire()
        if self._error is not None:
            raise self._error
        return self.at

    def stop(self, at: Any) -> None:
        """Called within the pass: stand still until the next `advance`."""
        if not self._abandoned:
            self.at = at
            self._stands.release()
            self._go.acquire()
            self.at = None
        if self._abandoned:
            raise Abandoned

    def abandon(self) -> None:
        """End the pass where it stands, or at its next stop, and wait for that."""
        self._abandoned = True
        if self.begun and not self.ended:
            self._go.release()
            self._thread.join()
        self.ended = True

    def _main(self) -> None:
        try:
            with ExitStack() as stack:
                for mode in self._modes:
                    stack.enter_context(mode)
                if self._threads is not None:
                    torch.set_num_threads(self._threads)
                self._run()
        except Abandoned:
            pass
        except BaseException as error:  # raised again where the pass was advanced from
            self._error = error
        finally:
            self.ended = True
            self._stands.release()


def threads_of_each(passes: int) -> int | None:
    """How many threads each pass computes on, so that all together stay below `MOST_THREADS`; None for the usual."""
    usual = torch.get_num_threads()
    allowed = max(1, min(usual, MOST_THREADS // max(1, passes)))
    return None if allowed == usual else allowed


def _modes() -> list[AbstractContextManager[Any]]:
    """What belongs to this thread alone, as contexts for another."""
    modes: list[AbstractContextManager[Any]] = [torch.set_grad_enabled(torch.is_grad_enabled())]
    if torch.is_inference_mode_enabled():
        modes.append(torch.inference_mode())
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            cached = torch.is_autocast_cache_enabled()
            modes.append(torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=cached))
    device = torch.get_default_device()
    if device.type != "cpu":
        modes.append(device)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        modes += [torch.cuda.device(torch.cuda.current_device()), torch.cuda.stream(torch.cuda.current_stream())]
    return modes
