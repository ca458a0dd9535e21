"""What watching a training needs of the kernel and of tqdm."""

import asyncio
from types import SimpleNamespace

import pytest
from tqdm.auto import tqdm

from qlab import live
from qlab.explorers import watch
from qlab.training import Step
from tests.explorers.checks import in_a_cell

pytestmark = pytest.mark.usefixtures("unseen")


def watched():
    return watch([Step(i, 6, 1.0) for i in range(1, 7)], dict)


def test_other_messages_are_handled_between_two_steps():
    run, order = watched(), []

    async def cell():
        async for step in run:
            order.append(step.step)
            asyncio.get_running_loop().call_soon(order.append, f"message {step.step}")

    asyncio.run(cell())
    assert order[:4] == [1, "message 1", 2, "message 2"]


class FakeKernel:
    """What `watch` uses of ipykernel: a message from a widget is handled without a status while an async cell runs."""

    def __init__(self):
        self.parent, self.said = "cell", []

    def get_parent(self, channel):
        return self.parent

    async def dispatch_shell(self, message, *, concurrent=False):
        self.parent = message
        await asyncio.sleep(0)
        self.said.append(("handled", message))

    def _publish_status(self, status, channel, parent=None):
        self.said.append((status, parent or self.parent))


def test_a_message_from_a_widget_is_answered_while_a_cell_trains(monkeypatch):
    kernel = FakeKernel()
    monkeypatch.setattr(live, "get_ipython", lambda: SimpleNamespace(kernel=kernel))
    run = watched()

    async def dispatch(message, concurrent):
        await kernel.dispatch_shell(message, concurrent=concurrent)

    async def cell():
        async for step in run:
            if step.step in (2, 5):  # what arrives now is handled before the next step
                asyncio.get_running_loop().create_task(dispatch(f"message {step.step}", concurrent=step.step == 2))

    asyncio.run(cell())
    assert kernel.said == [("handled", "message 2"), ("idle", "message 2"), ("busy", "cell"), ("handled", "message 5")]
    assert "dispatch_shell" not in vars(kernel)


@pytest.mark.parametrize("shell", [None, SimpleNamespace(), SimpleNamespace(
    kernel=SimpleNamespace(dispatch_shell=lambda message: None))], ids=["none", "no kernel", "an older kernel"])
def test_other_shells_are_left_alone(monkeypatch, shell):
    monkeypatch.setattr(live, "get_ipython", lambda: shell)
    run = watched()
    in_a_cell(tqdm(run, disable=True))
    assert len(run) == 0


def test_tqdm_awaits_the_steps():
    assert hasattr(watched(), "__anext__")  # where older releases of tqdm look
    assert tqdm(watched(), disable=True).iterable_awaitable
