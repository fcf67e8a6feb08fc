"""Preference records -> checked, tokenised pairs -> a fixed schedule of packed rows.

A record is a JSON object with "prompt", "chosen" and "rejected" (see FORMS), optionally "dispersion"
(phi in (0, 1]), "votes" ([for chosen, for rejected]), "scores" (a judge's, [of chosen, of rejected]) and
"rewards" (what else the two are worth).  Strings are used as they are; messages go through the tokenizer's
own chat template.  No token holds parts of both prompt and response; a response's end token is scored, once.

    python data.py pairs.jsonl --model DIR          the data doctor: what is in it, what is wrong, what is scored
"""
import argparse
import contextlib
import csv
import difflib
import faulthandler
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

import mallowspo


class BadData(ValueError):
    """A file or record that cannot be used; the message says where, what was found and what to do."""


class NoPreference(BadData):
    """A record of a known shape that says that neither response is better; it is skipped and counted."""


# ---------------------------------------------------------------------------------------------------------------
# 1. Records

Text = str | list[dict]        # used as it is, or messages: [{"role": ..., "content": ...}, ...]
FORMS = {
    "strings": "prompt, chosen and rejected are texts",
    "dialogues": "chosen and rejected are texts of the whole dialogue; the last 'Assistant:' ends the prompt",
    "messages": "prompt, chosen and rejected are lists of messages; a text stands for a single message",
    "conversations": "chosen and rejected are lists of all messages; the last shared message ends the prompt",
}
TURN = "\n\nAssistant:"        # Anthropic's dialogues: the last one of these ends the prompt
ROLES = ("system", "developer", "user", "assistant", "tool")

# Shapes of well-known data sets: name -> (the columns that identify a record, a function that turns it into
# (prompt, [chosen, rejected]), or (prompt, [chosen, rejected], votes) if it has votes).
SHAPES = {
    "Orca": ("system question chosen rejected", lambda r: (_asked(r["question"], r["system"]), _pair(r))),
    "argilla's Orca": ("system input chosen rejected", lambda r: (_asked(r["input"], r["system"]), _pair(r))),
    "Alpaca": ("instruction chosen rejected", lambda r: (_instruction(r), _pair(r))),
    "Alpaca, two outputs": ("instruction output", lambda r: (_instruction(r), _pair(r, "output"))),
    "stack-exchange": ("question response_j response_k",
                       lambda r: (_asked(r["question"]), _pair(r, "response_j response_k"))),
    "PKU-SafeRLHF": ("prompt response_0 response_1 better_response_id",
                     lambda r: (_asked(r["prompt"]), _pair(r, "response_0 response_1", "better_response_id"))),
    "ShareGPT": ("conversations chosen rejected", lambda r: _sharegpt(r)),
    "SHP": ("history human_ref_A human_ref_B labels score_A score_B",
            lambda r: (_asked(r["history"]), _pair(r, "human_ref_B human_ref_A", "labels"),
                       _pair(r, "score_B score_A", "labels"))),
    "HelpSteer3": ("context response1 response2 overall_preference individual_preference", lambda r: _helpsteer(r)),
}
FORMS |= {name: f"columns {columns}" for name, (columns, _) in SHAPES.items()}
FROM = {"human": "user", "gpt": "assistant"}           # ShareGPT's role names -> ours

# Optional fields of a record: name -> (the flag that uses it, a test of its value, what the value must be).
FIELDS = {
    "dispersion": ("--dispersion field", lambda x: _numbers([x], 1) and 0 < x <= 1, "a number phi with 0 < phi <= 1"),
    "votes": ("--dispersion votes", lambda x: _numbers(x, 2, (int,)) and min(x) >= 0 and 0 < max(x) < 1 << 31,
              "[for chosen, for rejected], two counts, at least one above 0"),
    "scores": ("--dispersion scores", lambda x: _numbers(x, 2), "[of chosen, of rejected], two numbers"),
    "rewards": ("--advantage", lambda x: _numbers(x, 2), "[of chosen, of rejected], two numbers"),
}


class Record(NamedTuple):
    prompt: Text
    chosen: Text                # a string if the prompt is one; else messages, all of them scored
    rejected: Text              # "" if the record has none (sft)
    dispersion: float | None    # phi(x), if the record gives it
    votes: list[int] | None     # how many people preferred [chosen, rejected]
    scores: list[float] | None  # how a judge or a reward model rates [chosen, rejected]
    rewards: list[float] | None  # what else [chosen, rejected] are worth, see mallowspo.advantages
    form: str


def parse(item, need_rejected: bool = True, columns: dict[str, str] | None = None) -> Record:
    """A decoded record -> Record.  columns: our name -> its name in the record.  Raises BadData."""
    if not isinstance(item, dict):
        raise BadData(f"is {_kind(item)}, not an object with prompt, chosen and rejected")
    for ours, theirs in (columns or {}).items():
        if theirs not in item:
            raise BadData(f"has no {theirs!r}, which --columns takes for {ours} (it has {', '.join(map(repr, item))})")
    shape, item = reshape({**item, **{ours: item[theirs] for ours, theirs in (columns or {}).items()}})
    names = ["chosen", "rejected"] if need_rejected or "rejected" in item else ["chosen"]
    if isinstance(item.get("data"), list) and "chosen" not in item:
        raise BadData("holds its records under 'data': write that list alone, as a JSON array")
    found = f"(it has {', '.join(map(repr, item)) or 'nothing'})"
    if (missing := [name for name in ("prompt", *names) if name not in item]) not in ([], ["prompt"]):
        raise BadData(f"has no {missing[0]!r} {found}")
    prompt, *sides = [_text(name, item[name]) if name in item else None for name in ("prompt", *names)]
    if sides[1:] == sides[:1]:
        raise BadData("'chosen' and 'rejected' are the same text: there is no preference to learn")
    try:
        form, prompt, sides = _arrange(prompt, sides)
    except BadData as error:
        raise BadData(f"{error} {found}" if prompt is None else error) from None
    if empty := [name for name, side in zip(names, sides) if not plain(side)]:
        raise BadData(f"{empty[0]!r} is empty")
    return Record(prompt, *[*sides, ""][:2], *_fields(item), shape or form)


def reshape(item: dict) -> tuple[str | None, dict]:
    """The shape whose columns the record has (None: it has our names), and the record with our names."""
    fits = [name for name, (columns, _) in SHAPES.items() if set(columns.split()) <= item.keys()]
    if not fits or {"prompt", "chosen"} <= item.keys():
        return None, item
    if len(fits) > 1:
        raise BadData(f"has the columns of {' and of '.join(fits)} ({', '.join(map(repr, item))}): say which are "
                      "meant with --columns prompt=... chosen=... rejected=...")
    try:
        prompt, (chosen, rejected), *votes = SHAPES[fits[0]][1](item)
    except BadData as error:
        raise type(error)(f"taken for {fits[0]}: {error}") from None
    return fits[0], {**item, "prompt": prompt, "chosen": chosen, "rejected": rejected, **dict(zip(["votes"], votes))}


def _asked(question, system=None) -> list[dict]:
    before = [] if system in (None, "") else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": question}]


def _instruction(record: dict) -> list[dict]:
    parts = [record["instruction"], record.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise BadData(f"'instruction' is {_kind(parts[0])} and 'input' {_kind(parts[1])}, not texts")
    return _asked("\n\n".join(filter(None, parts)))


def _pair(record: dict, columns: str = "chosen rejected", label: str | None = None) -> list:
    """[chosen, rejected] from two columns or one list; label: the column with the index of chosen, 0 or 1."""
    pair = record[columns] if columns in record else [record[name] for name in columns.split()]
    if not isinstance(pair, list) or len(pair) != 2:
        raise BadData(f"{columns!r} is {_kind(pair)}, not [chosen, rejected]")
    if label and record[label] not in (0, 1):
        raise BadData(f"{label!r} is {record[label]!r:.50}, neither 0 nor 1")
    return pair[::-1] if label and record[label] else pair


def _sharegpt(record: dict) -> tuple:
    if not isinstance(record["conversations"], list):
        raise BadData(f"'conversations' is {_kind(record['conversations'])}, not a list of messages")
    messages = [*record["conversations"], record["chosen"], record["rejected"]]
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("from"), str) or "value" not in message:
            raise BadData(f"a message is {_kind(message)}, not one with 'from' and 'value'")
    *prompt, chosen, rejected = [{"role": FROM.get(x["from"], x["from"]), "content": x["value"]} for x in messages]
    return prompt, ([chosen], [rejected])


def _helpsteer(record: dict) -> tuple:
    """Preferences go from -3 (response1) to 3 (response2); every annotator with a preference votes."""
    overall, people = record["overall_preference"], record["individual_preference"] or []
    if not isinstance(people, list) or not all(isinstance(person, dict) for person in people):
        raise BadData(f"'individual_preference' is {people!r:.50}, not a list of objects with 'score'")
    marks = [person.get("score") for person in people]
    if not all(type(mark) is int and -3 <= mark <= 3 for mark in [overall, *marks]):
        raise BadData(f"its preferences are {overall!r:.50} and {marks!r:.50}, not numbers from -3 to 3")
    if overall == 0:
        raise NoPreference("'overall_preference' is 0: no preference")
    votes = [sum(mark < 0 for mark in marks), sum(mark > 0 for mark in marks)]
    order = 1 if overall < 0 else -1
    return (record["context"], [record["response1"], record["response2"]][::order],
            votes[::order] if any(votes) else None)


def _fields(item: dict) -> list:
    """The values of the FIELDS, None for a missing one; UltraFeedback keeps its scores in two columns."""
    rated = [item.get("score_chosen"), item.get("score_rejected")]
    if rated != [None, None] and item.get("scores") is None:
        item = {**item, "scores": rated}
    found = [item.get(name) for name in FIELDS]
    for value, (name, (_, fits, what)) in zip(found, FIELDS.items()):
        if value is not None and not fits(value):
            raise BadData(f"{name!r} is {value!r:.200}, not {what}")
    if item.get("scores") and rated not in ([None, None], item["scores"]):
        raise BadData(f"'scores' is {item['scores']}, but score_chosen and score_rejected are {rated}")
    return found


def _numbers(values, count: int, kinds: tuple[type, ...] = (int, float)) -> bool:
    return isinstance(values, list) and len(values) == count and all(type(x) in kinds and abs(x) < 1e30 for x in values)


def plain(text: Text) -> str:
    return text if isinstance(text, str) else "".join(message["content"] for message in text)


TO_JSON = json.JSONEncoder(ensure_ascii=False).encode


def _text(name: str, value) -> Text:
    """Check a string or a list of messages, and return it; content given as text parts becomes one string."""
    try:
        TO_JSON(value).encode()
    except UnicodeEncodeError:
        raise BadData(f"{name!r} holds half of a surrogate pair (a lone \\ud... escape), which is not a "
                      "character") from None
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise BadData(f"{name!r} is {_kind(value)}, not a string, nor a list of messages")
    messages = []
    for number, message in enumerate(value, 1):
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text"
                                             and isinstance(part.get("text"), str) for part in content):
            content = "".join(part["text"] for part in content)
        if role not in ROLES or not isinstance(content, str):
            raise BadData(f"{name!r}, message {number}: has the role {role!r} and as content "
                          f"{_kind(content)}; the role must be one of {', '.join(ROLES)}, the content a text "
                          f"(it has {', '.join(map(repr, message)) or 'nothing'})")
        messages.append({key: x for key, x in message.items() if x is not None} | {"content": content})
    return messages


def _arrange(prompt: Text | None, sides: list[Text]) -> tuple[str, Text, list[Text]]:
    """The name of the form, the prompt, and the responses without it (all strings, or all messages)."""
    lists = {isinstance(side, list) for side in sides}
    if len(lists) == 2:
        raise BadData("'chosen' and 'rejected' differ in form: one is a string, one is a list of messages")
    if lists == {False}:
        if not isinstance(prompt, list):
            return ("strings", prompt, sides) if prompt is not None else ("dialogues", *_split_dialogues(sides))
        sides = [[{"role": "assistant", "content": side}] for side in sides]
    form, count = "messages", min(map(len, sides)) - (len(sides) == 1)
    if prompt is None or any(side[0]["role"] != "assistant" for side in sides):
        shared = sides[0][:next((i for i, row in enumerate(zip(*sides)) if row[0] != row[-1]), count)]
        if prompt not in (None, shared, *(message["content"] for message in shared)):
            raise BadData("'prompt' is not what the conversations in 'chosen' and 'rejected' both begin with")
        form, prompt, sides = "conversations", shared, [side[len(shared):] for side in sides]
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    asked, *answers = [", ".join(message["role"] for message in part) or "nothing" for part in (prompt, *sides)]
    if asked.endswith(("assistant", "nothing")) or not all(re.fullmatch("assistant(, .*)?", x) for x in answers):
        raise BadData(f"splits into the prompt: {asked}; and the responses: {'; '.join(answers)}; but a "
                      "prompt must end with a message to answer and a response must start with the assistant")
    return form, prompt, sides


def _split_dialogues(sides: list[str]) -> tuple[str, list[str]]:
    """Anthropic's form: both sides hold the whole dialogue and must agree up to the last assistant turn."""
    parts = [text.rpartition(TURN) for text in sides]              # (the dialogue so far, TURN, the response)
    if not all(turn for _, turn, _ in parts):
        raise BadData(f"has no 'prompt', and its responses are not dialogues with {TURN!r} either")
    if parts[0][0] != parts[-1][0]:
        raise BadData(f"has no 'prompt', and its two dialogues differ before the last {TURN!r}")
    return parts[0][0] + TURN, [response for _, _, response in parts]


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"the number {value!r}")


def decode_json(text: bytes, where: str = ""):
    def unique(items):
        if len(dict(items)) < len(items):
            raise ValueError(f"a name appears twice among {', '.join(repr(name) for name, _ in items)}")
        return dict(items)
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique, parse_constant=int)   # int refuses NaN
    except (ValueError, RecursionError) as error:
        kind = "UTF-8" if isinstance(error, UnicodeError) else "JSON"
        raise BadData(f"{where}not {kind} ({error})") from None


# ---------------------------------------------------------------------------------------------------------------
# 2. Files, here or on the Hugging Face hub

LONGEST = 1 << 22, 3 << 24     # max bytes: a record (its tokens take 200 times that), an array (its lists 20)
DENSEST = 50                   # a .gz file may unpack to this many times its size, plus the longest record
BOM = b"\xef\xbb\xbf"
NUMBERS = {*FIELDS, "score_chosen", "score_rejected", "better_response_id", "labels", "score_A", "score_B",
           "overall_preference"}                        # CSV columns that hold JSON, not text
REPO = r"(\w[\w.-]*/[\w.-]+)(?:@([^/]+))?"               # owner/name[@revision]


def read_lines(name: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yield ("file:line", JSON text) of each non-blank line, array item or table row.  Raises BadData."""
    path, number = fetch(name), 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            begin, reader = file.peek(4096).removeprefix(BOM).lstrip(), _lines
            if begin.startswith(b"PAR1"):
                reader = _parquet_rows
            elif ".csv" in path.suffixes:
                reader = _csv_rows
            elif ".json" in path.suffixes and begin.startswith(b"["):
                reader = _items
            for number, text in reader(name, file):
                if len(text) > LONGEST[0]:
                    raise BadData(f"{name}:{number}: longer than {LONGEST[0]:,} bytes; put one record per line")
                if text.strip():
                    yield f"{name}:{number}", text
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadData(f"{name}:{number + 1}: the gzip file is broken ({error})") from None
    except OSError as error:
        raise BadData(f"{name}: {error.strerror or error}") from None


def _lines(name, file, most: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(Number, content) of each line, or, given most, of the whole file.  Stops reading what is too long."""
    read, most = (file.read, most) if most else (file.readline, LONGEST[0])
    packed, size = isinstance(file, gzip.GzipFile), 0
    room = LONGEST[0] + DENSEST * os.fstat(file.fileno()).st_size
    for number, line in enumerate(iter(lambda: read(most + 1), b""), 1):
        size += len(line)
        if len(line) > most:
            raise BadData(f"{name}:{number}: longer than {most:,} bytes; put one record per line")
        if packed and size > room:
            raise BadData(f"{name}:{number}: unpacks to over {DENSEST} times the size of the gzip file; if "
                          "you trust it, unpack it yourself")
        yield number, line.removeprefix(BOM) if number == 1 else line


def _items(name, file) -> Iterator[tuple[int, bytes]]:
    for _, text in _lines(name, file, LONGEST[1]):
        try:
            yield from enumerate((json.dumps(item).encode() for item in decode_json(text)), 1)
        except (BadData, RecursionError) as error:
            raise BadData(f"{name}:1: {error!s:.500}") from None


def _parquet_rows(name, file) -> Iterator[tuple[int, bytes]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise BadData(f"{name}: to read Parquet, pip install pyarrow") from None
    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from enumerate((json.dumps(row, default=str).encode() for row in rows), 1)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadData(f"{name}: the Parquet file is broken ({' '.join(str(error).split()):.300})") from None


def _csv_rows(name, file) -> Iterator[tuple[int, bytes]]:
    """Each row as a JSON object, keyed by the header; the columns NUMBERS hold their values as JSON."""
    csv.field_size_limit(LONGEST[0])
    rows = csv.DictReader((line.decode() for _, line in _lines(name, file)), strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise BadData(f"{name}:{rows.line_num}: does not have as many fields as the header")
            for key in row.keys() & NUMBERS:
                with contextlib.suppress(BadData):      # not JSON: parse will refuse the text
                    row[key] = decode_json(row[key].encode()) if row[key] else None
            yield rows.line_num, json.dumps(row).encode()
    except (csv.Error, UnicodeError) as error:
        raise BadData(f"{name}:{rows.line_num}: not CSV ({error})") from None


def fetch(name: str | Path) -> Path:
    """The path of a data file; hf://datasets/owner/name[@revision]/path is downloaded to the hub's cache.
    Raises BadData if it is not there, or is a folder."""
    match = re.fullmatch(f"hf://datasets/{REPO}/(.+)", str(name))
    if str(name).startswith("hf:") and not match:
        raise BadData(f"{name}: not of the form hf://datasets/owner/name/path, or owner/name@revision/path")
    path = _download(match, repo_type="dataset", allow_patterns=[match[3]]) / match[3] if match else Path(name)
    if not path.exists():
        raise BadData(f"{name}: no such file")
    if path.is_dir():
        raise BadData(f"{name}: a folder; give its files.  If datasets' save_to_disk wrote it, convert it: "
                      "datasets.load_from_disk(folder).to_parquet('pairs.parquet')")
    return path


def find_model(name: str | Path) -> Path:
    """A model's folder: a path, or owner/name[@revision], downloaded to the hub's cache without pickles."""
    match = re.fullmatch(REPO, str(name))
    return Path(name) if Path(name).exists() or not match else _download(
        match, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"], ignore_patterns=["*/*"])


def _download(match: re.Match, **files) -> Path:
    try:
        import huggingface_hub
        return Path(huggingface_hub.snapshot_download(match[1], revision=match[2], **files))
    except Exception as error:                          # network, disk, hub: it can be anything
        raise BadData(f"{match[0]}: not found here, and not fetched from the Hugging Face hub ("
                      f"{type(error).__name__}: {' '.join(str(error).split())[:400]})") from None


# ---------------------------------------------------------------------------------------------------------------
# 3. Tokens

RENDERING = 5.0, 1 << 30       # seconds and bytes that a chat template may use: its author is a stranger


@contextlib.contextmanager
def complaint(what: str):
    """Turn whatever other people's code raises into BadData; a panic in Rust is not even an Exception."""
    try:
        yield
    except (BadData, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise BadData(f"{what} ({type(error).__name__}: {repr(str(error)[:300])[1:-1]})") from None


@contextlib.contextmanager
def bounded(seconds: float, room: int):
    """TimeoutError after so many seconds (in the main thread), MemoryError past `room` more bytes (on Linux).
    Code that no signal interrupts (== of nested lists) ends the process if it takes three times as long."""
    def late(*_):
        raise TimeoutError(f"still running after {seconds} seconds")
    with contextlib.ExitStack() as undo:
        undo.callback(faulthandler.cancel_dump_traceback_later)
        faulthandler.dump_traceback_later(3 * seconds, exit=True, file=2)
        if sys.platform == "linux":
            import resource
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + room
            undo.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
            resource.setrlimit(resource.RLIMIT_AS, (limit if soft < 0 else min(limit, soft), hard))
        if sys.platform != "win32" and threading.current_thread() is threading.main_thread():
            undo.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, late))
            undo.callback(signal.setitimer, signal.ITIMER_REAL, *signal.setitimer(signal.ITIMER_REAL, seconds, 0.1))
        yield


def compile_template(source: str):
    """A chat template in jinja2's sandbox, with the functions and settings that transformers gives it."""
    import jinja2.sandbox

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        def is_safe_attribute(self, obj, attr, value):  # faster for `loop`, with the same answer
            loop = type(obj) is jinja2.runtime.LoopContext and not attr.startswith("_")
            return loop or super().is_safe_attribute(obj, attr, value)

    def raise_exception(message):
        raise jinja2.TemplateError(message)
    world = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    world.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    world.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    # {% generation %} marks what the assistant says; here it becomes {% with %}, which is only a scope.
    template = world.from_string(re.sub(r"(\{%[-+]?\s*(?:end)?)generation\b", r"\1with", source))
    template.globals = dict(template.globals)           # was a ChainMap, slow to copy at each rendering
    return template


def _read(path: Path) -> bytes:
    if path.stat().st_size > LONGEST[1]:
        raise BadData(f"{path}: longer than {LONGEST[1]:,} bytes")
    return path.read_bytes()


def _settings(path: Path) -> dict:
    content = decode_json(_read(path), f"{path}: ") if path.is_file() else {}
    return content if isinstance(content, dict) else {}


class Tokenizer:
    """The tokenizer.json and the chat template of a model folder, always used in the same way."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise BadData(f"{folder}: no tokenizer.json there")
        with complaint(f"{folder}: not a tokenizer"):
            content, settings = _read(folder / "tokenizer.json"), {}
            for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
                if "added_tokens_decoder" not in settings:          # older folders: tokens in the last file
                    settings |= {key: x for key, x in _settings(folder / name).items() if x is not None}
            self.backend = tokenizers.Tokenizer.from_buffer(content)
            self.backend.no_truncation()
            self.backend.no_padding()
            named = {key: token.get("content") if isinstance(token, dict) else token
                     for key, token in settings.items() if key.endswith("_token")}
            self.tokens = {key: token for key, token in named.items() if isinstance(token, str)}  # for templates
            own = folder / "chat_template.jinja"
            template = _read(own).decode() if own.is_file() else settings.get("chat_template")
            if isinstance(template, list):
                template = {x.get("name"): x.get("template") for x in template if isinstance(x, dict)}.get("default")
            self.template = template                    # a string until compiled at first use, or None
            self.eos = self.backend.token_to_id(self.tokens.get("eos_token", ""))
            if self.eos is None:
                ids = settings.get("eos_token_id")
                self.eos = ids[0] if isinstance(ids, list) and ids else ids
            if type(self.eos) is not int or not 0 <= self.eos < 1 << 31 or self.backend.id_to_token(self.eos) is None:
                raise BadData(f"{folder}: no end token: name eos_token in tokenizer_config.json")
            day = datetime.now().strftime("%x") if "strftime" in str(template) else ""
            self.digest = hashlib.sha256(content + json.dumps([settings, template, day]).encode()).hexdigest()
            self._try_out(folder)

    def _try_out(self, folder: Path) -> None:
        """Find out how this tokenizer treats the start of a text, and the text after its added tokens."""
        letter, started = self._encode("a"), self.backend.encode("a").ids
        starts = [started[:i] for i in range(len(started)) if started[i:i + len(letter)] == letter]
        if not letter or not starts:
            raise BadData(f"{folder}: its tokenizer maps 'a' to {letter}, with special tokens to {started}")
        self.bos = starts[0]
        # Some tokenizers put a space before every text, but not before what follows an anchor.
        self.anchor = "" if self.text(letter + self._encode("b")) == "ab" else "\n"
        decoder = self.backend.get_added_tokens_decoder()
        added = {i: token.content for i, token in decoder.items() if token.content.strip()}
        self.ends = {self.eos, *added}                  # one of these ends a turn of a chat
        marks, tails = sorted(added.values(), key=len, reverse=True), ("", "a", "\na")
        found = zip(marks, *(self._encode_all([mark + tail for mark in marks]) for tail in tails))
        anew = [mark for mark, alone, *more in found if more == [alone + self._encode(tail) for tail in tails[1:]]]
        self.mark = re.compile("|".join(map(re.escape, anew)) or "(?!)")     # encoding restarts after these
        self._lead = functools.lru_cache(64)(self._encode)
        self._blank = functools.lru_cache(64)(lambda *ids: not self.text(ids).strip())

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        with complaint("the tokenizer fails"):
            return [found.ids for found in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode(self, text: str) -> list[int]:
        text.encode()                                               # a lone surrogate raises ValueError here
        return self._encode_all([text])[0]

    def text(self, ids) -> str:
        with complaint("the tokenizer fails"):
            return self.backend.decode(list(ids), skip_special_tokens=False)

    def render(self, chat: list[dict], answer: bool) -> str:
        """The text of a chat as transformers renders it; answer: with the start of the assistant's turn.  A
        special token that a message spells out becomes that token, as in transformers.  Raises BadData."""
        with complaint("the chat template fails"), bounded(*RENDERING):
            return self._render(chat, answer)

    def _render(self, chat: list[dict], answer: bool) -> str:
        if self.template is None:
            raise BadData("holds messages, but the tokenizer has no chat template: use a chat model, or strings")
        if isinstance(self.template, str):
            self.template = compile_template(self.template)
        text = self.template.render(messages=chat, tools=None, documents=None, add_generation_prompt=answer,
                                    **self.tokens)
        if len(text) > 1 << 20 and len(text) > (1 << 20) + 8 * len(plain(chat)):
            raise OverflowError(f"{len(text):,} characters from {len(plain(chat)):,}")
        return text

    def prompt(self, text: Text) -> list[int]:
        """Ids of a string, with the tokens that start a text; or of a chat, with the start of the assistant's
        turn (whether a chat begins with a start token is left to the template)."""
        return self._start(self._encode(text)) if isinstance(text, str) else self._encode(self.render(text, True))

    def response(self, text: str) -> list[int]:
        """Ids of a text that continues another one, followed by the end token, exactly once."""
        return self._end(self._continue(text))

    def _continue(self, text: str) -> list[int]:
        return self._encode(self.anchor + text)[len(self._encode(self.anchor)):]

    def _start(self, ids: list[int]) -> list[int]:
        return ids if ids[:len(self.bos)] == self.bos else self.bos + ids

    def _end(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] == [self.eos] else [*ids, self.eos]

    def pairs(self, records: list[Record], thread: ThreadPoolExecutor) -> Callable[[], list[tuple | BadData]]:
        """Start encoding records -> a function that waits for each one's ids (prompt, chosen, rejected), or
        BadData.  Ids must decode to the record's text: exactly for strings; for chats up to white space, as
        some special tokens absorb it.  All chats are rendered within one time limit, and the thread encodes
        all texts in one call; if a record makes that fail, each is done alone."""
        def alone(error):
            if len(records) > 1:
                return [self.pairs([record], thread)()[0] for record in records]
            if "TimeoutError" in str(error):                        # the template is not run again
                self.template = "{{ raise_exception('it takes too long') }}"
            return [BadData(f"{error!s:.500}")]
        thread.submit(bool).result()                    # wait: its memory must not count as the template's
        try:
            with complaint("the chat template fails"), bounded(*RENDERING):
                texts = [self._spell(record) for record in records]
        except BadData as error:
            return functools.partial(alone, error)
        wanted = [[start, *(lead + answer for answer in answers)] for start, lead, *answers in texts]
        encoding = thread.submit(self._encode_all, [*itertools.chain(*wanted)])

        def finish():
            try:
                ids = iter(encoding.result())
                return [self._ids(record, each, [next(ids) for _ in each[1:]]) for record, each in zip(records, texts)]
            except BadData as error:
                return alone(error)
        return finish

    def _spell(self, record: Record) -> list[str]:
        """The prompt, a lead, and the text that each response adds.  A response is encoded after the lead
        (the anchor, or in a chat what follows the prompt's last added token), whose ids are then removed."""
        sides = [side for side in (record.chosen, record.rejected) if side]
        if isinstance(record.prompt, str):
            return [record.prompt, self.anchor, *sides]
        start = self._render(record.prompt, True)
        wholes = [self._render([*record.prompt, *side], False) for side in sides]
        for whole in wholes:
            if start and not (whole.startswith(start) and whole[len(start):].strip()):
                at = max(0, next((i for i, (a, b) in enumerate(zip(start, whole)) if a != b), len(whole)) - 20)
                raise BadData("the chat template is not prefix-stable: where the prompt alone has "
                              f"{start[at:at + 50]!r:.150}, the prompt with a response has "
                              f"{whole[at:at + 50]!r:.150}")
        return [start, self.mark.split(start)[-1], *(whole[len(start):] for whole in wholes)]

    def _ids(self, record: Record, texts: list[str], encoded: list[list[int]]) -> tuple:
        """The ids of a record, with the tokens that start and end a text; BadData if they decode to another.
        A chat's ids are those that transformers makes of the whole chat, if these begin with the prompt's.
        Its response ends with the last added token (<|im_end|>, </s>) if only white space follows that."""
        (start, lead, *answers), (prompt, *sides) = texts, encoded
        chat = isinstance(record.prompt, list)
        if not prompt and (chat or not self.bos):
            raise BadData("'prompt' is empty, and this tokenizer has no token that starts a text")
        before = prompt if chat and lead == start else self._lead(lead)
        for i, ids in enumerate(sides):
            sides[i] = ids[len(before):] if ids[:len(before)] == before else self._continue(answers[i])

        def differ(parts, pieces):
            found, whole = self.text(itertools.chain(*parts)), "".join(pieces)
            return found != whole and not (chat and "".join(found.split()) == "".join(whole.split()))
        if differ([prompt, *sides], [start, *answers]):
            name = "chosen" if differ([prompt, sides[0]], [start, answers[0]]) else "rejected"
            raise BadData(f"the tokens of 'prompt' and {name!r} do not decode to their text: the tokenizer changes or "
                          "drops a character there; move the space or line break at the seam into the response, or "
                          "remove the character")
        for i, ids in enumerate(sides):
            last = next((n for n in range(len(ids), 0, -1) if ids[n - 1] in self.ends), 0)
            sides[i] = ids[:last] if chat and last and self._blank(*ids[last:]) else self._end(ids)
        if sides[1:] == sides[:1]:
            raise BadData("'chosen' and 'rejected' become the same tokens: there is no preference to learn")
        return prompt if chat else self._start(prompt), *[*sides, []][:2]


# ---------------------------------------------------------------------------------------------------------------
# 4. Pairs, and the length policy: too long -> the prompt is cut from the left; a response is never cut

class Pair(NamedTuple):
    prompt: np.ndarray           # int32 token ids
    chosen: np.ndarray           # ends with the end token
    rejected: np.ndarray         # empty if the record has none (sft)
    dispersion: float | None
    where: str                   # file:line
    votes: list[int] | None = None
    scores: list[float] | None = None
    rewards: list[float] | None = None

    def cost(self) -> int:
        """Tokens in a row: the prompt once, each response without its last token, which predicts nothing."""
        return len(self.prompt) + sum(max(0, len(ids) - 1) for ids in (self.chosen, self.rejected))

    def digest(self) -> bytes:
        """A hash of the token ids, 16 bytes."""
        parts = [ids.astype("<i4").tobytes() for ids in (self.prompt, self.chosen, self.rejected)]
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()[:16]


def sampled_tokens(pair: Pair, seed: list[int]) -> list[np.ndarray]:
    """Bool masks of chosen and rejected: of each, as many random tokens as the shorter response has."""
    sides, rng = (pair.chosen, pair.rejected), np.random.default_rng(seed)
    return [rng.permutation(len(ids)) < min(map(len, sides)) for ids in sides]


def differing_tokens(pair: Pair, seed: list[int]) -> list[np.ndarray]:
    """Bool masks: the tokens that the other response lacks, by difflib's longest matching blocks."""
    masks = [np.ones(len(ids), dtype=bool) for ids in (pair.chosen, pair.rejected)]
    matcher = difflib.SequenceMatcher(None, pair.chosen.tolist(), pair.rejected.tolist(), autojunk=False)
    for start, other, size in matcher.get_matching_blocks():
        masks[0][start:start + size] = False
        masks[1][other:other + size] = False
    return masks


# The tokens to which each of mallowspo.TOKEN_WEIGHTS applies.
TOKEN_MASKS = {"decay": lambda pair, seed: [np.ones(len(ids), dtype=bool) for ids in (pair.chosen, pair.rejected)],
               "sample": sampled_tokens, "difference": differing_tokens}


class Dataset(NamedTuple):
    pairs: list[Pair]
    cut: int                     # pairs whose prompt was cut
    dropped: int                 # pairs that do not fit
    bad: int                     # records skipped with skip_bad
    ties: int = 0                # records without a preference
    forms: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = (f"{' and '.join(self.forms)}; kept {len(self.pairs):,} pairs, {self.cut:,} with the prompt cut; "
                f"dropped {self.dropped:,} too long")
        for count, what in ((self.ties, "without a preference"), (self.bad, "bad records")):
            text += f", skipped {count:,} {what}" if count else ""
        return text


def read_columns(words: list[str] | None) -> dict[str, str]:
    """The words after --columns -> {our name: theirs}.  Raises BadData."""
    columns = dict(word.partition("=")[::2] for word in words or ())
    for ours, theirs in columns.items():
        if ours not in ("prompt", "chosen", "rejected", *FIELDS) or not theirs:
            raise BadData(f"--columns {' '.join(words)}: each must be OURS=THEIRS, with ours one of prompt, chosen, "
                          f"rejected, {', '.join(FIELDS)}")
    return columns


def read_records(names, need_rejected: bool, columns: dict[str, str] | None) -> Iterator[tuple]:
    """Yield (file:line, Record or the BadData it raised); if a file cannot be read, (None, BadData) last."""
    try:
        for where, line in itertools.chain.from_iterable(map(read_lines, names)):
            try:
                record = parse(decode_json(line), need_rejected, columns)
            except NoPreference as error:
                record = error
            except (BadData, RecursionError) as error:              # RecursionError: thousands of brackets
                record = BadData(f"{error!s:.500}")
            yield where, record
    except BadData as error:
        yield None, error


def read_pairs(names, tokenizer: Tokenizer | None, need_rejected: bool = True,
               columns: dict[str, str] | None = None) -> Iterator[tuple]:
    """Yield (file:line, Record, (prompt, chosen, rejected)), the last as ids, without a tokenizer as texts;
    or (file:line, BadData, None).  names: one file or a list.  Raises BadData if a file cannot be read."""
    records = read_records([names] if isinstance(names, str | Path) else names, need_rejected, columns)

    def begin(block):
        good = [record for _, record in block if isinstance(record, Record)]
        if tokenizer is None:
            return block, lambda: [tuple(map(plain, record[:3])) for record in good]
        return block, tokenizer.pairs(good, thread)

    with ThreadPoolExecutor(1) as thread:               # encodes a block while the previous one is checked
        blocks = map(begin, iter(lambda: list(itertools.islice(records, 64)), []))
        for (block, finish), _ in itertools.pairwise(itertools.chain(blocks, [None])):  # the next one is begun
            found = iter(finish())
            for where, record in block:
                if where is None:
                    raise record
                ids = next(found) if isinstance(record, Record) else record
                yield (where, ids, None) if isinstance(ids, BadData) else (where, record, ids)


def truncate_prompt(ids, bos: list[int], max_tokens: int) -> list[int] | None:
    """The prompt of (prompt, chosen, rejected), cut from the left if need be; None if it cannot fit."""
    prompt, room = ids[0], max_tokens - max(len(ids[1]), len(ids[2]))
    if room < len(bos) + 1:
        return None
    start = bos if prompt[:len(bos)] == bos else []
    return prompt if len(prompt) <= room else start + prompt[len(start) - room:]


def load_pairs(names: str | Path | list, tokenizer: Tokenizer, max_tokens: int, max_dropped: float = 0.1,
               skip_bad: bool = False, need_rejected: bool = True, needed: tuple[str, ...] = (),
               columns: tuple[str, ...] | None = None, watch: Callable = iter) -> Dataset:
    """Read, check and tokenise one or several files of records.

    max_tokens bounds prompt + response; a record without the fields `needed` (for example "votes") is bad;
    columns is what read_columns takes; watch wraps the iterator over the records, to report progress.
    Raises BadData with file and line at the first bad record (skip_bad counts them instead), if more than the
    share max_dropped of the pairs do not fit, and if no pair is left.
    """
    names = [names] if isinstance(names, str | Path) else names
    pairs, dropped, forms, tally = [], [], {}, Counter()
    for where, record, ids in watch(read_pairs(names, tokenizer, need_rejected, read_columns(columns))):
        missing = [name for name in needed if getattr(record, name, "") is None]
        if missing:
            record = BadData(f"no {missing[0]!r}; this method or --dispersion needs it in every record")
        if isinstance(record, BadData) and not isinstance(record, NoPreference) and not skip_bad:
            raise BadData(f"{where}: {record}")
        if isinstance(record, BadData):
            tally[type(record)] += 1
        elif (prompt := truncate_prompt(ids, tokenizer.bos, max_tokens)) is None:
            dropped.append(where)
        else:
            tally["cut"] += len(prompt) < len(ids[0])
            forms[record.form] = None
            arrays = (np.array(part, dtype=np.int32) for part in (prompt, *ids[1:]))
            pairs.append(Pair(*arrays, record.dispersion, where, record.votes, record.scores, record.rewards))
    if len(dropped) > max_dropped * (len(pairs) + len(dropped)):
        raise BadData(f"{dropped[0]}: a response does not fit into --max-tokens {max_tokens}; the same holds "
                      f"for {len(dropped) - 1:,} more of {len(pairs) + len(dropped):,} pairs; raise "
                      "--max-tokens or --max-dropped")
    if not pairs:
        skipped = f" ({tally[BadData]:,} bad records skipped)" if tally[BadData] else ""
        raise BadData(f"{', '.join(map(str, names))}: no pairs in it{skipped}")
    return Dataset(pairs, tally["cut"], len(dropped), tally[BadData], tally[NoPreference], tuple(forms))


PAIRS_RULES = 2                # increase it when new code makes other pairs from the same records


def cached_pairs(path: Path, write: Callable | None, names: tuple[str, ...], tokenizer: Tokenizer,
                 *settings) -> Dataset:
    """load_pairs(names, tokenizer, *settings), from the file `path` if that was made of the same input; else
    write(path, save) writes it by calling save(path).  The last setting is `watch`, which changes no pair."""
    files, contents = [fetch(name) for name in names], []
    if not all(file.is_file() for file in files):      # a pipe, which can be read only once
        return load_pairs(list(names), tokenizer, *settings)
    for file in files:
        with open(file, "rb") as stream:
            contents.append(hashlib.file_digest(stream, "sha256").hexdigest())
    key = f"{PAIRS_RULES} {[str(name) for name in names]} {contents} {tokenizer.digest} {settings[:-1]}"
    dataset = read_dataset(path, key)
    if dataset is None:
        dataset = load_pairs(list(names), tokenizer, *settings)
        if write is not None:
            write(path, functools.partial(write_dataset, dataset, key))
    return dataset


def checksum(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor)
    return digest.hexdigest()


def write_dataset(dataset: Dataset, key: str, path: Path) -> None:
    """Write a safetensors file that read_dataset accepts if the key is the same and no bit has changed."""
    ids = [part for pair in dataset.pairs for part in pair[:3]]
    facts = [dataset[1:], *(pair[3:] for pair in dataset.pairs)]
    tensors = {"ids": np.concatenate(ids), "lengths": np.array([len(part) for part in ids], dtype=np.int64),
               "facts": np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)}
    save_file(tensors, path, metadata={"key": key, "sha256": checksum(tensors)})


def read_dataset(path: Path, key: str) -> Dataset | None:
    """What write_dataset wrote, ids as views of the mapped file; None: missing, damaged or of another key."""
    try:
        with safe_open(path, "pt") as file:             # "pt" gives views of the file; "np", copies
            tensors = {name: file.get_tensor(name).numpy() for name in ("ids", "lengths", "facts")}
            if file.metadata() != {"key": key, "sha256": checksum(tensors)}:
                return None
    except (OSError, SafetensorError, TypeError):       # TypeError: dtypes that numpy lacks
        return None
    (*counts, forms), *facts = json.loads(tensors["facts"].tobytes())
    ids = iter(np.split(tensors["ids"], tensors["lengths"].cumsum()[:-1]))
    return Dataset([Pair(next(ids), next(ids), next(ids), *fact) for fact in facts], *counts, tuple(forms))


def hold_out(pairs: list[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and held-out ones: share is how many or, below 1, what fraction.  Raises BadData."""
    count = math.ceil(share * len(pairs)) if share < 1 else int(share)
    if count >= len(pairs):
        raise BadData(f"--eval-pairs {share:g} leaves none of the {len(pairs)} pairs to train on")
    held_out = set(np.random.default_rng(seed).permutation(len(pairs))[:count].tolist())
    return ([pair for i, pair in enumerate(pairs) if i not in held_out], [pairs[i] for i in sorted(held_out)])


# ---------------------------------------------------------------------------------------------------------------
# 5. The schedule: which pairs a step takes and how they lie in rows, a pure function of (seed, step)

class Schedule:
    """Order, epochs, packing and each rank's share.  Step s takes the next batch_size pairs of an endless sequence of
    epochs; an epoch is a permutation, and its last batch may be short."""

    def __init__(self, costs: list[int], batch_size: int, seed: int, tokens_per_row: int):
        self.costs, self.batch_size, self.seed, self.tokens_per_row = costs, batch_size, seed, tokens_per_row
        self.steps_per_epoch = math.ceil(len(costs) / batch_size)
        self._order = None, None                              # (epoch, permutation) of the last call

    def batch(self, step: int) -> list[int]:
        """Indices of the pairs of this step, over all ranks."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.costs))
        return self._order[1][place * self.batch_size:(place + 1) * self.batch_size].tolist()

    def all_rows(self, step: int, ranks: int) -> list[list[int]]:
        """The rows of all ranks; rank r takes [r::ranks].  All get equally many; some may be empty."""
        return pack(self.batch(step), self.costs, self.tokens_per_row, ranks)

    def rows(self, step: int, rank: int = 0, ranks: int = 1) -> list[list[int]]:
        """This rank's rows of the step."""
        return self.all_rows(step, ranks)[rank::ranks]


def pack(indices: list[int], costs: list[int], budget: int, multiple: int = 1) -> list[list[int]]:
    """Deal pairs into the fewest rows of at most `budget` tokens, in number a multiple of `multiple`: longest
    pairs first, each into the emptiest row, so that rows (and ranks) get about equally many tokens."""
    fewest = max(1, math.ceil(sum(costs[i] for i in indices) / (budget * multiple)))
    for count in itertools.count(fewest * multiple, multiple):
        rows, load = [[] for _ in range(count)], [0] * count
        for i in sorted(indices, key=lambda i: (-costs[i], i)):
            emptiest = load.index(min(load))
            rows[emptiest].append(i)
            load[emptiest] += costs[i]
        if max(load) <= budget or count >= len(indices) + multiple:     # (each alone: a pair exceeds the budget)
            return rows


@dataclass
class Split:
    """The training pairs or the held-out ones, and all that the loss needs to know about them."""
    pairs: list[Pair]
    schedule: Schedule
    steps: int                   # how many steps of the schedule are run
    ref_logp: Tensor             # (P, 2) the reference's log-probability of both responses, nats
    index: Tensor                # (P,) dispersion index, or the phi of the record; nan: not visited
    weight: Tensor               # (P,) weight of the prompt in the loss
    start_logp: Tensor           # (P, 2) the untrained policy's: ref_logp, except with --references
    advantage: Tensor            # (P, 2) see mallowspo.advantages
    ref_tokens: dict[int, np.ndarray]       # per-token ref_logp of each pair, chosen then rejected

    @classmethod
    def plan(cls, pairs: list[Pair], batch_size: int, seed: int, tokens_per_row: int | None, default: int,
             device: torch.device) -> "Split":
        """Plan one epoch.  Without tokens_per_row, rows hold `default` tokens, or as many as the longest pair
        has if that is more.  Raises BadData if a pair is longer than tokens_per_row."""
        costs = [pair.cost() for pair in pairs]
        longest = max(range(len(pairs)), key=costs.__getitem__)
        budget = tokens_per_row or max(costs[longest], default)
        if costs[longest] > budget:
            raise BadData(f"--tokens-per-row {budget} is too small for {pairs[longest].where}, which takes "
                          f"{costs[longest]} tokens; raise it, or lower --max-tokens")
        schedule, zeros = Schedule(costs, batch_size, seed, budget), torch.zeros(len(pairs), 2, device=device)
        rewards = torch.tensor([pair.rewards or [0, 0] for pair in pairs], dtype=torch.float64)
        advantage = mallowspo.advantages(rewards).to(zeros)
        return cls(pairs, schedule, schedule.steps_per_epoch, zeros, torch.full((len(pairs),), torch.nan),
                   torch.ones(len(pairs), device=device), zeros, advantage, {})

    def first_epoch(self) -> range:
        """The steps of the first epoch, which visit every pair that the run visits."""
        return range(min(self.steps, self.schedule.steps_per_epoch))

    def visited(self) -> list[int]:
        """Indices of the pairs that the steps visit, in ascending order."""
        return sorted(i for step in self.first_epoch() for i in self.schedule.batch(step))

    def digest(self) -> str:
        """A hash of all that a run takes from the records."""
        facts = [(pair.digest(), pair.dispersion, pair.votes, pair.scores, pair.rewards) for pair in self.pairs]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def sum_scores(self, scores: dict) -> tuple[Tensor, Tensor]:
        """(P, 2) sums of log-probabilities, (P, 2) mean entropies of each response; not visited: 0 and nan.
        scores: digest of a pair -> (logp, entropy), arrays over the tokens of chosen, then rejected."""
        logp, entropy = np.zeros((len(self.pairs), 2)), np.full((len(self.pairs), 2), np.nan)
        for i in self.visited():
            pair = self.pairs[i]
            found, end = scores[pair.digest()], len(pair.chosen)
            if len(found.logp) != end + len(pair.rejected):
                raise BadData(f"{pair.where}: has more or fewer tokens than the reference's scores of it")
            logp[i] = [half.sum(dtype=np.float64) for half in (found.logp[:end], found.logp[end:])]
            entropy[i] = [half.mean(dtype=np.float64) for half in (found.entropy[:end], found.entropy[end:])]
        return torch.from_numpy(logp), torch.from_numpy(entropy)

    def set_reference(self, scores: dict, vocab_size: int, tokens: bool = False) -> None:
        """Store the reference's scores of the pairs that are visited; with `tokens`, of each token too."""
        logp, entropy = self.sum_scores(scores)
        self.ref_logp = self.start_logp = logp.to(self.ref_logp)                                      # (P, 2)
        self.index = mallowspo.dispersion_index(entropy, vocab_size).float()                          # (P,)
        if tokens:
            self.ref_tokens = {i: scores[self.pairs[i].digest()].logp for i in self.visited()}

    def token_inputs(self, kind: str, indices: list[int], step: int) -> tuple[Tensor, Tensor]:
        """For the scored tokens of these pairs, in the order of a row: (N,) the reference's log-probability
        and (N,) the mask for this kind of token weights; random draws depend only on (seed, step, pair)."""
        logp, masks = [np.empty(0, dtype=np.float32)], [np.empty(0, dtype=bool)]        # a row may have no pairs
        for i in indices:
            logp.append(self.ref_tokens[i])
            masks += TOKEN_MASKS[kind](self.pairs[i], [self.schedule.seed, step, i])
        device = self.ref_logp.device
        return to_device(np.concatenate(logp), device, None), to_device(np.concatenate(masks), device, None)


class PackedRow(NamedTuple):
    """What the model needs to score groups of responses that share a prompt, [prompt | response | response | ...]."""
    tokens: Tensor               # (1, T)
    positions: Tensor            # (1, T) every response continues the prompt's positions
    segments: Tensor             # (1, T) see model.visible
    source: Tensor               # (N,) index in T of the output that predicts scored token n
    target: Tensor               # (N,) id of scored token n
    owner: Tensor                # (N,) the response it belongs to: group * R + response
    place: Tensor                # (N,) its place in the response, from 0
    length: Tensor               # (G, R) scored tokens of each response of each group

    def inputs(self) -> tuple[Tensor, ...]:
        return self[:5]

    def sum_by_response(self, values: Tensor) -> Tensor:
        """(N,) values of scored tokens -> (G, R) sums per response; float64 makes their order irrelevant."""
        zeros = torch.zeros(self.length.numel(), dtype=torch.float64, device=values.device)
        return zeros.index_add(0, self.owner, values.double()).view(self.length.shape).to(values.dtype)


def collate(groups: list[tuple[np.ndarray, ...]], branches: int, device: str | torch.device = "cpu") -> PackedRow:
    """Lay groups (prompt, response, response, ...), all with equally many responses, side by side in one row.  A
    segment id is group * branches + branch, as model.visible reads it (branches: model.BRANCHES); branch 0 is the
    prompt.  Raises ValueError if a group has more than branches - 1 responses."""
    if any(len(group) > branches for group in groups):
        raise ValueError(f"a prompt with {max(map(len, groups)) - 1} responses; a row holds at most {branches - 1}")
    filled = groups or [([0], [], [])]                                    # a row with nothing scored: one lone token
    length = np.array([[len(ids) for ids in responses] for _, *responses in filled])                      # (G, R)
    parts = [ids[:-1] if b else ids for group in filled for b, ids in enumerate(group)]
    size = np.array([len(part) for part in parts]).reshape(len(filled), -1)                               # (G, 1 + R)
    start = (size.cumsum() - size.ravel()).reshape(size.shape)            # of each part in T             # (G, 1 + R)
    segments = branches * np.arange(len(filled))[:, None] + np.arange(size.shape[1])                      # (G, 1 + R)
    shift = np.where(np.arange(size.shape[1]) > 0, size[:, :1], 0) - start  # place in T -> position      # (G, 1 + R)
    owner = np.repeat(np.arange(length.size), length.ravel())                                             # (N,)
    place = np.arange(len(owner)) - (length.cumsum() - length.ravel())[owner]                             # (N,)
    fork = np.broadcast_to(start[:, :1] + size[:, :1] - 1, length.shape)  # what predicts the first token  (G, R)
    source = np.where(place > 0, start[:, 1:].ravel()[owner] + place - 1, fork.ravel()[owner])            # (N,)
    segments, shift = (np.repeat(values.ravel(), size.ravel()) for values in (segments, shift))           # (T,)
    row = np.concatenate(parts), np.arange(size.sum()) + shift, segments                                  # (T,) each
    target = np.concatenate([ids for _, *responses in filled for ids in responses])                       # (N,)
    return PackedRow(*(to_device(values[None], device) for values in row),
                     *(to_device(values, device) for values in (source, target, owner, place, length[:len(groups)])))


def to_device(values, device: str | torch.device, dtype: torch.dtype | None = torch.int64) -> Tensor:
    """Numbers as a tensor of this dtype (None: their own) on the device.  A copy to a GPU is asynchronous,
    from pinned memory."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return (tensor.pin_memory() if torch.device(device).type == "cuda" else tensor).to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------
# 6. The data doctor

def examine(names: list[str], tokenizer: Tokenizer | None, max_tokens: int, examples: int,
            columns: dict[str, str] | None = None) -> bool:
    """Read all records of the files; print what is in them and some pairs -> True if nothing is wrong."""
    bad, pairs, lengths, shown = [], [], [], []
    tally = Counter()                                              # of forms, of fields, and for `rows` below
    for name in names:
        try:
            for where, record, ids in read_pairs(name, tokenizer, columns=columns):
                if isinstance(record, NoPreference):
                    tally["tie"] += 1
                elif isinstance(record, BadData):
                    bad.append((f"{where}: {record}", str(record)))
                else:
                    kept = truncate_prompt(ids, tokenizer.bos, max_tokens) if tokenizer else ids[0]
                    tally["cut"] += kept is not None and len(kept) < len(ids[0])
                    tally["dropped"] += kept is None
                    tally["space"] += sum(plain(side).startswith(" ") for side in record[1:3])
                    tally.update([record.form, *(name for name in FIELDS if getattr(record, name) is not None)])
                    pairs.append(tuple(hash(json.dumps(text)) for text in record[:3]))
                    lengths.append([len(part) for part in ids])
                    if tokenizer and len(shown) < examples:
                        shown.append((where, *ids))
        except BadData as error:
            bad.append((str(error), "the rest of a file that cannot be read"))
    usable = f"{len(pairs):,} of them usable pairs" if pairs else "0 of them usable pairs  <- wrong"
    print(f"{', '.join(names)}: {len(pairs) + len(bad):,} records, {usable}")
    for form, count in tally.most_common():
        if form in FORMS:
            print(f"{count:>9,}  {form}: {FORMS[form]}")
    if pairs:
        print_lengths(np.array(lengths), tally["space"], "in tokens" if tokenizer else "in characters")
    known, prompts = set(pairs), {prompt for prompt, _, _ in pairs}
    opposed = sum((prompt, other, one) in known for prompt, one, other in known)
    same = sum("no preference" in kind for _, kind in bad)
    rows = [(tally["cut"], f"prompts lose their beginning at --max-tokens {max_tokens:,}", False),
            (tally["dropped"], "pairs are dropped: a response does not fit", tally["dropped"] > 0.1 * len(pairs)),
            (len(pairs) - len(prompts), "pairs have the prompt of an earlier one", False),
            (len(pairs) - len(known), "pairs repeat an earlier one exactly", False),
            (opposed, "pairs are contradicted by a pair with chosen and rejected swapped", opposed),
            (same, "records have identical responses", same),
            (tally["tie"], "records have no preference: skipped", False),
            (len(bad), "records are bad", bad)]
    for count, what, wrong in rows[0 if tokenizer else 2:]:
        print(f"{count:>9,}  {what}  <- wrong" if wrong else f"{count:>9,}  {what}")
    for name in filter(tally.get, FIELDS):
        print(f"{tally[name]:>9,}  pairs carry {name}: {FIELDS[name][0]} uses it")
    for kind, count in Counter(re.split(r" \(|: ", kind)[0] for _, kind in bad).most_common():
        print(f"{count:>9,}    {kind}")
    print(*(f"  {message[:500]}" for message, _ in bad[:5]), sep="\n")
    for where, *ids in shown:
        print_pair(where, ids, tokenizer)
    return bool(pairs) and not any(wrong for _, _, wrong in rows)


def print_lengths(lengths: np.ndarray, spaces: int, unit: str) -> None:
    print(f"\n{unit:<17}     5 %    25 %    50 %    75 %    95 % longest")
    for name, column in zip(("prompt", "chosen", "rejected"), lengths.T):
        print(f"{name:<17}" + "".join(f"{x:>8,.0f}" for x in np.quantile(column, [0.05, 0.25, 0.5, 0.75, 0.95, 1])))
    longer = np.sign(lengths[:, 1] - lengths[:, 2]).mean() / 2 + 0.5
    print(f"\n{longer:>9.1%}  of the pairs: the chosen response is longer (a tie counts half)\n"
          f"{spaces / (2 * len(lengths)):>9.1%}  of the responses start with a space")


def print_pair(where: str, ids: list, tokenizer: Tokenizer) -> None:
    prompt, *sides = ids
    print(f"\n{where}: {len(prompt)} prompt tokens, {len(sides[0])} and {len(sides[1])} scored ones")
    print("  prompt    " + repr(tokenizer.text(prompt[-60:])) + (" (its end)" if len(prompt) > 60 else ""))
    for name, side in zip(("chosen", "rejected"), sides):
        tokens = [repr(tokenizer.text([i]))[1:-1] for i in side[:60]]
        print(f"  {name:<9} |" + "|".join([*tokens, "..."] if len(side) > 60 else tokens) + "|")


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Check files of preference pairs, and show the "
                                     "tokens that are scored.  Exit status 1 if something is wrong with them.")
    parser.add_argument("files", nargs="+", help="JSON Lines, a JSON array or CSV, plain or .gz; Parquet; or "
                                                 "hf://datasets/...")
    parser.add_argument("--columns", nargs="+", metavar="OURS=THEIRS", help="prompt=question chosen=good ...")
    parser.add_argument("--model", help="folder with tokenizer.json, or owner/name (hub); else no tokens")
    parser.add_argument("--max-tokens", type=int, default=1024, help="most tokens of prompt + response")
    parser.add_argument("--show", type=int, default=2, help="how many pairs to print")
    args = parser.parse_args()
    try:
        for name in args.files:
            fetch(name)
        tokenizer = args.model and Tokenizer(find_model(args.model))
        sys.exit(not examine(args.files, tokenizer, args.max_tokens, args.show, read_columns(args.columns)))
    except BadData as error:
        print(f"data.py: error: {error!s:.2000}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("data.py: interrupted")
    except BrokenPipeError:                                        # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
