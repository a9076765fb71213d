"""The demo's text and tasks: repeatable, split cleanly, and right when worked out a second time from the text."""

import json
import re
import zlib
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from compress.demo import grammar
from compress.demo.grammar import END_TOKEN, FACTS, KINDS, Task, write_documents, write_tasks, write_text

CHECKPOINT = Path(grammar.__file__).parent / "checkpoint"
NAMES = set(grammar._WOMEN + grammar._MEN)
SUBJECT = re.compile(r"\b(?:[Ss]he|[Hh]e|" + "|".join(sorted(NAMES)) + r")\b")
GO = re.compile(r"(?:went|walked|ran \w+|hurried|moved) to the (\w+)\.$")
BE = re.compile(r"(?:\b(?:was|was working|sat) at|You could find \w+ at) the (\w+)\.$")
LIE = re.compile(r"^(?:An? \w+|Somebody had forgotten an?|There was an? \w+) (\w+) (?:lay )?at the (\w+)\.$")
OWN = re.compile(r"\b(?:had|owned|carried) an? (?:\w+ )?(\w+)\.$")
TAKE = re.compile(r"(?:picked up|took|saw|lifted) the (\w+)")
LEAVE = re.compile(r"(?:left|put|dropped|tired of) the (\w+)")
GIVE = re.compile(r"(?:gave|handed|sold|offered) the (\w+) to (\w+)")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_same_seed_gives_same_text(split: str) -> None:
    assert write_text(20_000, 5, split) == write_text(20_000, 5, split)
    assert write_text(20_000, 5, split) != write_text(20_000, 6, split)


def test_world_never_changes() -> None:
    # The shipped checkpoint remembers this world: another one would make its recall worthless.
    assert len(FACTS) >= 300
    assert len({(fact.subject, fact.relation) for fact in FACTS}) == len(FACTS)
    assert FACTS[0] == grammar.Fact("Dora Penhallow", "trade", "miller")
    digest = zlib.crc32("".join(f"{fact}" for fact in FACTS).encode())
    assert digest == 624456481


def test_text_separates_documents_by_end_token() -> None:
    text = write_text(5_000, 0)
    assert len(text) >= 5_000
    assert text.endswith(f"\n{END_TOKEN}\n")
    documents = text.removesuffix(f"\n{END_TOKEN}\n").split(f"\n{END_TOKEN}\n")
    assert documents == list(write_documents(len(documents), 0))


def test_text_is_rich() -> None:
    text = write_text(1_500_000, 0)
    assert len(set(re.findall(r"[A-Za-z]+", text))) >= 1500
    assert "{" not in text
    assert not re.search(r"\b[Aa] [aeiou]", text)


def test_splits_share_no_document() -> None:
    train = set(write_documents(8_000, 0))
    assert not train & set(write_documents(8_000, 0, "heldout"))


def test_training_never_shows_held_out_combinations() -> None:
    text = write_text(1_000_000, 3)
    assert not [fact for fact in FACTS if grammar.tell_fact(fact, grammar.find_held_phrasing(fact)) in text]
    sums = {("plus", *sorted(map(int, pair))) for pair in re.findall(r"(\d+) plus (\d+) is", text)}
    sums |= {("minus", *sorted(map(int, pair))) for pair in re.findall(r"(\d+) minus (\d+) is", text)}
    assert len(sums) > 100
    assert not [one for one in sums if grammar.is_held_out(*one)]


def test_training_tells_every_fact() -> None:
    text = write_text(1_500_000, 4)
    told = [fact for fact in FACTS
            if any(grammar.tell_fact(fact, index) in text for index in range(len(grammar.PHRASINGS[fact.relation])))]
    assert len(told) == len(FACTS)


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_repeat_and_have_different_choices(kind: str) -> None:
    tasks = write_tasks(kind, 200, 1)
    assert tasks == write_tasks(kind, 200, 1)
    assert tasks != write_tasks(kind, 200, 2)
    for task in tasks:
        assert task.kind == kind
        assert len(set(task.choices)) == len(task.choices) >= 2
        assert all(choice.startswith(" ") for choice in task.choices)
        assert not task.prompt.endswith(" ")
    # No place in the list of choices gives the answer away.
    places = [task.answer for task in tasks]
    assert max(places.count(place) for place in set(places)) < 0.7 * len(places)


def find_right_choices(task: Task) -> list[int]:
    check = {"recall": is_true_fact, "sums": is_true_sum, "agreement": is_agreement, "tracking": is_true_state}
    return [index for index, choice in enumerate(task.choices) if check[task.kind](task.prompt, choice)]


def is_true_fact(prompt: str, choice: str) -> bool:
    return prompt + choice in TRUE_SENTENCES


def is_true_sum(prompt: str, choice: str) -> bool:
    left, right = map(int, re.findall(r"\d+", prompt))
    if prompt.startswith("If you take"):
        left, right = right, left
    minus = re.search(r"minus|less|take", prompt)
    return int(choice.strip(" .")) == (left - right if minus else left + right)


def is_agreement(prompt: str, choice: str) -> bool:
    words = prompt.split()
    plurals = {grammar.make_plural(noun) for noun in grammar._NOUNS}
    nouns = plurals | set(grammar._NOUNS)
    head = words[2] if words[1] in grammar._ADJECTIVES and words[2] in nouns else words[1]
    assert head in nouns
    forms = dict(grammar._BE_AND_HAVE + grammar._PRESENT)
    return choice.strip() in (forms.values() if head in plurals else forms)


def is_true_state(prompt: str, choice: str) -> bool:
    *told, question = re.split(r"(?<=\.) ", prompt)
    at, holder = replay_story(told)
    value = choice.strip(" .")
    if thing := re.search(r"the (\w+) was in the hands of$", question):
        return holder[thing.group(1)] == value
    if thing := re.search(r"the (\w+) was at the$", question):
        return at[holder.get(thing.group(1)) or thing.group(1)] == value
    person = re.search(r"(\w+) was at the$", question)
    assert person
    return at[person.group(1)] == value


def replay_story(sentences: list[str]) -> tuple[dict[str, str], dict[str, str | None]]:
    """Read a story sentence by sentence and return where everybody and everything lies, and who holds what."""
    at: dict[str, str] = {}
    holder: dict[str, str | None] = {}
    last = ""
    for sentence in sentences[1:]:
        found = SUBJECT.search(sentence)
        who = last = (found.group() if found and found.group() in NAMES else last)
        if match := LIE.search(sentence):
            at[match.group(1)], holder[match.group(1)] = match.group(2), None
        elif match := GO.search(sentence) or BE.search(sentence):
            at[who] = match.group(1)
        elif match := GIVE.search(sentence):
            holder[match.group(1)] = match.group(2)
        elif match := TAKE.search(sentence) or OWN.search(sentence):
            holder[match.group(1)] = who
        elif match := LEAVE.search(sentence):
            holder[match.group(1)], at[match.group(1)] = None, at[who]
    return at, holder


TRUE_SENTENCES = {grammar.tell_fact(fact, index) for fact in FACTS
                  for index in range(len(grammar.PHRASINGS[fact.relation]))}


@pytest.mark.parametrize("kind", KINDS)
def test_each_task_has_exactly_one_right_choice(kind: str) -> None:
    for task in write_tasks(kind, 400, 7):
        assert find_right_choices(task) == [task.answer], task


def test_unknown_split_and_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="split"):
        write_text(10, 0, "test")
    with pytest.raises(ValueError, match="recall"):
        write_tasks("riddles", 1, 0)


def test_shipped_checkpoint_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert sum(sizes.values()) < 10_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= sizes.keys()
    assert sizes["model.safetensors"] < 6_000_000
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert (config["vocab_size"], config["num_hidden_layers"], config["bos_token_id"]) == (1024, 8, 0)


def test_shipped_tokenizer_keeps_text_and_splits_digits() -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1024
    assert tokenizer.token_to_id(END_TOKEN) == 0
    text = next(write_documents(1, 0))
    assert tokenizer.encode(text).ids[0] == 0
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode(" 12", add_special_tokens=False).ids) == 2
