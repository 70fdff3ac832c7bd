# SPDX-License-Identifier: MIT
"""Synthetic arithmetic for TABOM: four domains, written in rows of 18 tokens.

A problem is a row, 6 tokens of prompt and 12 of response, with [MASK] where the model is to write:

            prompt    answer factor units tens     the working stands behind the answer
    pick    47×58a    ____   __     ___   ___      47 times a number of your own choice, its digits
                      3995   85     235   376      from 5 to 8: 47 × 5 = 235, 47 × 8 = 376
    mul     47×..a    ____   85     ___   ___      the factor is given
    add     47+..a    0132   85     012   012      7 + 5 = 12,  4 + 8 = 12
    sub     85-..a    0038   47     108   004      15 - 7 = 8 with 1 borrowed,  8 - 4 = 4
The last token of a prompt names the layout of the four fields, one of three, or always a:
    a  answer factor units tens      b  units tens factor answer      c  tens answer factor units

Why order matters in pick.  The working is easy once the factor stands there, the answer once the
working does, from its last digit.  The factor is a free choice: with c digits from lo to hi, log c
nats a digit.  The leading digit of a product has few likely values, so it *looks* surer than the
choice that it depends on.  Written first, it asks for a factor that fits, which is hard to find.
The order of lowest entropy starts at that wrong end, although the model knows all it needs.  c is a
dial: the more digits to choose from, the larger the gap; at c = 1 there is nothing to choose.
"""
import os
import sys

import torch

VOCABULARY = "0123456789+-×.abc"    # a digit is its own token; [MASK] is an input only
MASK_ID = len(VOCABULARY)
PROMPT_LENGTH, RESPONSE_LENGTH = 6, 12
CHOICES = (1, 2, 3, 4, 5)           # c, the number of digits to choose from in pick
OPERATOR = {"pick": "×", "mul": "×", "add": "+", "sub": "-"}
CORPUS_SHARES = {"pick": 0.18, "mul": 0.64, "add": 0.10, "sub": 0.08}    # the hard ones need more
# The columns of the fields in layout a, and for each layout the column that stands at a position.
ANSWER, FACTOR, UNITS, TENS = range(0, 4), range(4, 6), range(6, 9), range(9, 12)
LAYOUTS = torch.tensor([[*ANSWER, *FACTOR, *UNITS, *TENS], [*UNITS, *TENS, *FACTOR, *ANSWER],
                        [*TENS, *ANSWER, *FACTOR, *UNITS]])
# The best turn of each column: factor, working, answer; a number from its last digit.
BEST_TURN = torch.tensor([*FACTOR, *UNITS[::-1], *TENS[::-1], *ANSWER[::-1]]).argsort()

# == Writing problems and solutions ================================================================

def token(character):
    return VOCABULARY.index(character)

def to_text(tokens):
    return "".join((VOCABULARY + "_")[token] for token in tokens)

def digits(numbers, width):
    """(n,) -> (n, width), the most significant first."""
    return numbers[:, None] // 10 ** torch.arange(width - 1, -1, -1, device=numbers.device) % 10

def read_number(tokens):
    """(n, width) -> (n,); -1 where a token is no digit."""
    powers = 10 ** torch.arange(tokens.shape[1] - 1, -1, -1, device=tokens.device)
    return torch.where((tokens < 10).all(1), (tokens * powers).sum(1), -1)

def layout_of(prompt):
    return prompt[:, PROMPT_LENGTH - 1] - token("a")                     # (n,) 0, 1 or 2

def columns_of(prompt):
    """(n, 6) or (n, 18) -> (n, 12): which column of layout a stands at each response position."""
    return LAYOUTS.to(prompt.device)[layout_of(prompt)]

def is_factor(prompt):
    """(n, 12) bool: the two positions of the factor."""
    columns = columns_of(prompt)
    return (columns >= FACTOR[0]) & (columns <= FACTOR[-1])

def n_choices(prompt):
    """(n,) c, the number of digits to choose from in pick; 0 where the factor is given."""
    return torch.where(prompt[:, 3] < 10, prompt[:, 4] - prompt[:, 3] + 1, 0)

def is_given(prompt):
    """(n, 12) bool: the response positions that are visible from the start."""
    return is_factor(prompt) & (n_choices(prompt) == 0)[:, None]

def write_prompts(domain, first, low=None, high=None):
    """Prompts (n, 6) in layout a; low and high (n,), the range of digits in pick."""
    dots = torch.full_like(first, token("."))
    low, high = (dots, dots) if low is None else (low, high)
    operator, layout = (torch.full_like(first, token(one)) for one in (OPERATOR[domain], "a"))
    return torch.cat([digits(first, 2), torch.stack([operator, low, high, layout], 1)], 1)

def solve(prompt, factor, style="own"):
    """Prompts (n, 6) and the second number (n,) -> solved rows (n, 18).

    style "own" is that of the corpus.  "other" multiplies the other way round (47 × 85: 85 × 7 =
    595 and 85 × 4 = 340): just as right, but not what the model would write, like solutions by
    people or by a larger model.  add and sub have one style.
    """
    first, units, tens = read_number(prompt[:, :2]), factor % 10, factor // 10
    borrowed = (first % 10 < units).long()
    add = first + factor, first % 10 + units, first // 10 + tens
    sub = first - factor, 100 * borrowed + (first - units) % 10, first // 10 - tens
    mul = first * factor, first * units, first * tens
    if style == "other":
        mul = first * factor, factor * (first % 10), factor * (first // 10)
    plus, minus = prompt[:, 2] == token("+"), prompt[:, 2] == token("-")
    answer, units_row, tens_row = (torch.where(plus, a, torch.where(minus, s, m))
                                   for a, s, m in zip(add, sub, mul))
    in_layout_a = torch.cat([digits(answer, 4), digits(factor, 2), digits(units_row, 3),
                             digits(tens_row, 3)], 1)
    return torch.cat([prompt, in_layout_a.gather(1, columns_of(prompt))], 1)

def in_layout(tokens, layout):
    """Rows (n, 18) in layout a -> the same in layout 0, 1 or 2, a number or one for each row."""
    tokens = tokens.clone()
    tokens[:, PROMPT_LENGTH - 1] += layout
    tokens[:, PROMPT_LENGTH:] = tokens[:, PROMPT_LENGTH:].gather(1, columns_of(tokens))
    return tokens

def hide(tokens):
    """Solved rows -> problems: [MASK] wherever nothing is given."""
    response = tokens[:, PROMPT_LENGTH:].masked_fill(~is_given(tokens), MASK_ID)
    return torch.cat([tokens[:, :PROMPT_LENGTH], response], 1)

def first_of_each(problems, count, choices=(0, *CHOICES)):
    """The first `count` of the problems with each number of digits to choose from."""
    return torch.cat([problems[n_choices(problems) == c][:count] for c in choices])

def references(prompt, style, generator):
    """A solution of each prompt of pick, with any factor that it allows -> solved rows."""
    draw = torch.rand(len(prompt), 2, generator=generator, device=prompt.device)
    chosen = prompt[:, 3:4] + (draw * n_choices(prompt)[:, None]).long()
    return solve(prompt, read_number(chosen), style)

def best_order(logits, tokens):
    """An order for `decode`: factor, working, answer, wherever the layout puts them."""
    return BEST_TURN.to(tokens.device)[columns_of(tokens)]

# == The checker ===================================================================================

def read_factor(tokens):
    in_layout_a = tokens[:, PROMPT_LENGTH:].gather(1, columns_of(tokens).argsort(1))
    return read_number(in_layout_a[:, FACTOR])

def is_correct(tokens):
    """(n, 18) -> (n,) bool: is the answer right, and the factor one of those allowed?"""
    factor, columns = read_factor(tokens), columns_of(tokens)
    expected = solve(tokens[:, :PROMPT_LENGTH], factor.clamp(min=0))
    elsewhere = (columns < ANSWER[0]) | (columns > ANSWER[-1])
    answer_is_right = ((tokens == expected)[:, PROMPT_LENGTH:] | elsewhere).all(1)
    chosen = digits(factor, 2)
    allowed = ((chosen >= tokens[:, 3:4]) & (chosen <= tokens[:, 4:5])).all(1)
    return (factor >= 0) & answer_is_right & (allowed | (n_choices(tokens) == 0))

def working_is_right(tokens):
    """(n, 18) -> (n,) bool: is every token as in a solution, in one style or the other?"""
    factor = read_factor(tokens)
    own, other = (solve(tokens[:, :PROMPT_LENGTH], factor.clamp(min=0), style)
                  for style in ("own", "other"))
    return (factor >= 0) & ((tokens == own).all(1) | (tokens == other).all(1))

# == Who learns what: corpus, queries, validation, test ============================================

def split_problems(seed, layouts):
    """-> corpus (n, 18) of solved rows, odds (n,) of each, and
    {domain: {"query" | "validation" | "test": problems (n, 18)}}.

    A prompt of pick stands in one part only, and is solved in the corpus with multiplications of
    mul's corpus: those of mul's validation and test are in no corpus.  Corpus and queries hold each
    prompt in every layout, validation and test in one, in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    problems, corpus, odds = {"pick": {}}, [], []

    def split(rows, *sizes):
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        return shuffled.split([*sizes, len(rows) - sum(sizes)])

    def in_every_layout(rows):
        return torch.stack([in_layout(rows, one) for one in range(layouts)], 1).flatten(0, 1)

    def in_one_layout(rows):
        return in_layout(rows, torch.arange(len(rows)) % layouts)

    def learn(rows, weight, share):
        corpus.append(in_every_layout(rows))
        odds.append((share * weight / weight.sum() / layouts).repeat_interleave(layouts))

    for domain in ("add", "sub", "mul"):
        first, second = torch.cartesian_prod(torch.arange(10, 100), torch.arange(10, 100)).unbind(1)
        rows = solve(write_prompts(domain, first), second)
        rows = rows[first >= second] if domain == "sub" else rows
        validation, test, seen = split(rows, 400, 1000)
        problems[domain] = {"validation": hide(in_one_layout(validation)),
                            "test": hide(in_one_layout(test))}
        learn(seen, torch.ones(len(seen)), CORPUS_SHARES[domain])
    multiplied = torch.zeros(100, 100, dtype=torch.bool)                 # seen, last, is mul's
    multiplied[read_number(seen[:, :2]), read_factor(seen)] = True
    for c in CHOICES:
        first, low = torch.cartesian_prod(torch.arange(10, 100), torch.arange(2, 11 - c)).unbind(1)
        prompts, n = write_prompts("pick", first, low, low + c - 1), len(first)
        validation, test, query, seen = split(prompts, n // 10, n // 5, 3 * n // 10)
        for part, some in (("validation", validation), ("test", test), ("query", query)):
            rows = hide(solve(some, 11 * some[:, 3]))                    # any factor: it is hidden
            rows = in_every_layout(rows) if part == "query" else in_one_layout(rows)
            problems["pick"].setdefault(part, []).append(rows)
        ten, unit = torch.cartesian_prod(torch.arange(c), torch.arange(c)).unbind(1)
        factors = 11 * seen[:, 3:4] + 10 * ten + unit                    # (prompts, c * c)
        usable = multiplied[read_number(seen[:, :2])[:, None], factors]
        rows = solve(seen.repeat_interleave(c * c, 0), factors.flatten())[usable.flatten()]
        weight = (usable / usable.sum(1, keepdim=True))[usable]          # a prompt is a prompt
        learn(rows, weight, CORPUS_SHARES["pick"] / len(CHOICES))
    problems["pick"] = {part: torch.cat(rows) for part, rows in problems["pick"].items()}
    return torch.cat(corpus), torch.cat(odds), problems

# == Figures of answers ============================================================================

def by_choices(tokens, values):
    """Means over rows of pick, values (n,) -> {"all": .., "1": .., .. "5": ..}, by c.  bool counts
    in percent.  In "all", c = 2 .. 5 weigh the same; c = 1, nothing to choose, stands apart."""
    c, values = n_choices(tokens), 100.0 * values if values.dtype == torch.bool else values
    means = {str(one): values[c == one].mean().item() for one in CHOICES if (c == one).any()}
    free = [mean for one, mean in means.items() if one != "1"]
    return {"all": sum(free) / len(free), **means}

def entropy_gap(tokens, entropy):
    """(n, 18) and entropies (n, 12) of the start -> (n,) nats: surest digit of the factor minus
    surest other position."""
    factor = is_factor(tokens)
    return entropy.masked_fill(~factor, torch.inf).amin(1) - entropy.masked_fill(
        factor, torch.inf).amin(1)

def effective_factors(tokens, correct, samples):
    """How many factors the right answers to a prompt amount to: tokens (n * samples, 18), correct
    (n * samples,), `samples` answers to each prompt in turn.

    Two right answers to one prompt have the same factor with probability p, and 1 / p is k if k are
    chosen equally often.  Pairs are drawn without replacement, so that more right answers alone do
    not move it.  p is a mean over prompts that have a pair, then over c = 2 .. 5.
    """
    factor, correct = read_factor(tokens).view(-1, samples), correct.view(-1, samples)
    pair = correct[:, :, None] & correct[:, None, :]                     # (n, samples, samples)
    pair &= ~torch.eye(samples, dtype=torch.bool, device=tokens.device)
    same = pair & (factor[:, :, None] == factor[:, None, :])
    n_pairs, c = pair.sum((1, 2)), n_choices(tokens[::samples])
    p = [(same.sum((1, 2)) / n_pairs)[(n_pairs > 0) & (c == one)].mean() for one in CHOICES[1:]]
    return (1 / torch.stack(p).nanmean().double()).item()                # nan: no prompt has a pair

def factor_figures(tokens, decode_rank):
    """Of answers to pick with something to choose: percent with two equal digits, and the turn, 1
    to 12, in which a digit of the factor was written, on average."""
    free = n_choices(tokens) > 1
    turn = decode_rank[free][is_factor(tokens[free])] + 1
    return {"equal digits": 100 * (read_factor(tokens[free]) % 11 == 0).float().mean().item(),
            "factor turn": turn.float().mean().item()}

# == Figures and answers as text ===================================================================

EXPLANATION = """\
    greedy      right answers to pick, percent: unseen prompts, the likeliest tokens, lowest entropy
                first; the mean over 2 to 5 digits to choose from
    2 tokens    the same with two tokens written per step
    sampled     sampled tokens (temperature 1), several answers to some of the prompts
    best order  sampled, one answer to each, in the best order: the skill that is there
    add sub mul right answers in the other domains, percent: what was not forgotten
    effective   how many factors the right sampled answers to one prompt amount to: 1 / p, where p
                is the chance that two of them have the same one.  A fall is a collapse
    equal       greedy answers whose factor has two equal digits, percent
    turn        when a digit of the factor was written, from 1 (first) to 12
    TDS         variance of the entropies of what is still masked, nats²: is easy told from hard?
    pairs       pairs of a window of unseen trajectories whose entropies are in the recorded order,
                percent; chance is 50"""

# Student's t, 97.5 %, for 2, 3, .. 20 numbers: half of a 95 % interval in standard errors.
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13,
         2.12, 2.11, 2.10, 2.09)

def mean_and_interval(values):
    """Numbers of several seeds -> mean, and the ends of its 95 % interval (Student)."""
    values = torch.tensor(values, dtype=torch.float64)
    half = T_975[min(len(values), 20) - 2] * values.std().item() / len(values) ** 0.5
    return values.mean().item(), values.mean().item() - half, values.mean().item() + half

def table(header, rows):
    """Aligned columns; numbers with one decimal, unless they come as text."""
    lines = [[f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row]
             for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("    " + "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
                     for name, *cells in lines)

def orders_table(orders, gap):
    """{order: {"all", "1", .. "5": percent right}}, and the entropy gap by c, nats."""
    rows = [[name, *by_c.values()] for name, by_c in orders.items()]
    rows.append(["entropy gap, nats", *map("{:.2f}".format, gap.values())])
    return (table(["digits to choose from", "2 to 5", *CHOICES], rows)
            + "\n    best: factor, working, answer from its last digit, wherever they stand"
            + "\n    entropy gap: at the start, surest digit of the factor minus surest other one")

def dots(values, width=51):
    """Percentages on a line from 0 to 100: how many of them fall into each column."""
    places = [round(value / 100 * (width - 1)) for value in values]
    return "".join(str(places.count(at)) if at in places else "·" for at in range(width))

def report(runs, pairs):
    """The tables of runs as in seed-N.json; differences of pairs (arm, arm), paired by seed."""
    arms = {arm: [] for run in runs for arm in run["arms"]}
    for run in runs:
        for arm, row in run["arms"].items():
            arms[arm].append({**row, **row["old"], **row["by c"]})

    def mean(rows, name, decimals=1):
        return f"{sum(row[name] for row in rows) / len(rows):.{decimals}f}"

    def means(title, columns):
        """columns: {name above: (name in the figures, decimals)}"""
        return [title, *columns], [[arm, *(mean(rows, *column) for column in columns.values())]
                                   for arm, rows in arms.items()]

    spread = [[arm, len(rows), mean(rows, "greedy"),
               f"{torch.tensor([row['greedy'] for row in rows]).std():.1f}" if rows[1:] else "",
               dots([row["greedy"] for row in rows])] for arm, rows in arms.items()]
    header, by_c = means("greedy, by digits to choose from", {str(c): (str(c), 1) for c in CHOICES})
    gap = ["entropy gap, nats", *(mean([run["entropy gap"] for run in runs], str(c), 2)
                                  for c in CHOICES)]
    tables = [(["greedy", "seeds", "mean", "± sd", "each seed, from 0 to 100".ljust(51)], spread),
              means("arm", {name: (name, 1) for name in ("2 tokens", "sampled", "best order", "add",
                                                         "sub", "mul")}),
              means("arm", {"effective": ("effective factors", 2), "equal": ("equal digits", 1),
                            "turn": ("factor turn", 1), "TDS": ("TDS", 3),
                            "pairs": ("pair accuracy", 1)}),
              (header, [gap, *by_c])]
    differences = []
    for one, other in pairs:
        values = [run["arms"][one]["greedy"] - run["arms"][other]["greedy"] for run in runs
                  if {one, other} <= run["arms"].keys()]
        if len(values) > 1:
            middle, low, high = mean_and_interval(values)
            differences.append([f"{one} - {other}", len(values), f"{middle:+.1f}",
                                f"[{low:+.1f}, {high:+.1f}]"])
    if differences:
        tables.append((["greedy, paired by seed", "seeds", "mean", "95 % interval"], differences))
    return "\n\n".join([EXPLANATION, *(table(*one) for one in tables)])

def draw_states(tokens, rank, entropies):
    """One trajectory, a row (18,), rank (12,) and for each state the entropies (12,) -> lines: the
    names of the fields, each state, the verdict.  What is visible is written out, what was just
    revealed marked, what is masked shaded by its entropy, a shade for each half nat."""
    shades, mark, plain = " .:+#", "[{}]", " {} "
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        shades, mark = " ░▒▓█", "\033[7m {} \033[0m"
    names = ("ppppffuuuttt"[column] for column in columns_of(tokens[None])[0].tolist())
    lines = ["".join(map(plain.format, names))]
    for step, entropy in enumerate(entropies):
        cells = [plain.format(shades[min(int(2 * nats), 4)]) if turn >= step else
                 (mark if turn == step - 1 else plain).format(character) for character, turn, nats
                 in zip(to_text(tokens[PROMPT_LENGTH:]), rank.tolist(), entropy.tolist())]
        lines.append("".join(cells))
    return [*lines, ("right" if is_correct(tokens[None]) else "wrong").center(len(lines[0]))]

def draw_trajectories(names, trajectories):
    """Trajectories of one prompt side by side, each as `draw_states` wants it -> text."""
    prompt = to_text(trajectories[0][0][:PROMPT_LENGTH])
    labels = [prompt, "", *(f"step {step}" for step in range(RESPONSE_LENGTH + 1)), ""]
    columns = [[name.center(3 * RESPONSE_LENGTH), *draw_states(*one)]
               for name, one in zip(names, trajectories)]
    return "\n".join(f"    {label:9}" + "  |  ".join(cells)
                     for label, *cells in zip(labels, *columns))
