"""sandbox.py: what a generated program can do, and what it cannot. Every probe is bounded."""
import functools
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sandbox
from configurator import UserError

PATIENCE = 20  # seconds for what ends at once; a busy machine may be slow


def machine_allows_it():
    """Asked of util-linux, so that a fault of ours is not taken for the machine's."""
    unshare = shutil.which("unshare")
    user = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    namespaces = ["--mount", "--net", "--ipc", "--pid", "--fork"]
    command = [unshare, *user, *namespaces, "mount", "-t", "tmpfs", "none", "/mnt"]
    return unshare is not None and subprocess.run(command, capture_output=True).returncode == 0


needs_sandbox = pytest.mark.skipif(not machine_allows_it(), reason="no namespaces here")

# Each is a program that ends well only if the wall stands
WALLS = {
    "the rest of the disk is not there": """
        import os
        assert not set(os.listdir("/")) - {"usr", "bin", "lib", "lib64", "tmp", *PREFIX}
        assert not os.path.exists(HERE) and not os.path.exists("/proc/self/mem")
        """,
    "its folder is empty and can be written": """
        import os
        assert os.listdir(".") == [] and not dict(os.environ).keys() - {"LC_CTYPE"}
        open("note", "w").write("x")
        """,
    "the system's files cannot be written": """
        import os
        for folder in ("/usr", "/usr/lib", "/lib", os.path.dirname(os.__file__)):
            try:
                open(folder + "/made_by_a_test", "w")
            except OSError:
                continue
            raise SystemExit(f"{folder} was written")
        """,
    "a local socket cannot be reached": """
        import socket
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            s = socket.socket(socket.AF_INET, kind)
            s.settimeout(1)
            try:
                s.connect(("127.0.0.1", PORT))
            except OSError:
                continue
            raise SystemExit("connected")
        """,
    "few processes can be started": """
        import os, time
        started = 0
        try:
            while started < 30:
                if os.fork() == 0:
                    time.sleep(20)
                    os._exit(0)
                started += 1
        except OSError:
            pass
        assert started < 8
        """,
    "memory ends at half a gigabyte": """
        try:
            bytearray(10 * 10**9)
        except MemoryError:
            ok = True
        assert ok
        """,
    "the disk ends at 16 MB": """
        written = 0
        try:
            for i in range(40):
                with open(f"file{i}", "wb") as f:
                    written += f.write(bytes(2**20))
        except OSError:
            pass
        assert 2**20 < written <= 16 * 2**20
        """,
    "the number of files is limited": """
        made = 0
        try:
            while made < 3000:
                open(str(made), "w").close()
                made += 1
        except OSError:
            pass
        assert 1 < made < 1000
        """,
    "no other process is seen": """
        import os
        assert os.getpid() == 1
        try:
            os.kill(-1, 0)  # signal 0 harms nobody
        except ProcessLookupError:
            ok = True
        assert ok
        """,
    "it has no rights and cannot get any": """
        import ctypes, os
        assert os.getuid() == 65534
        c = ctypes.CDLL(None)
        new_user, new_mounts = 0x10000000, 0x20000
        assert c.unshare(new_user) == c.unshare(new_mounts) == -1
        assert c.mount(b"none", b"/tmp", b"tmpfs", 0, None) == c.chroot(b"/tmp") == -1
        try:
            os.setuid(0)
        except OSError:
            ok = True
        assert ok
        """,
}


@needs_sandbox
@pytest.mark.parametrize("name", WALLS)
def test_wall(name):
    with socket.create_server(("127.0.0.1", 0)) as server:
        constants = {"PORT": server.getsockname()[1], "HERE": os.path.dirname(__file__),
                     "PREFIX": [sys.base_prefix.split("/")[1]]}
        lines = "\n".join(line[8:] for line in WALLS[name].splitlines())
        source = "\n".join(f"{key} = {value!r}" for key, value in constants.items()) + lines
        assert sandbox.passes(source, PATIENCE)


@needs_sandbox
def test_only_a_program_that_reaches_its_end_passes():
    passing = ["x = 1 + 1\nassert x == 2", "print('garbage' * 10**6)", "import sys\nsys.stderr"
               ".write('\\x00' * 10**5)", "# no code", "s = '\ud800'"]
    failing = ["assert 1 + 1 == 3", "exit()", "import os\nos._exit(0)", "this is no code",
               "'''never closed", "input()", "import numpy", "raise SystemExit(0)",
               "import os\nos.closerange(3, 64)", "import os\nos.kill(os.getpid(), 11)\n1 / 0"]
    for programs, expected in ((passing, True), (failing, False)):
        for program in programs:
            assert sandbox.passes(program, PATIENCE) == expected, program


@needs_sandbox
@pytest.mark.parametrize("end", ["while True: pass", "time.sleep(50)",
                                 "if os.fork(): time.sleep(50)\nwhile True: pass"])
def test_a_program_without_an_end_is_ended_and_so_is_what_it_started(end):
    name = f"box{os.getpid()}"
    program = f"import ctypes, os, time\nctypes.CDLL(None).prctl(15, b'{name}')\n{end}"
    began = time.time()
    assert not sandbox.passes(program, 1)
    assert 1 <= time.time() - began < 30
    running = [path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm")]
    assert name not in running and Path("/proc/self/comm").read_text().strip() in running


@needs_sandbox
def test_nothing_is_left_on_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    mounts = Path("/proc/mounts").read_text()
    assert sandbox.passes("open('file', 'w').write('x')", PATIENCE)
    assert list(tmp_path.iterdir()) == []
    assert Path("/proc/mounts").read_text() == mounts


def test_without_walls_nothing_runs(monkeypatch, tmp_path):
    """A sandbox whose first process may make no namespaces, as in many containers."""
    source = Path(sandbox.__file__).read_text()
    assert source.count("    separate(libc)\n") == 1
    weak = tmp_path / "sandbox.py"
    weak.write_text(source.replace("    separate(libc)\n", "    raise OSError(1, 'unshare: no')\n"))
    monkeypatch.setattr(sandbox, "__file__", str(weak))
    mark = tmp_path / "ran"
    for call in (sandbox.check, lambda: sandbox.passes(f"open({str(mark)!r}, 'w')")):
        with pytest.raises(UserError, match="cannot be kept apart .*unshare: no") as error:
            call()
        assert "\n" not in str(error.value)
    assert not mark.exists()


def test_a_full_disk_or_a_python_that_is_gone_is_one_line(monkeypatch):
    for module, name, value in ((sandbox.tempfile, "tempdir", "/nowhere"),
                                (sandbox.sys, "executable", "/nowhere/python")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            for call in (sandbox.check, lambda: sandbox.passes("")):
                with pytest.raises(UserError, match="cannot be kept apart .*nowhere") as error:
                    call()
                assert "\n" not in str(error.value)


@needs_sandbox
def test_pass_at_1_puts_prompt_answer_and_test_together(monkeypatch):
    monkeypatch.setattr(sandbox, "passes", functools.partial(sandbox.passes, seconds=PATIENCE))
    row = {"prompt": "def double(x):\n", "entry_point": "double",
           "test": "def check(f):\n    assert f(2) == 4\n    assert f(0) == 0\n"}
    assert sandbox.pass_at_1(row, ["    return 2 * x\n"]) == {"pass@1": 1.0}
    assert sandbox.pass_at_1(row, ["    return x ** 2\n"]) == {"pass@1": 1.0}
    assert sandbox.pass_at_1(row, ["    return x + 1\n"]) == {"pass@1": 0.0}
