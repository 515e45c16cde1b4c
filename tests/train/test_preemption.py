import os
import signal
import threading

from cmamba_jax.train.preemption import Preemption


def test_sigterm_is_noted_and_the_handler_before_it_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.requested(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested(2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with Preemption() as preemption:
            seen.append((signal.getsignal(signal.SIGTERM) is before, preemption.requested(1)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(True, False)]
