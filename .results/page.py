# SPDX-License-Identifier: MIT
"""The tables and pictures of both pages, from what lab.py has measured.

    python .results/page.py            prints every table
    python .results/page.py draw       draws all pictures (needs matplotlib), in a minute

Drawn again, rates.svg, frontier.svg and film.svg are the same, byte for byte.  The film, as text
film.txt, shows how base and TABOM of seed 10 wrote one answer.
"""
import statistics
import sys

import torch

import lab
from lab import CURVES, GROUPS, RATES, VERDICTS, at, interval, load, over_seeds
import tabom
import toy_data as toy

# == Tables ========================================================================================
TEN, FIVE = range(10, 20), range(10, 15)
COLUMNS = {"own order, sampled": "sampled", **{name: name for name in (
    "best order", "best order, sampled", "mul", "add", "pass@16 of 160", "right factors")},
    "two tokens a step": "two a step", "TDS": "TDS"}
WHY = {"own order": "own order", "base writes, arm says where": "base writes in this order",
       "arm writes, base says where": "writes in the base's order",
       "by confidence": "by confidence", "turn of the factor": "turn of the factor",
       "gap before any write": "gap after 0", "gap after 3 writes": "gap after 3"}
WRONG = {"a digit of the factor": "wrong by factor", "another digit": "wrong by other"}
SHORT = ("own order", "best order", "best order, sampled", "mul")
FRONT = {"the base": "No-SFT",
         "SFT-GT: SFT on given solutions, tens before units": "SFT-GT",
         "SFT-GT in the base's format": "SFT-GT:style=own",
         "SFT-SD: SFT on its own right answers": "SFT-SD",
         "T3D on its own right answers": "T3D",
         "trajectory masking on its own right answers": "masking",
         "**TABOM**: masking and ranking, the paper's margin": "TABOM:margin=0.2",
         "**TABOM** with a margin of 1 nat": "TABOM",
         "the base in a fixed order, no training": "contrast prior"}

def markdown(lines):
    head, *rows = [[str(cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))

def short(rate):
    return f"{rate:.0e}".replace("e-0", "e-")

def among(found, seeds):
    return {seed: found[seed] for seed in seeds if seed in found}

def mean_of(found, arm, figure, digits=1):
    values = over_seeds(found, {arm: 1}, figure)
    digits = 3 if figure == "TDS" else 2 if figure.startswith("gap") else digits
    return f"{statistics.mean(values):.{digits}f}" if values else ""

def change(found, arm, other="No-SFT", figure="own order"):
    """How far an arm is above another one, paired over seeds, with its 95 % interval."""
    values = over_seeds(found, {arm: 1, other: -1}, figure) if arm != other else ()
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*interval(values)) if len(values) > 1 else ""

def grid(found, rows, columns, figure_at):
    """A table of means; figure_at(row, column) -> arm, figure."""
    return markdown([["", *columns], *([row, *(mean_of(found, *figure_at(row, column))
                                                   for column in columns)] for row in rows)])

def table_of_arms(found, arms, columns, *seeds):
    """Means of arms {label: arm} in own order, less the base's, and in columns {label: figure};
    with "seeds" also on how many."""
    return markdown([["", "own order", "gain [95 %]", *columns, *seeds], *(
        [label, mean_of(found, arm, "own order"), change(found, arm),
         *(mean_of(found, arm, figure) for figure in columns.values()),
         *(len(over_seeds(found, {arm: 1}, "own order")) for _ in seeds)]
        for label, arm in arms.items())])

def by_claim(lines):
    """What `judge` gives, one row for each claim: its expected and its found verdict are the worst
    of its lines; a line with another verdict than "shown" says so."""
    rows = [["claim", "its lines: mean [95 %]", "seeds", "expected", "verdict"]]
    for claim in dict.fromkeys(line[0] for line in lines):
        parts = [line[1:] for line in lines if line[0] == claim]
        expected, got = (min(column, key=VERDICTS.index) for column in [*zip(*parts)][-2:])
        told = "<br>".join(f"{what}: {means}" + f" ({word})" * (word != "shown")
                           for what, _, means, _, word in parts)
        seeds = ", ".join(map(str, sorted({part[1] for part in parts})))
        rows.append([claim, told, seeds, expected, f"**{got}**"])
    return markdown(rows)

def tables(folder):
    """{title: table}; the first one stands on the front page."""
    found, claims = load(folder), (lab.HERE / "claims.txt").read_text()
    ten, five, four = (among(found, seeds) for seeds in (TEN, FIVE, FIVE[:4]))
    def same(names):
        return {name: name for name in names}

    return {
        "Front page": table_of_arms(ten, FRONT, {
            "lost by factor": "wrong by factor", "by other": "wrong by other",
            "best order": "best order", "`mul`": "mul"}),
        "Arms": table_of_arms(ten, same(GROUPS["core"] + GROUPS["sweeps"]), COLUMNS, "seeds"),
        "Claims": by_claim(lab.judge(ten, claims)),
        "Rates": markdown([["", *map(short, RATES)], *(
            [arm, *(" / ".join(mean_of(five, at(arm, rate), figure) for figure in SHORT).strip(" /")
                    for rate in RATES)] for arm in (*CURVES, "SFT-GT-old"))]),
        "Choices": table_of_arms(load(folder / "tuning"), same(GROUPS["tune"]),
                                 dict(list(COLUMNS.items())[:5])),
        "Orders": grid(ten, ["percent right"], (
            "own", "confidence", "right to left", "random", *(f"blocks of {n}" for n in lab.BLOCKS),
            "prior", "contrast prior", "best"), lambda _, order: (order, "own order")),
        "Wrong": grid(ten, WRONG, ("No-SFT", "masking", "SFT-SD", "T3D", "TABOM:margin=0.2",
                                   "TABOM"), lambda row, arm: (arm, WRONG[row])),
        "Why": grid(four, ("No-SFT", "TABOM", "T3D", "SFT-SD", "masking", "SFT-GT"), WHY,
                    lambda arm, name: (arm, WHY[name]))}

# == The rates =====================================================================================

def curve(found, arm, figure):
    """[(rate, mean, low, high)] of an arm at each rate at which it has run on two seeds or more.
    The interval is that of the difference from the base, paired over seeds."""
    base = statistics.mean(over_seeds(found, {"No-SFT": 1}, figure))
    runs = [(rate, over_seeds(found, {at(arm, rate): 1, "No-SFT": -1}, figure)) for rate in RATES]
    return [(rate, *(base + x for x in interval(values))) for rate, values in runs
            if len(values) > 1]

LABELS = dict(zip(CURVES, (
    "SFT-GT: given solutions, another format", "SFT-GT: given solutions, the base's format",
    "SFT-SD: own answers, random tokens hidden", "masking: own answers, later tokens hidden",
    "T3D: own answers, a published loss",
    "TABOM: masking and ranking, margin 1 nat", "TABOM, the paper's margin of 0.2 nats")))
COLORS = dict(zip(CURVES, ("C3", "C1", "C2", "C9", "C5", "C0", "C4")))

def new_picture(columns):
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tabom"                        # the same bytes each time
    from matplotlib import pyplot
    return pyplot.subplots(1, columns, figsize=(5 * columns, 5), layout="constrained")

def draw_rates(folder):
    found = among(load(folder), FIVE)
    figure, panels = new_picture(3)
    for panel, title, name in zip(panels, (
            "in its own order", "in the best order (dashed: tokens sampled)",
            "mul: what is forgotten"), ("own order", "best order", "mul")):
        for arm in CURVES:
            rates, means, lows, highs = zip(*curve(found, arm, name))
            style = {"color": COLORS[arm], "linewidth": 2 if arm == "TABOM" else 1.2}
            panel.plot(rates, means, marker="o", markersize=3, label=LABELS[arm], **style)
            panel.fill_between(rates, lows, highs, color=COLORS[arm], alpha=0.1, linewidth=0)
            if name == "best order":
                sampled = [mean for _, mean, *_ in curve(found, arm, "best order, sampled")]
                panel.plot(rates, sampled, linestyle="--", alpha=0.7, **style)
        panel.axhline(statistics.mean(over_seeds(found, {"No-SFT": 1}, name)), color="black",
                      linewidth=0.7, label="the base")
        panel.axvline(2e-5, color="grey", linestyle=":", label="the paper's learning rate")
        panel.set(xscale="log", title=title, xlabel="learning rate")
    panels[0].set_ylabel("percent right: mean, 95 % interval of the gain")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(folder / "rates.svg", metadata={"Date": None})

def draw_frontier(folder):
    """Own order against best order, sampled: one curve for each arm, from rate to rate."""
    five = among(load(folder), FIVE)
    three = among(five, FIVE[:3])
    figure, panel = new_picture(1)
    for arm in CURVES:
        gained, kept = ([mean for _, mean, *_ in curve(five, arm, name)]
                        for name in ("own order", "best order, sampled"))
        panel.plot(kept, gained, marker="o", markersize=3, color=COLORS[arm], label=LABELS[arm])
        if arm == "TABOM":                       # the others have the same direction
            panel.annotate("1e-6", (kept[0] - 2.5, gained[0] - 0.3))
            panel.annotate("5e-4", (kept[-1] - 3, gained[-1] - 0.3))
    panel.plot(*(statistics.mean(over_seeds(five, {"No-SFT": 1}, name))
                 for name in ("best order, sampled", "own order")), "k*", label="the base")
    margins = [f"TABOM:margin={margin}" for margin in (0.1, 0.2, 0.3, 0.5, 0.7)] + ["TABOM"]
    panel.plot(*([statistics.mean(over_seeds(three, {arm: 1}, name)) for arm in margins]
                 for name in ("best order, sampled", "own order")), "k:", marker=".",
               label="TABOM at 2e-5, margins 0.1 to 1 (seeds 10 to 12)")
    panel.set(xlabel="percent right, best order, sampled", ylabel="percent right, own order",
              xlim=(60, 100))
    panel.legend(fontsize=7, loc="lower left")
    figure.savefig(folder / "frontier.svg", metadata={"Date": None})

# == The film ======================================================================================
CELL, GAP, TOP = 34, 6, 92                       # pixels
PANEL = 12 * CELL + 3 * GAP                      # its width: four numbers, three gaps
SECONDS, REST = 1.3, 5.0                         # for each state, after the last
FIELDS = {"p": "product", "f": "factor", "u": "units", "t": "tens"}
STYLE = """
  text { font: 15px ui-monospace, Menlo, Consolas, monospace; fill: #1f2328; text-anchor: middle }
  .small { font-size: 11px } .left { text-anchor: start } .faint { fill: #59636e }
  .cell { fill: none; stroke: #818b98 } .shade { fill: #0969da } .new { fill: none; stroke: #d1570a;
  stroke-width: 3 } .bad { fill: #cf222e } .good { fill: #1a7f37 }
  @media (prefers-color-scheme: dark) { text { fill: #f0f6fc } .faint { fill: #9198a1 }
  .shade { fill: #4493f8 } .new { stroke: #f0883e } .bad { fill: #ff7b72 } .good { fill: #56d364 } }
"""

def text(x, y, words, kind=""):
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{words}</text>'

def square(kind, x, inset=0, opacity=1):
    side = CELL - 2 * inset
    return (f'<rect class="{kind}" x="{x + inset}" y="{TOP + inset}" width="{side}" '
            f'height="{side}" fill-opacity="{opacity:.2f}"/>')

def panel(left, title, problem, response, rank, entropies):
    """-> what stands still, [what each of the 13 states shows]."""
    names = ["ppppffuuuttt"[column] for column in toy.columns_of(problem[None])[0]]
    starts = [i > 0 and names[i] != names[i - 1] for i in range(12)]     # a gap before a number
    places = [left + i * CELL + GAP * sum(starts[:i + 1]) for i in range(12)]
    still, centre = [], left + PANEL / 2
    for name, word in FIELDS.items():
        own = [x for x, its_name in zip(places, names) if its_name == name]
        still.append(text((own[0] + own[-1] + CELL) / 2, TOP - 8, word, "small faint"))
    still += [text(centre, 52, title), *(square("cell", x) for x in places)]
    lost, states = lab.last_hope(torch.cat([problem, response]), rank), []
    for n_visible in range(13):
        shown = []
        for i, x in enumerate(places):
            middle = x + CELL / 2
            if rank[i] < n_visible:
                shown.append(text(middle, TOP + 22, toy.to_text(response[i:i + 1])))
            else:
                nats = entropies[n_visible][i].item()
                shown.append(square("shade", x, 0, min(nats / 2.5, 1) * 0.75))
                shown.append(text(middle, TOP + 21, f"{nats:.2f}", "small"))
            if rank[i] == n_visible - 1:
                shown.append(square("new", x, 2))
        if n_visible >= lost:
            words = f"no right answer is possible after step {lost}"
            shown.append(text(centre, TOP + 58, words, "small bad"))
        elif n_visible == 12:
            shown.append(text(centre, TOP + 58, "right", "small good"))
        states.append(shown)
    return still, states

def picture(problem, panels):
    """A problem of pick and two (title, response, rank, entropies) -> SVG."""
    first, (_, low, high, _) = toy.to_text(problem[:2]), toy.to_text(problem[2:6])
    width, total = 2 * PANEL + 80, 13 * SECONDS + REST
    parts = [text(20, 22, f"{first} x a factor of your own choice, digits from {low} to {high}. "
                  "Small number and shade: entropy in nats.", "left small")]
    states = [[] for _ in range(13)]
    for number, (title, *answer) in enumerate(panels):
        still, shown = panel(20 + number * (PANEL + 40), title, problem, *answer)
        parts += still
        for state, more in zip(states, shown):
            state += more
    for number, state in enumerate(states):
        start, end = number * SECONDS / total, (number + 1) * SECONDS / total
        values, times = (("1;0", f"0;{end:.4f}") if number == 0 else ("0;1", f"0;{start:.4f}")
                         if number == 12 else ("0;1;0", f"0;{start:.4f};{end:.4f}"))
        state.append(text(width / 2, TOP + 82, f"step {number} of 12", "small faint"))
        parts.append(f'<g opacity="{number == 0:d}"><animate attributeName="opacity" '
                     f'values="{values}" keyTimes="{times}" calcMode="discrete" dur="{total:g}s" '
                     'repeatCount="indefinite"/>' + "".join(state) + "</g>")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + 96}" '
            f'width="{width}" role="img" aria-label="The base and TABOM write one answer each">'
            f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n")

def draw_film(folder, number):
    seed = lab.Seed(number, folder, tabom.Settings())
    pick, panels = seed.tests["pick"], []
    models = (seed.base, lab.fine_tune("TABOM", seed))
    judged = [(model, *tabom.answer(model, pick)) for model in models]
    (_, base, base_right), (_, tuned, tuned_right) = judged
    waits = (tuned.decode_rank - base.decode_rank).amax(1)
    row = waits.where(tuned_right & ~base_right, -99).argmax()           # as the demo chooses
    for title, (model, answers, _) in zip(("the base", "after TABOM"), judged):
        states = tabom.replay(model, answers[row:row + 1], mask_id=toy.MASK_ID)
        panels.append((title, answers.response[row], answers.decode_rank[row],
                       [entropy[0] for _, entropy in states]))
    (folder / "film.svg").write_text(picture(pick[row, :toy.PROMPT_LENGTH], panels))
    (folder / "film.txt").write_text(tabom.film(pick, *judged) + "\n")

if __name__ == "__main__":
    if sys.argv[1:] == ["draw"]:
        draw_rates(lab.HERE)
        draw_frontier(lab.HERE)
        draw_film(lab.HERE, 10)
    else:
        for title, table in tables(lab.HERE).items():
            print(f"\n## {title}\n\n{table}")
