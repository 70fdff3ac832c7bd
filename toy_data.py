# SPDX-License-Identifier: MIT
"""Synthetic arithmetic for TABOM: three domains, written in rows of 18 tokens.

A problem is a row, 6 tokens of prompt and 12 of response, with [MASK] where the model is to write:

            prompt    product factor units tens    units and tens are the working
    pick    41x46a    ____    __     ___   ___     41 times a number of your own choice, its digits
                      2214    54     164   205     from 4 to 6: 41 x 4 = 164, 41 x 5 = 205
    mul     41x..a    ____    54     ___   ___     the factor is given
    add     41+..a    0095    54     005   009     the sum; 1 + 4 = 5, 4 + 5 = 9
The last token of a prompt names the layout of the four fields:
    a  product factor units tens    b  units tens factor product    c  tens product factor units

Why order matters in pick.  The working is easy once the factor stands there, the product once the
working does, from its last digit.  The factor is a free choice: with c digits from lo to hi, log c
nats a digit.  The leading digit of a product has few likely values, so it *looks* surer than the
choice that it depends on.  Written first, it asks for a factor that fits, which is hard to find.
The order of lowest entropy starts at that wrong end, although the model knows all it needs.  c is a
dial: with more digits to choose from the gap tends to be wider; at c = 1 nothing is to choose.
"""
import torch

VOCABULARY = "0123456789+x.abc"     # a digit is its own token; [MASK] is an input only
MASK_ID = len(VOCABULARY)
PROMPT_LENGTH, RESPONSE_LENGTH = 6, 12
CHOICES = (1, 2, 3, 4, 5)           # c, the number of digits to choose from in pick
CORPUS_SHARES = {"pick": 0.18, "mul": 0.70, "add": 0.12}                 # the hard ones need more
# The columns of the fields in layout a, and for each layout the column that stands at a position.
PRODUCT, FACTOR, UNITS, TENS = range(0, 4), range(4, 6), range(6, 9), range(9, 12)
LAYOUTS = torch.tensor([[*PRODUCT, *FACTOR, *UNITS, *TENS], [*UNITS, *TENS, *FACTOR, *PRODUCT],
                        [*TENS, *PRODUCT, *FACTOR, *UNITS]])
# The place of each column in the best order: factor, working, product; numbers from the right.
BEST_PLACE = torch.tensor([*FACTOR, *UNITS[::-1], *TENS[::-1], *PRODUCT[::-1]]).argsort()

# == Reading and writing rows ======================================================================

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

def columns_of(rows):
    """(n, 6) or (n, 18) -> (n, 12): which column of layout a stands at each response position."""
    return LAYOUTS.to(rows.device)[rows[:, PROMPT_LENGTH - 1] - token("a")]

def is_factor(rows):
    """(n, 12) bool: the two positions of the factor."""
    columns = columns_of(rows)
    return (columns >= FACTOR[0]) & (columns <= FACTOR[-1])

def read_factor(rows):
    return read_number(rows[:, PROMPT_LENGTH:][is_factor(rows)].view(-1, 2))

def n_choices(rows):
    """(n,) c, the number of digits to choose from in pick; 0 where the factor is given."""
    return torch.where(rows[:, 3] < 10, rows[:, 4] - rows[:, 3] + 1, 0)

def write_prompts(first, operator, layout, low=None, high=None):
    """First numbers, layout tokens and, for pick, the range of digits, (n,) each -> (n, 6)."""
    sign, dot = (torch.full_like(first, token(character)) for character in (operator, "."))
    low, high = (dot, dot) if low is None else (low, high)
    return torch.cat([digits(first, 2), torch.stack([sign, low, high, layout], 1)], 1)

def solve(prompt, factor, style="own"):
    """Prompts (n, 6) or (n, 18) and the second number (n,) -> solved rows (n, 18).

    Style "own" is that of the corpus.  "other" swaps the two rows of working, tens first: just as
    right, but not what the model would write, like solutions by people or by a larger model."""
    prompt = prompt[:, :PROMPT_LENGTH]
    first, is_add = read_number(prompt[:, :2]), prompt[:, 2] == token("+")
    units = torch.where(is_add, first % 10 + factor % 10, first * (factor % 10))
    tens = torch.where(is_add, first // 10 + factor // 10, first * (factor // 10))
    units, tens = (tens, units) if style == "other" else (units, tens)
    product = torch.where(is_add, first + factor, first * factor)
    in_layout_a = torch.cat([digits(product, 4), digits(factor, 2), digits(units, 3),
                             digits(tens, 3)], 1)
    return torch.cat([prompt, in_layout_a.gather(1, columns_of(prompt))], 1)

def is_given(rows):
    """(n, 12) bool: the response positions that are visible from the start."""
    return is_factor(rows) & (n_choices(rows) == 0)[:, None]

def prompt_and_response(rows):
    """Rows (n, 18) -> prompt (n, 6), response (n, 12)."""
    return rows.split([PROMPT_LENGTH, RESPONSE_LENGTH], 1)

def hide(rows):
    """Solved rows -> problems: [MASK] wherever nothing is given."""
    response = rows[:, PROMPT_LENGTH:].masked_fill(~is_given(rows), MASK_ID)
    return torch.cat([rows[:, :PROMPT_LENGTH], response], 1)

def is_correct(rows):
    """(n, 18) -> (n,) bool: is it a solution, in either style, with a factor that is allowed?"""
    factor = read_factor(rows)
    own, other = (solve(rows, factor.clamp(min=0), style) for style in ("own", "other"))
    digit = digits(factor, 2)
    allowed = ((digit >= rows[:, 3:4]) & (digit <= rows[:, 4:5])).all(1) | (n_choices(rows) == 0)
    return (factor >= 0) & allowed & ((rows == own).all(1) | (rows == other).all(1))

def given_solutions(prompt, style, generator):
    """Prompts of pick -> solved rows in one style, with any factor that is allowed."""
    draw = torch.rand(len(prompt), 2, generator=generator, device=prompt.device)
    chosen = prompt[:, 3:4] + (draw * n_choices(prompt)[:, None]).long()
    return solve(prompt, read_number(chosen), style)

def best_order(logits, tokens, candidates):
    """An order for `decode`: factor, working, product, wherever the layout puts them."""
    return BEST_PLACE.to(tokens.device)[columns_of(tokens)][candidates]

# == Who learns what: corpus, queries, validation, test ============================================

def split_problems(seed):
    """-> corpus (n, 18) of solved rows, odds (n,) of drawing each, and problems (n, 18):
    {"query": {domain: ..}, "validation": {domain: ..}, "test": {domain: ..}}.

    First numbers are 10 to 69: quick to learn.  A prompt of pick is in one part only.  One pair
    of numbers in eight, in both orders, is in no part of the corpus, not even inside pick: these
    are the problems of mul and add.  What an arm learns for queries may contain their products."""
    generator = torch.Generator().manual_seed(seed)
    pair_draw = torch.rand(100, 100, generator=generator)                # [smaller, larger]
    prompt_draw = torch.rand(100, 10, 10, generator=generator)           # [first, low, high]
    numbers, layouts = torch.arange(10, 100), torch.tensor([token(name) for name in "abc"])
    corpus, odds, problems = [], [], {"query": {}, "validation": {}, "test": {}}

    def draw_of_pair(first, second):
        return pair_draw[torch.minimum(first, second), torch.maximum(first, second)]

    def learn(rows, share):
        corpus.append(rows)
        odds.append(torch.full((len(rows),), share / len(rows)))

    def ask(part, domain, rows):
        problems[part].setdefault(domain, []).append(hide(rows))

    for domain, operator in (("mul", "x"), ("add", "+")):
        first, second, layout = torch.cartesian_prod(numbers[:60], numbers, layouts).unbind(1)
        rows = solve(write_prompts(first, operator, layout), second)
        draw = draw_of_pair(first, second)
        learn(rows[draw >= 0.125], CORPUS_SHARES[domain])
        ask("validation", domain, rows[(draw >= 0.07) & (draw < 0.125)])
        ask("test", domain, rows[draw < 0.07])
    for c in CHOICES:                            # every prompt, with each of its factors
        first, low, ten, unit, layout = torch.cartesian_prod(numbers[:60],
            torch.arange(2, 11 - c), torch.arange(c), torch.arange(c), layouts).unbind(1)
        factor, draw = 10 * (low + ten) + low + unit, prompt_draw[first, low, low + c - 1]
        rows = solve(write_prompts(first, "x", layout, low, low + c - 1), factor)
        known = (draw < 0.4) & (draw_of_pair(first, factor) >= 0.125)
        learn(rows[known], CORPUS_SHARES["pick"] / len(CHOICES))
        once = ten + unit == 0                   # in a problem the factor is hidden
        if c > 1:                                # where there is a choice
            ask("query", "pick", rows[once & (draw >= 0.4) & (draw < 0.67)])
        ask("validation", "pick", rows[once & (draw >= 0.67) & (draw < 0.77)])
        ask("test", "pick", rows[once & (draw >= 0.77)])
    def shuffle(parts):
        rows = torch.cat(parts)
        return rows[torch.randperm(len(rows), generator=generator)]
    problems = {part: {domain: shuffle(parts) for domain, parts in domains.items()}
                for part, domains in problems.items()}
    return torch.cat(corpus), torch.cat(odds), problems

# == Figures and pictures as text ==================================================================

def by_choices(rows, values):
    """Means over rows of pick, values (n,) -> {"2-5": .., "1": .., .. "5": ..}, by c; bool in
    percent.  In "2-5" each c weighs the same; c = 1, nothing to choose, stands apart."""
    c, values = n_choices(rows), 100.0 * values if values.dtype == torch.bool else values
    means = {str(choices): values[c == choices].mean().item() for choices in CHOICES}
    return {"2-5": sum(list(means.values())[1:]) / 4, **means}

def first_of_each(rows, count):
    """The first `count` of the problems with each number of digits to choose from."""
    return torch.cat([rows[n_choices(rows) == c][:count] for c in CHOICES])

def distinct_right_factors(rows, right, samples):
    """How many different factors the right ones of `samples` answers to a prompt have, on average.
    rows (n * samples, 18), right (n * samples,)."""
    factor = torch.where(right, read_factor(rows), 0).view(-1, samples)
    found = torch.zeros(len(factor), 100, device=rows.device).scatter_(1, factor, 1)
    return found[:, 1:].sum(1).mean().item()

def entropy_gap(rows, entropy):
    """Entropies (n, 12) at the start -> (n,) nats: surest digit of the factor minus surest other
    position.  Above 0, the order of lowest entropy starts at the wrong end."""
    factor, other = (entropy.masked_fill(hidden, torch.inf).amin(1)
                     for hidden in (~is_factor(rows), is_factor(rows)))
    return factor - other

def table(lines):
    """Aligned columns, the first line the header; numbers with one decimal unless they are text."""
    lines = [[cell if isinstance(cell, str) else f"{cell:.1f}" for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("    " + "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
                     for name, *cells in lines)

FIGURES = {                         # what is measured of a model, and what it tells
    "own order": "percent of pick (c = 2 to 5) right if the model chooses what to write next",
    "sampled": "the same with sampled tokens, 16 answers to each of 80 prompts",
    "best order": "percent of pick (c = 2 to 5) right if it is told the order: is the skill kept?",
    "best order, sampled": "the same with sampled tokens: are late ones still sure enough?",
    "mul": "percent right where the factor is given: has it forgotten?",
    "add": "percent of sums right: the same",
    "pass@16": "percent of those 80 prompts with a right answer among the 16",
    "right factors": "different right factors among the 16: is the choice as wide as before?",
    "TDS": "how far easy and hard positions are apart in entropy, nats^2 (Eq. 11)",
}

def draw_states(row, rank, entropies):
    """One answer, a row (18,), rank (12,) and for each of its states the entropies (12,) -> lines:
    the names of the fields, each state, the verdict."""
    names = "".join("ppppffuuuttt"[column] for column in columns_of(row[None])[0])
    lines = ["".join(f" {name} " for name in names)]
    for step in range(RESPONSE_LENGTH + 1):
        line = ""
        for position, character in enumerate(to_text(row[PROMPT_LENGTH:])):
            if rank[position] < step:
                line += f"[{character}]" if rank[position] == step - 1 else f" {character} "
            else:                                # one shade more for each half nat
                line += f" {'.:+#@'[min(int(2 * entropies[step][position]), 4)]} "
        lines.append(line)
    return [*lines, ("right" if is_correct(row[None]) else "wrong").center(len(lines[0]))]

def side_by_side(prompt, base, tuned):
    """Two pictures of answers to one prompt of pick, lines each -> text."""
    first, (sign, low, high) = to_text(prompt[:2]), to_text(prompt[2:5])
    labels = ["", *(f"step {step}" for step in range(RESPONSE_LENGTH + 1)), ""]
    lines = [f"{first} {sign} (digits {low} to {high}). p: product, f: factor, u and t: rows of "
             "units and tens.\n[ ] was just written. Others: entropy, by half nats . : + # @\n",
             12 * " " + "base".center(36) + "   |" + "TABOM".center(40)]
    lines += [f"    {name:8}{left}   |  {right}" for name, left, right in zip(labels, base, tuned)]
    return "\n".join(lines)
