"""Ctrl-C and SIGTERM, kept until a good moment."""

import contextlib
import signal
import threading
from collections.abc import Callable


@contextlib.contextmanager
def deferred_interrupt():
    "Inside, Ctrl-C and SIGTERM set the event that is yielded, so that a step is never cut in two."
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def report_on_interrupt(safe: Callable[[], str]):
    "Inside, SIGTERM interrupts as Ctrl-C does; and an interruption, a full disk or a failure at work says `safe()`: what is not lost."
    on_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if on_main else None
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped: {safe()}") from None
    except OSError as e:
        raise OSError(
            e.errno,
            f"{e.strerror or e} ({e.filename or 'while writing'}): {safe()}, once there is room and leave to write",
        ) from e
    except (ArithmeticError, RuntimeError, MemoryError) as e:
        e.add_note(safe())
        raise
    finally:
        if on_main:
            signal.signal(signal.SIGTERM, before)
