"""What Inductor asks about the processor is asked while the decoder is captured."""

import threading

import pytest
import torch
from torch._inductor import cpu_vec_isa

from reroute_fx.lowering.inductor import vector_units

CPU = torch.device("cpu")


@pytest.fixture
def asked(monkeypatch):
    """Threads that asked. Their answer comes when `asked.answer` is set."""

    class Asked(list):
        answer = threading.Event()

    found = Asked()

    def pick():
        found.append(threading.current_thread())
        assert found.answer.wait(60)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(vector_units, "_asking", None)
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", pick)
    yield found
    found.answer.set()
    vector_units.wait_for_answer()


def test_it_is_asked_once_by_a_thread_of_its_own(asked):
    for _ in range(3):
        vector_units.ask_early(CPU)
    assert vector_units._asking.is_alive()
    asked.answer.set()
    vector_units.wait_for_answer()
    # Without a compiler the thread ends quietly: the first compilation says what is missing.
    assert not vector_units._asking.is_alive()
    assert asked == [vector_units._asking]
    assert asked[0] is not threading.current_thread()


def test_who_compiles_waits_for_the_answer(asked):
    vector_units.ask_early(CPU)
    compiling = threading.Thread(target=vector_units.wait_for_answer)
    compiling.start()
    compiling.join(0.05)
    assert compiling.is_alive()
    asked.answer.set()
    compiling.join(60)
    assert not compiling.is_alive()


def test_code_for_a_gpu_asks_nothing(asked):
    vector_units.ask_early(torch.device("cuda"))
    vector_units.wait_for_answer()
    assert (asked, vector_units._asking) == ([], None)
