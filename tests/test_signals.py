import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from cvt_keras import signals


def test_sigterm_ends_a_command_like_ctrl_c(heard):
    signals.raise_on_sigterm()
    with pytest.raises(KeyboardInterrupt) as stop:
        signal.raise_signal(signal.SIGTERM)
    assert signals.exit_code(stop.value) == 143
    assert signals.exit_code(KeyboardInterrupt()) == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_block(heard, number, capfd):
    with pytest.raises(KeyboardInterrupt), signals.Held("this file"):
        signal.raise_signal(number)
        assert not heard
    assert heard == [number]
    assert "stopping after this file; a second signal (Ctrl-C) stops at once" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):  # the previous handler is back
        signal.raise_signal(number)


def test_answer_calls_the_handler_within_the_block(heard):
    steps = 0
    with pytest.raises(KeyboardInterrupt), signals.Held("this step") as held:
        held.answer()
        signal.raise_signal(signal.SIGTERM)
        steps += 1
        held.answer()
        steps += 1
    assert (heard, steps) == ([signal.SIGTERM], 1)


def test_a_second_signal_does_not_wait(heard):
    with pytest.raises(KeyboardInterrupt), signals.Held("this step"):
        signal.raise_signal(signal.SIGTERM)
        assert not heard
        signal.raise_signal(signal.SIGINT)
    assert heard == [signal.SIGTERM]


def test_a_signal_does_not_hide_an_error_in_the_block(heard):
    with pytest.raises(ZeroDivisionError), signals.Held("this step"):
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError


def test_a_signal_without_a_python_handler_is_not_changed(heard):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with signals.Held("this step"):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_in_another_thread_nothing_happens():
    with ThreadPoolExecutor() as pool:
        assert pool.submit(lambda: signals.Held("this step").__enter__().answer()).result() is None
