"""
Settings for every script: a dataclass holds the defaults, config/*.py files and --key=value arguments override them.

    settings = configurator.parse(TrainConfig, ["config/gsa_small.py", "--learning_rate=3e-4"])   # {"n_layer": 12, ...}

A config file holds plain assignments of literals; it is parsed, never executed. Later arguments win.
"""
import ast
import difflib
import inspect
import sys
from dataclasses import fields


class UserError(Exception):
    """Bad input, with one line for the user. Scripts print it and exit with status 1."""


def _convert(key, value, kind):
    """The value as the field's type: int → float allowed, nothing else is guessed."""
    if isinstance(value, str) and kind is not str:
        try:
            value = {"true": True, "false": False}.get(value.lower(), None) if kind is bool else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = None
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():  # 1e9 is how people write token counts
        value = int(value)
    if type(value) is not kind:
        raise UserError(f"{key} must be {'true or false' if kind is bool else 'of type ' + kind.__name__}")
    return value


def _read(path):
    try:
        source = open(path, encoding="utf-8").read()
    except OSError as e:
        raise UserError(f"cannot read config {path}: {e.strerror}") from None
    try:
        body = ast.parse(source).body
    except SyntaxError as e:
        raise UserError(f"{path}:{e.lineno}: {e.msg}") from None
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # docstring
        try:
            yield node.targets[0].id, ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            raise UserError(f"{path}:{node.lineno}: only plain assignments like n_layer = 12 belong here") from None


def parse(cls, argv):
    """
    cls: a dataclass of str, int, float and bool fields. argv: config files, --key=value, --key value, --flag (bool).
    Returns the given settings only, as a dict of the fields' types. Raises UserError; --help prints cls and exits.
    """
    kinds = {f.name: f.type if isinstance(f.type, type) else eval(f.type, {}) for f in fields(cls)}
    settings = {}

    def put(key, value):
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, 1)
            raise UserError(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        settings[key] = _convert(key, value, kinds[key])
    args = list(argv)
    while args:
        arg = args.pop(0)
        if arg in ("-h", "--help"):
            for c in reversed(cls.__mro__[:-1]):
                print(inspect.getsource(c))
            raise SystemExit(0)
        if not arg.startswith("--"):
            for key, value in _read(arg):
                put(key, value)
            continue
        key, equals, value = arg[2:].partition("=")
        if not equals:
            if kinds.get(key) is bool and (not args or args[0].lower() not in ("true", "false")):
                value = "true"
            elif args and not args[0].startswith("--"):
                value = args.pop(0)
            elif key in kinds:
                raise UserError(f"--{key} needs a value")
        put(key, value)
    return settings


def run(main, argv=None):
    """Call main(argv), turning a UserError into one line on stderr and exit status 1."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
