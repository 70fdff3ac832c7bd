# SPDX-License-Identifier: MIT
"""Pictures of what the lab has measured.  Drawn again, they are the same, byte for byte.

    python .results/pictures.py            rates.svg and film.svg

rates.svg, right answers and what is forgotten against the learning rate, needs matplotlib.
film.svg, how base and TABOM of seed 10 wrote one answer, takes a minute if bases/ holds the base.
"""
import torch

import lab
from lab import CURVES, FIVE, RATES, at, interval, load
import tabom
import toy_data as toy

CELL, TOP, SECONDS, REST = 34, 92, 1.3, 5.0      # pixels, pixels, for each state, after the last
FIELDS = {"p": "product", "f": "factor", "u": "units", "t": "tens"}
STYLE = """
  text { font: 15px ui-monospace, Menlo, Consolas, monospace; fill: #1f2328; text-anchor: middle }
  .small { font-size: 11px } .left { text-anchor: start } .faint { fill: #59636e }
  .cell { fill: none; stroke: #818b98 } .shade { fill: #0969da } .new { fill: none; stroke: #d1570a;
  stroke-width: 3 } .bad { fill: #cf222e } .good { fill: #1a7f37 }
  @media (prefers-color-scheme: dark) { text { fill: #f0f6fc } .faint { fill: #9198a1 }
  .shade { fill: #4493f8 } .new { stroke: #f0883e } .bad { fill: #ff7b72 } .good { fill: #56d364 } }
"""

# == The rates =====================================================================================

def curves(found, figure):
    """{arm: [(rate, mean, low, high)]} over the five seeds."""
    result = {}
    for arm in CURVES:
        for rate in RATES:
            values = [found[seed][at(arm, rate)][figure] for seed in FIVE
                      if at(arm, rate) in found.get(seed, ())]
            if len(values) >= 2:
                result.setdefault(arm, []).append((rate, *interval(values)))
    return result

def draw_rates(folder):
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tabom"                        # the same bytes each time
    from matplotlib import pyplot
    found = load(folder)
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 4.5), sharex=True, layout="constrained")
    for panel, name in zip(panels, ("own order", "best order", "mul")):
        for arm, points in curves(found, name).items():
            rates, means, lows, highs = zip(*points)
            line, = panel.plot(rates, means, marker="o", markersize=3, label=arm)
            panel.fill_between(rates, lows, highs, alpha=0.15, color=line.get_color())
            if name == "best order":
                sampled = curves(found, "best order, sampled")[arm]
                panel.plot(rates, [mean for _, mean, *_ in sampled], linewidth=0.7,
                           color=line.get_color())
        panel.axvline(2e-5, color="grey", linestyle=":")
        panel.set(xscale="log", title=name, xlabel="learning rate (dotted: the paper's)")
    panels[0].set_ylabel("percent right, mean and 95 % interval")
    panels[0].legend(fontsize=7)
    figure.savefig(folder / "rates.svg", metadata={"Date": None})

# == The film ======================================================================================

def solutions(problem):
    """Every right answer to a prompt of pick, (n, 12), in both styles."""
    low, high = problem[3].item(), problem[4].item()
    digit = torch.arange(low, high + 1)
    factors = (10 * digit[:, None] + digit).flatten()
    prompts = problem.repeat(len(factors), 1)
    return torch.cat([toy.solve(prompts, factors, style)[:, toy.PROMPT_LENGTH:]
                      for style in ("own", "other")])

def last_hope(problem, response, rank):
    """After how many writes no right answer is left; None if this one is right."""
    right = solutions(problem)
    for n_visible in range(1, len(response) + 1):
        if not (right == response)[:, rank < n_visible].all(1).any():
            return n_visible
    return None

def text(x, y, words, kind=""):
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{words}</text>'

def square(kind, x, inset=0, opacity=1):
    side = CELL - 2 * inset
    return (f'<rect class="{kind}" x="{x + inset}" y="{TOP + inset}" width="{side}" '
            f'height="{side}" fill-opacity="{opacity:.2f}"/>')

def panel(left, title, problem, response, rank, entropies):
    """-> what stands still, [what each of the 13 states shows]."""
    names = ["ppppffuuuttt"[column] for column in toy.columns_of(problem[None])[0]]
    still = [text(left + 6 * CELL, 52, title)]
    for name, word in FIELDS.items():
        at = [i for i, x in enumerate(names) if x == name]
        still.append(text(left + (at[0] + at[-1] + 1) / 2 * CELL, TOP - 8, word, "small faint"))
    still += [square("cell", left + i * CELL) for i in range(12)]
    lost, states = last_hope(problem, response, rank), []
    for n_visible in range(13):
        shown = []
        for i in range(12):
            x, middle = left + i * CELL, left + (i + 0.5) * CELL
            if rank[i] < n_visible:
                shown.append(text(middle, TOP + 22, toy.to_text(response[i:i + 1])))
            else:
                nats = entropies[n_visible][i].item()
                shown.append(square("shade", x, 0, min(nats / 2.5, 1) * 0.75))
                shown.append(text(middle, TOP + 21, f"{nats:.1f}", "small"))
            if rank[i] == n_visible - 1:
                shown.append(square("new", x, 2))
        if lost and n_visible >= lost:
            words = f"no right answer is left since step {lost}"
            shown.append(text(left + 6 * CELL, TOP + 58, words, "small bad"))
        elif n_visible == 12:
            shown.append(text(left + 6 * CELL, TOP + 58, "right", "small good"))
        states.append(shown)
    return still, states

def picture(problem, panels):
    """A problem of pick and two (title, response, rank, entropies) -> SVG."""
    first, (_, low, high, _) = toy.to_text(problem[:2]), toy.to_text(problem[2:6])
    width, total = 2 * 12 * CELL + 80, 13 * SECONDS + REST
    parts = [text(20, 22, f"{first} x a factor of your own choice, digits from {low} to {high}. "
                  "Number and shade: entropy in nats.", "left small")]
    states = [[] for _ in range(13)]
    for number, (title, *answer) in enumerate(panels):
        still, shown = panel(20 + number * (12 * CELL + 40), title, problem, *answer)
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

def draw_film(number):
    seed = lab.Seed(number, lab.HERE, tabom.Settings())
    pick, films = seed.tests["pick"], []
    tuned = lab.fine_tune("TABOM", seed)
    answers = [tabom.answer(model, pick) for model in (seed.base, tuned)]
    (base, base_right), (other, other_right) = answers
    forward = ((base.decode_rank - other.decode_rank) * toy.is_factor(pick)).sum(1)
    row = forward.where(other_right & ~base_right, -99).argmax()         # as the demo chooses
    for title, model, (answer, _) in zip(("the base", "after TABOM"), (seed.base, tuned), answers):
        states = [entropy[0] for _, entropy in tabom.replay(model, answer[row:row + 1],
                                                            mask_id=toy.MASK_ID)]
        films.append((title, answer.response[row], answer.decode_rank[row], states))
    (lab.HERE / "film.svg").write_text(picture(pick[row], films))

if __name__ == "__main__":
    draw_film(10)
    draw_rates(lab.HERE)
