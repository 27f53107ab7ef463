"""
eval.json: the results of an evaluation, kept from one run of eval.py to the next.

    model     which model it is, see Subject.facts
    results   {part: what it measured}
    settings  {part: the settings that decided it}
    seconds   {part: how long it took}
    skipped   {part: why it could not be measured}
    summary   {name: number}, the few by which runs are compared
"""
import json
import os

from configurator import replacing, to_json
from texts import identify

EVERY_PART = "block_size rope_scaling dtype backend"  # settings that matter to each part


class Results:
    """The content of <out_dir>/eval.json. Results of another checkpoint are replaced."""

    def __init__(self, cfg, subject, find_part):
        """find_part: the name of a part -> the part, see eval.PARTS."""
        self.cfg = cfg
        self.subject = subject
        self.find_part = find_part
        self.path = os.path.join(cfg.out_dir, "eval.json")
        facts = as_read(subject.facts())
        self.content = {"model": facts, "results": {}, "settings": {}, "seconds": {},
                        "skipped": {}, "summary": {}}
        try:
            with open(self.path, encoding="utf-8") as f:
                old = json.load(f)
            if old["model"] == facts and set(old) == set(self.content):
                self.content = old
        except (OSError, ValueError, KeyError, TypeError):  # none, damaged, of an older version
            pass

    def settings_of(self, part):
        """The settings on which a part's result depends; of the data what tells it from other."""
        names = f"{EVERY_PART} {part.SETTINGS}".split()
        found = {name: getattr(self.cfg, name) for name in names}
        if "data" in found:
            found["data"] = [identify(name) for name in self.subject.text_names()]
        return as_read(found)

    def kept(self, name, part):
        """The result of a part, if it was measured with these settings; else None."""
        if self.cfg.again or self.content["settings"].get(name) != self.settings_of(part):
            return None
        return self.content["results"].get(name)

    def put(self, name, part, result, seconds):
        """Keep the result of a part. Returns it as it will be read again."""
        content = self.content
        content["results"][name] = as_read(result)
        content["settings"][name] = self.settings_of(part)
        content["seconds"][name] = seconds
        content["skipped"].pop(name, None)
        content["summary"] = {}  # anew: with other settings a part may have had other numbers
        for name_kept, kept in content["results"].items():
            content["summary"] |= self.find_part(name_kept).summary(kept)
        self.write()
        return content["results"][name]

    def skip(self, name, reason):
        self.content["skipped"][name] = reason
        self.write()

    def write(self):
        with replacing(self.path) as f:
            f.write(to_json(self.content, indent=1))


def as_read(value):
    """A value as it comes back from JSON: keys are strings, what is not finite is None."""
    return json.loads(to_json(value))
