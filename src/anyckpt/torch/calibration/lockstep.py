"""All batches run through a model together, as far as its next layer, and then through that, one after the other.

Each batch's forward pass is the model's own, in a thread that stands still except when it is its turn; so whatever a
model does between layers, hidden states, masks and caches are what they are without calibration.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from anyckpt.errors import UsageError

Call = Callable[[], Any]


class _Given(BaseException):
    """Ends a pass whose result nobody needs."""


class Pass:
    """The forward pass of one batch: runs until a layer is called, and stands there until it is given the output.

    Args:
        forward: the whole pass.
    """

    def __init__(self, forward: Call) -> None:
        self.layer: str | None = None
        self.call: Call = forward
        self._forward = forward
        self._output: Any = None
        self._error: BaseException | None = None
        self._given_up = False
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Run as far as the first layer.

        Raises:
            UsageError: the system lets no more threads be.
        """
        try:
            self._thread.start()
        except RuntimeError as error:
            raise UsageError(
                "more batches are calibrated with than can stand before a layer together",
                found=str(error),
                remedy="raise --calib-batch-size, or lower --num-calib-size",
            ) from error
        self._wait()

    def go_on(self, output: Any) -> None:
        """Run on with the output of the layer before which it stands; ``layer`` is None at the end."""
        self._output = output
        self._mine.release()
        self._wait()

    def give_up(self) -> None:
        """End it where it is."""
        if self._thread.is_alive():
            self._given_up = True
            self._mine.release()
            self._thread.join()

    def stand(self, layer: str, call: Call) -> Any:
        """Called in the pass's own thread where a layer is: its output, which others compute."""
        self.layer, self.call = layer, call
        self._theirs.release()
        self._mine.acquire()
        if self._given_up:
            raise _Given
        output, self._output = self._output, None
        return output

    def _wait(self) -> None:
        self._theirs.acquire()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        _here.value = self
        try:
            with torch.no_grad():
                self._forward()
        except _Given:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.layer = None
            self.call = _nothing
            self._theirs.release()


_here = threading.local()


def _nothing() -> None:
    return None


def run_in_step(
    forwards: Sequence[Call], layers: Mapping[str, nn.Module], through: Callable[[str, list[Pass]], None]
) -> None:
    """Run all forward passes; where they have come to a layer, ``through`` computes its outputs and lets them go on.

    Args:
        forwards: one of each batch.
        layers: modules by name, in which the passes stop.
        through: is called with a layer's name and all passes, each of which has the layer's ``call``.
    """
    passes = [Pass(forward) for forward in forwards]
    try:
        for name, module in layers.items():
            module.forward = _stopping(name, module.forward)
        for one in passes:
            one.start()
        while passes and passes[0].layer is not None:
            through(passes[0].layer, passes)
    finally:
        for one in passes:
            one.give_up()
        for module in layers.values():
            module.__dict__.pop("forward", None)


def _stopping(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def stopped(*args: Any, **options: Any) -> Any:
        there: Pass | None = getattr(_here, "value", None)
        if there is None:
            return forward(*args, **options)
        return there.stand(name, lambda: forward(*args, **options))

    return stopped
