# SPDX-License-Identifier: MIT
"""The lab: its page is what its figures give, its arms are what they say, and no figure is lost,
mixed or copied.  Figures made here are tiny and mean nothing."""
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

import lab
import page
import tabom
import toy_data as toy

TINY = ["pretrain_updates=2", "queries=60", "keep=all", "epochs=1", "test_problems=5"]

def run(folder, *arguments, tiny=TINY):
    return lab.main(["--folder", str(folder), *arguments, "--set", *tiny])

def count(found):
    return sum(map(len, found.values()))

@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """Rollouts of which each third one is right, with random ranks."""
    seed = lab.Seed(4, tmp_path_factory.mktemp("seed"), tabom.configure(TINY))
    solved = tabom.solved(toy.given_solutions(seed.queries, "own", seed.draws()))
    ranks = torch.stack([torch.randperm(12, generator=seed.draws().manual_seed(i))
                         for i in range(60)])
    answers = replace(solved, decode_rank=ranks)
    seed.rollouts, seed.kept = (answers, torch.arange(60) % 3 == 0), answers[::3]
    return seed

# ==== Arms ========================================================================================
def test_ranks_of_other_answers(seed):
    kept, known = seed.kept, {tuple(rank.tolist()) for rank in seed.kept.decode_rank}
    for source in (lab.swapped, lab.alike):
        data = source(seed)
        assert data.response.equal(kept.response) and data.prompt.equal(kept.prompt)
        assert {tuple(rank.tolist()) for rank in data.decode_rank} == known
    assert (lab.swapped(seed).decode_rank != kept.decode_rank).any(1).all()
    c, layout = toy.n_choices(kept.prompt), kept.prompt[:, 5]
    for row, rank in enumerate(lab.alike(seed).decode_rank):
        donor = (kept.decode_rank == rank).all(1).nonzero().item()
        assert c[donor] == c[row] and layout[donor] == layout[row]
    assert lab.backwards(seed).decode_rank.equal(11 - kept.decode_rank)

def test_answers_without_a_checker(seed):
    answers, right = seed.rollouts
    rows = [tuple(row.tolist()) for row in tabom.rows_of(answers)]
    for source in (lab.unchecked, lab.wrong):
        data = source(seed)
        chosen = [rows.index(tuple(row.tolist())) for row in tabom.rows_of(data)]
        assert len(data) == 20 and len({*chosen}) > 15
        assert source is lab.unchecked or not any(right[i] for i in chosen)

def test_old_solutions_and_replay(seed):
    for row in tabom.rows_of(lab.old_solutions(seed)).tolist():
        text, fields = toy.to_text(row), {}
        names = "".join("ppppffuuuttt"[x] for x in toy.columns_of(torch.tensor([row]))[0])
        for name, character in zip(names, text[6:]):
            fields[name] = fields.get(name, "") + character
        first, factor = int(text[:2]), int(fields["f"])
        assert (int(fields["p"]), int(fields["u"]), int(fields["t"])) == (
            first * factor, first % 10 * factor, first // 10 * factor)
    old = tabom.rows_of(lab.old_solutions(seed))
    spoiled = torch.cat([old[:, :17], (old[:, 17:] + 1) % 10], 1)
    assert lab.is_correct(old, True).all() and not lab.is_correct(spoiled, True).any()
    assert lab.is_correct(old, False).equal(toy.is_correct(old)) and not toy.is_correct(old).all()
    replay = lab.with_replay(seed)
    assert len(replay) == 75 and toy.is_correct(tabom.rows_of(replay)).all()

def test_the_lab_trains_as_the_tutorial_does(seed):
    torch.manual_seed(0)
    seed.base = tabom.Denoiser(len(toy.VOCABULARY), 18)
    own = lab.read("SFT-SD", seed.settings)[1]
    here = lab.learn("SFT-SD", seed, seed.kept, tabom.nelbo_loss, own)
    there = tabom.fine_tune("SFT-SD", seed.base, seed.kept, seed.queries, seed.settings, 4)
    assert all(map(torch.equal, here.parameters(), there.parameters()))
    assert not here.head.weight.equal(seed.base.head.weight)
    del seed.base

def test_every_arm_of_every_group_can_be_read():
    for name in itertools.chain(*lab.GROUPS.values()):
        line, own = lab.read(name, tabom.Settings())
        assert own.learning_rate == (float(name.split("learning_rate=")[1]) if "rate=" in name
                                     else 2e-5) and len(line) == 3
    for wrong in ("DPO", "swapped:style=own", "wrong:margin=-1"):
        with pytest.raises(ValueError):
            lab.read(wrong, tabom.Settings())

# ==== Figures =====================================================================================
def test_pass_at_k_counts_all_choices(monkeypatch, seed):
    right = torch.tensor([[True] * 3 + [False] * 13, [False] * 16] * 4)
    monkeypatch.setattr(tabom, "answer", lambda *_, **__: (None, right.flatten()))
    found = lab.pass_at(None, seed.tests["pick"], 0)
    for k in (1, 4, 16):
        hits = [any(i < 3 for i in some) for some in itertools.combinations(range(16), k)]
        assert found[f"pass@{k} of 8"] == pytest.approx(50 * sum(hits) / len(hits))

def test_pairs_are_counted_by_distance(monkeypatch, seed):
    entropy = torch.arange(12.0).expand(20, 12).clone()
    data = replace(seed.kept, decode_rank=torch.arange(12).expand(20, 12))
    entropy[:10, 1] = -1                         # in half of the rows the second is surest
    monkeypatch.setattr(tabom, "replay", lambda *_, **__: [(None, entropy)])
    found = lab.pairs_in_order(None, data)
    found = [found[f"pairs in order, {x} apart"] for x in ("next, 1", "next, 2", "later, 1")]
    assert found == [50, 100, 100]

def test_who_writes_and_who_says_where(monkeypatch, seed):
    torch.manual_seed(0)
    base, model = (tabom.Denoiser(len(toy.VOCABULARY), 18).eval() for _ in range(2))
    pick, answer, ranks = seed.tests["pick"], tabom.answer, []
    def watch(writer, rows, order):
        ranks.append((writer, answer(writer, rows, order=order)[0].decode_rank))
        return answer(writer, rows, order=order)
    monkeypatch.setattr(tabom, "answer", watch)
    assert len(lab.crossed(base, base, pick)) == len(lab.crossed(base, model, pick)) == 3
    own, again, _, (first, by_model), (second, by_base), (third, _) = ranks
    assert own[1].equal(answer(base, pick)[0].decode_rank) and own[1].equal(again[1])
    assert first is base and second is third is model and not by_model.equal(own[1])
    assert (by_base == 0).equal(own[1] == 0) and not (by_model == 0).equal(own[1] == 0)

def test_verdicts_and_claims():
    mean, low, high = lab.interval([1.0, 2.0, 6.0])
    assert (mean, (high - low) / 2) == pytest.approx((3, 4.303 * math.sqrt(7 / 3)), rel=1e-3)
    for bounds, sign, expected in (((1, 2), 1, "shown"), ((-1, 2), 1, "not shown"),
                                   ((-2, -1), 1, "refuted"), ((-2, -1), -1, "shown"),
                                   ((1, 2), -1, "refuted"), ((-1, 2), -1, "not shown")):
        assert lab.verdict(*bounds, sign, 0) == expected
    text = "# no\n1 text\n  mul | A - 0.5 B:x=1e-06 - C-d | < -5 | shown\n"
    assert lab.claims(text) == [("1 text", ["mul"], {"A": 1, "B:x=1e-06": -0.5, "C-d": -1}, -1,
                                 -5, "shown")]
    figures = {"A": 0.0, "B:x=1e-06": 2.0, "C-d": 8.0}
    found = {seed: {arm: {"mul": value + (arm == "A") * seed} for arm, value in figures.items()}
             for seed in (0, 1, 2)} | {9: {"base": {}}}                  # one that has nothing
    line, = lab.judge(found, text)
    assert line[2:4] == [3, "-8.00 [-10.48, -5.52]"] and line[-1] == "shown"
    text = "1 text\n  mul or add | A - C-d | < -4 | shown\n  mul | A - D | < -5 | shown\n"
    for seed in (0, 1, 2):                       # the better of two figures; one that is lacking
        found[seed]["A"]["add"], found[seed]["C-d"]["add"] = 0.0, 0.0 + seed / 100
    either, lacking = lab.judge(found, text)
    assert either[-1] == "shown" and either[3].count("[") == 2
    assert lacking[2:4] == [0, ""] and lacking[-1] == "not measured"
    row = page.by_claim([either, lacking]).splitlines()[-1]              # the worst line decides
    assert row.endswith("| shown | **not measured** |") and row.count("<br>") == 1

def test_every_claim_can_be_judged_from_the_arms_that_are_run():
    run_here = {*itertools.chain(*lab.GROUPS.values()), "prior", "contrast prior", "own answers",
                "other style"}
    for claim, _, weights, *_ in lab.claims((lab.HERE / "claims.txt").read_text()):
        assert {*weights} <= run_here, claim

# ==== The pages say what was measured =============================================================
PAGE, FRONT = (path.read_text(encoding="utf-8") for path in (
    lab.HERE / "README.md", lab.HERE.parent / "README.md"))
FIGURE = r"[-+]?\d+\.\d+|\d+ %"                  # what must have been measured

@pytest.fixture(scope="module")
def ten():
    return page.among(lab.load(lab.HERE), page.TEN)

def test_tables_and_film_stand_on_their_pages():
    for title, table in page.tables(lab.HERE).items():
        assert table in (FRONT if title == "Front page" else PAGE), title
    assert (lab.HERE / "film.txt").read_text().rstrip() in FRONT

def without(text, said):
    """A page less tables and code, and less what it must say, word for word."""
    text = " ".join(re.sub(r"(?ms)^\|[^\n]*|```.*?```", "", text).split())
    for words in said:
        assert words in text, words
    return re.sub("|".join(map(re.escape, sorted(said, key=len, reverse=True))), "", text)

def at_rate(ten, arm, rate, figure="own order"):
    return page.mean_of(page.among(ten, page.FIVE), lab.at(arm, rate), figure)

def test_every_figure_of_the_front_page_was_measured(ten):
    mean, more, kept = partial(page.mean_of, ten), partial(page.change, ten), "best order, sampled"
    rated, whole = partial(at_rate, ten), partial(page.mean_of, ten, digits=0)
    last = (lab.HERE / "demo.txt").read_text().split("best order, sampled")[-1].splitlines()[1:9]
    demo = {name: own for name, own, *_ in map(str.split, last)}
    rivals = sorted(whole(arm, "own order") for arm in ("SFT-SD", "T3D", "masking"))
    smaller = "TABOM:margin=0.2"
    film = re.findall(r">(\d\.\d\d)<", (lab.HERE / "film.svg").read_text())
    surest = min(film[12:24])                    # of TABOM, before any write
    rest = without(FRONT, [
        f"the blanks, {whole('No-SFT', 'best order')} % of its answers are right.",
        f"If it chooses the order, {whole('No-SFT', 'own order')} %.",
        f"it gets {rivals[0]} to {rivals[-1]} % with three other losses,",
        f"**{whole('TABOM', 'own order')} % with TABOM**",
        f"but sample the tokens, {whole('No-SFT', kept)} % become {whole('TABOM', kept)} %.",
        f"The {whole('TABOM', 'own order')} % need a larger margin (a setting of the loss) "
        f"than the paper's, which gives {whole(smaller, 'own order')} % at",
        f"gives {whole('contrast prior', 'own order')} % without training",
        f"adds {more('TABOM', 'masking')} to masking.**",
        f"first digits of tens ({min(film[:12])})",
        f"digit of the factor ({surest}; base: {film[film.index(surest) - 12]}),",
        f"ranks of another prompt's answer it gains {more('alike')}.",
        f"paper's gives {more(smaller, 'masking')} over masking "
        f"and is {more('T3D', smaller).split()[0].removeprefix('+')} below T3D.",
        f"(unchecked: {more('unchecked').split()[0]}, not {more('TABOM').split()[0]}).",
        f"({rated('SFT-GT', 3e-6)} and {rated('TABOM', 2e-5)} %, seeds 10 to 14),",
        f"but gets {rated('SFT-GT', 3e-6, kept)} % if sampled in the best order.",
        f"(`mul` at 1e-4: {rated('SFT-GT', 1e-4, 'mul')} %).",
        f"margin TABOM gets {rated(smaller, 2e-4)} % at 2e-4;",
        f"it falls (1e-4, 1 nat: {rated('TABOM', 1e-4, kept)} %).",
        f"T3D: at most {max(rated('T3D', rate) for rate in lab.RATES)} %.",
        f"the base gets {demo['No-SFT']} % right, SFT-SD {demo['SFT-SD']},",
        f"masking {demo['masking']}, TABOM {demo['TABOM']}.",
        f"is surer in only {mean('base', 'pairs in order, later, 1 apart')} % (",
        "PyTorch 2.13.0", "95 % intervals", "Python 3.10", "arxiv.org/abs/2605.11854"])
    assert not re.findall(FIGURE, rest.split("**What the gradient does.**")[0])
    gains = ", ".join(more(arm).split()[0] for arm in (smaller, "SFT-SD"))
    assert f"| with the paper's margin {gains}: no difference shown |" in FRONT

def test_every_figure_of_the_evidence_was_measured(ten):
    mean, more, kept = partial(page.mean_of, ten), partial(page.change, ten), "best order, sampled"
    five, four, three = (page.among(ten, page.FIVE[:n]) for n in (5, 4, 3))
    tuned, smaller, rated = lab.at("SFT-GT", lab.TUNED), "TABOM:margin=0.2", partial(at_rate, ten)
    turn = {arm: more(arm, figure="turn of the factor").split()[0] for arm in ("TABOM", "masking")}
    gpu = lab.load(lab.HERE / "gpu")
    rest = without(PAGE, [
        *(more(arm) for arm in ("TABOM", "alike", "swapped", "shuffled", "reversed", "unchecked",
                                "wrong", lab.at("TABOM", 1e-4), tuned, lab.at("SFT-GT-old", 1e-6))),
        *(more("TABOM", arm) for arm in ("SFT-SD", "masking", "dInfer", "T3D", tuned)),
        *(f"{arm} by {more(smaller, arm)}" for arm in ("masking", "SFT-SD", "T3D")),
        more("masking", "SFT-SD"), f"a base of {page.mean_of(three, 'No-SFT', 'own order')}.",
        *(more(arm, "No-SFT", kept) for arm in ("TABOM", "masking", lab.at("TABOM", 1e-4))),
        *(more("TABOM", "No-SFT", name) for name in ("sampled", "pass@16 of 160", "two a step")),
        *(page.change(five, "TABOM", lab.at(arm, rate))
          for arm, rate in (("SFT-GT", 3e-6), ("SFT-GT-old", 5e-6))),
        f"{mean('contrast prior', 'own order')} % right.", f"gets {mean('TABOM', 'own order')} %.",
        f"by 0.3 nats the base gets {mean('head start 0.3', 'own order')} %.",
        "by 0.1, 0.2, 0.3, 0.5 or 1 nat, the base gets",
        f"{', '.join(mean(f'head start {x}', 'own order') for x in (0.1, 0.2, 0.3, 0.5))} or "
        f"{mean('head start 1.0', 'own order')} %.",
        f"{rated(smaller, 2e-4)} % in the own order and {rated(smaller, 2e-4, kept)} % in the best "
        f"order, sampled, against {rated('TABOM', 2e-5)} and {rated('TABOM', 2e-5, kept)} %.",
        f"masking gets {rated('masking', 2e-4)} %, SFT-SD {rated('SFT-SD', 2e-4)} %, T3D "
        f"{rated('T3D', 2e-4)} (at 5e-4: {rated('T3D', 5e-4)} %), TABOM {rated('TABOM', 2e-4)} %.",
        f"At 3e-6 it gets {rated('SFT-GT', 3e-6)} % in its own",
        f"({rated('SFT-GT', 3e-6, 'mul')} and {rated('SFT-GT', 3e-6, 'best order')} %)",
        *(f"{start} {rated('SFT-GT', 3e-6, figure)} % {end}(TABOM {rated('TABOM', 2e-5, figure)}, "
          f"the base {rated('No-SFT', 2e-5, figure)})" for start, figure, end in (
              ("only", kept, "are right "), ("in the own order,", "sampled", ""))),
        f"gets {rated('SFT-GT-old', 5e-6)} % at 5e-6;",
        f"`mul` falls to {rated('SFT-GT', 2e-4, 'mul')} % at 2e-4.",
        f"comes {turn['TABOM'].removeprefix('-')} steps earlier than with the base, with masking "
        f"{turn['masking'].removeprefix('+')} later (ten seeds).",
        *(f"{word}, {mean('base', f'pairs in order, later, {x} apart')} %" for x, word in (
            (1, "one write apart"), (4, "four apart"), (8, "eight"))),
        *(f"{more(arm, figure='wrong by factor')}{between} {more(arm, figure='wrong by other')}"
          for arm, between in (("TABOM", ", the second by"), ("masking", " and"))),
        f"the base gets {page.mean_of(gpu, 'No-SFT', 'own order')} % in its own order, and TABOM "
        f"gains {page.change(gpu, 'TABOM')};",
        *(page.change(four, arm, figure=figure) for figure in [*page.WHY.values()][1:3]
          for arm in ("TABOM", "SFT-GT")),
        f"is right in {page.mean_of(four, 'SFT-GT', 'product of mul')} % (with the working: "
        f"{page.mean_of(four, 'SFT-GT', 'mul')} %, seeds 10 to 13).",
        "by 3.8 points [1.1, 6.4]:", "PyTorch 2.13.0", "95 % interval", "near 100 %",
        "PyTorch 2.11", "`X - 0.5 TABOM - 0.5 No-SFT < 0`", "about 52 %"])
    assert not re.findall(FIGURE, rest)

# ==== Nothing is lost, mixed or copied ============================================================
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path):
    arguments = ["--seeds", "3", "4", "--arms", "SFT-SD", "swapped"]
    assert run(tmp_path / "whole", *arguments) == 0
    command = [sys.executable, lab.__file__, "--folder", str(tmp_path / "killed"),
               *arguments, "--set", *TINY]
    for number in range(5):                      # each time when one file more has been written
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and count(lab.load(tmp_path / "killed")) <= number:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole, killed = (lab.load(tmp_path / name) for name in ("whole", "killed"))
    assert whole == killed and count(whole) == 6

def test_what_cannot_stand_together_is_refused(tmp_path, capsys):
    assert run(tmp_path, "--seeds", "3", "--arms", "No-SFT") == 0
    for seed in ("3", "5"):                      # another recipe for the same or another seed
        assert run(tmp_path, "--seeds", seed, "--arms", "No-SFT", tiny=[*TINY, "queries=61"]) == 2
    assert not (tmp_path / "figures" / "seed-5").exists()
    (copy := lab.path_of(tmp_path, 7, "No-SFT")).parent.mkdir()
    copy.write_text(lab.path_of(tmp_path, 3, "No-SFT").read_text())
    assert run(tmp_path, "--seeds", "3", "--arms", "No-SFT") == 2
    copy.unlink()
    assert run(tmp_path, "--seeds", "3", "--arms", "DPO") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("lab.py: ") for line in lines)
    assert "another recipe" in lines[0] and "a copy?" in lines[2]

def test_pictures_come_out_the_same(tmp_path):
    pytest.importorskip("matplotlib")
    for seed in page.FIVE:
        for name in ("No-SFT", *lab.GROUPS["rates"], *lab.GROUPS["sweeps"]):
            figures = {figure: 50 + seed for figure in ("own order", *page.COLUMNS.values())}
            lab.save(lab.path_of(tmp_path, seed, name), {
                "seed": seed, "arm": name, "figures": figures,
                "recipe": lab.recipe(name, tabom.Settings())})
    drawn = []
    for _ in range(2):
        page.draw_rates(tmp_path)
        page.draw_frontier(tmp_path)
        drawn.append([(tmp_path / name).read_bytes() for name in ("rates.svg", "frontier.svg")])
    assert drawn[0] == drawn[1]

def test_where_an_answer_goes_wrong(monkeypatch):
    """The film of the front page: a 0 as the second digit of tens, 1.., fits neither 164 nor 205.
    Then the last digit written: a factor of 45 does not fit what stands there, 55 does."""
    problem = torch.tensor([toy.token(x) for x in "41x45b"])
    wrong, right, last = answers = torch.tensor([[*map(int, word)] for word in (
        "205105551255", "205205552255", "205205452255")])
    rank = torch.tensor([3, 8, 7, 1, 0, 2, 11, 4, 9, 5, 10, 6]).argsort()
    factor_last = torch.tensor([0, 1, 2, 3, 4, 5, 11, 6, 7, 8, 9, 10])
    hopes = [lab.last_hope(torch.cat([problem, answer]), order) for answer, order in zip(
        answers, (rank, rank, factor_last))]
    assert hopes == [8, 13, 12]
    monkeypatch.setattr(tabom, "replay", lambda *_, **__: [])
    monkeypatch.setattr(toy, "by_choices", lambda _, x: {"2-5": 100 * x.float().mean().item()})
    prompts = problem.expand(3, -1)
    found = lab.why(None, prompts, tabom.Trajectories(prompts, answers, torch.stack(
        [rank, rank, factor_last])))
    assert found["wrong by factor"] == found["wrong by other"] == pytest.approx(100 / 3)
    states = [torch.rand(12) for _ in range(12)]
    svg = page.picture(problem, [("base", wrong, rank, states), ("TABOM", right, rank, states)])
    assert svg.count("answer is possible after step 8") == 5 and svg.count("<animate ") == 13
    assert "41 x a factor of your own choice, digits from 4 to 5" in svg
