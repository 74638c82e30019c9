"""The demo task: does the writer like what the sentence is about? Labels negative, positive.

The label follows from how the words are put together, hardly from which words occur:

* negation: "the pasta was not good"; also "far from", "anything but";
* scope: "nobody said that the pasta was good" turns the whole clause, "nobody denied that …" and
  "not surprisingly" do not;
* contrast: "although A , B", "A but B" and "B , even though A" all mean B;
* intensity: of two opposed clauses joined by "and" the stronger one counts:
  "the pasta was slightly bland and the bread was truly superb" is positive.

Sentences are drawn from a seeded generator; the same (count, seed) gives the same sentences.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from sti_runtime.records import canonical_json, sha256_hex
from sti_runtime.tasks import Example, TaskSpec

LABELS = ("negative", "positive")
MAX_TOKENS = 32
TRAIN_ROWS, PROFILE_ROWS, DEV_ROWS = 48_000, 800, 1_000
TRAIN_SEED, PROFILE_SEED, DEV_SEED = 101, 202, 303
TASK = TaskSpec(
    name="demo",
    text_columns=("sentence",),
    label_column="label",
    labels=LABELS,
    max_tokens=MAX_TOKENS,
    metric="accuracy",
)
"""How ``sti_runtime.tasks`` reads the TSV files of ``write_tsv``."""

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")

# ---------------------------------------------------------------------------------------- words


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ASPECTS = _words(
    "pasta bread soup salad dessert coffee menu waiter service kitchen table music lighting terrace "
    "room bed shower view lobby pool breakfast film plot acting script camera ending hero dialogue "
    "soundtrack novel chapter story prose author cover phone screen battery keyboard speaker case "
    "lesson teacher lecture museum tour guide garden concert singer band show play stage"
)
_POSITIVE = _words(
    "good great superb lovely charming delightful excellent brilliant wonderful pleasant clever fresh "
    "elegant fine smooth warm witty bright stunning impressive enjoyable splendid graceful moving "
    "crisp generous reliable tasty polished memorable"
)
_NEGATIVE = _words(
    "bad dull awful bland horrible boring clumsy weak dreary stale shallow ugly rude noisy tedious "
    "dirty broken cold grim lifeless messy poor sloppy tasteless tired unpleasant vague sour lazy "
    "forgettable"
)
_STRONG = _words("extremely truly utterly incredibly absolutely remarkably")
_MILD = _words("slightly somewhat mildly faintly marginally barely")
_ADVERBS = (None, None, _STRONG, _MILD)
_VERBS = _words("was seemed looked felt remained")
_INNER_NEGATION = ("not", "never", "far from", "anything but", "not at all")
_TURNING_FRAMES = (
    "nobody said that",
    "i do not think that",
    "it is not true that",
    "i doubt that",
    "they failed to convince me that",
    "few would agree that",
)
_KEEPING_FRAMES = (
    "nobody denied that",
    "i do not doubt that",
    "it is true that",
    "not surprisingly ,",
    "i never forgot that",
    "few would deny that",
)
_OPENINGS = (
    "in short ,", "to be honest ,", "last week", "on our second visit", "for once", "this year",
    "as we told them ,", "that evening",
)  # fmt: skip
_CONTRASTS = (
    "although {weak} , {main}",
    "even though {weak} , {main}",
    "while {weak} , {main}",
    "{weak} but {main}",
    "{weak} , yet {main}",
    "{main} although {weak}",
    "{main} , even though {weak}",
    "{main} despite the fact that {weak}",
)


# ------------------------------------------------------------------------------------ generator


def _clause(rng: random.Random, positive: bool, adverbs: tuple[str, ...] | None) -> str:
    """A clause that says ``positive`` of some aspect, with up to two negations on the way."""
    said = positive
    frame = ""
    shape = rng.random()
    if shape < 0.22:
        frame, said = rng.choice(_TURNING_FRAMES) + " ", not said
    elif shape < 0.40:
        frame = rng.choice(_KEEPING_FRAMES) + " "
    negation = ""
    if rng.random() < 0.35 and adverbs is None:
        negation, said = rng.choice(_INNER_NEGATION) + " ", not said
    adverb = rng.choice(adverbs) + " " if adverbs else ""
    adjective = rng.choice(_POSITIVE if said else _NEGATIVE)
    return f"{frame}the {rng.choice(_ASPECTS)} {rng.choice(_VERBS)} {negation}{adverb}{adjective}"


def _sentence(rng: random.Random, positive: bool) -> str:
    opening = rng.choice(_OPENINGS) + " " if rng.random() < 0.2 else ""
    shape = rng.random()
    if shape < 0.3:
        body = _clause(rng, positive, rng.choice(_ADVERBS))
    elif shape < 0.7:
        opposed = positive if rng.random() < 0.2 else not positive
        body = rng.choice(_CONTRASTS).format(
            weak=_clause(rng, opposed, rng.choice(_ADVERBS)),
            main=_clause(rng, positive, rng.choice(_ADVERBS)),
        )
    else:
        parts = [_clause(rng, positive, _STRONG), _clause(rng, not positive, _MILD)]
        rng.shuffle(parts)
        body = " and ".join(parts)
    return opening + body


def generate(count: int, seed: int, *, exclude: Iterable[str] = ()) -> list[Example]:
    """``count`` distinct sentences, labels balanced to within one, none of them in ``exclude``."""
    rng, seen = random.Random(seed), set(exclude)
    examples: list[Example] = []
    while len(examples) < count:
        positive = len(examples) % 2 == 1
        sentence = _sentence(rng, positive)
        if sentence not in seen:
            seen.add(sentence)
            examples.append(Example(text=sentence, pair=None, label=int(positive)))
    rng.shuffle(examples)
    return examples


# ------------------------------------------------------------------------------------ tokenizer


def vocabulary() -> tuple[str, ...]:
    """Every token the generator can write, special tokens first ([PAD] is 0)."""
    frames = (*_INNER_NEGATION, *_TURNING_FRAMES, *_KEEPING_FRAMES, *_OPENINGS)
    phrases = " ".join((*frames, *(c.format(weak="", main="") for c in _CONTRASTS), "the and"))
    words = {*_ASPECTS, *_POSITIVE, *_NEGATIVE, *_STRONG, *_MILD, *_VERBS, *phrases.split()}
    return (*SPECIAL_TOKENS, *sorted(words))


def tokenizer_json() -> bytes:
    """The task's word-level tokenizer as a tokenizer.json: [CLS] words [SEP], lower-cased."""
    ids = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.enable_padding(pad_id=0, pad_token=SPECIAL_TOKENS[0])
    return tokenizer.to_str().encode()


def vocabulary_digest() -> str:
    """SHA-256 of the vocabulary in order: what weights of the task depend on."""
    return sha256_hex(canonical_json(list(vocabulary())))


# ----------------------------------------------------------------------------------------- files


@dataclass(frozen=True, slots=True)
class DemoSplits:
    """Disjoint splits: the model is trained on train, importance is scored on profile, results on dev."""

    train: tuple[Example, ...]
    profile: tuple[Example, ...]
    dev: tuple[Example, ...]


def demo_splits(train_rows: int = TRAIN_ROWS) -> DemoSplits:
    """The task's splits, disjoint by sentence. dev and profile do not depend on ``train_rows``."""
    dev = generate(DEV_ROWS, DEV_SEED)
    profile = generate(PROFILE_ROWS, PROFILE_SEED, exclude=(e.text for e in dev))
    held_out = [e.text for e in (*dev, *profile)]
    train = generate(train_rows, TRAIN_SEED, exclude=held_out)
    return DemoSplits(tuple(train), tuple(profile), tuple(dev))


def write_tsv(path: Path, examples: Iterable[Example]) -> None:
    """Write a TSV with the header ``sentence<TAB>label``; labels by name, as ``TASK`` reads them."""
    lines = ["sentence\tlabel", *(f"{e.text}\t{LABELS[e.label]}" for e in examples)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
