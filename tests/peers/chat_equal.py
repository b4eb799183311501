"""Our rendering of chats against transformers' apply_chat_template.

usage: chat_equal.py FOLDER ...

A folder has a tokenizer with its chat template, and chats.json: for each chat its messages, add_generation_prompt, and our
text, or null where we refuse it.
"""

import datetime
import json
import sys
from pathlib import Path

import jinja2
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils


class Fixed(datetime.datetime):
    """The day that our side renders at."""

    @classmethod
    def now(cls, tz=None):
        return cls(2025, 8, 5, 12, tzinfo=tz)


chat_template_utils.datetime = Fixed

equal = refused = 0
for folder in map(Path, sys.argv[1:]):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for chat in json.loads((folder / "chats.json").read_text()):
        try:
            want = tokenizer.apply_chat_template(
                chat["messages"],
                tokenize=False,
                add_generation_prompt=chat["add_generation_prompt"],
            )
        except (jinja2.TemplateError, TypeError) as error:
            assert chat["text"] is None, (folder.name, chat, error)
            refused += 1
            continue
        assert chat["text"] == want, f"{folder.name}: ours\n{chat['text']!r}\ntheirs\n{want!r}"
        equal += 1
print(f"{equal} chats equal, {refused} refused by both")
