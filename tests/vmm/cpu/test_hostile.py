"""Whatever state a peer sends and whatever bytes a guest executes: the vCPU runs and stops when asked."""

from __future__ import annotations

import random
import time

import pytest

from tests.vmm.cpu.conftest import Box
from vmm.cpu.state import CPU_DESCRIPTION
from vmm.cpu.vcpu import Vcpu
from vmm.errors import VMStateError
from vmm.vmstate import BytesSource, Values, decode

ROUNDS = 150
CODE_AT = 0x10000
CODE_BYTES = 0x10000


def disturb(state: Values, chance: random.Random) -> Values:
    """Every seventh field of the state becomes noise."""
    noise = decode(CPU_DESCRIPTION, BytesSource(chance.randbytes(1817)), 12)
    noise["env.fpregs_format_vmstate"] = 0
    return {name: noise.get(name, old) if chance.random() < 0.15 else old for name, old in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("noisy_state", [False, True], ids=["noise as code", "noise as state too"])
def test_noise_neither_crashes_nor_escapes(box: Box, noisy_state: bool) -> None:
    chance = random.Random(20)
    box.engine.set_port_handlers(lambda port, size: 0, lambda port, size, value: None)
    vcpu = Vcpu(box.engine)
    vcpu.start_thread()
    for _ in range(ROUNDS):
        state = chance.choice([box.real_mode, box.protected_mode, box.long_mode])()
        state["env.eip"] = CODE_AT
        state["env.regs"] = [chance.randrange(2 << 20) for _ in range(16)]
        box.put(CODE_AT, chance.randbytes(CODE_BYTES))
        try:
            box.engine.set_cpu_state(disturb(state, chance) if noisy_state else state)
        except VMStateError:
            continue
        starts = box.engine.counters()[0]
        vcpu.resume()
        while box.engine.counters()[0] == starts:
            time.sleep(0)
        vcpu.request_pause()
        assert vcpu.wait_paused(10)
    assert vcpu.shutdown(10)
