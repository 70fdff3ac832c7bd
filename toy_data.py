# SPDX-License-Identifier: MIT
"""Synthetic arithmetic for TABOM: four domains that share one layout of 16 tokens.

    position   0 1 2   3 4  5  6 7 8 9   10 11 12   13 14 15
               a a op  b b  =  p p p p    u  u  u    t  t  t
               prompt  <------------- response ------------->

p is the answer; the working stands *behind* it: u for the units of the second number, t the tens.

    mul     47×85=3995235376     47 × 85 = 3995;  47 × 5 = 235,  47 × 8 = 376
    add     47+85=0132012012     47 + 85 = 132;    7 + 5 = 12,    4 + 8 = 12
    sub     85-47=0038108004     85 - 47 = 38;    15 - 7 = 8 with 1 borrowed (1 08),  8 - 4 = 4
    blank   47×__=__________     choose the second factor *yourself*, then the same as mul

In mul, add and sub the second number and "=" are *given*: they stand in the response, visible
from the start, and are neither trained nor decoded.  In blank only "=" is given: the model writes
the factor too, and every factor from 10 to 99 with the right product is correct.

Why some positions are easy and others hard:
    the working (u, t)    one digit at a time, easy once both numbers are visible
    the answer (p)        put together from the working, easiest from its last digit
    the factor in blank   a free choice among 90: about 2.2 nats for each digit at the start
So in mul "easy first" means: working, then the product from its last digit, and a masked diffusion
model finds that by itself.  In blank it goes wrong: the first digit of the product or of the
working has few likely values and *looks* easier than the free choice it depends on.  Written
first, it asks for a factor that fits, which is hard to find.  The good order (factor, working,
product) is what the model must learn; the skill of multiplying it already has.

The problems come first, as plain tensors; nothing there knows how they are used.  Then the recipe:
every setting of the demo and its value for this toy.  Last, figures become text to print.
"""
import argparse
import json
import math
import os
import pickle
import platform
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

VOCABULARY = "0123456789+-×="       # one character per token; [MASK] is an input only
MASK_ID = len(VOCABULARY)
EQUALS_ID = VOCABULARY.index("=")
PROMPT_LENGTH, RESPONSE_LENGTH = 3, 13
DOMAINS = ("add", "sub", "mul", "blank")
OPERATOR = {"add": "+", "sub": "-", "mul": "×", "blank": "×"}

# Where things stand inside the response.
FACTOR, EQUALS, ANSWER, UNITS_ROW, TENS_ROW = (
    slice(0, 2), slice(2, 3), slice(3, 7), slice(7, 10), slice(10, 13))
# Two fixed orders, as the turn of each position.  The best: factor, working, answer, and the
# numbers from their last digit.
LEFT_TO_RIGHT = torch.arange(RESPONSE_LENGTH)
BEST_ORDER = torch.tensor([0, 1, 2, 9, 8, 7, 12, 11, 10, 6, 5, 4, 3]).argsort()

WHAT_IS_NEW = {
    "blank": "the base can multiply, but has to choose a factor first and does not know it.",
    "mul": "the base has seen few multiplications; its order is as good as the best.",
}
# Share of each domain in the pretraining corpus, by which domain is the new one.  The new domain
# must be known a little: a model that never succeeds has nothing to distil.
CORPUS_SHARES = {
    "mul": {"add": 0.30, "sub": 0.30, "mul": 0.40},
    "blank": {"add": 0.12, "sub": 0.12, "mul": 0.64, "blank": 0.12},
}
# How many problems of a domain go to (corpus, query, validation); the rest is the test.  A problem
# of blank is a first factor: there are only 90.  When mul is new, few problems in the corpus make
# a base that knows it partly and stably; limiting the updates instead would not.
SPLIT_SIZES = {
    "mul": {"add": (7000, 0, 400), "sub": (3200, 0, 400), "mul": (1500, 4000, 400)},
    "blank": {"add": (7000, 0, 400), "sub": (3200, 0, 400), "mul": (7000, 0, 400),
              "blank": (25, 30, 10)},
}


def encode(text):
    """"47×85" -> list of token ids.  "_" is a masked position."""
    return [MASK_ID if character == "_" else VOCABULARY.index(character) for character in text]


def to_text(tokens):
    """Token ids, a list or a 1-D tensor -> text.  The inverse of `encode`."""
    return "".join((VOCABULARY + "_")[int(token)] for token in tokens)


def digits(numbers, width):
    """(B,) int64 -> (B, width) digits, the most significant first.  A digit is its own token id."""
    powers = 10 ** torch.arange(width - 1, -1, -1, device=numbers.device)
    return numbers[:, None] // powers % 10


def read_number(tokens):
    """(B, width) tokens -> (B,) numbers; -1 where a token is not a digit."""
    powers = 10 ** torch.arange(tokens.shape[1] - 1, -1, -1, device=tokens.device)
    return torch.where((tokens < 10).all(1), (tokens * powers).sum(1), -1)


def write_solutions(domain, first, second, hand="own"):
    """Problems and their reference solutions.

    first, second (B,) int64: the two numbers.  Returns prompt (B, 3) int64, response (B, 13) int64
    and given (B, 13) bool, the response positions that are visible from the start.

    hand "own" is the writing of the pretraining corpus.  "other" is that of somebody who multiplies
    the other way round (47 × 85: 85 × 7 = 595 and 85 × 4 = 340): just as right, but not what the
    model would write.  It is the toy's version of solutions written by people or by a larger model.
    add and sub have only one hand.
    """
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}; the domains are {', '.join(DOMAINS)}.")
    if hand not in ("own", "other"):
        raise ValueError(f"unknown hand {hand!r}; it must be 'own' or 'other'.")
    units, tens = second % 10, second // 10
    if domain == "add":
        answer, units_row, tens_row = first + second, first % 10 + units, first // 10 + tens
    elif domain == "sub":
        borrowed = (first % 10 < units).long()
        answer, tens_row = first - second, first // 10 - tens
        units_row = 100 * borrowed + (first - units) % 10
    elif hand == "own":
        answer, units_row, tens_row = first * second, first * units, first * tens
    else:
        answer, units_row, tens_row = first * second, second * (first % 10), second * (first // 10)
    operator = torch.full_like(first, VOCABULARY.index(OPERATOR[domain]))[:, None]
    equals = torch.full_like(operator, EQUALS_ID)
    prompt = torch.cat([digits(first, 2), operator], 1)
    response = torch.cat([digits(second, 2), equals, digits(answer, 4),
                          digits(units_row, 3), digits(tens_row, 3)], 1)
    given = torch.zeros_like(response, dtype=torch.bool)
    given[:, EQUALS] = True
    given[:, FACTOR] = domain != "blank"
    return prompt, response, given


def write_references(domain, problems, hand, generator):
    """Reference solutions of (n, 2) problems, as `write_solutions`; in blank, of any factor."""
    first, second = problems.unbind(1)
    if domain == "blank":
        second = torch.randint(10, 100, (len(first),), generator=generator).to(first.device)
    return write_solutions(domain, first, second, hand)


def is_correct(domain, prompt, response):
    """The checker: prompt (B, 3), response (B, 13) -> (B,) bool.  It reads no working.

    In blank any second factor from 10 to 99 counts when the product is right.
    """
    first, second = read_number(prompt[:, :2]), read_number(response[:, FACTOR])
    answer = {"add": first + second, "sub": first - second}.get(domain, first * second)
    written = read_number(response[:, ANSWER])
    return (second >= 10) & (written >= 0) & (written == answer)


def working_is_right(domain, prompt, response):
    """Is every written line right, in one hand or the other?  (B, 3), (B, 13) -> (B,) bool."""
    first, second = read_number(prompt[:, :2]), read_number(response[:, FACTOR])
    hands = [write_solutions(domain, first, second, hand)[1] for hand in ("own", "other")]
    return (second >= 10) & ((response == hands[0]).all(1) | (response == hands[1]).all(1))


def count_factors(response, decode_rank):
    """Second factors that were chosen, not given: how many different ones, and how many they amount
    to, exp of the entropy of the choice."""
    factors = read_number(response[:, FACTOR])[decode_rank[:, 0] >= 0]
    factors = factors[factors >= 0]
    if not len(factors):
        return 0, 0.0
    share = factors.bincount() / len(factors)
    return int((share > 0).sum()), torch.special.entr(share).sum().exp().item()


def has_common_factor(response, count):
    """(B, 13) -> (B,) bool: is its factor one of the `count` commonest of these responses?"""
    factors = read_number(response[:, FACTOR]).clamp(min=0)              # 0: no number at all
    commonest = factors.bincount().argsort(descending=True, stable=True)[:count]
    return torch.isin(factors, commonest)


def all_problems(domain):
    """Every problem of a domain, (n, 2).  In blank the second number is a place-holder: 0."""
    first, second = torch.cartesian_prod(torch.arange(10, 100), torch.arange(10, 100)).unbind(1)
    problems = torch.stack([first, second], 1)
    if domain == "sub":
        return problems[first >= second]
    if domain == "blank":
        return torch.stack([torch.arange(10, 100), torch.zeros(90, dtype=torch.int64)], 1)
    return problems


def split_problems(new_domain, seed):
    """{domain: {"corpus" | "query" | "validation" | "test": (n, 2)}}, disjoint in each domain."""
    if new_domain not in SPLIT_SIZES:
        raise ValueError(f"new_domain must be one of {', '.join(SPLIT_SIZES)}, not {new_domain!r}.")
    generator = torch.Generator().manual_seed(seed)
    splits = {}
    for domain, sizes in SPLIT_SIZES[new_domain].items():
        problems = all_problems(domain)
        shuffled = problems[torch.randperm(len(problems), generator=generator)]
        parts = shuffled.split([*sizes, len(problems) - sum(sizes)])
        splits[domain] = dict(zip(("corpus", "query", "validation", "test"), parts))
        assert len(torch.cat(parts).unique(dim=0)) == len(problems), "the splits must be disjoint"
    return splits


def pretraining_corpus(new_domain, splits):
    """All solved corpus problems: prompt, response, given, and weight (n,), the odds of each."""
    columns = []
    for domain, share in CORPUS_SHARES[new_domain].items():
        first, second = splits[domain]["corpus"].unbind(1)
        if domain == "blank":       # solved by multiplications of the corpus, never of the test
            pairs = splits["mul"]["corpus"]
            first, second = pairs[torch.isin(pairs[:, 0], first)].unbind(1)
        solved = write_solutions(domain, first, second)
        columns.append((*solved, torch.full((len(first),), share / len(first))))
    return tuple(torch.cat(column) for column in zip(*columns))


# == The recipe and the command line: settings, flags, files =======================================

class DemoError(Exception):
    """Something the user of the demo can mend, in one sentence."""


CHOICES = {"new_domain": ("blank", "mul"), "rollout_filter": ("working", "answer", "none", "wrong"),
           "ranks": ("recorded", "shuffled", "reversed"),
           "collect_order": ("entropy", "confidence", "margin", "random"),
           "reference_hand": ("own", "other"), "split": ("validation", "test")}
SETTINGS_OF_AN_ARM = ("ranks", "common_factors", "reference_hand", "updates", "batch_size",
                      "learning_rate", "warmup", "tuned_share", "window_size", "margin",
                      "rank_weight", "temperature")
CONTROL = "TABOM:ranks=shuffled"    # runs beside the arms: TABOM without what the order says
MAY_BE_ZERO = ("collect_temperature", "margin", "rank_weight", "temperature")
# What is different when multiplication itself is the new domain, and in a --quick run.
MUL = dict(pretrain_updates=3000, queries=32000, collect_order="entropy", answers_per_problem=1,
           updates=800, learning_rate=3e-4, window_size=4, margin=0.2, rank_weight=1.0,
           test_problems=1200, samples=1, temperature=0.0)
QUICK = dict(pretrain_updates=150, queries=200, rollout_filter="none", updates=20,
             test_problems=20, samples=2)


@dataclass(frozen=True)
class Config:
    """Each setting with its reason, and the paper's value where it has one.

    An arm is a way to fine-tune: TABOM or one of its rivals.  The defaults are the recipe of blank.
    """
    new_domain: str = "blank"         # what the base lacks: "blank" the order, "mul" the skill
    # the base
    layers: int = 3                   # 0.34 million parameters, pretrained on a laptop in minutes
    width: int = 96
    heads: int = 4
    pretrain_updates: int = 4500      # until old domains are nearly perfect; 3000 leave some weak
    pretrain_batch: int = 128
    pretrain_learning_rate: float = 3e-3
    # self-distillation
    queries: int = 48000              # problems in turn, over and over (paper: 12K, 17K, each once)
    collect_order: str = "random"     # then the checker selects good *orders* (paper: "entropy")
    collect_temperature: float = 1.0  # explores the tokens (paper: low)
    rollout_filter: str = "working"   # all must be right; "answer": as the paper; controls: "none"
                                      # accepts every answer, "wrong" the wrong ones only
    answers_per_problem: int = 48000  # train on the first so many that are kept (paper: 1)
    ranks: str = "recorded"           # "shuffled" in each response, or "reversed": controls
    common_factors: int = 100         # train on answers with the so many commonest; 100: all
    reference_hand: str = "other"     # SFT-GT copies somebody else's working; a control: "own"
    # fine-tuning, the same for every arm unless it sets its own
    updates: int = 400                # (paper: 5 epochs)
    batch_size: int = 64              # (paper: 32)
    learning_rate: float = 1e-4       # (paper: 2e-5, LoRA)
    warmup: int = 20                  # updates (paper: 50)
    tuned_share: float = 1.0          # of the way from the base's weights to the tuned ones
    # trajectory masking and TABOM
    window_size: int = 6              # half of the 12 that are decoded (paper: 32 of 256)
    margin: float = 2.0               # gamma, nats (paper: 0.1 to 0.3); chosen for its TDS
    rank_weight: float = 2.0          # lambda (paper: 1 and 2); more gains more, on fewer factors
    # evaluation
    split: str = "test"               # "validation" for tuning
    test_problems: int = 400          # per domain at most
    samples: int = 64                 # answers per problem of the new domain: blank has few
    temperature: float = 1.0          # of those answers; the old domains are answered greedily

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, str) and value not in CHOICES[name]:
                raise DemoError(f"{name} must be one of {', '.join(CHOICES[name])}, not {value!r}.")
            lowest = 0 if name in MAY_BE_ZERO else 1e-9
            if not isinstance(value, str) and not lowest <= value < math.inf:
                raise DemoError(f"{name} must be positive, not {value}.")
        if self.width % self.heads:
            raise DemoError(f"width {self.width} must be a multiple of heads {self.heads}.")

    def kind_of_base(self):
        """The settings that a stored base must share with the run."""
        return {name: value for name, value in vars(self).items()
                if name in ("new_domain", "layers", "width", "heads") or "pretrain_" in name}


def read_settings(overrides):
    """["name=value", ...] -> {name: value}, of the kind that Config has there."""
    kinds, values = {field.name: type(field.default) for field in fields(Config)}, {}
    for name, _, text in (override.partition("=") for override in overrides):
        if name not in kinds:
            raise DemoError(f"there is no setting {name!r}, only {', '.join(kinds)}.")
        try:
            values[name] = kinds[name](text)
        except ValueError as error:
            raise DemoError(f"{name}: {text!r} is no {kinds[name].__name__}.") from error
    return values


def read_arm(name, config, arms):
    """"TABOM:margin=0.3,window_size=4" -> "TABOM", and config with these settings."""
    arm, _, overrides = name.partition(":")
    if arm not in ("No-SFT", *arms):
        raise DemoError(f"--arms: there is no arm {arm!r}, only No-SFT, {', '.join(arms)}.")
    settings = read_settings(overrides.split(",") if overrides else [])
    for setting in settings:
        if setting not in SETTINGS_OF_AN_ARM:
            raise DemoError(f"--arms {name}: an arm can change {', '.join(SETTINGS_OF_AN_ARM)}; "
                            f"{setting} is the same for all, use --set.")
    return arm, replace(config, **settings)


def make_config(overrides, quick):
    """["name=value", ...] -> Config, on top of the recipe of the new domain."""
    values = read_settings(overrides)
    recipe = MUL if values.get("new_domain") == "mul" else {}
    return Config(**{**recipe, **(QUICK if quick else {}), **values})


def is_valid(config, prompt, response):
    """Which rollouts of the new domain the checker keeps, by config.rollout_filter -> (B,) bool."""
    correct = is_correct(config.new_domain, prompt, response)
    working = working_is_right(config.new_domain, prompt, response)
    return {"working": correct & working, "answer": correct, "wrong": ~correct,
            "none": torch.ones_like(correct)}[config.rollout_filter]


def first_of_each(kept, n_problems, count):
    """kept (B,) bool, row i an answer to problem i % n_problems -> (B,) bool: the first `count`
    that are kept of each problem."""
    tries = torch.zeros(-(-len(kept) // n_problems), n_problems, dtype=torch.bool)
    tries = tries.to(kept.device)                                        # (tries, problems)
    tries.view(-1)[:len(kept)] = kept
    return (tries & (tries.cumsum(0) <= count)).view(-1)[:len(kept)]


def parse_arguments(arguments, arms, description):
    """Command line -> options, or help and exit code 2."""
    parser = argparse.ArgumentParser(prog="tabom.py", description=description,
                                     epilog="Start with: python tabom.py --demo")
    add = parser.add_argument
    add("--demo", action="store_true", help="run the whole chain and compare the arms")
    add("--quick", action="store_true", help="the same in about a minute, only to see that it runs")
    add("--seeds", type=int, nargs="+", default=[0], metavar="SEED",
        help="each is a base, problems and batches of its own")
    add("--arms", nargs="+", default=[*arms, CONTROL], metavar="ARM", help="any of "
        f"{' '.join(arms)}, or one with settings of its own: TABOM:margin=0.3,window_size=4")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--set", action="append", default=[], metavar="NAME=VALUE",
        help="a field of toy_data.Config")
    add("--base", metavar="FILE", help="reuse the pretrained bases in FILE; new ones are added")
    add("--save", metavar="FILE", help="write the TABOM models; the file can serve as --base")
    add("--json", metavar="FILE", help="write every figure of the run")
    options = parser.parse_args(arguments)
    if not (options.demo or options.quick):
        parser.print_help()
    return options


def check_options(options):
    """The flags of the command line, before anything runs; argparse has looked at their form."""
    paths = [os.path.abspath(path) for path in (options.base, options.save, options.json) if path]
    problems = {
        "--device cuda: PyTorch finds no CUDA device here; leave --device out.":
            options.device == "cuda" and not torch.cuda.is_available(),
        "--save writes the TABOM models, so --arms must name TABOM.":
            options.save and "TABOM" not in options.arms,
        "--seeds takes different numbers from 0 up.":
            len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0,
        "two of --base, --save and --json are one file; name two files.":
            len(set(paths)) < len(paths),
        **{f"{path} cannot be written: it is a folder, or its folder is missing or protected.":
           os.path.isdir(path) or not os.access(os.path.dirname(path), os.W_OK) for path in paths}}
    for message, wrong in problems.items():
        if wrong:
            raise DemoError(message)


def write_whole(path, write):
    """write(file) fills a temporary file, which becomes `path` when it is complete."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_models(path, config, weights):
    """weights {seed: state dict}, with the settings that another run must share to use them."""
    contents = {"kind": config.kind_of_base(), "weights": weights}
    write_whole(path, lambda file: torch.save(contents, file))


def load_models(path, config):
    """{seed: weights} from a file that --base or --save wrote."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
        kind, weights = contents["kind"], contents["weights"]
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError,
            pickle.UnpicklingError) as error:
        raise DemoError(f"{path} is no base file of this program: name another.") from error
    if kind != config.kind_of_base():
        raise DemoError(f"{path} holds other bases ({kind}): name another file, or use --set.")
    return weights


def write_report(path, config, seeds, quick, hardware, runs):
    """Every figure of the runs {seed: figures} as JSON, with what produced them."""
    report = {"config": vars(config), "seeds": seeds, "quick": quick, "device": hardware,
              "threads": torch.get_num_threads(), "machine": platform.machine(),
              "torch": torch.__version__, "python": platform.python_version(), "runs": runs}
    write_whole(path, lambda file: file.write(json.dumps(report, indent=1).encode()))


# == What the demo prints: tensors and figures in, text out ========================================

EXPLANATION = """\
    new      right answers in the new domain; change: against No-SFT, paired over test problems
    old      mean of the old domains; change: what was forgotten
    2 tok    new, with two tokens written per step
    TDS      variance of the entropies of what is still masked, nats²: is easy told from hard?
    pairs    held-out window pairs whose entropies are in reveal order; chance is 50
    gap      best order minus entropy order, new domain: what a better order could still bring
    turn     when the two digits of the factor were written, mean, from 1 to 12; 0: they were given
    factors  different second factors chosen, and (exp of the entropy of the choice) how many they
             amount to: a collapse to a few safe ones is a price, not a gain
    In percent but for TDS, turn and factors.  Higher is better but for gap and turn.
"""


def greeting(hardware, seeds, arms, quick):
    """The first lines of a run: on what, and what will happen."""
    warning = "\n--quick trains far too little: the numbers below mean nothing." if quick else ""
    return (f"TABOM on synthetic arithmetic: {hardware} ({torch.get_num_threads()} CPU threads), "
            f"PyTorch {torch.__version__}, seeds {seeds}.\n"
            f"A small base records how it decodes, is fine-tuned in {len(arms)} ways, and all are\n"
            "compared in the new domain and the old ones.  A seed with every arm has taken\n"
            f"6 to 9 minutes on 2 cores of an AMD EPYC.{warning}")


def table(header, rows):
    """Aligned columns: numbers with one decimal, unless they come as text."""
    lines = [[f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row]
             for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("    " + "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
                     for name, *cells in lines)


SHOWN_ORDERS = {"entropy": "entropy", "random": "random", "left to right": LEFT_TO_RIGHT,
                "best": BEST_ORDER}


def orders_table(new_domain, by_order):
    """{domain: percent in each of SHOWN_ORDERS} -> a row per domain, with its order gap."""
    rows = [[domain, *right, right[-1] - right[0]] for domain, right in by_order.items()]
    return (table(["domain", *SHOWN_ORDERS, "order gap"], rows) + "\n    best: factor, working, "
            "answer from its last digit; order gap: best minus entropy\n"
            f"    new is {new_domain}: {WHAT_IS_NEW[new_domain]}")


def likelihood_table(ratios, own_nll, reference_nll):
    """Nats per masked token, by the share that is masked (Fig. 3)."""
    return table(["masked", *ratios], [["self-distilled", *map("{:.2f}".format, own_nll)],
                                       ["reference", *map("{:.2f}".format, reference_nll)]])


def with_interval(mean, low, high):
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def results_table(results):
    """One seed, {arm: figures} -> a row per arm."""
    base, rows = results["No-SFT"], []
    old = [domain for domain in DOMAINS if domain in base]
    for arm, row in results.items():
        change = with_interval(*row["change"]) if arm != "No-SFT" else ""
        rows.append([arm, row["new"], change, *(row[domain] for domain in old), row["old"],
                     f"{row['old'] - base['old']:+.1f}", row["2 tok"], f"{row['TDS']:.2f}",
                     row["pairs"], row["gap"], row["turn"],
                     f"{row['factors']} ({row['effective']:.0f})"])
    return table(["arm", "new", "change [95 % interval]", *old, "old", "change", "2 tok", "TDS",
                  "pairs", "gap", "turn", "factors"], rows)


# Student's t, 97.5 %, for 2, 3, .. 20 seeds: half of a 95 % interval in standard errors.
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13,
         2.12, 2.11, 2.10, 2.09)


def seed_interval(values):
    """(seeds, ...) -> mean and the ends of its 95 % interval over seeds."""
    mean, n = values.mean(0), len(values)
    half = T_975[min(n, 20) - 2] * values.std(0) / n ** 0.5
    return mean, mean - half, mean + half


def summary_table(runs):
    """Several seeds, [{arm: figures}] -> mean ± standard deviation of each arm; then, paired, each
    arm minus No-SFT and TABOM minus each other arm, mean [95 % interval over seeds]."""
    names = ("new", "old", "2 tok", "TDS", "pairs", "gap", "turn", "factors", "effective")
    rows = {arm: torch.tensor([[float(results[arm][name]) for name in names] for results in runs])
            for arm in runs[0]}                 # (seeds, names)
    lines = [[arm, *map("{:.2f} ± {:.2f}".format, row.mean(0), row.std(0))]
             for arm, row in rows.items()]
    pairs = [(arm, "No-SFT") for arm in rows if arm != "No-SFT"]
    pairs += [("TABOM", arm) for arm in rows if "TABOM" in rows and arm not in ("No-SFT", "TABOM")]
    lines += [[f"{one} - {other}", *map("{:+.2f} [{:+.2f}, {:+.2f}]".format,
                                        *seed_interval(rows[one] - rows[other]))]
              for one, other in pairs]
    return table(["arm", *names], lines)


def claims_table(claims_of_runs):
    """[[(claim, figure, held)]] of several seeds -> in how many of them each claim held."""
    return "\n".join(f"    held in {sum(held for _, _, held in one)} of {len(one)}  {one[0][0]}"
                     for one in zip(*claims_of_runs))


def report_of_seeds(runs):
    """What `run_seed` gave for several seeds -> both tables as text."""
    runs = list(runs)
    title = f"\nMean ± standard deviation of {len(runs)} seeds; paired differences: 95 % interval"
    return (title + "\n" + summary_table([run["arms"] for run in runs]) + "\n"
            + claims_table([run["claims"] for run in runs]))


def curves(by_arm):
    """{arm: numbers from 0 up} -> a line of block characters for each, on one scale."""
    top = max(max(values) for values in by_arm.values()) or 1.0
    lines = []
    for arm, values in by_arm.items():
        blocks = ("▁▂▃▄▅▆▇█"[int(7.99 * value / top)] for value in values)
        lines.append(f"    {arm:10}  {''.join(blocks)}  █ is {top:.2f}")
    return "\n".join(lines)


def compare(arm, rival):
    """Paired difference in the new domain: mean, 95 % bootstrap interval over test problems."""
    difference = np.subtract(arm["per problem"], rival["per problem"])
    draws = np.random.default_rng(0).integers(len(difference), size=(4000, len(difference)))
    low, high = np.quantile(difference[draws].mean(1), (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def pass_at(solved):
    """(problems, n) bool -> {k: percent of problems solved in k tries}, estimated from all n tries
    as 1 - C(wrong, k) / C(n, k), for k = 1, 8, 64 as far as n goes."""
    n, wrong = solved.shape[1], (~solved).sum(1).tolist()
    return {k: sum(100 - 100 * math.comb(w, k) / math.comb(n, k) for w in wrong) / len(wrong)
            for k in (1, 8, 64) if k <= n}


def beyond_the_base(base, tuned):
    """The tuned model's percentages of right tries, on the problems that the base never solved."""
    return [now for was, now in zip(base["per problem"], tuned["per problem"]) if was == 0]


def boundary(base, tuned):
    """What the tuned model does where the base never succeeded, in words."""
    beyond = beyond_the_base(base, tuned)
    rate = sum(beyond) / max(1, len(beyond))
    return (f"    pass@k: No-SFT {in_brief(base['pass@k'])}; TABOM {in_brief(tuned['pass@k'])}\n"
            f"    of {len(base['per problem'])} problems the base never solved {len(beyond)}; "
            f"TABOM solves {sum(now > 0 for now in beyond)} of these, in {rate:.1f} % of its tries")


def in_brief(by_k):
    return ", ".join(f"{percent:.1f} (k={k})" for k, percent in by_k.items())


def judge(results, leads, own_nll, reference_nll):
    """The claims of the paper, judged by the figures of one run: [(claim, figure, held)].

    results {arm: figures}; leads {arm: (mean, low, high)}, TABOM minus the arm in the new domain.
    The limits in points are this demo's own.
    """
    lost = {arm: results["No-SFT"]["old"] - row["old"] for arm, row in results.items()}
    gain = {arm: row["new"] - results["No-SFT"]["new"] for arm, row in results.items()}
    claims = [("C1 references are less likely to the base than its own answers, at all mask ratios",
               f"{own_nll[4]:.2f} against {reference_nll[4]:.2f} nats at 0.5",
               all(own < other for own, other in zip(own_nll, reference_nll)))]

    def claim(text, figure, held):
        claims.append((text, figure if isinstance(figure, str) else f"{figure:+.1f}", bool(held)))

    if "SFT-GT" in lost:
        claim("C2 SFT-GT forgets 15 points or more", lost["SFT-GT"], lost["SFT-GT"] >= 15)
    if "TABOM" not in results:
        return claims
    tabom, rivals = results["TABOM"], [arm for arm in leads if ":" not in arm]
    if "SFT-SD" in rivals:
        claim("C3 SFT-SD gains less than half of what TABOM gains",
              f"{gain['SFT-SD']:+.1f} against {gain['TABOM']:+.1f}",
              2 * gain["SFT-SD"] < gain["TABOM"])
    for arm in rivals:
        if arm != "trajectory":
            claim(f"C4 TABOM is ahead of {arm}", with_interval(*leads[arm]), leads[arm][1] > 0)
    claim("C5 TABOM forgets 2 points or less", lost["TABOM"], lost["TABOM"] <= 2)
    if "SFT-SD" in rivals:
        claim("C5 TABOM forgets no more than SFT-SD does", lost["TABOM"] - lost["SFT-SD"],
              lost["TABOM"] <= lost["SFT-SD"])
    if "trajectory" in rivals:
        claim("C6 TABOM is ahead of trajectory", with_interval(*leads["trajectory"]),
              leads["trajectory"][1] > max(0, lost["TABOM"] - lost["trajectory"]))
    for arm in ("No-SFT", "SFT-SD"):
        if arm in rivals:
            raised = tabom["TDS"] - results[arm]["TDS"]
            claim(f"C7 TABOM raises TDS over {arm}", f"{raised:+.2f}", raised > 0)
    ahead = tabom["2 tok"] - results["No-SFT"]["2 tok"]
    claim("C8 TABOM is 5 points or more ahead of No-SFT at 2 tokens per step", ahead, ahead >= 5)
    sweep = [arm for arm in results if arm.startswith("TABOM:window_size=")]
    if len(sweep) > 2:                          # named from the narrowest window to the whole
        best = max(sweep, key=lambda arm: results[arm]["new"])
        claim("C9 a moderate window is best", best, best in sweep[1:-1])
    grid = {arm: gain[arm] for arm in results if arm.startswith(("TABOM:rank_weight=",
                                                                 "TABOM:margin="))}
    if grid:
        claim("C10 every weight and margin gains", min(grid.values()), min(grid.values()) > 0)
    for arm in results:
        if arm in ("TABOM:ranks=shuffled", "TABOM:ranks=reversed"):
            claim(f"C11 {arm} gains less than half of what TABOM gains", gain[arm],
                  2 * gain[arm] < gain["TABOM"])
    solved = [share > 0 for share in beyond_the_base(results["No-SFT"], tabom)]
    if solved:
        claim("C12 TABOM solves half or more of the problems that the base never solved",
              f"{sum(solved)} of {len(solved)}", 2 * sum(solved) >= len(solved))
    return claims


def report(results, answers, own_nll, reference_nll):
    """The end of a run in text, and the claims it judges: [(claim, figure, held)].

    results {arm: figures}; answers {arm: (Trajectories, correct)}; nats by mask ratio (Fig. 3).
    """
    lines = ["\nThe table", EXPLANATION, results_table(results),
             "\nTDS by decoding step, from everything masked to two masked positions",
             curves({arm: row["TDS curve"] for arm, row in results.items()
                     if arm in ("No-SFT", "SFT-SD", "TABOM")})]
    leads = {}
    if "TABOM" in results:
        leads = {arm: compare(results["TABOM"], row) for arm, row in results.items()
                 if arm != "TABOM"}
        lines += ["\nThree answers that the base got wrong and TABOM right, then one the other way",
                  differences(*answers["No-SFT"], *answers["TABOM"]),
                  "\nThe boundary of what the base can do", boundary(results["No-SFT"],
                                                                     results["TABOM"])]
    claims = judge(results, leads, own_nll, reference_nll)
    lines += ["\nWhat this run shows (one seed: figures, no proof)",
              *(f"    {'held        ' if held else 'did NOT hold'}  {claim}: {figure}"
                for claim, figure, held in claims)]
    return "\n".join(lines), claims


def in_words(prompt, response, decode_rank):
    """One answer as a sentence: (3,), (13,), (13,) -> text, with when the factor was chosen."""
    domain = next(name for name in DOMAINS if OPERATOR[name] == VOCABULARY[prompt[2]])
    first, second, answer = (int(read_number(tokens[None]))
                             for tokens in (prompt[:2], response[FACTOR], response[ANSWER]))
    right = {"add": first + second, "sub": first - second}.get(domain, first * second)
    when = ""
    if decode_rank[0] >= 0:
        when = f" (its factor was written at steps {decode_rank[0] + 1} and {decode_rank[1] + 1})"
    verdict = "right" if answer == right else f"wrong, it is {right}"
    if second < 10:
        verdict = "wrong, the second number must be from 10 to 99"
    return f"{first} {OPERATOR[domain]} {second} = {answer}: {verdict}{when}"


def differences(before, was_right, after, is_right):
    """Three answers that were wrong and became right, and one the other way, in words.

    before, after: anything with the fields prompt, response and decode_rank.
    """
    lines = []
    for rows, count in ((~was_right & is_right, 3), (was_right & ~is_right, 1)):
        rows = rows.nonzero()[:, 0]
        for row in rows[::max(1, len(rows) // count)][:count]:
            for name, all_ in (("base ", before), ("TABOM", after)):
                fields = all_.prompt[row], all_.response[row], all_.decode_rank[row]
                lines.append(f"    {name} {in_words(*fields)}")
            lines.append("")
    return "\n".join(lines[:-1]) or "    there is none"


def draw_state(prompt, response, decode_rank, entropy, n_visible, styled):
    """One state of a trajectory as a line of text.

    prompt (3,), response and decode_rank (13,), entropy (13,) of masked positions in nats.  What is
    visible is written out, what was just revealed marked, what is masked shaded by its entropy.
    """
    shades, mark, plain = " .:+#", "[{}]", " {} "
    if styled:
        shades, mark, plain = " ░▒▓█", "\033[7m{}\033[0m", "{}"
    cells = []
    for token, rank, nats in zip(response.tolist(), decode_rank.tolist(), entropy.tolist()):
        if rank >= n_visible:
            cells.append(plain.format(shades[min(int(2 * nats), 4)]))
        else:
            cells.append((mark if rank == n_visible - 1 >= 0 else plain).format(VOCABULARY[token]))
    parts = (slice(0, 3), ANSWER, UNITS_ROW, TENS_ROW)
    return to_text(prompt) + "  ".join("".join(cells[part]) for part in parts)


def draw_trajectory(trajectory, entropies):
    """All states of one trajectory (its fields with a batch of one), a line each."""
    prompt, response, rank = (
        field[0] for field in (trajectory.prompt, trajectory.response, trajectory.decode_rank))
    styled = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    lines = [f"    step {step:2}   {draw_state(prompt, response, rank, entropy, step, styled)}"
             for step, entropy in enumerate(entropies) if step <= rank.max() + 1]
    lines.append("    marked: just written; shades: entropy of what is masked, 0.5 nats apart")
    return "\n".join(lines)
