"""
Running programs that a model has written, apart from everything else (Linux only).

    passes("assert 1 + 1 == 2")   # -> True: the program ran to its end

Each program is a process of its own, in namespaces of its own:
    files      it sees the Python installation and the system's libraries, read-only, and an empty
               folder in memory, of 16 MB, which is gone afterwards. No home, no /proc, no /dev
    network    one without any interface, not even to this machine
    processes  it sees no other one. All that it has started end with it
    limits     wall time, CPU time, memory, size and number of files, number of processes
    user       without rights; "nobody" where the evaluation runs as root
    input      an empty environment, no arguments; what it prints is thrown away
Where the machine does not allow this, check() refuses; nothing ever runs unprotected.

It does not protect against faults of the Linux kernel, whose system calls are all open to the
program; it does not keep the program from reading what the system's folders hold, from using a CPU
core until its time is over, or from detecting that it is tested and claiming to have passed.
Programs that were written to break out or to cheat belong into a virtual machine.

passes and pass_at_1 are called by tasks of the evaluation (config/humaneval). Run as a script, this
file is the first process of a sandbox.
"""
import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
import tempfile

SECONDS = 3  # as in the HumanEval paper's evaluation, section 2.3, "timeout"
MEGABYTE = 2**20
MEMORY = 512 * MEGABYTE  # address space of each process
DISK = 16 * MEGABYTE
PROCESSES = 8
FILES = 64  # that are open at once
NOBODY = 65534  # user and group id
SYSTEM = ("/usr", "/bin", "/lib", "/lib64")


# --------------------------------------------------------------------------------------------------
# Outside

def run(program, seconds=SECONDS):
    """
    Run a program, a text. Returns whether it came to its end without an error, and what kept the
    sandbox from being set up, "" if nothing did.
    """
    try:
        return run_apart(program, seconds)
    except OSError as e:  # no room for temporary files, no process or file more, no Python
        return False, str(e)


def run_apart(program, seconds):
    """run; raises OSError."""
    # Only a program that reaches its last line can write this: neither exit() nor a crash does
    proof = secrets.token_hex(8).encode()
    reader, writer = os.pipe()
    program += f"\n__import__('os').write({writer}, {proof!r})\n"
    python = os.path.realpath(sys.executable)
    prefix = os.path.realpath(sys.base_prefix)
    with tempfile.TemporaryDirectory() as root:
        command = [python, "-I", "-S", __file__, root, str(seconds), python, prefix]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, pass_fds=[writer], env={}) as process:
            os.close(writer)
            try:
                source = program.encode("utf-8", "replace")
                _, error = process.communicate(source, timeout=seconds + 10)
            except subprocess.TimeoutExpired:  # the watcher has not ended it
                error = b""
            finally:
                process.kill()
    os.set_blocking(reader, False)
    with contextlib.suppress(BlockingIOError), open(reader, "rb", buffering=0) as pipe:
        return pipe.read(100) == proof, error.decode(errors="replace").strip()
    return False, ""


def passes(program, seconds=SECONDS):
    """Does the program come to its end without an error, within the limits? Raises UserError."""
    passed, error = run(program, seconds)
    if error:
        refuse(error)
    return passed


def check():
    """Raise UserError where this machine cannot keep programs apart."""
    if not sys.platform.startswith("linux"):
        refuse("this is not Linux")
    passed, error = run("", 10)
    if not passed:
        refuse(error or "an empty program did not end")


def refuse(reason):
    from configurator import UserError
    raise UserError(f"generated code cannot be kept apart on this machine ({reason}), so it is not "
                    "run: the sandbox needs Linux 5.12 with user namespaces allowed, which "
                    "containers and some distributions switch off")


def pass_at_1(doc, answers):
    """
    HumanEval's score (arXiv 2107.03374) of one answer, for a task's process_results. doc: a row
    with prompt, test (which defines check) and entry_point, the name of the function to be written.
    """
    program = f"{doc['prompt']}{answers[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(passes(program))}


# --------------------------------------------------------------------------------------------------
# Inside: the first process of a sandbox. It sets the walls up, and watches over the program

# from Linux's sched.h, mount.h and prctl.h
# mounts, IPC, processes, network
NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000
NEW_USER = 0x10000000
MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 4096, 16384, 1 << 18, 2, 4
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
READ_ONLY, NO_SUID, NO_DEVICES = 1, 2, 4  # attributes of mount_setattr
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38


def call(function, *arguments):
    """Call a C function. Raises OSError where it fails."""
    if function(*arguments) < 0:
        raise OSError(ctypes.get_errno(), f"{function.__name__}: {os.strerror(ctypes.get_errno())}")


def separate(libc):
    """Namespaces of its own. A user other than root needs one of users to be allowed the rest."""
    user, group = os.getuid(), os.getgid()
    call(libc.unshare, NEW_NAMESPACES | (NEW_USER if user else 0))
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"),
                           ("gid_map", f"{NOBODY} {group} 1")):
            with open(f"/proc/self/{name}", "w") as f:
                f.write(text)


def build(libc, root, prefix):
    """The files that the program sees, in the folder root."""
    def mount(source, target, kind, flags, options=None):
        options = options and options.encode()
        call(libc.mount, source.encode(), target.encode(), kind.encode(), flags, options)
    mount("none", "/", "", MS_REC | MS_PRIVATE)  # what is mounted here is not seen outside
    mount("none", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={DISK},nr_inodes=1000,mode=755")
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SUID | NO_DEVICES, 0, 0, 0)
    for path in (*SYSTEM, prefix):
        inside = root + path
        if os.path.lexists(inside) or path.startswith("/usr/") or not os.path.exists(path):
            continue
        if os.path.islink(path):  # /lib -> usr/lib
            os.symlink(os.readlink(path), inside)
            continue
        os.makedirs(inside)
        mount(path, inside, "", MS_BIND | MS_REC)
        call(libc.syscall, MOUNT_SETATTR, AT_FDCWD, inside.encode(), AT_RECURSIVE, attributes,
             ctypes.sizeof(attributes))
    os.mkdir(f"{root}/tmp")
    os.chmod(f"{root}/tmp", 0o777)


def limit(libc, root, seconds):
    """Lock this process in root, without rights and within the limits."""
    import resource  # POSIX only
    call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL)  # it does not outlive its watcher
    os.chroot(root)  # whose users cannot make namespaces in which they have rights
    os.chdir("/tmp")
    for name, most in (("CPU", seconds), ("AS", MEMORY), ("FSIZE", DISK), ("NOFILE", FILES),
                       ("NPROC", PROCESSES), ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def first(root, seconds, python, prefix):
    """Run the program on standard input. What fails before it begins is told on stderr."""
    libc = ctypes.CDLL(None, use_errno=True)
    separate(libc)
    build(libc, root, prefix)
    nothing = os.open(os.devnull, os.O_WRONLY)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # kept until it is waited for
    program = os.fork()  # the first process of the new namespace: with it, all others there end
    if program == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        try:
            limit(libc, root, seconds)
            errors = os.dup(2)  # closed by the new program
            os.dup2(nothing, 2)
            try:
                os.execve(python, [python, "-I", "-S", "-"], {})
            except OSError as e:
                os.write(errors, f"{python}: {e.strerror}".encode())
        except OSError as e:
            os.write(2, str(e).encode())
        os._exit(1)
    signal.sigtimedwait({signal.SIGCHLD}, seconds)  # its end, or that of its time
    os.kill(program, signal.SIGKILL)  # also of one that has ended, whose number is not yet free
    os.waitpid(program, 0)


if __name__ == "__main__":
    try:
        first(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
    except OSError as e:
        sys.exit(e.strerror or str(e))
