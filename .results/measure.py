# SPDX-License-Identifier: MIT
"""What only the evidence needs: python .results/measure.py N ..., for the seeds N of .results/ten.

Run `python tabom.py --demo --out .results/ten --set test_problems=1000 --seeds N ...` first: its
bases and tuned models are used here.  The figures are written to .results/ten/measure/seed-N.json.
Without seeds: the tables.
"""
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).parent
RUNS, FIGURES = HERE / "ten", HERE / "ten" / "measure"
sys.path.insert(0, str(HERE.parent))
import tabom                     # noqa: E402
import toy_data as toy           # noqa: E402
from tabom import percent_right, predictive_entropy, response_logits, rows_of   # noqa: E402

def entropies(model, tokens):
    """(n, L+N) -> (n, N) nats."""
    return predictive_entropy(response_logits(model, *tabom.halves(tokens)))

@torch.no_grad()
def likelihood_gap(base, kept, seed):
    """Fig. 3: nats by which reference solutions in another style are less likely to the base than
    its own kept answers to the same prompts, for each mask ratio 0.1 .. 0.9."""
    other = tabom.training_data("SFT-GT", kept, tabom.Config(), seed)
    gaps = []
    for ratio in range(1, 10):
        nll = [tabom.nelbo_loss(base, data, mask_id=toy.MASK_ID, mask_ratio=ratio / 10,
                                generator=tabom.random_stream(seed, "masks"))[0].item()
               for data in (kept, other)]
        gaps.append(nll[1] - nll[0])
    return gaps

def head_start(base, pick):
    """Accuracy by c if the digits of the factor get a head start of delta nats."""
    def order_of(delta):
        return lambda logits, tokens: (predictive_entropy(logits)
                                       - delta * toy.is_factor(tokens).float())
    return {f"{i / 10:.1f}": percent_right(base, pick, order=order_of(i / 10)) for i in range(13)}

@torch.no_grad()
def pseudo_likelihood(model, trajectories):
    """Sum over positions of log p(token), each seen with all others there -> (n,), (n, N)."""
    found = []
    for i in range(toy.RESPONSE_LENGTH):
        x_t = trajectories.response.clone()
        x_t[:, i] = toy.MASK_ID
        logits = response_logits(model, trajectories.prompt, x_t)[:, i:i + 1]
        found.append(-tabom.token_nll(logits, trajectories.response[:, i:i + 1])[:, 0])
    return torch.stack(found, 1)

def by_more_calls(base, pick, seed):
    """Rivals that spend more calls on an answer -> {name: [percent right, calls per answer]}."""
    def percent(tokens):
        return toy.by_choices(tokens, toy.is_correct(tokens))["all"]
    n, results = len(pick), {}
    samples, _ = tabom.answer(base, pick.repeat_interleave(16, 0), temperature=1.0,
                              generator=tabom.random_stream(seed, "evaluate"))
    best = pseudo_likelihood(base, samples).sum(1).view(n, 16).argmax(1)
    results["best of 16 by pseudo-likelihood"] = [
        percent(rows_of(samples)[torch.arange(n) * 16 + best]), 16 * 24]
    tokens = rows_of(tabom.answer(base, pick)[0])
    for times in (1, 2):
        worst = pseudo_likelihood(base, tabom.solved(tokens)).topk(4, largest=False).indices
        tokens = tokens.clone().scatter_(1, worst + toy.PROMPT_LENGTH, toy.MASK_ID)
        tokens = rows_of(tabom.answer(base, tokens)[0])
        results[f"erase the 4 least likely, decode again, {times} x"] = [
            percent(tokens), 12 + times * (12 + 4)]
    return results

@torch.no_grad()
def gap_after_reveals(model, pick):
    """Entropy of the surest position outside the factor and the gap to it, nats, mean over c = 2 to
    5, where no digit of the factor is written: at the start and after three reveals of the model's
    own greedy decoding; and the turn of the factor."""
    answers, _ = tabom.answer(model, pick)
    found = {"turn": toy.factor_figures(rows_of(answers), answers.decode_rank)["factor turn"]}
    for n_visible, (x_t, masked, entropy) in enumerate(
            tabom.replay(model, answers, mask_id=toy.MASK_ID)):
        if n_visible in (0, 3):
            hidden = entropy.masked_fill(~masked, torch.inf)
            some = (masked | ~toy.is_factor(pick)).all(1)
            other = hidden.masked_fill(toy.is_factor(pick), torch.inf).amin(1)
            found[f"other {n_visible}"] = toy.by_choices(pick[some], other[some])["all"]
            found[f"after {n_visible}"] = toy.by_choices(
                pick[some], toy.entropy_gap(pick, hidden)[some])["all"]
    return found

@torch.no_grad()
def pairs_by_distance(model, held_out):
    """Percent of pairs in the recorded order, at the cut, by the distance of their ranks 1 .. 11;
    over all cuts and all that is masked."""
    right, total = torch.zeros(12), torch.zeros(12)
    rank = held_out.decode_rank
    for _, masked, entropy in tabom.replay(model, held_out, mask_id=toy.MASK_ID):
        pairs = masked[:, :, None] & masked[:, None, :]
        distance = rank[:, None, :] - rank[:, :, None]
        ordered = entropy[:, :, None] < entropy[:, None, :]
        for d in range(1, 12):
            right[d] += (pairs & ordered & (distance == d)).sum()
            total[d] += (pairs & (distance == d)).sum()
    return (100 * right / total)[1:].tolist()

def measure(seed):
    run = json.loads((RUNS / f"seed-{seed}.json").read_text())
    weights = torch.load(RUNS / f"seed-{seed}.pt", weights_only=True)
    config = tabom.Config(**run["settings"])
    def config_of(arm):
        return replace(config, **run["arms"][arm]["settings"])
    base = tabom.Denoiser(len(toy.VOCABULARY), 18, config.layers, config.width).eval()
    base.load_state_dict(weights["base"])
    tuned = copy.deepcopy(base)
    tuned.load_state_dict(weights["TABOM"])
    problems = toy.split_problems(seed, config.layouts)[2]
    pick = problems["pick"]["test"]
    held_out = tabom.self_distil(base, problems["pick"]["validation"],
                                 replace(config, queries=1000), seed)[-1]
    tests = {domain: toy.first_of_each(parts["test"], 5)     # run_arm's own figures are not used
             for domain, parts in problems.items()}
    bench = tabom.Bench(seed, base, problems["pick"]["query"], problems["pick"]["validation"],
                        tests, held_out, {})
    def gap_of(arm):
        return gap_after_reveals(tabom.run_arm(arm, arm, config_of(arm), bench)[1], pick)
    first = toy.read_number(bench.queries[:, :2])
    unseen = pick[toy.read_number(pick[:, :2]) % 3 == 0]
    apart = replace(bench, queries=bench.queries[first % 3 > 0], collected={})
    _, without_threes = tabom.run_arm("TABOM, no first factor in 3, 6, ..", "TABOM",
                                      config_of("TABOM"), apart)
    def order_by(model):
        return lambda logits, tokens: entropies(model, tokens)
    def unequal(model):
        answers, correct = tabom.answer(model, pick)
        some = toy.read_factor(rows_of(answers)) % 11 > 0
        return toy.by_choices(pick[some], correct[some])["all"]
    return {
        "seed": seed,
        "likelihood gap": likelihood_gap(base, held_out, seed),
        "orders": {
            "TABOM's order, base's tokens": percent_right(base, pick, order=order_by(tuned))["all"],
            "base's order, TABOM's tokens":
                percent_right(tuned, pick, order=order_by(base))["all"]},
        "head start": head_start(base, pick),
        "more calls": by_more_calls(base, pick, seed),
        "gap": {"base": gap_after_reveals(base, pick), "TABOM": gap_after_reveals(tuned, pick),
                "SFT-SD": gap_of("SFT-SD"), "SFT-GT": gap_of("SFT-GT")},
        "pairs by distance": {"base": pairs_by_distance(base, held_out),
                              "TABOM": pairs_by_distance(tuned, held_out)},
        "multiples of 3": {
            "base": percent_right(base, unseen)["all"],
            "TABOM": percent_right(tuned, unseen)["all"],
            "TABOM, none in the queries": percent_right(without_threes, unseen)["all"]},
        "without equal digits": {"base": unequal(base), "TABOM": unequal(tuned)}}

def read(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*.json"))]

def interval(values, decimals=1):
    mean, low, high = toy.mean_and_interval(list(values))
    return f"{mean:+.{decimals}f} [{low:+.{decimals}f}, {high:+.{decimals}f}]"

def mean(values):
    values = list(values)
    return sum(values) / len(values)

def dial(runs):
    """What the ranking term adds to trajectory masking, by c: a picture for two margins."""
    lines = ["    o gamma 1, x gamma 0.2, - and . their intervals, | nothing"]
    masking, few = "trajectory:kept_each=250", ":kept_each=250"
    for c in map(str, toy.CHOICES):
        bar, marks, texts = [" "] * 6 + ["|"] + [" "] * 24, {}, []       # a cell is a point
        for arm, mark, line in (("TABOM-paper", "x", "."), ("TABOM", "o", "-")):
            added = [run["arms"][arm + few]["by c"][c] - run["arms"][masking]["by c"][c]
                     for run in runs]
            marks[mark], low, high = (min(30, max(0, 6 + round(value)))
                                      for value in toy.mean_and_interval(added))
            bar[low:high + 1] = line * (high + 1 - low)
            texts.append(f"{mark} {interval(added)}")
        for mark, at in marks.items():
            bar[at] = mark
        gap = mean(run["entropy gap"][c] for run in runs)
        lines.append(f"    c = {c}, gap {gap:4.2f} nats  "
                     f"{''.join(bar)}  {texts[1]:<22}  {texts[0]}")
    return "\n".join(lines)

def head_start_of(curve, accuracy):
    """The delta at which the base's curve {delta: by c} reaches an accuracy, by interpolation."""
    points = [(float(delta), by_c["all"]) for delta, by_c in curve.items()]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y0 <= accuracy <= y1:
            return x0 + (x1 - x0) * (accuracy - y0) / max(y1 - y0, 1e-9)
    return 0.0 if accuracy < points[0][1] else points[-1][0]

def report():
    runs, found = read(RUNS), read(FIGURES)
    for run, one in zip(runs, found, strict=True):         # made with the same base
        assert abs(run["orders"]["entropy"] - one["head start"]["0.0"]["all"]) < 0.01
    def row(name, value, decimals=1):
        return [name, *(f"{mean(value(one, where) for one in found):.{decimals}f}"
                        for where in ("base", "SFT-SD", "SFT-GT", "TABOM"))]
    calls = {name: [mean(one["more calls"][name][0] for one in found), str(calls)]
             for name, (_, calls) in found[0]["more calls"].items()}
    greedy = {arm: [run["arms"][arm]["greedy"] for run in runs] for arm in runs[0]["arms"]}
    worth = [[arm, interval([head_start_of(one["head start"], value) for one, value in
                             zip(found, greedy[arm])], 2)]
             for arm in ("TABOM-paper", "TABOM-paper:rank_weight=2", "TABOM", "TABOM:margin=2")]
    curve = [[f"{i / 10:.1f}", *(mean(one["head start"][f"{i / 10:.1f}"][c] for one in found)
                                 for c in ("all", "2", "3", "4", "5"))] for i in range(0, 13, 2)]
    tables = [
        toy.table(["way to answer, ten seeds", "right, %", "calls per answer"], [
            *([f"base, {name}", mean(run["orders"][name] for run in runs), "12"]
              for name in runs[0]["orders"] if name != "best, sampled"),
            *([f"base, entropy and a prior ({kind})", mean(greedy[f"No-SFT:prior={kind}"]), "12"]
              for kind in ("kept", "contrast")),
            *([f"base, {name}", *row] for name, row in calls.items()),
            ["TABOM, entropy", mean(greedy["TABOM"]), "12"]]),
        toy.table(["order of one, tokens of the other", "right, %"], [
            [name, mean(one["orders"][name] for one in found)] for name in found[0]["orders"]]),
        toy.table(["head start of the factor, nats", "2 to 5", "2", "3", "4", "5"], curve),
        toy.table(["what training is worth", "nats of head start"], worth),
        toy.table(["entropies, nats; turn of the factor", "base", "SFT-SD", "SFT-GT", "TABOM"], [
            *(row(f"{name}, {when}", lambda one, who, key=f"{kind} {n}": one["gap"][who][key], 2)
              for name, kind in (("surest other position", "other"), ("factor minus that", "after"))
              for when, n in (("start", 0), ("after three reveals", 3))),
            row("turn of the factor", lambda one, who: one["gap"][who]["turn"])]),
        toy.table(["pairs in the recorded order, %, ranks apart", *map(str, range(1, 12))], [
            [who, *(mean(one["pairs by distance"][who][d] for one in found) for d in range(11))]
            for who in ("base", "TABOM")]),
        toy.table(["test prompts whose first factor is a multiple of 3", "right, %"], [
            [who, mean(one["multiples of 3"][who] for one in found)]
            for who in found[0]["multiples of 3"]]),
        toy.table(["answers whose factor has two different digits", "right, %"], [
            [who, mean(one["without equal digits"][who] for one in found)]
            for who in ("base", "TABOM")])]
    return "\n\n".join([dial(runs), *tables])

if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    for number in map(int, sys.argv[1:]):
        (FIGURES / f"seed-{number}.json").write_text(json.dumps(measure(number), indent=1))
    if not sys.argv[1:]:
        print(report())
