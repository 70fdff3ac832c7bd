# SPDX-License-Identifier: MIT
"""The lab of TABOM: every figure of README.md beside this file, and how to make it again.

    python .results/lab.py --arms core --seeds 10 11 .. 19      20 minutes a seed, one thread
    python .results/lab.py --arms rates --seeds 10 11 .. 14     25 minutes more a seed
    python .results/lab.py --arms sweeps --seeds 10 11 12       5 minutes more a seed
    python .results/lab.py --arms tune --seeds 100 101 102 103 --set split=validation \\
                           --folder .results/tuning             12 minutes a seed
    python .results/page.py                                     tables, verdicts on claims.txt
    python .results/page.py draw                                all pictures, film.txt

What is finished stands in figures/, one file for each seed and arm, and is not made again: a run
that was stopped goes on.  Processes can share the work, with other seeds or other arms; give each
one thread (OMP_NUM_THREADS=1) on a core of its own.  bases/ holds the weights of the bases; without
it they are trained again, four minutes each.  An arm of the lab is a line as in tabom.py, with more
to learn from; arms that tabom.py knows are trained by it.
"""
import argparse
import copy
import itertools
import json
import math
import os
import re
import statistics
import sys
import unittest.mock
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import tabom                                     # noqa: E402
import toy_data as toy                           # noqa: E402

# == What all arms of a seed share =================================================================

class Seed:
    """The base, what it collected, and the problems of a seed; each is made when it is needed."""
    def __init__(self, seed, folder, settings):
        self.seed, self.folder, self.settings = seed, folder, settings
        self.corpus, self.odds, self.problems = toy.split_problems(seed)
        parts, count = self.problems[settings.split], settings.test_problems
        self.tests = {"pick": toy.first_of_each(parts["pick"], math.ceil(0.4 * count)),
                      **{domain: parts[domain][:count] for domain in ("mul", "add")}}
        queries = self.problems["query"]["pick"]
        self.queries = queries[torch.arange(settings.queries) % len(queries)]

    @cached_property
    def base(self):
        path = self.folder / "bases" / f"{self.seed}-{self.settings.pretrain_updates}.pt"
        if not path.exists():
            save(path, tabom.pretrain(self.corpus, self.odds, self.settings.pretrain_updates,
                                      self.seed).state_dict())
        model = tabom.Denoiser(len(toy.VOCABULARY), self.corpus.shape[1])
        model.load_state_dict(torch.load(path))
        return model.eval()

    @cached_property
    def rollouts(self):
        return tabom.answer(self.base, self.queries, temperature=self.settings.temperature,
                            generator=tabom.random_stream(self.seed, "collect"))

    @cached_property
    def kept(self):
        answers, right = self.rollouts
        return answers[right] if self.settings.keep == "right" else answers

    def draws(self):
        return tabom.random_stream(self.seed, "data")

def save(path, content):
    """Write .pt or .json; what has its final name is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        if path.suffix == ".pt":
            torch.save(content, unfinished)
        else:
            unfinished.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)

# == More to learn from ============================================================================

def ranks_of_others(seed, groups):
    """Each answer with the ranks of another one of its group (n,), or its own if it is alone."""
    kept, draws = seed.kept, seed.draws()
    ranks = kept.decode_rank.clone()
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=draws)]
        ranks[rows] = kept.decode_rank[rows.roll(1)]
    return replace(kept, decode_rank=ranks)

def swapped(seed):
    """The ranks of another right answer, to any prompt."""
    return ranks_of_others(seed, torch.zeros(len(seed.kept)))

def alike(seed):
    """The ranks of another right answer, to a prompt with the same layout and c."""
    return ranks_of_others(seed, 10 * seed.kept.prompt[:, -1] + toy.n_choices(seed.kept.prompt))

def backwards(seed):
    kept = seed.kept
    return replace(kept, decode_rank=kept.n_decoded[:, None] - 1 - kept.decode_rank)

def unchecked(seed, rows=slice(None)):
    """As many answers as are kept, right or wrong."""
    answers = seed.rollouts[0][rows]
    return answers[torch.randperm(len(answers), generator=seed.draws())[:len(seed.kept)]]

def wrong(seed):
    return unchecked(seed, ~seed.rollouts[1])

def solve_old(rows, factor):
    """Rows in the style of commit 3fd7132: each row of working, 85 x 7 and 85 x 4, needs both
    digits of the factor, and so teaches that the working comes after it."""
    first = toy.read_number(rows[:, :2])
    in_layout_a = torch.cat([toy.digits(first * factor, 4), toy.digits(factor, 2),
                             toy.digits(first % 10 * factor, 3),
                             toy.digits(first // 10 * factor, 3)], 1)
    return torch.cat([rows[:, :toy.PROMPT_LENGTH], in_layout_a.gather(1, toy.columns_of(rows))], 1)

def old_solutions(seed):
    solutions = toy.given_solutions(seed.queries, "own", seed.draws())
    return tabom.solved(solve_old(solutions, toy.read_factor(solutions)))

def with_replay(seed):
    """Given solutions in the other style, and a fifth of rows from the corpus."""
    draws = seed.draws()
    solutions = toy.given_solutions(seed.queries, "other", draws)
    old = torch.multinomial(seed.odds, len(solutions) // 4, True, generator=draws)
    return tabom.solved(torch.cat([solutions, seed.corpus[old]]))

# == Arms ==========================================================================================
TABOM, NELBO = tabom.ARMS["TABOM"][1:], (tabom.nelbo_loss, [])
ARMS = {  # name: what it learns from, by which loss, with which of the settings
    "swapped": (swapped, *TABOM), "alike": (alike, *TABOM), "reversed": (backwards, *TABOM),
    "unchecked": (unchecked, *TABOM), "wrong": (wrong, *TABOM),
    "SFT-GT-old": (old_solutions, *NELBO), "SFT-GT-replay": (with_replay, *NELBO)}

RATES = (1e-6, 2e-6, 3e-6, 5e-6, 7e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4)
TUNED = 1e-6                                     # of SFT-GT, chosen on seeds 100 to 103
def at(name, rate):
    return name if rate == 2e-5 else f"{name}{',' if ':' in name else ':'}learning_rate={rate:g}"

CURVES = ("SFT-GT", "SFT-GT:style=own", "SFT-SD", "masking", "T3D", "TABOM", "TABOM:margin=0.2")
GROUPS = {
    "core": ["No-SFT", "SFT-GT", at("SFT-GT", TUNED), "SFT-GT:style=own", "SFT-GT-old",
             at("SFT-GT-old", TUNED), "SFT-GT-replay", at("SFT-GT-replay", TUNED), "SFT-SD",
             "dInfer", "T3D", "masking", "TABOM", "TABOM:margin=0.2", "shuffled", "swapped",
             "alike", "unchecked", "wrong", "reversed", "TABOM:window_size=12",
             at("TABOM", 5e-6), at("TABOM", 1e-4)],
    "rates": [at(name, rate) for name in CURVES for rate in RATES
              if name == "SFT-GT" or rate not in (2e-6, 3e-6, 7e-6)]
             + [at("SFT-GT-old", rate) for rate in (2e-6, 5e-6, 1e-5, 2e-5)],
    "sweeps": [f"TABOM:margin={margin:g}" for margin in (0.1, 0.3, 0.5, 0.7)]
              + [f"TABOM:margin={margin:g},rank_weight=2" for margin in (0.1, 0.2, 0.3)]
              + [f"TABOM:window_size={size}" for size in (2, 3, 8)],
    "tune": ["No-SFT", *(at("SFT-GT", rate) for rate in RATES[:7]),
             *(f"TABOM:margin={margin:g}" for margin in (0.2, 0.3, 0.5, 0.7)), "TABOM"]}

def read(name, settings):
    """An arm's name -> its line and its settings, as `tabom.read_arm`, for the lab's arms, too."""
    arm, _, own = name.partition(":")
    if arm not in ARMS:
        return tabom.read_arm(name, settings)
    names = ["learning_rate", "batch_size", "epochs", *ARMS[arm][2]]
    return ARMS[arm], tabom.configure(own.split(",") if own else [], settings, names)

def fine_tune(name, seed):
    (source, loss_fn, names), own = read(name, seed.settings)
    if not callable(source):
        return tabom.fine_tune(name, seed.base, seed.kept, seed.queries, seed.settings, seed.seed)
    loss_fn = partial(loss_fn, **{x: vars(own)[x] for x in names})
    return learn(name, seed, source(seed), loss_fn, own)

def learn(name, seed, data, loss_fn, own):
    """The recipe of `tabom.fine_tune`, with data of any kind and as many updates."""
    model, order = copy.deepcopy(seed.base), tabom.random_stream(seed.seed, "batches")
    updates = max(1, own.epochs * len(seed.kept) // own.batch_size)
    passes = torch.cat([torch.randperm(len(data), generator=order) for _ in range(own.epochs)])
    tabom.train(model, data, passes[:updates * own.batch_size].view(updates, -1), loss_fn,
                [torch.optim.AdamW(model.parameters(), own.learning_rate)],
                lambda x: 0.5 + 0.5 * math.cos(math.pi * x), seed.seed, name)
    return model

# == What is measured ==============================================================================
BLOCKS = (1, 2, 3, 4, 6)                         # lengths, of 12 tokens

def measure(name, seed):
    """All figures of an arm: those of the demo and, for the arms of the core, some more."""
    model, pick = fine_tune(name, seed), seed.tests["pick"]
    checker = partial(is_correct, also_old=name.startswith("SFT-GT-old"))
    with unittest.mock.patch.object(toy, "is_correct", checker):
        figures, answers, _ = tabom.evaluate(model, seed.tests, seed.seed)
        by_c = figures.pop("by c")
        figures |= {f"c = {c}": value for c, value in by_c.items()}
        figures["c = 5 - 2"] = by_c["5"] - by_c["2"]
        if name in GROUPS["core"]:
            two_a_step = tabom.answer(model, pick, tokens_per_step=2)[1]
            figures["two a step"] = toy.by_choices(pick, two_a_step)["2-5"]
            figures |= pass_at(model, pick, seed.seed) | why(model, pick, answers)
            products = product_alone(tabom.rows_of(tabom.answer(model, seed.tests["mul"])[0]))
            figures["product of mul"] = 100 * products.float().mean().item()
            figures |= crossed(seed.base, model, pick)
    return figures

def is_correct(rows, also_old, checker=toy.is_correct):
    """The toy's checker; what has learned the old style may also answer in it."""
    right = checker(rows)
    if also_old:
        factor = toy.read_factor(rows)
        with_own = toy.solve(rows, factor.clamp(min=0))                  # is the factor allowed?
        right |= checker(with_own) & (rows == solve_old(rows, factor)).all(1) & (
            rows[:, 2] == toy.token("x"))
    return right

def crossed(base, model, pick):
    """Is it the order?  Percent right if one model writes and another one says where."""
    def order_of(other):
        return lambda _, tokens, candidates: tabom.predictive_entropy(
            other(tokens)[:, toy.PROMPT_LENGTH:][candidates])
    pairs = {"base writes in this order": (base, order_of(model)),
             "writes in the base's order": (model, order_of(base)),
             "by confidence": (model, tabom.by_confidence)}
    return {name: toy.by_choices(pick, tabom.answer(writer, pick, order=order)[1])["2-5"]
            for name, (writer, order) in pairs.items()}

def product_alone(rows):
    """(n,) bool: is the product of a row of mul right, whatever stands in the working?"""
    solved = toy.solve(rows, toy.read_factor(rows))
    return ((solved == rows)[:, toy.PROMPT_LENGTH:] | (toy.columns_of(rows) > 3)).all(1)

def pass_at(model, pick, seed, prompts=40, samples=16):
    """Percent of prompts with a right answer among k of 16, for c = 2 to 5: all choices of k."""
    some = toy.first_of_each(pick[toy.n_choices(pick) > 1], prompts).repeat_interleave(samples, 0)
    draws = tabom.random_stream(seed + 10 ** 6, "evaluate")
    right = tabom.answer(model, some, temperature=1.0, generator=draws)[1].view(-1, samples).sum(1)
    return {f"pass@{k} of {len(right)}": statistics.mean(
        100 - 100 * math.comb(samples - n, k) / math.comb(samples, k) for n in right.tolist())
        for k in (1, 4, 16)}

def why(model, pick, answers):
    """When the first digit of the factor is written (0: first of all); where answers go wrong, by
    a digit of the factor or by another one; the entropy gap before any write, after three."""
    chooses = toy.n_choices(pick) > 1
    pick, answers = pick[chooses], answers[chooses]
    rank, is_factor = answers.decode_rank, toy.is_factor(pick)
    found = {"turn of the factor": rank.masked_fill(~is_factor, 99).amin(1).float().mean().item()}
    wrong = rank == torch.tensor([*map(last_hope, tabom.rows_of(answers), rank)])[:, None] - 1
    for place, positions in (("factor", is_factor), ("other", ~is_factor)):
        found[f"wrong by {place}"] = toy.by_choices(pick, (wrong & positions).any(1))["2-5"]
    states = tabom.replay(model, answers, mask_id=toy.MASK_ID)
    for n_visible, (masked, entropy) in itertools.islice(enumerate(states), 0, 4, 3):
        gap = toy.entropy_gap(pick, entropy.masked_fill(~masked, torch.inf))
        found[f"gap after {n_visible}"] = gap[gap.isfinite()].mean().item()
    return found

def last_hope(row, rank):
    """After how many writes of an answer (18,), rank (12,), no right one is in reach; 13: none."""
    solved = torch.cat([toy.solve(row.expand(89, -1), torch.arange(11, 100), style)
                        for style in ("own", "other")])
    right = solved[toy.is_correct(solved)]
    fits = (right == row)[:, toy.PROMPT_LENGTH:]
    return next((n for n in range(1, 13) if not (fits | (rank >= n)).all(1).any()), 13)

def by_table(table):
    """An order for `decode` that writes by a number for each layout (3) and position (12)."""
    def order(logits, tokens, candidates):
        layout = tokens[:, toy.PROMPT_LENGTH - 1] - toy.token("a")
        return table[layout][candidates]
    return order

def mean_rank(answers):
    layout = answers.prompt[:, -1] - toy.token("a")
    return torch.stack([answers.decode_rank[layout == x].float().mean(0) for x in range(3)])

def head_start(nats):
    """The order of lowest entropy, with the factor's entropies lower by some nats."""
    def order(logits, tokens, candidates):
        factor = toy.is_factor(tokens)[candidates]
        return tabom.predictive_entropy(logits) - nats * factor
    return order

def measure_base(seed):
    """What the base does in other orders, and how likely each kind of answer is to it."""
    pick, model, (answers, right) = seed.tests["pick"], seed.base, seed.rollouts
    prior, draws = mean_rank(seed.kept), tabom.random_stream(seed.seed, "evaluate")
    orders = {"own": {}, "confidence": {"order": tabom.by_confidence},
              **{f"blocks of {size}": {"block_length": size} for size in BLOCKS},
              "right to left": {"order": lambda _, tokens, candidates: -candidates.nonzero()[:, 1]},
              "random": {"order": lambda logits, *_: torch.rand(len(logits), generator=draws)},
              "prior": {"order": by_table(prior)},
              "contrast prior": {"order": by_table(prior - mean_rank(answers[~right]))},
              "best": {"order": toy.best_order},
              **{f"head start {nats:.1f}": {"order": head_start(nats)}
                 for nats in (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)}}
    kinds = {"own answers": seed.kept[:2000], "old style": old_solutions(seed)[:2000],
             **{f"{style} style": tabom.solved(toy.given_solutions(
                 seed.queries[:2000], style, seed.draws())) for style in ("own", "other")}}
    return {"kept": len(seed.kept), "right of rollouts": 100 * right.float().mean().item(),
            **{f"own order {name}": toy.by_choices(pick, tabom.answer(model, pick, **order)[1])[
                "2-5"] for name, order in orders.items()},
            **{f"nll {hidden} {kind}": nll(model, data, hidden, seed.draws())
               for kind, data in kinds.items() for hidden in (1, 3, 5, 7, 9, 11)},
            **pairs_in_order(model, seed.kept[:2000])}

@torch.no_grad()
def nll(model, data, hidden, draws):
    """Cross-entropy in nats of `hidden` random tokens of each answer."""
    masked, _ = tabom.cut(tabom.shuffled(data.decode_rank, draws), data.n_decoded - hidden)
    log_p = tabom.predict(model, data, masked, masked, toy.MASK_ID)
    return tabom.token_nll(log_p, data.response[masked]).mean().item()

def pairs_in_order(model, data):
    """Of pairs of hidden tokens, the share with the lower entropy for the one that was written
    first, by how many writes they are apart and whether the first is the next to be written."""
    hits = {}
    for n_visible, (masked, entropy) in enumerate(tabom.replay(model, data, mask_id=toy.MASK_ID)):
        ordered = entropy.gather(1, data.decode_rank.argsort(1))         # by rank
        for first in range(n_visible, 12):
            for second in range(first + 1, 12):
                kind = "next" if first == n_visible else "later"
                hits.setdefault(f"pairs in order, {kind}, {second - first} apart", []).append(
                    100 * (ordered[:, first] < ordered[:, second]).float().mean().item())
    return {kind: statistics.mean(values) for kind, values in sorted(hits.items())}

# == Running and reading ===========================================================================

def path_of(folder, seed, name):
    return folder / "figures" / f"seed-{seed}" / f"{name.replace(':', ' ')}.json"

SHARED = ("pretrain_updates", "queries", "temperature", "keep", "test_problems", "split")
def recipe(name, settings):
    """Its name says what is special about an arm; `settings` only what all arms share."""
    settings = tabom.Settings(**{x: vars(settings)[x] for x in SHARED})
    own = settings if name == "base" else read(name, settings)[1]
    return {x: vars(own)[x] for x in (SHARED if name == "base" else vars(own))}

def load(folder, settings=None):
    """-> {seed: {arm: figures}} of what is finished; all of it by one recipe, that of settings."""
    found = {}
    for path in sorted((folder / "figures").glob("seed-*/[!.]*.json")):
        run = json.loads(path.read_text())
        tabom.require(path == path_of(folder, run["seed"], run["arm"]),
                      f"{path} holds seed {run['seed']}, {run['arm']}: a copy? Remove it.")
        settings = settings or tabom.Settings(**{x: run["recipe"][x] for x in SHARED})
        tabom.require(run["recipe"] == recipe(run["arm"], settings), f"{path} was made by another "
                      f"recipe, {run['recipe']}: use another --folder.")
        found.setdefault(run["seed"], {})[run["arm"]] = run["figures"]
    return found

def run(options):
    settings = tabom.configure(["test_problems=1000", *options.set])
    names = [x for name in ("base", *options.arms) for x in GROUPS.get(name, [name])]
    recipes = {name: recipe(name, settings) for name in names}           # refuses what is no arm
    for number in options.seeds:
        seed = Seed(number, options.folder, settings)
        for name in recipes:
            if name not in load(options.folder, settings).get(number, {}):
                figures = measure_base(seed) if name == "base" else measure(name, seed)
                save(path_of(options.folder, number, name), {
                    "seed": number, "arm": name, "recipe": recipes[name], "figures": figures,
                    "torch": torch.__version__, "threads": torch.get_num_threads()})
                print(f"seed {number}, {name}: {figures.get('own order', '')}", flush=True)

# == Claims ========================================================================================
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)   # 95 %, n = 2 .. 10

def claims(text):
    """claims.txt -> [(claim, figures, {arm: weight}, sign, threshold, expected verdict)]"""
    parts = []
    for line in text.splitlines():
        if line.startswith("  "):
            figure, terms, claimed, expected = map(str.strip, line.split("|"))
            weights = {}
            for term in terms.replace(" - ", " + -").split(" + "):
                minus, share, arm = re.fullmatch(r"(-?)([0-9.]+ )?(.*)", term).groups()
                weights[arm] = float(minus + (share or "1"))
            parts.append((claim, figure.split(" or "), weights, 1 if claimed[0] == ">" else -1,
                          float(claimed[1:]), expected))
        elif not line.startswith("#"):
            claim = line
    return parts

def over_seeds(found, weights, figure):
    """{seed: {arm: figures}}, {arm: weight} -> on each seed that has all, the sum of one figure."""
    result = []
    for _, arms in sorted(found.items()):        # orders and kinds stand among figures of the base
        values = {arm: arms.get(arm, {}).get(figure, arms.get("base", {}).get(f"{figure} {arm}"))
                  for arm in weights}
        if None not in values.values():
            result.append(sum(weight * values[arm] for arm, weight in weights.items()))
    return result

def interval(values):
    """Mean and 95 % interval (Student)."""
    mean = statistics.mean(values)
    half = STUDENT[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half

VERDICTS = ("not measured", "refuted", "not shown", "shown")             # the worst first
def verdict(low, high, sign, threshold):
    worst, best = sorted((sign * low, sign * high))
    if worst > sign * threshold:
        return "shown"
    return "refuted" if best < sign * threshold else "not shown"

def judge(found, text):
    """-> [claim, what is claimed, number of seeds, means with intervals, expected, verdict] of
    each line.  Of a line with two figures both are told; the verdict is that of the better one."""
    lines = []
    for claim, figures, weights, sign, threshold, expected in claims(text):
        means, verdicts, n = [], ["not measured"], 0
        for figure in figures:
            if len(values := over_seeds(found, weights, figure)) >= 2:
                n, (mean, low, high) = len(values), interval(values)
                means.append(f"{mean:.2f} [{low:.2f}, {high:.2f}]")
                verdicts.append(verdict(low, high, sign, threshold))
        sums = " ".join(f"{weight:+g} {arm}" for arm, weight in weights.items())
        sums = sums.replace("+1 ", "").replace(" -1 ", " - ")
        lines.append([claim, f"{' or '.join(figures)}: {sums} {'>' if sign > 0 else '<'} "
                      f"{threshold:g}", n, "; ".join(means), expected,
                      max(verdicts, key=VERDICTS.index)])
    return lines

def main(arguments):
    parser = argparse.ArgumentParser(
        prog="lab.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="groups of arms: " + ", ".join(GROUPS) + "\narms: " + ", ".join(
            (*tabom.ARMS, *ARMS)) + "; any with :setting=value,..")
    parser.add_argument("--seeds", type=int, nargs="+", required=True, metavar="N")
    parser.add_argument("--arms", nargs="+", default=["core"], metavar="ARM")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE")
    parser.add_argument("--folder", type=Path, default=HERE)
    options = parser.parse_args(arguments or ["--help"])
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"lab.py: {error}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
