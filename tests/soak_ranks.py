"""
A soak test of a training on two ranks: one rank or a whole machine is lost, also with FSDP2. Two
agents of torchrun here play two machines. It is not part of make test.

    python tests/soak_ranks.py --seed=0      # make soak; about three minutes

The trainings are those of soak_training.py, which also says what is compared.
"""
import contextlib
import glob
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from soak_training import STEPS, assert_same, command, newest_step, records, saves_begun, soak

# gloo meets on the loopback device. Without the second, a machine that is started again waits in
# vain for the address of rank 0: in torch 2.13 rank 0 tells it in the first round only
os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

ONE_MACHINE = ["--standalone", "--nproc_per_node=2"]


def torchrun(machines, out, *more):
    """The command of an agent, which starts the ranks again when one is lost."""
    return [sys.executable, "-m", "torch.distributed.run", *machines, "--max_restarts=3",
            *command(out, *more)[1:]]


def start(argv, output):
    """An agent whose output, and that of its ranks, goes to a file."""
    with open(output, "a") as f:
        return subprocess.Popen(argv, stdout=f, stderr=f)


def ranks_of(agent):
    """The ids of the processes that an agent has started."""
    found = []
    for path in glob.glob(f"/proc/{agent.pid}/task/*/children"):
        found += [int(word) for word in Path(path).read_text().split()]
    return found


def lose(agent):
    """kill -9 of an agent and its ranks, as when a machine loses its power."""
    ranks = ranks_of(agent)
    agent.kill()
    agent.wait()
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for_step(agents, out, step):
    """Wait until a run has a checkpoint at or behind a step."""
    while newest_step(out) < step:
        assert all(agent.poll() is None for agent in agents), "an agent has ended"
        time.sleep(0.05)


def finish(agent, output):
    """Wait for the end of an agent, which must have status 0."""
    status = agent.wait()
    assert status == 0, f"status {status}: {Path(output).read_text()[-2000:]}"


# ---- the parts

def lost_ranks(rng):
    """A rank is killed, then a whole machine, which is started again by the same command."""
    port = rng.randrange(20_000, 30_000)
    argv = torchrun(["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
                     f"--rdzv_endpoint=127.0.0.1:{port}"], "lost")
    agents = [start(argv, "agent0")]
    try:
        time.sleep(4)  # all meet at the first agent: without it a run cannot go on
        agents.append(start(argv, "agent1"))
        # 1. a rank
        wait_for_step(agents, "lost", rng.randrange(5, STEPS // 3))
        os.kill(ranks_of(rng.choice(agents))[0], signal.SIGKILL)
        steps = [newest_step("lost")]
        # 2. the second machine
        wait_for_step(agents, "lost", rng.randrange(STEPS // 2, STEPS * 3 // 4))
        lose(agents[1])
        steps.append(newest_step("lost"))
        agents[1] = start(argv, "agent1")
        for i, agent in enumerate(agents):
            finish(agent, f"agent{i}")
    finally:
        for agent in agents:
            lose(agent)
    assert_same("lost", "two")
    return f"a rank and a machine lost behind steps {steps}; the same bits"


def divided(rng):
    """FSDP2 on two ranks has the losses of DDP, also when a rank is killed within a save."""
    # 1. undisturbed
    finish(start(torchrun(ONE_MACHINE, "fsdp", "--fsdp"), "fsdp.txt"), "fsdp.txt")
    apart = [(x["step"], abs(x["loss"] - y["loss"]))
             for x, y in zip(records("fsdp"), records("two"), strict=True)]
    # later a rounding error may choose another key, and the two drift apart
    half = max(difference for step, difference in apart if step <= STEPS // 2)
    assert half < 1e-5, f"losses differ by {half:.1e}"
    whole = max(difference for _, difference in apart)
    # 2. a rank is killed
    agent = start(torchrun(ONE_MACHINE, "killed", "--fsdp"), "killed.txt")
    try:
        wait_for_step([agent], "killed", rng.randrange(5, STEPS // 2))
        while not saves_begun("killed"):
            assert agent.poll() is None, "the training has ended"
        os.kill(rng.choice(ranks_of(agent)), signal.SIGKILL)
        saving = "within" if saves_begun("killed") else "behind"
        finish(agent, "killed.txt")
    finally:
        lose(agent)
    assert_same("killed", "fsdp")
    return (f"losses differ from DDP's by {half:.1e} up to step {STEPS // 2}, then {whole:.1e}; "
            f"a rank killed {saving} a save: the same bits")


if __name__ == "__main__":
    soak({"lost_ranks": lost_ranks, "divided": divided}, torchrun(ONE_MACHINE, "two"))
