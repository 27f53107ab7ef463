"""
eval.json: the results of an evaluation, kept from one run of eval.py to the next.

    version   VERSION
    model     which model it is, see Subject.facts
    results   {part: what it measured}
    settings  {part: the settings that decided it}
    seconds   {part: how long it took}
    skipped   {part: why it could not be measured}
    summary   {name: number}, the few by which runs are compared
"""
import contextlib
import functools
import json
import os

from configurator import UserError, replacing, to_json
from texts import identify

VERSION = 2  # counted up where a part's result gets another form: older ones are not kept
EVERY_PART = "block_size rope_scaling budget dtype backend"  # settings that matter to each part
FILES = ("haystack", "lambada", "squad", "hotpotqa")  # settings that name a text or a file


class Results:
    """The content of <out_dir>/eval.json. Results of another checkpoint are replaced."""

    def __init__(self, cfg, subject, find_part):
        """find_part: the name of a part -> the part, see eval.PARTS. Raises UserError."""
        self.cfg = cfg
        self.subject = subject
        self.find_part = find_part
        self.identify = functools.cache(identify)  # a file may be long: it is read once
        self.path = os.path.join(cfg.out_dir, "eval.json")
        if not os.access(cfg.out_dir, os.W_OK):
            raise UserError(f"{cfg.out_dir} is read-only, and {self.path} is to be written: "
                            "evaluate a copy of it")
        self.content = {"version": VERSION, "model": as_read(subject.facts()), "results": {},
                        "settings": {}, "seconds": {}, "skipped": {}, "summary": {}}
        self.read()

    def read(self):
        """Take what the file holds, where it is of this model: another eval.py may have added."""
        try:
            with open(self.path, encoding="utf-8") as f:
                found = json.load(f)
            if all(found[name] == self.content[name] for name in ("version", "model")):
                self.content = found
        except (OSError, ValueError, KeyError, TypeError):  # none, damaged, of an older version
            pass

    def settings_of(self, part):
        """The settings on which a part's result depends; of files, what tells them from others."""
        names = f"{EVERY_PART} {part.SETTINGS}".split()
        found = {name: getattr(self.cfg, name) for name in names}
        found |= {"dtype": self.subject.dtype, "block_size": self.subject.T}  # also by default
        if "data" in found:
            found["data"] = [self.identify(name) for name in self.subject.text_names()]
        for name in FILES:
            if found.get(name):
                found[name] = self.identify(found[name])
        return as_read(found)

    def kept(self, name, part):
        """The result of a part, if it was measured with these settings; else None."""
        if self.cfg.again or self.content["settings"].get(name) != self.settings_of(part):
            return None
        return self.content["results"].get(name)

    def put(self, name, part, result, seconds):
        """Keep the result of a part. Returns it as it will be read again."""
        settings = self.settings_of(part)
        with self.changing() as content:
            content["results"][name] = as_read(result)
            content["settings"][name] = settings
            content["seconds"][name] = seconds
            content["skipped"].pop(name, None)
            content["summary"] = {}  # anew: with other settings a part may have had other numbers
            for name_kept in content["results"]:
                content["summary"] |= self.summary_of(name_kept)
            return content["results"][name]

    def summary_of(self, name):
        """{name: number} of the result of a part, without the numbers that are not finite."""
        numbers = as_read(self.find_part(name).summary(self.content["results"][name]))
        return {label: value for label, value in numbers.items() if value is not None}

    def skip(self, name, reason):
        with self.changing() as content:
            content["skipped"][name] = reason

    @contextlib.contextmanager
    def changing(self):
        """The content, to be changed and then written. Another eval.py waits with its change."""
        import fcntl  # POSIX only
        handle = os.open(self.subject.checkpoint["path"], os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self.read()
            yield self.content
            with replacing(self.path) as f:
                f.write(to_json(self.content, indent=1))
        finally:
            os.close(handle)


def as_read(value):
    """A value as it comes back from JSON: keys are strings, what is not finite is None."""
    return json.loads(to_json(value))
