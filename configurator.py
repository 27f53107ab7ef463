"""
What every script shares: settings, one-line errors, and files that are replaced whole.

A dataclass holds a script's settings and their defaults. config/*.py files and --key=value
arguments override them, later ones winning.

    configurator.parse(TrainConfig, ["config/gsa_small.py", "--learning_rate=3e-4"])
    -> {"n_layer": 12, ..., "learning_rate": 0.0003}

A config file holds plain assignments of literals. It is parsed, never executed.
"""
import ast
import contextlib
import difflib
import errno
import inspect
import json
import math
import os
import re
import sys
import textwrap
from dataclasses import MISSING, fields

TRUE_OR_FALSE = {"true": True, "1": True, "false": False, "0": False}


class UserError(ValueError):
    """Bad input, with one line for the user. Scripts print it and exit with status 1."""


# --------------------------------------------------------------------------------------------------
# Settings

def _convert(key, value, kind):
    """
    The value as the field's type. Text is read as a literal; 1 -> 1.0 and 1e9 -> 1000000000
    are allowed, nothing else is guessed.
    """
    if isinstance(value, str) and kind is bool:
        value = TRUE_OR_FALSE.get(value.lower())
    elif isinstance(value, str) and kind is not str:
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = None
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:  # an integer of more than 308 digits
            value = None
    # a token count is often written 1e9
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not kind:
        wanted = "true or false" if kind is bool else f"of type {kind.__name__}"
        raise UserError(f"{key} must be {wanted}")
    return value


def _read(path):
    """A config file, parsed: (its docstring or None, {name: value})."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            source = f.read()
        tree = ast.parse(source)
    except OSError as e:
        hint = f" (a setting is --name=value: --out_dir={path}?)" if os.path.isdir(path) else ""
        raise UserError(f"cannot read config {path}: {e.strerror}{hint}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read config {path}: it is not UTF-8 text") from None
    except SyntaxError as e:
        raise UserError(f"{path}:{e.lineno}: {e.msg}") from None
    except (ValueError, RecursionError, MemoryError):  # NUL bytes, endless brackets
        raise UserError(f"cannot read config {path}: it is not Python") from None
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # docstring
        try:
            (target,) = node.targets  # a = b = 1 has two
            values[target.id] = ast.literal_eval(node.value)
        except (AttributeError, ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise UserError(f"{path}:{node.lineno}: only plain assignments like n_layer = 12 "
                            "belong here") from None
    return ast.get_docstring(tree), values


def parse(cls, argv, doc=None):
    """
    cls: a dataclass of str, int, float, bool, dict and list fields.
    argv: config files, --key=value, --key value, --flag (of a bool), --key value value … (of a
    list, up to the next --key or .py file).
    Returns the given settings only, as a dict of the fields' types.
    Raises UserError; --help prints the settings and exits. doc: what it prints first; by default
    the text at the head of the dataclass's file.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, [arg for arg in argv if arg.endswith(".py")], doc))
        raise SystemExit(0)
    kinds = {f.name: f.type for f in fields(cls)}
    settings = {}

    def put(key, value):
        if key not in kinds:
            raise UserError(f"unknown setting {key!r}{did_you_mean(key, kinds)}")
        settings[key] = _convert(key, value, kinds[key])

    args = list(argv)
    while args:
        arg = args.pop(0)
        if not arg.startswith("--"):
            for key, value in _read(arg)[1].items():
                put(key, value)
            continue
        key, equals, value = arg[2:].partition("=")
        if kinds.get(key) is list:
            value = [value] if equals else []
            while args and not (args[0].startswith("--") or args[0].endswith(".py")):
                value.append(args.pop(0))
            if not value:
                raise UserError(f"--{key} needs a value")
        elif not equals:
            if kinds.get(key) is bool and (not args or args[0].lower() not in TRUE_OR_FALSE):
                value = "true"
            elif args and not args[0].startswith("--"):
                value = args.pop(0)
            elif key in kinds:
                raise UserError(f"--{key} needs a value")
        put(key, value)
    return settings


def help_text(cls, configs=(), doc=None):
    """
    What --help prints: the script's docstring, that of each config file, and the settings of
    the dataclass in groups. A default that a config file changes is shown changed.
    """
    parts = [inspect.cleandoc(doc or sys.modules[cls.__module__].__doc__)]
    changed = {}
    for path in configs:
        doc, values = _read(path)
        parts.append(f"{path}\n{textwrap.indent(doc or '', '  ')}")
        changed.update(values)
    for heading, names in groups(cls).items():
        lines = [f"{heading}:"]
        for name, (default, comment) in names.items():
            value = changed.get(name, default)
            if type(value) is bool:
                value = str(value).lower()
            left = f"  --{name}={value}"
            lines += textwrap.wrap(f"{left:34}  {comment}", 100, subsequent_indent=" " * 36)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def groups(cls):
    """
    The settings of a dataclass as its source groups them: {heading: {name: (default, comment)}}.
    A comment line behind a blank line is a heading. Other comment lines belong to the field
    below them, and a comment behind a field belongs to it. Inherited fields are the group "model".
    """
    found = {}
    seen = set()
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory()
                for f in fields(cls)}
    for owner in cls.__mro__[:-1]:
        heading = "settings" if owner is cls else "model"
        above = []  # comment lines above a field
        after_blank = False
        for line in inspect.getsource(owner).splitlines():
            line = line.strip()
            field = re.match(r"(\w+): \w+ = .*?(?:  # (.*))?$", line)
            if line.startswith("#") and after_blank and owner is cls:
                heading = line[2:]
            elif line.startswith("#"):
                above.append(line[2:])
            elif field and field[1] in defaults:
                name = field[1]
                comment = " ".join(above + [field[2] or ""]).strip()
                above = []
                if name not in seen:  # else a subclass has replaced it
                    seen.add(name)
                    found.setdefault(heading, {})[name] = (defaults[name], comment)
            after_blank = line == ""
    return found


def did_you_mean(name, known):
    """The end of a message about a name that is not known: "; did you mean 'x'?", or nothing."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def listed(text):
    """The items of a setting that is a list in one text: "a, b" -> ["a", "b"]."""
    return [item.strip() for item in text.split(",") if item.strip()]


def flags(argv):
    """The names of the settings that are given as --flags, not by a config file."""
    return {arg[2:].partition("=")[0] for arg in argv if arg.startswith("--")}


def check_ranges(settings, ranges):
    """
    Raise UserError unless every named number of a settings object lies in its range.
    ranges: {(lowest, highest): "name name …"}; highest None = no limit.
    NaN and infinity lie in no range.
    """
    for (lowest, highest), names in ranges.items():
        for name in names.split():
            value = getattr(settings, name)
            too_high = highest is not None and value > highest
            if not math.isfinite(value) or value < lowest or too_high:
                limits = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
                raise UserError(f"{name} is {value}, must be {limits}")


def mismatch(value, shape, where="it"):
    """
    What is wrong with a value that was read from a file, in words; "" if it has the given shape.
    shape: a type;
        {key: shape, …}, a dict with at least these keys;
        [shape], a list;
        None, anything.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where} is not a dict"
        for key, inner in shape.items():
            if key not in value:
                return f"{where} lacks {key!r}"
            if wrong := mismatch(value[key], inner, key):
                return wrong
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is not a list"
        for item in value:
            if wrong := mismatch(item, shape[0], f"an entry of {where}"):
                return wrong
    elif shape is not None and (not isinstance(value, shape)
                                or (shape is int and isinstance(value, bool))):
        return f"{where} is not of type {shape.__name__}"
    return ""


def environment(name, default):
    """A number that torchrun sets: RANK, LOCAL_RANK or WORLD_SIZE."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} is {text!r}, not a number")
    return int(text)


# --------------------------------------------------------------------------------------------------
# Files

@contextlib.contextmanager
def replacing(path, binary=False):
    """
    Open a new file that replaces `path` when the block ends. If the block fails, the old file
    stays. So `path` always holds a whole file.
    """
    partial = f"{path}.partial"
    how = dict(mode="wb") if binary else dict(mode="w", encoding="utf-8")
    try:
        with open(partial, **how) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


def to_json(value, **options):
    """
    json.dumps of a value whose numbers may be NaN or infinite. They become null: JSON has no
    such numbers.
    """
    def finite(x):
        if isinstance(x, dict):
            return {k: finite(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [finite(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps(finite(value), allow_nan=False, **options)


@contextlib.contextmanager
def only_one(folder, script):
    """
    Make the folder and keep other runs of `script` on this machine out of it until the block ends.
    A new folder that is still empty then is removed.
    """
    import fcntl  # POSIX only
    new = not os.path.exists(folder)
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another {script} is at work on {folder}") from None
        yield
    finally:
        if new:
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(folder)
        os.close(handle)


# --------------------------------------------------------------------------------------------------
# Running a script

def duration(seconds):
    """Seconds in words of at most two units: 9.4 -> "9s", 192 -> "3m12s", 7500 -> "2h05m"."""
    seconds = round(seconds)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    if minutes:
        return f"{minutes}m{seconds % 60:02}s"
    return f"{seconds}s"


def say(*words):
    """
    print(), flushed. Where the reader has gone away (… | head -1), the work goes on and the
    rest is not shown.
    """
    try:
        print(*words, flush=True)
    except BrokenPipeError:
        _discard_output()


def _discard_output():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main, argv=None):
    """Call main(argv). An error that a user can mend is one line on stderr and exit status 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal shows \xd7 for ×
    try:
        main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        _discard_output()
        sys.exit(1)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        hint = ". Free some space and run it again" if e.errno == errno.ENOSPC else ""
        sys.exit(f"error: {where}{e.strerror or e}{hint}")
    except (MemoryError, RuntimeError) as e:
        full = ("out of memory", "can't allocate memory")  # torch's words, on a GPU and on a CPU
        if isinstance(e, RuntimeError) and not any(words in str(e) for words in full):
            raise
        sys.exit("error: out of memory: a smaller batch_size or block_size needs less")
